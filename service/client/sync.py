"""The client that waits for its answers, and a task as it hands it out."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload

import httpx

from service.client import http, values
from service.client.batches import OnBadImage
from service.client.pictures import Content, Image, Images, Support
from service.client.plans import Plans, Precision, Progress, Reject
from service.client.wire import Answer, Call, Done, Lost, Outcome, Patience, Pause, Plan, advance

T = TypeVar("T")


class Client:
    """A service at an address. Safe to share between threads; closing it is optional.

    What is not given, the address or the key, is that of FEWSHOT_URL or FEWSHOT_KEY, where these are set.

    Requests that find the service busy or the connection broken are tried again up to `retries` times, after the wait
    that the service asked for, unless that is more than `longest_wait` seconds. `timeout` bounds one attempt.
    """

    def __init__(
        self,
        base_url: str | None = None,
        key: str | None = None,
        *,
        timeout: float = 60.0,
        retries: int = 3,
        longest_wait: float = 20.0,
    ):
        self.base_url = http.address(base_url)
        self._plans = Plans(Patience(retries, longest_wait))
        self._http = httpx.Client(**http.settings(self.base_url, key, timeout))
        self._finalizer = weakref.finalize(self, self._http.close)

    def close(self) -> None:
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def adapt(
        self,
        support: Support,
        *,
        task: str | None = None,
        unlabelled: Images = (),
        method: str | None = None,
        ttl: float | None = None,
        retain: Literal["features", "images"] | None = None,
        on_bad_image: OnBadImage = "skip",
        progress: Progress | None = None,
    ) -> Task:
        """Learns a task, or replaces the one of that name; without a name it is named after what was learned.

        `support` is a folder or a zip with one folder per label, or a mapping from labels to images: a pattern, a
        folder, paths, bytes, open files, PIL images. `ttl` is in seconds. Images that cannot be used are left out and
        listed in `rejected`; with `on_bad_image="fail"` they refuse the request.
        """
        return self._task(
            self._plans.adapt(
                support,
                task=task,
                unlabelled=unlabelled,
                method=method,
                ttl=ttl,
                retain=retain,
                on_bad_image=on_bad_image,
                progress=progress,
            )
        )

    def task(self, name: str, *, version: int | None = None) -> Task:
        """A task that was learned before. Raises TaskNotFound."""
        return self._task(self._plans.task(name, version=version))

    def tasks(self) -> Iterator[values.TaskItem]:
        """Every task by name; pages are asked for as they are needed."""
        cursor: str | None = ""
        while cursor is not None:
            items, cursor = self._run(self._plans.page(cursor))
            yield from items

    def classify_once(
        self,
        support: Support,
        queries: Images,
        *,
        unlabelled: Images = (),
        method: str | None = None,
        reject: Reject | None = None,
        explain: bool | None = None,
        top: int | None = None,
        on_bad_image: OnBadImage = "skip",
    ) -> values.Predictions:
        """Support set and questions in one request, with nothing stored."""
        return self._run(
            self._plans.classify_once(
                support,
                queries,
                unlabelled=unlabelled,
                method=method,
                reject=reject,
                explain=explain,
                top=top,
                on_bad_image=on_bad_image,
            )
        )

    def embed(self, images: Images, *, on_bad_image: OnBadImage = "skip") -> values.Embedding:
        """Features of images, for other systems."""
        return self._run(self._plans.embed(images, on_bad_image=on_bad_image))

    def artifact(self) -> values.Artifact:
        return self._run(self._plans.artifact())

    def limits(self) -> values.Limits:
        """The limits of the service, as they were when this client first needed them."""
        return self._run(self._plans.limits())

    def health(self) -> values.Health:
        return self._run(self._plans.health())

    def _task(self, plan: Plan[values.TaskState]) -> Task:
        return Task._of(self._run(plan), self)

    def _run(self, plan: Plan[T]) -> T:
        outcome: Outcome = None
        while True:
            step = advance(plan, outcome)
            if isinstance(step, Done):
                return step.value
            if isinstance(step, Pause):
                time.sleep(step.seconds)
                outcome = None
            else:
                outcome = self._send(step)

    def _send(self, call: Call) -> Answer | Lost:
        try:
            return http.answer(self._http.request(**http.request(call)))
        except httpx.RequestError as error:
            return http.lost(error, self.base_url)


class Task(values.TaskState):
    """A task as it was at `version`, and what can be done with it. Every change returns the task as it is then.

    Questions go to the task as it is now, whatever version this value describes.
    """

    _client: Client  # no field: what is compared, shown and copied is what the service said

    @classmethod
    def _of(cls, state: values.TaskState, client: Client) -> Self:
        task = cls(**values.fields_of(state))
        object.__setattr__(task, "_client", client)
        return task

    @overload
    def classify(  # type: ignore[overload-overlap]  # text is a path here, not a sequence of paths
        self,
        images: str | os.PathLike[str],
        *,
        reject: Reject | None = None,
        explain: bool | None = None,
        top: int | None = None,
        on_bad_image: OnBadImage = "skip",
        progress: Progress | None = None,
    ) -> values.Prediction | Any: ...  # of a file; of a folder or a pattern a list of them, which no type can tell

    @overload
    def classify(
        self, images: Content, *, reject: Reject | None = None, explain: bool | None = None, top: int | None = None
    ) -> values.Prediction: ...

    @overload
    def classify(
        self,
        images: Iterable[Image],
        *,
        reject: Reject | None = None,
        explain: bool | None = None,
        top: int | None = None,
        on_bad_image: OnBadImage = "skip",
        progress: Progress | None = None,
    ) -> list[values.Prediction]: ...

    def classify(
        self,
        images: Images,
        *,
        reject: Reject | None = None,
        explain: bool | None = None,
        top: int | None = None,
        on_bad_image: OnBadImage = "skip",
        progress: Progress | None = None,
    ) -> values.Prediction | list[values.Prediction]:
        """The answer for one image, or the list of answers for several, which may be any number.

        A list, a folder and a pattern such as "now/*.jpg" are several, even of one. `reject` is the share of genuine
        images that may be taken for "none of these", or "off"; `explain` names the nearest examples; of `top` classes,
        the likeliest first, are probabilities told, and not of all. Of several images one that cannot be read has its
        `error`; a single one raises it.
        """
        plan = self._client._plans.classify(
            self.name, images, reject=reject, explain=explain, top=top, on_bad_image=on_bad_image, progress=progress
        )
        return self._client._run(plan)

    def add(
        self,
        support: Support,
        *,
        unlabelled: Images = (),
        on_bad_image: OnBadImage = "skip",
        progress: Progress | None = None,
    ) -> Task:
        """Adds examples, of known classes or new ones."""
        plans = self._client._plans
        plan = plans.add(self.name, support, unlabelled=unlabelled, on_bad_image=on_bad_image, progress=progress)
        return self._client._task(plan)

    def remove(self, example: str) -> Task:
        """Takes one example back, by its id."""
        return self._client._task(self._client._plans.remove(self.name, "examples", example))

    def remove_class(self, label: str) -> Task:
        return self._client._task(self._client._plans.remove(self.name, "classes", label))

    def versions(self) -> tuple[values.Version, ...]:
        """The versions that can be rolled back to, newest first."""
        return self._client._run(self._client._plans.versions(self.name))

    def learn_with(self, method: str) -> Task:
        """Learns the same examples with another method; no image is sent again."""
        return self._client._task(self._client._plans.learn_with(self.name, method))

    def rollback(self, version: int) -> Task:
        """Makes an earlier version the newest."""
        return self._client._task(self._client._plans.rollback(self.name, version))

    def refresh(self) -> Task:
        """The task as it is now."""
        return self._client._task(self._client._plans.task(self.name))

    def export(self, path: str | os.PathLike[str], *, precision: Precision | None = None) -> Path:
        """Writes the task as one ONNX file, or with a program that runs it: the name ends in .onnx or in .zip.

        Raises ValueError for a name with another ending.
        """
        return self._client._run(self._client._plans.export(self.name, path, precision=precision))

    def save_support(self, path: str | os.PathLike[str]) -> Path:
        """Writes the images of the task as a zip. Raises NotRetained unless they were kept."""
        return self._client._run(self._client._plans.save_support(self.name, path))

    def image(self, example: str) -> bytes:
        """The image of an example. Raises NotRetained unless it was kept."""
        return self._client._run(self._client._plans.image(self.name, example))

    def forget(self) -> None:
        """Deletes the task with all its versions, for good."""
        self._client._run(self._client._plans.forget(self.name))
