"""Colours as the literature counts them, a logo found where it was put, and a brand file that can't be misread."""
import dataclasses
import json
import pickle

import cv2
import numpy as np
import ot
import pytest
from PIL import Image
from scipy.stats import wasserstein_distance
from skimage.color import deltaE_ciede2000, rgb2lab

import vidgen
from vidgen.cli import main
from vidgen.clip import Clip
from vidgen.evaluate import brand as page, logo as marks, palette as colours
from vidgen.evaluate.brand import METRICS, Brand, Rules, check, outlined
from vidgen.evaluate.logo import Logo, Search, clear_space, find_logo, glyph, planted
from vidgen.evaluate.metric import Footage, Value
from vidgen.evaluate.palette import ciede2000, code, colour, coverage, dominant, foreground, palette_adherence, palette_distance, pixels, transport
from vidgen.evaluate.faults import codec
from vidgen.world import render, scene
from vidgen.world.oracle import damaged, lab

SHARMA = np.array([float(v) for v in """
50 2.6772 -79.7751 50 0 -82.7485 2.0425  50 3.1571 -77.2803 50 0 -82.7485 2.8615  50 2.8361 -74.02 50 0 -82.7485 3.4412
50 -1.3802 -84.2814 50 0 -82.7485 1  50 -1.1848 -84.8006 50 0 -82.7485 1  50 -0.9009 -85.5211 50 0 -82.7485 1
50 0 0 50 -1 2 2.3669  50 -1 2 50 0 0 2.3669  50 2.49 -0.001 50 -2.49 0.0009 7.1792  50 2.49 -0.001 50 -2.49 0.001 7.1792
50 2.49 -0.001 50 -2.49 0.0011 7.2195  50 2.49 -0.001 50 -2.49 0.0012 7.2195  50 -0.001 2.49 50 0.0009 -2.49 4.8045
50 -0.001 2.49 50 0.001 -2.49 4.8045  50 -0.001 2.49 50 0.0011 -2.49 4.7461  50 2.5 0 50 0 -2.5 4.3065
50 2.5 0 73 25 -18 27.1492  50 2.5 0 61 -5 29 22.8977  50 2.5 0 56 -27 -3 31.903  50 2.5 0 58 24 15 19.4535
50 2.5 0 50 3.1736 0.5854 1  50 2.5 0 50 3.2972 0 1  50 2.5 0 50 1.8634 0.5757 1  50 2.5 0 50 3.2592 0.335 1
60.2574 -34.0099 36.2677 60.4626 -34.1751 39.4387 1.2644  63.0109 -31.0961 -5.8663 62.8187 -29.7946 -4.0864 1.263
61.2901 3.7196 -5.3901 61.4292 2.248 -4.962 1.8731  35.0831 -44.1164 3.7933 35.0232 -40.0716 1.5901 1.8645
22.7233 20.0904 -46.694 23.0331 14.973 -42.5619 2.0373  36.4612 47.858 18.3852 36.2715 50.5065 21.2231 1.4146
90.8027 -2.0831 1.441 91.1528 -1.6435 0.0447 1.4441  90.9257 -0.5406 -0.9208 88.6381 -0.8985 -0.7239 1.5381
6.7747 -0.2908 -2.4247 5.8714 -0.0985 -2.2286 0.6377  2.0776 0.0795 -1.135 0.9033 -0.0636 -0.5514 0.9082""".split()]).reshape(34, 7)  # Sharma, Wu and Dalal 2005, table 1


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDGEN_STORAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VIDGEN_STORAGE_RUNS", str(tmp_path / "runs"))


def flat(*parts, shape=(3, 40, 60)):
    "Frames of vertical stripes: (colour, share) pairs."
    frames, ends = np.zeros((*shape, 3), np.uint8), np.rint(shape[2] * np.cumsum([s for _, s in parts])).astype(int)
    for start, end, (rgb, _) in zip([0, *ends], ends, parts):
        frames[:, :, start:end] = colour(rgb)
    return frames


# colours: others' numbers

def test_sharma():
    assert np.abs(ciede2000(SHARMA[:, :3], SHARMA[:, 3:6]) - SHARMA[:, 6]).max() < 5.1e-5
    assert np.abs(ciede2000(SHARMA[:, 3:6], SHARMA[:, :3]) - SHARMA[:, 6]).max() < 5.1e-5


