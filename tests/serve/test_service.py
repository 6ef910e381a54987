"""The service as a whole, on real Ray processes with the demo checkpoint, and what happens when parts of it die."""

import queue
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest
import ray
from ray import serve
from running import APP, PROMPT, Running, config, psnr, ray_started, running, wait_for
from standardwebhooks import Webhook

from serve_app.calls import GeneratedVideo, Progress
from serve_app.errors import QueueFull
from serve_app.webhooks import signing_secret
from t2v_core.demo.measuring import look_at
from t2v_core.errors import InvalidRequest
from t2v_core.video_input import read_video

pytestmark = pytest.mark.service

WEBHOOK_SECRET = "a secret of sixteen"
STEPS = 14  # about four seconds
MAX_CALLS = 3


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    webhooks = {"secret": WEBHOOK_SECRET, "allow_private": True}
    settings = config(tmp_path_factory.mktemp("service"), webhooks=webhooks, ingress={"max_calls": MAX_CALLS})
    with ray_started(), running(settings) as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(service: Running):
    """The frames that the killed jobs below must have as well."""
    video_id = service.create(num_inference_steps=STEPS)
    assert service.ended(video_id)["status"] == "completed"
    return service.frames(video_id)


def test_a_prompt_becomes_a_video_of_what_it_says(service: Running):
    video = service.ended(service.create())
    assert (video["status"], video["progress"], video["step"]) == ("completed", 100, 25)
    seen = look_at(service.frames(video["id"]))
    assert (seen.background, seen.colour, seen.shape, seen.motion) == ("white", "red", "circle", "right")


def test_a_job_leaves_nothing_but_the_files_that_it_names(service: Running):
    video = service.ended(service.create(num_inference_steps=6))
    named = {artifact.path for artifact in service.job(video["id"]).artifacts.values()}
    left = {path for path in service.files() if path.startswith(video["id"])}
    assert left - named <= {f"{video['id']}/1/preview.webp"}
    assert len(named) == 3


def test_it_is_ready_when_all_parts_are(service: Running):
    ready = service.client.get("/readyz")
    assert (ready.status_code, ready.json()["ready"]) == (200, True)
    assert {"jobs", "Ingress", "Generator", "TextEncoder", "Denoiser", "Decoder"} <= ready.json()["parts"].keys()


CALLER = f"""
import sys, ray
from ray import serve
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
handle = serve.get_app_handle("{APP}")
video = handle.generate.remote("A blue star growing on a black background.", seed=1, num_inference_steps=4).result()
print(type(video).__name__, video.media_type, video.params.seed, video.video[4:8] == b"ftyp")
stream = handle.options(stream=True).generate_stream.remote(prompt="{PROMPT}", num_inference_steps=4)
print(*(type(event).__name__ for event in stream))
"""


def test_another_ray_job_calls_by_handle_and_by_stream(service: Running):
    address = ray.get_runtime_context().gcs_address
    out = subprocess.run([sys.executable, "-c", CALLER, address], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    first, second = out.stdout.strip().splitlines()
    assert first == "GeneratedVideo video/mp4 1 True"
    *events, last = second.split()
    assert "Progress" in events
    assert set(events) <= {"Progress", "PreviewPicture"}
    assert last == "GeneratedVideo"


def test_the_examples_of_the_guide_run_one_after_the_other(service: Running, tmp_path):
    guide = (Path(__file__).parents[2] / "docs" / "service.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.+?)```", guide, flags=re.DOTALL))
    for said, here in (
        ("http://127.0.0.1:8000", service.url),
        ('"auto"', f'"{ray.get_runtime_context().gcs_address}"'),
    ):
        assert said in code
        code = code.replace(said, here)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert "Progress(step=" in out.stdout
    assert "GeneratedVideo(" in out.stdout
    assert "completed ['A small green triangle" in out.stdout
    assert "400 invalid_value size" in out.stdout
    for name in ("circle.mp4", "circle.webp", "triangle.mp4", "star.mp4"):
        assert (tmp_path / name).stat().st_size > 500


