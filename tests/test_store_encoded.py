"""The encoded store: what it gives is what encoding gives, whoever was killed meanwhile; and batches that follow from their number alone."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from vidgen.clip import Clip
from vidgen.data import encode as encoding
from vidgen.data.buckets import Bucket, Place, available, known, lengths, place, sort, usual
from vidgen.data.encode import encode, encoder, encoders, key, locked
from vidgen.data.encoded import EncodedStore, Row, padded, save_shard, trimmed
from vidgen.data.loader import Live, Loader, order, steps_per_epoch
from vidgen.data.manifest import Manifest, Sample
from vidgen.data.sources import world
from vidgen.data.video import BadVideo, Media
from vidgen.errors import CorruptWeights
from vidgen.models.family import family

WORDS = "a red blue circle star moving right left on white black background".split()
SMALL = ["9x64x96"]


def tiny(name="cogvideox", model="cogvideox-2b", seed=0):
    return family(name).tiny(model, words=WORDS, seed=seed)


def clips(n, seed=0):
    "Clips in memory: small, so that the tests are quick."
    return Manifest(tuple(Sample(Clip(s.clip().frames[:9]), s.caption, facts={"n": i}) for i, s in enumerate(world(n, seed=seed))))


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a is b is None or all(equal(a[k], b[k]) for k in {*a, *b}) if isinstance(a, dict) or a is None else all(map(equal, a, b))


@pytest.fixture(scope="module")
def parts():
    return tiny()


@pytest.fixture(scope="module")
def store(parts, tmp_path_factory):
    return encode(clips(11), parts, tmp_path_factory.mktemp("store"), buckets=SMALL, shard_size=4)


# ── what is in it ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

FAMILIES = [("cogvideox", "cogvideox-2b"), ("cogvideox", "cogvideox1.5-5b-i2v"), ("wan", "wan2.1-t2v-1.3b"), ("wan", "wan2.1-i2v-14b-480p"), ("ltx", "ltx-video"), ("hunyuan", "hunyuanvideo"),
            ("hunyuan", "hunyuanvideo-i2v"), ("cosmos", "cosmos-1-7b-text2world"), ("cosmos", "cosmos-1-7b-video2world"), ("cosmos", "cosmos-2-2b-video2world")]


@pytest.mark.parametrize("name, model", FAMILIES)
def test_every_family_learns_from_a_store_what_it_learns_live(tmp_path, name, model):
    here = family(name)
    assert model in {e.name for e in here.entries}, [e.name for e in here.entries]
    parts = tiny(name, model)
    frames, height, width = here.rules(parts.configs).only or (9 if "1.5" not in model else 17, 64, 96)
    data = Manifest(tuple(Sample(s.media, s.caption) for s in world(2)))
    bucket = [f"{frames}x{height}x{width}"]
    saved = Loader(encode(data, parts, tmp_path, buckets=bucket), batch=2, seed=3, prefetch=0).batch_at(1)
    live = Live(data, parts, buckets=bucket, batch=2, seed=3, prefetch=0)
    direct = live.batch_at(1)
    assert saved.keys == direct.keys and torch.equal(saved.z_BFCHW, direct.z_BFCHW)
    assert tuple(saved.z_BFCHW.shape[1:]) == here.latent_shape(parts, frames, height, width) or name == "hunyuan"
    losses = [here.training_loss(parts, b.z_BFCHW, b.text, generator=torch.Generator().manual_seed(0), image_B1CHW=b.image_B1CHW) for b in (saved, direct)]
    assert torch.equal(*losses) and torch.isfinite(losses[0])
    whole = here.encode_prompt(parts, [data[live.numbers[i]].caption for i in live.rows_at(1)[1]], _pictures(parts, data, live, height, width)).condition
    full = here.training_loss(parts, direct.z_BFCHW, whole, generator=torch.Generator().manual_seed(0), image_B1CHW=Live(data, parts, buckets=bucket, batch=2, seed=3, prefetch=0).batch_at(1).image_B1CHW)
    assert torch.equal(full, losses[0]), "what was cut off the text was seen by the transformer"


def _pictures(parts, data, live, height, width):
    if parts.task != "i2v":
        return None
    return torch.cat([encoding.pictured(data[i], encoding.bucketing.frames(data[i], live.placed[i])) for i in (live.numbers[n] for n in live.rows_at(1)[1])])


def test_true_length(parts):
    text = {"embeds_BLD": torch.randn(8, 4), "mask_BL": torch.tensor([1, 1, 0, 1, 0, 0, 0, 0]), "pooled_BD": torch.ones(3)}
    short = trimmed(text)
    assert short["embeds_BLD"].shape == (4, 4) and short["pooled_BD"].shape == (3,)
    long = padded(short, {"embeds_BLD": 8, "mask_BL": 8})
    assert torch.equal(long["mask_BL"], text["mask_BL"]) and torch.equal(long["embeds_BLD"][:4], text["embeds_BLD"][:4])
    assert trimmed({"embeds_BLD": torch.zeros(5, 2)})["embeds_BLD"].shape == (1, 2)


def test_equal_captions_of_a_shard_are_kept_once(tmp_path):
    from safetensors.torch import load_file

    rows = [Row(f"{i:064x}", torch.zeros(1, 1, 2, 2), None, {"embeds_BLD": torch.full((3 + i % 2, 2), float(i % 2))}) for i in range(6)]
    held = load_file(save_shard(rows, tmp_path / "1x8x8" / "00000.safetensors"))
    assert held["text.offsets"].tolist() == [0, 3, 7] and held["text.of"].tolist() == [0, 1] * 3


def test_the_index_tells_everything(store):
    lines = list(store.rows())
    assert [line["facts"]["n"] for line in lines] == list(range(11)) and len({line["key"] for line in lines}) == 11
    assert {line["shard"] for line in lines} == {"00000.safetensors", "00001.safetensors", "00002.safetensors"}
    assert lines[3]["caption"] == world(4)[3].caption and lines[3]["sha256"] == clips(4)[3].media.hash


def test_a_row_does_not_depend_on_its_neighbours(parts, store, tmp_path):
    alone = encode(clips(11)[5:6], parts, tmp_path, buckets=SMALL)
    assert alone.key(0) == store.key(5) and torch.equal(alone.row(0).mean, store.row(5).mean)


def test_encoders_alone_are_the_encoders_of_the_whole(tmp_path):
    import vidgen

    assert encoder(encoders("shapes-t2v")) == encoder(vidgen.load("shapes-t2v").parts) != encoder(encoders("shapes-i2v"))


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_changed_encoder_never_reuses(store, tmp_path):
    parts = tiny()
    made = encode(clips(2), parts, tmp_path, buckets=SMALL)
    before = made.row(0).mean
    with torch.no_grad():
        next(parts.vae.encoder.parameters()).mul_(1.5)
    with pytest.raises(ValueError, match="another autoencoder or text encoder"):
        encode(clips(2), parts, tmp_path, buckets=SMALL)
    again = encode(clips(2), parts, tmp_path, buckets=SMALL, overwrite=True)
    assert len(again) == 2 and not torch.equal(again.row(0).mean, before) and len(list(tmp_path.glob("9x64x96/*"))) == 1


@pytest.mark.parametrize("change", ["text", "config", "vocabulary", "precision"])
def test_all_that_shapes_a_row_is_in_the_fingerprint(change):
    parts = tiny()
    before = encoder(parts)
    if change == "text":
        with torch.no_grad():
            next(parts.text_encoder.parameters())[0] += 1
    elif change == "config":
        parts.vae.register_to_config(scaling_factor=0.5)
    elif change == "vocabulary":
        parts = family("cogvideox").tiny("cogvideox-2b", words=["red", *WORDS[1:]][::-1])
    else:
        parts.precision = "bf16"
    assert encoder(parts) != before


def test_what_a_key_depends_on(tmp_path):
    at, sample = Place(Bucket(9, 64, 96)), world(1)[0]
    a, b = sample.clip().save(tmp_path / "a.mp4"), tmp_path / "b.mp4"
    b.write_bytes(a.read_bytes())
    same = {key(Sample(str(p), "x"), at, "e") for p in (a, b)}
    assert len(same) == 1, "a file counts by its bytes, not by where it lies"
    others = {key(Sample(str(a), "y"), at, "e"), key(Sample(str(a), "x"), Place(at.bucket, 1.0), "e"), key(Sample(str(a), "x"), Place(Bucket(17, 64, 96)), "e"), key(Sample(str(a), "x"), at, "f"),
              key(Sample(str(a), "x", image=str(b)), at, "e")}
    assert len(others | same) == 6


# ── killed, resumed, shared ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

PROGRAM = """
import sys; sys.path.insert(0, sys.argv[2])
from test_store_encoded import *
encode(clips(24), tiny(), sys.argv[1], buckets=SMALL, shard_size=2)
"""


def test_killed_at_any_time_and_gone_on(parts, tmp_path):
    here = os.path.dirname(__file__)
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "killed"), here], stderr=subprocess.PIPE)
    while len(list(tmp_path.glob("killed/9x64x96/0*.safetensors"))) < 3:
        assert process.poll() is None, process.stderr.read().decode()[-500:]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(FileNotFoundError, match="broken off, run it again"):
        EncodedStore(tmp_path / "killed")
    whole = (tmp_path / "killed/9x64x96/00000.safetensors").read_bytes()
    for name, data in (("7", b"half"), ("0", whole)):
        (tmp_path / f"killed/9x64x96/.0000{name}-abc.part.safetensors").write_bytes(data)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("killed/9x64x96/0*.safetensors")}
    assert 3 <= len(times) < 12
    one, other = encode(clips(24), parts, tmp_path / "killed", buckets=SMALL, shard_size=2), encode(clips(24), parts, tmp_path / "whole", buckets=SMALL, shard_size=2)
    assert all(p.stat().st_mtime_ns == t for p, t in times.items()), "what was done is not done again"
    assert one.hash == other.hash and len(list(one.folder.glob("9x64x96/.*"))) == 0
    assert all(torch.equal(one.row(i).mean, other.row(i).mean) and torch.equal(one.row(i).logvar, other.row(i).logvar) for i in range(24))


def test_two_processes_make_what_one_makes(store, parts, tmp_path):
    shared = encode(clips(11), parts, tmp_path, buckets=SMALL, shard_size=4, processes=2)
    assert shared.hash == store.hash and all(equal(shared.row(i).mean, store.row(i).mean) and equal(shared.row(i).text, store.row(i).text) for i in range(11))


def test_a_helper_that_dies_is_named(parts, tmp_path, monkeypatch):
    class Doomed(encoding._Helper):
        def __init__(self, *args):
            super().__init__(*args)
            self.process.kill()

    monkeypatch.setattr(encoding, "_Helper", Doomed)
    with pytest.raises(OSError, match="SIGKILL.*memory.*What is done is kept"):
        encode(clips(2), parts, tmp_path, buckets=SMALL, shard_size=1, processes=2)
    with locked(tmp_path, seconds=0):
        pass


def test_one_process_at_a_time(parts, tmp_path):
    with locked(tmp_path), pytest.raises(BlockingIOError, match="another process is encoding"):
        with locked(tmp_path, seconds=0.1):
            pass
    with locked(tmp_path, seconds=0):
        pass


def test_the_index_follows_the_manifest(parts, tmp_path):
    encode(clips(6), parts, tmp_path, buckets=SMALL, shard_size=4)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("9x64x96/*")}
    fewer = encode(clips(6)[1:3], parts, tmp_path, buckets=SMALL)
    assert len(fewer) == 2
    twice = encode(Manifest((*clips(7), clips(1)[0])), parts, tmp_path, buckets=SMALL)
    assert len(twice) == 8 and twice.key(0) == twice.key(7) and all(p.stat().st_mtime_ns == t for p, t in times.items())
    assert sorted(p.name for p in tmp_path.glob("9x64x96/*")) == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]


def test_a_damaged_shard_is_named_and_made_again(parts, tmp_path):
    store = encode(clips(5), parts, tmp_path, buckets=SMALL, shard_size=2)
    before, path = store.row(3).mean, tmp_path / "9x64x96/00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptWeights, match="00001.*encode again"):
        EncodedStore(tmp_path).row(3)
    assert torch.equal(encode(clips(5), parts, tmp_path, buckets=SMALL).row(3).mean, before)
    (tmp_path / "9x64x96" / list(EncodedStore(tmp_path).rows())[3]["shard"]).unlink()
    with pytest.raises(CorruptWeights, match="missing"):
        EncodedStore(tmp_path).row(3)


def _flipped(path, at, bit):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_a_flipped_bit_is_never_learned(parts, tmp_path):
    "Wherever it is: in the numbers, in what says where they lie, in the header."
    store = encode(clips(4), parts, tmp_path, buckets=SMALL, shard_size=4)
    rows, path = [store.row(i) for i in range(4)], tmp_path / "9x64x96/00000.safetensors"
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    begins = 8 + int.from_bytes(whole[:8], "little")
    places = [*rng.integers(begins, len(whole), 60), *rng.integers(0, begins, 60), begins, len(whole) - 1]
    noticed = {"header": 0, "numbers": 0}
    for at in map(int, places):
        path.write_bytes(whole)
        _flipped(path, at, int(rng.integers(8)))
        hurt, found = EncodedStore(tmp_path), 0
        for i, row in enumerate(rows):
            try:
                mine = hurt.row(i)
                assert equal(mine.mean, row.mean) and equal(mine.logvar, row.logvar) and equal(mine.text, row.text), f"byte {at} of {begins} + {len(whole) - begins}"
            except CorruptWeights as err:
                assert "00000.safetensors" in str(err) and "encode again" in str(err)
                found += 1
        noticed["numbers" if at >= begins else "header"] += found > 0
    assert noticed["numbers"] == 62 and noticed["header"] > 0, noticed


def test_training_ends_at_a_changed_shard_and_goes_on_when_it_is_encoded_again(parts, tmp_path):
    data = clips(5)
    before = list(Loader(encode(data, parts, tmp_path, buckets=SMALL, shard_size=2), batch=2, seed=0, prefetch=0))
    path = tmp_path / "9x64x96/00001.safetensors"
    size = path.stat().st_size
    for at in range(size - 4000, size, 7):
        _flipped(path, at, 3)
    assert path.stat().st_size == size
    with pytest.raises(CorruptWeights, match="00001.*has changed.*delete the file and encode again"):
        list(Loader(encode(data, parts, tmp_path, buckets=SMALL), batch=2, seed=0, prefetch=0))
    path.unlink()
    after = list(Loader(encode(data, parts, tmp_path, buckets=SMALL), batch=2, seed=0, prefetch=0))
    assert [b.keys for b in after] == [b.keys for b in before] and all(torch.equal(a.z_BFCHW, b.z_BFCHW) for a, b in zip(after, before, strict=True))


def test_shards_without_checksums_are_read_as_before(parts, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    store = encode(clips(2), parts, tmp_path, buckets=SMALL)
    row, path = store.row(1), tmp_path / "9x64x96/00000.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        said = file.metadata()
    assert said.pop("sha256")
    save_file(tensors, path, metadata=said)
    assert torch.equal(encode(clips(2), parts, tmp_path, buckets=SMALL).row(1).mean, row.mean)


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_bad_samples_are_listed_never_fatal(parts, tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    Clip(np.zeros((3, 64, 96, 3), np.uint8)).save(tmp_path / "short.mp4")
    Clip(np.zeros((9, 32, 32, 3), np.uint8)).save(tmp_path / "small.mp4")
    lying = Sample(str(tmp_path / "short.mp4"), facts={"frames": 20, "fps": 8, "height": 64, "width": 96})
    picture = Sample(clips(1)[0].media, image=str(tmp_path / "none.png"))
    bad = [Sample(str(tmp_path / n)) for n in ("none.mp4", "empty.mp4", "short.mp4", "small.mp4")] + [lying]
    store = encode(Manifest((*clips(1), *bad)), parts, tmp_path / "s", buckets=SMALL)
    assert [row["fault"] for row in store.left_out] == ["missing", "empty", "too short", "too small", "too short"] and len(store) == 1
    assert [row["sample"] for row in store.left_out] == [1, 2, 3, 4, 5]
    i2v = encode(Manifest((*clips(1), picture)), tiny(model="cogvideox-5b-i2v"), tmp_path / "i", buckets=SMALL)
    assert "none.png" in i2v.left_out[0]["why"]
    with pytest.raises(ValueError, match="nothing could be encoded.*5 samples were left out.*no such file"):
        encode(Manifest(tuple(bad)), parts, tmp_path / "t", buckets=SMALL)
    with pytest.raises(ValueError, match="no sample"):
        encode(Manifest(()), parts, tmp_path / "u", buckets=SMALL)


def test_impossible_wishes(parts, store, tmp_path):
    for wish, words in [(dict(buckets=["10x64x96"]), "bucket 10x64x96.*nearest: 9"), (dict(buckets=["9x64"]), "is no bucket"), (dict(processes=0), "at least 1"), (dict(shard_size=0), "at least 1")]:
        with pytest.raises(ValueError, match=words):
            encode(clips(1), parts, tmp_path / "s", **wish)
    for wish, words in [(dict(batch=0), "at least 1"), (dict(batch=1, rank=2, world=2), "rank below world"), (dict(batch=1, caption_dropout=1.5), "caption_dropout is a share"), ]:
        with pytest.raises(ValueError, match=words):
            Loader(store, seed=0, **wish)
    with pytest.raises(FileNotFoundError, match="vidgen data encode"):
        Loader(tmp_path / "nowhere", batch=1, seed=0)


def test_a_full_disk_ends_the_work(parts, tmp_path, monkeypatch):
    import errno

    def full(rows, path):
        raise OSError(errno.ENOSPC, "no space left", str(path))

    monkeypatch.setattr(encoding, "save_shard", full)
    with pytest.raises(OSError, match="no space left"):
        encode(clips(1), parts, tmp_path, buckets=SMALL)


# ── buckets ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def media(frames=100, fps=25.0, height=720, width=1280):
    return Media(frames / fps if fps else 0, frames, fps, height, width, 0, False, "h264", False)


def test_places():
    some = [Bucket.parse(b) for b in ("1x480x720", "9x480x720", "49x480x720", "49x720x480", "49x240x360")]
    assert place(media(), some).bucket == Bucket(49, 480, 720) and place(media(height=1280, width=720), some).bucket == Bucket(49, 720, 480)
    assert place(media(), some, fps=8) == Place(Bucket(9, 480, 720), 0.0, 8) and place(media(), some, fps=24).fps is None
    assert place(media(fps=4), some, fps=8).fps is None, "a slow film is read as it comes"
    assert place(media(height=300, width=400), some).bucket == Bucket(49, 240, 360), "never enlarged"
    assert place(media(1, 0, 1000, 1500), some).bucket.frames == 1
    for wrong in (media(5), media(1, 0, 100, 100), media(100, height=100, width=100)):
        with pytest.raises(BadVideo):
            place(wrong, some)
    with pytest.raises(BadVideo, match="picture"):
        place(media(1, 0), some[1:])


@pytest.mark.parametrize("fps", [3, 8, 12, 24, 25])
def test_what_is_available_can_be_read(tmp_path, fps):
    from test_video import film

    from vidgen.data.video import probe, read

    path = film(tmp_path / "a.mp4")
    assert probe(path) == known(Sample(str(path)))
    for start in (0, 1.25):
        n = available(known(Sample(str(path), facts={"start": start})), fps)
        assert len(read(path, fps=fps, start=start, num_frames=n)) == n == len(read(path, fps=fps, start=start))
    assert available(known(Sample(str(path), facts={"start": 2.0, "end": 2.5}))) == 12


def test_usual_buckets_can_be_made():
    for name, model in FAMILIES:
        parts = tiny(name, model)
        rules = family(name).rules(parts.configs)
        for b in usual(parts):
            rules.check(b.frames, b.height, b.width)
    assert lengths((1, 9, 17, 25, 33, 41, 49), 49) == [49, 17, 9, 1]


def test_facts_spare_the_file(tmp_path):
    sample = Sample(str(tmp_path / "not_there.mp4"), facts={"frames": 20, "fps": 25.0, "height": 64, "width": 96, "start": 30.0, "end": 30.8})
    placed, left_out = sort(Manifest((sample,)), [Bucket(9, 64, 96), Bucket(25, 64, 96)])
    assert placed == {0: Place(Bucket(9, 64, 96), 30.0)} and not left_out and known(sample).duration == 0.8, "facts of a window are about the window"


def test_a_window_is_where_it_says(parts, tmp_path):
    from test_video import film

    from vidgen.data.video import read

    path = film(tmp_path / "a.mp4", fps=8)
    store = encode(Manifest((Sample(str(path), facts={"start": 4.0, "end": 6.0}),)), parts, tmp_path / "s", buckets=["9x64x96", "33x64x96"])
    direct = encode(Manifest((Sample(Clip(read(path)[32:41])),)), parts, tmp_path / "t", buckets=SMALL)
    assert list(store.buckets) == ["9x64x96"] and torch.equal(store.row(0).mean, direct.row(0).mean)


# ── batches ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("size", [1, 3, 4, 8, 50])
def test_every_sample_in_every_epoch(size):
    buckets = {"a": np.arange(10), "b": np.arange(10, 13)}
    for epoch in range(3):
        steps = order(buckets, size, 5, epoch)
        assert len(steps) == steps_per_epoch(buckets, size) and {int(i) for _, rows in steps for i in rows} == set(range(13))
        assert all(len(rows) == size and set(rows) <= set(buckets[name]) for name, rows in steps)
    flat = [np.concatenate([rows for _, rows in order(buckets, size, seed, epoch)]).tolist() for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert flat[0] == flat[1] and (size == 50 or flat[0] != flat[2] != flat[3])


def test_a_batch_follows_from_its_number(store):
    plain = Loader(store, batch=2, seed=0, prefetch=0, caption_dropout=0.3)
    ahead = Loader(store, batch=2, seed=0, prefetch=3, caption_dropout=0.3)
    for step in (0, 1, 2, 9, 4, 5, 100):
        a, b = plain.batch_at(step), ahead.batch_at(step)
        assert a.keys == b.keys and torch.equal(a.z_BFCHW, b.z_BFCHW) and torch.equal(a.text, b.text) and a.position == step
    assert not torch.equal(plain.batch_at(0).z_BFCHW, Loader(store, batch=2, seed=1, prefetch=0).batch_at(0).z_BFCHW)
    ahead.close()


def test_an_epoch_can_be_entered_anywhere(store):
    whole = [b.keys for epoch in range(2) for b in Loader(store, batch=3, seed=0, epoch=epoch)]
    assert len(whole) == 8 and [b.keys for b in Loader(store, batch=3, seed=0, epoch=1, position=2)] == whole[6:]
    loader = Loader(store, batch=3, seed=0)
    one = next(iter(loader))
    again = Loader(store, batch=3, seed=0)
    again.load_state(json.loads(json.dumps(loader.state())))
    assert [one.keys, *(b.keys for b in again)] == whole[:4]
    for other, word in ((Loader(store, batch=3, seed=1), "seed 0 -> 1"), (Loader(store, batch=2, seed=0), "samples 3 -> 2")):
        with pytest.raises(ValueError, match=word):
            other.load_state(loader.state())


def test_processes_share_a_step_of_one_shape(parts, tmp_path):
    pictures = tuple(Sample(Clip(s.clip().frames[:1]), s.caption) for s in world(5, seed=50))
    store = encode(Manifest((*clips(7), *pictures)), parts, tmp_path, buckets=["9x64x96", "1x64x96"])
    assert {name: len(rows) for name, rows in store.buckets.items()} == {"9x64x96": 7, "1x64x96": 5}
    whole, ranks = Loader(store, batch=4, seed=0, prefetch=0), [Loader(store, batch=2, seed=0, rank=r, world=2, prefetch=0) for r in (0, 1)]
    assert len(whole) == len(ranks[0]) == 4
    shapes = set()
    for step in range(8):
        both, one = [r.batch_at(step) for r in ranks], whole.batch_at(step)
        assert both[0].z_BFCHW.shape == both[1].z_BFCHW.shape and torch.equal(torch.cat([b.z_BFCHW for b in both]), one.z_BFCHW)
        shapes.add(tuple(one.z_BFCHW.shape))
    assert shapes == {(4, 3, 4, 8, 12), (4, 1, 4, 8, 12)}
    ranks[1].load_state(whole.state())


def test_latents_are_drawn_from_the_posterior(store):
    loader = Loader(store, batch=1, seed=0, prefetch=0)
    name = loader.batch_at(0).keys[0]
    drawn = torch.cat([b.z_BFCHW for b in map(loader.batch_at, range(600)) if b.keys == (name,)])
    row = store.row([store.key(i) for i in range(len(store))].index(name))
    spread = (row.logvar / 2).exp()
    assert len(drawn) > 40 and ((drawn.mean(0) - row.mean) / spread).abs().mean() < 3 / len(drawn) ** 0.5
    assert (drawn.std(0) / spread).mean().item() == pytest.approx(1, abs=0.05)
    mean = Loader(store, batch=1, seed=0, prefetch=0, draw=False).batch_at(0)
    assert mean.keys == (name,) and torch.equal(mean.z_BFCHW[0], row.mean)


def test_captions_are_dropped_at_their_rate(store):
    loader, nothing = Loader(store, batch=11, seed=0, prefetch=0, caption_dropout=0.25), store.empty()["embeds_BLD"]
    dropped = [torch.equal(t, nothing) for step in range(60) for t in loader.batch_at(step).text]
    assert np.mean(dropped) == pytest.approx(0.25, abs=0.05)
    assert all(torch.equal(t, nothing) for t in Loader(store, batch=11, seed=0, prefetch=0, caption_dropout=1.0).batch_at(0).text)


def test_pictures_are_dropped_or_refused(tmp_path):
    store = encode(clips(3), tiny(model="cogvideox-5b-i2v"), tmp_path / "c", buckets=SMALL)
    assert not Loader(store, batch=3, seed=0, prefetch=0, image_dropout=1.0).batch_at(0).image_B1CHW.any()
    assert Loader(store, batch=3, seed=0, prefetch=0).batch_at(0).image_B1CHW.any()
    ltx = family("ltx")
    model = next(e.name for e in ltx.entries if e.task == "i2v")
    store = encode(clips(2), tiny("ltx", model), tmp_path / "l", buckets=SMALL)
    with pytest.raises(ValueError, match="image_dropout=0"):
        Loader(store, batch=2, seed=0, prefetch=0, image_dropout=1.0).batch_at(0)


def test_few_shards_are_open_at_once(parts, tmp_path):
    encode(clips(9), parts, tmp_path, buckets=SMALL, shard_size=1)
    store = EncodedStore(tmp_path, open_shards=3)
    rows = [store.row(i).mean for i in (*range(9), *range(9))]
    assert len(store._open) == 3 and torch.equal(rows[0], rows[9])


def test_what_goes_wrong_ahead_is_said_in_time(parts, tmp_path):
    store = encode(clips(4), parts, tmp_path, buckets=SMALL, shard_size=1)
    loader = Loader(store, batch=1, seed=0, prefetch=2)
    loader.batch_at(0)
    for path in tmp_path.glob("9x64x96/*"):
        path.unlink()
    with pytest.raises(CorruptWeights, match="missing"):
        for step in range(1, 8):
            loader.batch_at(step)
