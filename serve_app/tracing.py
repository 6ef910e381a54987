"""Where spans go: exporters that Serve's tracing configuration names by their import path."""

from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor


def otlp() -> list[SpanProcessor]:
    """To the collector that OTEL_EXPORTER_OTLP_ENDPOINT names, by OTLP over HTTP. Needs the extra `tracing`."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return [BatchSpanProcessor(OTLPSpanExporter())]
