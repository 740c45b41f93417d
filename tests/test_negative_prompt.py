"""What guidance walks away from when nobody says anything: the makers' own words, recorded, and gone when a request says "nothing"."""
import importlib
from dataclasses import replace

import pytest
import torch
from families import WORDS, generator, theirs

from vidgen.generate.requests import fill
from vidgen.models import cosmos, registry, wan
from vidgen.models.family import family, stock


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_who_has_one():
    found = {e.name: e.negative_prompt for e in registry.entries().values()}
    assert {n: t for n, t in found.items() if t} == {e.name: of.NEGATIVE for of in (wan, cosmos) for e in of.ENTRIES}
    assert wan.NEGATIVE.startswith("色调艳丽，过曝") and wan.NEGATIVE.endswith("倒着走") and len(wan.NEGATIVE.split("，")) == 28


@pytest.mark.parametrize("pipeline", ["cosmos_text2world", "cosmos_video2world", "cosmos2_video2world", "cosmos2_text2image"])
def test_the_words_of_cosmos_are_those_of_its_pipelines(pipeline):
    assert importlib.import_module(f"diffusers.pipelines.cosmos.pipeline_{pipeline}").DEFAULT_NEGATIVE_PROMPT == cosmos.NEGATIVE


def speaking(negative):
    "A tiny Wan whose makers have said something."
    gen = generator(family("wan").tiny(words=WORDS))
    gen.entry = replace(gen.entry, negative_prompt=negative)
    return gen


def made(gen, **more):
    return gen.generate("a red circle", seed=7, num_frames=9, num_inference_steps=3, guidance_scale=3.0, **more)[0]


@pytest.mark.parametrize(("given", "used"), [({}, "a blue star"), ({"negative_prompt": None}, "a blue star"), ({"negative_prompt": ""}, ""), ({"negative_prompt": "a white circle"}, "a white circle")], ids=str)
def test_it_is_used_recorded_and_can_be_switched_off(given, used):
    gen = speaking("a blue star")
    clip = made(gen, **given)
    frames = theirs(stock(gen.parts), "a red circle", steps=3, negative=used).permute(0, 2, 3, 1).numpy()
    assert clip.made["negative_prompt"] == used and abs(clip.frames / 255 - frames).max() < 1.5 / 255


def test_it_makes_a_difference():
    gen = speaking("a blue star")
    assert made(gen).hash != made(gen, negative_prompt="").hash == made(speaking("")).hash


def test_a_model_without_one_makes_what_it_always_made():
    gen = registry.load("shapes-t2v")
    clips = [gen.generate("a red circle moving right on a white background", num_inference_steps=2, **more)[0] for more in ({}, {"negative_prompt": ""})]
    assert clips[0].hash == clips[1].hash and clips[0].made["negative_prompt"] == ""


def test_a_folder_of_the_same_size_has_the_same_words():
    net = dict(num_attention_heads=12, ffn_dim=8960, num_layers=30, attention_head_dim=128)
    assert wan.describe({"transformer": net}, "mine", "t2v").negative_prompt == wan.NEGATIVE


def test_a_batch_fills_it_in():
    entry = registry.entries()["wan2.1-t2v-1.3b"]
    assert fill({}, entry)["negative_prompt"] == wan.NEGATIVE and fill({"negative_prompt": ""}, entry)["negative_prompt"] == ""
