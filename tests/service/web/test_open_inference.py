"""The Open Inference Protocol v2: its bytes held against hostile ones, its routes against its usual client."""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import json
import math
import re
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.routing import APIRoute
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import FewshotError, TooLarge
from models.images import ImageDecoder
from service.settings import PRETRAINED, Settings
from service.stores.memory import MemoryStore
from service.support import Limits
from service.web import problems
from service.web.app import VERSION, create_app
from service.web.open_inference import codec, create_router
from service.web.open_inference.routes import read_request
from tests.fakes import DIM, Failing, MeanColour, picture, tiny_artifact
from tests.service.live import served
from tests.service.test_main import started
from tests.service.web.asks import colours, text

ROOT = Path(__file__).resolve().parents[3]
SAMPLE = ROOT / "service" / "sample"
RED, BLUE = picture("red", seed=9), picture("blue", seed=9)
DECODER = ImageDecoder(16, 16, 3)
PIXELS = np.stack([DECODER(RED), DECODER(BLUE)])
INFER = "/v2/models/colours/infer"
MOST = codec.Most(images=3, pixels=(2, 2, 3), unpacked=10_000)


@pytest.fixture(scope="module", autouse=True)
def task(http: httpx.Client) -> None:
    answer = http.put("/v1/tasks/colours", files=colours("red", "green", "blue"))
    assert answer.status_code == 201, answer.text


def elements(*items: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(item)) + item for item in items)


def image_input(*images: bytes, **members: Any) -> dict[str, Any]:
    data = [text(image) for image in images]
    return {"name": "image", "datatype": "BYTES", "shape": [len(images)], "data": data, **members}


def pixels_input(pixels: np.ndarray = PIXELS, **members: Any) -> dict[str, Any]:
    data = pixels.ravel().tolist()
    return {"name": "pixels", "datatype": "UINT8", "shape": list(pixels.shape), "data": data, **members}


def ask(*inputs: dict[str, Any], **members: Any) -> dict[str, Any]:
    return {"inputs": list(inputs), **members}


def raw_body(request: dict[str, Any], *raws: bytes) -> tuple[bytes, dict[str, str]]:
    """A request with its tensors behind the JSON, and the header it needs."""
    for tensor, raw in zip(request["inputs"], raws, strict=True):
        tensor.pop("data", None)
        tensor["parameters"] = {"binary_data_size": len(raw), **tensor.get("parameters", {})}
    head = json.dumps(request).encode()
    return b"".join([head, *raws]), {codec.HEADER_LENGTH: str(len(head))}


def tensors(response: httpx.Response) -> dict[str, np.ndarray]:
    """The outputs of an answer, read by rules of the protocol that are written here a second time."""
    assert response.status_code == 200, response.text
    length = response.headers.get(codec.HEADER_LENGTH)
    head = response.content if length is None else response.content[: int(length)]
    rest = b"" if length is None else response.content[int(length) :]
    found = {}
    for output in json.loads(head)["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            values = output["data"]
        elif output["datatype"] == "FP32":
            values, rest = struct.unpack(f"<{size // 4}f", rest[:size]), rest[size:]
        else:
            raw, rest, values = rest[:size], rest[size:], []
            while raw:
                (count,) = struct.unpack("<I", raw[:4])
                values.append(raw[4 : 4 + count].decode())
                raw = raw[4 + count :]
        dtype = np.float32 if output["datatype"] == "FP32" else object
        found[output["name"]] = np.array(values, dtype).reshape(output["shape"])
    assert not rest
    return found


def refused(response: httpx.Response, status: int, words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert words in body["error"], body
    assert response.headers["x-request-id"]


# What there is.


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v2", "/v2/"])
def test_the_server_says_what_it_is_and_which_extensions_it_has(http: httpx.Client, path: str) -> None:
    assert http.get(path).json() == {
        "name": "fewshot",
        "version": VERSION,
        "extensions": ["binary_tensor_data", "classification"],
    }


def test_the_server_is_live_and_ready(http: httpx.Client) -> None:
    assert http.get("/v2/health/live").json() == {"live": True}
    assert http.get("/v2/health/ready").json() == {"live": True, "ready": True}


@pytest.mark.parametrize("model", ["colours", "extractor"])
def test_a_version_that_is_not_served_costs_no_work(http: httpx.Client, model: str) -> None:
    def looked_at() -> list[str]:
        return [line for line in http.get("/metrics").text.splitlines() if line.startswith("fewshot_images_total")]

    before = looked_at()
    for body in (ask(image_input(RED)), {}):
        refused(http.post(f"/v2/models/{model}/versions/7/infer", json=body), 404, "at version 1")
    assert looked_at() == before


@pytest.mark.parametrize("path", ["/v2/models/colours", "/v2/models/colours/versions/1"])
def test_a_task_is_a_model(http: httpx.Client, path: str) -> None:
    assert http.get(path).json() == {
        "name": "colours",
        "versions": ["1"],
        "platform": "fewshot",
        "inputs": [
            {"name": "image", "datatype": "BYTES", "shape": [-1]},
            {"name": "pixels", "datatype": "UINT8", "shape": [-1, 16, 16, 3]},
        ],
        "outputs": [
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]},
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
            {"name": "features", "datatype": "FP32", "shape": [-1, DIM]},
        ],
    }
    assert http.get(path + "/ready").json() == {"name": "colours", "ready": True}


