"""An experiment for deploy/variants.py: the service with decoding and the extractor in processes of their own.

Each lane hands its batch, as it came, to a process that was forked when the weights were loaded, so that all share one
copy of them, and waits for features. The interpreter of the service then has HTTP and answers to do and nothing else.
Not how the service is shipped: a process that dies here takes its lane with it.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from models import extractor_onnx
from models.artifact import Artifact
from models.errors import FewshotError
from models.images import ImageDecoder

CORES = os.cpu_count() or 1
decode = ImageDecoder.__call__


class Forked(extractor_onnx.OnnxExtractor):
    """Takes images as they came, in an array of objects; pixels, as at the start's check, it takes itself."""

    def __init__(self, artifact: Artifact, *, precision: str = "float32"):
        super().__init__(artifact, precision=precision)
        decoder = artifact.decoder()
        super().__call__(np.zeros((1, *decoder.shape), np.uint8))  # what is made at the first call is shared, too
        self.mine = threading.local()
        self.free: list[Connection] = []
        for _ in range(CORES):
            ours, theirs = Pipe()
            if os.fork() == 0:
                ours.close()
                self.serve(theirs, decoder)
            theirs.close()
            self.free.append(ours)

    def serve(self, connection: Connection, decoder: ImageDecoder) -> None:
        blank = np.zeros(decoder.shape, np.uint8)
        while True:
            try:
                message = connection.recv_bytes()
            except EOFError:
                os._exit(0)
            (count,) = struct.unpack_from("<I", message)
            at, pixels, bad = 4 + 4 * count, [], []
            for number, size in enumerate(struct.unpack_from(f"<{count}I", message, 4)):
                try:
                    pixels.append(decode(decoder, message[at : at + size]))
                except FewshotError:
                    pixels.append(blank)
                    bad.append(number)
                at += size
            features = super().__call__(np.stack(pixels))
            features[bad] = np.nan  # which the batcher takes for a failure of that image
            connection.send_bytes(features.tobytes())

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        if batch.dtype != object:
            return super().__call__(batch)
        if not hasattr(self.mine, "connection"):
            self.mine.connection = self.free.pop()
        images: list[bytes] = batch.tolist()
        sizes = struct.pack(f"<I{len(images)}I", len(images), *map(len, images))
        self.mine.connection.send_bytes(b"".join((sizes, *images)))
        return np.frombuffer(self.mine.connection.recv_bytes(), np.float32).reshape(len(images), self.dim)


def as_it_came(decoder: ImageDecoder, payload: bytes) -> Any:
    found = np.empty((), object)
    found[()] = payload
    return found


if __name__ == "__main__":
    extractor_onnx.OnnxExtractor = Forked  # type: ignore[misc]
    ImageDecoder.__call__ = as_it_came  # type: ignore[method-assign, assignment]
    from service.__main__ import main

    sys.exit(main())
