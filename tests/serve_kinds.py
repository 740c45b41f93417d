"""Kinds of jobs that tests ask workers for."""
import os
import signal
import time

from vidgen.serve import score  # noqa: F401  registers its kind
from vidgen.serve.kinds import Kind, Stage, register


def stage(n):
    def run(work):
        work.cancel.check()
        time.sleep(work.spec.get("seconds", 0.01))
        path = work.folder / f"{n}.bin"
        before = [work.claim.file(f"s{i}", f"{i}.bin").read_bytes() for i in range(n)]
        path.write_bytes(b"|".join(before) + f"<{work.spec['n']}.{n}>".encode())
        work.files[:] = [path]
        work.report("done", 1, 1)
        return {"n": n}
    return run


def undo(work, output):
    with open(work.spec["undone"], "a") as file:
        file.write(f"{output['n']}\n")


register(Kind("three", tuple(Stage(f"s{n}", stage(n), 30 * n, 30 * n + 30, keep=lambda work: list(work.files)) for n in range(3))))
register(Kind("undoes", (*(Stage(f"s{n}", stage(n), 30 * n, 30 * n + 30, undo=undo, keep=lambda work: list(work.files)) for n in range(2)), Stage("bad", lambda work: 1 / 0, 90, 100))))
register(Kind("poison", (Stage("die", lambda work: os.kill(os.getpid(), signal.SIGKILL)),)))


def deaf(work):
    work.report("does not listen")
    time.sleep(600)


def flaky(work):
    if work.claim.job.attempt < 3:
        raise ConnectionResetError("the other side hung up")
    return {"attempt": work.claim.job.attempt}


def asks(work):
    import httpx

    return {"said": httpx.get(work.spec["url"]).raise_for_status().text}


register(Kind("asks", (*(Stage(f"s{n}", stage(n), 30 * n, 30 * n + 30, undo=undo, keep=lambda work: list(work.files)) for n in range(2)), Stage("ask", asks, 60, 100))))
register(Kind("deaf", (Stage("deaf", deaf),)))
register(Kind("flaky", (Stage("call", flaky),)))


def patient(work):
    for step in range(600):
        time.sleep(0.05)
        work.report("waiting", step + 1, 600)


register(Kind("patient", (Stage("wait", patient),)))


def film(work):
    "A clip of a square that moves, `frames` long: no model is needed."
    import numpy as np

    from vidgen.clip import Clip

    frames = np.full((work.spec.get("frames", 5), 128, 192, 3), 255, np.uint8)
    for t, frame in enumerate(frames):
        frame[40:90, 4 * t % 140:4 * t % 140 + 50] = (220, 40, 40)
    work.files[:] = [Clip(frames).save(work.folder / "clip.mp4", overwrite=True)]
    return {"video": "clip.mp4", "frames": len(frames)}


register(Kind("film", (Stage("make", film),), then=lambda spec: spec.get("then", ["score"])))