def test_random_colours_agree_with_scikit_image():
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (2, 4000, 3), np.uint8)
    rgb[:, :200] = rgb[:, :200, :1]  # greys: no hue
    assert np.abs(lab(rgb) - rgb2lab(rgb)).max() < 0.05
    a, b = rgb2lab(rgb)
    assert np.abs(ciede2000(a, b) - deltaE_ciede2000(a, b)).max() < 1e-8
    assert np.all(ciede2000(a, a) == 0)
    assert ciede2000(a[:5, None], b[None, :7]).shape == (5, 7)


def test_transport_agrees_with_pot_and_scipy():
    rng = np.random.default_rng(1)
    for k, p in ((1, 1), (1, 5), (8, 4), (6, 9)):
        a, b, cost = rng.dirichlet(np.ones(k)), rng.dirichlet(np.ones(p)), rng.uniform(0, 100, (k, p))
        assert transport(a, b, cost) == pytest.approx(ot.emd2(a, b, cost), abs=1e-9)
        assert transport(3 * a, 3 * b, cost) == pytest.approx(3 * ot.emd2(a, b, cost), abs=1e-8)
    x, y = rng.normal(size=(2, 7))
    a, b = rng.dirichlet(np.ones(7), 2)
    assert transport(a, b, np.abs(x[:, None] - y)) == pytest.approx(wasserstein_distance(x, y, a, b), abs=1e-9)
    for wrong in (([1], [2], [[0]]), ([1, -1], [0], [[0], [0]]), ([1], [1], [[0, 0]]), ([0], [0], [[0]])):
        with pytest.raises(ValueError, match="transport"):
            transport(*wrong)


# colours: properties

def test_colours_are_read_or_refused():
    assert colour("#fff") == (255, 255, 255) == colour("White ") and colour([1, 2, 3]) == (1, 2, 3) and code((1, 2, 255)) == "#0102ff"
    for wrong, says in (("gren", "green"), ("#12345", "nearest|unknown"), ((1, 2), "three"), ((1, 2, 256), "0..255"), ((0.5, 0, 0), "whole"), (None, "colour"), ((1, 2, "x"), "colour")):
        with pytest.raises(ValueError, match=says):
            colour(wrong)


def test_dominant_colours_of_stripes_are_exact_and_do_not_depend_on_order():
    parts = [("red", 0.5), ("navy", 0.3), ("white", 0.2)]
    found = dominant(pixels(flat(*parts)))
    assert [code(c) for c in found.rgb_KC] == [code(colour(c)) for c, _ in parts] and found.share_K == pytest.approx([0.5, 0.3, 0.2])
    assert np.abs(found.lab_KC - lab([colour(c) for c, _ in parts])).max() < 1e-4
    back = dominant(pixels(np.ascontiguousarray(flat(*parts)[::-1, :, ::-1])))
    assert np.array_equal(found.lab_KC, back.lab_KC) and np.array_equal(found.share_K, back.share_K)


def test_dominant_colours_survive_noise_and_merge_when_few_are_asked():
    rng = np.random.default_rng(2)
    noisy = np.clip(flat(("red", 0.6), ("navy", 0.4)) + rng.normal(0, 6, (3, 40, 60, 3)), 0, 255).astype(np.uint8)
    found = dominant(pixels(noisy), k=2)
    assert found.share_K == pytest.approx([0.6, 0.4], abs=0.01) and np.all(ciede2000(found.lab_KC, lab([colour("red"), colour("navy")])) < 3)
    one = dominant(pixels(noisy), k=1)
    assert one.share_K == [1] and np.allclose(one.lab_KC[0], lab(noisy[:, ::1]).reshape(-1, 3).mean(0), atol=0.01)
    for k, where in ((0, None), (3, np.zeros((3, 40, 60), bool))):
        with pytest.raises(ValueError, match="dominant"):
            dominant(pixels(noisy), k=k, where=where)


def test_pixels_are_those_of_the_grid_in_every_size():
    for shape in ((1, 1, 1), (2, 5, 3), (17, 64, 96), (3, 480, 832), (300, 20, 30)):
        frames = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
        seen = pixels(frames)
        count, height, width = seen.index_THW.shape
        assert count == shape[0] and height * width >= min(shape[1] * shape[2], 500) and seen.weights().sum() == seen.index_THW.size
        assert {tuple(c) for c in seen.rgb_UC} <= {tuple(c) for c in frames.reshape(-1, 3)}


