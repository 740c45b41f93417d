"""What is watched: metrics, alert rules, the dashboard, logs."""
import datetime
import json
import logging
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
from serving import PROMPT, client, finish, opened, record, served, take

from vidgen.serve import health, measures

httpx = pytest.importorskip("httpx")

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"


@pytest.fixture
def service(tmp_path):
    made = opened(tmp_path)
    yield made
    made.jobs.close()


NAMES = r"(?:vidgen|pipeline|gpu|storage|active)_\w+"  # vidgen's own, and those S12 names


def metric_names(text):
    return set(re.findall(rf"^({NAMES})(?:\{{| )", text, re.M))


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


def test_stages_models_and_lost_leases_are_measured(service):
    "By a worker of this process; in a service by the files all its processes share."
    from test_worker import settings

    from vidgen.serve.pool import Pool
    from vidgen.serve.worker import Worker

    def value(name):
        return float(re.search(rf"^{re.escape(name)} (\S+)$", client(service).get("/metrics").text, re.M)[1])

    before = value("vidgen_lease_lost_total"), value("vidgen_model_load_seconds_count")
    service.jobs.submit("three", {"n": 1})
    pool = Pool(lambda name: __import__("test_worker").Toy(1))
    Worker(service.jobs, settings(str(service.jobs.db.url), service.jobs.root, name="w"), pool).once()
    pool.get("toy")
    pool.get("toy")
    service.jobs.submit("noop", {})
    service.jobs.claim("dead")
    from vidgen.serve import lapse

    lapse.gone(service.jobs, "dead")
    assert value('vidgen_stage_seconds_count{stage="s2"}') >= 1 and value('vidgen_stage_seconds_sum{stage="s2"}') > 0
    assert (value("vidgen_lease_lost_total"), value("vidgen_model_load_seconds_count")) == (before[0] + 1, before[1] + 1)


def test_a_stage_that_fails_is_not_counted_as_done():
    with pytest.raises(ZeroDivisionError), measures.stage("breaks"):
        1 / 0
    assert 'stage="breaks"' not in __import__("prometheus_client").generate_latest(measures.counted()).decode()


def test_the_memory_of_gpus_is_told_as_it_is_kept_account_of(service):
    assert "vidgen_gpu_mem_bytes{" not in client(service).get("/metrics").text, "a CPU is no GPU"
    with service.jobs.writing() as ledger:
        ledger.run(ledger.t.device.insert().values(name="host/cuda:0", total_mib=100, seen=ledger.now))
        ledger.run(ledger.t.worker.insert().values(id="w", host="h", pid=1, device="host/cuda:0", heartbeat=ledger.now, resident_mib=30, warm=[], state="idle"))
    service.jobs.submit("noop", {}, memory_mib=20)
    service.jobs.claim("w", slot="host/cuda:0")
    text = client(service).get("/metrics").text
    found = {kind: float(v) / 2**20 for kind, v in re.findall(r'^vidgen_gpu_mem_bytes{gpu="host/cuda:0",kind="(\w+)"} (\S+)$', text, re.M)}
    assert found == {"total": 100, "reserved": 20, "resident": 30}


def a_card(folder, monkeypatch, said):
    "An nvidia-smi in front of all others, which says this."
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin/nvidia-smi").write_text(f"#!/bin/sh\nprintf '{said}'\n")
    (folder / "bin/nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{__import__('os').environ['PATH']}")


