"""An artifact that reads texts, through the whole app: every spelling of a text, and what is no text."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from service.settings import Settings
from service.stores.memory import MemoryStore
from service.web.app import create_app
from tests.fakes import Letters, picture, tiny_text_artifact
from tests.service.live import served
from tests.service.web.asks import colours, refused, tarred, zipped
from tests.service.web.conftest import LIMITS

OWLS = ["Owls hoot, woo woo", "who took our wool"]
BEES = ["bees see three trees", "été: free beer here"]
SUPPORT = [("owls", text) for text in OWLS] + [("bees", text) for text in BEES]
FORM = [(label, (None, text)) for label, text in SUPPORT]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    artifact = tiny_text_artifact(tmp_path_factory.mktemp("artifact"))
    settings = Settings(**{**LIMITS, "body_timeout_s": 30.0, "max_text_bytes": 2000})  # type: ignore[arg-type]
    with served(create_app(settings, artifact=artifact, extractor=Letters(), store=MemoryStore())) as client:
        assert client.put("/v1/tasks/animals", files=FORM).status_code == 201
        yield client


def ask(client: httpx.Client, **request: object) -> list[dict[str, object]]:
    answer = client.post("/v1/tasks/animals/classify?reject=off", **request)  # type: ignore[arg-type]
    assert answer.status_code == 200, answer.text
    return list(answer.json()["predictions"])


def test_every_spelling_of_a_support_set_gives_the_same_head(texts: httpx.Client) -> None:
    rows = [{"label": label, "text": text} for label, text in SUPPORT]
    lines = "\n".join(map(json.dumps, rows)).encode()
    entries = {f"{label}/{number}.txt": text.encode() for number, (label, text) in enumerate(SUPPORT)}
    files = [(label, ("a.txt", text.encode())) for label, text in SUPPORT]
    made = [
        texts.post("/v1/tasks", files=FORM),
        texts.post("/v1/tasks", files=files),
        texts.post("/v1/tasks", json={"support": rows}),
        texts.post("/v1/tasks", content=lines, headers={"Content-Type": "application/x-ndjson"}),
        texts.post("/v1/tasks", content=zipped(entries), headers={"Content-Type": "application/zip"}),
        texts.post("/v1/tasks", content=tarred(entries), headers={"Content-Type": "application/x-tar"}),
    ]
    assert [answer.status_code for answer in made] == [201, 200, 200, 200, 200, 200]
    assert len({answer.json()["head"] for answer in made}) == 1
    assert made[0].json()["classes"] == [{"label": "bees", "shots": 2}, {"label": "owls", "shots": 2}]


@pytest.mark.parametrize("kind", ["text/plain", "text/plain; charset=UTF-8", "application/octet-stream"])
def test_a_raw_body_is_one_text(texts: httpx.Client, kind: str) -> None:
    for text, label in (("woof, a wolf took food", "owls"), ("these sheep never sleep", "bees")):
        (found,) = ask(texts, content=text.encode(), headers={"Content-Type": kind})
        assert found["label"] == label


def test_several_are_asked_about_as_json_as_lines_and_as_a_form(texts: httpx.Client) -> None:
    asked = ["look, a book", "three green peers", "a\r\n b"]
    answers = [
        ask(texts, json={"texts": asked}),
        ask(
            texts,
            content="\n".join(json.dumps({"text": text}) for text in asked),
            headers={"Content-Type": "application/x-ndjson"},
        ),
        ask(texts, files=[("text", (None, text)) for text in asked]),
        ask(texts, files=[("text", ("a.txt", text.encode())) for text in asked]),
    ]
    assert [found["label"] for found in answers[0]][:2] == ["owls", "bees"]
    assert all(answer == answers[0] for answer in answers)


def test_support_and_questions_come_in_one_call(texts: httpx.Client) -> None:
    form = [*FORM, ("unlabelled", (None, "hoot hoot")), ("query", (None, "go, goose"))]
    body = {
        "support": [{"label": label, "text": text} for label, text in SUPPORT],
        "unlabelled": ["hoot hoot"],
        "queries": ["go, goose"],
    }
    answers = [texts.post("/v1/classify", files=form).json(), texts.post("/v1/classify", json=body).json()]
    assert answers[0]["head"] == answers[1]["head"]
    assert [answer["predictions"][0]["label"] for answer in answers] == ["owls", "owls"]


def test_examples_are_added_and_features_given(texts: httpx.Client) -> None:
    texts.put("/v1/tasks/grows", files=FORM)
    added = texts.post("/v1/tasks/grows/examples", json={"support": [{"label": "cats", "text": "a cat sat"}]}).json()
    assert [row["label"] for row in added["classes"]] == ["bees", "cats", "owls"]
    features = texts.post("/v1/embed", json={"texts": ["aaaa"]}).json()["features"]
    assert np.argmax(features[0]) == 0


def test_texts_that_were_kept_come_back_as_they_were(texts: httpx.Client) -> None:
    made = texts.put("/v1/tasks/kept?retain=images", files=FORM).json()
    body = texts.get("/v1/tasks/kept/support")
    with zipfile.ZipFile(io.BytesIO(body.content)) as archive:
        assert {name.rsplit(".", 1)[1] for name in archive.namelist()} == {"txt"}
        assert {archive.read(name).decode() for name in archive.namelist()} == {*OWLS, *BEES}
    again = texts.post("/v1/tasks", content=body.content, headers={"Content-Type": "application/zip"})
    assert again.json()["head"] == made["head"]
    (example, *_) = [row["id"] for row in made["examples"] if row["label"] == "bees"]
    one = texts.get(f"/v1/tasks/kept/examples/{example}/image")
    assert one.headers["content-type"] == "text/plain; charset=utf-8"
    assert one.text in BEES


# What is wrong.


def test_an_image_is_told_that_texts_are_read(texts: httpx.Client) -> None:
    png = picture("red")
    ask_png = {"content": png, "headers": {"Content-Type": "image/png"}}
    refused(texts.post("/v1/tasks/animals/classify", **ask_png), 415, "unsupported_media_type", "reads texts")
    encoded = base64.b64encode(png).decode()
    body = {"images": [encoded]}
    refused(texts.post("/v1/tasks/animals/classify", json=body), 422, "invalid_request", "reads texts")
    support = {"support": [{"label": "a", "image": encoded}, {"label": "b", "image": encoded}]}
    refused(texts.post("/v1/tasks", json=support), 422, "invalid_request", "reads texts")
    refused(texts.post("/v1/tasks", files=colours("red", "blue")), 422, "invalid_support", "looks like a PNG")


def test_a_text_is_told_that_images_are_read(http: httpx.Client) -> None:
    http.put("/v1/tasks/pictures", files=colours("red", "blue"))
    plain = {"content": b"a text", "headers": {"Content-Type": "text/plain"}}
    refused(http.post("/v1/tasks/pictures/classify", **plain), 415, "unsupported_media_type", "reads images")
    refused(http.post("/v1/tasks/pictures/classify", json={"texts": ["a"]}), 422, "invalid_request", "reads images")
    support = {"support": [{"label": "a", "text": "b"}, {"label": "b", "text": "c"}]}
    refused(http.post("/v1/tasks", json=support), 422, "invalid_request", "reads images")
    refused(http.post("/v1/tasks", files=FORM), 422, "invalid_request", "holds text where a file belongs")


def test_a_text_may_be_made_of_braces_and_colons(texts: httpx.Client) -> None:
    code = [json.dumps([{"a\\": f'"{k}"'} for k in range(n, n + 60)]) for n in range(20)]
    rows = [{"label": ("ok", "bad")[n % 2], "text": text} for n, text in enumerate(code)]
    made = texts.put("/v1/tasks/code", json={"support": rows})
    assert made.status_code == 201, made.text
    asked = texts.post("/v1/tasks/code/classify", json={"texts": code[:8]})
    assert asked.status_code == 200, asked.text


@pytest.mark.parametrize("much", [{"a": {}}, {'"{"': "{"}], ids=["keys", "strings"])
def test_a_json_of_more_objects_than_its_texts_need_is_refused(texts: httpx.Client, much: dict[str, object]) -> None:
    many = json.dumps([much] * 20_000)
    found = texts.put("/v1/tasks/code", content=f'{{"support": {many}}}', headers={"Content-Type": "application/json"})
    assert (found.status_code, found.json()["code"]) == (413, "too_large")


def test_what_is_no_text_is_refused_by_name(texts: httpx.Client) -> None:
    def plain(body: bytes, charset: str = "") -> httpx.Response:
        headers = {"Content-Type": f"text/plain{charset}"}
        return texts.post("/v1/tasks/animals/classify", content=body, headers=headers)

    refused(plain(b"caf\xe9"), 422, "undecodable_example", "not UTF-8")
    refused(plain(b" \n"), 422, "undecodable_example", "empty")
    refused(plain(b"a\0b"), 422, "undecodable_example", "NUL")
    refused(plain(b"x" * 2001), 413, "too_large", "MAX_TEXT_BYTES")
    refused(plain(b"caf\xe9", "; charset=latin-1"), 415, "unsupported_media_type", "UTF-8")
    # A form's field is not guessed to be in another encoding.
    field = b'--b\r\nContent-Disposition: form-data; name="text"\r\n\r\ncaf\xe9\r\n--b--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = texts.post("/v1/tasks/animals/classify", content=field, headers=headers)
    refused(answer, 422, "undecodable_example", "not UTF-8")


def test_one_bad_text_costs_the_others_nothing(texts: httpx.Client) -> None:
    found = ask(texts, json={"texts": ["look, a book", "", "three"]})
    assert [row.get("label") for row in found] == ["owls", None, "bees"]
    assert found[1]["error"]["code"] == "undecodable_example"  # type: ignore[index]


def test_what_is_served_is_told(texts: httpx.Client) -> None:
    assert texts.get("/v1/artifact").json()["input"] == {"kind": "text", "length": 64}
    limits = texts.get("/v1/limits").json()
    assert (limits["max_text_bytes"], limits["formats"]) == (2000, ["UTF-8"])
    assert "reads texts" in texts.get("/").text


@pytest.mark.slow
def test_the_open_inference_protocol_takes_texts(texts: httpx.Client) -> None:
    told = texts.get("/v2/models/animals").json()
    assert [(row["name"], row["shape"]) for row in told["inputs"]] == [("text", [-1]), ("bytes", [-1, 64])]
    commas = "look, a book" + "," * 1500
    tensor = {"name": "text", "datatype": "BYTES", "shape": [2], "data": [commas, "three green peers"]}
    answer = texts.post("/v2/models/animals/infer", json={"inputs": [tensor], "outputs": [{"name": "label"}]})
    assert answer.json()["outputs"][0]["data"] == ["owls", "bees"]
    row = np.zeros(64, np.uint8)
    row[:5] = list(b"three")
    given = {"name": "bytes", "datatype": "UINT8", "shape": [1, 64], "data": row.tolist()}
    answer = texts.post("/v2/models/animals/infer", json={"inputs": [given], "outputs": [{"name": "label"}]})
    assert answer.json()["outputs"][0]["data"] == ["bees"]
    image = {**tensor, "name": "image"}
    wrong = texts.post("/v2/models/animals/infer", json={"inputs": [image]})
    assert wrong.status_code == 400
    assert "named `text`" in wrong.text
