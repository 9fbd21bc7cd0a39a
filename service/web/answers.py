"""Engine values -> answers: bodies, headers and status. Knows nothing of how they came about."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, MutableMapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from starlette.responses import Response

from models.errors import FewshotError
from models.report import Report
from service.answering import Answer, Predictions
from service.batcher import Embedded
from service.stores import Pointer
from service.support import Rejected
from service.tasks import Adapted
from service.web.bodies import JSON_LINES
from service.web.conditions import etag


def answer(body: Mapping[str, Any], *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(text(body), status, media_type="application/json", headers=dict(headers or {}))


def text(body: Any) -> str:
    """JSON as it is sent: in UTF-8, for as an escape a letter takes six bytes or twelve."""
    return json.dumps(body, ensure_ascii=False)


def _timing(state: MutableMapping[str, Any], timings_ms: Mapping[str, float]) -> dict[str, float]:
    if timings_ms:
        state["timing"] = ", ".join(f"{name};dur={value:.2f}" for name, value in timings_ms.items())
    return {name: round(value, 3) for name, value in timings_ms.items()}


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def version(at: Pointer) -> dict[str, Any]:
    told = at.told
    return {
        "version": at.version,
        "head": at.head,
        "created_at": _time(told and told.written),
        "method": told and told.method,
        "classes": told and told.classes,
        "examples": told and told.examples,
    }


def rejected_rows(rejected: tuple[Rejected, ...], names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """`names`: those that the images of the request came with, by index; empty where one had none."""
    rows = []
    for item in rejected:
        name = names[item.index] if names else ""
        rows.append({"index": item.index, "code": item.code, "detail": item.detail, **({"name": name} if name else {})})
    return rows


def task(state: MutableMapping[str, Any], adapted: Adapted, *, status: int, names: Sequence[str] = ()) -> Response:
    record, pointer = adapted.record, adapted.pointer
    if adapted.report is None:
        return _moved(state, adapted, names)
    counts = [0] * len(record.labels)
    for index in record.classes:
        counts[index] += 1
    body = {
        "task": adapted.task,
        "version": pointer.version,
        "head": pointer.head,
        "artifact": record.artifact,
        "method": record.method,
        "classes": [{"label": label, "shots": n} for label, n in zip(record.labels, counts, strict=True)],
        "examples": [
            {"id": example, "label": record.labels[index]}
            for example, index in zip(record.ids, record.classes, strict=False)  # unlabelled ids follow
        ],
        "unlabelled": len(record.unlabelled),
        "retained": bool(record.images),
        "rejects": adapted.rejects,
        "report": report(adapted.report),
        "rejected": rejected_rows(adapted.rejected, names),
        "created_at": _time(record.created),
        "expires_at": _time(record.expires),
        "timings_ms": _timing(state, adapted.timings_ms),
    }
    headers = {"ETag": etag(pointer)}
    if status == 201:
        headers["Location"] = f"/v1/tasks/{adapted.task}"
    return answer(body, status=status, headers=headers)


def _moved(state: MutableMapping[str, Any], adapted: Adapted, names: Sequence[str]) -> Response:
    """Where the task is after a change, and no more (RFC 7240)."""
    body = {
        "task": adapted.task,
        "version": adapted.pointer.version,
        "head": adapted.pointer.head,
        "method": adapted.record.method,
        "rejected": rejected_rows(adapted.rejected, names),
        "timings_ms": _timing(state, adapted.timings_ms),
    }
    return answer(body, headers={"ETag": etag(adapted.pointer), "Preference-Applied": "return=minimal"})


def report(found: Report) -> dict[str, Any]:
    return {
        "accuracy": found.accuracy,
        "interval": found.interval,
        "estimate": found.estimate,
        "confusions": [{"from": item.label, "to": item.taken_for, "count": item.count} for item in found.confusions],
        "suspects": [dataclasses.asdict(item) for item in found.suspects],
        "advice": found.advice,
        "twins": found.twins,
        "doubles": found.doubles,
    }


def prediction(
    index: int, row: Answer | FewshotError, labels: Sequence[str], reject: float, top: int | None = None
) -> dict[str, Any]:
    """One line of an answer. `reject` is the share of genuine images that may be turned away; 0: none is. `top`: of how
    many classes probabilities are told, the likeliest first; None: of all, as they stand in the task."""
    if isinstance(row, FewshotError):
        return {"index": index, "error": {"index": index, "code": row.code, "detail": row.detail}}
    values = [round(value, 6) for value in row.probabilities.tolist()]
    best = int(row.probabilities.argmax())
    known = None if row.known is None else round(row.known, 4)
    named = range(len(values)) if top is None else np.argsort(-row.probabilities, kind="stable")[:top].tolist()
    body: dict[str, Any] = {
        "index": index,
        "label": labels[best],
        "probability": values[best],
        "probabilities": {labels[i]: values[i] for i in named},
        "known": known,
    }
    if row.is_none(reject):
        body |= {"label": None, "reason": "none_of_these"}
    if row.nearest:
        body["nearest"] = [dataclasses.asdict(near) for near in row.nearest]
    return body


def predictions(
    state: MutableMapping[str, Any],
    found: Predictions,
    rejected: tuple[Rejected, ...] = (),
    *,
    names: Sequence[str] = (),
    reject: float,
    top: int | None = None,
    lines: bool = False,
) -> Response:
    """`lines`: one prediction a line, without what goes around them."""
    rows = [prediction(index, row, found.head.labels, reject, top) for index, row in enumerate(found.rows)]
    timings = _timing(state, found.timings_ms)
    if lines:
        return Response("".join(text(row) + "\n" for row in rows), media_type=JSON_LINES)
    body = {
        "task": found.task,
        "version": found.pointer.version if found.pointer else None,
        "head": found.head_id,
        "stale": found.pointer.stale if found.pointer else False,
        "reject": reject or None,
        "predictions": rows,
        "rejected": rejected_rows(rejected, names),
        "timings_ms": timings,
    }
    return answer(body)


def features(state: MutableMapping[str, Any], embedded: Embedded, *, artifact: str, dim: int) -> Response:
    errors = [(i, item) for i, item in enumerate(embedded.items) if isinstance(item, FewshotError)]
    body = {
        "artifact": artifact,
        "dim": dim,
        "features": [
            None if isinstance(item, FewshotError) else [round(value, 6) for value in item.tolist()]
            for item in embedded.items
        ],
        "errors": [{"index": i, "code": item.code, "detail": item.detail} for i, item in errors],
        "timings_ms": _timing(state, embedded.stages()),
    }
    return answer(body)
