"""Stored values come back as they were, or not at all."""

from __future__ import annotations

import dataclasses
import json
import random
import struct
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from models.head import Affine, Head, HeadInvalid
from service.stores import Pointer, Record, SealBroken, Sealer
from tests.service.stores.values import DIM, make_head, make_record, same


def mutations(data: bytes, *, count: int, seed: int) -> list[bytes]:
    """Bytes flipped, cut, doubled, swapped and overwritten."""
    choose = random.Random(seed)
    found: list[bytes] = []
    while len(found) < count:
        changed = bytearray(data)
        at, length = choose.randrange(len(data)), choose.randint(1, 16)
        match choose.randrange(5):
            case 0:
                changed[at] ^= 1 << choose.randrange(8)
            case 1:
                del changed[at : at + length]
            case 2:
                changed[at:at] = changed[at : at + length]
            case 3:
                other = choose.randrange(len(data))
                changed[at], changed[other] = changed[other], changed[at]
            case 4:
                changed[at : at + length] = choose.randbytes(length)
        if changed != data:
            found.append(bytes(changed))
    return found


def test_records_and_pointers_survive_the_journey() -> None:
    for record in (make_record(1), make_record(2, way=5, expires=2e9), make_record(3, images=True)):
        assert same(Record.from_bytes(record.to_bytes()), record)
    nothing = dataclasses.replace(make_record(3), unlabelled=np.zeros((0, DIM), np.float16))
    assert same(Record.from_bytes(nothing.to_bytes()), nothing)
    assert Pointer.from_bytes(Pointer(7, "hd_7").to_bytes()) == Pointer(7, "hd_7")


def test_views_are_written_as_they_look() -> None:
    record, head = make_record(1), make_head(1)
    turned = dataclasses.replace(
        record, features=record.features[::-1].copy()[::-1], classes=record.classes[::-1][::-1]
    )
    assert same(Record.from_bytes(turned.to_bytes()), record)
    transposed = Head(
        Affine(np.asfortranarray(head.affine.weight), head.affine.bias),
        head.labels,
        head.shots,
        head.method,
        head.artifact,
    )
    assert same(Head.from_bytes(transposed.to_bytes()), head)


def test_a_stale_pointer_is_written_without_the_mark() -> None:
    assert Pointer.from_bytes(Pointer(7, "hd_7", stale=True).to_bytes()) == Pointer(7, "hd_7")


@pytest.mark.parametrize("data", [b"", b"{}", b"5", b"[1]", b"\xff"])
def test_bytes_that_are_no_pointer_or_record_are_refused(data: bytes) -> None:
    with pytest.raises(SealBroken):
        Record.from_bytes(data)
    with pytest.raises(SealBroken):
        Pointer.from_bytes(data)


def test_a_record_of_an_unknown_format_is_refused() -> None:
    with pytest.raises(SealBroken, match="fewshot-record-3"):
        Record.from_bytes(make_record().to_bytes().replace(b"fewshot-record-2", b"fewshot-record-3"))


