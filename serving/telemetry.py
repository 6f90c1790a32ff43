"""OpenTelemetry: a trace per conversation and a histogram of frame time, over OTLP/HTTP where an endpoint is set.

Providers belong to the Telemetry object, not to the process: tests and several servers in one process do not
share them. Without an endpoint no exporter is imported and every call does nothing.
Spans carry ids, names of voices and numbers; never the role, the text or audio of anybody.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from graphs.stages import SessionSpec

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter
    from opentelemetry.trace import Span, Tracer

FRAME_BUDGET_MS = 80.0
# Finest where it matters: around half the budget and at its edge.
FRAME_BUCKETS_MS = (5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 100.0, 120.0, 160.0, 320.0, 1000.0)


class ConversationTrace:
    """The spans of one conversation: `admission` (a context), then `prefill` and `live`, one ending the other.

    This class itself does nothing: it is what a conversation has when telemetry is off.
    """

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """A child span around a block."""
        yield

    def start(self, name: str) -> None:
        """End the current stage, if any, and begin the next."""

    def frame(self, replica_ms: float) -> None:
        """One frame of the agent has come; `replica_ms` is what its replica spent on it."""

    def failed(self, error: BaseException) -> None:
        """Why the conversation ended against its user's wish."""

    def end(self) -> None:
        """The conversation is over."""


class FrameRecorder:
    """actors.interfaces.FrameMetrics that records nothing."""

    def observe_frame_ms(self, frame_ms: float) -> None:
        """From a frame's arrival at the replica to its answer, in ms."""

    def deadline_miss(self, slot: int) -> None:
        """That took longer than the budget of 80 ms."""

    def batch_size(self, stage: str, frames: int) -> None:
        """One call of a stage carried this many frames."""


class Exporter(Protocol):
    """What a Telemetry switches on and off."""

    def conversation(self, session: str, tenant: str, client: str, spec: SessionSpec) -> ConversationTrace: ...

    def frames(self, replica: str) -> FrameRecorder: ...

    def close(self) -> None: ...


class Telemetry:
    """Where conversations and frames are reported to: an OTLP collector, or nowhere."""

    def __init__(self, exporter: Exporter | None) -> None:
        self._exporter = exporter

    @classmethod
    def off(cls) -> Telemetry:
        return cls(None)

    @classmethod
    def to(cls, endpoint: str | None, interval_s: float = 10.0) -> Telemetry:
        """Export to an OTLP/HTTP collector's base URL, such as http://localhost:4318; None: off."""
        return cls(_OtlpExporter(endpoint, interval_s)) if endpoint else cls.off()

    def conversation(self, session: str, tenant: str, client: str, spec: SessionSpec) -> ConversationTrace:
        if self._exporter is None:
            return ConversationTrace()
        return self._exporter.conversation(session, tenant, client, spec)

    def frames(self, replica: str) -> FrameRecorder:
        """What a replica records its frames with."""
        return FrameRecorder() if self._exporter is None else self._exporter.frames(replica)

    def close(self) -> None:
        """Export what is left and stop; at most some seconds when the collector does not answer."""
        if self._exporter is not None:
            self._exporter.close()


class _OtlpExporter:
    def __init__(self, endpoint: str, interval_s: float) -> None:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        base = endpoint.rstrip("/")
        resource = Resource.create({"service.name": "personaplex"})
        self._spans = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=f"{base}/v1/traces", timeout=5)
        self._spans.add_span_processor(BatchSpanProcessor(exporter))
        reader = PeriodicExportingMetricReader(
            OTLPMetricExporter(endpoint=f"{base}/v1/metrics", timeout=5), export_interval_millis=interval_s * 1000
        )
        self._metrics = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        self._tracer = self._spans.get_tracer("personaplex")
        self._meter = self._metrics.get_meter("personaplex")

    def conversation(self, session: str, tenant: str, client: str, spec: SessionSpec) -> ConversationTrace:
        attributes = {
            "personaplex.session": session,
            "personaplex.tenant": tenant,
            "personaplex.client": client,
            "personaplex.voice": spec.voice,
            "personaplex.role.chars": len(spec.role),
        }
        return _OtlpTrace(self._tracer, attributes)

    def frames(self, replica: str) -> FrameRecorder:
        return _OtlpFrames(self._meter, replica)

    def close(self) -> None:
        self._spans.shutdown()
        self._metrics.shutdown()


class _OtlpTrace(ConversationTrace):
    def __init__(self, tracer: Tracer, attributes: dict[str, Any]) -> None:
        from opentelemetry import trace

        self._tracer = tracer
        self._root = tracer.start_span("conversation", attributes=attributes)
        self._context = trace.set_span_in_context(self._root)
        self._stage: Span | None = None
        self._frames = self._late = 0
        self._worst_ms = 0.0

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        with self._tracer.start_as_current_span(name, self._context):
            yield

    def start(self, name: str) -> None:
        if self._stage is not None:
            self._stage.end()
        self._stage = self._tracer.start_span(name, self._context)

    def frame(self, replica_ms: float) -> None:
        self._frames += 1
        self._late += replica_ms > FRAME_BUDGET_MS
        self._worst_ms = max(self._worst_ms, replica_ms)

    def failed(self, error: BaseException) -> None:
        from opentelemetry.trace import StatusCode

        self._root.set_status(StatusCode.ERROR, getattr(error, "code", type(error).__name__))

    def end(self) -> None:
        if self._stage is not None:
            self._stage.end()
        self._root.set_attribute("personaplex.frames", self._frames)
        self._root.set_attribute("personaplex.frames.late", self._late)
        self._root.set_attribute("personaplex.frames.worst_ms", self._worst_ms)
        self._root.end()


class _OtlpFrames(FrameRecorder):
    def __init__(self, meter: Meter, replica: str) -> None:
        self._attributes = {"personaplex.replica": replica}
        self._duration = meter.create_histogram(
            "personaplex.frame.duration",
            unit="ms",
            description="from a frame's arrival at its replica to its answer; the budget is 80 ms",
            explicit_bucket_boundaries_advisory=FRAME_BUCKETS_MS,
        )
        self._misses = meter.create_counter(
            "personaplex.frame.deadline_misses", unit="{frame}", description="frames that took longer than 80 ms"
        )
        self._batch = meter.create_histogram(
            "personaplex.stage.batch", unit="{frame}", description="frames carried by one call of a stage"
        )

    def observe_frame_ms(self, frame_ms: float) -> None:
        self._duration.record(frame_ms, self._attributes)

    def deadline_miss(self, slot: int) -> None:
        self._misses.add(1, {**self._attributes, "personaplex.slot": slot})

    def batch_size(self, stage: str, frames: int) -> None:
        self._batch.record(frames, {**self._attributes, "stage": stage})
