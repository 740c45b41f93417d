"""Clips: right colours, whole files, clear refusals."""
import base64
import errno
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vidgen.clip
from vidgen.clip import Clip, open_image, sheet, writable

MADE = {"prompt": "a red circle — «größer» 🎬 & <b>", "seed": 7, "model": "shapes-t2v", "nested": {"steps": [1, 2.5, None, True]}}


def toy(num_frames=9, height=32, width=48, seed=0):
    "A bright block that walks over a soft ramp; every frame differs."
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([60 + x * 90 // width, 80 + y * 90 // height, np.full_like(x, 120 + seed)], -1)
    frames = np.stack([base] * num_frames).astype(np.uint8)
    for t in range(num_frames):
        at = (t * (width - 12)) // max(1, num_frames - 1)
        frames[t, height // 4 : height // 4 + 12, at : at + 12] = (230, 40, 30)
    return frames


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# --- what a clip is

@pytest.mark.parametrize("frames, error, message", [
    (toy()[:0], ValueError, "at least one frame"),
    (toy()[:, :0], ValueError, "at least one"),
    (toy().astype(np.float32), TypeError, "from_tensor"),
    (np.full((2, 8, 8, 3), np.nan), TypeError, "NaN"),
    (toy().astype(np.int64), TypeError, "uint8"),
    (toy()[0], ValueError, r"\(T, H, W, 3\)"),
    (toy()[..., :1], ValueError, r"\(T, H, W, 3\)"),
    (toy().transpose(0, 3, 1, 2), ValueError, r"transpose\(0, 2, 3, 1\)"),
    ([toy()[0]], TypeError, "np.stack"),
    (None, TypeError, "not NoneType"),
])
def test_other_frames_are_refused(frames, error, message):
    with pytest.raises(error, match=message):
        Clip(frames)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), "8", None, True, 1001])
def test_other_rates_are_refused(fps):
    with pytest.raises(ValueError, match="fps"):
        Clip(toy(), fps)


def test_provenance_must_be_plain_and_is_copied():
    with pytest.raises(TypeError, match="made"):
        Clip(toy(), made={"model": object()})
    made = {"seed": np.int64(3), "scale": np.float32(0.5), "path": Path("a/b"), "sizes": np.arange(2)}
    clip = Clip(toy(), made=made)
    made["seed"] = 4
    assert clip.made == {"seed": 3, "scale": 0.5, "path": "a/b", "sizes": [0, 1]} and Clip(toy(), made=None).made == {}


def test_a_clip_is_a_sequence_with_a_size_and_a_hash():
    clip = Clip(toy(), 8)
    assert (len(clip), clip.num_frames, clip.height, clip.width, clip.seconds) == (9, 9, 32, 48, 9 / 8)
    assert np.array_equal(clip[3], toy()[3]) and len(list(clip)) == 9
    assert clip.hash == Clip(toy(), 25, {"seed": 1}).hash != Clip(toy(seed=1)).hash
    assert Clip(np.zeros((2, 4, 8, 3), np.uint8)).hash != Clip(np.zeros((2, 8, 4, 3), np.uint8)).hash
    assert Clip(toy()[:, ::-1]).hash == Clip(np.ascontiguousarray(toy()[:, ::-1])).hash
    with pytest.raises(AttributeError):
        clip.fps = 3


def test_from_tensor():
    torch = pytest.importorskip("torch")
    x = torch.tensor([-1.2, -1.0, 0.0, 1.0, 1.1]).view(1, 5, 1, 1).expand(3, 5, 4, 6)
    assert Clip.from_tensor(x, 8, {"seed": 1}).frames[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]
    assert Clip.from_tensor(x.to(torch.bfloat16)).frames.shape == (5, 4, 6, 3)
    assert np.array_equal(Clip.from_tensor(x).frames, Clip.from_tensor(x.numpy()).frames)
    grey = np.arange(256, dtype=np.float32)
    assert Clip.from_tensor(np.broadcast_to((grey / 127.5 - 1)[None, :, None, None], (3, 256, 2, 2))).frames[:, 0, 0, 0].tolist() == list(range(256))


@pytest.mark.parametrize("x, message", [
    (np.zeros((5, 3, 4, 4), np.float32), r"\(3, T, H, W\)"), (np.zeros((3, 4, 4), np.float32), r"\(3, T, H, W\)"), (np.zeros((3, 0, 4, 4), np.float32), "shape"),
    (np.zeros((3, 2, 4, 4), np.uint8), "floats"), (np.full((3, 2, 4, 4), np.nan, np.float32), "100.0% of the values are NaN"),
    (np.full((3, 2, 4, 4), np.inf, np.float32), "NaN or infinite"), (np.full((3, 2, 4, 4), 255.0, np.float32), r"\[-1, 1\]")])
