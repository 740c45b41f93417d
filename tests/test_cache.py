"Step caching: which steps are computed, that the blocks really rest, and that nothing stays behind."
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import vidgen
from vidgen.errors import CorruptWeights
from vidgen.generate import baseline, cache, steps
from vidgen.generate.guidance import schedule
from vidgen.models.family import FAMILIES, family, stock
from vidgen.models.registry import find

MODELS = {"cogvideox": "cogvideox-5b", "wan": "wan2.1-t2v-1.3b", "ltx": None, "hunyuan": None, "cosmos": None}


def tiny(name):
    own = family(name)
    return own.tiny(MODELS[name]) if MODELS[name] else own.tiny()


def batch_for(parts, count=6, clips=1):
    return baseline.Batch(("a red circle",) * clips, ("",) * clips, tuple(range(clips)), 9, 64, 96, count, schedule("constant", 3.0))


def run(parts, batch, **how):
    with torch.no_grad():
        return baseline.latents(parts, batch, baseline.Watch(), loop=lambda *given: cache.denoise(*given, **how))[0]


def blocks_of(parts):
    return [b for name in parts.family.caching.blocks for b in getattr(parts.transformer, name)]


def counters(parts):
    "How often each block really works: counted inside its first linear layer."
    counts = []
    for i, block in enumerate(blocks_of(parts)):
        layer = next(m for m in block.modules() if isinstance(m, torch.nn.Linear))
        counts.append([])
        layer.register_forward_hook(lambda *a, i=i: counts[i].append(1))
    return counts


@pytest.mark.parametrize("name", FAMILIES)
def test_skipped_blocks_rest(name):
    parts = tiny(name)
    counts, chosen = counters(parts), (True, True, False, True, False, False)
    before = [list(getattr(parts.transformer, n)) for n in parts.family.caching.blocks]
    exact = run(parts, batch_for(parts))
    full = [len(c) for c in counts]
    [c.clear() for c in counts]
    moved = run(parts, batch_for(parts), memory=cache.Memory(chosen))
    assert [2 * len(c) for c in counts] == full, "half of the steps, half of the work, in every block"
    assert not torch.equal(moved, exact)
    assert [list(getattr(parts.transformer, n)) for n in parts.family.caching.blocks] == before, "the blocks stand where they stood"
    assert torch.equal(run(parts, batch_for(parts)), exact), "nothing stays behind in the next request"
    assert torch.equal(run(parts, batch_for(parts), memory=cache.Memory(chosen)), moved), "and the same choice gives the same clip"


@pytest.mark.parametrize("name", FAMILIES)
def test_all_steps_computed_is_the_plain_loop(name):
    parts = tiny(name)
    with torch.no_grad():
        plain = baseline.latents(parts, batch_for(parts), baseline.Watch())[0]
    assert torch.equal(run(parts, batch_for(parts), memory=cache.Memory((True,) * 6)), plain)
    first = cache.Memory(change=0.0)
    near = run(parts, batch_for(parts), memory=first)
    assert all(first.computed) and torch.allclose(near, plain, atol=1e-5)


def test_an_error_gives_the_blocks_back():
    parts = tiny("cogvideox")
    before = parts.transformer.transformer_blocks
    with pytest.raises(ZeroDivisionError):
        run(parts, batch_for(parts), memory=lambda timesteps: 1 / 0)
    with pytest.raises(RuntimeError):
        with cache.remembering(parts, cache.Memory((True,))):
            raise RuntimeError
    assert parts.transformer.transformer_blocks is before


def test_one_decision_for_both_answers_and_all_clips():
    "The batch holds both answers of guidance; each skipped step skips both, each clip as if it were alone."
    parts = tiny("cogvideox")
    chosen = (True, False, True, False, False, True)
    together = run(parts, batch_for(parts, clips=3), memory=cache.Memory(chosen))
    alone = torch.cat([run(parts, baseline.Batch(("a red circle",), ("",), (i,), 9, 64, 96, 6, schedule("constant", 3.0)), memory=cache.Memory(chosen)) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_gate_asks_once_a_step_after_it():
    parts, sizes = tiny("cogvideox"), []
    hook = parts.transformer.register_forward_pre_hook(lambda m, a, k: sizes.append(len(k["hidden_states"])), with_kwargs=True)
    gated = run(parts, batch_for(parts), gate=0.5)
    hook.remove()
    assert sizes == [2, 2, 2, 1, 1, 1]
    exact = run(parts, batch_for(parts))
    assert 0 < (gated - exact).norm() / exact.norm() < 0.5
    sizes.clear()
    both = run(parts, batch_for(parts), gate=0.5, memory=cache.Memory((True, False, True, False, False, True)))
    assert both.shape == exact.shape and torch.isfinite(both).all(), "half of the memory serves the prompts"


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.3])
def test_first_block_cache_as_in_diffusers(threshold):
    from diffusers import FirstBlockCacheConfig

    parts, other = tiny("cogvideox"), tiny("cogvideox")
    pipe = stock(other)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    theirs = pipe("a red circle", num_frames=9, height=64, width=96, num_inference_steps=6, guidance_scale=3.0, max_sequence_length=32,
                  generator=torch.Generator().manual_seed(0), output_type="latent").frames
    memory = cache.Memory(change=threshold)
    ours = run(parts, batch_for(parts), memory=memory)
    assert torch.allclose(ours, theirs, atol=1e-4), written(memory)


