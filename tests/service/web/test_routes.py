"""Each route, as a client meets it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import httpx
import pytest

from service.engine import Engine
from service.settings import Settings
from service.stores.memory import MemoryStore
from service.web import schemas
from service.web.app import create_app
from tests.fakes import MeanColour, picture, tiny_artifact
from tests.service.live import served
from tests.service.web.asks import colours, folders, refused, support_json, tarred, text, zipped

RED = picture("red", seed=50)


def taught(http: httpx.Client, name: str) -> schemas.Task:
    response = http.put(f"/v1/tasks/{name}", files=colours("red", "blue"))
    assert response.status_code in (200, 201), response.text
    return schemas.Task.model_validate_json(response.text)


def test_a_support_set_becomes_a_task_named_after_its_head(http: httpx.Client) -> None:
    response = http.post("/v1/tasks", files=colours("red", "green"))
    assert response.status_code == 201, response.text
    task = schemas.Task.model_validate_json(response.text)
    assert task.task == "t_" + task.head[3:27]
    assert response.headers["location"] == f"/v1/tasks/{task.task}"
    assert response.headers["etag"] == f'"v1-{task.head}"'
    assert task.classes == [schemas.ClassInfo(label="green", shots=3), schemas.ClassInfo(label="red", shots=3)]
    assert set(task.timings_ms) == {"queue", "decode", "embed", "adapt", "store"}
    again = http.post("/v1/tasks", files=colours("red", "green"))
    assert again.status_code == 200
    assert again.json()["version"] == 1


@pytest.mark.parametrize("path", ["/v1/tasks", "/v1/classify", "/v1/artifact"])
def test_a_bug_is_answered_as_a_problem_like_any_other(
    http: httpx.Client, path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And not in starlette's own words; what went wrong is for the log alone."""

    async def broken(*_: object, **__: object) -> None:
        raise KeyError("a secret")

    for name in ("tasks", "classify_once"):
        monkeypatch.setattr(Engine, name, broken)
    monkeypatch.setattr("service.web.about._artifact", lambda *_: 1 / 0)
    posted = {"files": [*colours("red", "blue"), ("query", RED)]} if path == "/v1/classify" else {}
    response = http.request("POST" if posted else "GET", path, **posted)
    problem = refused(response, 500, "internal_error")
    assert "secret" not in response.text
    give_up = time.monotonic() + 5  # it is written behind the answer
    while f"request {problem['request_id']} failed" not in caplog.text:
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_all_spellings_of_a_support_set_give_the_same_head(http: httpx.Client) -> None:
    bodies = {
        "fields": http.put("/v1/tasks/s1", files=colours("red", "blue")),
        "json": http.put("/v1/tasks/s2", json={"support": support_json("red", "blue")}),
        "zip": http.put(
            "/v1/tasks/s3", content=zipped(folders("red", "blue")), headers={"Content-Type": "application/zip"}
        ),
        "tar": http.put(
            "/v1/tasks/s4",
            content=tarred(folders("red", "blue", under="photos/")),
            headers={"Content-Type": "application/x-tar"},
        ),
        "lines": http.put(
            "/v1/tasks/s5",
            content="\n".join(json.dumps(item) for item in support_json("red", "blue")),
            headers={"Content-Type": "application/x-ndjson"},
        ),
    }
    for name, response in bodies.items():
        assert response.status_code == 201, (name, response.text)
    assert len({response.json()["head"] for response in bodies.values()}) == 1