def test_adherence_counts_what_is_near_and_only_that():
    frames = flat(("red", 0.5), ("navy", 0.3), ("lime", 0.2))
    share = lambda palette, **more: palette_adherence(pixels(frames), palette, **more).value
    assert share(["red", "navy", "lime"]) == 1 and share(["red", "navy"]) == pytest.approx(0.8) and share(["lime"]) == pytest.approx(0.2) and share(["cyan"]) == 0
    gap = float(ciede2000(lab(colour("red")), lab(colour("crimson"))))
    assert share(["crimson"], tolerance=gap + 0.01) == 0.5 and share(["crimson"], tolerance=gap - 0.01) == 0
    grown = [share(["crimson"], tolerance=t) for t in np.linspace(0, 100, 30)]
    assert grown == sorted(grown) and grown[-1] == 1


def test_foreground_and_whole_are_different_questions():
    clip = render(scene(7, shape="star", colour="orange", background="navy"))
    whole, stands = (palette_adherence(pixels(clip.frames), ["#141c50"], where=w) for w in ("whole", "foreground"))
    assert whole.value > 0.85 and stands.value < 0.05 and stands.detail["ground"] == "#141c50"
    empty = palette_adherence(pixels(flat(("navy", 1))), ["navy"], where="foreground")
    assert empty.value is None and "stand out" in empty.reason
    mask, ground = foreground(pixels(clip.frames))
    assert 0.03 < mask.mean() < 0.1 and code(ground) == "#141c50"
    with pytest.raises(ValueError, match="whole"):
        palette_adherence(pixels(clip.frames), ["red"], where="hole")


def test_distance():
    found = dominant(pixels(flat(("red", 0.5), ("white", 0.5))))
    assert palette_distance(found, ["red", "white"]) < 1e-3 and palette_distance(found, ["red", "white"], [1, 1]) < 1e-3
    far = float(ciede2000(lab(colour("red")), lab(colour("white"))))
    assert palette_distance(found, ["red", "white"], [3, 1]) == pytest.approx(0.25 * far, rel=1e-4) and palette_distance(found, ["red"]) == pytest.approx(0.5 * far, rel=1e-4)
    black, white = dominant(pixels(flat(("black", 1)))), ["white"]
    assert palette_distance(black, white) == pytest.approx(100, abs=0.01)
    rng = np.random.default_rng(0)
    for _ in range(5):
        assert palette_distance(found, ["crimson", "navy", "ivory"]) <= palette_distance(found, ["crimson", "navy", "ivory"], rng.dirichlet(np.ones(3))) + 1e-9
    for palette, shares in (([], None), (["red"], [1, 2]), (["red"], [0]), (["red", "white"], [2, -1])):
        with pytest.raises(ValueError):
            palette_distance(found, palette, shares)


def test_coverage_of_each_colour_in_each_frame():
    frames = np.concatenate([flat(("red", 0.25), ("white", 0.75), shape=(1, 40, 60)), flat(("navy", 1), shape=(1, 40, 60))])
    assert coverage(pixels(frames), ["red", "white", "lime"]) == pytest.approx(np.array([[0.25, 0.75, 0], [0, 0, 0]]))
    assert coverage(pixels(frames), []).shape == (2, 0)


# the logo

CLIP = render(scene(7, shape="star", colour="orange", background="navy", motion="still"), num_frames=4)


@pytest.mark.parametrize(("scale", "place"), [(0.25, (0.9, 0.1)), (0.35, (0.03, 0.97)), (0.5, (1, 0)), (0.3, (0.13, 0.41))])
@pytest.mark.parametrize("size", [(96, 64), (384, 256)])
def test_a_logo_is_found_where_it_was_put(scale, place, size):
    clip, logo = render(scene(7, shape="star", colour="orange", background="navy", motion="still"), width=size[0], height=size[1], num_frames=2), glyph()
    found = find_logo(planted(clip, logo, scale=scale, place=place).frames, logo, Search(keypoints=False))
    assert found.rate == 1
    side, spot = round(scale * size[1]), found.spots[0]
    wanted = place[0] * (size[0] - side) + side / 2, place[1] * (size[1] - side) + side / 2
    assert np.hypot(*(np.array(spot.centre) - wanted)) < 0.025 * size[1] and spot.height == pytest.approx(side, rel=0.12)


