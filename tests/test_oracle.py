"""What must hold of the oracle on clips nobody drew by hand: symmetries, sizes, codecs, and everything that should not be believed."""
import json
import subprocess
import sys

import numpy as np
import pytest

from vidgen.clip import Clip
from vidgen.world import all_right, caption, damaged, matches, parse, read, render, scene, score, wilson
from vidgen.world.scenes import ATTRIBUTES, BACKGROUNDS, COLOURS, MOTIONS, SHAPES, combinations, distance

MIRRORED = {"left": "right", "right": "left"}
BACKWARDS = {"left": "right", "right": "left", "up": "down", "down": "up", "growing": "shrinking"}


def right(reading, scene):
    return all(getattr(reading, name) == word for name, word in scene.attributes.items())


def clip_of(frames):
    return Clip(np.ascontiguousarray(frames))


def draw(*things, ground="white", num_frames=17, width=96, height=64):
    "Things are functions of the time 0..1 that return (shape or distance function, x, y, radius, rgb) in heights, or None when not there."
    y, x = (np.mgrid[:height, :width] + 0.5) / height
    frames = np.empty((num_frames, height, width, 3))
    frames[:] = BACKGROUNDS.get(ground, ground)
    for thing in things:
        for frame, t in zip(frames, np.linspace(0, 1, num_frames)):
            if (now := thing(t)) is None:
                continue
            shape, cx, cy, r, rgb = now
            u, v = (x - cx) / r, (y - cy) / r
            far = shape(u, v) if callable(shape) else distance(shape, u, v)
            cover = np.clip(0.5 - far * r * height, 0, 1)[..., None]
            frame += cover * (np.array(rgb, float) - frame)
    return Clip(np.rint(frames).astype(np.uint8))


def goes(shape="circle", rgb=COLOURS["red"], radius=0.19):
    return lambda t: (shape, 0.5 + 0.28 * t, 0.5, radius, rgb)


@pytest.mark.parametrize("motion", MOTIONS)
def test_every_word_is_read(motion):
    every = [c for c in combinations() if c["motion"] == motion][::3]
    assert {word for c in every for word in c.values()} == {motion, *SHAPES, *COLOURS, *BACKGROUNDS}
    wrong = [c for i, c in enumerate(every) if not right(read(render(scene(i, **c))), scene(i, **c))]
    assert not wrong


@pytest.mark.parametrize("crf", [18, 23, 30])
def test_h264_changes_nothing(crf):
    scenes = [scene(10_000 + i) for i in range(24)]
    assert all(right(read(damaged(render(s), "h264", crf)), s) for s in scenes)


@pytest.mark.parametrize("kind, amount", [("blur", 1), ("blur", 2), ("noise", 4), ("noise", 8), ("noise", 16), ("crop", 0.05), ("shrink", 2), ("gamma", 0.8), ("gamma", 1.25)])
def test_mild_damage_changes_nothing(kind, amount):
    scenes = [scene(20_000 + i) for i in range(20)]
    assert all(right(read(damaged(render(s), kind, amount)), s) for s in scenes)


@pytest.mark.parametrize("width, height, num_frames", [(48, 32, 17), (60, 40, 9), (192, 128, 5), (96, 64, 2), (96, 64, 49), (720, 480, 3), (98, 65, 6)])
def test_any_size_and_length(width, height, num_frames):
    scenes = [scene(30_000 + i) for i in range(12)]
    assert all(right(read(render(s, width=width, height=height, num_frames=num_frames)), s) for s in scenes)


def test_mirror_swaps_left_and_right_and_nothing_else():
    for s in (scene(40_000 + i) for i in range(30)):
        reading = read(clip_of(render(s).frames[:, :, ::-1]))
        assert (reading.shape, reading.colour, reading.background) == (s.shape, s.colour, s.background)
        assert reading.motion == MIRRORED.get(s.motion, s.motion)