def test_every_example_of_the_api_guide_runs(service: Running, tmp_path):
    guide = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    scripts = {}
    for language in ("bash", "python"):
        script = "\n".join(re.findall(rf"```{language}\n(.+?)```", guide, flags=re.DOTALL))
        assert "http://127.0.0.1:8000" in script
        scripts[language] = script.replace("http://127.0.0.1:8000", service.url)
    scripts["bash"] = f"set -euo pipefail\n{scripts['bash']}"
    scripts["python"] = scripts["python"].replace('"auto"', f'"{ray.get_runtime_context().gcs_address}"')
    out = {}
    for language, command in (("bash", ["bash", "-c"]), ("python", [sys.executable, "-c"])):
        ran = subprocess.run([*command, scripts[language]], capture_output=True, text=True, timeout=240, cwd=tmp_path)
        assert ran.returncode == 0, f"{language}: {ran.stdout[-2000:]} {ran.stderr[-4000:]}"
        out[language] = ran.stdout
    for name in ("circle.mp4", "circle.webp", "sync.mp4", "openai.mp4", "client.mp4", "edited.mp4", "star.mp4"):
        assert (tmp_path / name).stat().st_size > 500
    assert (tmp_path / "first_100_bytes").read_bytes() == (tmp_path / "circle.mp4").read_bytes()[:100]
    for said in ("event: completed", "multiple of 8"):
        assert said in out["bash"]
    for said in ("completed 100", "step 4 of 4", "GeneratedVideo(", "cancelled", "7 video/mp4", "SizeLimit("):
        assert said in out["python"]
    for error in ("BadRequestError", "BadRequest", "RayTaskError(InvalidRequest)"):
        assert f"{error} True" in out["python"]


def test_a_mistake_in_a_call_by_handle_says_what_is_wrong(service: Running):
    call = serve.get_app_handle(APP).generate.remote(PROMPT, width=123)
    with pytest.raises(InvalidRequest, match="width 123: must be a multiple of 8"):
        call.result(timeout_s=30)


def test_no_more_callers_than_the_bound_wait_and_others_learn_when_to_come_back(service: Running):
    handle = serve.get_app_handle(APP)
    waiting = [handle.options(stream=True).generate_stream.remote(PROMPT, num_inference_steps=200)]
    next(iter(waiting[0]))  # the first of them: a Denoiser takes two at a time
    waiting += [handle.generate.remote(PROMPT, num_inference_steps=200) for _ in range(MAX_CALLS - 1)]

    def refused() -> QueueFull | None:
        waiting.append(handle.generate.remote(PROMPT, num_inference_steps=200))  # stays, if it is let in
        try:
            waiting[-1].result(timeout_s=2)
        except QueueFull as error:
            return error
        except TimeoutError:
            pass
        return None

    try:
        error = wait_for(refused)
        response = service.client.post("/v1/videos/sync", json={"prompt": PROMPT})
    finally:
        for call in waiting:
            call.cancel()
    assert re.search("3 calls in all wait already: at most 3 may; try again in [0-9]+ s$", str(error))
    assert 1 <= error.retry_after_s <= 120
    assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
    assert 1 <= int(response.headers["retry-after"]) <= 120
    wait_for(
        lambda: service.client.post("/v1/videos/sync", json={"prompt": PROMPT, "num_inference_steps": 2}).is_success
    )


def test_what_a_denoiser_cannot_hold_is_refused_at_once_with_the_limit_that_it_measured(service: Running):
    """4096x4096 for 1024 frames: more than any machine of today holds."""
    body = {"prompt": PROMPT, "size": "4096x4096", "num_frames": 1024}

    handle = serve.get_app_handle(APP)
    wait_for(lambda: handle.size_limit.remote().result(timeout_s=30))  # until the Ingress has asked the Denoisers
    response = service.client.post("/v1/videos", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "size")
    assert re.search(
        r"17179869184 pixels: this service makes at most \d+ \(measured on cpu: [\d.]+ GiB free, \d+ bytes a pixel\); "
        "ask for a smaller size or fewer frames",
        error["message"],
    )
    call = handle.generate.remote(PROMPT, width=4096, height=4096, num_frames=1024)
    with pytest.raises(InvalidRequest, match="measured on cpu"):
        call.result(timeout_s=30)


def test_a_prompt_with_too_many_tokens_fails_and_says_so(service: Running):
    prompt = "red " * 700
    video = service.ended(service.create(prompt=prompt))
    assert (video["status"], video["error"]["code"]) == ("failed", "invalid_request")
    assert video["error"]["message"].startswith("prompt has 700 tokens: at most 600 are allowed")
    assert "\n" not in video["error"]["message"]  # no traceback of Ray's
    response = service.client.post("/v1/videos/sync", json={"prompt": prompt})
    assert response.status_code == 400
    assert "prompt has 700 tokens: at most 600 are allowed" in response.json()["error"]["message"]


