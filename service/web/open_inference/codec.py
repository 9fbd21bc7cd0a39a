"""Bytes of the Open Inference Protocol v2 <-> tensors: JSON, raw tensors behind it, compressed bodies, classifications.

Nothing that a request says of itself is believed: a size is held against the bytes that are there before anything of
that size is made, and what the JSON could become is counted before it is parsed. Whatever is wrong raises
InvalidRequest, TooLarge or UnsupportedMedia with a sentence. Knows nothing of tasks or routes.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.errors import InvalidRequest, TooLarge, UnsupportedMedia

HEADER_LENGTH = "Inference-Header-Content-Length"
WINDOW = {"gzip": 31, "deflate": 15}  # zlib's name for each encoding; deflate is zlib's format, as HTTP defines it


class Lenient(BaseModel):
    """Unknown fields are left alone: the protocol lets servers and clients add their own."""

    model_config = ConfigDict(frozen=True)


Parameters = dict[str, Any] | None
Size = Annotated[int, Field(ge=0, lt=2**31)]


class RequestInput(Lenient):
    name: str
    shape: Annotated[list[Size], Field(max_length=8)]
    datatype: str
    parameters: Parameters = None
    data: Any = None


class RequestOutput(Lenient):
    name: str
    parameters: Parameters = None


class InferRequest(Lenient):
    id: str | None = None
    parameters: Parameters = None
    inputs: Annotated[list[RequestInput], Field(max_length=16)]
    outputs: Annotated[list[RequestOutput], Field(max_length=16)] | None = None


IN_JSON = 2  # images whose pixels may stand in JSON: each number of it costs what many bytes do


@dataclass(frozen=True, slots=True)
class Most:
    """What one request may bring."""

    images: int
    pixels: tuple[int, ...]  # shape of one image given as pixels, or of one text given as bytes
    unpacked: int  # bytes of a compressed body
    text: int = 0  # characters of one text, each of which may be one that JSON counts by; 0 where images are read


class Output(NamedTuple):
    """A tensor to answer with: float32, or an object array of strings."""

    name: str
    array: np.ndarray
    binary: bool


# Bodies that are compressed.


def unpack(body: bytes, encoding: str, limit: int) -> bytes:
    """The body as it was before its Content-Encoding; never makes more than `limit` bytes of it."""
    if encoding not in WINDOW:
        raise UnsupportedMedia("The Content-Encoding is unknown here; gzip and deflate are understood.")
    stream = zlib.decompressobj(WINDOW[encoding])
    try:
        found = stream.decompress(body, limit + 1)
    except zlib.error:
        raise InvalidRequest(f"The body is not {encoding}, as its Content-Encoding says.") from None
    if len(found) > limit:
        raise TooLarge(f"The body unpacks to more bytes than the limit of {limit} (MAX_BODY_BYTES).")
    if not stream.eof or stream.unused_data:
        raise InvalidRequest(f"The {encoding} body is cut off, or something follows it.")
    return found


def encoding_for(accept: str) -> str | None:
    """The encoding of the answer that an Accept-Encoding asks for; None for none that we have."""
    asked = [part.replace(" ", "").split(";") for part in accept.lower().split(",")]
    names = {name for name, *rest in asked if not any(re.fullmatch(r"q=0(\.0*)?", item) for item in rest)}
    return next((encoding for encoding in WINDOW if encoding in names), None)


def pack(body: bytes, encoding: str) -> bytes:
    stream = zlib.compressobj(1, wbits=WINDOW[encoding])
    return stream.compress(body) + stream.flush()


# Requests.


def parse(body: bytes, header_length: str | None, most: Most) -> tuple[InferRequest, list[memoryview | None]]:
    """The JSON of a request and, for each of its inputs, the raw tensor behind it or None."""
    end = len(body)
    if header_length is not None:
        if not re.fullmatch(r"[0-9]{1,18}", header_length) or int(header_length) > len(body):
            raise InvalidRequest(f"{HEADER_LENGTH} is no number of bytes of this body.")
        end = int(header_length)
    request = _parse_json(body[:end], most)
    rest = memoryview(body)[end:]
    raws: list[memoryview | None] = []
    for index, tensor in enumerate(request.inputs):
        parameters = tensor.parameters or {}
        if "shared_memory_region" in parameters:
            raise InvalidRequest("Shared memory is not supported; send the tensor in the body.")
        size = parameters.get("binary_data_size")
        if size is None:
            raws.append(None)
            continue
        if header_length is None:
            raise InvalidRequest(f"Input {index} is binary, so the request needs the header {HEADER_LENGTH}.")
        if tensor.data is not None:
            raise InvalidRequest(f"Input {index} has both `data` and `binary_data_size`.")
        if type(size) is not int or not 0 <= size <= len(rest):
            raise InvalidRequest(f"`binary_data_size` of input {index} is no number of bytes that follow the JSON.")
        raws.append(rest[:size])
        rest = rest[size:]
    if len(rest):
        raise InvalidRequest(f"{len(rest)} bytes follow the JSON and belong to no input; see `binary_data_size`.")
    return request, raws


def _parse_json(text: bytes, most: Most) -> InferRequest:
    # Each comma may become a Python object and each bracket a large one, and nothing else in Python runs while they
    # are made: so both are counted first. What is allowed are the nested pixels of a few images, and some room.
    images = most.images if most.text else min(most.images, IN_JSON)
    values = max(math.prod(most.pixels), most.text)
    rows = max(sum(math.prod(most.pixels[:depth]) for depth in range(len(most.pixels))), most.text)
    if text.count(b",") > images * values + 1000 or text.count(b"[") + text.count(b"{") > images * rows + 1000:
        raise TooLarge(f"The JSON holds more values than {images} images have: send them encoded, or as binary data.")
    try:
        return InferRequest.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise InvalidRequest("The JSON of the request cannot be read.") from None
        where = ".".join(map(str, first["loc"]))  # names of ours and indices only: nothing below is looked into
        raise InvalidRequest(f"`{where}`: {first['msg']}." if where else f"{first['msg']}.") from None
    except (ValueError, RecursionError):
        raise InvalidRequest("The JSON of the request cannot be read.") from None


def texts(tensor: RequestInput, raw: memoryview | None, most: Most) -> list[bytes]:
    """The texts of a BYTES [n] tensor: raw, or strings in JSON."""
    found = _strings(tensor, raw, most, "strings")
    return [text if isinstance(text, bytes) else text.encode() for text in found]


def _strings(tensor: RequestInput, raw: memoryview | None, most: Most, kind: str) -> Sequence[bytes | str]:
    """The elements of a BYTES [n] tensor: bytes where it is raw, strings of the JSON else."""
    _expect(tensor, "BYTES", ())
    count = _count(tensor, most)
    if raw is not None:
        return _elements(raw, tensor.name, count)
    texts = _values(tensor, (count,))
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRequest(f"`data` of `{tensor.name}` holds something other than {kind}.")
    return texts


def images(tensor: RequestInput, raw: memoryview | None, most: Most) -> list[bytes]:
    """The encoded images of a BYTES [n] tensor: raw, or base64 in JSON."""
    found = []
    for index, text in enumerate(_strings(tensor, raw, most, "base64 strings")):
        if isinstance(text, bytes):
            found.append(text)
            continue
        if text.startswith("data:"):
            raise InvalidRequest("This is a data URL; send only what follows the comma.", index=index)
        try:
            found.append(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError):
            raise InvalidRequest("This is not base64.", index=index) from None
    return found


def _elements(raw: memoryview, name: str, count: int) -> list[bytes]:
    """Each element is its length, four bytes little-endian, and that many bytes."""
    found: list[bytes] = []
    at = 0
    while at < len(raw) and len(found) < count:
        size = int.from_bytes(raw[at : at + 4], "little")
        at += 4
        if at > len(raw) or size > len(raw) - at:
            raise InvalidRequest(f"Element {len(found)} of `{name}` is longer than the bytes that are there.")
        found.append(bytes(raw[at : at + size]))
        at += size
    if len(found) != count or at != len(raw):
        raise InvalidRequest(f"The binary data of `{name}` does not hold {count} elements, as its shape says.")
    return found


def pixels(tensor: RequestInput, raw: memoryview | None, most: Most) -> np.ndarray:
    """A UINT8 [n, *pixels] tensor."""
    _expect(tensor, "UINT8", most.pixels)
    shape = (_count(tensor, most), *most.pixels)
    if raw is None:
        try:
            raw = memoryview(bytes(_values(tensor, shape)))
        except (TypeError, ValueError):
            raise InvalidRequest(
                f"`data` of `{tensor.name}` holds something other than whole numbers to 255."
            ) from None
    if len(raw) != math.prod(shape):
        raise InvalidRequest(f"`{tensor.name}` has {len(raw)} bytes; its shape takes {math.prod(shape)}.")
    return np.frombuffer(raw, np.uint8).reshape(shape)


def _expect(tensor: RequestInput, datatype: str, shape: tuple[int, ...]) -> None:
    if tensor.datatype != datatype:
        raise InvalidRequest(f"`{tensor.name}` is of another datatype; it takes {datatype}.")
    if len(tensor.shape) != 1 + len(shape) or tuple(tensor.shape[1:]) != shape:
        wanted = ", ".join(map(str, (-1, *shape)))
        raise InvalidRequest(f"The shape of `{tensor.name}` is {tensor.shape}; it takes [{wanted}].")


def _count(tensor: RequestInput, most: Most) -> int:
    count = tensor.shape[0]
    if not count:
        raise InvalidRequest(f"`{tensor.name}` holds no {'text' if most.text else 'image'}.")
    if count > most.images:
        raise TooLarge(f"There are {count} images; the limit is {most.images} (MAX_QUERIES).")
    return count


def _values(tensor: RequestInput, shape: tuple[int, ...]) -> list[Any]:
    """The values of `data`, which is flat, or nested as the shape says."""
    data = tensor.data
    nested = isinstance(data, list) and bool(data) and isinstance(data[0], list)
    rows = [data]
    for size in shape if nested else (math.prod(shape),):
        if not all(isinstance(row, list) and len(row) == size for row in rows):
            raise InvalidRequest(f"`data` of `{tensor.name}` does not have the shape {tensor.shape}.")
        rows = list(chain.from_iterable(rows))
    return rows


def flag(parameters: Parameters, name: str, default: bool) -> bool:
    value = (parameters or {}).get(name, default)
    if not isinstance(value, bool):
        raise InvalidRequest(f"The parameter `{name}` is true or false.")
    return value


# Answers.


def classification(probabilities: np.ndarray, labels: Sequence[str], count: int) -> np.ndarray:
    """[n, way] -> [n, min(count, way)] of "value:index:label", highest first."""
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :count]
    texts = [
        [f"{row[index]:.6f}:{index}:{labels[index]}" for index in order]
        for row, order in zip(probabilities, best, strict=True)
    ]
    return np.array(texts, object).reshape(best.shape)


def answer(members: Mapping[str, Any], outputs: Sequence[Output]) -> tuple[bytes, int | None]:
    """The body, and where its JSON ends if raw tensors follow it."""
    described: list[dict[str, Any]] = []
    raws: list[bytes] = []
    for name, array, binary in outputs:
        text = array.dtype == object
        tensor: dict[str, Any] = {"name": name, "datatype": "BYTES" if text else "FP32", "shape": list(array.shape)}
        if binary:
            raw = _packed(array) if text else np.ascontiguousarray(array, "<f4").tobytes()
            tensor["parameters"] = {"binary_data_size": len(raw)}
            raws.append(raw)
        else:
            tensor["data"] = array.ravel().tolist()
        described.append(tensor)
    head = json.dumps({**members, "outputs": described}).encode()
    return b"".join([head, *raws]), len(head) if raws else None


def _packed(strings: np.ndarray) -> bytes:
    encoded = [text.encode() for text in strings.ravel()]
    return b"".join(chain.from_iterable((len(data).to_bytes(4, "little"), data) for data in encoded))
