"""What holds for every notebook and every module, whoever writes the next one."""
import ast
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vidgen import sweeps

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(p for folder in ("nbs", "experiments", "reports") for p in (ROOT / folder).rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.parts))
SOURCES = [p for p in PAGES if p.is_relative_to(ROOT / "nbs")]
EXPERIMENTS = [p.parent.name for p in PAGES if p.is_relative_to(ROOT / "experiments")]
MODULES = sorted(p for p in (ROOT / "vidgen").rglob("*.py") if p.name != "_modidx.py" and "weights" not in p.parts)
HEAVY = ("torch", "diffusers", "transformers", "cv2", "av", "matplotlib", "PIL", "papermill", "scipy")
HERE = "|".join(re.escape(str(p)) for p in {ROOT, Path.home(), Path(sys.prefix)} if len(p.parts) > 1)
LOCAL = re.compile(rf"(?<![\w.-])(?:{HERE})(?![\w.-])|/tmp/(?:tmp|pytest|ipy)\w*|https?://(?!pypi\.org|test\.pypi\.org)[^\s/\"']+/(?:\w+/)*simple\b")


def name(path):
    return str(path.relative_to(ROOT))


def source(cell):
    return "".join(cell["source"])


def exported(cell):
    return cell["cell_type"] == "code" and re.search(r"^#\|\s*exports?\b", source(cell), re.M)


def public(code):
    return [n.name for n in ast.parse(code).body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not n.name.startswith("_")]


# what can be wrong with a notebook; each returns the faults it finds

def page_faults(nb):
    "A title, a promise, a size one can read."
    first = source(nb["cells"][0]).splitlines() if nb["cells"] else []
    if nb["cells"][0]["cell_type"] != "markdown" or not first[0].startswith("# ") or not any(line.startswith("> ") for line in first):
        yield "the first cell is no `# title` with a `> promise`"
    if len(nb["cells"]) > 90:
        yield f"{len(nb['cells'])} cells, and 90 are the most"
    if (kb := len(json.dumps(nb)) / 1024) > 300:
        yield f"{kb:.0f} KB, and 300 are the most"


def metadata_faults(nb):
    "No traces of who ran it when."
    for i, cell in enumerate(nb["cells"]):
        if extra := set(cell["metadata"]) - {"tags", "hide_input", "nbdev"}:
            yield f"cell {i} carries {', '.join(sorted(extra))}"
        if cell.get("execution_count") or any(o.get("execution_count") for o in cell.get("outputs", [])):
            yield f"cell {i} has an execution count"
        if any(o["output_type"] == "error" for o in cell.get("outputs", [])):
            yield f"cell {i} shows an error that nobody caught"
    if extra := set(nb["metadata"]) - {"kernelspec", "jekyll", "jupytext", "doc", "widgets", "nbdev"}:
        yield f"the notebook carries {', '.join(sorted(extra))}"


def code_faults(nb):
    "What an exported cell must not do, and what must follow it."
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    for i, cell in enumerate(code):
        text = source(cell)
        if re.search(r"^#\|\s*eval:\s*false", text, re.M):
            yield f"code cell {i} never runs; GPU cells start with `#| gpu`"
        if not exported(cell):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names):
                yield f"code cell {i}: star import from {node.module}"
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(m.split(".")[0] in ("nbdev", "fastcore", "execnb") for m in modules):
                yield f"code cell {i}: nbdev imported at run time"
            if isinstance(node, ast.Name) and node.id == "__name__" and "__main__" in text:
                yield f"code cell {i}: a __main__ guard runs in tests"
        following = code[i + 1] if i + 1 < len(code) else None
        if (names := public(text)) and (following is None or exported(following) or re.search(r"^#\|\s*hide\b", source(following), re.M)):
            yield f"code cell {i}: no example follows {', '.join(names)}"