def test_the_extractor_is_a_model_and_hides_a_task_of_that_name(http: httpx.Client) -> None:
    http.put("/v1/tasks/extractor", files=colours("red", "blue"))
    try:
        found = http.get("/v2/models/extractor").json()
        assert found["outputs"] == [{"name": "features", "datatype": "FP32", "shape": [-1, DIM]}]
        assert http.get("/v2/models/extractor/versions/1/ready").json() == {"name": "extractor", "ready": True}
        answer = http.post("/v2/models/extractor/infer", json=ask(image_input(RED, BLUE)))
        expected = MeanColour()(PIXELS)
        np.testing.assert_allclose(tensors(answer)["features"], expected, atol=1e-6)
        index = http.post("/v2/repository/index").json()
        assert [row["name"] for row in index] == ["colours", "extractor"]
        assert index[0] == {"name": "colours", "version": "1", "state": "READY", "reason": ""}
    finally:
        http.delete("/v1/tasks/extractor")


@pytest.mark.slow
def test_a_task_of_another_artifact_is_not_ready(tmp_path: Path) -> None:
    store = MemoryStore()
    for name, ready in (("tiny", True), ("other", False)):
        app = create_app(
            Settings(lanes=1), artifact=tiny_artifact(tmp_path, name=name), extractor=MeanColour(), store=store
        )
        with served(app) as client:
            if ready:
                client.put("/v1/tasks/colours", files=colours("red", "blue"))
            answer = client.get("/v2/models/colours/ready")
            assert answer.json() == {"name": "colours", "ready": ready}
            assert answer.status_code == (200 if ready else 503)
            if not ready:
                refused(client.post(INFER, json=ask(image_input(RED))), 409, "send its examples again")


# Inference.


def test_an_answer_is_that_of_the_other_routes(http: httpx.Client) -> None:
    answer = http.post(INFER, json=ask(image_input(RED, BLUE), id="mine"))
    body = answer.json()
    assert (body["model_name"], body["model_version"], body["id"]) == ("colours", "1", "mine")
    assert answer.headers["content-type"] == "application/json"
    found = tensors(answer)
    assert list(found) == ["probabilities", "label"]
    assert found["label"].tolist() == ["red", "blue"]
    rows = http.post("/v1/tasks/colours/classify", json={"images": [text(RED), text(BLUE)]}).json()["predictions"]
    labels = ["blue", "green", "red"]
    expected = [[row["probabilities"][label] for label in labels] for row in rows]
    np.testing.assert_allclose(found["probabilities"], expected, atol=1e-6)


def test_without_an_id_there_is_none_in_the_answer(http: httpx.Client) -> None:
    assert "id" not in http.post(INFER, json=ask(image_input(RED))).json()


def test_binary_and_json_tensors_give_the_same(http: httpx.Client) -> None:
    plain = tensors(http.post(INFER, json=ask(image_input(RED, BLUE))))
    body, headers = raw_body(ask(image_input(RED, BLUE), parameters={"binary_data_output": True}), elements(RED, BLUE))
    answer = http.post(INFER, content=body, headers=headers)
    assert answer.headers["content-type"] == "application/octet-stream"
    found = tensors(answer)
    np.testing.assert_array_equal(found["probabilities"], plain["probabilities"])
    assert found["label"].tolist() == plain["label"].tolist()


def test_an_output_may_be_binary_by_itself(http: httpx.Client) -> None:
    outputs = [
        {"name": "label"},
        {"name": "probabilities", "parameters": {"binary_data": True}},
    ]
    answer = http.post(INFER, json=ask(image_input(RED), outputs=outputs))
    head = json.loads(answer.content[: int(answer.headers[codec.HEADER_LENGTH])])
    assert head["outputs"][0]["data"] == ["red"]
    assert head["outputs"][1]["parameters"] == {"binary_data_size": 12}
    assert list(tensors(answer)) == ["label", "probabilities"]


