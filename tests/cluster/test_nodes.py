"""Nodes are killed, drained and restarted under load, and no job is lost.

One cluster for all: a head without work, a node for what needs no GPU, and two of one "GPU" each. What a test takes
away, it gives back.
"""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from clustered import (
    LONG_S,
    Asking,
    CallingJob,
    Clustered,
    Storage,
    all_ended,
    asking,
    calling_job,
    clustered,
    following_job,
)
from four_nodes import GPU, HEAD, app_config, four_nodes
from running import PROMPT, psnr, wait_for

from cluster.ray_nodes import RayNode, RayNodes

pytestmark = pytest.mark.cluster

STEPS = 20  # about twenty seconds, with four of them on two cores


@pytest.fixture(scope="module")
def nodes(folder: Path) -> Iterator[RayNodes]:
    with four_nodes(folder) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def service(nodes: RayNodes, storage: Storage) -> Iterator[Clustered]:
    with clustered(nodes, app_config(storage), "EveryNode") as service:
        yield service


@pytest.fixture(scope="module")
def undisturbed(service: Clustered) -> Any:
    """The frames that the disturbed jobs must have as well."""
    video_id = service.create(num_inference_steps=STEPS)
    assert all_ended(service, [video_id]) == ["completed"]
    return service.frames(video_id)


@pytest.fixture(scope="module", autouse=True)
def caller(service: Clustered) -> Iterator[CallingJob]:
    """Another Ray job calls the handle while all this goes on."""
    with calling_job(service.nodes, service.nodes.nodes[1]) as caller:
        caller.await_more(1)
        yield caller


def test_each_gpu_has_a_denoiser_and_a_decoder_and_nothing_else_is_there(service: Clustered):
    _, cpus, *gpus = (node.ip for node in service.nodes.nodes)
    for deployment in ("Denoiser", "Decoder"):
        assert sorted(replica.ip or "" for replica in service.all_replicas(deployment)) == sorted(gpus)
    for deployment in ("Ingress", "Generator", "TextEncoder"):
        assert {replica.ip for replica in service.all_replicas(deployment)} == {cpus}


def test_every_node_takes_requests(service: Clustered):
    videos = [create_at(url, num_inference_steps=2) for url in worker_urls(service)]
    assert len(videos) == 3
    assert set(all_ended(service, videos)) == {"completed"}


def test_the_jobs_of_a_killed_node_go_on_elsewhere_to_the_same_videos(service, undisturbed, caller):
    videos = loaded(service)
    wait_for(lambda: service.job(videos[-1]).checkpoint_step >= 3, LONG_S)
    victim = node_denoising(service, videos[-1])
    began = time.monotonic()
    victim.kill()
    service.nodes.start_worker(*GPU)
    assert all_ended(service, videos) == ["completed"] * len(videos)
    note("killed node", began, service, videos)
    assert sum(service.job(video).resumes for video in videos) >= 1
    assert min(psnr(service.frames(video), undisturbed) for video in videos) >= 40
    caller.await_more(1)
    wait_for(lambda: len(service.all_replicas("Denoiser")) == 2, LONG_S)


def test_a_drained_node_hands_its_jobs_over_and_no_step_is_done_twice(service, undisturbed, caller):
    videos = loaded(service)
    service.at_step(videos[-1], 2, LONG_S)
    victim = node_denoising(service, videos[-1])
    began = time.monotonic()
    victim.terminate()
    service.nodes.start_worker(*GPU)
    assert all_ended(service, videos) == ["completed"] * len(videos)
    note("drained node", began, service, videos)
    moved = [video for video in videos if f"handed back: job={video}" in victim.logs()]
    assert moved
    jobs = [service.job(video) for video in videos]
    assert [(job.fence, job.resumes, job.steps_repeated) for job in jobs] == [(1, 0, 0)] * len(jobs)
    assert min(psnr(service.frames(video), undisturbed) for video in videos) >= 40
    caller.await_more(1)
    wait_for(lambda: len(service.all_replicas("Denoiser")) == 2, LONG_S)


def test_a_call_by_handle_moves_with_the_jobs_of_a_drained_node(service):
    jobs = loaded(service, 2)
    with following_job(service.nodes, service.nodes.nodes[1], STEPS) as call:
        wait_for(lambda: call.steps[-1:] >= [2], LONG_S)
        victim, name = node_and_name_of_call(service, STEPS)
        victim.terminate()
        service.nodes.start_worker(*GPU)
        wait_for(lambda: call.has_video, LONG_S)
        assert f"handed back: job={name}" in victim.logs()
        assert call.steps == sorted(set(call.steps))
        assert call.steps[-1] == STEPS
    assert all_ended(service, jobs) == ["completed"] * len(jobs)
    wait_for(lambda: len(service.all_replicas("Denoiser")) == 2, LONG_S)


