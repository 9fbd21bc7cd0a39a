"""Images, or texts, that were kept with a task, on their way back to their owner."""

from __future__ import annotations

import io
import zipfile
from urllib.parse import quote

from models.errors import NotRetained
from models.leftovers import JUNK
from service.stores import Record
from service.web.bodies import MEANT, UNLABELLED

SAFE = " !#$&'()+,-.;=@[]^_`{}~"  # in the name of a folder on any file system


def retained(record: Record) -> tuple[bytes, ...]:
    """Raises NotRetained."""
    if not record.images:
        raise NotRetained("The images of this task were not kept; only `retain=images` at its making keeps them.")
    return record.images


def format_of(image: bytes) -> str:
    """By its first bytes: jpeg, png, webp or txt, for nothing else was accepted."""
    if image.startswith(b"\x89PNG"):
        return "png"
    if image.startswith(b"\xff\xd8"):
        return "jpeg"
    return "webp" if image.startswith(b"RIFF") and b"\0" in image else "txt"  # a text holds no NUL


def media_type_of(image: bytes) -> str:
    kind = format_of(image)
    return "text/plain; charset=utf-8" if kind == "txt" else f"image/{kind}"


def archive(record: Record) -> bytes:
    """A zip with one folder per label, as it can be sent again; unlabelled images in a folder of that name."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
        for index, (example, image) in enumerate(zip(record.ids, retained(record), strict=True)):
            labelled = index < len(record.classes)
            folder = folder_of(record.labels[record.classes[index]]) if labelled else UNLABELLED
            file.writestr(f"support/{folder}/{example}.{format_of(image)}", image)
    return out.getvalue()


def folder_of(label: str) -> str:
    """The label as the name of one folder; what that cannot hold is percent-encoded, which `bodies` decodes."""
    name = "".join(c if c.isalnum() or c in SAFE else quote(c, safe="") for c in label)
    misread = MEANT.get(name.casefold()) == UNLABELLED or name in JUNK
    if misread or name.startswith("."):
        name = f"%{ord(name[0]):02X}{name[1:]}"
    return f"{name[:-1]}%2E" if name.endswith(".") else name
