r"""What a key that floods the service costs another one: latencies of the other's videos, alone and beside the flood.

    t2v serve --config keys.yaml &        # with keys: {keys: "calm:...\nflood:..."}
    python load_tests/bench_fairness.py http://127.0.0.1:8000 --calm KEY --flood KEY --num-videos 20

The calm key asks for one video at a time, each when the last is there; the flooding one has --depth videos waiting all
the time. Latency is from the request to the state "completed", seen by polling every 20 ms.
"""

import argparse
import statistics
import sys
import time

import httpx2

PROMPT = "A red circle moving right on a white background."
_POLL_S = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url", help="of a service that nobody else uses")
    parser.add_argument("--calm", required=True, metavar="KEY")
    parser.add_argument("--flood", required=True, metavar="KEY")
    parser.add_argument("--num-videos", type=int, default=20, help="of the calm key, in each of both parts")
    parser.add_argument("--depth", type=int, default=20, help="videos that the flooding key has waiting")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    with _client(arguments.url, arguments.calm) as calm, _client(arguments.url, arguments.flood) as flood:
        _latency(calm, arguments.steps)  # not timed cold
        alone = [_latency(calm, arguments.steps) for _ in range(arguments.num_videos)]
        waiting: list[str] = []
        beside = []
        for _ in range(arguments.num_videos):
            waiting = _top_up(flood, waiting, arguments.depth, arguments.steps)
            beside.append(_latency(calm, arguments.steps))
        for video_id in waiting:
            flood.post(f"/v1/videos/{video_id}/cancel")
    for name, latencies in (("alone", alone), ("beside a flood", beside)):
        sys.stdout.write(
            f"{name}: median {statistics.median(latencies):.2f} s, p95 {_p95(latencies):.2f} s, of {len(latencies)}\n"
        )
    sys.stdout.write(f"p95 beside the flood is {_p95(beside) / _p95(alone):.2f} of alone\n")


def _client(url: str, key: str) -> httpx2.Client:
    return httpx2.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60)


def _create(client: httpx2.Client, steps: int) -> str:
    answer = client.post("/v1/videos", json={"prompt": PROMPT, "seed": 1, "num_inference_steps": steps})
    return str(answer.raise_for_status().json()["id"])


def _latency(client: httpx2.Client, steps: int) -> float:
    began = time.perf_counter()
    video_id = _create(client, steps)
    while (status := client.get(f"/v1/videos/{video_id}").raise_for_status().json()["status"]) != "completed":
        if status in ("failed", "cancelled"):
            raise SystemExit(f"{video_id}: {status}")
        time.sleep(_POLL_S)
    return time.perf_counter() - began


def _top_up(client: httpx2.Client, waiting: list[str], depth: int, steps: int) -> list[str]:
    live = [
        video_id
        for video_id in waiting
        if client.get(f"/v1/videos/{video_id}").json()["status"] in ("queued", "in_progress")
    ]
    return live + [_create(client, steps) for _ in range(depth - len(live))]


def _p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


if __name__ == "__main__":
    main()
