"""What all tests rely on."""
import secrets
import signal
import tempfile
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a script's background ignores Ctrl-C, and tests that press it would wait for ever
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def postgres():
    from services import Postgres

    server = Postgres()
    yield server
    server.stop()


@pytest.fixture
def redis_server():
    from services import Redis

    server = Redis()
    yield server
    server.stop()


@pytest.fixture
def space():
    "A folder in memory, if the system has such a place: thousands of commits, and what a disk does with them is no matter."
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def database(request, space):
    "The address of a new, empty database: what holds for SQLite must hold for PostgreSQL, which `make test-services` starts."
    if request.param == "postgresql":
        yield request.getfixturevalue("postgres").database(f"t{secrets.token_hex(6)}")
        return
    yield f"sqlite:///{space / 'vidgen.db'}"


@pytest.fixture
def here(database, space):
    "Jobs, and a worker of theirs in this process."
    from test_worker import settings

    from vidgen.serve.jobs import Jobs
    from vidgen.serve.pool import Pool
    from vidgen.serve.worker import Worker

    jobs = Jobs.open(database, space / "files", least_free_gib=0, lease=60)
    yield jobs, Worker(jobs, settings(database, space, name="here"), Pool(None))
    jobs.close()


@pytest.fixture
def opened(database, tmp_path):
    "What opens a Service on an empty database, with settings as serve_queued=5: the suites over HTTP run on SQLite and, by `make test-services`, on PostgreSQL."
    from serving import opened

    made = []

    def another(**values):
        made.append(opened(tmp_path, database_url=database, **values))
        return made[-1]

    yield another
    for service in made:
        service.jobs.close()


@pytest.fixture
def service(opened):
    return opened()