def test_colours_and_contrast_of_a_logo_do_not_matter():
    logo = glyph()
    for other in (glyph("sail", ((20, 60, 200), (250, 200, 30))), Logo(np.dstack([255 - logo.rgba[..., :3], logo.rgba[..., 3]]))):
        assert find_logo(planted(CLIP, other).frames, logo).rate == 1
    negative = Clip(255 - planted(CLIP, logo).frames)
    assert find_logo(negative.frames, logo).spots[0].score == pytest.approx(find_logo(planted(CLIP, logo).frames, logo).spots[0].score, abs=1e-3)
    assert find_logo(planted(CLIP, logo, opacity=0.5, place=(0.95, 0.05)).frames, logo).rate == 1


def decoys(logo):
    half, top = logo.rgba.copy(), logo.rgba.copy()
    half[:, half.shape[1] // 2 :, 3], top[top.shape[0] // 2 :, :, 3] = 0, 0
    return {"mirror": Logo(logo.rgba[:, ::-1]), "upside down": Logo(logo.rgba[::-1]), "left half": Logo(half), "upper half": Logo(top), "bolt": glyph("bolt"), "flag": glyph("flag"), "key": glyph("key")}


@pytest.mark.parametrize("soften", [lambda c: c, lambda c: codec(c), lambda c: damaged(c, "h264", 28)], ids=["rendered", "codec", "h264"])
def test_decoys_are_no_logo(soften):
    logo = glyph()
    assert find_logo(soften(CLIP).frames, logo).rate == 0 and find_logo(soften(planted(CLIP, logo)).frames, logo).rate == 1
    for name, decoy in decoys(logo).items():
        assert find_logo(soften(planted(CLIP, decoy, scale=0.35)).frames, logo).rate == 0, name


def test_the_score_of_a_part_is_its_part_and_foreign_edges_count_against():
    logo, canvas = glyph(), Clip(np.full((1, 64, 96, 3), 128, np.uint8))
    whole = find_logo(planted(canvas, logo).frames, logo).spots[0].score
    part = find_logo(planted(canvas, decoys(logo)["left half"]).frames, logo).spots[0].score
    scribble = planted(canvas, logo).frames.copy()
    scribble[:, ::3] = 255
    assert whole > 0.8 > 0.6 > part and find_logo(scribble, logo).spots[0].score < 0.55


def test_a_sum_that_forgives_and_a_quarter_that_does_not():
    canvas = Clip(np.full((1, 64, 96, 3), 120, np.uint8))
    for name in ("sail", "key"):
        logo = glyph(name)
        piece, whole_height = marks.template(logo, 24), logo.rgba.shape[0]
        field = lambda shown, of=whole_height: marks.edges(planted(canvas, shown, scale=24 / 64 * shown.rgba.shape[0] / of, place=(0.5, 0.5)).frames[0])
        at = lambda scores: tuple(int(v) for v in np.unravel_index(scores.argmax(), scores.shape))
        whole, half, turned = (field(x) for x in (logo, decoys(logo)["left half"], Logo(logo.rgba[::-1])))
        score = {k: (float(marks.likeness(f, piece).max()), marks.fit(f, piece, *at(marks.likeness(f, piece)))) for k, f in (("whole", whole), ("half", half), ("turned", turned))}
        assert min(score["whole"]) > 0.85 and score["half"][0] < 0.65 and score["half"][1] < 0.45 and score["turned"][1] < 0.6, score
    assert score["turned"][1] < score["turned"][0] - 0.1  # a key: the sum alone would take it


def test_a_logo_in_some_frames():
    clip = render(scene(3, motion="right"))
    found = find_logo(planted(clip, glyph(), frames=[0, 5, 6]).frames, glyph())
    assert np.flatnonzero(found.present).tolist() == [0, 5, 6] and found.rate == 3 / 17
    flat_clip = np.full((2, 64, 96, 3), 90, np.uint8)
    assert find_logo(flat_clip, glyph()).rate == 0 and np.isfinite([s.score for s in find_logo(flat_clip, glyph()).spots]).all()


def test_grounds_alpha_and_copies_of_a_logo(tmp_path):
    logo = glyph()
    cover = logo.rgba[..., 3:] / 255
    for ground in (0, 90, 255):
        plain = Logo(np.pad(np.rint(logo.rgba[..., :3] * cover + ground * (1 - cover)).astype(np.uint8), [(7, 5), (3, 8), (0, 0)], constant_values=ground))
        if ground < 255:  # the small sail is white
            assert find_logo(planted(CLIP, logo).frames, plain).rate == 1, ground
    badge = np.zeros((40, 40, 4), np.uint8)
    badge[5:35, 5:35] = (30, 58, 138, 255)
    badge[12:20, 12:30, :3] = 255
    for made in (logo, Logo(badge)):
        (tmp_path / "l.png").write_bytes(made.png)
        assert np.array_equal(Logo.open(tmp_path / "l.png").rgba, made.rgba)
    assert Logo(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)).rgba[..., 3].min() == 255


