"""A store in a bucket against a server of its protocol on this machine: verbs, faults, and a training that is copied, lost and gone on with."""
import json
import shutil
import signal
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import TINY, started, the_run, until

import vidgen
from vidgen.bucket import Copying, Mirror, S3Store, at_hand, fetched
from vidgen.store import LocalStore, open_store
from vidgen.train import adapters, trainer
from vidgen.train.config import Recipe
from vidgen.train.loop import Shelf

boto3 = pytest.importorskip("boto3")


@pytest.fixture(scope="module")
def server():
    ThreadedMotoServer = pytest.importorskip("moto.server").ThreadedMotoServer
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


def to(monkeypatch, tmp_path, url):
    for name, value in {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1", "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def lab(server, tmp_path, monkeypatch):
    to(monkeypatch, tmp_path, server)
    bucket = f"lab{hash(tmp_path) % 10**8}"
    S3Store(bucket).client.create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


class Gate:
    "A server of the protocol that takes nothing until the gate is open; who waits for long breaks it open and is counted."

    def __init__(self, server):
        self.app, self.opened, self.patience, self.late, self.arrived, self.seen = server._server.app, threading.Event(), 30, 0, 0, []
        server._server.app = self

    def __call__(self, environ, respond):
        self.arrived += environ["REQUEST_METHOD"] == "PUT"
        if environ["REQUEST_METHOD"] == "PUT" and not self.opened.wait(self.patience):
            self.late += 1
            self.opened.set()
        self.seen += [environ["PATH_INFO"].split("/", 3)[-1]] if environ["REQUEST_METHOD"] == "PUT" else []
        return self.app(environ, respond)


@pytest.fixture
def gate(lab, tmp_path, monkeypatch):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    to(monkeypatch, tmp_path, "http://{}:{}".format(*server.get_host_and_port()))
    yield Gate(server)
    server.stop()


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_both_stores_have_the_same_verbs(lab, tmp_path, kind):
    store = open_store(f"{lab}/some/where") if kind == "bucket" else LocalStore(tmp_path / "s")
    (tmp_path / "a.txt").write_text("from a file")
    store.put("x/a.txt", tmp_path / "a.txt")
    store.put("x/b.bin", b"bytes")
    assert store.list() == store.list("x/") == ["x/a.txt", "x/b.bin"] and store.get("x/a.txt") == b"from a file" and store.size("x/b.bin") == 5
    assert store.path("x/b.bin").read_bytes() == b"bytes" and store.exists("x/a.txt") and not store.exists("x/c.txt")
    for data in (b"more", tmp_path / "a.txt"):
        with pytest.raises(FileExistsError):
            store.put("x/b.bin", data, overwrite=False)
    store.put("x/b.bin", b"other")
    assert store.path("x/b.bin").read_bytes() == b"other"
    store.delete("x/b.bin")
    store.delete("x/b.bin")
    assert store.list() == ["x/a.txt"]
    for wrong in (store.get, store.path, store.size):
        with pytest.raises(FileNotFoundError, match="x/b.bin"):
            wrong("x/b.bin")
    for key in ("../a", "/a", "a//b"):
        with pytest.raises(ValueError, match="not a key"):
            store.put(key, b"")


def test_more_keys_than_a_page_and_a_file_of_several_parts(lab, tmp_path):
    from moto.s3.models import s3_backends

    store = open_store(f"{lab}/many")
    for i in range(1001):
        s3_backends["123456789012"]["aws"].put_object(store.bucket, f"many/{i:04d}", b"")
    assert len(store.list()) == 1001
    (tmp_path / "large").write_bytes(bytes(9 * 2**20))
    store.put("large", tmp_path / "large")
    assert store.size("large") == 9 * 2**20 and store.path("large").stat().st_size == 9 * 2**20


def test_faults_say_what_to_do(lab, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such bucket"):
        open_store("s3://nowhere/x").put("a", b"")
    with pytest.raises(ValueError, match="kind of store"):
        open_store("s3://")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(PermissionError, match="AWS_ACCESS_KEY_ID"):
        open_store(lab).list()
    to(monkeypatch, tmp_path, "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="AWS_ENDPOINT_URL"):
        open_store(lab).list()


def test_a_mirror_makes_up_for_what_was_missed(lab, server, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    (folder / "encoded").mkdir(parents=True)
    (folder / "encoded/large").write_text("not sent")
    (folder / "a").write_text("1")
    mirror = Mirror(folder, f"{lab}/runs")
    assert mirror.sync()
    (folder / "b").write_text("2")
    (folder / "a").unlink()
    with monkeypatch.context() as away:
        to(away, tmp_path, "http://127.0.0.1:9")
        with pytest.warns(UserWarning, match="not copied to s3://lab.*/runs for now"):
            assert not Mirror(folder, f"{lab}/runs").sync()
    assert open_store(f"{lab}/runs").list() == ["run/a"]
    assert mirror.sync() and open_store(f"{lab}/runs").list() == ["run/b"]
    (folder / "c").write_text("3")
    (folder / "b").unlink()
    assert Mirror(folder, f"{lab}/runs").sync() and open_store(f"{lab}/runs").list() == ["run/c"]
    with pytest.raises(FileExistsError, match="is here already"):
        fetched(f"{lab}/runs/run", tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing lies under"):
        fetched(f"{lab}/runs/other", tmp_path)


def test_another_machine_goes_on_from_the_bucket_to_the_same_bits(lab, tmp_path, monkeypatch):
    "Stopped after a checkpoint; its disk is gone; the copy ends where the whole run ends; its adapter is used from there."
    from vidgen.errors import Canceled
    from vidgen.progress import Cancel

    facts = TINY | dict(steps=4, validate_every=0, store=f"{lab}/runs")
    monkeypatch.setenv("VIDGEN_STORAGE_RUNS", str(tmp_path / "one"))
    whole = trainer.train(Recipe(**facts | dict(store="")))
    cancel, plain = Cancel(), trainer.Training.watch
    monkeypatch.setattr(trainer.Training, "watch", lambda self, state: (cancel.cancel() if state.step == 3 else None) or plain(self, state))
    run = trainer.created(Recipe(**facts))
    with pytest.raises(Canceled), run:
        trainer.train(Recipe(**facts), run=run, cancel=cancel)
    monkeypatch.setattr(trainer.Training, "watch", plain)
    shutil.rmtree(run.path)
    monkeypatch.setenv("VIDGEN_STORAGE_RUNS", str(tmp_path / "two"))
    r, again = trainer.reopened(f"{lab}/runs/{run.path.name}")
    assert Shelf(again.path / "checkpoints", 2).last.stem == "step-00000003"
    with again:
        done = trainer.train(r, run=again)
    a, b = load_file(whole.adapter.path), load_file(done.adapter.path)
    assert all(torch.equal(a[k], b[k]) for k in a)
    store = open_store(f"{lab}/runs")
    assert {f"{run.path.name}/{n}" for n in ("metrics.csv", "metrics.jsonl", "artifacts/report.html", f"adapter/{adapters.FILE}", "checkpoints/step-00000004.safetensors")} <= set(store.list())
    assert len([k for k in store.list() if "/step-" in k]) == 2 and json.loads(store.get(f"{run.path.name}/manifest.json"))["status"] == "succeeded"
    from vidgen.generate.adapters import attach

    gen = vidgen.load("shapes-t2v")
    attach(gen, f"{lab}/runs/{run.path.name}/adapter", name="far")
    assert adapters.read_adapter(f"{lab}/runs/{run.path.name}/adapter").hash == gen.adapters["far"]["hash"] == done.adapter.hash
    with pytest.raises(FileNotFoundError, match="holds 0 files"):
        at_hand(f"{lab}/nothing")


def test_a_slow_store_holds_up_no_step(lab, gate, tmp_path, monkeypatch):
    "Nothing is taken before the training has made its last step; at its end all of it is there, and a checkpoint never before what is needed to read it."
    plain = trainer.Training.watch
    monkeypatch.setattr(trainer.Training, "watch", lambda self, state: (gate.opened.set() if state.step == 4 else None) or plain(self, state))
    monkeypatch.setenv("VIDGEN_STORAGE_RUNS", str(tmp_path))
    done = trainer.train(Recipe(**TINY | dict(steps=4, save_every=1, validate_every=0, store=f"{lab}/runs")))
    assert not gate.late
    here = {f"{done.run.path.name}/{p.relative_to(done.run.path)}" for p in done.run.path.rglob("*") if p.is_file() and "encoded" not in p.parts}
    store = open_store(f"{lab}/runs")
    assert set(store.list()) == here and all(store.get(k) == (tmp_path / k).read_bytes() for k in here if "/checkpoints/" in k or k.endswith(".json"))
    first = next(i for i, name in enumerate(gate.seen) if "/checkpoints/" in name)
    assert {"training.json", "before.json", "metrics.jsonl"} <= {name.rpartition("/")[2] for name in gate.seen[:first]}


def test_a_training_that_is_asked_to_stop_waits_for_its_last_copy(lab, gate, tmp_path):
    (tmp_path / "r.yaml").write_text(json.dumps(TINY | dict(steps=400, validate_every=0, store=f"{lab}/runs")))
    child = started(tmp_path, tmp_path / "r.yaml")
    until(lambda: list(tmp_path.glob("train-*/checkpoints/step-*.safetensors")) or child.poll() is not None)
    child.send_signal(signal.SIGTERM)
    until(lambda: json.loads((the_run(tmp_path) / "manifest.json").read_text())["status"] == "canceled" or child.poll() is not None)
    gate.opened.set()
    assert child.wait(60) == 75 and not gate.late, child.communicate()
    last, store = Shelf(the_run(tmp_path) / "checkpoints", 2).last, open_store(f"{lab}/runs/{the_run(tmp_path).name}")
    assert store.get(f"checkpoints/{last.name}") == last.read_bytes() and json.loads(store.get("manifest.json"))["status"] == "canceled"


def test_what_is_deleted_while_it_travels_arrives_whole(lab, gate, tmp_path):
    "A checkpoint makes room for a newer one while it is copied; one that was gone before its turn is passed over."
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/step-1").write_bytes(b"1" * 2**20)
    copying = Copying(folder, f"{lab}/runs")
    plain = copying.mirror.store.put
    copying.mirror.store.put = lambda key, path: ((folder / "checkpoints/step-2").unlink(missing_ok=True), plain(key, path))
    (folder / "checkpoints/step-2").write_bytes(b"2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copying.ask()
        copying.ask()
        copying.ask()
        assert len(copying.asked) <= 2
        until(lambda: gate.arrived)
        (folder / "checkpoints/step-1").unlink()
        gate.opened.set()
        copying.asked[0].result(60)
        assert gate.seen == ["run/checkpoints/step-1"] and not copying.mirror.sent.get("run/checkpoints/step-2")
        copying.settle()
    assert open_store(f"{lab}/runs").list() == []


def test_training_goes_on_when_the_store_is_away(tmp_path, monkeypatch):
    to(monkeypatch, tmp_path, "http://127.0.0.1:9")
    monkeypatch.setenv("VIDGEN_STORAGE_RUNS", str(tmp_path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = trainer.train(Recipe(**TINY | dict(steps=2, validate_every=0, store="s3://lab/runs")))
    assert any("not copied to s3://lab/runs" in str(w.message) for w in caught)
    rows = (done.run.path / "metrics.csv").read_text().splitlines()
    assert done.run.status == "succeeded" and len(rows) == 1 + len(done.run.metrics()) and Path(done.adapter.path).exists()
