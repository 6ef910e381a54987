"""A Ray job that makes one video by the service's handle, and prints each step as it comes, then the video's size.

python following_job.py ADDRESS NODE_IP PROMPT NUM_STEPS
"""

import json
import sys

import ray
from ray import serve

from serve_app.calls import GeneratedVideo, Progress


def main() -> None:
    address, node_ip, prompt, num_steps = sys.argv[1:]
    ray.init(address, _node_ip_address=node_ip, logging_level="ERROR", log_to_driver=False)
    handle, caller = serve.get_app_handle("t2v"), ray.get_runtime_context().get_job_id()
    settings = {"seed": 1, "num_inference_steps": int(num_steps)}
    for event in handle.options(stream=True).generate_stream.remote(prompt, caller=caller, **settings):
        if isinstance(event, Progress):
            print(json.dumps({"step": event.step}), flush=True)  # noqa: T201
        elif isinstance(event, GeneratedVideo):
            print(json.dumps({"video_bytes": len(event.video)}), flush=True)  # noqa: T201


main()
