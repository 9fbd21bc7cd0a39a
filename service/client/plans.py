"""Every use of the API, written once: which requests it takes, and what their answers mean.

Nothing here opens a socket or waits; see `wire.py` for what a plan is, and `batches.py` for what goes into one request.
"""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar
from urllib.parse import quote

from service.client import errors, pictures, values, wire
from service.client.batches import Loaded, OnBadImage, Waiting, encoded, fitting, naming
from service.client.pictures import File, Images, Support
from service.client.wire import Call, Patience, Plan

T = TypeVar("T")
Precision: TypeAlias = Literal["float32", "int8"]
Reject: TypeAlias = float | Literal["off"]
Progress: TypeAlias = Callable[[int, int], None]  # images sent and of how many; called from another thread if async

EXAMPLE = re.compile(r"\b(?:[Ee]xample )?(ex_[0-9a-f]{32})\b")  # as the service names one in a sentence
MOST_NAMES = 10_000  # that a client remembers
UPLOAD_S = 3600  # what is broken off half-way is kept for so long
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # of a task, and of an example


class Plans:
    def __init__(self, patience: Patience):
        self.patience = patience
        self._names: dict[str, str] = {}  # of files by the ids of the examples that they became
        self._limits: values.Limits | None = None

    # Tasks

    def adapt(
        self,
        support: Support,
        *,
        task: str | None,
        unlabelled: Images,
        method: str | None,
        ttl: float | None,
        retain: Literal["features", "images"] | None,
        on_bad_image: OnBadImage,
        progress: Progress | None,
    ) -> Plan[values.TaskState]:
        files = pictures.support(support, unlabelled)
        made = Call("POST", "/v1/tasks") if task is None else Call("PUT", _path(task))
        limits = yield from self.limits()
        if len(files) > limits.max_examples:
            raise errors.TooLarge(
                f"These are {len(files)} images; a task may have {limits.max_examples} on this service.",
                code="too_large",
            )
        waiting = Waiting(files, limits, on_bad_image)
        options = _query(method=method, ttl=ttl, retain=retain, on_bad_image=on_bad_image)
        if waiting.fits_one_request:
            made = dataclasses.replace(made, query=options)
            return (yield from self._learn(waiting, made, on_bad_image, progress))
        # The task is made of another one, which is there while it grows: so it never answers from a part, and has one
        # version more and not many.
        upload = f"upload-{secrets.token_hex(8)}"
        growing = Call("PUT", _path(upload), {**options, "ttl": str(UPLOAD_S)})
        note = "Nothing was learned." if task is None else f"The task {task!r} was not changed."
        try:
            whole = yield from self._learn(waiting, growing, on_bad_image, progress, note=note)
            made = dataclasses.replace(made, query=_query(from_task=upload, method=method, ttl=ttl))
            state = yield from self._ask(_once(made), self._task)
        except errors.Unreachable:
            raise
        except (errors.FewshotError, OSError):
            yield Call("DELETE", growing.path)
            raise
        yield Call("DELETE", growing.path)  # once: it ends by itself as well
        return dataclasses.replace(state, rejected=whole.rejected)

    def add(
        self, task: str, support: Support, *, unlabelled: Images, on_bad_image: OnBadImage, progress: Progress | None
    ) -> Plan[values.TaskState]:
        files = pictures.support(support, unlabelled)
        call = _adding(task, on_bad_image)
        limits = yield from self.limits()
        return (yield from self._learn(Waiting(files, limits, on_bad_image), call, on_bad_image, progress))

    def task(self, task: str, *, version: int | None = None) -> Plan[values.TaskState]:
        return (yield from self._ask(Call("GET", _path(task), _query(version=version)), self._task))

    def page(self, cursor: str) -> Plan[tuple[tuple[values.TaskItem, ...], str | None]]:
        call = Call("GET", "/v1/tasks", {"limit": "200", **_query(cursor=cursor or None)})
        return (yield from self._ask(call, values.page))

    def versions(self, task: str) -> Plan[tuple[values.Version, ...]]:
        return (yield from self._ask(Call("GET", _path(task, "versions")), values.versions))

    def remove(self, task: str, kind: Literal["examples", "classes"], name: str) -> Plan[values.TaskState]:
        return (yield from self._ask(_once(Call("DELETE", _path(task, kind, name))), self._task))

    def learn_with(self, task: str, method: str) -> Plan[values.TaskState]:
        return (yield from self._ask(_once(Call("PATCH", _path(task), _query(method=method))), self._task))

    def rollback(self, task: str, version: int) -> Plan[values.TaskState]:
        call = Call("POST", _path(task, "rollback"), _query(version=version))
        return (yield from self._ask(_once(call), self._task))

    def forget(self, task: str) -> Plan[None]:
        try:
            yield from wire.ask(Call("DELETE", _path(task)), self.patience)
        except errors.TaskNotFound as error:
            if error.attempts == 1:
                raise

    def export(self, task: str, path: str | os.PathLike[str], *, precision: Precision | None) -> Plan[Path]:
        kind = Path(path).suffix.lower().removeprefix(".")
        if kind not in ("onnx", "zip"):
            raise ValueError(f"{os.fspath(path)} ends in neither .onnx nor .zip: the name says what is written.")
        call = Call("GET", _path(task, "export"), _query(format=kind, precision=precision))
        return (yield from self._save(call, path))

    def save_support(self, task: str, path: str | os.PathLike[str]) -> Plan[Path]:
        return (yield from self._save(Call("GET", _path(task, "support")), path))

    def image(self, task: str, example: str) -> Plan[bytes]:
        answer = yield from wire.ask(Call("GET", _path(task, "examples", example, "image")), self.patience)
        return answer.content

    # Questions

    def classify(
        self, task: str, images: Images, *, on_bad_image: OnBadImage, progress: Progress | None, **options: Any
    ) -> Plan[values.Prediction | list[values.Prediction]]:
        """One answer for one image, or one for each of several."""
        if pictures.is_one(images):
            return (yield from self._classify_one(task, images, **options))
        return (yield from self._classify_many(task, images, on_bad_image=on_bad_image, progress=progress, **options))

    def _classify_one(self, task: str, image: pictures.Image, **options: Any) -> Plan[values.Prediction]:
        data = pictures.one(image).load()
        headers = {"Content-Type": "application/octet-stream"}
        call = Call("POST", _path(task, "classify"), _query(**options), data, headers)
        return (yield from self._ask(call, lambda body: self._prediction(body["predictions"][0])))

    def _classify_many(
        self, task: str, images: Images, *, on_bad_image: OnBadImage, progress: Progress | None, **options: Any
    ) -> Plan[list[values.Prediction]]:
        def read(body: Any) -> list[values.Prediction]:
            return [self._prediction(row) for row in body["predictions"]]

        query = _query(**options, on_bad_image=on_bad_image)
        path, files = _path(task, "classify"), pictures.many(images)
        rows = yield from self._each(path, query, files, read, on_bad_image, progress)
        return [
            values.Prediction(index, error=row)
            if isinstance(row, values.ImageError)
            else dataclasses.replace(row, index=index)
            for index, row in enumerate(rows)
        ]

    def classify_once(
        self, support: Support, queries: Images, *, unlabelled: Images, **options: Any
    ) -> Plan[values.Predictions]:
        files = [(file, file.load()) for file in pictures.support(support, unlabelled)]
        self._remember(files)
        questions = [file.load() for file in pictures.many(queries)]
        content, headers = encoded(files, questions)

        def read(body: Any) -> values.Predictions:
            return values.Predictions(
                tuple(self._prediction(row) for row in body["predictions"]),
                tuple(values.of(values.Rejected, row, name=files[row["index"]][0].name) for row in body["rejected"]),
            )

        try:
            return (yield from self._ask(Call("POST", "/v1/classify", _query(**options), content, headers), read))
        except errors.InvalidSupport:  # what else has an index may be of a question: they are counted by themselves
            with naming(files, range(len(files))):
                raise

    def embed(self, images: Images, *, on_bad_image: OnBadImage) -> Plan[values.Embedding]:
        about: dict[str, Any] = {}

        def read(body: Any) -> list[tuple[float, ...] | values.ImageError]:
            about.update(artifact=body["artifact"], dim=body["dim"])
            return values.features(body)

        if pictures.is_one(images):
            on_bad_image = "fail"  # alone, it is refused
        files = pictures.many(images)
        if not files:
            raise ValueError("There is no image.")
        rows = yield from self._each("/v1/embed", {"on_bad_image": on_bad_image}, files, read, on_bad_image)
        if not about:
            artifact = yield from self.artifact()
            about.update(artifact=artifact.digest, dim=artifact.dim)
        bad = [(index, row) for index, row in enumerate(rows) if isinstance(row, values.ImageError)]
        return values.Embedding(
            **about,
            features=tuple(None if isinstance(row, values.ImageError) else row for row in rows),
            errors=tuple(values.Rejected(index, row.code, row.detail, files[index].name) for index, row in bad),
        )

    # The service

    def artifact(self) -> Plan[values.Artifact]:
        return (yield from self._ask(Call("GET", "/v1/artifact"), values.artifact))

    def limits(self) -> Plan[values.Limits]:
        if self._limits is None:
            self._limits = yield from self._ask(Call("GET", "/v1/limits"), values.limits)
        return self._limits

    def health(self) -> Plan[values.Health]:
        """Asked once: that the service is not ready is an answer as well."""
        outcome = yield Call("GET", "/readyz")
        if not (isinstance(outcome, wire.Answer) and outcome.status == 503):
            outcome = wire.answered(outcome)
        return wire.read(outcome, lambda body: values.of(values.Health, body))

    # What they are made of

    def _ask(self, call: Call, read: Callable[[Any], T]) -> Plan[T]:
        """What `read` makes of the JSON of the answer."""
        answer = yield from wire.ask(call, self.patience)
        return wire.read(answer, read)

    def _remember(self, files: Loaded) -> None:
        for file, data in files:
            self._names[pictures.example_id(file.label, data)] = file.name
        for id in list(self._names)[: max(0, len(self._names) - MOST_NAMES)]:
            self._names.pop(id, None)

    def _task(self, body: Any) -> values.TaskState:
        """A task, with the names of the files that this client sent."""
        state = values.task(body)
        suspects = tuple(dataclasses.replace(s, name=self._names.get(s.example)) for s in state.report.suspects)
        advice = EXAMPLE.sub(lambda said: self._names.get(said[1]) or said[0], state.report.advice)
        return dataclasses.replace(
            state,
            examples=tuple(dataclasses.replace(item, name=self._names.get(item.id)) for item in state.examples),
            report=dataclasses.replace(state.report, suspects=suspects, advice=advice),
        )

    def _prediction(self, body: Any) -> values.Prediction:
        row = values.prediction(body)
        nearest = tuple(dataclasses.replace(item, name=self._names.get(item.example)) for item in row.nearest)
        return dataclasses.replace(row, nearest=nearest) if nearest else row

    def _save(self, call: Call, path: str | os.PathLike[str]) -> Plan[Path]:
        target = Path(path)
        answer = yield from wire.ask(call, self.patience)
        target.write_bytes(answer.content)
        return target

    def _learn(
        self,
        waiting: Waiting,
        first: Call,
        on_bad_image: OnBadImage,
        progress: Progress | None,
        *,
        note: str | None = None,
    ) -> Plan[values.TaskState]:
        """Sends examples in as few requests as the limit on bodies allows; those after the first one add to it.

        `note`, where something goes wrong, says what is left; otherwise how far it got does.
        """
        state: values.TaskState | None = None
        try:
            while batch := waiting.take():
                call = first if state is None else _adding(state.name, on_bad_image)
                self._remember(batch)
                content, headers = encoded(batch)
                call = _once(dataclasses.replace(call, content=content, headers=headers))
                with naming(batch, waiting.positions(batch)):
                    try:
                        state = yield from self._ask(call, self._task)
                    except errors.InvalidSupport as error:
                        if state is None and not waiting:
                            raise  # it was all that there is
                        known = {item.label for item in state.classes} if state else set()
                        yield from self._leave_out_broken(batch, waiting, known, error)
                        continue
                for item in state.rejected:
                    waiting.leave_out(batch[item.index][0], item.code, item.detail)
                if progress is not None:
                    progress(waiting.total - len(waiting), waiting.total)
        except errors.FewshotError as error:
            if note is None and state is not None:
                note = f"The task {state.name!r} has learned a part; it is at version {state.version}."
            if note is not None:
                error.add_note(note)
            raise
        if state is None:
            raise errors.InvalidSupport("There is no image to learn from.", code="invalid_support")
        return dataclasses.replace(state, rejected=tuple(sorted(waiting.rejected, key=lambda item: item.index)))

    def _leave_out_broken(
        self, batch: Loaded, waiting: Waiting, known: set[str], refusal: errors.InvalidSupport
    ) -> Plan[None]:
        """After a request that was refused, perhaps for a class with no usable image: the next one may have some.

        The service sees one request at a time and cannot know. Raises InvalidSupport when that was not the reason, or
        no more images of such a class are to come.
        """
        files = [pictures.one(data) for _, data in batch]
        rows = yield from self._each("/v1/embed", {}, files, values.features, "skip")
        why = {index: row for index, row in enumerate(rows) if isinstance(row, values.ImageError)}
        if not why:
            raise refusal
        for index, row in why.items():
            waiting.leave_out(batch[index][0], row.code, row.detail)
        waiting.put_back([pair for index, pair in enumerate(batch) if index not in why])
        for index, row in why.items():
            label = batch[index][0].label
            if label is not None and label not in known and not waiting.has(label):
                text = f"The class {label!r} has no usable image: {row.detail}"
                raise errors.InvalidSupport(text, code=refusal.code, status=refusal.status, index=index)

    def _each(
        self,
        path: str,
        query: Mapping[str, str],
        files: Sequence[File],
        read: Callable[[Any], Sequence[T | values.ImageError]],
        on_bad_image: OnBadImage,
        progress: Progress | None = None,
    ) -> Plan[list[T | values.ImageError]]:
        """What `read` finds for each image, or its error."""
        limits = yield from self.limits()
        rows: list[T | values.ImageError] = []
        left = deque(files)
        while left:
            batch = fitting(left, most=limits.max_queries, largest_body=limits.max_body_bytes)
            content, headers = wire.form(("image", data) for _, data in batch)
            with naming(batch, range(len(rows), len(rows) + len(batch))):
                try:
                    rows += yield from self._ask(Call("POST", path, query, content, headers), read)
                except (errors.UndecodableExample, errors.TooLarge) as error:
                    error.index = 0 if len(batch) == 1 else error.index  # a body that is too large names none
                    if len(batch) > 1 or on_bad_image == "fail":
                        raise
                    rows.append(values.ImageError(error.code, error.detail))  # what is wrong with the one is so refused
            if progress is not None:
                progress(len(rows), len(files))
        return rows


def _adding(task: str, on_bad_image: OnBadImage) -> Call:
    return Call("POST", _path(task, "examples"), _query(on_bad_image=on_bad_image))


def _once(call: Call) -> Call:
    """A change that is made once, however often it is sent."""
    return dataclasses.replace(call, headers={**call.headers, **wire.once()})


def _path(task: str, *parts: str) -> str:
    """Raises InvalidRequest or ExampleNotFound for a name that no task or example has: it might be another address."""
    if not NAME.fullmatch(task):
        raise errors.InvalidRequest("A task name has 1 to 64 letters, digits, '-' or '_'.", code="invalid_request")
    if parts[:1] == ("examples",) and len(parts) > 1 and not NAME.fullmatch(parts[1]):
        raise errors.ExampleNotFound(f"The task has no example {parts[1][:64]!r}.", code="example_not_found")
    return "/v1/tasks/" + "/".join(map(_segment, (task, *parts)))


def _segment(part: str) -> str:
    """One segment of a path. A label may be "..", which would lead out of it, to the task."""
    return part.replace(".", "%2E") if part in (".", "..") else quote(part, safe="")


def _query(**given: Any) -> dict[str, str]:
    """Query parameters; what is None is left to the service."""
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in given.items()
        if value is not None
    }