def place_faults(nb, path):
    "The path, its numbers left out, is the module."
    found = [m[1] for c in nb["cells"] if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", source(c), re.M))]
    parts = [re.sub(r"^\d+_", "", part) for part in path.relative_to(ROOT / "nbs").with_suffix("").parts]
    module = ".".join("__init__" if part == "init" else part for part in parts)
    if any(exported(c) for c in nb["cells"] if c["cell_type"] == "code") and found != [module]:
        yield f"default_exp is {found or 'missing'}, and by its path it is {module}"


def local_faults(text):
    "Paths and hosts of the machine somebody worked on."
    for i, line in enumerate(text.splitlines(), 1):
        if found := LOCAL.search(line):
            yield f"line {i}: {found[0]}…"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_notebook(path):
    nb = json.loads(path.read_text())
    faults = [*page_faults(nb), *metadata_faults(nb), *local_faults(path.read_text())]
    if path in SOURCES:
        faults += [*code_faults(nb), *place_faults(nb, path)]
    assert not faults, "\n".join(faults)


def cell(text, kind="code", **fields):
    return {"cell_type": kind, "source": text, "metadata": {}, **fields}


@pytest.mark.parametrize(("check", "bad", "says"), [
    (page_faults, [cell("no title", "markdown")], "promise"), (page_faults, [cell("# t\n> p", "markdown")] * 91, "91 cells"), (page_faults, [cell("# t\n> p" + "x" * 400_000, "markdown")], "KB"),
    (metadata_faults, [cell("1", metadata={"papermill": {}})], "papermill"), (metadata_faults, [cell("1", execution_count=3)], "execution count"),
    (metadata_faults, [cell("1", outputs=[{"output_type": "error"}])], "error"),
    (code_faults, [cell("#| export\nfrom os import *")], "star"), (code_faults, [cell("#| export\ndef f():\n    import fastcore.all")], "run time"),
    (code_faults, [cell("#| export\nif __name__ == '__main__':\n    pass")], "guard"), (code_faults, [cell("#| export\ndef f(): 1")], "no example follows f"),
    (code_faults, [cell("#| export\ndef f(): 1"), cell("#| hide\nf()")], "no example"), (code_faults, [cell("#| export\nclass F: 1"), cell("#| export\nx = 1")], "no example follows F"),
    (code_faults, [cell("#| eval: false\n1")], "never runs"),
])
def test_the_checks_find_what_they_are_for(check, bad, says):
    assert any(says in fault for fault in check({"cells": bad, "metadata": {}}))
    good = [cell("# t\n> p", "markdown"), cell("#| export\ndef f(): 1\ndef _g(): 1"), cell("f()", outputs=[], execution_count=None), cell("#| export\ndef _h(): 1")]
    assert not list(check({"cells": good, "metadata": {}}))


def test_local_paths_are_found():
    for bad in (f"see {ROOT}/nbs", f"'{Path.home()}/x'", "/tmp/" + "tmp8a/x", "https://packages.corp" + "/api/simple"):
        assert list(local_faults(bad)), bad
    for good in ("https://pypi.org/simple", f"a{ROOT}/b", f"{ROOT}-other", "and/or", "/path/to/runs", "/tmp/x", "a simple https://example.com"):
        assert not list(local_faults(good)), good


def tracked():
    done = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    return [ROOT / f for f in done.stdout.splitlines()] if done.returncode == 0 else []


def test_no_file_names_the_machine_it_was_written_on():
    texts = {".py", ".ipynb", ".md", ".toml", ".ini", ".yml", ".yaml", ".json", ".txt", ""}
    files = [f for f in tracked() if f.suffix in texts and f.is_file() and "weights" not in f.parts and f.name != Path(__file__).name]
    faults = {str(f.relative_to(ROOT)): found for f in files if (found := list(local_faults(f.read_text(errors="replace"))))}
    assert not faults


# experiments

@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment(experiment):
    found = sweeps.parameters(ROOT / "experiments" / experiment)
    assert not [k for k, p in found.items() if not p.comment], "every parameter has a comment beside it"
    presets = {f.stem for f in (ROOT / "experiments" / experiment / "params").glob("*.yaml")}
    assert {"smoke", "cpu", "h200"} <= presets
    for preset in presets:
        sweeps.check(ROOT / "experiments" / experiment, preset=preset)
    assert len(sweeps._cells(sweeps.notebook(ROOT / "experiments" / experiment))) <= 25, "an experiment is parameters, run, metrics, picture"


def test_the_tag_survives_cleaning(tmp_path):
    pytest.importorskip("nbdev")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    nb = {"cells": [cell("x = 1", metadata={"tags": ["parameters"], "papermill": {}}, outputs=[], execution_count=3)], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "a.ipynb").write_text(json.dumps(nb))
    subprocess.run([sys.executable, "-c", "from nbdev.clean import nbdev_clean; nbdev_clean('a.ipynb')"], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": ""})
    assert json.loads((tmp_path / "a.ipynb").read_text())["cells"][0]["metadata"] == {"tags": ["parameters"]}


# modules

def module(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


BLOCK = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""


def only_base(code, **env):
    "Run code in a fresh process that can import nothing an extra brings."
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {re.split(r"[\[<>=]", item)[0].replace("-", "_") for items in extras.values() for item in items} - {"vidgen"}
    names |= {"yapf", "fastcore", "execnb", "nbformat", "nbclient", "jupyter_client", "IPython", "confluent_kafka", "sklearn"}
    return subprocess.run([sys.executable, "-c", f"EXTRAS = {names - {'protobuf'}!r}\n{BLOCK}\n{code}"], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", **env})


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_module_imports_alone_and_without_extras(path):
    done = only_base(f"import importlib; m = importlib.import_module({module(path)!r})\n"
                     "missing = [n for n in getattr(m, '__all__', []) if not hasattr(m, n)]\nassert not missing, missing")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_module_is_exported_and_documented(path):
    text = path.read_text()
    if not text.strip():
        assert path.name == "__init__.py"
        return
    assert "AUTOGENERATED" in text[:4000], "not exported from a notebook"
    tree = ast.parse(text)
    bare = [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_") and not ast.get_docstring(n)]
    assert not bare, f"no docstring: {', '.join(bare)}"


def test_smoke_import_is_instant_and_light():
    code = "import sys, time\nstart = time.perf_counter()\nimport vidgen\nprint(time.perf_counter() - start)\n" \
           f"heavy = [m for m in {HEAVY!r} if m in sys.modules]\nassert not heavy, heavy"
    seconds = []
    for _ in range(5):
        done = only_base(code)
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout))
    assert min(seconds) < 0.3, seconds


@pytest.mark.parametrize("light", ["errors", "progress", "settings", "store", "clip", "runs", "sweeps", "cli"])
def test_light_modules_import_nothing_heavy(light):
    done = only_base(f"import sys, vidgen.{light}\nheavy = [m for m in {HEAVY!r} if m in sys.modules]\nassert not heavy, heavy")
    assert done.returncode == 0, done.stderr


def test_home_may_be_read_only(tmp_path):
    modules = [module(p) for p in MODULES]
    code = f"import importlib\nfor name in {modules!r}: importlib.import_module(name)\n" \
           "from vidgen.runs import Run\nrun = Run.create('home', {})\nrun.log(step=1, x=1.0)\nrun.finish()"
    done = only_base(code, HOME="/proc/no/home", XDG_CACHE_HOME="/proc/no/cache", HF_HOME="/proc/no/hf", VIDGEN_STORAGE_RUNS=str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_a_clip_is_made_with_home_read_only(tmp_path):
    code = "import vidgen\nclip, = vidgen.load('shapes-t2v').generate('a red circle moving right on a white background', seed=7, num_inference_steps=2)\nclip.save('clip.mp4')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=170,
                          env={**os.environ, "HOME": "/proc/no/home", "XDG_CACHE_HOME": "/proc/no/cache", "HF_HOME": "/proc/no/hf", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0 and (tmp_path / "clip.mp4").stat().st_size, done.stderr


# the house

def test_ci_runs_the_same_as_make():
    text = (ROOT / ".ci/run").read_text()
    assert os.access(ROOT / ".ci/run", os.X_OK) and "make test" in text
    suite = importlib.import_module("suite") if str(ROOT / "tests") in sys.path else None
    if suite:
        assert list(suite.STEPS) == ["export", "clean", "lint", "notebooks", "pytest", "smoke"]


@pytest.mark.parametrize("target", ["demo", "test", "lab", "export", "clean", "help"])
def test_make_knows(target):
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_old_python_is_refused_with_a_sentence(tmp_path):
    fake = tmp_path / "python3"
    fake.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo Python 3.9.2 && exit 0\nexit 1\n")
    fake.chmod(0o755)
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "pyproject.toml").write_text("")
    done = subprocess.run(["make", "test", f"PYTHON={fake}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and "needs Python 3.11 or newer" in done.stdout + done.stderr and "3.9.2" in done.stdout
