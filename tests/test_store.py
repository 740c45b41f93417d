"""Atomic writes, the store's keys, fingerprints."""
import errno
import json
import multiprocessing
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from vidgen import store
from vidgen.errors import CorruptWeights, WeightsMissing
from vidgen.store import LocalStore, atomic_path, atomic_write, check_key, fingerprint, open_store


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_KNOWN", {})


def names(folder):
    return sorted(p.name for p in Path(folder).iterdir())


def weights(path, tensors, **metadata):
    "A safetensors file written by hand, tensors in the order given."
    header, body = {"__metadata__": metadata}, b""
    for name, array in tensors.items():
        data = array.tobytes()
        header[name] = {"dtype": {"float32": "F32", "float16": "F16"}[str(array.dtype)], "shape": list(array.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(4, np.float32)


# --- atomic writes

@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError(errno.ENOSPC, "full")])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    atomic_write(tmp_path / "a.txt", "old")
    with pytest.raises(BaseException), atomic_path(tmp_path / "a.txt") as part:
        part.write_text("half")
        raise error
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_a_full_disk_is_named(tmp_path):
    with pytest.raises(OSError, match="no space left .* nothing was written") as err, atomic_path(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert err.value.errno == errno.ENOSPC and str(tmp_path / "a.txt") in str(err.value)


def _write_within(limit, path):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        atomic_write(path, b"x" * 100_000)
    except OSError as err:
        os._exit(err.errno)
    os._exit(0)


def test_a_real_write_error_leaves_nothing(tmp_path):
    run = multiprocessing.get_context("spawn").Process(target=_write_within, args=(5000, tmp_path / "big.bin"))
    run.start()
    run.join()
    assert run.exitcode == errno.EFBIG and names(tmp_path) == []


def test_killed_while_writing_the_old_file_stays(tmp_path):
    atomic_write(tmp_path / "a.txt", "old")
    code = f"import os, signal\nfrom vidgen.store import atomic_path\nwith atomic_path({str(tmp_path / 'a.txt')!r}) as p:\n    p.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert (tmp_path / "a.txt").read_text() == "old"
    assert LocalStore(tmp_path).list() == ["a.txt"]


def test_of_many_writers_exactly_one_wins(tmp_path):
    won, lost, start = [], [], threading.Barrier(16)

    def write(i):
        start.wait()
        try:
            with atomic_path(tmp_path / "a.txt", overwrite=False) as part:
                part.write_text(str(i))
            won.append(i)
        except FileExistsError as err:
            lost.append(str(err))

    threads = [threading.Thread(target=write, args=(i,)) for i in range(16)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(won) == 1 and (tmp_path / "a.txt").read_text() == str(won[0]) and names(tmp_path) == ["a.txt"]
    assert all("overwrite=True (--overwrite)" in m for m in lost) and len(lost) == 15


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    atomic_write(tmp_path / "a.txt", "one", overwrite=False)
    with pytest.raises(FileExistsError):
        atomic_write(tmp_path / "a.txt", "two", overwrite=False)
    assert (tmp_path / "a.txt").read_text() == "one" and names(tmp_path) == ["a.txt"]


def test_a_link_stays_a_link_and_the_mode_is_ordinary(tmp_path):
    atomic_write(tmp_path / "real.txt", "old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    atomic_write(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text() == "new"
    (tmp_path / "plain.txt").write_text("")
    assert (tmp_path / "real.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


def test_long_names_work(tmp_path):
    name = "ä" * 120 + ".txt"
    assert atomic_write(tmp_path / name, "x").read_text() == "x"


# --- the store

@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", ".", "..", "a/../b", "../a", "a/.b", "a\\b", "a\0b", "a\nb", "a:b", "a?", "a*", "a ", "a.", "x" * 201, "a/" * 300 + "a", None, 7])
def test_unsafe_keys_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match="key"):
        check_key(key)
    with pytest.raises(ValueError, match="key"):
        LocalStore(tmp_path).put(key, b"")


@pytest.mark.parametrize("key", ["a", "a/b.mp4", "ä/ö-1_2 3.txt", "a..b/c"])
def test_good_keys_round_trip(tmp_path, key):
    s = LocalStore(tmp_path)
    s.put(key, b"data")
    assert s.get(key) == b"data" and s.exists(key) and s.size(key) == 4 and s.list() == [key] and s.path(key).read_bytes() == b"data"
    s.delete(key)
    s.delete(key)
    assert not s.exists(key) and s.list() == []
    for verb in (s.get, s.path, s.size):
        with pytest.raises(FileNotFoundError, match="holds no"):
            verb(key)


def test_a_link_that_leads_out_is_not_followed(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a.txt").write_text("secret")
    s = LocalStore(tmp_path / "store")
    s.put("x.txt", b"")
    (s.root / "out").symlink_to(tmp_path / "secret")
    (s.root / "file.txt").symlink_to(tmp_path / "secret" / "a.txt")
    for key in ("out/a.txt", "file.txt"):
        for verb in (s.get, s.exists, s.delete, lambda k: s.put(k, b"")):
            with pytest.raises(ValueError, match="leads out"):
                verb(key)
    assert (tmp_path / "secret" / "a.txt").read_text() == "secret"


def test_put_takes_files_and_keeps_what_is_there_when_told(tmp_path):
    (tmp_path / "f.bin").write_bytes(b"file")
    s = LocalStore(tmp_path / "store")
    s.put("a", tmp_path / "f.bin")
    with pytest.raises(FileExistsError):
        s.put("a", b"other", overwrite=False)
    with pytest.raises(FileNotFoundError):
        s.put("b", tmp_path / "none.bin")
    assert s.get("a") == b"file" and s.list() == ["a"]


def test_list_takes_a_prefix_and_a_missing_folder_is_empty(tmp_path):
    s = LocalStore(tmp_path / "none")
    assert s.list() == [] and not s.exists("a")
    for key in ("v/b", "v/a", "w/a", "va"):
        s.put(key, b"")
    assert s.list("v/") == ["v/a", "v/b"] and s.list("v") == ["v/a", "v/b", "va"]


def test_open_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_store(tmp_path / "s").root == open_store("s").root == open_store((tmp_path / "s").as_uri()).root == tmp_path / "s"
    monkeypatch.setenv("VIDGEN_STORAGE_ROOT", "elsewhere")
    (tmp_path / "settings.ini").write_text("[train]\nthreads = 1\n")
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    assert open_store().root == tmp_path / "elsewhere"
    with pytest.raises(ValueError, match="unknown kind of store 'gopher'"):
        open_store("gopher://host/x")
    with pytest.raises(ValueError, match="three slashes"):
        open_store("file://relative/x")


# --- fingerprints

def test_order_and_metadata_do_not_count_names_shapes_types_and_bytes_do(tmp_path):
    first = fingerprint(weights(tmp_path / "1.safetensors", {"a": A, "b": B}, who="me"))
    assert first == fingerprint(weights(tmp_path / "2.safetensors", {"b": B, "a": A}, who="you"))
    others = [{"a": A, "c": B}, {"a": A.reshape(3, 2), "b": B}, {"a": A, "b": B * 2}, {"a": A}, {"a": A, "b": B, "c": B},
              {"a": A, "b": np.frombuffer(B.tobytes(), np.float16)}]
    found = {first} | {fingerprint(weights(tmp_path / f"o{i}.safetensors", t)) for i, t in enumerate(others)}
    assert len(found) == 1 + len(others)


def test_a_file_a_state_dict_and_a_module_agree_and_so_does_the_real_writer(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(torch.float32)
    net[0].to(torch.bfloat16)
    save_file(net.state_dict(), tmp_path / "net.safetensors", metadata={"format": "pt"})
    assert fingerprint(tmp_path / "net.safetensors") == fingerprint(net) == fingerprint(net.state_dict()) == fingerprint(str(tmp_path / "net.safetensors"))
    with torch.no_grad():
        net[0].weight[0, 0] += 1
    assert fingerprint(net) != fingerprint(tmp_path / "net.safetensors")
    assert fingerprint({"x": torch.zeros(2, 3).t()}) == fingerprint({"x": torch.zeros(3, 2)}) != fingerprint({"x": torch.zeros(6)})
    with pytest.raises(TypeError, match="not a tensor"):
        fingerprint({"a": 3})
    with pytest.raises(TypeError, match="not int"):
        fingerprint(3)


def test_a_pipeline_counts_its_weights_by_component():
    torch = pytest.importorskip("torch")

    class Pipeline:
        def __init__(self, **components):
            self.components = components

    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert fingerprint(Pipeline(vae=a, transformer=b, scheduler=object(), tokenizer=None)) == fingerprint(Pipeline(transformer=b, vae=a))
    assert fingerprint(Pipeline(vae=a, transformer=b)) != fingerprint(Pipeline(vae=b, transformer=a))


def test_a_folder_is_its_safetensors_wherever_it_lies(tmp_path):
    for root in ("one", "two"):
        weights(tmp_path / root / "vae" / "w.safetensors", {"a": A})
        weights(tmp_path / root / "transformer" / "w.safetensors", {"b": B})
    (tmp_path / "two" / "config.json").write_text("{}")
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    weights(tmp_path / "two" / "vae" / "w.safetensors", {"a": A + 1})
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "two")


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(WeightsMissing, match="holds no"):
        fingerprint(tmp_path)
    with pytest.raises(WeightsMissing, match="there is no"):
        fingerprint(tmp_path / "none")


@pytest.mark.parametrize("spoil", [lambda b: b[:-1], lambda b: b[:5], lambda b: b"", lambda b: b + b"x", lambda b: b"\xff" * 8 + b[8:], lambda b: b[:9] + b"!" + b[10:],
                                   lambda b: struct.pack("<Q", 2) + b"[]", lambda b: struct.pack("<Q", 4) + b"null", lambda b: struct.pack("<Q", 9) + b'{"a": {}}'])
def test_damaged_files_are_refused(tmp_path, spoil):
    path = weights(tmp_path / "w.safetensors", {"a": A})
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CorruptWeights, match="w.safetensors .*fetch it again"):
        fingerprint(path)


def aged(path):
    os.utime(path, (1_600_000_000, 1_600_000_000))
    return path


def test_the_cache_is_used_and_notices_change(tmp_path, monkeypatch):
    path = aged(weights(tmp_path / "w.safetensors", {"a": A}))
    first = fingerprint(path)
    monkeypatch.setattr(store, "_KNOWN", {})
    monkeypatch.setattr(store, "_hash_file", lambda p: pytest.fail("hashed again"))
    assert fingerprint(path) == first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights(tmp_path / "w.safetensors", {"a": A + 1})
    assert fingerprint(path) != first


def test_a_file_that_was_just_written_is_not_remembered(tmp_path):
    path = weights(tmp_path / "w.safetensors", {"a": A})
    stat, first = path.stat(), fingerprint(path)
    weights(path, {"a": A + 1})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time: only the bytes differ
    assert fingerprint(path) != first


@pytest.mark.parametrize("content", ["", "{", "[]", '{"stamp": 3}', '{"stamp": [], "hash": "x"}', "\0"])
def test_a_spoilt_cache_is_ignored(tmp_path, content, monkeypatch):
    path = aged(weights(tmp_path / "w.safetensors", {"a": A}))
    first = fingerprint(path)
    [note] = (tmp_path / "cache").rglob("*.json")
    note.write_text(content)
    monkeypatch.setattr(store, "_KNOWN", {})
    assert fingerprint(path) == first


def test_a_cache_that_can_not_be_written_does_not_matter(tmp_path, monkeypatch):
    path = aged(weights(tmp_path / "w.safetensors", {"a": A}))
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(fingerprint(path)) == 64
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    monkeypatch.setattr(store, "_KNOWN", {})
    assert len(fingerprint(path)) == 64
