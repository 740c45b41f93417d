"""Backbones: what goes in, what comes out, that files are checked before they are believed, and that features are remembered by content."""
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vidgen.clip import Clip
from vidgen.errors import CorruptWeights, WeightsMissing
from vidgen.evaluate import backbones, watcher
from vidgen.evaluate.backbones import RECIPES, Backbone, Recipe, describe, features, load, prepare, probe
from vidgen.evaluate.metric import Footage
from vidgen.world import render, scene

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDGEN_STORAGE_CACHE", str(tmp_path / "cache"))
    backbones._LOADED.clear()


def mean_colour(looks=None, kind="video", hash="mean"):
    def forward(x):
        if looks is not None:
            looks.append(tuple(x.shape))
        return x.mean((1, 3, 4)) if kind == "video" else x.mean((3, 4))

    return Backbone("mean-colour", 3, kind, hash, forward)


def colours(clip):
    return clip.frames.reshape(-1, 3).mean(0) / 255


# the head

@pytest.mark.parametrize(("clips", "kind", "says"), [
    (torch.rand(2, 3, 3, 8, 8) * 255, ValueError, "divide bytes by 255"), (torch.rand(2, 3, 3, 8, 8) * 2 - 1, ValueError, "0..1"), (torch.full((1, 2, 3, 8, 8), float("nan")), ValueError, "0..1"),
    (torch.zeros(2, 3, 3, 8, 8, dtype=torch.uint8), TypeError, "floats"), (torch.rand(2, 3, 8, 8), TypeError, "B, T, 3, H, W"), (torch.rand(2, 3, 8, 8, 3), TypeError, "B, T, 3, H, W"),
])
def test_what_is_no_clip_is_refused(clips, kind, says):
    with pytest.raises(kind, match=says):
        mean_colour()(clips)


def test_a_network_that_gives_something_else_is_noticed():
    wrong = Backbone("wrong", 4, "video", "0", lambda x: x.mean((3, 4)))
    with pytest.raises(ValueError, match=r"gave \(2, 5, 3\) where \(2, 4\)"):
        wrong(torch.rand(2, 5, 3, 8, 8))
    with pytest.raises(ValueError, match="needs 10 frames"):
        Backbone("long", 3, "video", "0", lambda x: x.mean((1, 3, 4)), least=10)(torch.rand(1, 9, 3, 8, 8))


def test_random_ones_are_their_seed():
    x = torch.rand(2, 9, 3, 48, 64)
    net = load("random:3")
    assert net.dims == 128 and net(x).shape == (2, 128) and load("random:3") is net
    backbones._LOADED.clear()
    assert torch.equal(load("random:3")(x), net(x)) and load("random:3").hash == net.hash != load("random:4").hash
    assert torch.allclose(net(x)[1:], net(x[1:]), atol=1e-6)


