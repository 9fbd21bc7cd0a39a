"""`Idempotency-Key`: what is asked for twice is done once."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from service import keys
from service.settings import Settings
from service.stores import memory
from service.stores.memory import MemoryStore
from service.support import example_id
from service.web import idempotency
from service.web.app import create_app
from tests.fakes import Gated, picture, tiny_artifact
from tests.service.live import served
from tests.service.web.asks import colours, refused, support_json
from tests.service.web.conftest import LIMITS

URL = "/v1/tasks/t/examples"
LIME = json.dumps({"support": support_json("lime")}).encode()
ORANGE = json.dumps({"support": support_json("orange")}).encode()
FIRST = example_id("red", base64.b64decode(support_json("red")[0]["image"]))
WHITE = json.dumps({"support": support_json("white")}).encode()


@pytest.fixture(scope="module")
def extractor() -> Gated:
    return Gated()


@pytest.fixture(scope="module")
def own() -> MemoryStore:
    return MemoryStore()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifact")


@pytest.fixture(scope="module")
def service(extractor: Gated, own: MemoryStore, folder: Path) -> Iterator[httpx.Client]:
    settings = Settings(**LIMITS)  # type: ignore[arg-type]
    with served(create_app(settings, artifact=tiny_artifact(folder), extractor=extractor, store=own)) as client:
        try:
            yield client
        finally:
            extractor.gate.set()


@pytest.fixture
def http(service: httpx.Client, extractor: Gated, own: MemoryStore) -> httpx.Client:
    """The service with one task `t` of red and blue, and nothing else."""
    own.values.clear()
    extractor.gate.set()
    assert service.put("/v1/tasks/t", files=colours("red", "blue")).status_code == 201
    return service


def post(
    http: httpx.Client, key: str | bytes | None, body: bytes = LIME, url: str = URL, **headers: str
) -> httpx.Response:
    sent: dict[str, Any] = {"Content-Type": "application/json", **{n.replace("_", "-"): v for n, v in headers.items()}}
    if key is not None:
        sent["Idempotency-Key"] = key
    return http.post(url, content=body, headers=sent)


def replayed(response: httpx.Response) -> bool:
    assert response.headers.get("idempotent-replayed") in (None, "true")
    return "idempotent-replayed" in response.headers


def version(http: httpx.Client, task: str = "t") -> int:
    return int(http.get(f"/v1/tasks/{task}").json()["version"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda http: post(http, "k"),
        lambda http: http.post("/v1/tasks/t/rollback?version=1", headers={"Idempotency-Key": "k"}),
        lambda http: http.put("/v1/tasks/t", files=colours("navy", "lime"), headers={"Idempotency-Key": "k"}),
        lambda http: http.patch("/v1/tasks/t?method=ridge", headers={"Idempotency-Key": "k"}),
        lambda http: http.delete("/v1/tasks/t/classes/red", headers={"Idempotency-Key": "k"}),
        lambda http: http.delete(f"/v1/tasks/t/examples/{FIRST}", headers={"Idempotency-Key": "k"}),
    ],
    ids=["add", "rollback", "replace", "learn with", "remove class", "remove example"],
)
def test_the_same_key_and_request_get_the_first_answer_again(
    http: httpx.Client, extractor: Gated, change: Callable[[httpx.Client], httpx.Response]
) -> None:
    post(http, None, WHITE)
    first = change(http)
    assert (first.status_code, replayed(first), version(http)) == (200, False, 3)
    assert post(http, None, ORANGE).json()["version"] == 4
    images = sum(extractor.batches)
    for _ in range(2):
        again = change(http)
        assert replayed(again)
        assert (again.status_code, again.content) == (200, first.content)
        for name in ("etag", "content-type", "content-length"):
            assert again.headers[name] == first.headers[name]
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert version(http) == 4
    assert sum(extractor.batches) == images


def test_a_form_that_is_sent_again_is_the_same_though_its_boundary_is_another(http: httpx.Client) -> None:
    sent = [http.build_request("POST", URL, files=colours("lime"), headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert sent[0].headers["content-type"] != sent[1].headers["content-type"]
    first, second = (http.send(request) for request in sent)
    assert (replayed(first), replayed(second), second.content) == (False, True, first.content)
    other = http.post(URL, files=colours("white"), headers={"Idempotency-Key": "k"})
    refused(other, 422, "idempotency_mismatch")


def test_without_a_key_nothing_is_remembered(http: httpx.Client, own: MemoryStore) -> None:
    assert not any(replayed(post(http, None)) for _ in range(2))
    assert not [key for key in own.values if key[1] == "remembered"]


def test_another_request_under_the_same_key_is_refused_and_changes_nothing(http: httpx.Client) -> None:
    first = post(http, "k")
    for other in (
        post(http, "k", WHITE),
        post(http, "k", LIME + b" "),
        post(http, "k", b""),
        post(http, "k", url=URL + "?on_bad_image=fail"),
        post(http, "k", If_Match=first.headers["etag"]),
        post(http, "k", If_None_Match="*"),
        http.put("/v1/tasks/t", files=colours("red", "blue"), headers={"Idempotency-Key": "k"}),
        http.put("/v1/tasks/t", json=["no support set"], headers={"Idempotency-Key": "k"}),
        http.post("/v1/tasks/t/rollback?version=1", headers={"Idempotency-Key": "k"}),
    ):
        refused(other, 422, "idempotency_mismatch", "take a new one")
    assert version(http) == 2
    assert post(http, "k").content == first.content
    assert post(http, "other", WHITE).json()["version"] == 3


def test_while_the_first_is_at_work_the_second_is_told_to_wait(http: httpx.Client, extractor: Gated) -> None:
    extractor.begun.clear()
    extractor.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, http, "k")
        try:
            assert extractor.begun.wait(10)
            for _ in range(2):
                second = post(http, "k")
                refused(second, 409, "in_flight", "still at work")
                assert int(second.headers["retry-after"]) >= 1
            refused(post(http, "k", WHITE), 422, "idempotency_mismatch")
            assert not first.done()
        finally:
            extractor.gate.set()
        answer = first.result(10)
    assert (answer.status_code, answer.json()["version"]) == (200, 2)
    again = post(http, "k")
    assert (replayed(again), again.content) == (True, answer.content)


def test_of_many_at_once_one_does_the_work(http: httpx.Client, extractor: Gated) -> None:
    extractor.begun.clear()
    extractor.gate.clear()
    images, start = sum(extractor.batches), threading.Barrier(8)

    def send() -> httpx.Response:
        start.wait(10)
        return post(http, "k")

    with ThreadPoolExecutor(8) as pool:
        sent = [pool.submit(send) for _ in range(8)]
        assert extractor.begun.wait(10)
        extractor.gate.set()
        found = [one.result(10) for one in sent]
    done = [one for one in found if one.status_code == 200]
    assert [replayed(one) for one in done].count(False) == 1
    assert {one.content for one in done} == {done[0].content}
    for one in found:
        if one.status_code != 200:
            refused(one, 409, "in_flight")
    assert sum(extractor.batches) - images == 3
    assert version(http) == 2


@pytest.mark.slow
def test_a_caller_who_leaves_does_not_leave_the_key_taken(http: httpx.Client, extractor: Gated) -> None:
    extractor.begun.clear()
    extractor.gate.clear()
    try:
        with pytest.raises(httpx.ReadTimeout):
            http.post(
                URL,
                content=LIME,
                headers={"Content-Type": "application/json", "Idempotency-Key": "k"},
                timeout=httpx.Timeout(10, read=0.3),
            )
    finally:
        extractor.gate.set()
    for _ in range(100):
        again = post(http, "k")
        if again.status_code != 409:
            break
        time.sleep(0.05)
    assert again.status_code == 200, again.text
    assert (again.json()["version"], version(http)) == (2, 2)


def test_what_failed_is_not_remembered(http: httpx.Client) -> None:
    junk = json.dumps({"support": [{"label": "red", "image": "AAAA"}]}).encode()
    for _ in range(2):
        assert not replayed(post(http, "bad", junk))
        refused(post(http, "bad", junk), 422, "undecodable_example")
    assert post(http, "bad").json()["version"] == 2  # nor is the key used up
    again = http.post("/v1/tasks/t/rollback?version=3", headers={"Idempotency-Key": "early"})
    refused(again, 404, "version_not_found")
    post(http, None, WHITE)
    post(http, None, ORANGE)
    later = http.post("/v1/tasks/t/rollback?version=3", headers={"Idempotency-Key": "early"})
    assert (later.status_code, replayed(later), later.json()["version"]) == (200, False, 5)


def test_a_task_that_was_not_there_may_be_there_at_the_next_try(http: httpx.Client, own: MemoryStore) -> None:
    url = "/v1/tasks/new/examples"
    refused(post(http, "k", url=url), 404, "task_not_found")
    assert not [key for key in own.values if key[1] == "remembered"]
    http.put("/v1/tasks/new", files=colours("red", "blue"))
    assert post(http, "k", url=url).json()["version"] == 2


def test_a_stale_condition_is_not_remembered_and_a_met_one_is(http: httpx.Client) -> None:
    etag = http.get("/v1/tasks/t").headers["etag"]
    first = post(http, "k", If_Match=etag)
    again = post(http, "k", If_Match=etag)  # stale by now, but asked for and done when it was not
    assert (first.status_code, again.status_code, again.content) == (200, 200, first.content)
    refused(post(http, "l", If_Match=etag), 412, "version_conflict")
    assert post(http, "l", WHITE, If_Match=first.headers["etag"]).json()["version"] == 3


@pytest.mark.parametrize("key", ["", "x" * 256, b"a\tb", b"\x85", b"\xad"])
def test_a_key_has_up_to_255_printable_characters(http: httpx.Client, key: str | bytes) -> None:
    refused(post(http, key), 422, "invalid_request", "1 to 255 printable")
    assert version(http) == 1


@pytest.mark.parametrize("key", ["x", "x" * 255, '"8e03978e-40d5-43dd-bc93-6894a57f9324"', "a b", b"\xe9", "../../t"])
def test_any_such_key_will_do(http: httpx.Client, key: str | bytes) -> None:
    first, again = post(http, key), post(http, key)
    assert (first.status_code, replayed(first), replayed(again)) == (200, False, True)


def test_a_name_that_is_none_leaves_nothing_behind(http: httpx.Client, own: MemoryStore) -> None:
    before = dict(own.values)
    refused(post(http, "k", url="/v1/tasks/a%20b/examples"), 422, "invalid_request", "task name")
    assert own.values == before


def test_each_task_has_keys_of_its_own(http: httpx.Client) -> None:
    http.put("/v1/tasks/u", files=colours("red", "blue"))
    first, other = post(http, "k"), post(http, "k", WHITE, url="/v1/tasks/u/examples")
    assert (first.json()["task"], other.json()["task"], replayed(other)) == ("t", "u", False)


def test_a_forgotten_task_takes_its_keys_with_it(http: httpx.Client, own: MemoryStore) -> None:
    post(http, "k")
    assert http.delete("/v1/tasks/t").status_code == 204
    assert not own.values
    http.put("/v1/tasks/t", files=colours("red", "blue"))
    again = post(http, "k", WHITE)
    assert (again.status_code, replayed(again), again.json()["version"]) == (200, False, 2)


def test_a_task_that_ended_is_made_anew_by_who_tries_again(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer counts no longer than what it tells of: who asked for a task of ten minutes gets another one."""

    def put() -> httpx.Response:
        files = colours("navy", "lime")
        return http.put("/v1/tasks/short?ttl=600", files=files, headers={"Idempotency-Key": "k"})

    assert (put().status_code, replayed(put())) == (201, True)
    later = time.time() + 601
    monkeypatch.setattr("service.stores.memory.time.time", lambda: later)
    again = put()
    assert (again.status_code, replayed(again)) == (201, False)