def packed(text: dict[str, Any], arrays: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """What safetensors writes, by hand: arrays by name, each as its type, shape and bytes."""
    header: dict[str, Any] = {"__metadata__": {"record": json.dumps(text)}}
    body = b""
    for name, (dtype, shape, data) in arrays.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    start = json.dumps(header).encode()
    start += b" " * (-len(start) % 8)
    return struct.pack("<Q", len(start)) + start + body


TEXT = {
    "format": "fewshot-record-1",
    "artifact": "sha256:a",
    "method": "ridge",
    "labels": ["theta", "é✓"],
    "ids": ["ex_1", "ex_2"],
    "times": [1_700_000_000.25, None],
}
ARRAYS = {
    "classes": ("I32", [2], struct.pack("<2i", 0, 1)),
    "features": ("F16", [2, 3], struct.pack("<6e", 0.5, -1, 2, 0.25, 0, 8)),
    "unlabelled": ("F16", [0, 3], b""),
}
IMAGES = {"images": ("U8", [5], b"\0abc\xff"), "sizes": ("I64", [2], struct.pack("<2q", 4, 1))}


def test_a_record_of_the_first_format_is_read_without_images() -> None:
    expected = Record(
        artifact="sha256:a",
        method="ridge",
        labels=("theta", "é✓"),
        ids=("ex_1", "ex_2"),
        classes=np.array([0, 1], np.int32),
        features=np.array([[0.5, -1, 2], [0.25, 0, 8]], np.float16),
        unlabelled=np.zeros((0, 3), np.float16),
        created=1_700_000_000.25,
    )
    found = Record.from_bytes(packed(TEXT, ARRAYS))
    assert same(found, expected)
    assert found.images == ()
    written = found.to_bytes()  # and goes on in the second
    assert b"fewshot-record-2" in written
    assert same(Record.from_bytes(written), expected)


def test_images_are_cut_apart_by_their_sizes() -> None:
    found = Record.from_bytes(packed({**TEXT, "format": "fewshot-record-2"}, {**ARRAYS, **IMAGES}))
    assert found.images == (b"\0abc", b"\xff")


@pytest.mark.parametrize(
    "wrong",
    [
        {"sizes": ("I64", [2], struct.pack("<2q", 4, 2))},
        {"sizes": ("I64", [2], struct.pack("<2q", 3, 1))},
        {"sizes": ("I64", [2], struct.pack("<2q", 6, -1))},
        {"sizes": ("I64", [2], struct.pack("<2q", 2**62, 5 - 2**62))},
        {"sizes": ("I64", [1], struct.pack("<q", 5))},
        {"sizes": ("I64", [3], struct.pack("<3q", 4, 1, 0))},
        {"sizes": ("I64", [0], b"")},
        {"sizes": ("I64", [2, 1], struct.pack("<2q", 4, 1))},
        {"sizes": ("I64", [], struct.pack("<q", 5))},
        {"sizes": ("F64", [2], struct.pack("<2d", 4, 1))},
        {"images": ("I8", [5], b"12345")},
        {"images": ("U8", [1, 5], b"12345")},
        {"images": ("U8", [0], b"")},
        {"images": None},
        {"sizes": None},
    ],
)
def test_images_that_do_not_fit_their_sizes_are_refused(wrong: dict[str, Any]) -> None:
    arrays = {name: array for name, array in {**ARRAYS, **IMAGES, **wrong}.items() if array is not None}
    with pytest.raises(SealBroken):
        Record.from_bytes(packed({**TEXT, "format": "fewshot-record-2"}, arrays))


def test_some_images_without_the_others_are_not_written() -> None:
    record = make_record(1, images=True)
    with pytest.raises(ValueError, match="6 images for 7 ids"):
        dataclasses.replace(record, images=record.images[1:]).to_bytes()


def test_a_seal_opens_in_its_place_with_its_key_only() -> None:
    sealed = Sealer(b"key").seal(b"payload", "tenant", "head", "hd_1")
    assert Sealer(b"key").open(sealed, "tenant", "head", "hd_1") == b"payload"
    # The parts of a place cannot be moved into one another.
    for place in (("tenant", "head", "hd_2"), ("tenant", "record", "hd_1"), ("tenanthead", "hd_1"), ()):
        with pytest.raises(SealBroken):
            Sealer(b"key").open(sealed, *place)
    with pytest.raises(SealBroken):
        Sealer(b"other key").open(sealed, "tenant", "head", "hd_1")


def test_no_mutation_of_a_sealed_value_is_accepted() -> None:
    sealer = Sealer(b"key")
    for payload in (make_head().to_bytes(), make_record().to_bytes(), Pointer(3, "hd_1").to_bytes()):
        sealed = sealer.seal(payload, "tenant", "kind", "name")
        for mutated in mutations(sealed, count=500, seed=1):
            with pytest.raises(SealBroken):
                sealer.open(mutated, "tenant", "kind", "name")


def test_without_a_seal_some_mutations_would_be_accepted() -> None:
    # The control: if this stopped finding any, the test above would prove nothing.
    head = make_head()
    accepted = 0
    for mutated in mutations(head.to_bytes(), count=500, seed=1):
        with suppress(HeadInvalid):
            accepted += not same(Head.from_bytes(mutated), head)
    assert accepted > 50