@pytest.mark.parametrize("spelling", ["flat", "nested", "binary"])
def test_pixels_give_what_their_images_give(http: httpx.Client, spelling: str) -> None:
    expected = tensors(http.post(INFER, json=ask(image_input(RED, BLUE))))
    if spelling == "binary":
        body, headers = raw_body(ask(pixels_input()), PIXELS.tobytes())
        answer = http.post(INFER, content=body, headers=headers)
    else:
        data = PIXELS.tolist() if spelling == "nested" else PIXELS.ravel().tolist()
        answer = http.post(INFER, json=ask(pixels_input(data=data)))
    found = tensors(answer)
    np.testing.assert_array_equal(found["probabilities"], expected["probabilities"])
    assert found["label"].tolist() == ["red", "blue"]


def test_features_come_when_they_are_asked_for(http: httpx.Client) -> None:
    outputs = [{"name": "features"}, {"name": "label"}]
    found = tensors(http.post(INFER, json=ask(pixels_input(), outputs=outputs)))
    assert list(found) == ["features", "label"]
    np.testing.assert_allclose(found["features"], MeanColour()(PIXELS), atol=1e-6)


def test_classifications_are_the_largest_probabilities_as_text(http: httpx.Client) -> None:
    def asked(count: int) -> np.ndarray:
        outputs = [{"name": "probabilities", "parameters": {"classification": count}}]
        return tensors(http.post(INFER, json=ask(image_input(RED, BLUE), outputs=outputs)))["probabilities"]

    found = asked(2)
    assert found.shape == (2, 2)
    assert [row[0].split(":")[1:] for row in found] == [["2", "red"], ["0", "blue"]]
    values = [float(item.split(":")[0]) for item in found[0]]
    assert values == sorted(values, reverse=True)
    assert asked(99).shape == (2, 3)  # no more than there are
    np.testing.assert_allclose(sum(float(item.split(":")[0]) for item in asked(99)[0]), 1, atol=1e-5)


def test_unknown_fields_and_parameters_are_left_alone(http: httpx.Client) -> None:
    request = ask(image_input(RED, parameters={"content_type": "jpeg"}), parameters={"priority": 1}, model_name="x")
    assert tensors(http.post(INFER, json=request))["label"].tolist() == ["red"]


@pytest.mark.slow
def test_what_resembles_no_class_has_an_empty_label(tmp_path: Path) -> None:
    class Doubtful:
        """Finds every image as strange as two in a hundred genuine ones are."""

        def gauge(self, *_: Any, **__: Any) -> tuple[float, float]:
            return 0.0, 1.0

        def known(self, energies: np.ndarray, _: Any) -> np.ndarray:
            return np.full(len(energies), 0.02)

    artifact = tiny_artifact(tmp_path)
    manifest = dataclasses.replace(artifact.manifest, rejections={"prototype": Doubtful()})  # type: ignore[dict-item]
    artifact = dataclasses.replace(artifact, manifest=manifest)
    app = create_app(Settings(lanes=1), artifact=artifact, extractor=MeanColour(), store=MemoryStore())
    with served(app) as client:
        client.put("/v1/tasks/colours", files=colours("red", "blue"))
        assert "known" in [output["name"] for output in client.get("/v2/models/colours").json()["outputs"]]
        for reject, label in ((None, ""), (0.01, "red"), ("off", "red"), (0.03, "")):
            found = tensors(client.post(INFER, json=ask(image_input(RED), parameters={"reject": reject})))
            assert found["label"].tolist() == [label]
            np.testing.assert_allclose(found["known"], [0.02])
        assert "fewshot_none_of_these_total 2.0" in client.get("/metrics").text.splitlines()


# Bodies that are compressed.


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_bodies_may_be_compressed(http: httpx.Client, encoding: str, pack: Any) -> None:
    body, headers = raw_body(ask(pixels_input()), PIXELS.tobytes())
    headers |= {"Content-Encoding": encoding, "Accept-Encoding": encoding}
    answer = http.post(INFER, content=pack(body), headers=headers)
    assert answer.headers["content-encoding"] == encoding
    assert tensors(answer)["label"].tolist() == ["red", "blue"]


@pytest.mark.parametrize("encoding", ["", "identity", "Identity"])
def test_bodies_may_say_that_they_are_not_compressed(http: httpx.Client, encoding: str) -> None:
    body, headers = raw_body(ask(pixels_input()), PIXELS.tobytes())
    answer = http.post(INFER, content=body, headers={**headers, "Content-Encoding": encoding})
    assert tensors(answer)["label"].tolist() == ["red", "blue"]


@pytest.mark.parametrize(
    ("accept", "encoding"),
    [
        ("", None),
        ("br", None),
        ("identity", None),
        ("deflate, gzip;q=0.5", "gzip"),
        ("GZIP", "gzip"),
        ("gzip;q=0, deflate", "deflate"),
        ("gzip; q=0.0", None),
        (";;,=,q=0", None),
    ],
)
def test_an_answer_is_compressed_only_as_the_client_accepts(accept: str, encoding: str | None) -> None:
    assert codec.encoding_for(accept) == encoding


