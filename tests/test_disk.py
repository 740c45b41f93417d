"""R6: disks that are full, read-only, broken or slow, under a real `vidgen serve`: a plain refusal or a failed job, no half files, and all is well again without a restart."""
import contextlib
import errno
import io
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import psutil
import pytest
from serving import PROMPT, client, opened, record, settings
from services import program
from test_jobs import whole, write
from test_worker import until

from vidgen.serve.jobs import Jobs
from vidgen.serve.records import DISK, Unavailable
from vidgen.serve.worker import verdict

httpx = pytest.importorskip("httpx")
SMALL = 24  # MB of the file systems


# in this process, where no privilege and no compiler is needed

@contextlib.contextmanager
def no_file_grows():
    "What a full disk does to this process: whatever would make a file longer than 64 bytes fails (EFBIG, where a disk says ENOSPC)."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_files_that_can_not_grow(tmp_path):
    "The system itself refuses: database, result, upload and readiness say so, nothing is half there, and then all is well."
    service = opened(tmp_path)
    http, jobs = client(service), service.jobs
    job = jobs.submit("noop", {})
    claim = jobs.claim("w")
    path = write(claim, data=b"x" * 200)
    with no_file_grows():
        refused = http.post("/v1/jobs", json={"kind": "noop", "spec": {}})
        assert refused.status_code in (503, 507) and refused.json()["code"] in ("storage_full", "database")
        assert http.get("/health/ready").status_code == 503 and http.get(f"/v1/jobs/{job.id}").status_code == 200
        with pytest.raises(OSError) as err:
            claim.publish([path], {"note": "y" * 100})
        assert err.value.errno in DISK and verdict(err.value)[0]["code"] == "storage_full"
        with pytest.raises(Unavailable) as err:
            jobs.keep(b"z" * 200, "a.png")
        assert err.value.code == "storage_full"
    assert not list((jobs.root / "videos").glob("*")) and not list(jobs.root.rglob("*.part*")) and jobs.list(state="running")
    claim.publish([write(claim, data=b"x" * 200)], {})
    time.sleep(1.1)  # readiness is looked for once a second
    assert http.get("/health/ready").status_code == 200 and http.post("/v1/jobs", json={"kind": "noop", "spec": {}}).status_code == 202
    assert whole(jobs) == {"succeeded": 1, "queued": 1}
    jobs.close()


def test_a_sweep_of_a_disk_that_lets_nothing_go_tries_again(tmp_path, monkeypatch):
    jobs = Jobs.open(f"sqlite:///{tmp_path}/db/vidgen.db", tmp_path / "files", least_free_gib=0)
    sent, real = jobs.keep(b"picture", "a.png"), Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system")))
    with jobs.writing() as ledger:
        ledger.run(ledger.t.artifact.update().values(expires_at=1.0))
    assert jobs.sweep() == 0 and sent.path.exists() and jobs.kept(sent.id).gone
    monkeypatch.setattr(Path, "unlink", real)
    os.utime(sent.path, (0, 0))
    assert jobs.sweep() == 1 and not sent.path.exists()
    jobs.close()


# a whole service

@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    "The library that makes fsync fail."
    made = tmp_path_factory.mktemp("shim") / "faulty.so"
    subprocess.run([program("cc", "gcc"), "-shared", "-fPIC", "-O1", "-o", made, Path(__file__).with_name("faulty.c"), "-ldl"], check=True)
    return made


class House:
    "A `vidgen serve` whose files, and whose database, lie on small file systems of their own; where nobody may mount one, the processes' own limits and rights stand for the disk."

    def __init__(self, folder, shim):
        self.folder, self.fault, self.said = folder, folder / "fault", folder / "said"
        for name in ("files", "db"):
            (folder / name).mkdir()
        settings(folder, storage_root=folder / "files", database_url=f"sqlite:///{folder}/db/vidgen.db", serve_workers=1, serve_models="shapes-t2v", serve_port=0, serve_requests_per_minute=10**7, serve_queued_per_key=10**6, serve_queued=10**6, serve_logs=folder / "logs")
        command = [sys.executable, "-c", "import sys; from vidgen.cli import main; sys.exit(main(sys.argv[1:]))", "serve", "--config", str(folder / "settings.ini")]
        self.apart = subprocess.run(["unshare", "-Urm", "mount", "-t", "tmpfs", "none", str(folder / "db")], capture_output=True).returncode == 0
        if self.apart:
            mounts = " && ".join(f"mount -t tmpfs -o size={SMALL}m none {folder / name}" for name in ("files", "db"))
            command = ["unshare", "-Urm", "sh", "-c", f'{mounts} && exec "$@"', "sh", *command]
        environ = {k: v for k, v in os.environ.items() if k != "PROMETHEUS_MULTIPROC_DIR"} | {"LD_PRELOAD": str(shim), "VIDGEN_TEST_FAULT": str(self.fault)}
        self.process = subprocess.Popen(command, cwd=folder, env=environ, stdout=self.said.open("w"), stderr=subprocess.STDOUT)
        until(lambda: "vidgen serves at" in self.said.read_text() or self.process.poll() is not None, 120)
        self.http = httpx.Client(base_url=self.said.read_text().split("vidgen serves at ")[1].split(",")[0], timeout=120)

    @property
    def tree(self):
        return {self.process.pid, *(p.pid for p in psutil.Process(self.process.pid).children(recursive=True))}

    def seen(self, name):
        "A folder as the service sees it."
        return Path("/proc", str(self.process.pid), "root", *self.folder.parts[1:], name) if self.apart else self.folder / name

    @contextlib.contextmanager
    def full(self, name):
        "No byte is left on the file system."
        filler = self.seen(name) / "filler"
        if self.apart:
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
        else:
            self.limit(0)
        try:
            yield
        finally:
            filler.unlink(missing_ok=True) if self.apart else self.limit(resource.RLIM_INFINITY)

    def limit(self, most):
        for pid in self.tree:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    @contextlib.contextmanager
    def read_only(self, name):
        self.mount(name, "ro")
        try:
            yield
        finally:
            self.mount(name, "rw")

    def mount(self, name, how):
        if self.apart:
            subprocess.run(["nsenter", "-t", str(self.process.pid), "-U", "-m", "--preserve-credentials", "mount", "-o", f"remount,{how}", str(self.folder / name)], check=True)
            return
        for folder in (self.folder / name, *(p for p in (self.folder / name).rglob("*") if p.is_dir())):
            folder.chmod(0o555 if how == "ro" else 0o755)

    @contextlib.contextmanager
    def faulty(self, how):
        self.fault.write_text(how)
        try:
            yield
        finally:
            self.fault.unlink()

    def ask(self, **how):
        return self.http.post("/v1/jobs", json={"spec": {"prompt": PROMPT, "num_frames": 9, "num_inference_steps": 2, **how}})

    def ended(self, answer):
        "The job, when it has ended."
        assert answer.status_code == 202, answer.text
        until(lambda: self.http.get(answer.headers["location"]).json()["state"] not in ("queued", "running"), 120)
        return self.http.get(answer.headers["location"]).json()

    def upload(self):
        from PIL import Image

        out = io.BytesIO()
        Image.new("RGB", (64, 64), "red").save(out, "PNG")
        return self.http.post("/v1/uploads", files={"image": ("a.png", out.getvalue(), "image/png")})

    def is_well(self):
        "A clip is made, an upload taken, and it says so itself."
        until(lambda: self.http.get("/health/ready").status_code == 200, 30)
        assert self.ended(self.ask())["state"] == "succeeded" and self.upload().status_code == 201

    def is_whole(self):
        "No half files, no lost job; looked at from inside. Returns how many jobs are in each state."
        code = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_jobs import Jobs, whole
