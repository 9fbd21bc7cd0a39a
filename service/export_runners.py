"""What goes out beside an exported task: a program that runs it, and how an input comes to be, by what the task reads.

Text for people and for their Python; nothing of it is run here. Knows nothing of graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RESIZE = (
    "Turned upright by EXIF; transparency laid onto white; grey or RGB by the number of channels; the middle of the "
    "picture in the shape of the input, resized in one step with Pillow's BILINEAR, which averages; a JPEG may first "
    "be decoded at a half, a quarter or an eighth, to no less than twice the input."
)
RUN_IMAGES = '''"""python run.py PICTURE...  says what pictures show.

Needs Python 3.9, onnxruntime 1.17, numpy and Pillow 9.1, or newer.
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(Path(__file__).with_name("model.onnx"), providers=["CPUExecutionProvider"])
facts = session.get_modelmeta().custom_metadata_map
labels, reject = json.loads(facts["labels"]), float(facts["reject"])
height, width, channels = session.get_inputs()[0].shape[1:]
SEE_THROUGH = ("LA", "PA", "RGBA", "La", "RGBa")
UPRIGHT = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()


def orientation(exif):
    """From 1 to 8. Pillow's own looks in more places, where the service does not."""
    while exif.startswith(b"Exif\\0\\0"):
        exif = exif[6:]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(entries):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", exif, start + 2 + 12 * entry)
            if tag == 0x0112 and kind == 3 and 1 <= value <= 8:
                return value
    except struct.error:  # none, or it ends early
        pass
    return 1


def read(path):
    """A picture as the service sees it: uint8 [height, width, channels]."""
    image, mode = Image.open(path), "L" if channels == 1 else "RGB"
    image.draft(None, (2 * max(height, width),) * 2)  # JPEG alone heeds this
    image.load()  # in a PNG, EXIF may come behind the picture
    turn = orientation(image.info.get("exif", b""))
    if turn > 1:
        image = image.transpose(Image.Transpose[UPRIGHT[turn - 2]])
    if image.mode.startswith("I"):  # 16 bits
        image = Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8))
    if image.mode != mode and (image.mode in SEE_THROUGH or "transparency" in image.info):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert(mode)
    if image.size != (width, height):
        scale = min(image.width / width, image.height / height)
        across, down = min(width * scale, image.width), min(height * scale, image.height)
        left, top = (image.width - across) / 2, (image.height - down) / 2
        box = (left, top, left + across, top + down)
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image, np.uint8).reshape(height, width, channels)
'''
RUN_TEXTS = '''"""python run.py FILE...  says what texts are.

Needs Python 3.9, onnxruntime 1.17 and numpy, or newer.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(Path(__file__).with_name("model.onnx"), providers=["CPUExecutionProvider"])
facts = session.get_modelmeta().custom_metadata_map
labels, reject = json.loads(facts["labels"]), float(facts["reject"])
length = session.get_inputs()[0].shape[1]


def read(path):
    """A text as the service sees it: uint8 [length], zeros behind its end."""
    data = Path(path).read_bytes().removeprefix(b"\\xef\\xbb\\xbf")
    if not data.strip() or b"\\0" in data:
        raise ValueError("The text is empty, or holds a NUL character.")
    text = data.decode()
    data = text.replace("\\r\\n", "\\n").replace("\\r", "\\n").encode()
    data = data[:length].decode(errors="ignore").encode()  # whole characters
    return np.frombuffer(data.ljust(length, b"\\0"), np.uint8)
'''
# How either goes on.
ANSWERS = """

if len(sys.argv) < 2:
    print("usage:", __doc__, file=sys.stderr)
    sys.exit(2)
sys.stdout.reconfigure(errors="backslashreplace")  # a label may have letters that the terminal has not
status = 0
for path in sys.argv[1:]:
    try:
        given = {session.get_inputs()[0].name: read(path)[None]}
        probabilities, known = session.run(["probabilities", "known"], given)
    except Exception as error:  # a bad file costs the others nothing
        print(f"{path}: {str(error) or type(error).__name__}", file=sys.stderr)
        status = 1
        continue
    ranked = sorted(zip(probabilities[0].tolist(), labels), key=lambda row: -row[0])  # of equals, the first
    verdict = ranked[0][1] if known[0] >= reject else "none of these"
    print(f"{path}: {verdict}", *(f"{label} {share:.6f}" for share, label in ranked), sep="\\n  ")
sys.exit(status)
"""
CUT = "UTF-8 without a byte order mark, line ends as one byte; as many whole characters as fit, zeros behind them."


@dataclass(frozen=True, slots=True)
class Kind:
    """What an exported task reads, and how."""

    tensor: str  # the input of its graph
    shape: str
    fact: str  # under what its facts say how an input is made
    made: str
    program: str
    needs: str
    example: str

    def size(self, given: Mapping[str, Any]) -> str:
        """The manifest's input, for people."""
        if self.tensor == "bytes":
            return f"{given['length']} bytes"
        return f"{given['height']} x {given['width']} pixels, {'grey' if given['channels'] == 1 else 'RGB'}"


KINDS: Mapping[str, Kind] = {
    "image": Kind(
        tensor="pixels",
        shape="height, width, channels",
        fact="resize",
        made=RESIZE,
        program=RUN_IMAGES + ANSWERS,
        needs='"onnxruntime>=1.17" numpy "Pillow>=9.1"',
        example="picture.jpg",
    ),
    "text": Kind(
        tensor="bytes",
        shape="length",
        fact="cut",
        made=CUT,
        program=RUN_TEXTS + ANSWERS,
        needs='"onnxruntime>=1.17" numpy',
        example="text.txt",
    ),
}