def test_the_metrics_that_dashboards_of_pipelines_expect(service, tmp_path, monkeypatch):
    "S12 by name, of what clients asked for: a score is none of it."
    from test_worker import settings

    from vidgen.serve import requests
    from vidgen.serve.pool import Pool
    from vidgen.serve.worker import Worker

    http = client(service)
    value = lambda name: [float(v) for v in re.findall(rf"^{re.escape(name)} (\S+)$", http.get("/metrics").text, re.M)]  # noqa: E731
    assert value("active_pipelines_count") == [0] and value("storage_used_bytes") == [0]
    assert not re.search("^(pipeline_success_rate|gpu_utilization_percent)", http.get("/metrics").text, re.M), "nothing ended and no card: nothing is told, and not 0"
    timed = lambda kind: [sum(value(f'pipeline_execution_time_seconds_{part}{{kind="{kind}"}}')) for part in ("count", "sum")]  # noqa: E731
    before = timed("three"), timed("noop")
    worker = Worker(service.jobs, settings(str(service.jobs.db.url), service.jobs.root, name="w"), Pool(None))
    for n in range(3):
        service.jobs.submit("three", {"n": n})
        worker.once()
    with service.jobs.writing() as ledger:
        requests.follow(ledger, service.jobs.list()[0].id, "noop")
    worker.once()
    assert value('vidgen_jobs{kind="noop",state="succeeded"}') == [1]
    assert timed("three")[0] == before[0][0] + 3 and timed("three")[1] > before[0][1] and timed("noop") == before[1]
    service.jobs.submit("noop", {})
    take(service).fail({"code": "x", "message": "y"}, retry=False)
    service.jobs.submit("noop", {})
    take(service)
    assert value("pipeline_success_rate") == [0.75] and value("active_pipelines_count") == [1]
    assert value("storage_used_bytes") == [service.jobs.statistics()["total_bytes"]] != [0]
    with service.jobs.writing() as ledger:
        ledger.run(ledger.t.job.update().where(ledger.t.job.c.state == "failed").values(finished_at=ledger.now - 2000))
    assert value("pipeline_success_rate") == [1.0], "a failure of long ago"
    a_card(tmp_path, monkeypatch, r"0, 37\n1, 92\n2, [N/A]\n")
    assert value('gpu_utilization_percent{gpu="0"}') == [37] and value('gpu_utilization_percent{gpu="1"}') == [92] and not value('gpu_utilization_percent{gpu="2"}')
    assert http.get("/health").json()["gpu_usage"] == 92


@pytest.mark.parametrize("view", ["", "form"])
def test_health_counts_what_clients_asked_for_and_names_the_device(service, view):
    from vidgen.serve import requests

    http = client(service)
    assert http.get("/health").json()["device"] == "none"
    job = service.jobs.submit("noop", {}, view=view)
    finish(service)
    with service.jobs.writing() as ledger:
        for kind in ("score", "noop", "three"):
            requests.follow(ledger, job.id, kind)
        for name in ("host/cuda:0", "host/cuda:1", "other/cuda:0"):
            ledger.run(ledger.t.device.insert().values(name=name, total_mib=100, seen=ledger.now))
        ledger.run(ledger.t.device.insert().values(name="gone/cpu", total_mib=100, seen=ledger.now - 100))
    finish(service)
    take(service).fail({"code": "x", "message": "y"}, retry=False)
    take(service)
    found = http.get("/health").json()
    assert (found["completed_jobs"], found["failed_jobs"], found["active_jobs"], found["queue_depth"]) == (1, 0, 0, 0)
    told = http.get("/metrics").text
    assert "active_pipelines_count 0.0" in told and "pipeline_success_rate 1.0" in told
    assert found["device"] == "cuda:0, cuda:1"


def used(expressions):
    return {re.sub("_(bucket|sum)$|(?<=seconds)_count$", "", n) for e in expressions for n in re.findall(rf"\b{NAMES}", e)}


def test_rules_and_dashboard_speak_of_metrics_that_exist(service):
    import yaml

    http = client(service)
    http.get("/v1/jobs")
    with health.streaming("sse"):
        there = {n.removesuffix("_bucket") for n in metric_names(http.get("/metrics").text)}
    rules = [r for g in yaml.safe_load((DEPLOY / "prometheus/vidgen.rules.yml").read_text())["groups"] for r in g["rules"]]
    board = json.loads((DEPLOY / "grafana/vidgen.json").read_text())
    empty = {"vidgen_jobs", "vidgen_stage_seconds", "vidgen_gpu_mem_bytes", "pipeline_execution_time_seconds", "pipeline_success_rate", "gpu_utilization_percent"}  # no job yet, no GPU, no series
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