def test_a_compressed_body_may_not_be_larger_than_a_plain_one(http: httpx.Client) -> None:
    bomb = gzip.compress(bytes(400_001))
    assert len(bomb) < 1000
    refused(http.post(INFER, content=bomb, headers={"Content-Encoding": "gzip"}), 413, "MAX_BODY_BYTES")


@pytest.mark.parametrize(
    ("encoding", "body", "status", "words"),
    [
        ("gzip", b"{}", 400, "not gzip"),
        ("deflate", gzip.compress(b"{}", mtime=0), 400, "not deflate"),
        ("gzip", gzip.compress(b"{}" * 100, mtime=0)[:-9], 400, "cut off"),
        ("gzip", gzip.compress(b"{}", mtime=0) + b"more", 400, "follows"),
        ("gzip, gzip", b"", 415, "gzip and deflate"),
        ("br", b"", 415, "gzip and deflate"),
    ],
)
def test_a_body_that_is_not_compressed_as_it_says(
    http: httpx.Client, encoding: str, body: bytes, status: int, words: str
) -> None:
    refused(http.post(INFER, content=body, headers={"Content-Encoding": encoding}), status, words)


# Requests that cannot be answered.

LABEL = {"name": "label"}
WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": (b"hello", "cannot be read"),
    "half a JSON": (b'{"inputs": [', "cannot be read"),
    "deep JSON": (b'{"inputs": [' + b"[" * 900, "cannot be read"),
    "a list": ([], "object"),
    "no inputs": ({}, "`inputs`"),
    "no input": (ask(), "one input"),
    "an unknown input": (ask(image_input(RED, name="photo")), "`image`"),
    "two inputs": (ask(image_input(RED), pixels_input()), "one input"),
    "no datatype": (ask({"name": "image", "shape": [1], "data": []}), "datatype"),
    "an unknown datatype": (ask(image_input(RED, datatype="STRING")), "BYTES"),
    "another datatype": (ask(pixels_input(datatype="FP32")), "UINT8"),
    "no shape": (ask({"name": "image", "datatype": "BYTES", "data": []}), "shape"),
    "an empty shape": (ask(image_input(RED, shape=[])), "[-1]"),
    "a shape of two": (ask(image_input(RED, shape=[1, 1])), "[-1]"),
    "many dimensions": (ask(image_input(RED, shape=[1] * 1000)), "8 items"),
    "a negative size": (ask(image_input(RED, shape=[-1])), "shape"),
    "a broken size": (ask(image_input(RED, shape=[1.5])), "shape"),
    "a size of text": (ask(image_input(RED, shape=["1"])), "shape"),
    "a size that is true": (ask(image_input(RED, shape=[True])), "shape"),
    "a huge size": (ask(image_input(RED, shape=[10**30])), "shape"),
    "a NaN": (b'{"inputs": [{"name": "image", "datatype": "BYTES", "shape": [NaN], "data": []}]}', "shape"),
    "no image": (ask(image_input()), "no image"),
    "fewer images than said": (ask(image_input(RED, shape=[2])), "shape"),
    "more images than said": (ask(image_input(RED, BLUE, shape=[1])), "shape"),
    "no data": (ask(image_input(RED, data=None)), "shape"),
    "data of one text": (ask(image_input(RED, data="QUJD")), "shape"),
    "data of numbers": (ask(image_input(RED, data=[1])), "base64 strings"),
    "no base64": (ask(image_input(RED, data=["?"])), "Image 0: This is not base64"),
    "a data URL": (ask(image_input(RED, data=["data:image/png;base64,"])), "comma"),
    "pixels of another size": (ask(pixels_input(np.zeros((1, 16, 17, 3), np.uint8))), "[-1, 16, 16, 3]"),
    "pixels that overflow": (ask(pixels_input(data=[256] * PIXELS.size)), "whole numbers"),
    "negative pixels": (ask(pixels_input(data=[-1] * PIXELS.size)), "whole numbers"),
    "broken pixels": (ask(pixels_input(data=[0.5] * PIXELS.size)), "whole numbers"),
    "pixels of text": (ask(pixels_input(data=["1"] * PIXELS.size)), "whole numbers"),
    "too few pixels": (ask(pixels_input(data=[1])), "shape"),
    "ragged pixels": (ask(pixels_input(data=[PIXELS[0].tolist(), [1]])), "shape"),
    "an unknown output": (ask(image_input(RED), outputs=[{"name": "logits"}]), "probabilities, label, known, features"),
    "an output twice": (ask(image_input(RED), outputs=[LABEL, LABEL]), "twice"),
    "known without a measure": (ask(image_input(RED), outputs=[{"name": "known"}]), "known"),
    "very many outputs": (ask(image_input(RED), outputs=[LABEL] * 1000), "16 items"),
    "classes of a label": (
        ask(image_input(RED), outputs=[{**LABEL, "parameters": {"classification": 1}}]),
        "`probabilities`",
    ),
    "no classes": (
        ask(image_input(RED), outputs=[{"name": "probabilities", "parameters": {"classification": 0}}]),
        "1 or more",
    ),
    "classes of text": (
        ask(image_input(RED), outputs=[{"name": "probabilities", "parameters": {"classification": "3"}}]),
        "1 or more",
    ),
    "a flag of text": (ask(image_input(RED), parameters={"binary_data_output": "yes"}), "true or false"),
    "parameters of text": (ask(image_input(RED), parameters="yes"), "parameters"),
    "a reject of two": (ask(image_input(RED), parameters={"reject": 2.0}), "`reject`"),
    "an id of numbers": (ask(image_input(RED), id=7), "`id`"),
    "shared memory": (ask(image_input(RED, parameters={"shared_memory_region": "r"})), "Shared memory"),
    "shared memory out": (
        ask(image_input(RED), outputs=[{**LABEL, "parameters": {"shared_memory_region": "r"}}]),
        "Shared memory",
    ),
    "binary without the header": (ask(image_input(RED, parameters={"binary_data_size": 5})), codec.HEADER_LENGTH),
    "no picture": (ask(image_input(RED, b"hello")), "Image 1: This is not an image"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_malformed_request_is_a_400_with_a_sentence(http: httpx.Client, name: str) -> None:
    body, words = WRONG[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    refused(http.post(INFER, content=content), 400, words)


SIZES: dict[str, tuple[Any, bytes, str]] = {
    "more than there is": (100, elements(b"x"), "no number of bytes"),
    "negative": (-1, b"", "no number of bytes"),
    "broken": (1.5, elements(b"x"), "no number of bytes"),
    "not a number": (math.nan, b"", "no number of bytes"),
    "true": (True, b"x", "no number of bytes"),
    "huge": (2**70, b"x", "no number of bytes"),
    "less than there is": (5, elements(b"x") + b"more", "4 bytes follow"),
    "half an element": (3, b"\1\0\0", "longer"),
    "an overlong element": (5, b"\xff\xff\xff\xff1", "longer"),
    "no element": (0, b"", "does not hold 1 elements"),
    "two elements": (10, elements(b"x", b"y"), "does not hold 1 elements"),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_binary_tensor_is_held_to_the_bytes_that_are_there(http: httpx.Client, name: str) -> None:
    size, raw, words = SIZES[name]
    body, headers = raw_body(ask(image_input(RED, parameters={"binary_data_size": size})), raw)
    refused(http.post(INFER, content=body, headers=headers), 400, words)


def test_binary_pixels_are_as_many_as_the_shape_says(http: httpx.Client) -> None:
    body, headers = raw_body(ask(pixels_input()), PIXELS.tobytes()[1:])
    refused(http.post(INFER, content=body, headers=headers), 400, "its shape takes 1536")


def test_a_tensor_is_either_in_the_json_or_behind_it(http: httpx.Client) -> None:
    head = json.dumps(ask(image_input(RED, parameters={"binary_data_size": 5}))).encode()
    headers = {codec.HEADER_LENGTH: str(len(head))}
    refused(http.post(INFER, content=head + elements(b"x"), headers=headers), 400, "both")


@pytest.mark.parametrize("length", ["-1", "NaN", "", "1e3", "+2", "99999999", "9" * 5000, "0x10", "\u0662".encode()])
def test_the_length_of_the_json_is_a_number_of_bytes_of_the_body(http: httpx.Client, length: str | bytes) -> None:
    raw = length.encode() if isinstance(length, str) else length
    headers = [(codec.HEADER_LENGTH.encode(), raw)]
    refused(http.post(INFER, json=ask(image_input(RED)), headers=headers), 400, codec.HEADER_LENGTH)


def test_the_limits_are_those_of_the_other_routes(http: httpx.Client) -> None:
    refused(http.post(INFER, json=ask(image_input(*[RED] * 9))), 413, "MAX_QUERIES")
    refused(http.post(INFER, content=b"[" + b"1," * 20_000), 413, "as binary data")
    refused(http.post(INFER, content=b"[" * 100_000), 413, "as binary data")
    refused(http.post(INFER, content=bytes(400_001)), 413, "MAX_BODY_BYTES")
    refused(http.post(INFER, json=ask(image_input(bytes(200_001)))), 413, "MAX_EXAMPLE_BYTES")


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/v2/models/nobody", 404, "no task 'nobody'"),
        ("GET", "/v2/models/nobody/ready", 404, "no task 'nobody'"),
        ("POST", "/v2/models/nobody/infer", 404, "no task 'nobody'"),
        ("GET", "/v2/models/colours/versions/2", 404, "at version 1"),
        ("GET", "/v2/models/colours/versions/2/ready", 404, "at version 1"),
        ("POST", "/v2/models/colours/versions/2/infer", 404, "at version 1"),
        ("POST", "/v2/models/extractor/versions/2/infer", 404, "at version 1"),
        ("GET", "/v2/models/colours/versions/01", 404, "at version 1"),
        ("GET", "/v2/nothing", 404, "Not Found"),
        ("DELETE", "/v2/models/colours", 405, "Method Not Allowed"),
        ("GET", INFER, 405, "Method Not Allowed"),
    ],
)
def test_what_is_not_there(http: httpx.Client, method: str, path: str, status: int, words: str) -> None:
    answer = http.request(method, path, json=ask(image_input(RED)) if method == "POST" else None)
    refused(answer, status, words)
    if status == 405:
        assert answer.headers["allow"] in ("GET, HEAD", "POST")


def test_the_current_version_is_served_by_its_number(http: httpx.Client) -> None:
    http.put("/v1/tasks/moving", files=colours("red", "blue"))
    http.put("/v1/tasks/moving", files=colours("red", "green"))
    try:
        answer = http.post("/v2/models/moving/versions/2/infer", json=ask(image_input(RED)))
        assert answer.json()["model_version"] == "2"
        refused(http.post("/v2/models/moving/versions/1/infer", json=ask(image_input(RED))), 404, "at version 2")
    finally:
        http.delete("/v1/tasks/moving")


@pytest.mark.slow
def test_a_failure_of_ours_is_an_error_of_this_protocol_too(tmp_path: Path) -> None:
    app = create_app(Settings(lanes=1), artifact=tiny_artifact(tmp_path), extractor=Failing(), store=MemoryStore())
    with served(app) as client:
        refused(client.post("/v2/models/extractor/infer", json=ask(image_input(RED))), 500, "extractor failed")


@pytest.mark.parametrize(
    ("path", "protocol"),
    [("/v2", True), ("/v2/x", True), ("/v2x", False), ("/v1/tasks", False), ("/", False), ("/v1/v2/x", False)],
)
def test_the_dialect_of_an_error_follows_the_path(path: str, protocol: bool) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError

    problem = problems.problem(422, "busy", "Busy", "Try again.", request_id="r", headers={"Retry-After": "1"}, index=3)
    asyncio.run(problem({"type": "http", "path": path}, receive, send))
    headers = dict(sent[0]["headers"])
    assert headers[b"retry-after"] == b"1"
    assert int(headers[b"content-length"]) == len(sent[1]["body"])
    body = json.loads(sent[1]["body"])
    if protocol:
        assert (sent[0]["status"], body) == (400, {"error": "Image 3: Try again."})
        assert headers[b"content-type"] == b"application/json"
    else:
        assert (sent[0]["status"], body["code"], body["index"]) == (422, "busy", 3)
        assert headers[b"content-type"] == b"application/problem+json"


# The codec against whatever may come.

thorough = settings(deadline=None, max_examples=60, database=None)

SIZE = st.one_of(st.integers(-2, 20), st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=3))
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-1, 256), st.floats(), st.text(max_size=8), st.just("QUJD")),
    lambda inner: st.lists(inner, max_size=13) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=8,
)
NAMED = st.sampled_from(["image", "pixels", "probabilities", "label", "features", "known", "x"])
PARAMETERS = st.one_of(
    VALUE,
    st.fixed_dictionaries(
        {}, optional={"binary_data_size": SIZE, "binary_data": VALUE, "classification": SIZE, "reject": SIZE}
    ),
)
TENSOR = st.fixed_dictionaries(
    {
        "name": NAMED,
        "datatype": st.sampled_from(["BYTES", "UINT8", "FP32", ""]),
        "shape": st.one_of(st.just([1]), st.just([1, 2, 2, 3]), st.lists(SIZE, max_size=5), VALUE),
    },
    optional={"data": VALUE, "parameters": PARAMETERS},
)
OUTPUT = st.fixed_dictionaries({"name": NAMED}, optional={"parameters": PARAMETERS})
REQUEST = st.fixed_dictionaries(
    {"inputs": st.lists(TENSOR, max_size=2) | VALUE},
    optional={"id": VALUE, "parameters": PARAMETERS, "outputs": st.lists(OUTPUT, max_size=3) | VALUE},
)