def written(memory):
    return steps.written(tuple(memory.computed))


def test_first_block_cache_decides_by_itself():
    parts = tiny("cogvideox")
    kinds = {t: cache.Memory(change=t) for t in (0.0, 1e9)}
    for memory in kinds.values():
        run(parts, batch_for(parts), memory=memory)
    assert sum(kinds[0.0].computed) == 6 and kinds[1e9].computed == [True] + [False] * 5


def test_first_block_cache_sees_one_clip_at_a_time():
    "Which steps a clip skips, and so its frames, do not depend on the clips beside it."
    gen, how = vidgen.load("shapes-t2v", precision="fp32", device="cpu"), {"num_inference_steps": 6, "num_frames": 9, "cache": "firstblock:0.1"}
    prompts = ["a red circle moving right on a white background", "a blue star moving left on a black background"]
    gen.plan = replace(gen.plan, batch=4)
    together = gen.generate(prompts, seed=[3, 4], **how)
    alone = [gen.generate(p, seed=s, **how)[0] for p, s in zip(prompts, (3, 4))]
    assert [c.hash for c in together] == [c.hash for c in alone] and [c.made["computed_steps"] for c in together] == [c.made["computed_steps"] for c in alone]
    assert [c.hash for c in gen.generate(prompts[0], seed=3, num_videos_per_prompt=2, **how)][0] == alone[0].hash
    assert {c.made["clips_at_once"] for c in together} == {1} and gen.generate(prompts, num_inference_steps=2, num_frames=9, cache="steps:0")[0].made["clips_at_once"] == 2


def reference(signal, coefficients, threshold, first=1, last=1):
    "TeaCache's published loop, as its scripts write it."
    accumulated, previous, computed = 0.0, None, []
    for cnt in range(len(signal)):
        if cnt < first or cnt >= len(signal) - last:
            should, accumulated = True, 0.0
        else:
            accumulated += np.poly1d(coefficients)(float((signal[cnt] - previous).abs().mean() / previous.abs().mean()))
            should = not accumulated < threshold
            accumulated = 0.0 if should else accumulated
        previous = signal[cnt]
        computed.append(should)
    return tuple(computed)


@pytest.mark.parametrize("model", [*family("cogvideox").caching.teacache, *family("wan").caching.teacache])
def test_teacache_is_the_published_rule(model):
    of = family("wan" if model.startswith("wan") else "cogvideox")
    bend = of.caching.teacache[model]
    generator = torch.Generator().manual_seed(1)
    signal = torch.cumsum(torch.randn(50, 64, generator=generator, dtype=torch.float64) * 0.05, 0) + torch.randn(1, 64, generator=generator, dtype=torch.float64)
    ends = dict(first=5, last=0) if model.endswith("-ret") else {}
    for threshold in (0.02, 0.1, 0.3):
        assert steps.teacache(signal, bend, threshold, **ends) == reference(signal, bend, threshold, **ends)


def test_teacache_of_a_run_knows_the_timesteps_only():
    parts = tiny("cogvideox")
    made = [cache.memory_for("teacache:0.1", parts, "cogvideox-5b", parts.family.sampler(parts, 50, []).timesteps).chosen for _ in range(2)]
    assert made[0] == made[1] and made[0][0] and made[0][-1]


def test_magcache_test_vector():
    own = family("wan").caching.magcache
    for ratios in own.values():
        assert steps.written(steps.magcache(ratios, 0.12)) == "0-9,14,19,24,29,34,38,41,44,46,48-49"
    small = own["wan2.1-t2v-1.3b"]
    assert [sum(steps.magcache(small, t, most=k)) for t, k in ((0.12, 2), (0.12, 4), (0.24, 6))] == [25, 21, 18]


def cost_of(errors, chosen):
    "What a choice of steps costs, added up one by one."
    last, total = 0, 0.0
    for i in range(len(errors)):
        last = i if i in chosen else last
        total += errors[last][i]
    return total


