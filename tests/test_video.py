"""Films as they are found: cut off, damaged, at no fixed rate, lying on their side; and that what is read is what a full decoding shows."""
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from vidgen.clip import Clip
from vidgen.data.sources import world
from vidgen.data.video import BadVideo, boxes, check, picked, probe, read

FRAMES = np.concatenate([world(6)[i].clip().frames for i in range(6)])[:100]


def film(path, frames=FRAMES, times=None, fps=24, gop=12, turn=0, codec="libx264", **options):
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=fps, options={k: str(v) for k, v in options.items()})
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = *frames.shape[1:3], "yuv420p", gop
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000) if times is not None else Fraction(1, fps)
        if turn:
            stream.set_display_rotation(turn)
        for i, rgb in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = (i, Fraction(1, fps)) if times is None else (int(1000 * times[i]), Fraction(1, 1000))
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def fault(call, *args, **kw):
    with pytest.raises(BadVideo) as err:
        call(*args, **kw)
    return err.value.fault


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return film(tmp_path_factory.mktemp("film") / "plain.mp4")


def test_facts(plain):
    assert probe(plain) == check(plain, depth=3)
    m = probe(plain)
    assert (m.frames, m.fps, m.height, m.width, m.rotation, m.vfr, m.codec, m.audio) == (100, 24, 64, 96, 0, False, "h264", False)
    assert m.duration == pytest.approx(100 / 24, abs=1e-4)


