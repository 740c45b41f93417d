"""What the tests of all families share: our loop and the stock pipeline asked for the same clip."""
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image

from vidgen.generate import baseline
from vidgen.generate.generator import Generator, first_frame
from vidgen.generate.guidance import schedule
from vidgen.models.family import load_parts, save_parts
from vidgen.models.plan import Plan

WORDS = "a red blue circle star moving right left on white black background".split()


def picture(width=96, height=64, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(family, name, folder, **kw):
    "A tiny checkpoint, written to `folder` and read back as a user's would be."
    return load_parts(family, save_parts(family.tiny(name, words=WORDS, **kw), folder))


def ours(parts, prompt, *, seed=7, frames=9, steps=4, scale=3.0, negative="", image=None, size=(64, 96)):
    "Frames [F, 3, H, W] in [0, 1] from the plain loop."
    x = None if image is None else first_frame(image, size[1], size[0])[0][None]
    batch = baseline.Batch((prompt,), (negative,), (seed,), frames, *size, steps, schedule("constant", scale), x)
    return (baseline.run(parts, batch, baseline.Watch())[0][0].permute(1, 0, 2, 3) / 2 + 0.5).clamp(0, 1)


def theirs(pipe, prompt, *, seed=7, frames=9, steps=4, scale=3.0, negative="", image=None, size=(64, 96), **more):
    "The same from a stock pipeline."
    pipe.set_progress_bar_config(disable=True)
    more |= {} if image is None else {"image": image}
    return pipe(prompt=prompt, negative_prompt=negative, num_frames=frames, height=size[0], width=size[1], num_inference_steps=steps, guidance_scale=scale,
                generator=torch.Generator().manual_seed(seed), output_type="pt", **more).frames[0].float()


@contextmanager
def float_answers(parts):
    "The transformer's answers in float32 meanwhile, as our loop takes them: some stock pipelines round the latents to half precision after every step."
    handle = parts.transformer.register_forward_hook(lambda m, a, out: tuple(o.float() for o in out))
    try:
        yield
    finally:
        handle.remove()


def generator(parts, batch=1, **how):
    return Generator(parts, parts.family.describe(parts.configs, "mine", parts.task), Plan("mine", "cpu", "fp32", 0.1, 0.1, 8.0, batch, **how))


def company(parts, *, frames=9, size=(64, 96), **how):
    "The largest difference between clips made together and alone, in steps of 1/255."
    asked = dict(num_frames=frames, height=size[0], width=size[1], num_inference_steps=3)
    prompts, seeds = ["a red circle", "a blue star moving left", "a red star"], [5, 9, 5]
    images = [picture(size[1], size[0], seed=i) for i in range(3)] if parts.task == "i2v" else None
    together = generator(parts, 3, **how).generate(prompts, images, seed=seeds, **asked)
    alone = [generator(parts, **how).generate(p, images and images[i], seed=seeds[i], **asked)[0] for i, p in enumerate(prompts)]
    assert together[0].hash != together[1].hash
    return max(int(np.abs(a.frames.astype(int) - b.frames).max()) for a, b in zip(together, alone, strict=True))


def learns(parts, image=None, frames=9, size=(64, 96)):
    "The training loss, twice from the same generator; gradients reach every adapter target."
    family = parts.family
    parts.transformer.requires_grad_(True)
    z = torch.randn(2, *family.latent_shape(parts, frames, *size))
    text = family.encode_prompt(parts, ["a", "b"], image).condition
    given = None if image is None else family.encode_image(parts, image, [torch.Generator() for _ in range(2)], frames)
    first, second = (family.training_loss(parts, z, text, generator=torch.Generator().manual_seed(0), image_B1CHW=given) for _ in range(2))
    first.backward()
    named = [n for n, _ in parts.transformer.named_modules() if n.endswith(family.adapter_targets)]
    reached = [n for n in named if parts.transformer.get_submodule(n).weight.grad is not None]
    parts.transformer.requires_grad_(False)
    return torch.equal(first, second) and bool(torch.isfinite(first)), named, reached
