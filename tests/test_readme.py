"""README.md says what nbs/index.ipynb says, and everything it names is there."""
import json
import re
from pathlib import Path

import pytest

from vidgen import cli

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
CELLS = json.loads((ROOT / "nbs/index.ipynb").read_text())["cells"]


def words(text):
    return " ".join("".join(text).split())


def test_readme_is_in_step_with_its_notebook():
    text = words(README.read_text())
    for cell in CELLS:
        assert words(cell["source"]) in text, f"`make export` writes README.md; it lacks: {words(cell['source'])[:200]}"
        for output in cell.get("outputs", []):
            shown = output.get("text") or ("" if "image/png" in output.get("data", {}) else output.get("data", {}).get("text/plain", ""))
            assert words(shown) in text


def test_readme_shows_a_contact_sheet():
    images = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README.read_text())
    assert images and all((ROOT / image).stat().st_size > 1000 for image in images), images


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:nbs|experiments|reports|tests)/[\w./-]+)`", README.read_text() + json.dumps(CELLS)))))
def test_every_path_in_readme_exists(path):
    assert (ROOT / path).exists()


def test_every_command_in_readme_exists():
    text = "\n".join("".join(cell["source"]) for cell in CELLS)
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S))
    asked = {line.split()[1] for line in shell.splitlines() if line.startswith("vidgen ")}
    assert asked and asked <= set(cli.COMMANDS)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake (\w+)\b(?=`|\s+#)", text)) <= targets
    tree = text.split("```text\nnbs/\n")[1].split("```")[0]
    for folder in re.findall(r"^  (\d\d_\w+)/", tree, re.M):
        assert (ROOT / "nbs" / folder).is_dir(), folder
    for top in re.findall(r"^([\w.]+/)", tree, re.M):
        assert top == "runs/" or (ROOT / top).is_dir(), top
