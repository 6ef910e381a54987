r"""What the service costs beside the engine: the same videos by the engine in this process, and through HTTP.

    t2v serve --model demo &
    python load_tests/bench_service.py http://127.0.0.1:8000 --model demo --num-jobs 12

All jobs are there at the start, so that both are saturated. Alone, the engine holds as many videos at a time as a
Denoiser does (--max-ongoing), and each is decoded when its steps are done, and encoded, with thumbnail and sheet, in
threads beside the next steps. The two take turns, --rounds times; the figures are medians. Then videos come one by one,
each when the last is made: seconds from request to stored mp4, seen by polling every 10 ms.

    python load_tests/bench_service.py http://127.0.0.1:8000 --http-only --num-jobs 32

measures no engine, but how many videos a second come through HTTP: of one replica, and of several.
"""

import argparse
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2

from t2v_core.engine import Engine, Finished, Profile, Request, RowBudgets, free_memory_bytes, measure
from t2v_core.pictures import encode_spritesheet, encode_thumbnail
from t2v_core.pipeline import Pipeline, load
from t2v_core.video import Video

_SINGLE_VIDEOS = 10
_SINGLE_POLL_S = 0.01
PROMPT = "A red circle moving right on a white background."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url", help="of a service that nobody else uses")
    parser.add_argument("--model", default="demo", help="that the service serves")
    parser.add_argument("--num-jobs", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-ongoing", type=int, default=2, help="videos at a time, as the service's denoiser has it")
    parser.add_argument("--steps", type=int, help="by default the model's own")
    parser.add_argument("--single-steps", type=int, default=50, help="of the videos that come one by one")
    parser.add_argument("--http-only", action="store_true", help="only the throughput through HTTP")
    arguments = parser.parse_args()
    settings = {} if arguments.steps is None else {"num_inference_steps": arguments.steps}
    if arguments.http_only:
        with httpx2.Client(base_url=arguments.url, timeout=60) as client:
            _through_http(client, arguments.num_jobs, settings)
            seconds = [_through_http(client, arguments.num_jobs, settings) for _ in range(arguments.rounds)]
        rate = arguments.num_jobs / statistics.median(seconds)
        sys.stdout.write(f"{arguments.num_jobs} videos through HTTP: {rate:.3f} a second ({seconds})\n")
        return
    pipeline = load(arguments.model)
    budgets = _budgets(pipeline, arguments.max_ongoing)
    with httpx2.Client(base_url=arguments.url, timeout=60) as client:
        for num_jobs in (1, arguments.num_jobs):  # neither is timed cold
            _through_http(client, num_jobs, settings)
            _alone(pipeline, budgets, num_jobs, arguments.max_ongoing, settings)
        alone, served = [], []
        for _ in range(arguments.rounds):
            alone.append(_alone(pipeline, budgets, arguments.num_jobs, arguments.max_ongoing, settings))
            served.append(_through_http(client, arguments.num_jobs, settings))
            sys.stdout.write(f"alone {alone[-1]:.2f} s, through HTTP {served[-1]:.2f} s\n")
        alone_settings = {"num_inference_steps": arguments.single_steps}
        single = [_through_http(client, 1, alone_settings, _SINGLE_POLL_S) for _ in range(_SINGLE_VIDEOS)]
    ratio = statistics.median(alone) / statistics.median(served)
    sys.stdout.write(
        f"{arguments.num_jobs} videos: alone {statistics.median(alone):.2f} s, through HTTP "
        f"{statistics.median(served):.2f} s: {ratio:.1%} of the throughput\n"
    )
    sys.stdout.write(
        f"one video of {arguments.single_steps} steps: {statistics.median(single):.2f} s from request to stored mp4 "
        f"(least {min(single):.2f})\n"
    )


def _budgets(pipeline: Pipeline, max_ongoing: int) -> RowBudgets:
    if pipeline.device.type == "cpu":
        return RowBudgets(unmeasured_rows=2 * max_ongoing)
    shape = pipeline.params(PROMPT).shape.latents()
    profile: Profile = measure(pipeline.unet, [shape])
    return RowBudgets(profile, free_bytes=free_memory_bytes(pipeline.device))


def _alone(pipeline: Pipeline, budgets: RowBudgets, num_jobs: int, max_ongoing: int, settings: dict[str, int]) -> float:
    """Seconds for all videos by an engine of our own."""
    engine = Engine(pipeline.unet, budgets)
    params = {str(seed): pipeline.params(PROMPT, seed=seed, **settings) for seed in range(num_jobs)}
    waiting = list(params)
    began = time.perf_counter()
    with ThreadPoolExecutor(2) as encoding:
        while waiting or len(engine):
            while waiting and len(engine) < max_ongoing:
                name = waiting.pop(0)
                engine.add(Request(name, pipeline.prepare(params[name])))
            time.sleep(engine.pause_s())
            for event in engine.advance():
                if isinstance(event, Finished):
                    frames = pipeline.decode(event.trajectory.latents)
                    encoding.submit(_encode, Video(frames, params[event.id], pipeline.name))
    return time.perf_counter() - began


def _encode(video: Video) -> None:
    """All that the service stores of a video."""
    video.encode()
    encode_thumbnail(video.frames)
    encode_spritesheet(video.frames)


def _through_http(client: httpx2.Client, num_jobs: int, settings: dict[str, int], poll_s: float = 0.25) -> float:
    """Seconds from the first request until the last video is made."""
    began = time.perf_counter()
    waiting = []
    for seed in range(num_jobs):
        answer = client.post("/v1/videos", json={"prompt": PROMPT, "seed": seed, **settings})
        answer.raise_for_status()
        waiting.append(answer.json()["id"])
    while waiting:
        video = client.get(f"/v1/videos/{waiting[0]}").raise_for_status().json()
        if video["status"] == "completed":
            waiting.pop(0)
        elif video["status"] in ("failed", "cancelled"):
            raise SystemExit(f"{video['id']}: {video['status']}: {video['error']}")
        else:
            time.sleep(poll_s)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