@pytest.mark.parametrize("name", ["world-vide", "random:x", "random:-1", "no/such/file.pt"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match="random:"):
        load(name)


# recipes

def test_a_recipe_does_what_it_says():
    x = torch.rand(2, 20, 3, 48, 64)
    stretched = prepare(x, Recipe(size=32))
    assert stretched.shape == (2, 3, 20, 32, 32)
    plain = F.interpolate(x[1], size=(32, 32), mode="bilinear", align_corners=False) * 2 - 1
    assert torch.allclose(stretched[1].transpose(0, 1), plain, atol=1e-6)
    cropped = prepare(x, Recipe("BTCHW", 24, "crop", frames=16))
    half = F.interpolate(x[0, 2:18], size=(24, 32), mode="bilinear", align_corners=False)[..., 4:28] * 2 - 1
    assert cropped.shape == (2, 16, 3, 24, 24) and torch.allclose(cropped[0], half, atol=1e-6)
    as_bytes = prepare(x, RECIPES["i3d"])
    assert torch.allclose(as_bytes, x.transpose(1, 2) * 255, atol=1e-4)
    smooth = prepare(x, Recipe(size=16, antialias=True))
    assert not torch.allclose(smooth, prepare(x, Recipe(size=16)))
    for wrong in (dict(layout="TBC"), dict(resize="squash"), dict(kind="film")):
        with pytest.raises(ValueError, match="unknown"):
            Recipe(**wrong)


class Detector(nn.Module):
    "Called as the I3D of StyleGAN-V is: bytes in, 400 numbers out."

    def __init__(self, gain: float):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
        assert rescale and resize and return_features and x.shape[1] == 3
        return (x / 255).mean((1, 2, 3, 4))[:, None].repeat(1, 400) * self.gain


def script(tmp_path, gain, name="i3d.pt"):
    torch.jit.script(Detector(gain)).save(str(tmp_path / name))
    return tmp_path / name


def test_the_published_check_of_i3d_is_made(tmp_path):
    good = script(tmp_path, (151.256 / 400) ** 0.5)
    told = describe(good, "i3d")
    assert abs(told["black_white"] - 151.256) < 1e-3 and told["dims"] == 400
    net = load(good)
    assert net.dims == 400 and net.least == 10 and net.name == "i3d.pt"
    with pytest.raises(ValueError, match="needs 10 frames"):
        net(torch.rand(1, 9, 3, 64, 64))
    with pytest.raises(CorruptWeights, match="151.256 was due"):
        describe(script(tmp_path, 0.7, "bad.pt"), "i3d")
    assert not (tmp_path / "bad.pt.json").exists()


def test_another_file_under_the_same_name_is_refused(tmp_path):
    file = script(tmp_path, (151.256 / 400) ** 0.5)
    with pytest.raises(ValueError, match="describe"):
        load(file)
    told = describe(file, "i3d")
    before = load(file).hash
    script(tmp_path, (151.0 / 400) ** 0.5)
    with pytest.raises(CorruptWeights, match="is not the file"):
        load(file)
    assert describe(file, "i3d") and load(file).hash != before
    note = file.with_name("i3d.pt.json")
    note.write_text(json.dumps(json.loads(note.read_text()) | {"black_white": told["black_white"] * 1.01}))
    with pytest.raises(CorruptWeights, match="was due"):
        load(file)


def test_the_recipe_is_part_of_the_hash(tmp_path):
    file = script(tmp_path, 1.0)
    call = {"rescale": True, "resize": True, "return_features": True}
    hashes = []
    for recipe in (Recipe(size=32, arguments=call), Recipe(size=48, arguments=call), Recipe(size=32, arguments=call, antialias=True)):
        describe(file, recipe)
        hashes.append(load(file).hash)
    assert len(set(hashes)) == 3


def test_frame_networks_from_a_file(tmp_path):
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    torch.jit.trace(Mean(), torch.rand(2, 3, 8, 8)).save(str(tmp_path / "mean.pt"))
    for layout in ("BTCHW", "BCTHW"):
        describe(tmp_path / "mean.pt", Recipe(layout, 8, kind="frame"))
        net, x = load(tmp_path / "mean.pt"), torch.rand(2, 5, 3, 8, 8)
        assert net.kind == "frame" and torch.allclose(net(x), x.mean((3, 4)) * 2 - 1, atol=1e-5)
        backbones._LOADED.clear()


def test_a_folder_of_transformers(tmp_path):
    from transformers import VideoMAEConfig, VideoMAEModel

    torch.manual_seed(0)
    config = VideoMAEConfig(image_size=32, patch_size=16, num_frames=4, tubelet_size=2, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = VideoMAEModel(config).eval()
    model.save_pretrained(tmp_path / "mae")
    recipe = Recipe("BTCHW", 32, frames=4, least=4)
    describe(tmp_path / "mae", recipe)
    net, x = load(tmp_path / "mae"), torch.rand(2, 9, 3, 40, 40)
    with torch.no_grad():
        due = model(prepare(x, recipe)).last_hidden_state.mean(1)
    assert net.dims == 16 and net.least == 4 and torch.allclose(net(x), due, atol=1e-5)


def test_files_that_are_none(tmp_path):
    (tmp_path / "no.pt").write_bytes(b"nothing")
    with pytest.raises(CorruptWeights, match="TorchScript"):
        describe(tmp_path / "no.pt", Recipe())
    with pytest.raises(WeightsMissing):
        describe(tmp_path / "none.pt", "i3d")
    with pytest.raises(ValueError, match="nearest: i3d"):
        describe(tmp_path / "no.pt", "i3")


# features

def test_features_come_in_order_whatever_the_shapes():
    clips = [render(scene(i), width=(96, 64)[i % 2], num_frames=(17, 9, 5)[i % 3]) for i in range(14)]
    looks = []
    found = features(iter(clips), mean_colour(looks), batch=2)
    assert found.dtype == np.float32 and np.allclose(found, [colours(c) for c in clips], atol=1e-5)
    assert sum(shape[0] for shape in looks) == 14 and max(shape[0] for shape in looks) == 2


def test_what_was_seen_is_not_looked_at_again(tmp_path):
    clips, looks = [render(scene(i)) for i in range(6)], []
    first = features(clips, mean_colour(looks))
    looks.clear()
    changed = Clip(clips[0].frames[::-1].copy(), fps=8)
    again = features([clips[3], changed, clips[3], clips[5]], mean_colour(looks))
    assert looks == [(1, 17, 3, 64, 96)] and np.array_equal(again[[0, 2, 3]], first[[3, 3, 5]])
    looks.clear()
    features(clips, mean_colour(looks, hash="other"))
    features(clips, mean_colour(looks), cache=False)
    assert sum(s[0] for s in looks) == 12


def test_the_key_is_the_picture_and_not_only_its_bytes():
    flat, looks = np.arange(2 * 32 * 64 * 3, dtype=np.uint8), []
    wide, high = flat.reshape(2, 32, 64, 3), flat.reshape(2, 64, 32, 3)
    features([wide, high, wide], mean_colour(looks), batch=8)
    assert sorted(looks) == [(1, 2, 3, 32, 64), (1, 2, 3, 64, 32)]


def test_open_clip_models_are_frame_networks(monkeypatch):
    from types import ModuleType, SimpleNamespace

    class Encoder(SimpleNamespace):
        def images(self, frames_THWC):
            return np.linalg.norm(frames_THWC, axis=(1, 2)).astype(np.float32)[:, :2]

    fake = ModuleType("vidgen.evaluate.alignment")
    fake.encoder = lambda name, device: Encoder(hash="abc", device=device)
    monkeypatch.setitem(__import__("sys").modules, "vidgen.evaluate.alignment", fake)
    net, clip = load("world-clip", device="cpu"), render(scene(4), num_frames=5)
    assert (net.kind, net.dims) == ("frame", 2) and net.hash != "abc"
    assert np.allclose(features(clip, net)[0], Encoder().images(clip.frames)), "the frames arrive as the bytes they were"
    assert load("open_clip:ViT-B-32:laion2b_s34b_b79k", device="cpu").kind == "frame"


def test_every_way_to_name_a_clip(tmp_path):
    clip = render(scene(5))
    path = clip.save(tmp_path / "clip.png")
    one = features(clip, mean_colour())
    for way in ([clip], Footage(clip), clip.frames, [clip.frames], str(path), [path], [Footage(clip)]):
        assert np.allclose(features(way, mean_colour()), one, atol=1e-3) and one.shape == (1, 3)


def test_frames_of_clips_of_different_length():
    clips = [render(scene(i), num_frames=n) for i, n in enumerate((5, 9, 5))]
    found = features(clips, mean_colour(kind="frame"))
    assert [f.shape for f in found] == [(5, 3), (9, 3), (5, 3)]
    assert features(clips[::2], mean_colour(kind="frame")).shape == (2, 5, 3)


def test_work_done_before_a_broken_clip_is_kept(tmp_path):
    clips, looks = [render(scene(i)) for i in range(8)], []
    with pytest.raises(TypeError, match="measured"):
        features([*clips[:4], "not a clip".encode(), *clips[4:]], mean_colour(looks), batch=2)
    looks.clear()
    features(clips[:4], mean_colour(looks))
    assert not looks


def test_a_cache_that_is_damaged_or_not_writable_does_not_matter(tmp_path, monkeypatch):
    clips = [render(scene(i)) for i in range(3)]
    first = features(clips, mean_colour())
    (file,) = (tmp_path / "cache" / "features").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-5])
    assert np.array_equal(features(clips, mean_colour()), first)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VIDGEN_STORAGE_CACHE", str(tmp_path / "file"))
    assert np.array_equal(features(clips, mean_colour()), first)