def word():
    drawn = np.zeros((120, 480, 4), np.uint8)
    cv2.putText(drawn, "vidgen", (10, 84), cv2.FONT_HERSHEY_DUPLEX, 3.3, (20, 60, 200, 255), 6, cv2.LINE_AA)
    cv2.circle(drawn, (420, 60), 40, (230, 40, 40, 255), -1, cv2.LINE_AA)
    return Logo(drawn)


def test_a_turned_word_is_found_by_keypoints_and_its_mirror_is_not():
    logo = word()
    still = planted(Clip(np.full((1, 320, 480, 3), 200, np.uint8)), logo, scale=0.18, place=(0.5, 0.5)).frames[0]
    for angle in (-40, 25, 90):
        turned = cv2.warpAffine(still, cv2.getRotationMatrix2D((240, 160), angle, 0.8), (480, 320), borderMode=cv2.BORDER_REPLICATE)
        both = np.stack([turned, turned[:, ::-1]])
        found = find_logo(both, logo)
        assert found.present.tolist() == [True, False] and found.spots[0].by == "keypoints" and np.hypot(*(np.array(found.spots[0].centre) - (240, 160))) < 8
        assert find_logo(both, logo, Search(keypoints=False)).rate == 0
        assert [s.score for s in find_logo(both, logo).spots] == [s.score for s in found.spots]


def test_steadiness():
    spots = [marks.Spot(10 + dx, 10, 20, 20, score) for dx, score in ((0, 1), (0.5, 1), (0, 1), (9, 1), (40, 0.1))]
    share, detail = marks.Sightings(tuple(spots), 0.6, (64, 96)).steadiness()
    assert share == 0.75 and detail["strays"] == [3] and detail["sightings"] == 4
    swollen = [*spots[:3], marks.Spot(5, 5, 30, 30, 1.0)]
    assert marks.Sightings(tuple(swollen), 0.6, (64, 96)).steadiness()[1]["strays"] == [3]
    assert marks.Sightings(tuple(spots[3:]), 0.6, (64, 96)).steadiness()[0] is None
    quiet, restless = (find_logo(planted(CLIP, glyph(), wobble=w, place=(0.5, 0.5), seed=3).frames, glyph()).steadiness()[0] for w in (0, 0.08))
    assert quiet == 1 > restless


def test_room_around_a_logo():
    logo, canvas = glyph(), np.full((1, 128, 192, 3), 60, np.uint8)
    alone = planted(Clip(canvas), logo, scale=0.25, place=(0.5, 0.5)).frames[0]
    spot = marks.Spot(80, 48, 32, 32, 1.0)
    assert clear_space(alone, spot) == pytest.approx(48 / 32)
    for gap in (8, 16, 24):
        near = alone.copy()
        near[48:80, 112 + gap : 112 + gap + 6] = 255
        assert clear_space(near, spot) == pytest.approx((gap - 1) / 32, abs=1.5 / 32)
    assert clear_space(alone, marks.Spot(0, 10, 20, 20, 1.0)) == 0