def test_from_tensor_refuses(x, message):
    with pytest.raises(ValueError, match=message):
        Clip.from_tensor(x)


# --- files

@pytest.mark.parametrize("num_frames", [1, 2, 17])
@pytest.mark.parametrize("fps", [8, 23.976, 30000 / 1001, 1 / 3, 50])
@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png", ".MP4"])
def test_every_format_brings_back_frames_rate_and_provenance(tmp_path, suffix, fps, num_frames):
    clip = Clip(toy(num_frames), fps, MADE)
    again = Clip.open(clip.save(tmp_path / f"clip{suffix}"))
    assert again.frames.shape == clip.frames.shape and again.fps == clip.fps and again.made == MADE
    assert names(tmp_path) == [f"clip{suffix}"]
    off = np.abs(again.frames.astype(int) - clip.frames).mean()
    assert off == 0 if suffix == ".png" else off < 4


def test_frames_come_back_in_order_however_alike(tmp_path):
    frames = np.repeat(np.linspace(0, 250, 6).astype(np.uint8), [1, 3, 1, 4, 2, 1])[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8)
    for suffix in (".mp4", ".gif", ".png"):
        back = Clip.open(Clip(frames, 12).save(tmp_path / f"c{suffix}")).frames
        assert back.shape == frames.shape and np.abs(back.astype(int) - frames).max() <= 4, suffix


@pytest.mark.parametrize("size", [(64, 64), (480, 720), (720, 1280)])
def test_flat_colours_survive_mp4(tmp_path, size):
    levels = (0, 85, 170, 255)
    colours = np.array([(r, g, b) for r in levels for g in levels for b in levels], np.uint8)
    if size == (720, 1280):
        colours = colours[::9]
    frames = np.broadcast_to(colours[:, None, None], (len(colours), *size, 3))
    path = Clip(np.ascontiguousarray(frames), 25).save(tmp_path / "c.mp4")
    for t, frame in enumerate(Clip.open(path)):
        assert np.abs(frame.astype(int) - colours[t]).max() <= 4, (colours[t], frame[0, 0])


def test_other_readers_see_the_same_colours(tmp_path):
    cv2 = pytest.importorskip("cv2")
    frames = np.empty((3, 64, 96, 3), np.uint8)
    frames[:] = np.array([(220, 30, 30), (30, 200, 60), (40, 60, 230)], np.uint8)[:, None, None]
    video = cv2.VideoCapture(str(Clip(frames, 8).save(tmp_path / "c.mp4")))
    assert round(video.get(cv2.CAP_PROP_FPS), 3) == 8
    for frame in frames:
        ok, bgr = video.read()
        assert ok and np.abs(bgr[32, 48, ::-1].astype(int) - frame[0, 0]).max() <= 5


def test_the_mp4_is_what_browsers_want(tmp_path):
    av = pytest.importorskip("av")
    path = Clip(toy(17), 8, MADE).save(tmp_path / "c.mp4")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        code = stream.codec_context
        assert (code.name, code.pix_fmt, float(stream.average_rate), stream.frames) == ("h264", "yuv420p", 8, 17)
        assert (code.colorspace, code.color_range, code.color_primaries, code.color_trc) == (1, 1, 1, 1)
        assert container.metadata["title"] == MADE["prompt"] and json.loads(container.metadata["comment"])["made"] == MADE
        assert float(stream.duration * stream.time_base) == pytest.approx(17 / 8)
    data = path.read_bytes()
    assert data.find(b"moov") < data.find(b"mdat"), "the index must come first (faststart)"


@pytest.mark.parametrize("size", [(34, 50), (32, 48), (64, 96), (128, 256)])
def test_the_same_clip_gives_the_same_file(size):
    rng, files = np.random.default_rng(0), set()
    for i in range(40):  # other clips in between leave other bytes in the encoder's memory
        noise = rng.integers(0, 255, (5, size[0] + 2 * (i % 5), size[1] + 2 * (i % 7), 3), dtype=np.uint8)
        for frames in (noise, toy(9, *size)):
            data = io.BytesIO()
            vidgen.clip._write_mp4(data, frames, 8, MADE)
        files.add(data.getvalue())
    assert len(files) == 1


def test_a_very_long_prompt_fits(tmp_path):
    made = {"prompt": "é🎬x" * 30_000}
    for suffix in (".mp4", ".gif", ".png"):
        assert Clip.open(Clip(toy(3), 8, made).save(tmp_path / f"c{suffix}")).made == made


