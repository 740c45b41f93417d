"""Private servers on loopback for tests: PostgreSQL and Redis, started from Debian's packages and thrown away afterwards."""
import importlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest


def program(name, package, *places):
    "Where a program is; a missing one fails the test and says what to install."
    found = shutil.which(name) or next((str(p) for pattern in places for p in sorted(Path("/").glob(pattern), reverse=True)), None)
    if found is None:
        pytest.fail(f"{name} is missing: `make services` installs Debian's {package}", pytrace=False)
    return found


def package(name):
    "Import what the extra `services` brings; a missing one fails the test and says what to install."
    try:
        return importlib.import_module(name)
    except ImportError:
        pytest.fail(f"{name.partition('.')[0]} is missing: pip install 'vidgen[services]'", pytrace=False)


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def somebody():
    "A user without rights: that of Debian's package, or nobody."
    return next(name for name in ("postgres", "nobody") if name in {user.pw_name for user in pwd.getpwall()})


class Postgres:
    "A cluster of its own in a temporary folder. `url` is for SQLAlchemy; `restart` stops it at once, as a crash would, and starts it again."

    def __init__(self):
        self.initdb = program("initdb", "postgresql", "usr/lib/postgresql/*/bin/initdb")
        self.ctl = str(Path(self.initdb).with_name("pg_ctl"))
        self.folder, self.port = Path(tempfile.mkdtemp(prefix="vidgen-pg-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)), free_port()
        self.user = {"user": somebody()} if os.getuid() == 0 else {}  # the server refuses to run as root
        if self.user:
            os.chown(self.folder, pwd.getpwnam(self.user["user"]).pw_uid, -1)
        self.run(self.initdb, "-D", self.folder / "data", "-A", "trust", "-U", "vidgen", "--no-sync", "-E", "UTF8")
        with open(self.folder / "data/postgresql.conf", "a") as conf:
            conf.write(f"port = {self.port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = ''\nmax_connections = 200\nlogging_collector = off\n")
        self.url = f"postgresql://vidgen@127.0.0.1:{self.port}/postgres"
        self.start()

    def run(self, *command):
        done = subprocess.run([str(c) for c in command], cwd="/", capture_output=True, text=True, timeout=60, **self.user)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self):
        subprocess.run([self.ctl, "-D", self.folder / "data", "-l", self.folder / "log", "-w", "start"], cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60, **self.user)

    def crash(self):
        "Stop at once; what was not committed is gone."
        self.run(self.ctl, "-D", self.folder / "data", "-m", "immediate", "-w", "stop")

    def restart(self, down=0.2):
        self.crash()
        time.sleep(down)
        self.start()

    def database(self, name):
        "A new database; returns its address."
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as conn:
            conn.execute(f'CREATE DATABASE "{name}"')
        return self.url.rpartition("/")[0] + f"/{name}"

    def stop(self):
        subprocess.run([self.ctl, "-D", self.folder / "data", "-m", "immediate", "stop"], cwd="/", capture_output=True, timeout=60, **self.user)
        shutil.rmtree(self.folder, ignore_errors=True)


class Redis:
    "A server of its own that keeps nothing on disk."

    def __init__(self):
        self.binary, self.port, self.process = program("redis-server", "redis-server"), free_port(), None
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self):
        self.process = subprocess.Popen([self.binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"], stdout=subprocess.DEVNULL)
        import redis

        for _ in range(100):
            try:
                redis.Redis(port=self.port).ping()
                return
            except redis.ConnectionError:
                time.sleep(0.05)
        pytest.fail("redis-server did not start")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def flush(self):
        import redis

        redis.Redis(port=self.port).flushall()

    def stop(self):
        if self.process.poll() is None:
            self.kill()
