"""Training runs by several processes: started by torchrun with a file of cases, one run after the other; the tests compare them with runs of one process."""
import json
import os
import subprocess
import sys
from pathlib import Path

from vidgen import runs
from vidgen.errors import Canceled
from vidgen.progress import Cancel
from vidgen.train import trainer
from vidgen.train.config import Recipe
from vidgen.train.team import team


def launched(processes: int, cases: list[dict], root: Path, timeout: int = 500) -> dict:
    "Start the cases, each {name, facts, run: a folder to go on with, stop: a step to be asked to stop at}; {name: its Run}, and the output under \"\"."
    root.mkdir(parents=True, exist_ok=True)
    (root / "cases.json").write_text(json.dumps(cases))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VIDGEN_STORAGE_RUNS": str(root), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), __file__, str(root / "cases.json")],
                          env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return {"": done.stdout + done.stderr} | {name: runs.Run.open(path) for name, path in json.loads((root / "done.json").read_text()).items()}


def alone(facts: dict, root: Path, path: Path | None = None, stop: int = 0):
    "The same by one process: its Run."
    run = runs.Run.open(path, trackers=[]) if path else runs.Run.create("alone", {}, root=root, trackers=[])
    trained(Recipe(**facts), run, stop)
    return run


def trained(r: Recipe, run, stop: int = 0, **how):
    "Train; with `stop` until that step, where a checkpoint is written."
    cancel = Cancel()
    try:
        trainer.train(r, run=run, cancel=cancel, progress=lambda event: event.stage == "train" and event.done == stop and cancel.cancel("asked"), **how)
    except Canceled:
        assert stop


def main(file: Path):
    together, done = team(cpu=True), {}
    for case in json.loads(file.read_text()):
        r = Recipe(**case["facts"])
        run = runs.Run.open(case["run"], trackers=[], watch=bool(together.rank)) if case.get("run") else trainer.created(r, together, case["name"])
        trained(r, run, case.get("stop", 0), team=together)
        done[case["name"]] = str(run.path)
    if together.rank == 0:
        (file.parent / "done.json").write_text(json.dumps(done))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
