"""Random kills under load: every accepted job ends, none twice, and no file is left that no job names.

    make chaos

starts the service on Ray processes of its own and kills 200 of its parts, one after the other.
"""

import argparse
import asyncio
import logging
import random
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2
import ray
from running import ENDED, PROMPT, Running, config, ray_started, running, wait_for

from serve_app.artifacts import ArtifactStore
from serve_app.jobs import Job, JobStore
from serve_app.sweeper import sweep

logger = logging.getLogger(__name__)

PARTS = ("Denoiser", "Denoiser", "Generator", "Decoder", "TextEncoder", "Ingress", "controller")
_NUM_LIVE = 4  # jobs at a time
_STEPS = 10


@dataclass
class Report:
    """What was killed, and what became of the jobs."""

    kills: Counter[str] = field(default_factory=Counter)
    jobs: list[Job] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    orphans: set[str] = field(default_factory=set)
    seconds: float = 0.0

    def check(self) -> None:
        """Raises AssertionError for a broken promise."""
        assert all(job.status in ENDED for job in self.jobs)
        assert all(job.error_message for job in self.jobs if job.status == "failed")
        assert len(self.completions) == len(set(self.completions))
        assert set(self.completions) == {job.id for job in self.jobs if job.status == "completed"}
        assert not self.orphans

    def __str__(self) -> str:
        by_status = Counter(job.status for job in self.jobs)
        return (
            f"{self.kills.total()} kills {dict(self.kills)} in {self.seconds:.0f} s: {len(self.jobs)} jobs "
            f"{dict(by_status)}, {sum(job.resumes for job in self.jobs)} resumed, "
            f"{sum(job.steps_repeated for job in self.jobs)} steps repeated, {len(self.orphans)} orphans"
        )


def chaos(service: Running, *, kills: int, seed: int, pause_s: tuple[float, float] = (1.0, 4.0)) -> Report:
    """Kill parts at random while jobs come in, then wait until every job has ended."""
    draw, report, began = random.Random(seed), Report(), time.monotonic()
    accepted: list[str] = []
    for _ in range(kills):
        fill_up(service, accepted)
        time.sleep(draw.uniform(*pause_s))
        part = draw.choice(PARTS)
        if _kill(service, part, draw):
            report.kills[part] += 1
            logger.info("killed: part=%s kills=%d jobs=%d", part, report.kills.total(), len(accepted))
    finish(service, accepted, report)
    report.seconds = time.monotonic() - began
    return report


def finish(service: Running, accepted: list[str], report: Report) -> None:
    """Wait until all have ended, and note what became of them."""
    for video_id in accepted:
        service.ended(video_id, within_s=300)
    report.jobs = [service.job(video_id) for video_id in accepted]
    report.completions = service.completions()
    report.orphans = asyncio.run(_orphans(service, report.jobs))


def fill_up(service: Running, accepted: list[str]) -> None:
    """Create as many jobs as there should be at a time, whatever is killed meanwhile."""
    live = [v for v in accepted[-2 * _NUM_LIVE :] if wait_for(lambda v=v: service.video(v)["status"]) not in ENDED]
    for _ in range(_NUM_LIVE - len(live)):
        key = uuid.uuid4().hex  # what came of a call whose answer was lost, the next one says
        accepted.append(wait_for(lambda key=key: _create(service, key, len(accepted))))


def _create(service: Running, key: str, seed: int) -> str:
    body = {"prompt": PROMPT, "seed": seed, "num_inference_steps": _STEPS}
    response = service.client.post("/v1/videos", json=body, headers={"idempotency-key": key})
    if response.status_code >= 500:
        raise httpx2.HTTPError(response.text)
    return str(response.json()["id"])


def _kill(service: Running, part: str, draw: random.Random) -> bool:
    try:
        if part == "controller":
            ray.kill(ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve"), no_restart=False)
            return True
        names = service.replicas(part)
        if not names:  # the last one killed is not replaced yet
            return False
        ray.kill(ray.get_actor(draw.choice(names), namespace="serve"))
    except ValueError:
        return False
    return True


async def _orphans(service: Running, jobs: list[Job]) -> set[str]:
    """Files that are left though no job names them, once the sweeper has been."""
    storage = service.config.storage
    store = await JobStore.open(storage.database)
    await sweep(store, ArtifactStore(storage.artifacts, storage.artifact_options), min_age_s=0.0)
    await store.close()
    folders = {f"{job.id}/{job.fence}" for job in jobs if job.artifacts}
    return {path for path in service.files() if str(Path(path).parent) not in folders}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for noisy in ("httpx2", "ray", "ray.serve"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with TemporaryDirectory() as folder, ray_started(), running(config(Path(folder))) as service:
        report = chaos(service, kills=arguments.kills, seed=arguments.seed)
    logger.info("%s", report)
    report.check()


if __name__ == "__main__":
    main()
