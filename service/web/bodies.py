"""Bodies of requests -> support sets and queries: multipart, JSON, archives and raw bytes are spellings of one thing.

Everything is bounded before it is read: the number of parts, of lines and of items. Knows nothing of adaptation.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import PurePosixPath
from tempfile import SpooledTemporaryFile
from typing import TypeVar
from urllib.parse import unquote

from pydantic import ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from models.errors import InvalidRequest, InvalidSupport, TooLarge, UnsupportedMedia
from service.support import Example
from service.web.archives import Most, open_tar, open_zip
from service.web.schemas import (
    MOST_ITEMS,
    Closed,
    LabelledImage,
    LabelledText,
    OneCallBody,
    QueryBody,
    QueryLine,
    SupportBody,
    SupportLine,
    TextOneCallBody,
    TextQueryBody,
    TextQueryLine,
    TextSupportBody,
    TextSupportLine,
)

T = TypeVar("T")
IDENTITY = "identity"  # the Content-Encoding of what is not compressed
JSON_LINES = "application/x-ndjson"
SUPPORT_TYPES = f"multipart/form-data, application/json, {JSON_LINES}, application/zip or application/x-tar"
QUERY_TYPES = {
    "image": f"image/jpeg, image/png, image/webp, multipart/form-data, application/json or {JSON_LINES}",
    "text": f"text/plain, multipart/form-data, application/json or {JSON_LINES}",
}
ZIP_TYPES = ("application/zip", "application/x-zip-compressed")
TAR_TYPES = ("application/x-tar", "application/tar")
BLANKS = b" \t\r\n"
SPARE = 100  # objects, lists, values and keys of a JSON beyond those of its examples
# What clients write for what the name of a field cannot hold; nothing else is escaped in it, a "%" neither (WHATWG).
ESCAPED = (("%22", '"'), ("%0D", "\r"), ("%0A", "\n"))
NO_FILE = "A form field holds text where a file belongs; with curl, write -F label=@file, with the @."
MARKS = "The names of the form's fields and files hold too many semicolons."
LONGEST_NAME = 255  # of a file, where an answer tells it; its end tells most
UNLABELLED, QUERY, LABEL = "unlabelled", "query", "label:"
MEANT = dict.fromkeys(("unlabelled", "unlabeled"), UNLABELLED) | dict.fromkeys(("query", "queries"), QUERY)


@dataclass(frozen=True, slots=True)
class Given:
    """What a request brought."""

    examples: list[Example]
    unlabelled: list[bytes]
    queries: list[bytes]
    method: str = ""
    names: tuple[str, ...] = ()  # that the examples came with, and then the unlabelled ones: as an answer counts them


@dataclass(frozen=True, slots=True)
class Bounds(Most):
    kind: str = "image"  # what the artifact reads: "image" or "text"


class _Parser(MultiPartParser):
    # Uploads stay in memory, which the limit on the body bounds: nothing of a client's is written to a disk.
    spool_max_size = 1 << 40
    whole = False  # whether its last boundary was there
    marks = 0

    def on_headers_finished(self) -> None:
        # What stands between two is looked for from the beginning at each of them.
        self.marks += (self._current_part.content_disposition or b"").count(b";")
        if self.marks > 16 * self.max_files + SPARE:
            raise MultiPartException(MARKS)
        super().on_headers_finished()

    def on_end(self) -> None:
        super().on_end()
        self.whole = True


class _TextParser(_Parser):
    """A field that is no file holds a text: it is read as a file is, to the byte, and not decoded by guess."""

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        if self._current_part.file is None:
            file = SpooledTemporaryFile(max_size=self.spool_max_size)  # noqa: SIM115 - closed with the form
            self._current_part.file = UploadFile(file=file, size=0)  # type: ignore[arg-type]


def one_of(option: str, body: str) -> str:
    """The method, from the query string or the body. Raises InvalidRequest when they disagree."""
    if option and body and option != body:
        raise InvalidRequest("`method` is given twice, and differently, in the query string and in the body.")
    return option or body


def media_type(request: Request) -> str:
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


def coding(request: Request) -> str:
    """In which way a body is compressed; IDENTITY where it is not."""
    return ", ".join(request.headers.getlist("content-encoding")).strip().lower() or IDENTITY


async def read_support(request: Request, bounds: Bounds, *, with_queries: bool = False) -> Given:
    """The support set of a request, and its questions where the call is stateless."""
    _check_coding(request)
    kind = media_type(request)
    if kind == "multipart/form-data":
        given = _from_fields(await _multipart(request, bounds), with_queries)
    elif kind == "application/json":
        model = BODIES[bounds.kind, with_queries]
        given = await _aside(await request.body(), lambda body: _from_json(_parse(model, body, bounds)))
    elif kind in ZIP_TYPES + TAR_TYPES and not with_queries:
        open_archive = open_zip if kind in ZIP_TYPES else open_tar
        # Off the event loop however small it is, for what it holds may not be; which counts as if it had been sent.
        archive = await asyncio.to_thread(open_archive, await request.body(), bounds)
        request.scope["state"]["hold"](archive.size)
        given = await asyncio.to_thread(lambda: _from_entries(archive.files()))
    elif kind == JSON_LINES and not with_queries:
        given = await _aside(await request.body(), lambda body: _from_lines(_lines(LINES[bounds.kind], body, bounds)))
    elif not kind:
        raise UnsupportedMedia(f"The request has no Content-Type; send {SUPPORT_TYPES}.")
    elif kind == "application/x-www-form-urlencoded":
        raise UnsupportedMedia(
            "curl's -d and --data-binary need -H 'Content-Type: application/json', or application/zip for a zip; "
            "or use -F LABEL=@FILE."
        )
    else:
        alone = "image" if kind.startswith("image/") else "text" if kind == "text/plain" else ""
        hint = f" For one {alone} without a label there is nothing to learn." if alone else ""
        raise UnsupportedMedia(f"A support set comes as {SUPPORT_TYPES}.{hint}")
    if with_queries and not given.queries:
        raise InvalidRequest(
            f"There is no {bounds.kind} to classify: the questions are the files named `query`, in JSON `queries`."
        )
    return given


async def read_queries(request: Request, bounds: Bounds) -> list[bytes]:
    """The images or texts to classify. A raw body is one of them; its content decides, and not its declared type."""
    _check_coding(request)
    kind, text = media_type(request), bounds.kind == "text"
    if kind == "application/octet-stream" or (kind == "text/plain" if text else kind.startswith("image/")):
        if kind == "text/plain":
            _check_charset(request)
        return [await request.body()]
    if kind == "multipart/form-data":
        return [data for _, _, data in await _multipart(request, bounds)]
    if kind == "application/json":
        body = await request.body()

        def decode(body: bytes) -> list[bytes]:
            found = _parse(QUERIES[bounds.kind], body, bounds)
            return [_bytes(found, item, f"/images/{index}") for index, item in enumerate(found.contents)]

        return await _aside(body, decode)
    if kind == JSON_LINES:

        def decode_lines(body: bytes) -> list[bytes]:
            lines = _lines(QUERY_LINES[bounds.kind], body, bounds)
            return [_bytes(line, line.content, f"/{index}/image") for index, line in enumerate(lines)]

        return await _aside(await request.body(), decode_lines)
    if kind == "application/x-www-form-urlencoded":
        raw, field = ("text/plain", "text") if text else ("image/jpeg", "image")
        raise UnsupportedMedia(
            f"curl's --data-binary needs -H 'Content-Type: {raw}', and -d of JSON -H 'Content-Type: application/json'; "
            f"or use -F {field}=@FILE."
        )
    other = kind.startswith("image/") if text else kind == "text/plain"
    reads = f"The artifact that is served reads {bounds.kind}s. " if other else ""
    raise UnsupportedMedia(f"{reads}{bounds.kind.capitalize()}s come as {QUERY_TYPES[bounds.kind]}.")


def _check_coding(request: Request) -> None:
    """Raises UnsupportedMedia for a body that is compressed: pictures are so already, and archives may be."""
    if coding(request) != IDENTITY:
        raise UnsupportedMedia("The body is compressed, as its Content-Encoding says; send it as it is.")


def _check_charset(request: Request) -> None:
    """Raises UnsupportedMedia for a text that says it is not UTF-8; the bytes themselves are looked at later."""
    charset = request.headers.get("content-type", "").lower().partition("charset=")[2].split(";")[0].strip(" \"'")
    if charset not in ("", "utf-8", "utf8", "us-ascii"):
        raise UnsupportedMedia("A text comes in UTF-8; the charset of its Content-Type is another.")


async def _aside(body: bytes, work: Callable[[bytes], T]) -> T:
    """Large bodies are taken apart off the event loop, small ones at once."""
    return work(body) if len(body) < 100_000 else await asyncio.to_thread(work, body)


async def _multipart(request: Request, bounds: Bounds) -> list[tuple[str, str, bytes]]:
    """(field name, file name, content) of every file of a form, in order."""

    body = await request.body()  # whole, so that what is refused on its way in never reaches the parser

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    # Within a file there is none, and for the parser each is hard work, one that only begins like one too.
    boundary = parse_options_header(request.headers["content-type"])[1].get(b"boundary", b"")
    if body.count(b"\r\n--" + boundary) > bounds.parts + 1:
        raise TooLarge(f"The form has too many parts; the limit is {bounds.parts}.")
    kind = _TextParser if bounds.kind == "text" else _Parser
    parser = kind(request.headers, stream(), max_files=bounds.parts, max_fields=bounds.parts, max_part_size=1024)
    try:
        form = await parser.parse()
        if not parser.whole:
            for part in parser._files_to_close_on_error:
                part.close()
            raise ValueError("it is cut off")
    except MultiPartException as error:
        if error.message.startswith("Too many"):
            raise TooLarge(f"The form has too many parts; the limit is {bounds.parts}.") from None
        if error.message == MARKS:
            raise TooLarge(MARKS) from None
        if error.message.startswith("Part exceeded"):  # only what is no file is held to a size
            raise InvalidRequest(NO_FILE, index=len(parser.items)) from None
        if "header size" in str(error.__cause__):  # names of fields are in the headers of parts
            raise InvalidSupport("A label is far too long; see MAX_LABEL.") from None
        raise InvalidRequest("The multipart body cannot be read; is its boundary right, and does it end?") from None
    except (HTTPException, KeyError, ValueError, UnicodeError):
        raise InvalidRequest("The multipart body cannot be read; is its boundary right, and does it end?") from None
    files: list[tuple[str, str, bytes]] = []
    try:
        for index, (name, value) in enumerate(form.multi_items()):
            if not isinstance(value, UploadFile):
                raise InvalidRequest(NO_FILE, index=index)
            for escape, letter in ESCAPED:
                name = name.replace(escape, letter)
            files.append((name, value.filename or "", await value.read()))
    finally:
        await form.close()
    return files


def _from_fields(files: list[tuple[str, str, bytes]], with_queries: bool) -> Given:
    given, names, more = Given([], [], []), [], []
    for field, file, data in files:
        name = _told(f"{field}/{file}") if file else ""
        if field == UNLABELLED:
            given.unlabelled.append(data)
            more.append(name)
        elif field == QUERY and with_queries:
            given.queries.append(data)
        else:
            _meant(field, "field", QUERY if with_queries else UNLABELLED)
            given.examples.append(Example(field.removeprefix(LABEL), data))
            names.append(name)
    return replace(given, names=(*names, *more))


def _meant(name: str, kind: str, *also: str) -> None:
    """Raises InvalidRequest for a name that is nearly one that means something else than a class."""
    meant = MEANT.get(name.casefold())
    if meant in (UNLABELLED, *also) and name != meant:
        raise InvalidRequest(
            f"Is {meant!r} meant by the {kind} {name!r}? A class that is called so is written {LABEL + name!r}."
        )


def _told(name: str) -> str:
    """A name as it may stand in an answer: of letters that UTF-8 has, and not of any length."""
    return name.encode(errors="replace").decode()[-LONGEST_NAME:]


AnySupport = SupportBody | TextSupportBody
AnyLine = SupportLine | TextSupportLine
AnyQueries = QueryBody | TextQueryBody
AnyQueryLine = QueryLine | TextQueryLine
Body = TypeVar("Body", bound=Closed)

# What a body may be, by what the artifact reads (and whether it asks at once).
BODIES: Mapping[tuple[str, bool], type[AnySupport]] = {
    ("image", False): SupportBody,
    ("image", True): OneCallBody,
    ("text", False): TextSupportBody,
    ("text", True): TextOneCallBody,
}
LINES: Mapping[str, type[AnyLine]] = {"image": SupportLine, "text": TextSupportLine}
QUERIES: Mapping[str, type[AnyQueries]] = {"image": QueryBody, "text": TextQueryBody}
QUERY_LINES: Mapping[str, type[AnyQueryLine]] = {"image": QueryLine, "text": TextQueryLine}
TEXTS = (TextSupportBody, TextSupportLine, TextQueryBody, TextQueryLine)


def _lines(model: type[Body], body: bytes, bounds: Bounds) -> list[Body]:
    if body.count(b"\n") > bounds.parts:
        raise TooLarge(f"The body has too many lines; the limit is {bounds.parts}.")
    found = []
    for index, line in enumerate(filter(bytes.strip, body.split(b"\n"))):  # blank ones count for nothing
        try:
            found.append(_parse(model, line, bounds))
        except InvalidRequest as error:
            raise InvalidRequest(error.detail, index=index, pointer=error.pointer) from None
    return found


def _from_lines(lines: Sequence[AnyLine]) -> Given:
    given = Given([], [], [])
    for index, line in enumerate(lines):
        payload = _bytes(line, line.content, f"/{index}/image")
        if line.label is None:
            given.unlabelled.append(payload)
        else:
            given.examples.append(Example(line.label, payload))
    return given


def _parse(model: type[Body], body: bytes, bounds: Bounds) -> Body:
    # pydantic makes an error of every key that it does not know, and its parser a hundred bytes of an empty list, which
    # is two to send; nothing else in Python runs meanwhile.
    if _much(body, bounds) and _much(_between(body, bounds), bounds):
        raise TooLarge(f"The JSON has more objects, lists, values or keys than {bounds.parts} examples need.")
    try:
        return model.model_validate_json(body, strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        kind, other = ("text", "image") if issubclass(model, TEXTS) else ("image", "text")
        if any(first["type"] == "extra_forbidden" and first["loc"][-1] in (other, f"{other}s") for first in found):
            raise InvalidRequest(
                f"The artifact that is served reads {kind}s: they are named `{kind}` or `{kind}s`, not `{other}`."
            ) from None
        first = found[0]
        # Keys that a client made are not echoed: the path is cut where ours end.
        fields = {"support", "unlabelled", "method", "images", "queries", "label", "image", "text", "texts"}
        path = [part for part in first["loc"] if isinstance(part, int) or part in fields]
        known = ", ".join(f"`{name}`" for name in _names(model))
        message = {
            "extra_forbidden": f"An unknown field is not allowed here; there are {known}",
            "json_invalid": "The JSON cannot be read",
        }
        text = message.get(first["type"], first["msg"])
        raise InvalidRequest(f"{text}.", pointer="/" + "/".join(str(part) for part in path) if path else None) from None
    except (ValueError, RecursionError):
        raise InvalidRequest("The JSON cannot be read.") from None


def _much(json: bytes, bounds: Bounds) -> bool:
    few, many = 2 * bounds.parts + SPARE, 16 * bounds.parts + SPARE
    most = {b"{": few, b"[": few, b":": many, b",": many + 3 * MOST_ITEMS}  # of its lists each answers by itself
    return any(json.count(mark) > limit for mark, limit in most.items())


def _between(json: bytes, bounds: Bounds) -> bytes:
    """What stands between the strings of a JSON: a text may be made of braces and commas. All of it, where its strings
    are too many to look between."""
    plain = json.replace(rb"\\", b"").replace(rb"\"", b"")
    return json if plain.count(b'"') > 32 * bounds.parts + SPARE else b"".join(plain.split(b'"')[::2])


def _names(model: type[Closed]) -> list[str]:
    """All fields of a body, and of what it holds."""
    schema = model.model_json_schema()
    inner = (part.get("properties", {}) for part in schema.get("$defs", {}).values())
    return list(dict.fromkeys(name for part in (schema["properties"], *inner) for name in part))


def _from_json(body: AnySupport) -> Given:
    support: Sequence[LabelledImage | LabelledText] = body.support
    examples = [
        Example(item.label, _bytes(body, item.content, f"/support/{index}/image")) for index, item in enumerate(support)
    ]
    unlabelled = [_bytes(body, item, f"/unlabelled/{index}") for index, item in enumerate(body.unlabelled)]
    queries = []
    if isinstance(body, OneCallBody | TextOneCallBody):
        queries = [_bytes(body, item, f"/queries/{index}") for index, item in enumerate(body.queries)]
    return Given(examples, unlabelled, queries, body.method)


def _bytes(body: Closed, content: str, pointer: str) -> bytes:
    """An example as the decoder takes it: a text as it is, an image out of its base64. Raises InvalidRequest."""
    return content.encode() if isinstance(body, TEXTS) else _base64(content, pointer)


def _base64(text: str, pointer: str) -> bytes:
    if text.startswith("data:"):
        raise InvalidRequest("This is a data URL; send only what follows the comma.", pointer=pointer)
    try:
        # As `base64` writes it, in lines. To split a text that is half of blanks would take many times its size.
        return base64.b64decode(text.encode("ascii").translate(None, BLANKS), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest("This is not base64.", pointer=pointer) from None


def _from_entries(entries: Iterator[tuple[PurePosixPath, bytes]]) -> Given:
    """One folder per label; folders that all share are left out of the label."""
    found = [(path, data) for path, data in entries]
    if not found:
        raise InvalidSupport("The archive holds no files; put the images of each class into a folder of its name.")
    folders = [path.parent.parts for path, _ in found]
    if any(not folder for folder in folders):
        raise InvalidSupport("The archive has a file outside of any folder; the folder's name is the label.")
    # What the first and the last in order share, all do. A path may have a thousand folders: each is seen once.
    alike = (one == other for one, other in zip(min(folders), max(folders), strict=False))
    shared = min(sum(1 for _ in takewhile(bool, alike)), min(map(len, folders)) - 1)
    given, names, more = Given([], [], []), [], []
    for (path, data), folder in zip(found, folders, strict=True):
        label = "/".join(folder[shared:])
        if label == UNLABELLED:
            given.unlabelled.append(data)
            more.append(_told(str(path)))
        else:
            _meant(label, "folder")
            given.examples.append(Example(_decoded(label.removeprefix(LABEL)), data))
            names.append(_told(str(path)))
    return replace(given, names=(*names, *more))


def _decoded(folder: str) -> str:
    """The label that a folder stands for: percent-encoded is what no folder can be called."""
    try:
        return unquote(folder, errors="strict")
    except UnicodeDecodeError:
        return folder
