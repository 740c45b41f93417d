"""People at the service: each asks for a clip, waits for it, watches it, and asks again.

    vidgen serve
    locust -f experiments/041_load/locustfile.py --host http://127.0.0.1:8000

opens a page at http://localhost:8089 where the number of people is set; `--headless --users 8 --spawn-rate 8 --run-time 5m` needs no page.
"""
import os
import random
from pathlib import Path

from locust import HttpUser, constant, events, task

PROMPTS = (Path(__file__).parent / "prompts.txt").read_text().splitlines()


@events.init_command_line_parser.add_listener
def options(parser):
    "What these people ask for."
    parser.add_argument("--model", default="shapes-t2v", help="a name of GET /v1/models")
    parser.add_argument("--steps", type=int, default=0, help="denoising steps; 0 = the model's own")
    parser.add_argument("--score", default="", help="anything: have every clip's temporal stability measured, after it is there")


class Person(HttpUser):
    "Asks again as soon as the clip has been watched. With a key of `vidgen keys create` in VIDGEN_KEY."
    wait_time = constant(0)

    def on_start(self):
        "Say who it is."
        if key := os.environ.get("VIDGEN_KEY"):
            self.client.headers["Authorization"] = f"Bearer {key}"

    @task
    def clip(self):
        "A clip that does not succeed is a failure."
        asked = self.environment.parsed_options
        spec = {"prompt": random.choice(PROMPTS), "model": asked.model, "seed": random.randrange(1000)}
        spec |= ({"num_inference_steps": asked.steps} if asked.steps else {}) | ({"score": True} if asked.score else {})
        with self.client.post("/v1/jobs", json={"spec": spec}, headers={"Prefer": "wait=300"}, name="ask for a clip and wait", catch_response=True) as said:
            job = said.json() if said.status_code == 202 else {}
            if job.get("state") != "succeeded":
                said.failure(f"{said.status_code} {job.get('state', said.text[:200])}")
                return
        self.client.get(job["links"]["video"], name="watch it")
