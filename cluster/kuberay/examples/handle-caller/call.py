"""A Ray job that asks the service on its own cluster for videos, by handle."""

import logging
import tempfile
import time
from pathlib import Path

import ray
from ray import serve

ray.init("auto", logging_level=logging.WARNING)
while (app := serve.status().applications.get("t2v")) is None or app.status != "RUNNING":  # it is being deployed
    time.sleep(2)
handle = serve.get_app_handle("t2v")
# With the job's id, its work stops when the job ends or is killed.
caller = ray.get_runtime_context().get_job_id()
prompts = ["A red circle moving right on a white background.", "A blue star spinning on a yellow background."]
answers = [handle.generate.remote(prompt, seed=7, num_inference_steps=10, caller=caller) for prompt in prompts]
for number, answer in enumerate(answers):
    path = Path(tempfile.gettempdir()) / f"video-{number}.mp4"
    answer.result().save(path)
    print(path)  # noqa: T201 (the job's log is where its output goes)