def test_gif_keeps_time_to_a_hundredth_of_a_second(tmp_path):
    Clip(toy(17), 8).save(tmp_path / "c.gif")
    with Image.open(tmp_path / "c.gif") as image:
        lengths = []
        for i in range(image.n_frames):
            image.seek(i)
            lengths.append(image.info["duration"])
    assert set(lengths) == {120, 130} and sum(lengths) == 2120
    with pytest.raises(ValueError, match="50 fps"):
        Clip(toy(), 60).save(tmp_path / "fast.gif")


def test_gif_of_many_colours_is_close(tmp_path):
    y, x = np.mgrid[0:48, 0:64]
    frames = np.stack([np.stack([x * 4 % 256, y * 5 % 256, (x + y + t * 9) % 256], -1) for t in range(5)]).astype(np.uint8)
    back = Clip.open(Clip(frames, 10).save(tmp_path / "c.gif")).frames
    assert back.shape == frames.shape and np.abs(back.astype(int) - frames).mean() < 12


@pytest.mark.parametrize("height, width, near", [(33, 49, "48x32 and 50x34"), (32, 49, "48x32 and 50x32"), (1, 1, "2x2"), (1, 4, "4x2")])
def test_mp4_refuses_odd_sizes_and_the_others_keep_them(tmp_path, height, width, near):
    clip = Clip(toy(2, 40, 60)[:, :height, :width])
    with pytest.raises(ValueError, match=f"nearest: {near}\\. "):
        clip.save(tmp_path / "c.mp4")
    assert names(tmp_path) == []
    for suffix in (".png", ".gif"):
        assert Clip.open(clip.save(tmp_path / f"c{suffix}")).frames.shape == clip.frames.shape


@pytest.mark.parametrize("crf", [0, 52, -1])
def test_quality_out_of_range(tmp_path, crf):
    with pytest.raises(ValueError, match="crf"):
        Clip(toy()).save(tmp_path / "c.mp4", crf=crf)
    assert names(tmp_path) == []


def test_crf_changes_the_size(tmp_path):
    clip = Clip(np.random.default_rng(0).integers(0, 255, (5, 64, 64, 3), dtype=np.uint8))
    assert clip.save(tmp_path / "a.mp4", crf=40).stat().st_size < clip.save(tmp_path / "b.mp4").stat().st_size / 2


# --- where it goes

def test_an_existing_file_is_kept_unless_told(tmp_path):
    first, second = Clip(toy(3)), Clip(toy(5))
    first.save(tmp_path / "c.mp4")
    with pytest.raises(FileExistsError, match=r"overwrite=True \(--overwrite\)"):
        second.save(tmp_path / "c.mp4")
    assert len(Clip.open(tmp_path / "c.mp4")) == 3
    second.save(tmp_path / "c.mp4", overwrite=True)
    assert len(Clip.open(tmp_path / "c.mp4")) == 5 and names(tmp_path) == ["c.mp4"]


def test_places_that_can_not_be_written(tmp_path, monkeypatch):
    clip = Clip(toy(2))
    (tmp_path / "file").write_text("")
    for path, error, message in ((tmp_path, IsADirectoryError, "name a file in it"), (tmp_path / "c.mpeg4", ValueError, "nearest: .mp4"), (tmp_path / "c", ValueError, "all: .mp4, .gif, .png"),
                                 (tmp_path / "file" / "c.mp4", NotADirectoryError, "is a file, not a folder")):
        for attempt in (clip.save, writable):
            with pytest.raises(error, match=message):
                attempt(path)
    assert clip.save(tmp_path / "new" / "folder" / "c.mp4").exists()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="no permission to write in"):
        writable(tmp_path / "c.mp4")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="no permission"):
        Clip(toy()).save(tmp_path / "c.mp4")


FULL = """
import resource, signal, sys
import numpy as np
from vidgen.clip import Clip
clip = Clip(np.random.default_rng(0).integers(0, 255, (9, 128, 128, 3), dtype=np.uint8))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    clip.save(sys.argv[1], overwrite=True)
except OSError as err:
    sys.exit(err.errno)
"""


@pytest.mark.parametrize("limit", [10, 4096, 100_000])
@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path, suffix, limit):
    old = Clip(toy(2), made={"seed": 1}).save(tmp_path / f"c{suffix}").read_bytes()
    run = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / f"c{suffix}"), str(limit)], capture_output=True, text=True)
    assert run.returncode == errno.EFBIG, run.stderr
    assert names(tmp_path) == [f"c{suffix}"] and (tmp_path / f"c{suffix}").read_bytes() == old


