"""Requests as the tests spell them."""

from __future__ import annotations

import base64
import io
import tarfile
import zipfile
from typing import Any

import httpx

from service.web import schemas
from tests.fakes import picture


def colours(*names: str, shots: int = 3) -> list[tuple[str, tuple[str, bytes]]]:
    """A multipart support set: one class per colour."""
    return [(name, (f"{k}.png", picture(name, seed=k))) for name in names for k in range(shots)]


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def support_json(*names: str, shots: int = 3) -> list[dict[str, str]]:
    return [{"label": name, "image": text(picture(name, seed=k))} for name in names for k in range(shots)]


def zipped(entries: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return out.getvalue()


def tarred(entries: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def folders(*names: str, shots: int = 3, under: str = "") -> dict[str, bytes]:
    return {f"{under}{name}/{k}.png": picture(name, seed=k) for name in names for k in range(shots)}


def refused(response: httpx.Response, status: int, code: str, words: str = "") -> dict[str, Any]:
    """Holds a response to be the problem it should be; returns its body."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = schemas.Problem.model_validate_json(response.text)
    assert (problem.code, problem.status) == (code, status)
    assert words in problem.detail, problem.detail
    assert problem.request_id == response.headers["x-request-id"]
    assert "0x" not in response.text
    assert "Traceback" not in response.text
    body: dict[str, Any] = response.json()
    return body