@pytest.mark.parametrize(("wrong", "error", "says"), [
    (lambda p: Logo.open(p / "none.png"), FileNotFoundError, "none.png"), (lambda p: Logo.open(p / "text.png"), ValueError, "text.png"),
    (lambda p: Logo(np.zeros((9, 9, 4), np.uint8)), ValueError, "shows nothing"), (lambda p: Logo(np.full((9, 9, 3), 7, np.uint8)), ValueError, "shows nothing"), (lambda p: Logo(np.zeros((9, 9))), ValueError, "float64"),
    (lambda p: planted(CLIP, glyph(), scale=1.1), ValueError, "larger than the frame"), (lambda p: planted(CLIP, word(), scale=0.6), ValueError, "larger than the frame"),
    (lambda p: planted(CLIP, glyph(), opacity=0), ValueError, "opacity"), (lambda p: planted(CLIP, glyph(), place=(0.5, 1.5)), ValueError, "place"), (lambda p: planted(CLIP, Brand("x", ("red",))), ValueError, "no logo"),
    (lambda p: find_logo(CLIP.frames[:, :6, :6], glyph()), ValueError, "no size"), (lambda p: Search(threshold=0), ValueError, "threshold"), (lambda p: Search(smallest=0.7), ValueError, "smallest"),
    (lambda p: glyph("sial"), ValueError, "sail"),
])
def test_a_logo_that_can_not_be_used_is_refused(tmp_path, wrong, error, says):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(error, match=says):
        wrong(tmp_path)


# the brand

def sail(**more):
    return Brand(**{"name": "Sail & Co", "palette": ("#dc2828", "#141c50", "white"), "required": ("#dc2828",), "forbidden": ("lime",), "logo": glyph()} | more)


OURS = render(scene(7, shape="star", colour="red", background="navy"))


def test_a_brand_is_the_same_after_writing_and_reading(tmp_path):
    for brand in (sail(), sail(shares=(0.5, 0.3, 0.2), rules=Rules(clear_space=0.3, where="foreground"), version="2.1"), Brand("Ünïon", ("red",))):
        path = brand.save(tmp_path / "b" / "brand.json", overwrite=True)
        again = Brand.load(str(path))
        assert again.hash == brand.hash and again.to_dict() == brand.to_dict() and Brand.of(path).hash == brand.hash and Brand.of(brand) is brand
        assert pickle.loads(pickle.dumps(brand)).hash == brand.hash
    with pytest.raises(FileExistsError, match="brand.json"):
        brand.save(tmp_path / "b" / "brand.json")
    (tmp_path / "b" / "brand.json").unlink()
    with pytest.raises(FileExistsError, match="brand-logo.png"):
        sail().save(tmp_path / "b" / "brand.json")
    assert not (tmp_path / "b" / "brand.json").exists()


def test_whatever_can_change_a_result_changes_the_hash():
    base, dot = sail(), glyph().rgba.copy()
    dot[60, 40, 0] ^= 1
    changes = [dict(name="x"), dict(version="2"), dict(palette=("#dc2829", "#141c50", "white")), dict(palette=("#141c50", "#dc2828", "white")), dict(shares=(1, 1, 1)), dict(required=()), dict(forbidden=("green",)), dict(logo=None), dict(logo=Logo(dot))]
    changes += [dict(rules=Rules(**{f.name: "foreground" if f.name == "where" else 0.3})) for f in dataclasses.fields(Rules)]
    found = [dataclasses.replace(base, **change).hash for change in changes]
    assert len({base.hash, *found}) == 1 + len(changes) and sail().hash == base.hash


@pytest.mark.parametrize(("text", "error", "says"), [
    ('{"name": "x", "palette": ["red"], "logo": "gone.png"}', FileNotFoundError, "gone.png"), ('{"name": "x", "palette": []}', ValueError, "empty"), ('{"name": "x", "palette": ["gren"]}', ValueError, "green"),
    ('{"name": "x", "pallete": ["red"]}', ValueError, "nearest: palette"), ('{"name": "x", "palette": ["red"], "rules": {"tolerence": 3}}', ValueError, "nearest: tolerance"), ('{"palette": ["red"]}', ValueError, "no name"),
    ('{"name": "x", "palette": ["red"], "rules": {"tolerance": "ten"}}', ValueError, "tolerance is a number"), ('{"name": "x", "palette": ["red"], "rules": {"presence": 90}}', ValueError, "0 to 1"), ("[]", ValueError, "JSON object"),
    ('{"name": "x", "palette": ["red"], "rules": []}', ValueError, "rules is a JSON object"), ('{"name": "x", "palette": "red"}', ValueError, "list of colours"), ("{", ValueError, "brand.json"),
    ('{"name": "x", "palette": ["red"], "forbidden": ["#f00"]}', ValueError, "forbidden"), ('{"name": "x", "palette": ["red"], "shares": [1, 2]}', ValueError, "shares"), ('{"name": "x", "palette": ["red"], "rules": {"where": "front"}}', ValueError, "foreground"),
    ('{"name": "x", "palette": ["red"], "rules": {"adherence": NaN}}', ValueError, "adherence"),
])
def test_a_brand_file_that_can_not_be_meant_is_refused(tmp_path, text, error, says):
    path = tmp_path / "brand.json"
    path.write_text(text)
    with pytest.raises(error, match=says):
        Brand.load(path)


