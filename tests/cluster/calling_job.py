"""A Ray job that calls the service by its handle, one video after the other, and prints what came of each call.

python calling_job.py ADDRESS NODE_IP PROMPT
"""

import json
import sys
import time

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from t2v_core.errors import T2VError

_WITHIN_S = 120.0


def main() -> None:
    address, node_ip, prompt = sys.argv[1:]
    ray.init(address, _node_ip_address=node_ip, logging_level="ERROR", log_to_driver=False)
    handle, caller = serve.get_app_handle("t2v"), ray.get_runtime_context().get_job_id()
    seed = 0
    while True:
        began, error = time.monotonic(), None
        try:
            response = handle.generate.remote(prompt, caller=caller, seed=seed, num_inference_steps=3)
            video = response.result(timeout_s=_WITHIN_S)
            assert video.video[4:8] == b"ftyp"
        except (T2VError, RayError, RayServeException, TimeoutError) as raised:
            error = f"{type(raised).__name__}: {str(raised).strip().splitlines()[-1][:200]}"
        print(json.dumps({"seed": seed, "seconds": time.monotonic() - began, "error": error}), flush=True)  # noqa: T201
        seed += 1
        time.sleep(3.0)


main()