def test_ctrl_c_while_writing_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(vidgen.clip._WRITERS, ".mp4", lambda target, *a, **k: (Path(target).write_bytes(b"half"), os.kill(os.getpid(), signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        Clip(toy()).save(tmp_path / "c.mp4")
    assert names(tmp_path) == []


# --- damaged and foreign files

def test_what_is_not_there(tmp_path):
    for path in (tmp_path / "none.mp4", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no clip"):
            Clip.open(path)


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.3, 0.6, 0.95])
def test_a_truncated_file_is_refused(tmp_path, suffix, keep):
    clip = Clip(np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), dtype=np.uint8))
    path = clip.save(tmp_path / f"c{suffix}")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(ValueError, match=f"c{suffix}"):
        Clip.open(path)


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png", ".jpg", ".xyz"])
def test_a_text_is_no_clip(tmp_path, suffix):
    path = tmp_path / f"c{suffix}"
    path.write_text("not a video at all\n" * 50)
    with pytest.raises(ValueError, match=f"c{suffix}"):
        Clip.open(path)


def test_a_film_too_long_for_memory_is_refused(tmp_path, monkeypatch):
    path = Clip(toy(9)).save(tmp_path / "c.mp4")
    monkeypatch.setattr(vidgen.clip, "_LIMIT", 5 * 32 * 48 * 3)
    with pytest.raises(ValueError, match="too many for one clip"):
        Clip.open(path)


def test_foreign_files_open_with_the_rate_of_the_container(tmp_path):
    av = pytest.importorskip("av")
    for name, codec, tags in (("a.mkv", "mpeg4", {}), ("b.mp4", "libx264", {"comment": "my holiday"}), ("c.mp4", "libx264", {"comment": '{"vidgen": 1, "fps": 8.0, "made": {"seed": 3}}'})):
        with av.open(str(tmp_path / name), "w") as out:
            out.metadata.update(tags)
            stream = out.add_stream(codec, rate=15)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for f in toy(6):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(f, format="rgb24")))
            out.mux(stream.encode(None))
        clip = Clip.open(tmp_path / name)
        assert clip.frames.shape == (6, 32, 48, 3) and clip.fps == pytest.approx(15), "somebody changed the speed: the container is right"
        assert clip.made == ({"seed": 3} if name == "c.mp4" else {})


def test_a_film_of_a_telephone_is_turned_upright(tmp_path):
    frames = np.zeros((2, 32, 48, 3), np.uint8)
    frames[:, :8, :8] = 255  # a light in the top left corner
    path = Clip(frames).save(tmp_path / "c.mp4")
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 4 + 40
    assert struct.unpack(">9i", data[at : at + 36]) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    data[at : at + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)  # a quarter turn clockwise
    path.write_bytes(data)
    clip = Clip.open(path)
    assert (clip.height, clip.width) == (48, 32)
    assert clip[0][2, -3].min() > 200 and clip[0][2, 2].max() < 50, "the light is in the top right corner now"


def test_a_gif_from_elsewhere(tmp_path):
    images = [Image.fromarray(f) for f in toy(4)]
    images[0].save(tmp_path / "c.gif", save_all=True, append_images=images[1:], duration=200)
    clip = Clip.open(tmp_path / "c.gif")
    assert clip.num_frames == 4 and clip.fps == 5 and clip.made == {}


def test_a_strip_that_was_resized_is_refused(tmp_path):
    path = Clip(toy(9)).save(tmp_path / "c.png")
    with Image.open(path) as image:
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_itxt("Comment", image.text["Comment"])
        image.resize((101, 33)).save(path, pnginfo=info)
    with pytest.raises(ValueError, match="resized"):
        Clip.open(path)


# --- pictures from elsewhere

def test_paths_arrays_and_images(tmp_path):
    Image.fromarray(toy()[0]).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), toy()[0], Image.fromarray(toy()[0])):
        assert np.array_equal(np.asarray(open_image(source)), toy()[0])
    assert open_image(toy()[0][..., 0]).mode == "RGB"
    with pytest.raises(FileNotFoundError, match="there is no picture"):
        open_image(tmp_path / "none.png")
    with pytest.raises(TypeError, match="a picture is"):
        open_image(3)
    for bad in (toy()[0] / 255, toy(), toy()[0][:0], toy()[0][..., :2]):
        with pytest.raises(ValueError, match="uint8 array"):
            open_image(bad)
    with pytest.raises(ValueError, match="a.png"):
        (tmp_path / "folder.png").mkdir()
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        open_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match="folder.png"):
        open_image(tmp_path / "folder.png")


