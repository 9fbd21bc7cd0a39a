"""What a client can get wrong: a 4xx that names it, nothing stored, and the next request unharmed."""

from __future__ import annotations

import base64
import gzip
import io
import json
import socket
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator

import httpx
import pytest

from tests.fakes import picture
from tests.service.web.asks import colours, folders, refused, support_json, tarred, text, zipped

pytestmark = pytest.mark.usefixtures("nothing_stored", "unharmed")
RED, BLUE = picture("red", seed=70), picture("blue", seed=70)
ZIP, TAR, JSON = ({"Content-Type": f"application/{kind}"} for kind in ("zip", "x-tar", "json"))


@pytest.fixture
def unharmed(http: httpx.Client) -> Iterator[None]:
    yield
    answer = http.post("/v1/classify", files=[*colours("red", "blue"), ("query", RED)])
    assert answer.status_code == 200
    assert answer.json()["predictions"][0]["label"] == "red"


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.slow
def test_an_unreadable_image(http: httpx.Client) -> None:
    problem = refused(http.post("/v1/tasks", files=[("a", b"hello"), ("b", BLUE)]), 422, "invalid_support", "'a'")
    assert problem["index"] == 0
    assert "not an image" in problem["detail"]


def test_one_class_only(http: httpx.Client) -> None:
    refused(http.post("/v1/tasks", files=colours("red")), 422, "invalid_support", "two classes")


def test_no_example_at_all(http: httpx.Client) -> None:
    refused(http.post("/v1/tasks", json={"support": []}), 422, "invalid_support", "empty")


def test_text_where_a_file_belongs(http: httpx.Client) -> None:
    response = http.post("/v1/tasks", files=colours("red"), data={"blue": "photo.jpg"})
    refused(response, 422, "invalid_request", "with the @")


def test_an_unknown_method(http: httpx.Client) -> None:
    refused(
        http.post("/v1/tasks?method=magic", files=colours("red", "blue")), 422, "unknown_method", "prototype, ridge"
    )


def test_an_unknown_query_parameter(http: httpx.Client) -> None:
    refused(http.post("/v1/tasks?metod=ridge", files=colours("red", "blue")), 422, "invalid_request", "`method`, `ttl`")
    refused(http.get("/v1/artifact?x=1"), 422, "invalid_request", "there are none")


def test_what_belongs_into_the_address_is_said_to(http: httpx.Client) -> None:
    refused(http.patch("/v1/tasks/any", json={"method": "ridge"}), 422, "invalid_request", "as ?method=")
    refused(http.post("/v1/tasks/any/rollback", json={"version": 1}), 422, "invalid_request", "as ?version=")


def test_of_a_parameter_with_a_choice_both_are_told(http: httpx.Client) -> None:
    problem = refused(http.post("/v1/tasks/any/classify?reject=5", content=RED), 422, "invalid_request", "`reject`: ")
    assert "'off'" in problem["detail"]
    assert "0.5" in problem["detail"]


def test_an_unknown_field_is_told_which_there_are(http: httpx.Client) -> None:
    body = {"support": support_json("red", "blue"), "metod": "ridge"}
    refused(http.post("/v1/tasks", json=body), 422, "invalid_request", "`support`, `unlabelled`, `method`, `label`")


def test_a_slash_at_the_end_is_pointed_out(http: httpx.Client) -> None:
    refused(http.get("/v1/tasks/"), 404, "not_found", "ends with a slash")


def test_a_query_parameter_of_the_wrong_kind(http: httpx.Client) -> None:
    refused(http.get("/v1/tasks?limit=many"), 422, "invalid_request", "`limit`")


def test_a_label_of_ten_kilobytes(http: httpx.Client) -> None:
    refused(http.post("/v1/tasks", files=[("x" * 10_000, RED), ("b", BLUE)]), 422, "invalid_support", "MAX_LABEL")


def test_an_empty_label(http: httpx.Client) -> None:
    support = [{"label": " ", "image": text(RED)}, {"label": "b", "image": text(BLUE)}]
    refused(http.post("/v1/tasks", json={"support": support}), 422, "invalid_support", "label is empty")


def test_a_header_of_65000_by_65000_pixels_is_refused_in_no_time(http: httpx.Client) -> None:
    start = time.perf_counter()
    response = http.post("/v1/tasks?on_bad_image=fail", files=[("a", png_header(65_000, 65_000)), ("b", BLUE)])
    refused(response, 413, "too_large", "MAX_PIXELS")
    assert time.perf_counter() - start < 1