def test_no_clips_are_refused():
    with pytest.raises(ValueError, match="no clips"):
        features([], mean_colour())


def test_progress_is_told():
    said = []
    features([render(scene(i)) for i in range(5)], mean_colour(), batch=2, progress=said.append)
    assert [p.done for p in said] == [2, 4, 5] and said[0].total == 5


def test_probe():
    assert np.isclose(probe(mean_colour()), 3) and np.isclose(probe(mean_colour(kind="frame")), 3)


# the network that ships, untrained

def test_examples_are_what_their_answers_say():
    for k, damage in enumerate(watcher.DAMAGES):
        frames, answers = watcher.example(np.random.default_rng(k), 13, damage=damage)
        assert frames.shape == (13, 64, 96, 3) and frames.dtype == np.uint8 and answers["damage"] == k
        assert (answers["motion"] == -1) == (damage == "shuffle")
        again, same = watcher.example(np.random.default_rng(k), 13, damage=damage)
        assert (again == frames).all() and same == answers
    from vidgen.world import oracle

    frames, answers = watcher.example(np.random.default_rng(3), 17, damage="none")
    reading = oracle.read(Clip(frames, fps=8))
    assert {n: getattr(reading, n) for n in ("shape", "colour", "motion", "background")} == {n: watcher.QUESTIONS[n][answers[n]] for n in ("shape", "colour", "motion", "background")}


