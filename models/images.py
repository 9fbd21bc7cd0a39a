"""Bytes of one encoded image -> uint8 array of the size an artifact asks for.

The one place where pictures are opened, used by training and serving alike, so both see the same pixels. All limits
are checked on the header, before a decoder is given the file. Knows nothing of requests, tasks or networks.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile

from models.containers import Container, png_ends_early, unwrap
from models.errors import TooLarge, UndecodableExample

FORMATS = ("JPEG", "PNG", "WEBP")
MIN_EDGE = 8
MAX_ASPECT = 20
ONE_PASS = 4  # times as many pixels may a JPEG have that is never held in full: cameras' pictures have 24 or 48 million

# A picture that ends early is refused, not filled with grey.
ImageFile.LOAD_TRUNCATED_IMAGES = False
Image.MAX_IMAGE_PIXELS = None  # our own limit is checked before Pillow sees the file
Image.init()
# A large picture's memory comes as one block from the kernel, which clears its pages as they are used. Several smaller
# ones come, after some time, from memory that was used before: it is cleared at once, 20 ms for 16 million pixels,
# and nothing else in Python runs meanwhile.
Image.core.set_block_size(128 * 2**20)  # type: ignore[attr-defined]  # no other way leads there


@dataclass(frozen=True, slots=True)
class ImageDecoder:
    """Decodes one JPEG, PNG or WEBP: upright, alpha onto white, shorter side to the target, centre crop.

    Calling it gives uint8 [height, width, channels]. Raises UndecodableExample or TooLarge; the sentence never holds
    a decoder's own text, which may carry addresses.
    """

    height: int
    width: int
    channels: int  # 1 grey, 3 RGB
    max_pixels: int = 16_800_000
    max_bytes: int = 8_000_000

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.height, self.width, self.channels)

    def __call__(self, payload: bytes) -> np.ndarray:
        image = self.open(payload)
        try:
            return self.pixels(image)
        except Exception:  # a decoder may raise anything on hostile bytes; its text is not for clients
            raise UndecodableExample("The image is damaged or ends early.") from None

    def open(self, payload: bytes) -> Image.Image:
        """Reads the header only and applies every limit to it."""
        if len(payload) > self.max_bytes:
            raise TooLarge(f"The image has {len(payload)} bytes; the limit is {self.max_bytes} (MAX_EXAMPLE_BYTES).")
        if not payload:
            raise UndecodableExample("The image is empty.")
        try:
            container = unwrap(payload)
        except Exception:  # as above
            raise UndecodableExample(_why_not_an_image(payload)) from None
        width, height = container.size
        most = self.max_pixels * (ONE_PASS if container.one_pass else 1)
        if width * height > most:
            raise TooLarge(
                f"The image has {width} x {height} pixels; the limit is {most} {_MAX_PIXELS[container.one_pass]}."
            )
        if min(width, height) < MIN_EDGE:
            raise UndecodableExample(f"The image is {width} x {height}; each side needs at least {MIN_EDGE} pixels.")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise UndecodableExample(
                f"The image is {width} x {height}; the longer side may be at most {MAX_ASPECT} times the shorter one."
            )
        if container.frames > 1:
            raise UndecodableExample("The image is animated; send one frame.")
        try:
            image = Image.open(io.BytesIO(container.data), formats=(container.format,))
            if image.size != container.size or getattr(image, "n_frames", 1) > 1:
                raise ValueError("the decoder reads another header")
        except Exception:  # as above
            raise UndecodableExample(_why_not_an_image(payload)) from None
        image.info["container"] = container
        return image

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Decodes an opened image to uint8 [height, width, channels]."""
        container: Container = image.info["container"]
        target = max(self.height, self.width)
        if image.format == "JPEG":
            # The decoder's own scaling by halves: several times cheaper for camera pictures. Twice the target is
            # kept, so that the resize below still averages.
            image.draft(None, (2 * target, 2 * target))
        image.load()
        if image.format == "PNG" and _ends_blank(image) and png_ends_early(container.data):
            raise ValueError("rows are missing")
        if container.orientation in _UPRIGHT:
            image = image.transpose(_UPRIGHT[container.orientation])
        if image.mode.startswith("I;16") or image.mode == "I":
            image = Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).astype(np.uint8))
        mode = "L" if self.channels == 1 else "RGB"
        if image.mode != mode:
            if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
                rgba = image.convert("RGBA")
                image = Image.new("RGBA", rgba.size, "white")
                image.alpha_composite(rgba)
            image = image.convert(mode)
        if image.size != (self.width, self.height):
            image = _cover(image, self.width, self.height)
        return np.asarray(image, dtype=np.uint8).reshape(self.shape)


_MAX_PIXELS = ("(MAX_PIXELS)", f"({ONE_PASS} x MAX_PIXELS, of a JPEG)")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _ends_blank(image: Image.Image) -> bool:
    """Whether one of the last two rows is all zeros, as Pillow leaves a row for which there is no data.

    Two, since the last row of an interlaced picture may be there without the one before it.
    """
    rows = np.asarray(image.crop((0, image.height - 2, image.width, image.height)))
    return not rows.reshape(2, -1).any(axis=1).all()


def _cover(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resizes so that the shorter side fits and cuts the middle, in one step."""
    scale = min(image.width / width, image.height / height)
    # Rounding can take width * scale past the edge by one part in 10^16, which Pillow refuses.
    across, down = min(width * scale, image.width), min(height * scale, image.height)
    left, top = (image.width - across) / 2, (image.height - down) / 2
    return image.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, left + across, top + down))


_SIGNATURES = (
    (b"GIF8", "a GIF"),
    (b"BM", "a BMP"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"%PDF", "a PDF"),
    (b"PK\3\4", "a zip archive"),
    (b"<", "HTML, SVG or XML"),
    (b"8BPS", "a Photoshop file"),
    (b"RIFF", "a damaged WEBP"),
    (b"\xff\xd8", "a damaged JPEG"),
    (b"\x89PNG", "a damaged PNG"),
)


def _why_not_an_image(payload: bytes) -> str:
    accepted = "JPEG, PNG and WEBP are accepted"
    if payload[4:8] == b"ftyp":
        return f"This looks like HEIC or AVIF; {accepted}."
    for magic, name in _SIGNATURES:
        if payload.startswith(magic):
            return f"This looks like {name}; {accepted}."
    return f"This is not an image; {accepted}."