def test_no_file_and_no_brand(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json"):
        Brand.load(tmp_path / "none.json")
    with pytest.raises(TypeError, match="int"):
        Brand.of(3)


def measure(clip, brand):
    footage = Footage(clip, brand=brand)
    return {m.name: m(footage) for m in METRICS}


def test_the_brand_score_is_the_smaller_of_two():
    for frames, palette in (((0, 1, 2), sail().palette), (None, ("#141c50",)), (None, sail().palette)):
        brand = sail(palette=palette, required=())
        found = {k: v.value for k, v in measure(planted(OURS, brand, frames=frames), brand).items()}
        assert found["brand_score"] == min(found["palette_adherence"], found["logo_presence"])
    assert found["brand_score"] > 0.9 and found["logo_stability"] == 1


def test_what_can_not_be_known_has_a_reason():
    none = measure(OURS, sail(logo=None))
    assert none["logo_presence"].value is None and "has no logo" in none["logo_presence"].reason and none["brand_score"].value == none["palette_adherence"].value and "palette alone" in none["brand_score"].reason
    tiny = measure(OURS.frames[:, :7, :7], sail())
    assert tiny["brand_score"].value is None and "no size" in tiny["brand_score"].reason and tiny["palette_adherence"].value == 1
    gone = measure(OURS, sail())
    assert gone["logo_presence"].value == 0 == gone["brand_score"].value and gone["logo_stability"].value is None and "0 frames" in gone["logo_stability"].reason
    plain = measure(flat(("navy", 1)), sail(rules=Rules(where="foreground")))
    assert plain["palette_adherence"].value is None and plain["palette_distance"].value is None and plain["brand_score"].value is None


STRICT = Rules(distance=5, stability=0.9, clear_space=0.2, min_size=0.2)


@pytest.mark.parametrize(("spoil", "broken"), [
    (lambda b: planted(OURS, b, place=(0.9, 0.9)), set()),
    (lambda b: planted(OURS, b, place=(0.9, 0.9), frames=range(10)), {"logo_presence"}),
    (lambda b: planted(OURS, b, place=(1, 0)), {"clear_space"}),
    (lambda b: planted(OURS, b, place=(0.9, 0.9), scale=0.18), {"min_size"}),
    (lambda b: planted(OURS, b, place=(0.8, 0.5), wobble=0.04, scale=0.22), {"logo_stability"}),
    (lambda b: planted(render(scene(7, shape="star", colour="yellow", background="black")), b, place=(0.9, 0.9)), {"palette_adherence", "palette_distance"}),
    (lambda b: planted(Clip(np.where(np.indices(OURS.frames.shape[:3])[2][..., None] < 6, np.uint8([0, 255, 0]), OURS.frames)), b, place=(0.9, 0.9)), {"forbidden #00ff00"}),
])
def test_each_spoilt_clip_breaks_its_own_rule(spoil, broken):
    report = check(spoil(sail(rules=STRICT)), sail(rules=STRICT))
    found = {r.rule for r in report.rulings if r.kept is False}
    assert broken <= found and found <= broken | {"logo_stability", "required #dc2828", "clear_space"} and report.passed is (not found)
    if not broken:
        assert not found and {r.rule for r in report.rulings} == {"palette_adherence", "palette_distance", "required #dc2828", "forbidden #00ff00", "logo_presence", "logo_stability", "clear_space", "min_size"}
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_required_colour_and_a_forbidden_neighbour():
    missing = check(render(scene(7, shape="star", colour="blue", background="navy")), sail(logo=None))
    assert missing["required #dc2828"].kept is False and missing["required #dc2828"].frames == tuple(range(17)) and missing.passed is False
    close = sail(logo=None, forbidden=("#e03030",))   # nearly our red: our own red is not it
    assert check(OURS, close)["forbidden #e03030"].value < 0.005
    theirs = Clip(np.where((OURS.frames == (220, 40, 40)).all(-1, keepdims=True), np.uint8((224, 48, 48)), OURS.frames))
    found = check(theirs, close)["forbidden #e03030"]
    assert found.kept is False and found.frames == tuple(range(17)) and check(OURS, close)["forbidden #e03030"].frames == ()
    with pytest.raises(ValueError, match="logo_presence"):
        check(planted(OURS, sail()), sail())["logo_presense"]


def test_a_check_asks_the_brand_it_is_given():
    footage = Footage(OURS, brand=sail())
    measure(OURS, sail()), check(footage, sail())
    other = sail(palette=("lime",), required=(), forbidden=())
    assert check(footage, other)["palette_adherence"].value < 0.05 and check(OURS.frames, other).hash == other.hash
    assert check(footage, dataclasses.replace(footage.brand, logo=None)).passed is True


def test_boxes_are_drawn_where_the_logo_is():
    drawn = outlined(planted(OURS, sail(), frames=[0], place=(0.9, 0.1)), sail())
    green, red = ((drawn.frames == c).all(-1).any((1, 2)) for c in ((40, 220, 80), (230, 40, 40)))
    assert green.tolist() == [True] + [False] * 16 and not red[0] and red[1:].all()


# through the score

def test_without_a_brand_its_metrics_are_rows_with_a_reason():
    scores = vidgen.score([OURS], metrics=[m.name for m in METRICS])
    for row in scores.rows:
        assert row["value"] is None and row["unknown"] == 1 and "brand=" in row["reason"]


def test_values_are_remembered_by_the_brand_and_forgotten_when_its_file_changes(tmp_path, monkeypatch):
    calls = []
    look = page._sightings
    monkeypatch.setattr(page, "_sightings", lambda footage: calls.append(1) or look(footage))
    brand, path = sail(), tmp_path / "sail.json"
    brand.save(path)
    clip = planted(OURS, brand, frames=range(12))
    score = lambda: vidgen.score([clip], brand=path, metrics="brand_score,logo_presence,palette_adherence")
    first = score()
    assert first["brand_score"]["value"] == pytest.approx(12 / 17) and len(calls) == 1 and brand.hash[:16] in first.about["brand"]
    assert score().rows == first.rows and len(calls) == 1
    Image.fromarray(np.pad(glyph("bolt").rgba, [(1, 1), (1, 1), (0, 0)])).save(tmp_path / "sail-logo.png")
    assert score()["logo_presence"]["value"] == 0 and len(calls) == 2
    sail(rules=Rules(tolerance=3)).save(path, overwrite=True)
    score()
    assert len(calls) == 3
    assert vidgen.score([clip], metrics="brand_score")["brand_score"]["value"] is None
    brand.save(path, overwrite=True)
    assert score().rows == first.rows and len(calls) == 3


def test_the_command_takes_a_brand_file(tmp_path, capsys):
    path = sail().save(tmp_path / "sail.json")
    planted(OURS, sail()).save(tmp_path / "clips" / "a.mp4")
    asked = ["evaluate", str(tmp_path / "clips"), "--metrics", "brand_score,logo_presence", "--json", "--no-run"]
    assert main([*asked, "--brand", str(path)]) == 0
    rows = {r["metric"]: r for r in json.loads(capsys.readouterr().out)}
    assert rows["logo_presence"]["value"] == 1 and rows["brand_score"]["value"] > 0.9
    path.write_text('{"name": "x", "pallete": ["red"]}')
    assert main([*asked, "--brand", str(path)]) == 2 and "nearest: palette" in capsys.readouterr().err
    assert main([*asked, "--brand", str(tmp_path / "none.json")]) == 2 and "none.json" in capsys.readouterr().err


def test_a_part_of_a_clip_keeps_its_brand():
    footage = Footage(OURS, brand=sail())
    assert footage.part(2, 5).brand is footage.brand and Footage(OURS).brand is None and isinstance(METRICS[0](footage.part(2, 5)), Value)


def test_everything_is_the_same_the_second_time():
    clip = codec(planted(OURS, sail(), wobble=0.02), seed=3)
    assert check(clip, sail(rules=STRICT)).to_dict() == check(clip, sail(rules=STRICT)).to_dict()
    assert colours.dominant(pixels(clip.frames)).share_K.tolist() == colours.dominant(pixels(clip.frames)).share_K.tolist()