def read(body: bytes, header_length: str | None, encoding: str = "") -> None:
    """Reads a request: it is good, or refused with a sentence."""
    try:
        asked = read_request(codec.unpack(body, encoding, MOST.unpacked) if encoding else body, header_length, MOST)
    except FewshotError as error:
        sentence = error.detail
    else:
        sentence = "Good."
        assert 1 <= len(asked.payloads) <= MOST.images
        for payload in asked.payloads:
            assert isinstance(payload, bytes) or (payload.shape, payload.dtype) == (MOST.pixels, np.uint8)
    assert re.fullmatch(r"[A-Z`0-9].*\.", sentence, re.DOTALL), sentence


@pytest.mark.slow
@thorough
@given(REQUEST, st.binary(max_size=40), st.integers(-3, 3), st.booleans())
def test_no_request_of_the_protocols_make_breaks_the_codec(
    request: Any, raw: bytes, shift: int, announced: bool
) -> None:
    head = json.dumps(request).encode()
    read(head + raw if announced else head, str(len(head) + shift) if announced else None)


@thorough
@given(st.binary(max_size=200), st.none() | st.text(max_size=6), st.sampled_from(["", "gzip", "deflate", "br"]))
def test_no_bytes_break_the_codec(body: bytes, header_length: str | None, encoding: str) -> None:
    read(body, header_length, encoding)