def test_training_never_sees_what_is_held_out():
    from vidgen.world import held_out

    for held in (False, True):
        for k in range(40):
            answers = watcher.example(np.random.default_rng(k), 9, damage="none", held=held)[1]
            assert held_out(**{n: watcher.QUESTIONS[n][answers[n]] for n in ("shape", "colour", "motion", "background")}) == held


def test_it_learns_and_survives_packing(tmp_path):
    from vidgen.train.loop import TrainConfig, fit

    student, rows = watcher.student(seed=0), watcher.batch(6)(np.random.default_rng(0))
    state = fit(student, lambda rng: rows, watcher.loss(student), TrainConfig(25, lr=5e-3, warmup=2, ema=0.5, log_every=1), folder=tmp_path / "train")
    assert state.curve[-1][1] < 0.6 * state.curve[0][1]
    packed = watcher.pack(tmp_path / "packed", student, made={"run": "test"})
    assert sum(p.stat().st_size for p in packed.iterdir()) < 2e6 and json.loads((packed / "config.json").read_text())["made"] == {"run": "test"}
    x = torch.rand(2, 17, 3, 64, 96)
    with torch.no_grad():
        due = student["body"](watcher.prepare(x))
    net = load(packed)
    assert torch.allclose(net(x), due, atol=0.02) and net.dims == 128 and net.kind == "video"
    (packed / "model.safetensors").write_bytes((packed / "model.safetensors").read_bytes()[:-9])
    backbones._LOADED.clear()
    with pytest.raises(CorruptWeights):
        load(packed)


def test_the_untrained_network_is_missing_with_a_word_on_how_to_train_it(tmp_path):
    with pytest.raises(WeightsMissing, match="013_train_world_video"):
        watcher.unpack(tmp_path)
