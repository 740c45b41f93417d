"LoRA adapters on loaded models: what they do, and what is refused."
import numpy as np
import pytest
import torch
from families import generator
from peft import LoraConfig, get_peft_model_state_dict

from vidgen.generate import adapters
from vidgen.models.family import family, stock

ASK = dict(prompt="a red circle", num_frames=9, height=64, width=96, num_inference_steps=2, seed=1)


def made(folder, name, seed, *, of="cogvideox"):
    "A random adapter, written as a training writes it."
    parts = family(of).tiny()
    torch.manual_seed(seed)
    parts.transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), adapter_name=name)
    stock(parts).save_lora_weights(folder / name, transformer_lora_layers=get_peft_model_state_dict(parts.transformer, adapter_name=name))
    return folder / name


def answer(gen):
    of, parts = gen.parts.family, gen.parts
    g = torch.Generator().manual_seed(0)
    z = torch.randn(1, *of.latent_shape(parts, 9, 64, 96), generator=g)
    with torch.no_grad():
        return of.predict(parts, z, 500, of.encode_prompt(parts, ["a circle"]).condition, of.extras(parts, tuple(z.shape[1:]), None))


@pytest.mark.parametrize("of", ["cogvideox", "wan"])
def test_on_weighed_fused_and_off(tmp_path, of):
    gen = generator(family(of).tiny())
    plain = answer(gen)
    adapters.attach(gen, made(tmp_path, "one", 1, of=of))
    one = answer(gen)
    assert not torch.allclose(one, plain, atol=1e-3)
    assert torch.allclose((adapters.weigh(gen, one=0.0), answer(gen))[1], plain, atol=1e-6)
    adapters.attach(gen, made(tmp_path, "two", 2, of=of), scale=0.5)
    adapters.weigh(gen, one=1.0)
    both = answer(gen)
    assert not torch.allclose(both, one, atol=1e-3)
    adapters.fuse(gen)
    assert torch.allclose(answer(gen), both, atol=1e-4)
    with pytest.raises(ValueError, match="unfuse"):
        adapters.attach(gen, tmp_path / "one", name="again")
    adapters.unfuse(gen)
    assert torch.allclose(answer(gen), both, atol=1e-4)
    adapters.detach(gen, "two")
    assert torch.allclose(answer(gen), one, atol=1e-4)
    adapters.detach(gen)
    assert torch.allclose(answer(gen), plain, atol=1e-6) and gen.adapters == {}


def test_a_clip_names_what_made_it(tmp_path):
    gen = generator(family("cogvideox").tiny())
    before = gen.generate(**ASK)[0]
    adapters.attach(gen, made(tmp_path, "fox", 1), scale=0.7)
    clip = gen.generate(**ASK)[0]
    assert set(clip.made["adapters"]) == {"fox"} and clip.made["adapters"]["fox"]["scale"] == 0.7 and len(clip.made["adapters"]["fox"]["hash"]) == 64
    assert str(tmp_path) not in str(clip.made) and np.any(clip.frames != before.frames)


def test_what_is_refused(tmp_path):
    gen = generator(family("cogvideox").tiny())
    path = made(tmp_path, "fox", 1)
    with pytest.raises(FileNotFoundError, match="safetensors"):
        adapters.attach(gen, tmp_path / "nothing")
    adapters.attach(gen, path)
    with pytest.raises(ValueError, match="already"):
        adapters.attach(gen, path)
    with pytest.raises(ValueError, match="nearest: fox"):
        adapters.weigh(gen, fax=0.3)
    with pytest.raises(ValueError, match="no adapter"):
        adapters.fuse(generator(family("cogvideox").tiny()))


@pytest.mark.parametrize("text, found", [("a.safetensors", ("a.safetensors", 1.0)), ("a:0.5", ("a", 0.5)), ("C:x", ("C:x", 1.0)), ("b/a:-1", ("b/a", -1.0))])
def test_spelled(text, found):
    assert adapters.spelled(text) == found