def test_time_reversal_turns_the_motion():
    for s in (scene(50_000 + i) for i in range(30)):
        reading = read(clip_of(render(s).frames[::-1]))
        assert (reading.shape, reading.colour, reading.background) == (s.shape, s.colour, s.background)
        assert reading.motion == BACKWARDS.get(s.motion, s.motion)


def test_fps_is_no_part_of_it():
    s = scene(5, motion="up")
    assert read(render(s, fps=8)) == read(render(s, fps=30))


def test_one_frame_tells_no_motion():
    reading = read(render(scene(6), num_frames=1))
    assert reading.seen and reading.motion is None and reading.shape == scene(6).shape
    assert "measurable" in reading.doubts["motion"][0]


rng = np.random.default_rng(0)
EMPTY = {name: draw(ground=name).frames for name in BACKGROUNDS} | {
    "noise": rng.integers(0, 256, (17, 64, 96, 3)).astype(np.uint8),
    "faint noise": rng.normal(128, 24, (17, 64, 96, 3)).clip(0, 255).astype(np.uint8),
    "still noise": np.repeat(rng.integers(0, 256, (1, 64, 96, 3)).astype(np.uint8), 9, 0),
    "soft noise": damaged(Clip(rng.integers(0, 256, (5, 64, 96, 3)).astype(np.uint8)), "blur", 4).frames,
    "gradient": np.broadcast_to(np.linspace(0, 255, 96)[None, None, :, None], (5, 64, 96, 3)).astype(np.uint8),
    "checkerboard": np.broadcast_to((np.mgrid[:64, :96].sum(0) // 8 % 2 * 255)[None, ..., None], (5, 64, 96, 3)).astype(np.uint8),
    "one pixel": np.full((3, 1, 1, 3), 9, np.uint8), "one row": np.full((3, 1, 96, 3), 9, np.uint8), "one flat frame": np.full((1, 64, 96, 3), 200, np.uint8),
}


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_is_seen_in_nothing(name):
    reading = read(clip_of(EMPTY[name]))
    assert not reading.seen and repr(reading) == "nothing seen"
    assert all(getattr(reading, a) is None and reading.confidence[a] == 0 for a in ATTRIBUTES)


R, B, Y = COLOURS["red"], COLOURS["blue"], COLOURS["yellow"]
SHAKE = rng.normal(0, 0.03, (17, 2))
JUMPS = rng.uniform(0.25, 0.75, (17, 2))


def at(t):
    return int(round(16 * t))


def blend(t, a, b):
    return tuple(np.array(a) * (1 - t) + np.array(b) * t)


NOT_TO_BE_BELIEVED = {
    "two circles": ("shape motion", lambda: draw(lambda t: ("circle", 0.4, 0.4, 0.17, R), lambda t: ("circle", 1.1, 0.6, 0.17, R))),
    "a circle and a square": ("shape", lambda: draw(goes(), lambda t: ("square", 1.2, 0.75, 0.15, R))),
    "a large and a small one": ("shape", lambda: draw(goes(), lambda t: ("circle", 1.3, 0.85, 0.08, R))),
    "two colours of things": ("shape colour motion", lambda: draw(lambda t: ("circle", 0.3 + 0.28 * t, 0.3, 0.17, R), lambda t: ("square", 1.1, 0.7, 0.17, B))),
    "two that touch": ("shape", lambda: draw(lambda t: ("circle", 0.6, 0.5, 0.16, R), lambda t: ("circle", 0.88, 0.5, 0.16, R))),
    "an ellipse": ("shape", lambda: draw(goes(lambda u, v: (np.hypot(u / 1.25, v / 0.8) - 1) * 0.8))),
    "a rectangle": ("shape", lambda: draw(goes(lambda u, v: np.maximum(np.abs(u) - 1.25, np.abs(v) - 0.63)))),
    "a diamond": ("shape", lambda: draw(goes(lambda u, v: (np.abs(u) + np.abs(v) - 1.253) / 1.414))),
    "a ring": ("shape", lambda: draw(goes(lambda u, v: np.maximum(np.hypot(u, v) - 1.15, 0.57 - np.hypot(u, v))))),
    "a half circle": ("shape", lambda: draw(goes(lambda u, v: np.maximum(np.hypot(u, v) - 1.41, u)))),
    "upside down": ("shape", lambda: draw(goes(lambda u, v: distance("triangle", u, -v)))),
    "in stripes": ("shape", lambda: draw(goes(lambda u, v: np.maximum(distance("square", u, v), np.where(np.floor(v * 2.5) % 2 == 0, -0.1, 0.1))))),
    "circle, then square": ("shape", lambda: draw(lambda t: goes("circle" if t < 0.5 else "square")(t))),
    "star at the end": ("shape", lambda: draw(lambda t: goes("square" if t < 0.7 else "star")(t))),
    "all shapes in turn": ("shape", lambda: draw(lambda t: goes(SHAPES[at(t) % 4])(t))),
    "slowly another": ("shape", lambda: draw(lambda t: goes(lambda u, v: (1 - t) * distance("circle", u, v) + t * distance("star", u, v))(t))),
    "red to yellow": ("colour", lambda: draw(lambda t: goes(rgb=blend(t, R, Y))(t))),
    "red to orange": ("colour", lambda: draw(lambda t: goes(rgb=blend(t, R, COLOURS["orange"]))(t))),
    "red, then blue": ("colour", lambda: draw(lambda t: goes(rgb=R if t < 0.6 else B)(t))),
    "half red, half blue": ("colour", lambda: draw(goes("square"), lambda t: goes(lambda u, v: np.maximum(distance("square", u, v), u), B)(t))),
    "brown": ("colour", lambda: draw(goes(rgb=(110, 70, 40)))),
    "white": ("colour", lambda: draw(goes(rgb=(240, 240, 240)), ground="navy")),
    "one jump": ("motion", lambda: draw(lambda t: ("circle", 0.5 if t < 0.5 else 0.9, 0.5, 0.19, R))),
    "many jumps": ("motion", lambda: draw(lambda t: ("circle", 1.5 * JUMPS[at(t), 0], JUMPS[at(t), 1], 0.19, R))),
    "trembling": ("motion", lambda: draw(lambda t: ("circle", 0.75 + SHAKE[at(t), 0], 0.5 + SHAKE[at(t), 1], 0.19, R))),
    "there and back": ("motion", lambda: draw(lambda t: ("circle", 0.6 + 0.3 * abs(2 * t - 1), 0.5, 0.19, R))),
    "diagonal": ("motion", lambda: draw(lambda t: ("circle", 0.6 + 0.25 * t, 0.4 + 0.25 * t, 0.17, R))),
    "in a circle": ("motion", lambda: draw(lambda t: ("circle", 0.75 + 0.15 * np.cos(6.28 * t), 0.5 + 0.15 * np.sin(6.28 * t), 0.19, R))),
    "moves and grows": ("motion", lambda: draw(lambda t: goes(radius=0.19 * (0.65 + 0.7 * t))(t))),
    "hardly moves": ("motion", lambda: draw(lambda t: ("circle", 0.6 + 0.1 * t, 0.5, 0.19, R))),
    "breathing": ("motion", lambda: draw(lambda t: ("circle", 0.75, 0.5, 0.19 * (1 + 0.3 * np.sin(6.28 * t)), R))),
    "goes out": ("shape colour motion", lambda: draw(lambda t: goes()(t) if t < 0.6 else None)),
    "flashes": ("shape colour motion", lambda: draw(lambda t: goes()(t) if at(t) % 4 else None)),
    "the background changes": ("background", lambda: Clip(np.concatenate([draw(goes()).frames[:9], draw(goes(), ground="black").frames[9:]]))),
    "a green background": ("background", lambda: draw(goes(), ground=(60, 160, 70))),
    "between white and grey": ("background", lambda: draw(goes(), ground=(189, 189, 189))),
}


@pytest.mark.parametrize("name", NOT_TO_BE_BELIEVED)
def test_not_to_be_believed(name):
    attributes, clip = NOT_TO_BE_BELIEVED[name]
    reading = read(clip())
    assert {a: getattr(reading, a) for a in attributes.split()} == dict.fromkeys(attributes.split())


def test_the_drawing_itself_is_believed():
    reading = read(draw(goes()))
    assert (reading.shape, reading.colour, reading.motion, reading.background) == ("circle", "red", "right", "white")


def test_measured_in_heights_whatever_the_size():
    for size in ({}, {"width": 288, "height": 192}, {"width": 48, "height": 32}):
        reading = read(draw(goes(), **size)).measured
        assert reading["dx"] == pytest.approx(0.28, abs=0.01) and reading["dy"] == pytest.approx(0, abs=0.01)
        assert reading["radius"] == pytest.approx(0.19, abs=0.01) and reading["x"] == pytest.approx(0.64, abs=0.01)


def test_only_clips_are_read():
    with pytest.raises(TypeError, match="Clip"):
        read(np.zeros((5, 64, 96, 3), np.uint8))


def test_matches_asks_for_what_the_prompt_names():
    s = scene(3)
    reading = read(render(s))
    assert all_right(reading, caption(s)) and all_right(reading, f"a {s.shape}") and set(matches(reading, f"a {s.colour} thing")) == {"colour"}
    other = next(shape for shape in SHAPES if shape != s.shape)
    assert not all_right(reading, f"a {s.colour} {other}")
    with pytest.raises(ValueError, match="names no attribute"):
        all_right(reading, "a dog on a beach")


def test_score_counts_and_is_json():
    scenes = [scene(i) for i in range(12)]
    clips, prompts = [render(s) for s in scenes], [caption(s) for s in scenes]
    clips[0], prompts[1] = Clip(EMPTY["white"]), f"a {scenes[1].shape}"
    result = score(clips, prompts)
    assert result.asked == {"shape": 12, "colour": 11, "motion": 11, "background": 11, "all": 12} and result.right["all"] == 11
    assert result.confusion["shape"][scenes[0].shape]["nothing"] == 1 and (1, "shape", scenes[0].shape, "nothing") in result.mistakes
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()
    assert "11 of 12" in repr(result) and "<table>" in result._repr_html_()
    assert score([read(c) for c in clips], prompts) == result
    with pytest.raises(ValueError):
        score(clips, prompts[:-1])
    with pytest.raises(ValueError, match="no clips"):
        score([], [])


def test_shuffled_prompts_score_at_chance():
    scenes = [scene(60_000 + i) for i in range(80)]
    shuffled = score((render(s) for s in scenes), [caption(s) for s in scenes[1:] + scenes[:1]])
    assert shuffled.right["all"] <= 2
    for row in shuffled.rows[:4]:
        assert row["low"] < 1 / len(ATTRIBUTES[row["attribute"]]) + 0.05


def test_wilson():
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    for k, n in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(ValueError):
            wilson(k, n)


def test_damage_is_repeatable_and_named():
    clip = render(scene(1))
    assert np.array_equal(damaged(clip, "noise", 9).frames, damaged(clip, "noise", 9).frames)
    with pytest.raises(ValueError, match="blur"):
        damaged(clip, "blurr", 1)


def test_prompts_of_the_world_parse_to_what_is_read():
    s = scene(9)
    assert parse(caption(s)) == {name: getattr(read(render(s)), name) for name in ATTRIBUTES}


def test_reading_needs_numpy_only():
    code = ("import sys; from vidgen import world; assert world.read(world.render(world.scene(1))).seen; "
            "print(*{'torch', 'cv2', 'scipy', 'av', 'diffusers', 'matplotlib'} & set(sys.modules))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