jobs = Jobs.open("sqlite:///{self.folder}/db/vidgen.db", {str(self.folder / 'files')!r}, least_free_gib=0)
assert not list(jobs.root.rglob("*.part*"))
print(json.dumps(whole(jobs)))"""
        inside = ["nsenter", "-t", str(self.process.pid), "-U", "-m", "--preserve-credentials"] if self.apart else []
        done = subprocess.run([*inside, sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def stop(self):
        self.http.close()
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        for pid in self.tree if self.process.poll() is None else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        self.process.wait()


@pytest.fixture
def house(tmp_path, shim):
    made = House(tmp_path, shim)
    yield made
    made.stop()


@pytest.mark.services
@pytest.mark.timeout(600)
def test_a_service_outlives_its_disks(house):
    house.is_well()
    before = house.tree

    with house.full("files"):  # nothing is left for results, the database lies elsewhere; where the processes' limits stand for the disk, it has no room either
        if house.apart:
            lost = house.ended(house.ask())
            assert (lost["state"], lost["error"]["code"]) == ("failed", "storage_full"), lost
        else:
            assert house.ask().status_code in (503, 507)
        sent = house.upload()
        assert sent.status_code == 507 and sent.json()["code"] == "storage_full"
        until(lambda: house.http.get("/health/ready").status_code == 503, 30)
    house.is_well()

    if house.apart or os.getuid():
        with house.read_only("files"):
            lost = house.ended(house.ask())
            assert (lost["state"], lost["error"]["code"]) == ("failed", "storage_full"), lost
            assert house.upload().status_code == 507
        house.is_well()
    else:
        warnings.warn("read-only was not tried: nothing may be mounted here, and root may write anywhere")

    if house.apart:
        with house.full("db"):  # the log has some room of its own before it must grow
            for _ in range(2000):
                if (refused := house.http.post("/v1/jobs", json={"kind": "noop", "spec": {}})).status_code != 202:
                    break
            assert refused.status_code == 507 and refused.json()["code"] == "storage_full", refused.text
            until(lambda: house.http.get("/health/ready").status_code == 503, 30)
            assert house.http.get("/v1/jobs").status_code == 200
        until(lambda: house.http.get("/health").json()["queue_depth"] == 0, 300)
        house.is_well()

    running = house.ask(num_inference_steps=60)
    until(lambda: house.http.get(running.headers["location"]).json()["state"] == "running")
    with house.faulty("eio"):
        refused = house.ask()
        assert refused.status_code in (503, 507), refused.text
        until(lambda: house.http.get("/health/ready").status_code == 503, 30)
        time.sleep(2)
    found = house.ended(running)
    assert found["state"] == "succeeded" or found["error"]["code"] == "storage_full", found
    house.is_well()

    with house.faulty("slow"):
        assert house.ended(house.ask())["state"] == "succeeded"
    house.is_well()
    assert house.tree == before, "nobody was started again"
    assert set(house.is_whole()) <= {"succeeded", "failed"}
    record("R6", own_file_systems=house.apart, faults=["full", "read-only", "database full", "EIO", "500 ms"], states=house.is_whole())


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_clip_the_disk_refused_leaves_no_file_open(tmp_path):
    "Its space would be taken until the worker ends."
    import numpy as np

    from vidgen.clip import Clip

    clip, path = Clip(np.random.default_rng(0).integers(0, 255, (9, 64, 96, 3), dtype=np.uint8), 8.0, {}), tmp_path / "a.mp4"
    with no_file_grows(), pytest.raises(OSError):
        clip.save(path)
    assert not [f for f in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{f}") and str(tmp_path) in os.readlink(f"/proc/self/fd/{f}")] and not list(tmp_path.iterdir())
    clip.save(path)
    assert len(Clip.open(path).frames) == 9