def test_all_spellings_of_a_question_give_the_same_answer(http: httpx.Client) -> None:
    taught(http, "q")
    path = "/v1/tasks/q/classify"
    answers = [
        http.post(path, content=RED, headers={"Content-Type": "image/png"}),
        http.post(path, content=RED, headers={"Content-Type": "application/octet-stream"}),
        http.post(path, files=[("image", ("x.png", RED))]),
        http.post(path, json={"images": [text(RED)]}),
        http.post(path, content=json.dumps({"image": text(RED)}), headers={"Content-Type": "application/x-ndjson"}),
    ]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        found = schemas.Predictions.model_validate_json(answer.text)
        assert found.predictions[0].label == "red"
        assert found.predictions == schemas.Predictions.model_validate_json(answers[0].text).predictions
        assert "embed;dur=" in answer.headers["server-timing"]
        assert "total;dur=" in answer.headers["server-timing"]


@pytest.mark.parametrize("top", [1, 2, 3, 1000])
def test_of_the_likeliest_classes_only_the_probabilities_are_told(http: httpx.Client, top: int) -> None:
    http.put("/v1/tasks/many", files=colours("red", "lime", "blue"))
    url = "/v1/tasks/many/classify"
    (whole,), (some,) = (
        http.post(url, params=params, files=[("image", RED)]).json()["predictions"] for params in ({}, {"top": top})
    )
    likeliest = sorted(whole["probabilities"].items(), key=lambda item: -item[1])
    assert list(some["probabilities"].items()) == likeliest[:top]
    assert {**some, "probabilities": None} == {**whole, "probabilities": None}


def test_of_no_class_there_is_nothing_to_tell(http: httpx.Client) -> None:
    refused(http.post("/v1/tasks/t/classify?top=0", files=[("image", RED)]), 422, "invalid_request", "top")


def test_probabilities_sum_to_one_and_the_best_is_the_label(http: httpx.Client) -> None:
    taught(http, "p")
    row = http.post("/v1/tasks/p/classify", files=[("image", RED)]).json()["predictions"][0]
    assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    assert row["probability"] == row["probabilities"][row["label"]] == max(row["probabilities"].values())


def test_one_bad_image_of_a_batch_has_its_own_error(http: httpx.Client) -> None:
    taught(http, "batch")
    files = [("a", RED), ("b", b"%PDF-1.7"), ("c", picture("blue", seed=51))]
    answer = http.post("/v1/tasks/batch/classify", files=files)
    assert answer.status_code == 200
    found = schemas.Predictions.model_validate_json(answer.text).predictions
    assert [row.label for row in found] == ["red", None, "blue"]
    assert found[1].error is not None
    assert "PDF" in found[1].error.detail
    problem = refused(http.post("/v1/tasks/batch/classify?on_bad_image=fail", files=files), 422, "undecodable_example")
    assert problem["index"] == 1


def test_of_several_bad_images_each_has_its_own_error_and_a_lone_one_is_refused(http: httpx.Client) -> None:
    taught(http, "batch")
    files = [("a", b"%PDF-1.7"), ("b", b""), ("c", RED[:100])]
    for url in ("/v1/tasks/batch/classify", "/v1/tasks/batch/classify?explain=true"):
        answer = http.post(url, files=files)
        assert answer.status_code == 200
        found = schemas.Predictions.model_validate_json(answer.text).predictions
        assert len({row.error.detail for row in found if row.error}) == 3
    embedded = http.post("/v1/embed", files=files).json()
    assert embedded["features"] == [None] * 3
    assert [error["index"] for error in embedded["errors"]] == [0, 1, 2]
    for url in ("/v1/tasks/batch/classify", "/v1/embed"):
        refused(http.post(url, files=files[:1]), 422, "undecodable_example", "PDF")
        refused(http.post(url + "?on_bad_image=fail", files=files), 422, "undecodable_example", "PDF")


