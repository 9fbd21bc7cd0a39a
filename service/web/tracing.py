"""One span per request, sent by OTLP where an endpoint is set. Needs the `tracing` extra.

A span carries the route, the status, the request id and the milliseconds of each stage, and continues the trace of a
caller who sends `traceparent`. It never carries a task, a label, a key or a body.
"""

from __future__ import annotations

from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.settings import SettingsError

NAME = "fewshot"


def provider(endpoint: str) -> Any:
    """A tracer provider that sends spans in batches. Raises SettingsError when the extra is not installed."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise SettingsError("FEWSHOT_TRACE_ENDPOINT is set, but the `tracing` extra is not installed.") from None
    made = TracerProvider(resource=Resource.create({"service.name": NAME}))
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return made


class Traced:
    """The app, each of whose requests is a span of the given provider."""

    def __init__(self, app: ASGIApp, provider: Any):
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.app = app
        self.provider = provider
        self._tracer = provider.get_tracer(NAME)
        self._context = TraceContextTextMapPropagator()
        self._server, self._error = SpanKind.SERVER, StatusCode.ERROR

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            try:
                await self.app(scope, receive, send)
            finally:
                self.provider.shutdown()  # sends what is left
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        context = self._context.extract(headers)
        with self._tracer.start_as_current_span(scope["method"], context=context, kind=self._server) as span:

            async def noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    route = getattr(scope.get("route"), "path", "none")
                    span.update_name(f"{scope['method']} {route}")
                    span.set_attribute("http.request.method", scope["method"])
                    span.set_attribute("http.route", route)
                    span.set_attribute("http.response.status_code", message["status"])
                    for name, value in message["headers"]:
                        if name == b"x-request-id":
                            span.set_attribute("fewshot.request_id", value.decode("latin-1"))
                        elif name == b"server-timing":
                            for stage, milliseconds in _stages(value.decode("latin-1")):
                                span.set_attribute(f"fewshot.{stage}_ms", milliseconds)
                    if message["status"] >= 500:
                        span.set_status(self._error)
                await send(message)

            await self.app(scope, receive, noted)


def _stages(timing: str) -> list[tuple[str, float]]:
    """`decode;dur=3.1, embed;dur=11` -> the name and the milliseconds of each."""
    parts = (part.strip().partition(";dur=") for part in timing.split(","))
    return [(name, float(value)) for name, _, value in parts if value]
