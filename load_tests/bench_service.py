r"""What the service costs beside the engine: the same videos by the engine in this process, and through HTTP.

    t2v serve --model demo &
    python load_tests/bench_service.py http://127.0.0.1:8000 --model demo --num-jobs 12

All jobs are there at the start, so that both are saturated. Alone, the engine holds as many videos at a time as a
Denoiser does (--max-ongoing), and each is decoded and encoded, with thumbnail and sheet, when its steps are done. The
two take turns, --rounds times; the figures are medians.
"""

import argparse
import statistics
import sys
import time

import httpx2

from t2v_core.engine import Engine, Finished, Profile, Request, RowBudgets, free_memory_bytes, measure
from t2v_core.pictures import encode_spritesheet, encode_thumbnail
from t2v_core.pipeline import Pipeline, load
from t2v_core.video import Video

PROMPT = "A red circle moving right on a white background."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url", help="of a service that nobody else uses")
    parser.add_argument("--model", default="demo", help="that the service serves")
    parser.add_argument("--num-jobs", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-ongoing", type=int, default=2, help="videos at a time, as the service's denoiser has it")
    arguments = parser.parse_args()
    pipeline = load(arguments.model)
    budgets = _budgets(pipeline, arguments.max_ongoing)
    with httpx2.Client(base_url=arguments.url, timeout=60) as client:
        _through_http(client, 1)  # neither is timed cold
        _alone(pipeline, budgets, 1, arguments.max_ongoing)
        alone, served = [], []
        for _ in range(arguments.rounds):
            alone.append(_alone(pipeline, budgets, arguments.num_jobs, arguments.max_ongoing))
            served.append(_through_http(client, arguments.num_jobs))
            sys.stdout.write(f"alone {alone[-1]:.2f} s, through HTTP {served[-1]:.2f} s\n")
    ratio = statistics.median(alone) / statistics.median(served)
    sys.stdout.write(
        f"{arguments.num_jobs} videos: alone {statistics.median(alone):.2f} s, through HTTP "
        f"{statistics.median(served):.2f} s: {ratio:.1%} of the throughput\n"
    )


def _budgets(pipeline: Pipeline, max_ongoing: int) -> RowBudgets:
    if pipeline.device.type == "cpu":
        return RowBudgets(unmeasured_rows=2 * max_ongoing)
    shape = pipeline.params(PROMPT).shape.latents()
    profile: Profile = measure(pipeline.unet, [shape])
    return RowBudgets(profile, free_bytes=free_memory_bytes(pipeline.device))


def _alone(pipeline: Pipeline, budgets: RowBudgets, num_jobs: int, max_ongoing: int) -> float:
    """Seconds for all videos by an engine of our own."""
    engine = Engine(pipeline.unet, budgets)
    params = {str(seed): pipeline.params(PROMPT, seed=seed) for seed in range(num_jobs)}
    waiting = list(params)
    began = time.perf_counter()
    while waiting or len(engine):
        while waiting and len(engine) < max_ongoing:
            name = waiting.pop(0)
            engine.add(Request(name, pipeline.prepare(params[name])))
        for event in engine.step():
            if isinstance(event, Finished):
                video = Video(pipeline.decode(event.trajectory.latents), params[event.id], pipeline.name)
                video.encode()
                encode_thumbnail(video.frames)
                encode_spritesheet(video.frames)
    return time.perf_counter() - began


def _through_http(client: httpx2.Client, num_jobs: int) -> float:
    """Seconds from the first request until the last video is made."""
    began = time.perf_counter()
    waiting = []
    for seed in range(num_jobs):
        answer = client.post("/v1/videos", json={"prompt": PROMPT, "seed": seed})
        answer.raise_for_status()
        waiting.append(answer.json()["id"])
    while waiting:
        video = client.get(f"/v1/videos/{waiting[0]}").raise_for_status().json()
        if video["status"] == "completed":
            waiting.pop(0)
        elif video["status"] in ("failed", "cancelled"):
            raise SystemExit(f"{video['id']}: {video['status']}: {video['error']}")
        else:
            time.sleep(0.1)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