def test_one_call_learns_and_answers(http: httpx.Client, nothing_stored: None) -> None:
    answer = http.post("/v1/classify", files=[*colours("red", "blue"), ("query", RED)])
    found = schemas.Predictions.model_validate_json(answer.text)
    assert (found.task, found.version, found.predictions[0].label) == (None, None, "red")
    body = {"support": support_json("red", "blue"), "queries": [text(RED)], "method": "ridge"}
    assert http.post("/v1/classify", json=body).json()["predictions"][0]["label"] == "red"


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/tasks", "/v1/tasks/headed", "/openapi.json", "/nowhere"])
def test_who_asks_for_the_head_of_an_answer_gets_that(http: httpx.Client, path: str) -> None:
    taught(http, "headed")
    head, whole = http.head(path), http.get(path)
    assert head.status_code == whole.status_code
    assert head.content == b""
    assert set(head.headers) == set(whole.headers)
    for name in ("content-type", "etag"):
        assert head.headers.get(name) == whole.headers.get(name)


def test_what_forms_escape_in_a_label_is_undone(http: httpx.Client, nothing_stored: None) -> None:
    """Clients write a quotation mark in the name of a field so, and nothing else, a percent sign neither."""
    files = [('mug 3"', picture("red")), ("50%", picture("blue")), ("query", RED)]
    assert b"mug 3%22" in http.build_request("POST", "/", files=files).read()
    answer = http.post("/v1/classify", files=files).json()["predictions"][0]
    assert set(answer["probabilities"]) == {'mug 3"', "50%"}


def test_answers_are_written_in_their_own_letters(http: httpx.Client, nothing_stored: None) -> None:
    answer = http.post("/v1/classify", files=[("été", RED), ("犬", picture("blue")), ("query", RED)])
    assert "犬".encode() in answer.content
    assert answer.json()["predictions"][0]["label"] == "été"


@pytest.mark.slow
def test_pages_of_other_origins_may_call_where_they_are_named(tmp_path: Path) -> None:
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "PUT"}
    more = {"Access-Control-Request-Headers": "authorization,if-match,idempotency-key,content-type"}
    for named, allowed in (("", None), ("https://app.example, https://b.example", "https://app.example"), ("*", "*")):
        app = create_app(
            Settings(cors_origins=named), artifact=tiny_artifact(tmp_path), extractor=MeanColour(), store=MemoryStore()
        )
        with served(app) as client:
            before = client.options("/v1/tasks/a", headers={**asked, **more})
            assert before.headers.get("access-control-allow-origin") == allowed
            assert before.status_code == (200 if named else 405)
            answer = client.put("/v1/tasks/a", files=colours("red", "blue"), headers={"Origin": "https://app.example"})
            assert answer.headers.get("access-control-allow-origin") == allowed
            assert ("ETag" in answer.headers.get("access-control-expose-headers", "")) == bool(named)
            other = client.get("/v1/tasks", headers={"Origin": "https://evil.example"})
            assert other.headers.get("access-control-allow-origin") == ("*" if named == "*" else None)


def test_a_reserved_label_can_be_written_with_a_prefix(http: httpx.Client) -> None:
    files = [("label:query", picture("red")), ("label:unlabelled", picture("blue")), ("query", RED)]
    assert http.post("/v1/classify", files=files).json()["predictions"][0]["label"] == "query"


def test_unlabelled_files_are_examples_without_a_label(http: httpx.Client) -> None:
    task = http.put("/v1/tasks/semi", files=[*colours("red", "blue"), ("unlabelled", picture("orange"))]).json()
    assert task["unlabelled"] == 1
    assert len(task["examples"]) == 6


def test_a_name_is_replaced_and_its_version_counts(http: httpx.Client) -> None:
    first = taught(http, "door")
    same = http.put("/v1/tasks/door", files=colours("red", "blue"))
    assert (same.status_code, same.json()["version"]) == (200, first.version)
    other = http.put("/v1/tasks/door", files=colours("red", "green"))
    assert (other.status_code, other.json()["version"]) == (200, first.version + 1)
    ridge = http.put("/v1/tasks/door?method=ridge", files=colours("red", "green")).json()
    assert (ridge["version"], ridge["method"]) == (first.version + 2, "ridge")