def test_a_task_that_was_given_more_time_still_knows_what_was_asked(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, now = "/v1/tasks/longer", time.time()
    assert http.put(f"{url}?ttl=600", files=colours("navy", "lime")).status_code == 201
    assert not replayed(post(http, "k", url=f"{url}/examples"))
    assert http.put(f"{url}?ttl=86400", files=colours("navy", "lime")).status_code == 200
    monkeypatch.setattr("service.stores.memory.time.time", lambda: now + 700)
    assert replayed(post(http, "k", url=f"{url}/examples"))


def test_a_damaged_task_is_called_so_with_a_key_as_without(http: httpx.Client, own: MemoryStore) -> None:
    place = ("default", "pointer", "t")
    own.values[place] = (own.values[place][0][:-1] + b"x", None)
    for key in (None, "k"):
        refused(post(http, key), 409, "task_stale", "damaged")


def test_another_process_on_the_same_store_answers_again_too(
    http: httpx.Client, own: MemoryStore, folder: Path
) -> None:
    first = post(http, "k")
    settings, extractor = Settings(**LIMITS), Gated()  # type: ignore[arg-type]
    with served(create_app(settings, artifact=tiny_artifact(folder), extractor=extractor, store=own)) as other:
        again = post(other, "k")
    assert (replayed(again), again.content, extractor.batches) == (True, first.content, [])


def test_an_answer_is_remembered_for_a_day_and_a_claim_for_a_minute(
    http: httpx.Client, own: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (idempotency.ANSWER_S, idempotency.CLAIM_S) == (86400, 60)
    monkeypatch.setattr(idempotency, "ANSWER_S", -1)
    assert not replayed(post(http, "k"))
    assert not replayed(post(http, "k"))  # its day is over
    assert version(http) == 2  # and what is there already changes nothing


def remembered(own: MemoryStore) -> list[bytes]:
    return [data for (_, kind, _), (data, _) in own.values.items() if kind == "remembered"]


def test_an_answer_takes_a_fraction_of_its_size(http: httpx.Client, own: MemoryStore) -> None:
    http.put("/v1/tasks/t", files=colours("red", "blue", "white", "orange", shots=9))
    answer = post(http, "k")
    (kept,) = remembered(own)
    assert len(kept) < len(answer.content) / 2
    assert post(http, "k").content == answer.content


def test_answers_have_so_much_room_beside_a_task_and_the_newest_stay(
    http: httpx.Client, own: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    post(http, "0")
    (kept,) = remembered(own)
    monkeypatch.setattr(memory, "MOST_REMEMBERED_BYTES", 4 * len(kept))
    for key in "123456":
        post(http, key)
        assert sum(map(len, remembered(own))) <= 4 * len(kept)
    assert [replayed(post(http, key)) for key in "650"] == [True, True, False]


def test_of_an_answer_that_is_too_large_only_the_claim_is_kept(
    http: httpx.Client, own: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "MOST_REMEMBERED_BYTES", 200)
    assert (post(http, "k").status_code, version(http)) == (200, 2)
    refused(post(http, "k"), 409, "in_flight")
    later = time.time() + 61
    monkeypatch.setattr(time, "time", lambda: later)
    assert (post(http, "k").status_code, version(http)) == (200, 2)


def test_an_answer_that_an_earlier_program_kept_is_given_again(http: httpx.Client, own: MemoryStore) -> None:
    first = post(http, "k")
    ((task, key),) = [name for _, kind, name in own.values if kind == "remembered"]
    scope = own.scope("default")
    value = asyncio.run(scope.recall(task, str(key)))
    assert value is not None
    answer, _, body = zlib.decompress(value).partition(b"\n")
    earlier = json.dumps({**json.loads(answer), "body": base64.b64encode(body).decode()}).encode()
    asyncio.run(scope.remember(task, str(key), earlier, ttl_s=60))
    again = post(http, "k")
    assert (replayed(again), again.content) == (True, first.content)


def test_nothing_of_a_request_is_kept_but_its_digest(http: httpx.Client, own: MemoryStore) -> None:
    post(http, "a-secret-key", LIME)
    kept = b"".join(data for (_, kind, _), (data, _) in own.values.items() if kind == "remembered")
    names = repr([name for _, kind, name in own.values if kind == "remembered"])
    assert kept
    for value in (b"a-secret-key", LIME[40:80], picture("lime", seed=0)[20:60]):
        assert value not in kept
        assert value.decode("latin-1") not in names


@pytest.mark.slow
def test_each_tenant_has_keys_of_its_own(tmp_path: Path, extractor: Gated) -> None:
    extractor.gate.set()
    file = tmp_path / "keys.json"
    tokens = [keys.create(file, tenant=tenant, scopes=("adapt",))[1] for tenant in ("a", "b")]
    settings = Settings(**LIMITS, keys_file=file)  # type: ignore[arg-type]
    app = create_app(settings, artifact=tiny_artifact(tmp_path), extractor=extractor, store=MemoryStore())
    with served(app) as client:
        found = []
        for token, body in zip(tokens, (LIME, WHITE), strict=True):
            client.headers["Authorization"] = f"Bearer {token}"
            assert client.put("/v1/tasks/t", files=colours("red", "blue")).status_code == 201
            found.append(post(client, "k", body))
        assert [(one.status_code, replayed(one)) for one in found] == [(200, False)] * 2
        assert post(client, "k", WHITE).content == found[1].content


def test_a_task_without_a_name_is_made_once(http: httpx.Client) -> None:
    files, key = colours("tan", "teal"), {"Idempotency-Key": "k"}
    first = http.post("/v1/tasks", files=files, headers=key)
    name = first.json()["task"]
    assert (first.status_code, "idempotent-replayed" in first.headers) == (201, False)
    assert http.post(f"/v1/tasks/{name}/examples", files=colours("gold")).json()["version"] == 2
    again = http.post("/v1/tasks", files=files, headers=key)
    assert (again.status_code, again.headers["idempotent-replayed"], again.text) == (201, "true", first.text)
    assert again.headers["location"] == first.headers["location"]
    assert http.get(f"/v1/tasks/{name}").json()["version"] == 2
    refused(http.post("/v1/tasks?ttl=600", files=files, headers=key), 422, "idempotency_mismatch")
    http.delete(f"/v1/tasks/{name}")
    anew = http.post("/v1/tasks", files=files, headers=key)
    assert (anew.status_code, "idempotent-replayed" in anew.headers) == (201, False)


def test_a_copy_without_a_name_is_made_once_however_the_other_task_moves(http: httpx.Client) -> None:
    name, key = "moving", {"Idempotency-Key": "k"}
    assert http.put(f"/v1/tasks/{name}", files=colours("tan", "teal")).status_code == 201
    first = http.post(f"/v1/tasks?from_task={name}", headers=key)
    assert first.status_code == 201
    assert http.post(f"/v1/tasks/{name}/examples", files=colours("gold")).status_code == 200
    again = http.post(f"/v1/tasks?from_task={name}", headers=key)
    assert (again.status_code, again.headers["idempotent-replayed"], again.text) == (201, "true", first.text)
    other = http.post(f"/v1/tasks?from_task={name}", headers={"Idempotency-Key": "l", "If-None-Match": "*"})
    assert (other.status_code, other.json()["task"] == first.json()["task"]) == (201, False)
    refused(http.post(f"/v1/tasks?from_task={name}", headers={"If-None-Match": "*"}), 412, "version_conflict")
