"""The routes of the Open Inference Protocol v2: every task of the caller is a model, and so is the extractor.

Parse, call the engine, answer. Errors are raised as everywhere; `problems.py` writes them as this protocol asks. What
is served of a task is its current version and no other. docs/open-inference.md says all this to those who call.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from fastapi import APIRouter, Request, Response

from models.errors import InvalidRequest, VersionNotFound
from models.text import MAX_BYTES
from service.answering import Answer
from service.engine import Engine
from service.stores import Scope
from service.waiting import Payload
from service.web import answers
from service.web.about import is_stopping
from service.web.access import scope_of
from service.web.bodies import IDENTITY, coding
from service.web.open_inference import codec

T = TypeVar("T")
EXTENSIONS = ["binary_tensor_data", "classification"]
EXTRACTOR = "extractor"  # hides a task of that name, which then has the routes under /v1 alone
EXTRACTOR_VERSION = "1"
# What the artifact reads -> the inputs that hold it: encoded, and as the extractor takes it.
INPUTS: Mapping[str, tuple[str, str]] = {"image": ("image", "pixels"), "text": ("text", "bytes")}
MOST_LISTED = 1000
LARGE = 100_000  # bytes of a body that is not taken apart on the event loop


@dataclass(frozen=True, slots=True)
class Asked:
    """An inference request, read, and good as far as can be told without the model."""

    id: str | None
    payloads: list[Payload]
    outputs: tuple[str, ...]  # none: the model's own choice
    binary: Mapping[str, bool]  # by output
    binary_default: bool
    classes: int | None  # how many are told as text, in place of the probabilities
    reject: float | None  # None: the service's own


def create_router(
    engine: Engine, *, version: str, max_body_bytes: int, max_text_bytes: int = MAX_BYTES, reject: float
) -> APIRouter:
    # Not in our OpenAPI file: the protocol has a description of its own.
    router = APIRouter(prefix="/v2", include_in_schema=False)
    shape, dim = engine.artifact.decoder().shape, engine.artifact.manifest.dim
    kind = engine.artifact.kind
    encoded, plain = INPUTS[kind]
    text = max_text_bytes if kind == "text" else 0
    most = codec.Most(images=engine.limits.max_queries, pixels=shape, unpacked=max_body_bytes, text=text)

    @router.get("")
    @router.get("/")
    async def server() -> Response:
        return answers.answer({"name": "fewshot", "version": version, "extensions": EXTENSIONS})

    @router.get("/health/live")
    async def live() -> Response:
        return answers.answer({"live": True})

    @router.get("/health/ready")
    async def ready(request: Request) -> Response:
        alive = engine.batcher.alive and not is_stopping(
            request
        )  # the protocol's text calls the field `live`, its servers `ready`
        return answers.answer({"live": alive, "ready": alive}, status=200 if alive else 503)

    @router.get("/models/{name}")
    @router.get("/models/{name}/versions/{version}")
    async def model(request: Request, name: str) -> Response:
        at, outputs = EXTRACTOR_VERSION, [_tensor("features", "FP32", -1, dim)]
        if name != EXTRACTOR:
            found = await engine.describe(scope_of(request), name)
            at = str(found.pointer.version)
            known = [_tensor("known", "FP32", -1)] if found.rejects else []
            probabilities = _tensor("probabilities", "FP32", -1, len(found.record.labels))
            outputs = [probabilities, _tensor("label", "BYTES", -1), *known, *outputs]
        _check_version(request, name, at)
        inputs = [_tensor(encoded, "BYTES", -1), _tensor(plain, "UINT8", -1, *shape)]
        return answers.answer(
            {"name": name, "versions": [at], "platform": "fewshot", "inputs": inputs, "outputs": outputs}
        )

    @router.get("/models/{name}/ready")
    @router.get("/models/{name}/versions/{version}/ready")
    async def model_ready(request: Request, name: str) -> Response:
        at, usable = EXTRACTOR_VERSION, engine.batcher.alive
        if name != EXTRACTOR:
            pointer, record = await engine.record(scope_of(request), name)
            at = str(pointer.version)
            # A task of another artifact is learned again when it is used, if its images were kept.
            usable = usable and (record.artifact == engine.artifact.digest or bool(record.images))
        _check_version(request, name, at)
        return answers.answer({"name": name, "ready": usable}, status=200 if usable else 503)

    @router.post("/models/{name}/infer")
    @router.post("/models/{name}/versions/{version}/infer")
    async def infer(request: Request, name: str) -> Response:
        at = EXTRACTOR_VERSION
        if name != EXTRACTOR:
            at = str((await engine.at(scope_of(request), name)).version)
        _check_version(request, name, at)  # an unknown model, or another version, costs no work
        body = await request.body()
        encoding = coding(request)
        header_length = request.headers.get(codec.HEADER_LENGTH)
        if encoding != IDENTITY:  # it is small only until it is unpacked, which counts as if it had been sent
            packed = body
            body = await _aside(True, lambda: codec.unpack(packed, encoding, most.unpacked))
            request.scope["state"]["hold"](len(body))
        asked = await _aside(len(body) > LARGE, lambda: read_request(body, header_length, most, kind))
        if name == EXTRACTOR:
            tensors = await _features(engine, asked)
        else:
            at, tensors = await _predictions(engine, scope_of(request), name, asked, reject)
            _check_version(request, name, at)  # it may have moved meanwhile
        members = {"model_name": name, "model_version": at, **({} if asked.id is None else {"id": asked.id})}
        outputs = [codec.Output(key, tensors[key], asked.binary.get(key, asked.binary_default)) for key in tensors]
        return await _response(members, outputs, request.headers.get("accept-encoding", ""))

    @router.post("/repository/index")
    async def index(request: Request) -> Response:
        found = await engine.tasks(scope_of(request), limit=MOST_LISTED, after="")
        versions = {**{task: str(pointer.version) for task, pointer in found}, EXTRACTOR: EXTRACTOR_VERSION}
        rows = [{"name": name, "version": at, "state": "READY", "reason": ""} for name, at in sorted(versions.items())]
        return Response(json.dumps(rows), media_type="application/json")

    return router


def _tensor(name: str, datatype: str, *shape: int) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(shape)}


def _check_version(request: Request, name: str, at: str) -> None:
    """Raises VersionNotFound when the path names another version than the one that is served."""
    if request.path_params.get("version", at) != at:
        raise VersionNotFound(f"The model {name!r} is at version {at}, and no other version is served.")


def read_request(body: bytes, header_length: str | None, most: codec.Most, kind: str = "image") -> Asked:
    request, raws = codec.parse(body, header_length, most)
    encoded, plain = INPUTS[kind]
    if len(request.inputs) != 1 or request.inputs[0].name not in (encoded, plain):
        what = "UTF-8" if kind == "text" else "encoded files"
        raise InvalidRequest(f"A request has one input, named `{encoded}` ({what}) or `{plain}`.")
    tensor, raw = request.inputs[0], raws[0]
    whole = codec.texts if kind == "text" else codec.images
    read: Callable[..., Any] = whole if tensor.name == encoded else codec.pixels
    binary: dict[str, bool] = {}
    classes = None
    for output in request.outputs or ():
        parameters = output.parameters or {}
        if "shared_memory_region" in parameters:
            raise InvalidRequest("Shared memory is not supported; take the outputs from the answer.")
        if output.name in binary:
            raise InvalidRequest("An output is asked for twice.")
        default = codec.flag(request.parameters, "binary_data_output", False)
        binary[output.name] = codec.flag(parameters, "binary_data", default)
        count = parameters.get("classification")
        if count is None:
            continue
        if output.name != "probabilities":
            raise InvalidRequest("`classification` is for the output `probabilities`.")
        if type(count) is not int or count < 1:
            raise InvalidRequest("`classification` is a number of classes, 1 or more.")
        classes = count
    return Asked(
        id=request.id,
        payloads=list(read(tensor, raw, most)),
        outputs=tuple(binary),
        binary=binary,
        binary_default=codec.flag(request.parameters, "binary_data_output", False),
        classes=classes,
        reject=_reject(request.parameters),
    )


def _reject(parameters: codec.Parameters) -> float | None:
    """What `?reject=` is under /v1."""
    value = (parameters or {}).get("reject")
    if value is None:
        return None
    if value == "off":
        return 0.0
    if type(value) is not float or not 0.001 <= value <= 0.5:
        raise InvalidRequest("The parameter `reject` is a share from 0.001 to 0.5, or off.")
    return value


def _check_outputs(asked: Asked, names: tuple[str, ...]) -> None:
    if set(asked.outputs) - set(names):
        raise InvalidRequest(f"An output is unknown; this model has {', '.join(names)}.")


async def _features(engine: Engine, asked: Asked) -> dict[str, np.ndarray]:
    _check_outputs(asked, ("features",))
    return {"features": await _embedded(engine, asked.payloads)}


async def _embedded(engine: Engine, payloads: list[Payload]) -> np.ndarray:
    embedded = await engine.embed(payloads, on_bad_image="fail")
    return np.stack([item for item in embedded.items if isinstance(item, np.ndarray)])


async def _predictions(
    engine: Engine, scope: Scope, task: str, asked: Asked, reject: float
) -> tuple[str, dict[str, np.ndarray]]:
    """The version that answered, and the outputs in the order in which they were asked for."""
    _check_outputs(asked, ("probabilities", "label", "known", "features"))
    found = await engine.classify(scope, task, asked.payloads, on_bad_image="fail")
    rows = [row for row in found.rows if isinstance(row, Answer)]
    known = [row.known for row in rows if row.known is not None]
    labels, rate = found.head.labels, reject if asked.reject is None else asked.reject
    engine.metrics.none_of_these.inc(found.none_of_these(rate))
    tensors: dict[str, np.ndarray] = {}
    for name in asked.outputs or ("probabilities", "label", *(["known"] if known else [])):
        if name == "probabilities":
            probabilities = np.stack([row.probabilities for row in rows])
            tensors[name] = (
                codec.classification(probabilities, labels, asked.classes) if asked.classes else probabilities
            )
        elif name == "label":
            told = [answers.prediction(index, row, labels, rate)["label"] for index, row in enumerate(rows)]
            tensors[name] = np.array([label or "" for label in told], object)
        elif name == "known" and not known:
            raise InvalidRequest("This model cannot tell `known`: the method of its task has no measure of it.")
        elif name == "known":
            tensors[name] = np.array(known, np.float32)
        else:
            tensors[name] = await _embedded(engine, asked.payloads)
    version = found.pointer.version if found.pointer else 0
    return str(version), tensors


async def _response(members: Mapping[str, Any], outputs: list[codec.Output], accept: str) -> Response:
    body, header_length = codec.answer(members, outputs)
    headers = {} if header_length is None else {codec.HEADER_LENGTH: str(header_length)}
    encoding = codec.encoding_for(accept)
    if encoding:
        body = await _aside(len(body) > LARGE, lambda: codec.pack(body, encoding))
        headers |= {"Content-Encoding": encoding, "Vary": "Accept-Encoding"}
    kind = "application/json" if header_length is None else "application/octet-stream"
    return Response(body, media_type=kind, headers=headers)


async def _aside(large: bool, work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work) if large else work()
