"""Traces: the spans of one request, from HTTP to the decoder, as a collector gets them by OTLP."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from ray.serve.schema import TracingConfig
from running import PROMPT, Running, config, ray_started, running, wait_for

pytestmark = pytest.mark.service

STAGES = ("TextEncoder", "Denoiser", "Decoder")


@dataclass(frozen=True)
class Span:
    name: str
    id: str
    parent: str
    trace: str
    attributes: dict[str, Any]


class Collector(ThreadingHTTPServer):
    """Keeps every span that is sent to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.spans: list[Span] = []

    def of_trace(self, trace: str) -> dict[str, Span]:
        return {span.id: span for span in self.spans if span.trace == trace}


class _Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        for resource in body.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    values = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}
                    ids = span.span_id.hex(), span.parent_span_id.hex(), span.trace_id.hex()
                    self.server.spans.append(Span(span.name, *ids, values))
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> Iterator[tuple[Running, Collector]]:
    with Collector() as collector, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        tracing = TracingConfig(enabled=True, exporter_import_path="serve_app.tracing:otlp", sampling_ratio=0.0)
        with ray_started(), running(config(tmp_path_factory.mktemp("traced")), tracing) as service:
            yield service, collector
        collector.shutdown()


def spans_of(collector: Collector, trace: str, caller: str) -> dict[str, Span]:
    """By the stages that handled the request, and "HTTP" for its first, once all have come."""

    def come() -> dict[str, Span] | None:
        spans = list(collector.of_trace(trace).values())
        found = {}
        for span in spans:
            if span.parent == caller:
                found["HTTP"] = span
            if span.name.startswith("replica_handle_request") and span.attributes["deployment"] in STAGES:
                found[span.attributes["deployment"]] = span
        return found if found.keys() == {"HTTP", *STAGES} else None

    return wait_for(come)


def ancestors(collector: Collector, span: Span) -> list[Span]:
    """The span and those that it came of, up to the first that came here."""
    known, line = collector.of_trace(span.trace), [span]
    while line[-1].parent in known:
        line.append(known[line[-1].parent])
    return line


def test_the_spans_of_a_job_lead_from_the_decoder_back_to_the_request_that_made_it(traced):
    service, collector = traced
    trace, caller = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace}-{caller}-01"}  # sampled, as the caller says
    body = {"prompt": PROMPT, "num_inference_steps": 4}
    video_id = service.client.post("/v1/videos", json=body, headers=headers).json()["id"]
    assert service.ended(video_id)["status"] == "completed"
    spans = spans_of(collector, trace, caller)
    wait_for(lambda: any(span.name == "attempt" for span in collector.of_trace(trace).values()))
    for stage in STAGES:
        assert (spans[stage].attributes["t2v.job"], spans[stage].attributes["t2v.fence"]) == (video_id, 1)
        line = ancestors(collector, spans[stage])
        (attempt,) = [place for place, span in enumerate(line) if span.name == "attempt"]
        assert (line[attempt].attributes["t2v.job"], line[attempt].attributes["t2v.fence"]) == (video_id, 1)
        assert line[attempt + 1].attributes["t2v.job"] == video_id  # the Ingress'
        assert line[-1] == spans["HTTP"]


def test_the_spans_of_a_call_that_waits_are_one_trace(traced):
    service, collector = traced
    trace, caller = "1af7651916cd43dd8448eb211c80319d", "c7ad6b7169203332"
    headers = {"traceparent": f"00-{trace}-{caller}-01"}
    body = {"prompt": PROMPT, "num_inference_steps": 4}
    assert service.client.post("/v1/videos/sync", json=body, headers=headers).status_code == 200
    spans = spans_of(collector, trace, caller)
    assert len({spans[stage].attributes["t2v.job"] for stage in STAGES}) == 1
    for stage in STAGES:
        wait_for(lambda stage=stage: ancestors(collector, spans[stage])[-1] == spans["HTTP"])


def test_what_is_not_sampled_is_not_sent(traced):
    service, collector = traced
    before = {span.trace for span in collector.spans}
    assert service.ended(service.create(num_inference_steps=2))["status"] == "completed"
    time.sleep(1)  # spans are sent every 0.2 s
    assert {span.trace for span in collector.spans} == before
