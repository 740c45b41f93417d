"""What CI calls: the programs of Debian that tests need are installed where they are missing, and named where they can't be."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="no make on this machine")


@pytest.fixture
def call(tmp_path):
    "Calls make with an apt-get that only writes down what it was asked; returns (status, what was said, what apt-get was asked)."
    said, places = tmp_path / "asked", tmp_path / "bin"
    places.mkdir()
    for name, does in (("apt-get", f'echo "$*" >> {said}\n[ "$3" != fine ] || touch {places}/fine && chmod -f +x {places}/fine || true'), ("sudo", 'exec "$@"')):
        (places / name).write_text(f"#!/bin/bash\n{does}\n".replace('"$3" != fine', '"${@: -1}" != fine'))
        (places / name).chmod(0o755)

    def made(*words):
        env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
        done = subprocess.run(["make", "--no-print-directory", *words], cwd=ROOT, capture_output=True, text=True, timeout=60, env=env | {"PATH": f"{places}:{os.environ['PATH']}"})
        return done.returncode, done.stdout + done.stderr, said.read_text().splitlines() if said.exists() else []

    return made


def test_nothing_is_done_where_all_is_there(call):
    status, said, asked = call("services", "SERVERS=sh:dash env:coreutils")
    assert status == 0 and "all there" in said and not asked


def test_what_is_missing_is_installed_and_nothing_else(call):
    status, said, asked = call("services", "SERVERS=sh:dash fine:fine")
    assert status == 0 and [a.split()[-1] for a in asked if "install" in a] == ["fine"], said


def test_what_can_not_be_installed_is_named_and_the_rest_is_installed(call):
    status, said, asked = call("services", "SERVERS=nosuch:no-such-package fine:fine")
    assert status != 0 and "could not be installed" in said and "nosuch:no-such-package" in said.splitlines()[-2] and "fine:fine" not in said.splitlines()[-2]
    assert [a.split()[-1] for a in asked if "install" in a] == ["no-such-package", "fine"]


def test_services_are_not_skipped_silently(call):
    status, said, _ = call("test-services", "-o", ".venv/.services", "SERVERS=nosuch:no-such-package")
    assert status != 0 and "nosuch:no-such-package" in said and "nothing was tested" in said


def test_ci_runs_what_needs_no_server_and_what_does():
    lines = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line.startswith("make")]
    assert lines == ["make test", "make services", "make test-services"] and os.access(ROOT / ".ci/run", os.X_OK)