def test_an_edit_is_made_of_its_input(service: Running, undisturbed):
    """With few of the noisiest steps left out it is another video; with the last ones alone, nearly the input."""
    source = service.ended(service.create(num_inference_steps=STEPS))
    similar = {}
    for strength in (0.2, 1.0):
        prompt = "A blue star growing on a black background."
        body = {
            "prompt": prompt,
            "video": {"id": source["id"]},
            "strength": strength,
            "num_inference_steps": 10,
            "seed": 1,
        }
        edit = service.client.post("/v1/videos/edits", json=body).raise_for_status().json()
        edit = service.ended(edit["id"])
        assert (edit["status"], edit["step"]) == ("completed", int(10 * strength))
        similar[strength] = psnr(service.frames(edit["id"]), undisturbed)
    assert similar[0.2] > similar[1.0] + 3


def test_an_edit_by_handle_is_made_of_the_bytes_or_the_frames_that_it_is_given(service: Running, undisturbed):
    handle = serve.get_app_handle(APP)
    settings = {"num_inference_steps": 10, "seed": 1, "width": 128, "height": 128}
    video_id = service.ended(service.create(num_inference_steps=STEPS))["id"]
    data = service.client.get(f"/v1/videos/{video_id}/content").content
    prompt, similar = "A blue star growing on a black background.", {}
    for strength, video in ((0.2, data), (0.25, undisturbed), (1.0, data)):
        made = handle.generate.remote(prompt, video=video, strength=strength, **settings).result(timeout_s=60)
        frames = read_video(made.video, width=128, height=128, fps=8)
        assert (made.params.strength, len(frames)) == (strength, made.params.num_frames)
        similar[strength] = psnr(frames, undisturbed[: len(frames)])
    assert similar[0.2] > similar[1.0] + 3
    assert similar[0.25] > similar[1.0] + 3
    stream = handle.options(stream=True).generate_stream.remote(prompt, video=data, strength=0.2, **settings)
    assert [event.num_steps for event in stream if isinstance(event, Progress)][-1] == 2
    for video, why in (
        (b"no video", "damaged"),
        ("/etc/passwd", "must be the bytes of a file"),
        (undisturbed[0], "must be torch.uint8"),
    ):
        with pytest.raises(InvalidRequest, match=why):
            handle.generate.remote(prompt, video=video, **settings).result(timeout_s=30)


def test_the_end_of_a_job_is_told_to_its_webhook(service: Running):
    got = queue.Queue[tuple[dict[str, str], bytes]]()

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            got.put((headers, self.rfile.read(int(headers["content-length"]))))
            self.send_response(204)
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/hook"
        video_id = service.create(num_inference_steps=4, webhook_url=url)
        headers, body = got.get(timeout=60)
        server.shutdown()
    event = Webhook(signing_secret(WEBHOOK_SECRET, "local")).verify(body, headers)
    assert (event["type"], event["data"]["id"]) == ("video.completed", video_id)
    assert service.ended(video_id)["status"] == "completed"


def test_a_killed_denoiser_costs_the_steps_since_the_last_checkpoint_and_nothing_else(service: Running, undisturbed):
    video_id = service.create(num_inference_steps=STEPS)
    wait_for(lambda: service.job(video_id).checkpoint_step >= 4)
    service.kill("Denoiser")
    assert service.ended(video_id)["status"] == "completed"
    job = service.job(video_id)
    assert job.resumes >= 1
    assert 0 <= job.steps_repeated < STEPS - 4
    assert job.attempts == 0  # it had made progress
    assert psnr(service.frames(video_id), undisturbed) > 40


def test_a_killed_generator_stops_what_it_had_begun_and_another_goes_on(service: Running, undisturbed):
    video_id = service.create(num_inference_steps=STEPS)
    wait_for(lambda: service.job(video_id).checkpoint_step >= 3)
    service.kill("Generator")
    began = time.monotonic()
    wait_for(lambda: not service.denoiser().live, within_s=2.0)
    assert time.monotonic() - began < 2.0
    assert service.ended(video_id)["status"] == "completed"
    job = service.job(video_id)
    assert (job.fence >= 2, job.resumes >= 1) == (True, True)
    assert psnr(service.frames(video_id), undisturbed) > 40