@pytest.mark.parametrize("suffix, codec", [("mp4", "libx264"), ("mkv", "libx264"), ("ts", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4")])
def test_reading_is_what_decoding_shows(tmp_path, suffix, codec):
    path = film(tmp_path / f"a.{suffix}", codec=codec)
    every = Clip.open(path).frames
    assert len(every) == 100 and probe(path).frames == 100 and not probe(path).vfr
    assert np.array_equal(read(path), every)
    for start in (0, 11, 12, 13, 50, 95):
        assert np.array_equal(read(path, start=start / 24, num_frames=5), every[start : start + 5])
    assert np.array_equal(read(path, num_frames=4, fps=24 / 33), every[::33])
    assert np.array_equal(read(path, start=2 / 24, fps=12), every[2::2]) and np.array_equal(read(path, fps=24), every)
    assert np.array_equal(read(path, stride=7), every[::7])


def test_only_what_is_needed_is_turned_into_pictures(plain, monkeypatch):
    from vidgen.data import video

    made = []
    monkeypatch.setattr(video, "_to_rgb", lambda frame, inner=video._to_rgb: made.append(frame.time) or inner(frame))
    read(plain, start=1, num_frames=3, fps=1)
    assert made == [1.0, 2.0, 3.0]


def test_what_lies_between_is_not_decoded(plain, monkeypatch):
    from vidgen.data import video

    decoded = []
    monkeypatch.setattr(video, "_decoded", lambda *a, inner=video._decoded: (decoded.append(f.time) or f for f in inner(*a)))
    assert np.array_equal(read(plain, num_frames=3, fps=1 / 2), read(plain)[[0, 48, 96]])
    decoded.clear()
    read(plain, num_frames=3, fps=1 / 2)
    assert len(decoded) < 3 * 13


def test_broken_off(tmp_path, plain):
    whole = plain.read_bytes()
    late = film(tmp_path / "late.mp4", movflags="")
    for name, data, faults in [("empty.mp4", b"", {"empty"}), ("noise.mp4", bytes(range(256)) * 40, {"unreadable"}), ("half.mp4", late.read_bytes()[: late.read_bytes().find(b"moov") - 500], {"unreadable"}),
                               ("page.mp4", b"<!DOCTYPE html><html>not found</html>", {"unreadable"})]:
        (tmp_path / name).write_bytes(data)
        for call in (probe, check, read):
            assert fault(call, tmp_path / name) in faults, name
    assert "moov" not in boxes(tmp_path / "half.mp4")
    with pytest.raises(BadVideo, match="index .*moov.* is missing"):
        check(tmp_path / "half.mp4")
    assert fault(probe, tmp_path / "none.mp4") == "missing" and fault(probe, tmp_path) == "missing"
    front = tmp_path / "front.mp4"
    with av.open(str(plain)) as source, av.open(str(front), "w", options={"movflags": "faststart"}) as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    data = front.read_bytes()
    assert check(front, depth=3).frames == 100 and boxes(front)[1] == "moov"
    for share in (0.99, 0.7, 0.4):
        (tmp_path / "cut.mp4").write_bytes(data[: int(share * len(data))])
        assert fault(check, tmp_path / "cut.mp4", depth=1) == "truncated", share
    for suffix in ("mkv", "ts"):
        data = film(tmp_path / f"b.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(data[: len(data) // 2])
        if suffix == "mkv":
            assert fault(check, tmp_path / "cut.mkv", depth=1) == "truncated"
    assert len(whole) > 1000


@pytest.mark.parametrize("place, depth", [(0, 1), (3, 2), (53, 2), (97, 2), (33, 3), (75, 3)])
def test_damaged_inside(tmp_path, place, depth):
    path = film(tmp_path / "a.mp4", gop=10, bf=0, crf=12, sc_threshold=0)
    with av.open(str(path)) as source:
        packet = [p for p in source.demux(video=0) if p.size][place]
    data = bytearray(path.read_bytes())
    data[packet.pos + 5 : packet.pos + packet.size] = np.random.default_rng(0).bytes(packet.size - 5)
    path.write_bytes(data)
    if depth > 1:
        assert check(path, depth=depth - 1).frames == 100
    assert fault(check, path, depth=depth) == "damaged"


def test_sound_alone(tmp_path):
    with av.open(str(tmp_path / "song.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    for call in (probe, check, read):
        assert fault(call, tmp_path / "song.mp4") == "no video"


def test_no_fixed_rate(tmp_path):
    times = np.cumsum(np.random.default_rng(0).uniform(0.02, 0.2, 100)).round(3)
    path = film(tmp_path / "v.mp4", times=times)
    times -= times[0]
    m, every = probe(path), Clip.open(path).frames
    assert m.vfr and m.fps == pytest.approx(99 / times[-1], rel=1e-3) and check(path).frames == 100
    wanted = [np.abs(times - i / 8).argmin() for i in range(40)]
    assert np.array_equal(read(path, fps=8, num_frames=40), every[wanted])


def test_lying_on_its_side(tmp_path):
    upright = film(tmp_path / "a.mp4", crf=1)
    for turn in (90, -90, 180):
        path = film(tmp_path / f"{turn}.mp4", np.rot90(FRAMES, -turn // 90, (1, 2)), turn=turn, crf=1)
        m = probe(path)
        assert (m.height, m.width) == (64, 96) and m.rotation == turn % 360
        assert np.abs(read(path, num_frames=5).astype(int) - read(upright, num_frames=5)).mean() < 2


def test_too_few_frames(plain):
    for wish in (dict(num_frames=101), dict(start=4, num_frames=5), dict(fps=8, num_frames=35), dict(start=9)):
        assert fault(read, plain, **wish) == "too short"
    for wish in (dict(start=-1), dict(stride=0), dict(fps=0), dict(fps=8, stride=2), dict(num_frames=0)):
        with pytest.raises(ValueError, match="read takes"):
            read(plain, **wish)
    with pytest.raises(ValueError, match="depth"):
        check(plain, depth=4)
    with pytest.raises(ValueError, match="nearest: cover"):
        read(plain, size=(8, 8), fit="covr")


def test_pictures(tmp_path):
    picture = Image.fromarray(FRAMES[0])
    picture.save(tmp_path / "really_a_jpeg.jpg")
    (tmp_path / "really_a_jpeg.jpg").rename(tmp_path / "a.png")
    m = check(tmp_path / "a.png")
    assert (m.codec, m.frames, m.fps, m.duration, m.height, m.width) == ("jpeg", 1, 0, 0, 64, 96)
    assert read(tmp_path / "a.png", size=(32, 32)).shape == (1, 32, 32, 3) and fault(read, tmp_path / "a.png", num_frames=2) == "too short"
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert probe(tmp_path / "turned.jpg").height == 96 and read(tmp_path / "turned.jpg").shape == (1, 96, 64, 3)
    (tmp_path / "bad.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    assert fault(check, tmp_path / "bad.png") == "unreadable"


@pytest.mark.parametrize("suffix", ["gif", "png"])
def test_our_own_gifs_and_strips(tmp_path, suffix):
    clip = world(1)[0].clip()
    path = clip.save(tmp_path / f"a.{suffix}")
    m = check(path)
    assert (m.frames, m.fps, m.duration) == (17, 8, 17 / 8)
    assert np.array_equal(read(path, start=0.25, num_frames=4, fps=4), Clip.open(path).frames[2:10:2])


@pytest.mark.parametrize("fps", [None, 3, 8, 10, 24, 30])
@pytest.mark.parametrize("start", [0, 1.5])
def test_memory_and_disk_agree(plain, fps, start):
    every = Clip.open(plain).frames
    assert np.array_equal(picked(every, 24, start, fps, 1), read(plain, start=start, fps=fps))


def test_a_fault_survives_a_process_border():
    import pickle

    err = pickle.loads(pickle.dumps(BadVideo("empty", "a.mp4", "it has no bytes")))
    assert (err.fault, str(err)) == ("empty", "a.mp4: it has no bytes")
