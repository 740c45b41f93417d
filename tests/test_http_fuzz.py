"""Schemathesis over the whole OpenAPI document: no server error, no answer that the document does not foretell."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from services import package
from serving import served

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance,negative_data_rejection,unsupported_method"


def fuzz(service, folder, *options):
    "Schemathesis on a service of noop jobs; waiting routes don't wait."
    package("schemathesis")
    key, _ = service.keys.create("ada", scopes=["admin"])
    with served(service) as address:
        program = Path(sys.executable).with_name("schemathesis")
        done = subprocess.run([str(program), "run", f"{address}/openapi.json", "--checks", CHECKS, "--no-color", "--seed", "7", "--generation-database", ":memory:", "--request-timeout", "10", "-H", f"Authorization: Bearer {key}", *options],
                              cwd=folder, capture_output=True, text=True, env={**os.environ, "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "h"), "SCHEMATHESIS_HOOKS": "fuzz_hooks", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])})
    return done


LIMITS = dict(serve_wait=0, serve_requests_per_minute=10_000_000, serve_queued=10_000_000, serve_queued_per_key=10_000_000)


@pytest.fixture(autouse=True)
def many_wrong_keys(monkeypatch):
    from vidgen.serve import auth

    monkeypatch.setattr(auth, "FAILURES", 10_000_000)


@pytest.mark.services
def test_a_short_walk_over_the_document(opened, tmp_path):
    service = opened(**LIMITS)
    done = fuzz(service, tmp_path, "--max-examples", "5", "--phases", "examples,coverage,fuzzing")
    service.jobs.close()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_five_minutes_over_the_document(opened, tmp_path):
    service = opened(**LIMITS)
    done = fuzz(service, tmp_path, "--max-examples", "100000", "--max-time", "300")
    service.jobs.close()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