def test_kinds_of_pictures(tmp_path):
    clear = np.zeros((4, 6, 4), np.uint8)
    clear[:, 3:] = (10, 20, 30, 255)
    seen = np.asarray(open_image(clear))
    assert seen[0, 0].tolist() == [255, 255, 255] and seen[0, 5].tolist() == [10, 20, 30], "transparency lies on white"
    deep = Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(16, 16))
    deep.save(tmp_path / "deep.png")
    assert np.asarray(open_image(tmp_path / "deep.png"))[..., 0].ravel().tolist() == list(range(256)), "16 bits are scaled, not cut"
    Image.fromarray(toy()[0]).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    Image.fromarray(toy()[0]).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(toy()[0][..., 0]).convert("1").save(tmp_path / "bits.png")
    for name in ("cmyk.jpg", "palette.png", "bits.png"):
        assert open_image(tmp_path / name).mode == "RGB"
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "floats.tiff")
    with pytest.raises(ValueError, match="floats.tiff .*floats of no known range"):
        open_image(tmp_path / "floats.tiff")


def test_animations_and_huge_pictures_are_refused(tmp_path):
    Clip(toy(4)).save(tmp_path / "a.gif")
    with pytest.raises(ValueError, match=r"animation of 4 pictures; take one: Clip.open\(path\)\[0\]"):
        open_image(tmp_path / "a.gif")

    def claims(width, height):  # a PNG whose header claims a size
        import zlib

        def chunk(kind, data):
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")

    for size in ((10_000, 10_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)):
        (tmp_path / "huge.png").write_bytes(claims(*size))
        for reader in (open_image, Clip.open):
            with pytest.raises(ValueError, match="megapixels; make it smaller"):
                reader(tmp_path / "huge.png")


def test_a_colour_profile_is_applied(tmp_path):
    from PIL import ImageCms

    Image.fromarray(toy()[0]).save(tmp_path / "a.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    assert np.abs(np.asarray(open_image(tmp_path / "a.png")).astype(int) - toy()[0]).max() <= 1
    Image.fromarray(toy()[0]).save(tmp_path / "b.png", icc_profile=b"nonsense")
    assert np.array_equal(np.asarray(open_image(tmp_path / "b.png")), toy()[0])


# --- showing

def test_a_clip_shows_itself_and_escapes_what_made_it():
    html = Clip(toy(), 8, MADE)._repr_html_()
    data = base64.b64decode(re.search(r'src="data:video/mp4;base64,([^"]+)"', html)[1])
    assert data[4:8] == b"ftyp" and "&lt;b&gt;" in html and "<b>" not in html and "seed 7" in html and "shapes-t2v" in html
    assert "image/gif" in Clip(toy(3, 33, 49))._repr_html_() and "image/gif" in Clip(toy(3, 33, 49), 60)._repr_html_()
    assert "image/png" in Clip(toy(1))._repr_html_()
    assert repr(Clip(toy(), 8, {"prompt": "a star"})) == "Clip(a star · 48×32 · 9 frames, 8 fps, 1.1 s)"


def test_strips_and_sheets_hold_the_frames():
    clip = Clip(toy(9))
    strip = np.asarray(clip.strip(3))
    assert strip.shape == (32, 3 * 48 + 4, 3)
    for i, t in enumerate((0, 4, 8)):
        assert np.array_equal(strip[:, i * 50 : i * 50 + 48], clip[t])
    assert clip.strip(8, cols=4).size == (4 * 50 - 2, 2 * 34 - 2) and clip.strip(100).size[0] == 9 * 50 - 2
    assert Clip(toy(2, 400, 600)).strip().size == (2 * 242 - 2, 160)
    assert sheet([clip, Clip(toy(2))], n=3).size == (148, 2 * 34)
    assert sheet([clip], ["a very long label that does not fit, by far, into so narrow a row"], n=2).size == (98, 34 + 18)
    for bad in (lambda: sheet([]), lambda: sheet([clip], ["a", "b"]), lambda: sheet([clip], n=0), lambda: clip.strip(0), lambda: clip.strip(3, cols=0)):
        with pytest.raises(ValueError):
            bad()


def test_importing_clips_is_light():
    code = "import sys; import vidgen.clip; print([m for m in ('torch', 'av', 'cv2', 'PIL', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_bytes_in_memory_are_the_same_film():
    data = io.BytesIO()
    vidgen.clip._write_mp4(data, toy(), 8, {})
    assert data.getvalue()[4:8] == b"ftyp"