@pytest.mark.parametrize("part", ["Decoder", "TextEncoder", "Ingress"])
def test_another_part_killed_loses_no_job(service: Running, undisturbed, part):
    video_id = service.create(num_inference_steps=STEPS)
    service.at_step(video_id, 2)
    service.kill(part)
    assert service.ended(video_id)["status"] == "completed"
    assert psnr(service.frames(video_id), undisturbed) > 40
    wait_for(lambda: service.client.get("/readyz").json()["ready"])


def test_a_finished_video_waits_for_an_artifact_store_that_is_away(service: Running, undisturbed):
    video_id = service.create(num_inference_steps=STEPS)
    service.at_step(video_id, 2)
    store = Path(service.config.storage.artifacts)
    away = store.with_name("away")
    store.rename(away)
    store.write_text("no folder")
    try:
        service.at_step(video_id, STEPS)
        time.sleep(2.0)
        assert service.video(video_id)["status"] == "in_progress"
    finally:
        store.unlink()
        away.rename(store)
    assert service.ended(video_id)["status"] == "completed"
    assert service.job(video_id).attempts == 0
    assert psnr(service.frames(video_id), undisturbed) > 40


def test_a_killed_controller_disturbs_no_job(service: Running):
    video_id = service.create(num_inference_steps=STEPS)
    service.at_step(video_id, 2)
    ray.kill(ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve"), no_restart=False)
    video = service.ended(video_id)
    assert (video["status"], video["resumes"]) == ("completed", 0)
    wait_for(lambda: service.client.get("/readyz").json()["ready"])


def test_cancel_stops_the_work_within_a_step(service: Running):
    video_id = service.create(num_inference_steps=100)
    service.at_step(video_id, 2)
    response = service.client.post(f"/v1/videos/{video_id}/cancel")
    assert response.status_code == 200
    wait_for(lambda: not service.denoiser().live, within_s=2.0, every_s=0.01)
    assert service.ended(video_id)["status"] == "cancelled"
    stopped = service.denoiser().steps
    time.sleep(1.0)
    assert service.denoiser().steps <= stopped + 1
    assert service.video(video_id)["step"] < 10


def test_going_away_from_sync_stops_the_work_within_a_step(service: Running):
    def ask() -> None:
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(
                f"{service.url}/v1/videos/sync",
                json={"prompt": PROMPT, "num_inference_steps": 200},
                timeout=httpx2.Timeout(3.0),
            )

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for(lambda: service.denoiser().live, within_s=3.0)
    asking.join()
    wait_for(lambda: not service.denoiser().live, within_s=2.0)
    stopped = service.denoiser().steps
    time.sleep(1.0)
    assert service.denoiser().steps <= stopped + 1


def test_closing_a_stream_by_handle_stops_the_work_within_a_step(service: Running):
    handle = serve.get_app_handle(APP).options(stream=True)
    stream = handle.generate_stream.remote(PROMPT, num_inference_steps=200)
    assert isinstance(next(iter(stream)), Progress | GeneratedVideo)
    stream.cancel()
    wait_for(lambda: not service.denoiser().live, within_s=2.0)


CALLER_TO_KILL = f"""
import sys, ray
from ray import serve
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
handle, me = serve.get_app_handle("{APP}"), ray.get_runtime_context().get_job_id()
if sys.argv[2] == "stream":
    list(handle.options(stream=True).generate_stream.remote("{PROMPT}", caller=me, num_inference_steps=200))
handle.generate.remote("{PROMPT}", caller=me, num_inference_steps=200).result()
"""


@pytest.mark.parametrize("kind", ["stream", "one answer"])
def test_the_work_of_a_caller_that_is_killed_stops(service: Running, kind):
    address = ray.get_runtime_context().gcs_address
    caller = subprocess.Popen([sys.executable, "-c", CALLER_TO_KILL, address, kind])
    wait_for(lambda: service.denoiser().live)
    caller.kill()
    caller.wait()
    wait_for(lambda: not service.denoiser().live, within_s=2.0)


def test_a_long_encode_delays_neither_health_nor_other_jobs(service: Running):
    long = service.create(num_inference_steps=1, num_frames=128, format="webm")
    wait_for(lambda: service.video(long)["step"] >= 1)
    other, slowest = service.create(num_inference_steps=20), 0.0
    while service.video(long)["status"] == "in_progress":
        began = time.monotonic()
        assert service.client.get("/healthz").status_code == 200
        slowest = max(slowest, time.monotonic() - began)
        steps_meanwhile = service.video(other)["step"]
    assert service.ended(long)["status"] == service.ended(other)["status"] == "completed"
    assert slowest < 1.0
    assert steps_meanwhile >= 5