def test_jobs_go_on_while_the_head_is_away_and_all_is_well_after_its_return(service, undisturbed, caller):
    videos = loaded(service)
    before = {replica.id for replica in service.all_replicas("Denoiser")}
    service.at_step(videos[0], 2, LONG_S)
    step = service.job(videos[0]).step
    began = time.monotonic()
    service.nodes.nodes[0].kill()  # with the GCS, Serve's controller and its own proxy
    meanwhile = [create_at(url, num_inference_steps=2) for url in worker_urls(service)]
    wait_for(lambda: service.job(videos[0]).step >= step + 4, LONG_S)
    head = service.nodes.start_head(*HEAD)
    service.nodes.nodes.insert(0, service.nodes.nodes.pop(service.nodes.nodes.index(head)))
    service.await_ready()
    note("head back", began, service, [])
    assert set(all_ended(service, videos + meanwhile)) == {"completed"}
    note("lost head", began, service, videos)
    assert {replica.id for replica in service.all_replicas("Denoiser")} == before
    assert [service.job(video).steps_repeated for video in videos] == [0] * len(videos)
    assert min(psnr(service.frames(video), undisturbed) for video in videos) >= 40
    caller.await_more(1)


def test_a_changed_file_is_deployed_under_load_without_a_failed_request(service, storage, caller):
    with asking(service) as notes:
        videos = loaded(service, 2)
        service.at_step(videos[0], 2, LONG_S)
        began = time.monotonic()
        changed = app_config(storage, ingress={"max_queued": 50}, denoiser={"preview_every_steps": 3})
        before = {r.id for name in ("Ingress", "Denoiser") for r in service.all_replicas(name)}
        service.deploy(changed)
        wait_for(
            lambda: replaced(service, before) and service.application()["status"] == "RUNNING", LONG_S, every_s=0.5
        )
        note("redeployed", began, service, [])
    check(notes)
    assert set(all_ended(service, videos + notes.created)) == {"completed"}
    assert len(service.completions()) == len(set(service.completions()))
    caller.await_more(1)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [{"model": "/no/such/model"}, {"denoiser": {"max_ongonig": 3}}])
def test_a_broken_file_is_refused_and_the_old_one_serves_on(service, storage, caller, broken):
    good = app_config(storage, ingress={"max_queued": 50}, denoiser={"preview_every_steps": 3})
    values = good.model_dump(mode="json", exclude_unset=True)
    began = time.monotonic()
    with asking(service) as notes:
        service.deploy({**values, **broken})
        wait_for(lambda: service.application()["status"] in ("DEPLOY_FAILED", "UNHEALTHY"), LONG_S, every_s=0.5)
        note("refused", began, service, [])
        assert set(all_ended(service, [service.create(num_inference_steps=4)])) == {"completed"}
        caller.await_more(1)
        service.deploy(good)
        service.await_ready()
        note("repaired", began, service, [])
    check(notes)
    assert set(all_ended(service, notes.created)) == {"completed"}


def loaded(service: Clustered, num_videos: int = 4) -> list[str]:
    """As many equal jobs as the denoisers take."""
    return [service.create(num_inference_steps=STEPS) for _ in range(num_videos)]


def worker_urls(service: Clustered) -> list[str]:
    """Of the proxies of all nodes that are there, but for the head's."""
    workers = [node for node in service.nodes.nodes[1:] if node.process.poll() is None]
    return [f"http://127.0.0.1:{node.http_port}" for node in workers]


def create_at(url: str, **settings: Any) -> str:
    response = httpx2.post(f"{url}/v1/videos", json={"prompt": PROMPT, **settings}, timeout=30)
    response.raise_for_status()
    return str(response.json()["id"])


def node_denoising(service: Clustered, video: str) -> RayNode:
    nodes = [service.node_of(replica) for replica in service.all_replicas("Denoiser")]
    (node,) = [node for node in nodes if f"denoising: job={video} " in node.logs()]
    return node


def node_and_name_of_call(service: Clustered, num_steps: int) -> tuple[RayNode, str]:
    """Where the only call by handle of so many steps was taken in, and what it is called there."""
    taken_in = re.compile(rf"denoising: job=(call .+?) fence=1 step=0 num_steps={num_steps}\b")
    nodes = [service.node_of(replica) for replica in service.all_replicas("Denoiser")]
    ((node, name),) = [(node, name) for node in nodes for name in taken_in.findall(node.logs())]
    return node, name


def replaced(service: Clustered, before: set[str]) -> bool:
    now = {r.id for name in ("Ingress", "Denoiser") for r in service.all_replicas(name)}
    return len(now) == 4 and not now & before and service.application()["status"] == "RUNNING"


def check(notes: Asking) -> None:
    assert not notes.failures
    assert notes.num_asked >= 20
    assert notes.created


def note(what: str, began: float, service: Clustered, videos: list[str]) -> None:
    """For the guide, with pytest -s."""
    jobs = [service.job(video) for video in videos]
    repeated, resumes = sum(job.steps_repeated for job in jobs), sum(job.resumes for job in jobs)
    seconds = time.monotonic() - began
    print(f"\n{what}: {seconds:.1f} s, {len(jobs)} jobs, {resumes} resumed, {repeated} steps repeated")  # noqa: T201
