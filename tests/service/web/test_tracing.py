from __future__ import annotations

from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="the tracing extra is not installed")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service.settings import Settings
from service.stores.memory import MemoryStore
from service.web.app import create_app
from service.web.tracing import Traced
from tests.fakes import MeanColour, picture, tiny_artifact
from tests.service.live import served
from tests.service.web.asks import colours

TRACE = "0af7651916cd43dd8448eb211c80319c"


def app(folder: Path, **settings: Any) -> Any:
    artifact = tiny_artifact(folder)
    return create_app(Settings(**settings), artifact=artifact, extractor=MeanColour(), store=MemoryStore())


@pytest.mark.slow
def test_each_request_is_a_span_with_its_stages_and_without_what_is_the_clients(tmp_path: Path) -> None:
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    with served(Traced(app(tmp_path), provider)) as client:
        client.put("/v1/tasks/secret-name", files=colours("red", "blue")).raise_for_status()
        answer = client.post(
            "/v1/tasks/secret-name/classify",
            content=picture("red"),
            headers={"Content-Type": "image/png", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"},
        )
        client.get("/v1/tasks/nothing")
    adapt, classify, missing = spans.get_finished_spans()
    assert adapt.name == "PUT /v1/tasks/{task}"
    assert classify.name == "POST /v1/tasks/{task}/classify"
    assert f"{classify.context.trace_id:032x}" == TRACE
    assert classify.attributes is not None
    assert classify.attributes["fewshot.request_id"] == answer.headers["x-request-id"]
    assert classify.attributes["http.response.status_code"] == 200
    assert {"fewshot.decode_ms", "fewshot.embed_ms", "fewshot.total_ms"} <= set(classify.attributes)
    assert missing.attributes is not None
    assert missing.attributes["http.response.status_code"] == 404
    assert "secret-name" not in "".join(span.to_json() for span in spans.get_finished_spans())


@pytest.mark.slow
def test_spans_arrive_at_the_endpoint_that_is_set(tmp_path: Path) -> None:
    posts: list[tuple[str, int]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posts.append((self.path, len(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}/v1/traces"
        with served(app(tmp_path, trace_endpoint=endpoint)) as client:
            client.get("/healthz").raise_for_status()
        server.shutdown()
        thread.join()
    assert [path for path, _ in posts] == ["/v1/traces"]
    assert posts[0][1] > 100
