"""OTLP as a collector receives it: real protobuf over HTTP, from a real exporter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from actors.errors import EngineLost
from graphs.stages import SessionSpec
from serving.telemetry import Telemetry
from tests.collector import Collector

SPEC = SessionSpec("NATF2", "You are a secret agent.", 0)


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def test_a_trace_per_conversation(collector: Collector) -> None:
    telemetry = Telemetry.to(collector.endpoint)
    trace = telemetry.conversation("abc", "acme", "127.0.0.1", SPEC)
    with trace.span("admission"):
        pass
    trace.start("prefill")
    trace.start("live")
    trace.frame(30.0)
    trace.frame(95.0)
    trace.failed(EngineLost("The engine of this replica failed."))
    trace.end()
    telemetry.close()

    spans = {span.name: span for span in collector.spans()}
    assert set(spans) == {"conversation", "admission", "prefill", "live"}
    root = spans["conversation"]
    assert {span.trace_id for span in spans.values()} == {root.trace_id}
    assert {spans[name].parent_span_id for name in ("admission", "prefill", "live")} == {root.span_id}
    attributes = {pair.key: pair.value for pair in root.attributes}
    assert attributes["personaplex.session"].string_value == "abc"
    assert attributes["personaplex.frames"].int_value == 2
    assert attributes["personaplex.frames.late"].int_value == 1
    assert root.status.message == "engine_lost"
    assert b"secret agent" not in b"".join(collector.bodies["/v1/traces"])  # the role is nobody's business


def test_frame_time_is_a_histogram_in_ms_and_misses_are_counted(collector: Collector) -> None:
    telemetry = Telemetry.to(collector.endpoint)
    frames = telemetry.frames("r1")
    for frame_ms in (12.0, 45.0, 130.0):
        frames.observe_frame_ms(frame_ms)
    frames.deadline_miss(0)
    frames.batch_size("engine", 3)
    telemetry.close()

    metrics = dict(collector.metrics())
    duration = metrics["personaplex.frame.duration"]
    assert duration.unit == "ms"
    point = duration.histogram.data_points[0]
    assert (point.count, point.sum) == (3, 187.0)
    assert 80.0 in point.explicit_bounds
    assert metrics["personaplex.frame.deadline_misses"].sum.data_points[0].as_int == 1
    assert metrics["personaplex.stage.batch"].histogram.data_points[0].sum == 3


def test_off_does_nothing_and_costs_no_import() -> None:
    telemetry = Telemetry.to(None)
    trace = telemetry.conversation("abc", "acme", "127.0.0.1", SPEC)
    with trace.span("admission"):
        trace.start("live")
    trace.frame(1.0)
    trace.end()
    telemetry.frames("r1").observe_frame_ms(1.0)
    telemetry.close()


def test_two_servers_in_a_process_do_not_share_a_collector(collector: Collector) -> None:
    other = Collector()
    first, second = Telemetry.to(collector.endpoint), Telemetry.to(other.endpoint)
    first.conversation("one", "t", "c", SPEC).end()
    second.conversation("two", "t", "c", SPEC).end()
    first.close()
    second.close()
    other.close()
    assert [span.name for span in collector.spans()] == ["conversation"]
    assert [span.name for span in other.spans()] == ["conversation"]
