"""What is watched: metrics, alert rules, the dashboard, logs."""
import datetime
import json
import logging
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from serving import PROMPT, client, finish, opened, take

from vidgen.serve import health

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"


@pytest.fixture
def service(tmp_path):
    made = opened(tmp_path)
    yield made
    made.jobs.close()


def metric_names(text):
    return set(re.findall(r"^(vidgen_\w+?)(?:\{| )", text, re.M))


def test_metrics_count_what_the_table_says(service):
    http = client(service)
    for _ in range(3):
        http.post("/v1/jobs", json={"spec": {"prompt": PROMPT}, "priority": 5})
    finish(service)
    take(service).fail({"code": "x", "message": "y"}, retry=False)
    text = http.get("/metrics").text
    for line in ('vidgen_jobs{kind="generate",state="succeeded"} 1.0', 'vidgen_jobs{kind="generate",state="failed"} 1.0', 'vidgen_queue_depth{priority="high"} 1.0', "vidgen_queue_wait_seconds_count 2.0"):
        assert line in text, line
    assert 'route="/v1/jobs"' in text and not re.search(r"job_[0-9a-v]{26}", text) and PROMPT not in text


def test_labels_are_bounded(service):
    http = client(service)
    for path in ("/nothing/1", "/nothing/2", "/v1/jobs/job_a", "/v1/jobs/job_b"):
        http.get(path)
    http.request("BREW", "/v1/jobs")
    routes = set(re.findall(r'route="([^"]*)"', http.get("/metrics").text))
    assert not {r for r in routes if re.search(r"/nothing|job_[ab]", r)} and "other" in routes
    assert "BREW" not in http.get("/metrics").text


def used(expressions):
    return {n.removesuffix("_bucket") for e in expressions for n in re.findall(r"vidgen_\w+", e)}


def test_rules_and_dashboard_speak_of_metrics_that_exist(service):
    import yaml

    http = client(service)
    http.get("/v1/jobs")
    with health.streaming("sse"):
        there = {n.removesuffix("_bucket") for n in metric_names(http.get("/metrics").text)}
    rules = [r for g in yaml.safe_load((DEPLOY / "prometheus/vidgen.rules.yml").read_text())["groups"] for r in g["rules"]]
    board = json.loads((DEPLOY / "grafana/vidgen.json").read_text())
    empty = {"vidgen_jobs"}  # no job yet, no series
    assert not used(r["expr"] for r in rules) - there - empty
    assert not used(t["expr"] for p in board["panels"] for t in p["targets"]) - there - empty
    assert all(r["annotations"]["do"] and r["labels"]["severity"] for r in rules) and len({p["id"] for p in board["panels"]}) == len(board["panels"])


@pytest.mark.services
def test_promtool_agrees_with_the_rules(service, tmp_path):
    assert shutil.which("promtool"), "promtool is missing: make services"
    for command in (["check", "rules", "vidgen.rules.yml"], ["check", "config", "prometheus.yml"], ["test", "rules", "vidgen.rules.test.yml"]):
        done = subprocess.run(["promtool", *command], cwd=DEPLOY / "prometheus", capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(["promtool", "check", "metrics"], input=client(service).get("/metrics").text, capture_output=True, text=True)
    assert done.returncode == 0 or not [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("vidgen_") and "counter" not in line and "_total" not in line], done.stderr


def test_ready_goes_red_and_back(service, monkeypatch):
    http = client(service)
    assert http.get("/health/ready").status_code == 200
    counts = service.jobs.counts
    monkeypatch.setattr(service.jobs, "counts", lambda: 1 / 0)
    red = http.get("/health/ready")
    assert red.status_code == 503 and "database" in red.json()["checks"] and http.get("/health/live").status_code == 200
    monkeypatch.setattr(service.jobs, "counts", counts)
    assert http.get("/health/ready").status_code == 200


def test_a_full_disk_is_not_ready_and_refuses(tmp_path):
    service = opened(tmp_path, storage_least_free_gib=10**9)
    http = client(service)
    assert http.get("/health/ready").status_code == 503 and "GiB are free" in http.get("/health/ready").json()["checks"]["disk"]
    refused = http.post("/v1/jobs", json={"spec": {"prompt": PROMPT}})
    assert refused.status_code == 507 and refused.json()["code"] == "storage_full" and service.jobs.list() == []
    service.jobs.close()


@pytest.fixture
def logs(tmp_path):
    handlers = health.log_to(tmp_path / "logs", "api-0")
    yield tmp_path / "logs"
    for handler in handlers:
        handler.close()
    for name in ("vidgen", "vidgen.access"):
        logging.getLogger(name).handlers, logging.getLogger(name).propagate = [], True


def test_logs_are_json_with_the_ids_of_request_and_job(service, logs):
    http = client(service)
    job = http.post("/v1/jobs", json={"spec": {"prompt": PROMPT}}, headers={"X-Request-ID": "req-1"}).json()["id"]
    http.get(f"/v1/jobs/{job}", params={"ticket": "secret"}, headers={"X-Request-ID": "req-2"})
    lines = [json.loads(line) for line in (logs / "api-0.access.log").read_text().splitlines()]
    assert [(r["request_id"], r["status"]) for r in lines] == [("req-1", 202), ("req-2", 200)] and lines[1]["job_id"] == job
    assert all({"ts", "level", "logger", "message", "ms", "path", "method"} <= set(r) for r in lines)
    assert "secret" not in (logs / "api-0.access.log").read_text() and PROMPT not in (logs / "api-0.access.log").read_text()


def test_each_log_is_kept_as_long_as_promised(logs):
    assert health.KEPT_DAYS == {"service": 30, "errors": 90, "access": 14}
    handler = next(h for h in logging.getLogger("vidgen.access").handlers)
    day = datetime.date(2026, 1, 1)
    for n in range(20):
        (logs / f"api-0.access.log.{day + datetime.timedelta(n)}").write_text("old\n")
    logging.getLogger("vidgen.access").info("x")
    handler.rolloverAt = 0
    logging.getLogger("vidgen.access").info("y")
    kept = sorted(p.name for p in logs.glob("api-0.access.log.*"))
    assert len(kept) == 14 and f"api-0.access.log.{day}" not in kept
    assert "y" in (logs / "api-0.access.log").read_text()


def test_errors_have_a_file_of_their_own(service, logs, monkeypatch):
    monkeypatch.setattr(service.jobs, "list", lambda *a, **k: 1 / 0)
    client(service).get("/v1/jobs", headers={"X-Request-ID": "req-9"})
    row = json.loads((logs / "api-0.errors.log").read_text())
    assert row["request_id"] == "req-9" and "ZeroDivisionError" in row["error"]
