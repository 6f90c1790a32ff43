"""An OTLP/HTTP collector in this process that keeps what it is sent."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector:
    """An OTLP/HTTP collector that keeps the bodies."""

    def __init__(self) -> None:
        bodies = self.bodies = {"/v1/traces": list[bytes](), "/v1/metrics": list[bytes]()}

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                bodies[self.path].append(body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def spans(self):  # type: ignore[no-untyped-def] # protobuf's classes are made at run time
        for body in self.bodies["/v1/traces"]:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    yield from scope.spans

    def metrics(self):  # type: ignore[no-untyped-def] # see above
        for body in self.bodies["/v1/metrics"]:
            for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                for scope in resource.scope_metrics:
                    for metric in scope.metrics:
                        yield metric.name, metric

    def trace_of(self, session: str):  # type: ignore[no-untyped-def] # see above
        """All spans of the conversation's trace, once its root has come."""
        spans = list(self.spans())
        roots = [span for span in spans if any(pair.value.string_value == session for pair in span.attributes)]
        return [span for span in spans if roots and span.trace_id == roots[0].trace_id]

    def frame_count(self) -> int:
        """Frames in the newest histogram of frame time."""
        points = [
            metric.histogram.data_points for name, metric in self.metrics() if name == "personaplex.frame.duration"
        ]
        return sum(int(point.count) for point in points[-1]) if points else 0