def test_conditions_on_the_version_are_held(http: httpx.Client) -> None:
    url, files = "/v1/tasks/guarded", colours("red", "blue")
    assert http.put(url, files=files, headers={"If-None-Match": "*"}).status_code == 201
    refused(http.put(url, files=files, headers={"If-None-Match": "*"}), 412, "version_conflict")
    etag = http.get(url).headers["etag"]
    moved = http.put(url, files=colours("red", "green"), headers={"If-Match": etag})
    assert moved.json()["version"] == 2
    refused(http.put(url, files=files, headers={"If-Match": etag}), 412, "version_conflict")
    refused(http.put(url, files=files, headers={"If-Match": '"nonsense"'}), 412, "version_conflict")
    now = moved.headers["etag"]
    for refusing in (f"W/{now}", f'{etag}, "x"', '"v0"', '""', '"*"'):
        refused(http.put(url, files=files, headers={"If-Match": refusing}), 412, "version_conflict")
    several = http.put(url, files=files, headers={"If-Match": f'"x", {now}'})
    assert several.json()["version"] == 3
    assert http.put(url, files=colours("red", "lime"), headers={"If-Match": "*"}).json()["version"] == 4
    refused(http.put(url, files=files, headers={"If-None-Match": now}), 422, "invalid_request", "only '*'")
    both = {"If-None-Match": "*", "If-Match": "*"}
    refused(http.put(url, files=files, headers=both), 422, "invalid_request", "not both")


@pytest.mark.parametrize("tag", ["*", '"v0"', '"v1"', '"v1-hd_x"', 'W/"v1"'])
def test_a_condition_on_a_task_that_is_not_there_makes_none(http: httpx.Client, tag: str) -> None:
    for made in ({"files": colours("red", "blue")}, {"params": {"from_task": "told"}}):
        taught(http, "told")
        problem = refused(http.put("/v1/tasks/none", headers={"If-Match": tag}, **made), 412, "version_conflict")  # type: ignore[arg-type]
        assert problem["detail"] == "There is no task 'none'."
    refused(http.get("/v1/tasks/none"), 404, "task_not_found")
    refused(http.delete("/v1/tasks/none", headers={"If-Match": tag}), 404, "task_not_found")


def test_a_task_that_is_named_after_its_head_heeds_conditions_too(http: httpx.Client) -> None:
    files = colours("tan", "teal")
    first = http.post("/v1/tasks", files=files, headers={"If-None-Match": "*"})
    assert first.status_code == 201
    name = first.json()["task"]
    more = http.post(f"/v1/tasks/{name}/examples", files=colours("gold"))
    assert http.put("/v1/tasks/same", files=files).status_code == 201
    for asked in ({"files": files}, {"params": {"from_task": "same"}}):
        for condition in ({"If-None-Match": "*"}, {"If-Match": first.headers["etag"]}, {"If-Match": '"x"'}):
            refused(http.post("/v1/tasks", headers=condition, **asked), 412, "version_conflict")  # type: ignore[arg-type]
    assert http.get(f"/v1/tasks/{name}").json()["version"] == 2
    back = http.post("/v1/tasks", files=files, headers={"If-Match": more.headers["etag"]})
    assert (back.status_code, back.json()["task"], back.json()["version"]) == (200, name, 3)
    assert http.post("/v1/tasks?from_task=same", headers={"If-Match": "*"}).json()["task"] == name
    refused(http.post("/v1/tasks", files=colours("gold", "teal"), headers={"If-Match": "*"}), 412, "version_conflict")


def test_a_task_at_any_version_is_forgotten_where_any_will_do(http: httpx.Client) -> None:
    taught(http, "any")
    assert http.delete("/v1/tasks/any", headers={"If-Match": "*"}).status_code == 204


