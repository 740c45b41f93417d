"""CLIP scores: the same numbers as torchmetrics and VBench's rule, honest about what was not read; and the world's own CLIP."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import vidgen
from vidgen.clip import Clip
from vidgen.errors import CorruptWeights, WeightsMissing
from vidgen.evaluate import alignment
from vidgen.evaluate.alignment import METRICS, Alignment, align, clip_metrics, encoder, middle, named, source
from vidgen.world import caption, contrast, render, scene
from vidgen.world.scenes import ATTRIBUTES, PHRASINGS, Scene, parse


class Fake:
    "A CLIP without weights: random projections of mean colours and of letters."
    name, context, hash = "fake", 12, "0" * 64

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.eye, self.ear = rng.random((3, 8)).astype(np.float32), rng.normal(0.4 if seed < 5 else -0.4, 0.5, (128, 8)).astype(np.float32)

    def raw_image(self, frames_THWC):
        return np.asarray(frames_THWC, np.float32).mean((1, 2)) / 255 @ self.eye

    def raw_text(self, texts):
        return np.stack([np.mean([self.ear[ord(c) % 128] for c in text], axis=0) for text in texts])

    def images(self, frames_THWC):
        x = self.raw_image(frames_THWC)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def texts(self, texts):
        x = self.raw_text(texts)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def tokens(self, text):
        return len(text.split())


class _FakeModel(torch.nn.Module):
    "The same as transformers would hand it to torchmetrics."
    def __init__(self, fake):
        super().__init__()
        self.fake = fake
        self.config = type("C", (), {"text_config": type("T", (), {"max_position_embeddings": 10_000})})

    def get_image_features(self, pixels):
        return torch.from_numpy(self.fake.raw_image(pixels.permute(0, 2, 3, 1).numpy()))

    def get_text_features(self, input_ids, attention_mask=None):
        return torch.from_numpy(self.fake.raw_text(["".join(chr(int(c)) for c in row if c) for row in input_ids]))


class _FakeProcessor:
    def __call__(self, text=None, images=None, return_tensors=None, padding=None, **more):
        out = {}
        if images is not None:
            out["pixel_values"] = torch.stack([torch.as_tensor(np.asarray(i)).float() for i in images])
        if text is not None:
            rows = [[ord(c) for c in t] for t in text]
            wide = max(map(len, rows))
            out["input_ids"] = torch.tensor([r + [0] * (wide - len(r)) for r in rows])
            out["attention_mask"] = (out["input_ids"] > 0).long()
        return out


@pytest.mark.parametrize("seed", range(6))
def test_parity_with_torchmetrics(seed):
    from torchmetrics.functional.multimodal import clip_score

    fake, clip, prompt = Fake(seed), render(scene(seed)), caption(scene(seed))
    images = [torch.from_numpy(f.copy()).permute(2, 0, 1) for f in clip.frames]
    theirs = clip_score(images, [prompt] * len(images), model_name_or_path=lambda: (_FakeModel(fake), _FakeProcessor()))
    assert align(clip, prompt, model=fake).score("x100", "after_mean") == pytest.approx(float(theirs), abs=2e-3)
    assert float(theirs) > 10 if seed < 5 else float(theirs) == 0 > align(clip, prompt, model=fake).score()


def test_scales_and_where_negatives_are_cut():
    found = Alignment(np.array([0.3, -0.1, -0.5], np.float32), np.array([0, 4, 8]), "m", 5, 77)
    assert found.score() == pytest.approx(-0.1) and found.score("x100") == pytest.approx(-10, abs=1e-5) and found.score("w2.5") == pytest.approx(-0.25)
    assert found.score("x100", "after_mean") == 0 and found.score("x100", "per_frame") == pytest.approx(10, abs=1e-5) and found.score("w2.5", "per_frame") == pytest.approx(0.25)
    assert found.worst == (-0.5, 8) and found.cut == 0
    for wrong, says in ((dict(scale="x10"), "x100"), (dict(clip="frame"), "per_frame")):
        with pytest.raises(ValueError, match=says):
            found.score(**wrong)


def vbench_middle(n, vlen):
    "VBench's get_frame_indices(n, vlen, 'middle'), as coded."
    acc = min(n, vlen)
    edges = np.linspace(0, vlen, acc + 1).astype(int)
    ranges = [(int(a), int(b) - 1) for a, b in zip(edges, edges[1:])]
    picked = [(a + b) // 2 for a, b in ranges]
    return picked + [picked[-1]] * (n - len(picked))


@pytest.mark.parametrize(("n", "vlen"), [(8, 17), (8, 8), (8, 3), (1, 17), (16, 49), (8, 81), (3, 1)])
def test_frames_are_vbenchs(n, vlen):
    assert middle(n, vlen).tolist() == vbench_middle(n, vlen)


def test_frames_all_some_and_wrong():
    fake, clip = Fake(), render(scene(3))
    every, eight, one = (align(clip, "a star", model=fake, frames=f) for f in ("all", 8, 1))
    assert len(every.cosines) == 17 and eight.frames.tolist() == vbench_middle(8, 17) and np.allclose(eight.cosines, every.cosines[eight.frames]) and len(one.cosines) == 1
    short = align(clip.frames[:3], "a star", model=fake, frames=8)
    assert short.frames.tolist() == [0, 1, 2, 2, 2, 2, 2, 2] and len(short.cosines) == 8
    for wrong in ("some", 0, 2.5):
        with pytest.raises(ValueError, match="all"):
            align(clip, "a star", model=fake, frames=wrong)
    for wrong in ("", "  ", None):
        with pytest.raises(ValueError, match="prompt"):
            align(clip, wrong, model=fake)
    with pytest.raises(TypeError):
        align("clip.mp4", "a star", model=fake)


def test_a_prompt_that_is_too_long_is_counted_and_named(monkeypatch):
    monkeypatch.setattr(alignment, "encoder", lambda *_: Fake())
    long = align(render(scene(1)), "star " * 20, model="any")
    assert long.cut == 8 and "8 of 20 tokens" in repr(long) and "not read" not in repr(align(render(scene(1)), "star " * 12, model="any"))
    metric = clip_metrics("any")[0]
    scores = vidgen.score([render(scene(i)) for i in range(3)], prompts=["star " * 20, "a star", "sky " * 13], metrics=[metric], cache=False)
    row = scores["clip_score@any"]
    assert row["n"] == 3 and "20 tokens" in row["reason"] and "13 tokens" in row["reason"]
    note = next(n for n in scores.notes if n.startswith("clip_score@any"))
    assert "clip-0000" in note and "clip-0002" in note and "clip-0001" not in note
    assert scores.detail(0, "clip_score@any")["tokens"] == 20 and len(scores.detail(0, "clip_score@any")["cosines"]) == 17


def test_names_of_metrics():
    assert [m.name for m in METRICS] == ["clip_score@world", "clip_worst@world"] and all("world" in m.needs and m.backbone == "world-clip" for m in METRICS)
    other = named("clip_worst_8@ViT-B-32:openai")
    assert other.name == "clip_worst_8@ViT-B-32:openai" and other.needs == ("prompt",) and other.backbone == "open_clip:ViT-B-32:openai"
    assert named("clip_score@world") == METRICS[0] or named("clip_score@world").name == "clip_score@world"
    for wrong in ("fvd@world", "clip_score", "clip_score@", "clip_best@x", "clip_score_0@x", "clip_score_a@x", "clip_score_8_8@x", "temporal_stability"):
        assert named(wrong) is None, wrong


def test_one_look_for_both_metrics(monkeypatch):
    calls, fake = [], Fake()
    monkeypatch.setattr(alignment, "encoder", lambda *_: fake)
    monkeypatch.setattr(fake, "images", lambda frames, real=fake.images: calls.append(1) or real(frames), raising=False)
    scores = vidgen.score(render(scene(1)), metrics=list(clip_metrics("any")), cache=False)
    assert len(calls) == 1 and scores["clip_worst@any"]["value"] <= scores["clip_score@any"]["value"]


@pytest.mark.parametrize(("name", "error", "says"), [
    ("ViT-B-23", ValueError, "ViT-B-32"), ("ViT-B-32", ValueError, "ViT-B-32:TAG"), ("ViT-B-32:laion2b", ValueError, "laion2b_"), ("wrld-clip", ValueError, "world-clip"),
])
def test_an_unknown_model_is_named(name, error, says):
    with pytest.raises(error, match=says):
        source(name)


def test_weights_that_are_not_here_are_missing_not_random(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsMissing):
        source(str(tmp_path))
    monkeypatch.setattr(alignment, "SHIPPED", tmp_path)
    with pytest.raises(WeightsMissing, match="012_train_world_clip"):
        source("world-clip")
    assert source("open_clip:hf-hub:owner/name") == ("hf-hub:owner/name", None)


def test_a_missing_model_is_a_row_with_a_reason(tmp_path):
    scores = vidgen.score(render(scene(1)), metrics=[clip_metrics(str(tmp_path))[0], "dynamic_degree"], cache=False)
    assert "open_clip_config.json" in scores.rows[0]["reason"] and scores["dynamic_degree"]["n"] == 1 and scores.broken == []


# the world's CLIP: built, packed, loaded

@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    torch.manual_seed(0)
    return contrast.pack(tmp_path_factory.mktemp("clip") / "small", contrast.model(), made={"run": "test"})


def test_the_packed_model_is_open_clips(packed):
    import open_clip

    net = encoder(str(packed))
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{packed}")
    tok = open_clip.get_tokenizer(f"local-dir:{packed}")
    s = scene(4)
    clip, text = render(s), caption(s)
    with torch.no_grad():
        from PIL import Image

        seen = theirs.eval().encode_image(torch.stack([preprocess(Image.fromarray(f)) for f in clip.frames]), normalize=True).numpy()
        said = theirs.encode_text(tok([text]), normalize=True).numpy()
    assert np.allclose(net.images(clip.frames), seen, atol=1e-5) and np.allclose(net.texts([text]), said, atol=1e-5)
    assert np.allclose(net.images(clip.frames, batch=3), seen, atol=1e-5) and np.allclose(np.linalg.norm(seen, axis=1), 1, atol=1e-5)
    assert sum(p.stat().st_size for p in packed.iterdir()) < 2e6 and json.loads((packed / "vidgen.json").read_text()) == {"run": "test"}


def test_tokens_are_counted_before_they_are_cut(packed):
    net = encoder(str(packed))
    assert net.context == 32 and net.tokens("a red star") == 4 and net.tokens("a red star " * 20) == 61
    assert align(render(scene(1)), "a red star " * 20, model=net).cut == 29


def test_a_torn_model_is_corrupt(packed, tmp_path):
    import shutil

    folder = shutil.copytree(packed, tmp_path / "torn")
    whole = (folder / "open_clip_model.safetensors").read_bytes()
    (folder / "open_clip_model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(CorruptWeights):
        encoder(str(folder))
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises((CorruptWeights, WeightsMissing)):
        encoder(str(folder))


def test_any_size_of_frame(packed):
    net = encoder(str(packed))
    for shape in ((2, 64, 64, 3), (1, 480, 832, 3), (3, 33, 97, 3)):
        assert net.images(np.zeros(shape, np.uint8)).shape == (shape[0], 64)


# how it learns

def test_one_word_changes_and_no_other():
    rng = np.random.default_rng(0)
    for i in range(60):
        text = caption(scene(i), i % len(PHRASINGS))
        for name in ATTRIBUTES:
            before, after = parse(text), parse(contrast.changed(text, name, rng))
            assert [a for a in ATTRIBUTES if before[a] != after[a]] == [name] and after[name], (text, contrast.changed(text, name, rng))
    assert "an orange" in contrast.changed("a red star", "colour", type("R", (), {"choice": lambda self, x: "orange"})())
    assert contrast.changed("an orange star", "colour", type("R", (), {"choice": lambda self, x: "red"})()) == "a red star"
    with pytest.raises(ValueError, match="motion"):
        contrast.changed("a star", "motion", rng)


def test_a_changed_text_is_what_caption_would_say():
    rng = np.random.default_rng(1)
    for i in range(40):
        s, phrasing = scene(i), i % len(PHRASINGS)
        for name in ATTRIBUTES:
            text = contrast.changed(caption(s, phrasing), name, rng)
            assert text == caption(Scene(**{**s.__dict__, name: parse(text)[name]}), phrasing)


def test_auc_against_counting():
    rng = np.random.default_rng(0)
    right, wrong = rng.integers(0, 9, 40), rng.integers(0, 7, 55)
    pairs = (right[:, None] > wrong).mean() + (right[:, None] == wrong).mean() / 2
    assert contrast.auc(right, wrong) == pytest.approx(pairs) and contrast.auc(-right, -wrong) == pytest.approx(1 - pairs)
    with pytest.raises(ValueError):
        contrast.auc([], [1])


def test_the_loss_is_least_for_the_right_pairs_and_knows_synonyms():
    towers = contrast.model()
    rows = contrast.batch_of(12)(np.random.default_rng(3))
    assert rows["frames"].shape == (12, 64, 96, 3) and rows["frames"].dtype == torch.uint8 and rows["ids"].shape[0] == 24
    truth = torch.nn.functional.one_hot(rows["says"], int(rows["says"].max()) + 1).float()
    truth = truth / truth.norm(dim=1, keepdim=True)
    towers.encode_image = lambda x, normalize: truth[: len(x)]
    towers.encode_text = lambda ids, normalize: truth
    loss = contrast.contrast_loss(towers, augment=False)
    at_best = loss(rows, torch.Generator()).item()
    shuffled = dict(rows, says=rows["says"][torch.randperm(24, generator=torch.Generator().manual_seed(0))])
    assert at_best < loss(shuffled, torch.Generator()).item()
    says = rows["says"]
    same = (says[:12, None] == says[None]).float().sum(1)
    assert at_best == pytest.approx(float(same.log().mean() / 2 + (says[:12, None] == says[None, :12]).float().sum(0).log().mean() / 2), abs=0.02)


def test_training_pictures_are_softened_within_range_and_the_same_every_time():
    x = torch.rand(16, 3, 64, 96) * 2 - 1
    a, b = (contrast.soften(x, torch.Generator().manual_seed(1)) for _ in range(2))
    same = [bool(torch.equal(p, q)) for p, q in zip(a, x)]
    assert torch.equal(a, b) and a.abs().max() <= 1 and 2 < sum(same) < 14


def test_a_few_steps_teach_it_something(tmp_path):
    from vidgen.train.loop import TrainConfig, fit

    torch.manual_seed(0)
    towers = contrast.model()
    rows = contrast.batch_of(8)(np.random.default_rng(0))
    state = fit(towers, lambda rng: rows, contrast.contrast_loss(towers, augment=False), TrainConfig(12, lr=1e-3, warmup=2, log_every=1), folder=tmp_path)
    assert state.curve[-1][1] < state.curve[0][1] - 0.3


# the one that ships

SHIPS = (Path(vidgen.__file__).parent / "weights/world-clip/open_clip_config.json").exists()


def test_it_ships_and_is_small():
    folder = Path(vidgen.__file__).parent / "weights/world-clip"
    assert SHIPS, "experiments/012_train_world_clip writes it"
    assert sum(p.stat().st_size for p in folder.iterdir()) < 2e6 and json.loads((folder / "open_clip_config.json").read_text()) == contrast.config()


def test_it_tells_the_words_apart_as_rendered():
    scenes = [scene([7, i]) for i in range(48)]
    found = contrast.telling_apart(encoder(), [render(s) for s in scenes], [caption(s) for s in scenes], frames=2)
    assert min(found[name] for name in contrast.SEEN) >= 0.98 and 0.35 < found["motion"] < 0.65, found


def test_it_tells_them_apart_through_the_shipped_codec():
    from vidgen.world.shapes import to_tensor

    vae, scenes = vidgen.load("shapes-t2v").parts.vae, [scene([8, i]) for i in range(12)]
    with torch.no_grad():
        stills = [Clip.from_tensor(vae.decode(vae.encode(to_tensor(render(s).frames[8:9])[None].to(vae.dtype)).latent_dist.mean).sample[0].float().clamp(-1, 1)) for s in scenes]
    found = contrast.telling_apart(encoder(), stills, [caption(s) for s in scenes], frames=1)
    assert min(found[name] for name in contrast.SEEN) >= 0.95, found


def test_the_scores_of_the_world_mean_something():
    scenes = [scene([9, i]) for i in range(6)]
    right = vidgen.score([render(s) for s in scenes], metrics="clip_score@world,clip_worst@world", cache=False)
    wrong = vidgen.score([render(s) for s in scenes], prompts=[caption(s) for s in scenes[1:] + scenes[:1]], metrics="clip_score@world", cache=False)
    assert right["clip_score@world"]["value"] > wrong["clip_score@world"]["value"] + 0.1 and right["clip_worst@world"]["value"] <= right["clip_score@world"]["value"]
    press = vidgen.score(render(scenes[0]), prompts=["a reporter in front of a parliament"], metrics="clip_score@world", cache=False)
    assert press["clip_score@world"]["value"] is None and "world of shapes" in press["clip_score@world"]["reason"]