@thorough
@given(st.data())
def test_no_damage_to_a_good_request_breaks_the_codec(data: st.DataObject) -> None:
    body, headers = raw_body(ask(image_input(b"one", b"two")), elements(b"one", b"two"))
    read(body, headers[codec.HEADER_LENGTH])
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    read(bytes(damaged), headers[codec.HEADER_LENGTH])


@thorough
@given(st.lists(st.binary(max_size=30), min_size=1, max_size=3))
def test_encoded_images_are_read_as_they_were_written(images: list[bytes]) -> None:
    body, headers = raw_body(ask(image_input(*images)), elements(*images))
    assert read_request(body, headers[codec.HEADER_LENGTH], MOST).payloads == images
    plain = json.dumps(ask(image_input(*images))).encode()
    assert read_request(codec.unpack(zlib.compress(plain), "deflate", MOST.unpacked), None, MOST).payloads == images


@thorough
@given(st.lists(st.text(max_size=20), max_size=5), st.booleans())
def test_strings_are_written_as_they_are(labels: list[str], binary: bool) -> None:
    labels = [label.encode(errors="replace").decode() for label in labels]
    body, length = codec.answer({}, [codec.Output("label", np.array(labels, object), binary)])
    headers = {} if length is None else {codec.HEADER_LENGTH: str(length)}
    assert tensors(httpx.Response(200, content=body, headers=headers))["label"].tolist() == labels