def locked(service):
    "A connection of somebody else's that holds the lock of a SQLite file."
    from vidgen.serve.tables import engine

    conn = engine(str(service.jobs.db.url)).connect()
    conn.exec_driver_sql("UPDATE about SET value = value")
    return conn


def test_ready_goes_red_and_back(service):
    "Somebody holds the lock: no job can be accepted, and that is said within seconds; reading goes on."
    http = client(service)
    assert http.get("/health/ready").status_code == 200
    other = locked(service)
    time.sleep(1.1)
    red = http.get("/health/ready")
    assert red.status_code == 503 and red.json()["checks"] == {"database": "takes nothing (busy)", "disk": "ok"} and http.get("/health/live").status_code == 200
    assert http.get("/v1/jobs").status_code == 200
    other.rollback()
    time.sleep(1.1)
    assert http.get("/health/ready").status_code == 200 and http.post("/v1/jobs", json={"spec": {"prompt": PROMPT}}).status_code == 202
    other.close()


def test_who_reads_with_a_key_waits_for_no_writer(service):
    "Looking a key up, and noting that it was used, must not queue for the lock."
    key, _ = service.keys.create("ada")
    service.jobs.submit("noop", {}, owner="ada")
    other = locked(service)
    start = time.monotonic()
    answer = client(service).get("/v1/jobs", headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200 and len(answer.json()["data"]) == 1 and time.monotonic() - start < 15  # the lock is waited for 30 s
    other.close()


def test_readiness_costs_one_commit_a_second_however_often_it_is_asked(service, monkeypatch):
    asked, real = [], service.jobs.probe
    monkeypatch.setattr(service.jobs, "probe", lambda: asked.append(1) or real())
    http = client(service)
    start = time.monotonic()
    for _ in range(30):
        assert http.get("/health/ready").status_code == 200
    assert len(asked) <= 1 + time.monotonic() - start


def held_up(service, seconds, submits):
    "R7: submissions come while somebody holds the lock for so long; returns what they were answered."
    answers, job = [], service.jobs.submit("noop", {})
    with served(service) as address:
        ask = lambda: answers.append(httpx.post(f"{address}/v1/jobs", json={"kind": "noop", "spec": {}}, timeout=60).status_code)
        other = locked(service)
        asking = [threading.Thread(target=ask) for _ in range(submits)]
        for one in asking:
            one.start()
        until, red, read = time.monotonic() + seconds, 0, 0
        while time.monotonic() < until:
            red += httpx.get(f"{address}/health/ready", timeout=20).status_code == 503
            read += all(httpx.get(f"{address}/v1/jobs/{job.id}{part}", timeout=10).status_code == 200 for part in ("", "/events", "/artifacts"))
            time.sleep(0.2)
        assert not answers and red and read, "nothing is promised that isn't on the disk, and who only reads is not kept waiting"
        other.rollback()
        other.close()
        for one in asking:
            one.join()
        time.sleep(1.1)
        assert httpx.get(f"{address}/health/ready").status_code == 200
    return answers


def test_a_lock_that_is_held_keeps_nobody_from_reading(tmp_path):
    service = opened(tmp_path)
    assert held_up(service, 3, 20) == [202] * 20 and service.jobs.counts()["states"]["queued"] == 21
    service.jobs.close()


@pytest.mark.slow
def test_a_lock_that_is_held_for_twenty_seconds(tmp_path):
    service = opened(tmp_path)
    assert held_up(service, 20, 40) == [202] * 40 and service.jobs.counts()["states"]["queued"] == 41
    record("R7 lock", seconds=20, submits=40, lost=0)
    service.jobs.close()


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