def test_a_task_is_described_and_not_sent_again_unchanged(http: httpx.Client) -> None:
    task = taught(http, "told")
    response = http.get("/v1/tasks/told")
    found = schemas.Task.model_validate_json(response.text)
    assert (found.head, found.examples, found.expires_at) == (task.head, task.examples, None)
    etag = response.headers["etag"]
    for known in (etag, f"W/{etag}", f'"x", {etag}', f'"x",W/{etag}', "*"):
        again = http.get("/v1/tasks/told", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    for other in ('"x"', f"{etag[:-1]}", f'"x{etag[1:]}', ""):
        assert http.get("/v1/tasks/told", headers={"If-None-Match": other}).status_code == 200
    refused(http.get("/v1/tasks/nobody", headers={"If-None-Match": "*"}), 404, "task_not_found")


def test_an_answer_without_stages_tells_the_whole_time_alone(http: httpx.Client) -> None:
    taught(http, "told")
    for path in ("/v1/tasks/told", "/v1/tasks", "/v1/limits"):
        assert re.fullmatch(r"total;dur=[\d.]+", http.get(path).headers["server-timing"])


def test_a_task_with_an_end_says_when(http: httpx.Client) -> None:
    assert http.put("/v1/tasks/brief?ttl=3600", files=colours("red", "blue")).json()["expires_at"].endswith("+00:00")


def test_tasks_are_listed_page_by_page(http: httpx.Client) -> None:
    for name in ("list-a", "list-b", "list-c"):
        taught(http, name)
    names: list[str] = []
    cursor = "list"
    while cursor:
        page = schemas.TaskList.model_validate_json(http.get(f"/v1/tasks?limit=2&cursor={cursor}").text)
        names += [item.task for item in page.items]
        cursor = page.next_cursor or ""
    assert [name for name in names if name.startswith("list-")] == ["list-a", "list-b", "list-c"]
    assert names == sorted(names)
    last = http.get(f"/v1/tasks?limit={len(names)}&cursor=list").json()
    assert ([item["task"] for item in last["items"]], last["next_cursor"]) == (names, None)  # full, and no more to come


def test_a_deleted_task_is_gone(http: httpx.Client) -> None:
    taught(http, "brief-life")
    assert http.delete("/v1/tasks/brief-life").status_code == 204
    refused(http.delete("/v1/tasks/brief-life"), 404, "task_not_found")
    refused(http.get("/v1/tasks/brief-life"), 404, "task_not_found")
    refused(http.post("/v1/tasks/brief-life/classify", files=[("i", RED)]), 404, "task_not_found")


def test_artifact_and_limits_are_data(http: httpx.Client) -> None:
    artifact = schemas.ArtifactInfo.model_validate_json(http.get("/v1/artifact").text)
    assert [(method.name, method.default) for method in artifact.methods] == [("prototype", True), ("ridge", False)]
    limits = schemas.LimitsInfo.model_validate_json(http.get("/v1/limits").text)
    assert (limits.max_examples, limits.max_body_bytes) == (40, 400_000)


def test_health_readiness_and_metrics(http: httpx.Client) -> None:
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/readyz").json() == {"status": "ok", "lane": True, "store": True}
    taught(http, "measured")
    http.post("/v1/tasks/measured/classify", files=[("i", RED)])
    text = http.get("/metrics").text
    assert 'fewshot_requests_total{route="/v1/tasks/{task}/classify",status="200"}' in text
    assert "measured" not in text.replace("measured_", "")


def test_the_reference_and_its_assets_are_served_from_here(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for rule in ("base-uri", "form-action", "frame-ancestors"):  # for which there is no default
        assert f"; {rule} 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text
    assert "https://" not in page.text
    for name in ("swagger-ui-bundle.js", "swagger-ui.css", "start.js", "favicon.png"):
        assert f"docs/{name}" in page.text
        assert http.get(f"/docs/{name}").status_code == 200
    assert http.get("/docs/../settings.py").status_code == 404


def test_the_openapi_file_names_every_route_and_operation(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    operations = {op["operationId"] for path in document["paths"].values() for op in path.values()}
    assert operations == {
        "adapt",
        "adapt_named",
        "list_tasks",
        "get_task",
        "delete_task",
        "add_examples",
        "remove_example",
        "remove_class",
        "list_versions",
        "change_task",
        "rollback",
        "download_support",
        "get_example_image",
        "export_task",
        "classify",
        "classify_once",
        "embed",
        "get_artifact",
        "get_limits",
        "live",
        "ready",
        "metrics",
    }
    for path in document["paths"].values():
        for operation in path.values():
            if "422" in operation["responses"]:
                assert "application/problem+json" in operation["responses"]["422"]["content"]


def test_the_openapi_file_is_the_same_however_often_it_is_asked_for(http: httpx.Client) -> None:
    first = http.get("/openapi.json").text
    assert http.get("/openapi.json").text == first
    told = http.get("/openapi.json").json()["paths"]["/v1/tasks/{task}"]["get"]["parameters"]
    assert [row["name"] for row in told] == ["task", "version", "If-None-Match"]


def test_the_openapi_file_names_every_body_answer_and_header_of_a_question_and_an_export(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    for path in ("/v1/tasks/{task}/classify", "/v1/embed"):
        assert "application/octet-stream" in paths[path]["post"]["requestBody"]["content"]
    lines = paths["/v1/tasks/{task}/classify"]["post"]["responses"]["200"]["content"]
    assert lines.keys() == {"application/json", "application/x-ndjson"}
    assert lines["application/x-ndjson"]["schema"]["$ref"].endswith("/Prediction")
    for path in ("/v1/tasks/{task}", "/v1/tasks/{task}/export"):
        told = paths[path]["get"]
        assert [row["name"] for row in told["parameters"] if row["in"] == "header"] == ["If-None-Match"]
        assert all("ETag" in told["responses"][status]["headers"] for status in ("200", "304"))


def test_every_reference_in_the_openapi_file_leads_somewhere(http: httpx.Client) -> None:
    text = http.get("/openapi.json").text
    names = set(re.findall(r'"\$ref":\s*"([^"]+)"', text))
    assert "#/components/schemas/SupportBody" in names
    known = json.loads(text)["components"]["schemas"]
    assert {name.removeprefix("#/components/schemas/") for name in names} <= set(known)


def test_every_answer_carries_a_request_id_and_the_callers_own_is_kept(http: httpx.Client) -> None:
    assert len(http.get("/healthz").headers["x-request-id"]) == 32
    assert http.get("/healthz", headers={"X-Request-ID": "mine-7"}).headers["x-request-id"] == "mine-7"
    assert http.get("/healthz", headers={"X-Request-ID": "a b<script>"}).headers["x-request-id"] != "a b<script>"


def test_the_lean_route_answers_like_the_general_one(http: httpx.Client) -> None:
    taught(http, "lean")
    path = "/v1/tasks/lean/classify"

    def both(body: bytes, task: str = "lean") -> list[httpx.Response]:
        url = path.replace("lean", task)
        # A parameter of the content type, or a query string, is enough to leave the lean case.
        return [
            http.post(url, content=body, headers={"Content-Type": "image/png"}),
            http.post(url, content=body, headers={"Content-Type": "image/png; q=1"}),
            http.post(url + "?on_bad_image=skip", content=body, headers={"Content-Type": "image/png"}),
        ]

    own = {"timings_ms", "request_id"}
    for answers in (both(RED), both(b"junk"), both(b""), both(RED, "nobody")):
        bodies = [{key: value for key, value in answer.json().items() if key not in own} for answer in answers]
        assert bodies[0] == bodies[1] == bodies[2]
        assert len({answer.status_code for answer in answers}) == 1
        assert len({answer.headers["content-type"] for answer in answers}) == 1
        assert len({tuple(sorted(answer.headers)) for answer in answers}) == 1