@pytest.mark.parametrize("n, k", [(n, k) for n in (5, 7) for k in range(1, n + 1)])
def test_best_is_the_best(n, k):
    "Against every possible choice, for small runs."
    from itertools import combinations

    errors = np.triu(np.random.default_rng(n).random((n, n)), 1)
    least = min(cost_of(errors, {0, *rest}) for rest in combinations(range(1, n), k - 1))
    found = steps.best(errors.tolist(), k, most=n)
    assert found[0] and sum(found) == k and cost_of(errors, {i for i, on in enumerate(found) if on}) == pytest.approx(least)


@pytest.mark.parametrize("wrong, says", [("teacache", "needs a value"), ("teacache:x", "not a number"), ("tcache:1", "teacache"), ("steps:1-3", "step 0"), ("steps:0-99", "99")])
def test_a_wrong_cache_is_refused_before_the_run(wrong, says):
    gen = vidgen.load("shapes-t2v")
    calls = []
    gen.parts.transformer.register_forward_pre_hook(lambda *a: calls.append(1))
    with pytest.raises(ValueError, match=says):
        gen.generate("a red circle", cache=wrong, num_inference_steps=4)
    assert not calls


@pytest.mark.parametrize("wrong", ["magcache:0.1", "teacache:0.1", "teacache-ret:0.1", "measured", "auto"])
def test_what_nobody_measured_is_said(wrong):
    parts = tiny("cogvideox")
    with pytest.raises(ValueError, match="calibrate"):
        cache.memory_for(wrong, parts, "mine", parts.family.sampler(parts, 8, []).timesteps)


def test_a_signal_that_depends_on_the_picture_is_no_teacache():
    parts = tiny("ltx")
    with pytest.raises(ValueError, match="firstblock"):
        cache.memory_for("teacache:0.1", parts, "ltx-video", parts.family.sampler(parts, 8, []).timesteps)


def test_a_clip_says_which_steps_were_computed(tmp_path):
    gen = vidgen.load("shapes-t2v")
    clip = gen.generate("a red circle moving right on a white background", num_inference_steps=6, cache="steps:0-2,5")[0]
    assert clip.made["computed_steps"] == "0-2,5" and "computed_steps" not in gen.generate("a red circle", num_inference_steps=2)[0].made
    path = clip.save(tmp_path / "clip.mp4")
    assert json.loads(json.dumps(vidgen.Clip.open(path).made))["computed_steps"] == "0-2,5"


def test_a_clip_records_the_cache_and_the_gate_it_was_made_with():
    gen, ask = vidgen.load("shapes-t2v", cache="steps:0-3"), dict(prompt="a red circle moving right on a white background", num_inference_steps=6, num_frames=9)
    own, plans = (gen.generate(**ask, **how)[0].made["plan"] for how in ({"cache": "steps:0-4", "gate": 0.5}, {}))
    assert (own["cache"], own["gate"]) == ("steps:0-4", 0.5) and (plans["cache"], plans["gate"]) == ("steps:0-3", 1.0)
    assert gen.generate(**ask, cache="")[0].made["plan"]["cache"] == "" and gen.plan.cache == "steps:0-3"


@pytest.mark.parametrize("model, usual", [("shapes-t2v", {50: 14, 25: 7, 12: 7, 8: 6}), ("shapes-i2v", {50: 9, 25: 4, 12: 4, 8: 4})])
def test_a_short_run_is_not_thinned_to_nothing(model, usual):
    folder, parts = find(model), tiny("cogvideox")
    for count, computed in usual.items():
        memory = cache.memory_for("auto", parts, model, parts.family.sampler(parts, count, []).timesteps, steps.measured(folder))
        assert sum(memory.chosen) == computed and memory.chosen[0], count


def test_a_run_that_computes_too_little_says_so():
    gen, ask = vidgen.load("shapes-t2v"), dict(prompt="a red circle moving right on a white background", num_inference_steps=8, num_frames=17)
    with pytest.warns(UserWarning, match="only 2 of 8 steps were computed"):
        thin = gen.generate(**ask, cache="steps:0,7")[0]
    assert len(thin.made["warnings"]) == 1 and gen.generate(**ask, cache="auto")[0].made["warnings"] == []


@pytest.mark.parametrize("text, says", [("{", "not valid JSON"), ("[]", "JSON object"), ('{"usual": "measured", "steps": {"of": 50}}', "computed")])
def test_a_broken_file_of_what_was_measured_is_named(tmp_path, text, says):
    (tmp_path / steps.FILE).write_text(text)
    with pytest.raises(CorruptWeights, match=says) as err:
        steps.measured(tmp_path)
    assert steps.FILE in str(err.value)
