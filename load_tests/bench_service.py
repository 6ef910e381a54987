r"""What the service costs beside the engine: the same videos by the engine in this process, and through HTTP.

    t2v serve --model demo &
    python load_tests/bench_service.py http://127.0.0.1:8000 --model demo --num-jobs 12

All jobs are there at the start, so that both are saturated. Alone, the engine holds as many videos at a time as a
Denoiser does (--max-ongoing), and each is decoded when its steps are done, and encoded, with thumbnail and sheet, in
threads beside the next steps. The two take turns, --rounds times; the figures are medians. Then videos come one by one,
each when the last is made: seconds from request to stored mp4, seen by polling every 10 ms. No prompt comes twice,
since the service keeps what it made of those that it has seen.

    python load_tests/bench_service.py http://127.0.0.1:8000 --http-only --num-jobs 32 --num-singles 0

measures no engine, but how many videos a second come through HTTP: of one replica, and of several. --results adds a
line of JSON to a file.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx2

from t2v_core.engine import Engine, Failed, Finished, Profile, Request, RowBudgets, free_memory_bytes, measure
from t2v_core.pictures import encode_spritesheet, encode_thumbnail
from t2v_core.pipeline import Pipeline, load
from t2v_core.video import Video

_SINGLE_POLL_S = 0.01
_PROMPT = "A red circle moving right on a white background."
_TAKES = itertools.count(1)


def main() -> None:
    arguments = _parser().parse_args()
    settings = {} if arguments.steps is None else {"num_inference_steps": arguments.steps}
    with httpx2.Client(base_url=arguments.url, timeout=60) as client:
        for num_jobs in (1, arguments.num_jobs):  # not timed cold
            _through_http(client, num_jobs, settings)
        alone = None if arguments.http_only else Alone(arguments.model, arguments.max_ongoing, settings)
        if alone is not None:
            alone.seconds(arguments.num_jobs)
        served_s, alone_s = [], []
        for _ in range(arguments.rounds):
            served_s.append(_through_http(client, arguments.num_jobs, settings))
            if alone is not None:
                alone_s.append(alone.seconds(arguments.num_jobs))
        single_settings = {"num_inference_steps": arguments.single_steps}
        single_s = [_through_http(client, 1, single_settings, _SINGLE_POLL_S) for _ in range(arguments.num_singles)]
    measured = Measured(arguments.name, arguments.num_jobs, served_s, alone_s, arguments.single_steps, single_s)
    sys.stdout.write(measured.report())
    if arguments.results is not None:
        with arguments.results.open("a") as results:
            results.write(json.dumps(asdict(measured)) + "\n")


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds: of all videos at once, through HTTP and by the engine alone, and of single ones."""

    name: str
    num_jobs: int
    served_s: list[float]
    alone_s: list[float]
    single_steps: int
    single_s: list[float]

    def report(self) -> str:
        """A few lines."""
        served_s = statistics.median(self.served_s)
        rate = self.num_jobs / served_s
        lines = [f"{self.name}: {self.num_jobs} videos through HTTP: {served_s:.2f} s, {rate:.3f} a second"]
        if self.alone_s:
            alone_s = statistics.median(self.alone_s)
            lines.append(f"the engine alone: {alone_s:.2f} s; HTTP has {alone_s / served_s:.1%} of its throughput")
        if self.single_s:
            single_s = statistics.median(self.single_s)
            lines.append(
                f"one video of {self.single_steps} steps: {single_s:.2f} s from request to stored mp4 "
                f"(least {min(self.single_s):.2f})"
            )
        return "\n".join(lines) + "\n"


class Alone:
    """An engine in this process, on the same GPU."""

    def __init__(self, model: str, max_ongoing: int, settings: Mapping[str, int]) -> None:
        self._pipeline, self._max_ongoing, self._settings = load(model), max_ongoing, settings
        self._budgets = _budgets(self._pipeline, max_ongoing)

    def seconds(self, num_jobs: int) -> float:
        """For so many videos, encoded and all."""
        engine = Engine(self._pipeline.unet, self._budgets)
        params = {
            str(seed): self._pipeline.params(_new_prompt(), seed=seed, **self._settings) for seed in range(num_jobs)
        }
        waiting = list(params)
        began = time.perf_counter()
        encoded: list[Future[None]] = []
        with ThreadPoolExecutor(2) as encoding:
            while waiting or len(engine):
                while waiting and len(engine) < self._max_ongoing:
                    name = waiting.pop(0)
                    engine.add(Request(name, self._pipeline.prepare(params[name])))
                time.sleep(engine.pause_s())
                for event in engine.advance():
                    if isinstance(event, Failed):
                        raise event.error  # then the time would be of fewer videos
                    if isinstance(event, Finished):
                        frames = self._pipeline.decode(event.trajectory.latents)
                        encoded.append(encoding.submit(_encode, Video(frames, params[event.id], self._pipeline.name)))
        for video in encoded:
            video.result()
        return time.perf_counter() - began


def _budgets(pipeline: Pipeline, max_ongoing: int) -> RowBudgets:
    if pipeline.device.type == "cpu":
        return RowBudgets(unmeasured_rows=2 * max_ongoing)
    shape = pipeline.params(_PROMPT).shape.latents()
    profile: Profile = measure(pipeline.unet, [shape])
    return RowBudgets(profile, free_bytes=free_memory_bytes(pipeline.device))


def _encode(video: Video) -> None:
    """All that the service stores of a video."""
    video.encode()
    encode_thumbnail(video.frames)
    encode_spritesheet(video.frames)


def _through_http(client: httpx2.Client, num_jobs: int, settings: Mapping[str, int], poll_s: float = 0.25) -> float:
    """Seconds from the first request until the last video is made."""
    began = time.perf_counter()
    waiting = []
    for seed in range(num_jobs):
        answer = client.post("/v1/videos", json={"prompt": _new_prompt(), "seed": seed, **settings})
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


def _new_prompt() -> str:
    return f"{_PROMPT} Take {next(_TAKES)}."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url", help="of a service that nobody else uses")
    parser.add_argument("--model", default="demo", help="that the service serves")
    parser.add_argument("--num-jobs", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-ongoing", type=int, default=2, help="videos at a time, as the service's denoiser has it")
    parser.add_argument("--steps", type=int, help="by default the model's own")
    parser.add_argument("--num-singles", type=int, default=10, help="videos that come one by one")
    parser.add_argument("--single-steps", type=int, default=50, help="of these")
    parser.add_argument("--http-only", action="store_true", help="no engine of its own")
    parser.add_argument("--results", type=Path, help="a file that gets a line of JSON")
    parser.add_argument("--name", default="the service", help="in the results")
    return parser


if __name__ == "__main__":
    main()
