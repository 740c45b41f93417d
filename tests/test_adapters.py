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


def test_on_weights_in_eight_bits(tmp_path):
    "The adapter is made in the precision that is computed in: the same change as on the model itself, to the rounding of the weights."
    from vidgen.generate.quantised import store_fp8

    path, exact, small = made(tmp_path, "fox", 1), generator(family("cogvideox").tiny()), generator(family("cogvideox").tiny())
    store_fp8(small.parts)
    plain = answer(exact), answer(small)
    for gen in (exact, small):
        adapters.attach(gen, path)
    lora = {n: p for n, p in small.parts.transformer.named_parameters() if "lora_" in n}
    assert lora and all(p.dtype == torch.float32 for p in lora.values()) and all(torch.equal(p, dict(exact.parts.transformer.named_parameters())[n]) for n, p in lora.items())
    moved = answer(exact) - plain[0], answer(small) - plain[1]
    assert (moved[0] - moved[1]).norm() < 0.3 * moved[0].norm()
    with pytest.raises(ValueError, match="rounded away"):
        adapters.fuse(small)
    assert small.generate(**ASK)[0].made["adapters"]["fox"]["scale"] == 1.0


def test_an_adapter_of_another_width_leaves_nothing_behind(tmp_path):
    from safetensors.torch import load_file, save_file

    gen, path = generator(family("cogvideox").tiny()), made(tmp_path, "fox", 1)
    plain, file = answer(gen), next(path.glob("*.safetensors"))
    (tmp_path / "wide").mkdir()
    save_file({k: torch.cat([v, v], dim=1) if "lora_A" in k else v for k, v in load_file(file).items()}, tmp_path / "wide" / "wide.safetensors")
    for first in (True, False):
        with pytest.raises(ValueError, match="can't be put on mine.*another model"):
            adapters.attach(gen, tmp_path / "wide")
        assert "wide" not in gen.adapters and "wide" not in getattr(gen.parts.transformer, "peft_config", {})
        if first:
            assert torch.equal(answer(gen), plain)
            adapters.attach(gen, path)
            one = answer(gen)
    assert torch.equal(answer(gen), one) and not torch.allclose(one, plain, atol=1e-3)


def test_memory_that_runs_out_is_told_as_it_is(tmp_path, monkeypatch):
    gen, path = generator(family("cogvideox").tiny()), made(tmp_path, "fox", 1)

    def full(*a, **k):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(stock(gen.parts)), "load_lora_weights", full)
    with pytest.raises(torch.OutOfMemoryError):
        adapters.attach(gen, path)


@pytest.mark.parametrize("name", ["v1.5", "a b", "a/b"])
def test_a_name_that_cannot_be_used(tmp_path, name):
    with pytest.raises(ValueError, match="give another name"):
        adapters.attach(generator(family("cogvideox").tiny()), made(tmp_path, "fox", 1), name=name)


def test_a_registered_name_is_as_good_as_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDGEN_STORAGE_ROOT", str(tmp_path / "artifacts"))
    (shelf := tmp_path / "artifacts/adapters/ell-v1").mkdir(parents=True)
    (there := made(tmp_path, "one", 1) / "pytorch_lora_weights.safetensors").rename(shelf / there.name)
    gen = generator(family("cogvideox").tiny())
    plain = answer(gen)
    assert adapters.attach(gen, "ell-v1", scale=0.5) == "ell-v1" and gen.adapters["ell-v1"]["path"] == shelf / there.name
    assert not torch.allclose(answer(gen), plain, atol=1e-3)
    with pytest.raises(FileNotFoundError, match="no registered adapter; nearest: ell-v1; all: `vidgen adapter list`"):
        adapters.file_of("ell-v")