def test_a_body_over_the_limit(http: httpx.Client) -> None:
    refused(http.post("/v1/tasks", files=[("a", b"x" * 500_000)]), 413, "too_large", "400000")


def test_a_body_over_the_limit_that_comes_in_chunks(http: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(10):
            yield b"x" * 50_000

    try:
        response = http.post("/v1/tasks/x/classify", content=chunks(), headers={"Content-Type": "image/png"})
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        return  # the connection was closed while we were still sending
    refused(response, 413, "too_large", "MAX_BODY_BYTES")


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate, gzip"])
def test_a_compressed_body_is_told_from_a_picture_that_cannot_be_read(http: httpx.Client, coding: str) -> None:
    http.put("/v1/tasks/colours", files=colours("red", "blue")).raise_for_status()
    headers, packed = {"Content-Encoding": coding, "Content-Type": "image/png"}, gzip.compress(RED)
    task = "/v1/tasks/colours"
    asked = [task + "/classify", task + "/classify?explain=true", "/v1/embed", "/v1/classify", "/v1/tasks"]
    for method, path in [*(("POST", path) for path in asked), ("POST", task + "/examples"), ("PUT", task)]:
        answer = http.request(method, path, content=packed, headers=headers)
        refused(answer, 415, "unsupported_media_type", "Content-Encoding")
    headers["Content-Encoding"] = "Identity"
    assert http.post(task + "/classify", content=RED, headers=headers).status_code == 200
    http.delete(task).raise_for_status()


@pytest.mark.slow
def test_a_body_that_never_ends_is_cut_in_time(http: httpx.Client) -> None:
    host, port = http.base_url.host, http.base_url.port
    with socket.create_connection((host, port), timeout=10) as raw:
        raw.sendall(
            b"POST /v1/tasks/x/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 900\r\n\r\nab"
        )
        start = time.perf_counter()
        answer = raw.recv(65536)
        assert b" 408 " in answer.split(b"\r\n")[0]
        assert b"body_timeout" in answer + raw.recv(65536)
        assert time.perf_counter() - start < 5


def test_too_many_images(http: httpx.Client) -> None:
    refused(http.post("/v1/tasks", files=colours("red", "blue", shots=21)), 413, "too_large", "MAX_EXAMPLES")
    many = [("i", RED)] * 9
    refused(http.post("/v1/tasks/x/classify", files=many), 413, "too_large", "MAX_QUERIES")


def test_too_many_parts(http: httpx.Client) -> None:
    refused(http.post("/v1/tasks", files=[("a", b"x")] * 60), 413, "too_large", "48")


FORM = {"Content-Type": "multipart/form-data; boundary=b"}
FILE = b'--b\r\nContent-Disposition: form-data; name="a"; filename="%b"\r\n\r\n%b\r\n'


def test_what_begins_like_a_boundary_within_a_file_counts_as_a_part(http: httpx.Client) -> None:
    """A megabyte of them holds the event loop for half a second and more."""
    body = FILE % (b"1.png", b"\r\n--bX" * 60) + b"--b--\r\n"
    for path in ("/v1/tasks", "/v1/classify", "/v1/tasks/any/classify"):
        refused(http.post(path, content=body, headers=FORM), 413, "too_large", "too many parts")
    few = FILE % (b"1.png", b"\r\n--bX" * 40) + b"--b--\r\n"
    refused(http.post("/v1/embed", content=few, headers=FORM), 422, "undecodable_example")


def test_names_of_thousands_of_semicolons(http: httpx.Client) -> None:
    """How long a header takes to be read grows with their square: a form of two megabytes took four seconds."""
    body = FILE % (b";" * 500, b"x") * 3 + b"--b--\r\n"
    refused(http.post("/v1/tasks", content=body, headers=FORM), 413, "too_large", "semicolons")
    files = [("a;b", ("1;2.png", RED)), (";" * 20, ("3.png", BLUE)), ("query", ("4.png", RED))]
    assert http.post("/v1/classify", files=files).json()["predictions"][0]["label"] == "a;b"


def test_too_many_classes(http: httpx.Client) -> None:
    files = [(f"c{k}", picture("red", seed=k)) for k in range(7)]
    refused(http.post("/v1/tasks", files=files), 413, "too_large", "MAX_WAY")


@pytest.mark.parametrize(
    "name", ["../evil.png", "cats/../../evil.png", "/etc/evil.png", "..\\evil\\1.png", "C:/evil/1.png"]
)
def test_an_archive_entry_that_leads_out(http: httpx.Client, name: str) -> None:
    entries = {**folders("red", "blue"), name: RED}
    refused(http.post("/v1/tasks", content=zipped(entries), headers=ZIP), 422, "invalid_request", "leads out")
    refused(http.post("/v1/tasks", content=tarred(entries), headers=TAR), 422, "invalid_request", "leads out")


@pytest.mark.parametrize("size", [10, 1024, 1025, 40_000])
def test_a_text_where_a_file_belongs_is_told_so_however_long_it_is(http: httpx.Client, size: int) -> None:
    form = [*colours("red", shots=1), ("blue", (None, "data:image/png;base64,".ljust(size, "A")))]
    for url in ("/v1/tasks", "/v1/classify", "/v1/embed"):
        problem = refused(http.post(url, files=form), 422, "invalid_request", "holds text where a file belongs")
        assert problem["index"] == 1


def test_an_archive_that_unpacks_to_too_much(http: httpx.Client) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for k in range(30):
            archive.writestr(f"a/{k}.png", b"\0" * 190_000)
    refused(http.post("/v1/tasks", content=out.getvalue(), headers=ZIP), 413, "too_large", "unpacks")


def test_an_archive_of_very_many_empty_folders(http: httpx.Client) -> None:
    entries = {f"{k}/": b"" for k in range(1100)}
    refused(http.post("/v1/tasks", content=zipped(entries), headers=ZIP), 413, "too_large", "too many entries")


def test_an_archive_whose_header_lies_about_a_size(http: httpx.Client) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.png", b"\0" * 3_000_000)
        archive.writestr("b/1.png", BLUE)
    body = bytearray(out.getvalue())
    for magic, at in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        struct.pack_into("<I", body, body.index(magic) + at, 1000)
    response = http.post("/v1/tasks", content=bytes(body), headers=ZIP)
    assert response.status_code in (413, 422), response.text


def test_a_form_or_a_tar_that_is_cut_is_not_taken_for_a_shorter_one(http: httpx.Client) -> None:
    form = http.build_request("POST", "/v1/tasks", files=colours("red", "blue", "lime"))
    whole, kind = form.read(), {"Content-Type": form.headers["content-type"]}
    end = len(b"--" + kind["Content-Type"].partition("boundary=")[2].encode() + b"--\r\n")
    for cut in (end, end + 2, 3):
        refused(http.post("/v1/tasks", content=whole[:-cut], headers=kind), 422, "invalid_request", "does it end")
    tar = tarred(folders("red", "blue", "lime"))
    ends = len(tar.rstrip(b"\0")) // 512 * 512 + 512
    last = tar.rindex(b"ustar") - 257
    for at in (last, last + 100, ends):
        refused(http.post("/v1/tasks", content=tar[:at], headers=TAR), 422, "invalid_request", "cut off")


def test_a_json_of_more_keys_than_examples_need_is_not_read(http: httpx.Client) -> None:
    """An error for each would be made, at a microsecond or more and a hundred bytes."""
    for support in ([{f"k{k}": 0 for k in range(3_000)}], [{}] * 3_000):
        refused(http.post("/v1/tasks", json={"support": support}), 413, "too_large", "keys")
        refused(http.post("/v1/tasks/any/classify", json={"images": support}), 413, "too_large", "keys")
    line = json.dumps({f"k{k}": 0 for k in range(3_000)})
    lines = {"Content-Type": "application/x-ndjson"}
    refused(http.post("/v1/tasks", content=line, headers=lines), 413, "too_large", "keys")


def test_a_json_of_more_lists_or_values_than_examples_need_is_not_read(http: httpx.Client) -> None:
    """The parser takes a hundred bytes for an empty list, and half a microsecond in which nothing else runs."""
    lists: list[list[object]] = [[[]] * 3_000, [0] * 40_000, [""] * 40_000]
    for many in lists:
        refused(http.post("/v1/tasks/any/classify", json={"images": many}), 413, "too_large", "lists")
        refused(http.post("/v1/tasks", json={"support": [], "more": many}), 413, "too_large", "lists")
    refused(http.post("/v1/tasks", content=b"[" * 100_000, headers=JSON), 413, "too_large", "lists")
    question = "[,[," * 15_000  # within a string they are none
    refused(http.post("/v1/embed", json={"images": [question]}), 422, "invalid_request", "base64")


def test_an_archive_that_is_none_or_is_cut(http: httpx.Client) -> None:
    whole = zipped(folders("red", "blue"))
    refused(http.post("/v1/tasks", content=b"junk", headers=ZIP), 422, "invalid_request", "not a zip")
    refused(http.post("/v1/tasks", content=whole[: len(whole) // 2], headers=ZIP), 422, "invalid_request", "cut off")
    refused(http.post("/v1/tasks", content=b"junk" * 200, headers=TAR), 422, "invalid_request", "not a tar")
    refused(
        http.post("/v1/tasks", content=b"\x1f\x8b" + b"x" * 600, headers=TAR),
        415,
        "unsupported_media_type",
        "compressed",
    )


def test_an_archive_whose_beginning_is_missing(http: httpx.Client) -> None:
    """Its table of contents then points before it."""
    whole = zipped(folders("red", "blue"))
    refused(http.post("/v1/tasks", content=whole[4:], headers=ZIP), 422, "invalid_request", "damaged")


@pytest.mark.parametrize("way", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_an_archive_that_is_compressed_in_another_way(http: httpx.Client, way: int) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", way) as archive:
        for label in ("red", "blue"):
            archive.writestr(f"{label}/1.png", picture(label, seed=1))
    refused(http.post("/v1/tasks", content=out.getvalue(), headers=ZIP), 422, "invalid_request", "deflate")


def test_an_archive_without_folders(http: httpx.Client) -> None:
    refused(http.post("/v1/tasks", content=zipped({"1.png": RED}), headers=ZIP), 422, "invalid_support", "folder")
    refused(http.post("/v1/tasks", content=zipped({}), headers=ZIP), 422, "invalid_support", "no files")


@pytest.mark.parametrize("files", [{"red/1.png": RED, "red/2.png": RED}, {"set/red/1.png": RED}], ids=["flat", "deep"])
def test_an_archive_of_one_class(http: httpx.Client, files: dict[str, bytes]) -> None:
    refused(http.post("/v1/tasks", content=zipped(files), headers=ZIP), 422, "invalid_support", "class 'red'")


def test_an_archive_with_a_link(http: httpx.Client) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        link = zipfile.ZipInfo("a/1.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    refused(http.post("/v1/tasks", content=out.getvalue(), headers=ZIP), 422, "invalid_request", "a link")


GOOD = {"support": support_json("red", "blue", shots=1)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b"NaN", None),
        (b'{"support": NaN}', "/support"),
        (b'{"support": 1e999}', "/support"),
        (b'{"support": "x"}', "/support"),
        (b'{"support": [{"label": "a"}]}', "/support/0/image"),
        (b'{"support": [{"label": 1, "image": ""}]}', "/support/0/label"),
        (b'{"support": [{"label": "\\ud800", "image": ""}]}', None),
        (b"\xff\xfe", None),
        (b"[" * 190, None),
        (json.dumps({**GOOD, "colour": 1}).encode(), None),
        (json.dumps({**GOOD, "method": 7}).encode(), "/method"),
        (json.dumps({**GOOD, "unlabelled": "x"}).encode(), "/unlabelled"),
        (json.dumps({**GOOD, "unlabelled": ["%%%"]}).encode(), "/unlabelled/0"),
    ],
)
def test_json_that_is_wrong_somewhere(http: httpx.Client, body: bytes, pointer: str | None) -> None:
    problem = refused(http.post("/v1/tasks", content=body, headers=JSON), 422, "invalid_request")
    assert problem.get("pointer") == pointer


def test_json_of_very_many_small_items(http: httpx.Client) -> None:
    body = json.dumps({"support": [], "unlabelled": [""] * 10_001}).encode()
    problem = refused(http.post("/v1/tasks", content=body, headers=JSON), 422, "invalid_request", "10000")
    assert problem["pointer"] == "/unlabelled"


def test_base64_that_is_none(http: httpx.Client) -> None:
    for image, words in (("not base64!", "not base64"), ("data:image/png;base64,AAAA", "data URL"), ("AAA", "base64")):
        support = [{"label": "a", "image": image}]
        problem = refused(http.post("/v1/tasks", json={"support": support}), 422, "invalid_request", words)
        assert problem["pointer"] == "/support/0/image"


def test_base64_in_lines_is_read(http: httpx.Client) -> None:
    lines = base64.encodebytes(picture("red")).decode()
    assert "\n" in lines.strip()
    support = [{"label": "a", "image": lines}, {"label": "b", "image": base64.b64encode(picture("blue")).decode()}]
    answer = http.post("/v1/classify", json={"support": support, "queries": [lines]})
    assert answer.json()["predictions"][0]["label"] == "a"


@pytest.mark.parametrize(
    ("path", "field", "meant"),
    [("tasks", "unlabeled", "unlabelled"), ("tasks", "Unlabelled", "unlabelled"), ("classify", "Query", "query")],
)
def test_a_field_that_is_nearly_one_that_is_no_class(http: httpx.Client, path: str, field: str, meant: str) -> None:
    files, words = [*colours("red", "blue"), (field, picture("lime"))], f"Is '{meant}' meant by the field '{field}'?"
    refused(http.post(f"/v1/{path}", files=files), 422, "invalid_request", words)
    files = [*colours("red", "blue"), (f"label:{field}", picture("lime")), ("query", picture("lime"))]
    assert http.post("/v1/classify", files=files).json()["predictions"][0]["label"] == field


def test_a_folder_that_is_nearly_one_that_is_no_class(http: httpx.Client) -> None:
    files = {"red/1.png": picture("red"), "blue/1.png": picture("blue"), "unlabeled/1.png": picture("lime")}
    answer = http.post("/v1/tasks", content=zipped(files), headers={"Content-Type": "application/zip"})
    refused(answer, 422, "invalid_request", "Is 'unlabelled' meant by the folder 'unlabeled'?")


def test_a_label_that_means_the_task_in_an_address(http: httpx.Client) -> None:
    files = [*colours("red"), ("..", picture("blue"))]
    refused(http.post("/v1/tasks", files=files), 422, "invalid_support", "it means the task")


def test_a_support_set_of_another_type(http: httpx.Client) -> None:
    for kind in ("text/html", "application/x-www-form-urlencoded", "image/jpeg", "application/octet-stream"):
        refused(http.post("/v1/tasks", content=RED, headers={"Content-Type": kind}), 415, "unsupported_media_type")
    refused(http.post("/v1/tasks", content=RED), 415, "unsupported_media_type", "no Content-Type")


def test_a_question_of_another_type(http: httpx.Client) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    response = http.post("/v1/tasks/x/classify", content=RED, headers=form)
    refused(response, 415, "unsupported_media_type", "--data-binary")
    refused(
        http.post("/v1/tasks/x/classify", content=RED, headers={"Content-Type": "text/csv"}),
        415,
        "unsupported_media_type",
    )


def test_a_multipart_body_that_is_broken(http: httpx.Client) -> None:
    for kind in ("multipart/form-data", "multipart/form-data; boundary=x"):
        response = http.post("/v1/tasks", content=b"--y\r\nnonsense", headers={"Content-Type": kind})
        assert response.status_code == 422, response.text
        assert response.json()["code"] in ("invalid_request", "invalid_support")


def test_method_given_twice_and_differently(http: httpx.Client) -> None:
    response = http.post("/v1/tasks?method=ridge", json={**GOOD, "method": "prototype"})
    refused(response, 422, "invalid_request", "twice")


def test_no_question(http: httpx.Client) -> None:
    refused(http.post("/v1/classify", files=colours("red", "blue")), 422, "invalid_request", "no image")


@pytest.mark.parametrize("name", ["a%20b", "..%2f..%2fetc", "x" * 65, "%00", "caf%C3%A9"])
def test_a_task_name_that_is_none(http: httpx.Client, name: str) -> None:
    response = http.put(f"/v1/tasks/{name}", files=colours("red", "blue"))
    assert response.status_code in (404, 422), response.text
    assert response.headers["content-type"] == "application/problem+json"


def test_an_unknown_path_and_a_wrong_method(http: httpx.Client) -> None:
    refused(http.get("/v1/nothing"), 404, "not_found")
    refused(http.patch("/v1/tasks"), 405, "method_not_allowed")
    assert "GET" in http.patch("/v1/tasks").headers["allow"]
