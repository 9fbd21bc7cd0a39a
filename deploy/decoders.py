"""Ways to get from a JPEG to the pixels of the extractor: what each costs, and how far its pixels are from exact ones.

    python deploy/decoders.py
    python deploy/decoders.py --edge 224 --width 1600 --height 1200

Exact is every pixel decoded, then averaged down. The others let the decoder scale by halves, eighths of its blocks at
no cost, and differ in who decodes and how small it may get before the rest is averaged. Thread CPU of one thread, the
quickest of many rounds, and for comparison a forward pass of the extractor. OpenCV and simplejpeg take part where they
are installed (pip install opencv-python-headless simplejpeg); the service needs neither. Prints a table and, last, one
JSON line.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "deploy")]

from parts import cost  # noqa: E402

from models.artifact import Artifact  # noqa: E402
from models.images import ImageDecoder  # noqa: E402

Way = Callable[[bytes], np.ndarray]


def photographs(count: int, width: int, height: int) -> list[bytes]:
    """JPEGs with structure at all scales, noise included."""
    rng = np.random.default_rng(0)
    out = []
    for _ in range(count):
        image = np.zeros((height, width, 3))
        for cells in (4, 16, 64, 256):
            coarse = Image.fromarray(rng.integers(0, 255, (cells, cells, 3), dtype=np.uint8))
            image += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float) / 4
        image += rng.normal(0, 4, image.shape)
        file = io.BytesIO()
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        out.append(file.getvalue())
    return out


def pillow(edge: int, keep: int | None) -> Way:
    """`keep`: at least so many times the edge is decoded; None: all of it."""

    def way(data: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(data))
        if keep is not None:
            image.draft(None, (keep * edge, keep * edge))
        return middle(np.asarray(image), lambda square: resized(square, edge))

    return way


def resized(square: np.ndarray, edge: int) -> np.ndarray:
    return np.asarray(Image.fromarray(square).resize((edge, edge), Image.Resampling.BILINEAR))


def middle(pixels: np.ndarray, resize: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The square in the middle, at the extractor's size."""
    height, width, _ = pixels.shape
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    return resize(np.ascontiguousarray(pixels[top : top + short, left : left + short]))


def opencv(cv2: Any, edge: int, keep: int | None, size: tuple[int, int]) -> Way:
    by = 1
    while keep is not None and by < 8 and min(size) // (2 * by) >= keep * edge:
        by *= 2
    flag = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4}.get(
        by, cv2.IMREAD_REDUCED_COLOR_8
    )

    def way(data: bytes) -> np.ndarray:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag)[:, :, ::-1]
        return middle(pixels, lambda square: cv2.resize(square, (edge, edge), interpolation=cv2.INTER_AREA))

    return way


def simplejpeg(module: Any, cv2: Any, edge: int, keep: int) -> Way:
    def way(data: bytes) -> np.ndarray:
        pixels = module.decode_jpeg(data, "RGB", min_height=keep * edge, min_width=keep * edge)
        return middle(pixels, lambda square: cv2.resize(square, (edge, edge), interpolation=cv2.INTER_AREA))

    return way


def ways(edge: int, size: tuple[int, int]) -> dict[str, Way]:
    found: dict[str, Way] = {
        "Pillow, every pixel": pillow(edge, None),
        "Pillow, scaled to twice the edge or more": pillow(edge, 2),
        "Pillow, scaled to the edge or more": pillow(edge, 1),
        "the service: the second of these, with all its checks": ImageDecoder(edge, edge, 3),
    }
    try:
        cv2 = import_module("cv2")
    except ImportError:
        return found
    found["OpenCV, every pixel"] = opencv(cv2, edge, None, size)
    found["OpenCV, scaled to twice the edge or more"] = opencv(cv2, edge, 2, size)
    found["OpenCV, scaled to the edge or more"] = opencv(cv2, edge, 1, size)
    with suppress(ImportError):
        found["simplejpeg and OpenCV, scaled to twice the edge or more"] = simplejpeg(
            import_module("simplejpeg"), cv2, edge, 2
        )
    return found


def compare(edge: int, width: int, height: int) -> list[dict[str, Any]]:
    files = photographs(4, width, height)
    exact = [pillow(edge, None)(data).astype(float) for data in files]
    rows = []
    for name, way in ways(edge, (width, height)).items():
        quickest, median = cost(lambda way=way: [way(data) for data in files])  # type: ignore[misc]
        apart = float(np.mean([np.abs(way(data) - true).mean() for data, true in zip(files, exact, strict=True)]))
        rows.append(
            {
                "way": name,
                "ms": round(quickest / 1e3 / len(files), 3),
                "median_ms": round(median / 1e3 / len(files), 3),
                "difference": round(apart, 2),
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    edge = Artifact.load(ROOT / "models" / "pretrained" / "photos").decoder().shape[0]
    parser.add_argument("--edge", type=int, default=edge, help="of the extractor's square")
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=480)
    given = parser.parse_args(arguments)
    rows = compare(given.edge, given.width, given.height)
    print(f"{given.width} x {given.height} to {given.edge} x {given.edge}\n")
    print("| way | ms an image | median | mean difference, of 255 |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['way']} | {row['ms']:.2f} | {row['median_ms']:.2f} | {row['difference']:.2f} |")
    print("\n" + json.dumps({"edge": given.edge, "size": [given.width, given.height], "rows": rows}))


if __name__ == "__main__":
    main()