def test_too_many_images_are_refused_before_they_are_read() -> None:
    with pytest.raises(TooLarge, match="MAX_QUERIES"):
        read_request(json.dumps(ask(image_input(*[b""] * 4, data=["?"]))).encode(), None, MOST)


@pytest.mark.slow
def test_a_bomb_is_never_unpacked() -> None:
    bomb = zlib.compress(bytes(30_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            codec.unpack(bomb, "deflate", 100_000)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


# The usual client, as it is installed.

LETTERS = ("alpha", "omega", "theta")
QUESTIONS = [(SAMPLE / letter / "9.png").read_bytes() for letter in LETTERS]


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A real extractor on a port, with a task of three Greek letters."""
    folder = tmp_path_factory.mktemp("data")
    with served(create_app(Settings(artifact=PRETRAINED / "characters", data_dir=folder, lanes=1))) as client:
        files = [(letter, (SAMPLE / letter / f"{n}.png").read_bytes()) for letter in LETTERS for n in (1, 2, 3, 4, 5)]
        answer = client.put("/v1/tasks/letters", files=files)
        assert answer.status_code == 201, answer.text
        yield client


@pytest.fixture
def triton(letters: httpx.Client) -> Iterator[Any]:
    from tritonclient import http

    with http.InferenceServerClient(f"{letters.base_url.host}:{letters.base_url.port}") as client:
        yield client


def triton_input(name: str, array: np.ndarray, *, binary: bool = True) -> Any:
    from tritonclient import http

    given = http.InferInput(name, list(array.shape), "BYTES" if array.dtype == object else "UINT8")
    return given.set_data_from_numpy(array, binary_data=binary)


def triton_images(*, binary: bool = True) -> Any:
    images = QUESTIONS if binary else [text(image) for image in QUESTIONS]
    return triton_input("image", np.array(images, object), binary=binary)


@pytest.mark.slow
def test_tritonclient_finds_server_and_models(triton: Any) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.get_server_metadata()["extensions"] == ["binary_tensor_data", "classification"]
    for name in ("letters", "extractor"):
        assert triton.is_model_ready(name)
        assert triton.is_model_ready(name, "1")
        assert not triton.is_model_ready(name, "2")
    assert not triton.is_model_ready("nobody")
    found = triton.get_model_metadata("letters")
    assert found == triton.get_model_metadata("letters", "1")
    assert found["inputs"][1] == {"name": "pixels", "datatype": "UINT8", "shape": [-1, 28, 28, 1]}
    assert found["outputs"][0] == {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]}
    assert [row["name"] for row in triton.get_model_repository_index()] == ["extractor", "letters"]


@pytest.mark.slow
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_infers(letters: httpx.Client, triton: Any, binary: bool, compression: str | None) -> None:
    from tritonclient import http

    named = [http.InferRequestedOutput(name, binary_data=binary) for name in ("label", "probabilities", "features")]
    packed = {"request_compression_algorithm": compression, "response_compression_algorithm": compression}
    files = [("image", image) for image in QUESTIONS]
    expected = letters.post("/v1/tasks/letters/classify?reject=off", files=files).json()["predictions"]
    for outputs in (None, named):
        answer = triton.infer(
            "letters",
            [triton_images(binary=binary)],
            outputs=outputs,
            request_id="mine",
            parameters={"reject": "off"},
            **packed,
        )
        body = answer.get_response()
        assert (body["id"], body["model_name"], body["model_version"]) == ("mine", "letters", "1")
        labels = [item.decode() if isinstance(item, bytes) else item for item in answer.as_numpy("label")]
        assert labels == list(LETTERS)
        probabilities = answer.as_numpy("probabilities")
        assert probabilities.dtype == np.float32
        np.testing.assert_allclose(probabilities, [list(row["probabilities"].values()) for row in expected], atol=1e-5)
    assert answer.as_numpy("features").shape == (3, 256)


@pytest.mark.slow
def test_tritonclient_gets_the_same_from_pixels(triton: Any) -> None:
    decoder = ImageDecoder(28, 28, 1)
    pixels = np.stack([decoder(image) for image in QUESTIONS])
    expected = triton.infer("letters", [triton_images()]).as_numpy("probabilities")
    features = triton.infer("extractor", [triton_images()]).as_numpy("features")
    for binary in (True, False):
        given = triton_input("pixels", pixels, binary=binary)
        np.testing.assert_allclose(
            triton.infer("letters", [given], model_version="1").as_numpy("probabilities"), expected, atol=1e-5
        )
        np.testing.assert_allclose(triton.infer("extractor", [given]).as_numpy("features"), features, atol=1e-5)


@pytest.mark.slow
def test_tritonclient_gets_classifications(triton: Any) -> None:
    from tritonclient import http

    outputs = [http.InferRequestedOutput("probabilities", class_count=3)]
    found = triton.infer("letters", [triton_images()], outputs=outputs).as_numpy("probabilities")
    assert found.shape == (3, 3)
    for row, letter in zip(found, LETTERS, strict=True):
        value, index, label = row[0].decode().split(":")
        assert (label, LETTERS[int(index)]) == (letter, letter)
        assert 0.3 < float(value) <= 1


@pytest.mark.slow
def test_tritonclient_raises_our_sentences(triton: Any) -> None:
    from tritonclient import http
    from tritonclient.utils import InferenceServerException

    images, unknown = triton_images(), [http.InferRequestedOutput("logits")]
    hello, flat = triton_input("image", np.array([b"hello"], object)), triton_input("pixels", np.zeros((1, 2), "u1"))
    for words, status, call in [
        ("no task 'nobody'", "404", lambda: triton.infer("nobody", [images])),
        ("no task 'nobody'", "404", lambda: triton.get_model_metadata("nobody")),
        ("at version 1", "404", lambda: triton.infer("letters", [images], model_version="7")),
        ("output is unknown", "400", lambda: triton.infer("letters", [images], outputs=unknown)),
        ("Image 0: This is not an image", "400", lambda: triton.infer("letters", [hello])),
        ("[-1, 28, 28, 1]", "400", lambda: triton.infer("letters", [flat])),
    ]:
        with pytest.raises(InferenceServerException) as raised:
            call()
        assert words in raised.value.message()
        assert raised.value.status() == status


# The page about all this.


@pytest.mark.slow
def test_the_examples_of_the_page_run_as_they_are_written(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "open-inference.md").read_text()
    blocks = re.findall(r"```(sh|python)\n(.*?)```", page, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["sh", "sh", "python"]
    said = []
    with started(tmp_path) as (_, address, _said):
        for kind, block in blocks:
            block = block.replace("localhost:8000", address.removeprefix("http://"))
            program = ["bash", "-euo", "pipefail", "-c", block] if kind == "sh" else [sys.executable, "-c", block]
            done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, (block, done.stderr)
            said.append(done.stdout)
    assert json.loads(said[1])["outputs"][1]["data"] == ["theta"]
    assert said[2].split() == ["theta"]


def test_the_page_names_every_route(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "open-inference.md").read_text()
    engine: Any = SimpleNamespace(artifact=tiny_artifact(tmp_path), limits=Limits())
    router = create_router(engine, version="", max_body_bytes=1, reject=0.05)
    paths = {route.path for route in router.routes if isinstance(route, APIRoute)}
    assert len(paths) == 11
    assert not {path for path in paths if f"`{path}`" not in page}
