"""A service for tests: the real application, tables and files; a worker's side by hand."""
import contextlib
import json
import os
import socket
import threading
import time

import pytest

PROMPT = "a red circle moving right on a white background"
pytest.importorskip("fastapi")


def settings(folder, **values):
    "Settings of a service in a folder; values as serve_requests_per_minute=5."
    from vidgen.settings import Settings

    said = {"storage_least_free_gib": 0, "serve_logs": "", **values}
    sections = {}
    for name, value in said.items():
        section, _, key = name.partition("_")
        sections.setdefault(section, []).append(f"{key} = {str(value).lower() if isinstance(value, bool) else value}")
    (folder / "settings.ini").write_text("\n".join(line for s, lines in sections.items() for line in (f"[{s}]", *lines)) + "\n")
    return Settings.load(folder / "settings.ini")


def opened(folder, **values):
    "A Service in a folder."
    from vidgen.serve.service import Service

    return Service.open(settings(folder, **values))


def client(service, **headers):
    "A client of the application, called as localhost."
    from fastapi.testclient import TestClient

    from vidgen.serve.api import app

    return TestClient(app(service), base_url="http://localhost", headers=headers, raise_server_exceptions=False)


def take(service):
    "The next job, held as a worker holds it."
    return service.jobs.claim("worker-test")


def finish(service, data=b"frames of a film", **result):
    "Do the next job: one file, and a result."
    claim = take(service)
    (claim.staging / "video.mp4").write_bytes(data)
    said = {"video": "video.mp4", "frames": 17, "fps": 8, "duration": 2.125, "seed": 7, "model": claim.job.model, "seconds": 0.5, "peak_gib": {"host": 0.5}, "warnings": [], **result}
    return claim.publish([claim.staging / "video.mp4"], said)


@contextlib.contextmanager
def served(service, **config):
    "The application behind a real server on a free port; yields its address."
    import uvicorn

    from vidgen.serve.api import app

    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app(service), log_level="error", timeout_graceful_shutdown=1, **config))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        sock.close()


def record(test, **facts):
    "Say what a test of facts measured; with VIDGEN_TEST_RECORD=FILE it is kept there too, one line of JSON for each."
    line = json.dumps({"test": test, "on": time.strftime("%Y-%m-%d", time.gmtime()), **facts})
    print(line)
    if path := os.environ.get("VIDGEN_TEST_RECORD"):
        with open(path, "a") as file:
            file.write(line + "\n")
