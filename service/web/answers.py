"""Engine values -> answers: bodies, headers and status. Knows nothing of how they came about."""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any

from starlette.responses import Response

from models.errors import FewshotError
from service.engine import Adapted, Predictions
from service.support import Rejected


def etag(adapted: Adapted) -> str:
    return f'"v{adapted.pointer.version}-{adapted.pointer.head}"'


def answer(body: Mapping[str, Any], *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(body), status, media_type="application/json", headers=dict(headers or {}))


def _timing(state: MutableMapping[str, Any], timings_ms: Mapping[str, float]) -> dict[str, float]:
    state["timing"] = ", ".join(f"{name};dur={value:.2f}" for name, value in timings_ms.items())
    return {name: round(value, 3) for name, value in timings_ms.items()}


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def rejected_rows(rejected: tuple[Rejected, ...]) -> list[dict[str, Any]]:
    return [{"index": item.index, "code": item.code, "detail": item.detail} for item in rejected]


def task(state: MutableMapping[str, Any], adapted: Adapted, *, status: int) -> Response:
    record, pointer = adapted.record, adapted.pointer
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
        "rejected": rejected_rows(adapted.rejected),
        "created_at": _time(record.created),
        "expires_at": _time(record.expires),
        "timings_ms": _timing(state, adapted.timings_ms),
    }
    headers = {"ETag": etag(adapted)}
    if status == 201:
        headers["Location"] = f"/v1/tasks/{adapted.task}"
    return answer(body, status=status, headers=headers)


def predictions(state: MutableMapping[str, Any], found: Predictions, rejected: tuple[Rejected, ...] = ()) -> Response:
    labels = found.head.labels
    rows: list[dict[str, Any]] = []
    for index, row in enumerate(found.rows):
        if isinstance(row, FewshotError):
            rows.append({"index": index, "error": {"index": index, "code": row.code, "detail": row.detail}})
            continue
        values = [round(value, 6) for value in row.tolist()]
        best = int(row.argmax())
        rows.append(
            {
                "index": index,
                "label": labels[best],
                "probability": values[best],
                "probabilities": dict(zip(labels, values, strict=True)),
            }
        )
    body = {
        "task": found.task,
        "version": found.pointer.version if found.pointer else None,
        "head": found.head_id,
        "stale": found.pointer.stale if found.pointer else False,
        "predictions": rows,
        "rejected": rejected_rows(rejected),
        "timings_ms": _timing(state, found.timings_ms),
    }
    return answer(body)
