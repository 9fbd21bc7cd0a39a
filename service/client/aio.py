"""The client for asyncio. What its methods do is told in `sync.py`; these are the same, awaited.

Files are read and bodies put together in a thread, so the event loop stands still for neither.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
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


class AsyncClient:
    """As Client, for asyncio; use it as an asynchronous context manager, or await `close`."""

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
        self._http = httpx.AsyncClient(**http.settings(self.base_url, key, timeout))

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await self.close()

    async def adapt(
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
    ) -> AsyncTask:
        return await self._task(
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

    async def task(self, name: str, *, version: int | None = None) -> AsyncTask:
        return await self._task(self._plans.task(name, version=version))

    async def tasks(self) -> AsyncIterator[values.TaskItem]:
        cursor: str | None = ""
        while cursor is not None:
            items, cursor = await self._run(self._plans.page(cursor))
            for item in items:
                yield item

    async def classify_once(
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
        return await self._run(
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

    async def embed(self, images: Images, *, on_bad_image: OnBadImage = "skip") -> values.Embedding:
        return await self._run(self._plans.embed(images, on_bad_image=on_bad_image))

    async def artifact(self) -> values.Artifact:
        return await self._run(self._plans.artifact())

    async def limits(self) -> values.Limits:
        return await self._run(self._plans.limits())

    async def health(self) -> values.Health:
        return await self._run(self._plans.health())

    async def _task(self, plan: Plan[values.TaskState]) -> AsyncTask:
        return AsyncTask._of(await self._run(plan), self)

    async def _run(self, plan: Plan[T]) -> T:
        outcome: Outcome = None
        while True:
            step = await asyncio.to_thread(advance, plan, outcome)
            if isinstance(step, Done):
                return step.value
            if isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
                outcome = None
            else:
                outcome = await self._send(step)

    async def _send(self, call: Call) -> Answer | Lost:
        try:
            return http.answer(await self._http.request(**http.request(call)))
        except httpx.RequestError as error:
            return http.lost(error, self.base_url)


class AsyncTask(values.TaskState):
    """As Task, awaited."""

    _client: AsyncClient  # no field: what is compared, shown and copied is what the service said

    @classmethod
    def _of(cls, state: values.TaskState, client: AsyncClient) -> Self:
        task = cls(**values.fields_of(state))
        object.__setattr__(task, "_client", client)
        return task

    @overload
    async def classify(  # type: ignore[overload-overlap]  # text is a path here, not a sequence of paths
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
    async def classify(
        self, images: Content, *, reject: Reject | None = None, explain: bool | None = None, top: int | None = None
    ) -> values.Prediction: ...

    @overload
    async def classify(
        self,
        images: Iterable[Image],
        *,
        reject: Reject | None = None,
        explain: bool | None = None,
        top: int | None = None,
        on_bad_image: OnBadImage = "skip",
        progress: Progress | None = None,
    ) -> list[values.Prediction]: ...

    async def classify(
        self,
        images: Images,
        *,
        reject: Reject | None = None,
        explain: bool | None = None,
        top: int | None = None,
        on_bad_image: OnBadImage = "skip",
        progress: Progress | None = None,
    ) -> values.Prediction | list[values.Prediction]:
        plan = self._client._plans.classify(
            self.name, images, reject=reject, explain=explain, top=top, on_bad_image=on_bad_image, progress=progress
        )
        return await self._client._run(plan)

    async def add(
        self,
        support: Support,
        *,
        unlabelled: Images = (),
        on_bad_image: OnBadImage = "skip",
        progress: Progress | None = None,
    ) -> AsyncTask:
        plans = self._client._plans
        plan = plans.add(self.name, support, unlabelled=unlabelled, on_bad_image=on_bad_image, progress=progress)
        return await self._client._task(plan)

    async def remove(self, example: str) -> AsyncTask:
        return await self._client._task(self._client._plans.remove(self.name, "examples", example))

    async def remove_class(self, label: str) -> AsyncTask:
        return await self._client._task(self._client._plans.remove(self.name, "classes", label))

    async def versions(self) -> tuple[values.Version, ...]:
        return await self._client._run(self._client._plans.versions(self.name))

    async def learn_with(self, method: str) -> AsyncTask:
        return await self._client._task(self._client._plans.learn_with(self.name, method))

    async def rollback(self, version: int) -> AsyncTask:
        return await self._client._task(self._client._plans.rollback(self.name, version))

    async def refresh(self) -> AsyncTask:
        return await self._client._task(self._client._plans.task(self.name))

    async def export(self, path: str | os.PathLike[str], *, precision: Precision | None = None) -> Path:
        return await self._client._run(self._client._plans.export(self.name, path, precision=precision))

    async def save_support(self, path: str | os.PathLike[str]) -> Path:
        return await self._client._run(self._client._plans.save_support(self.name, path))

    async def image(self, example: str) -> bytes:
        return await self._client._run(self._client._plans.image(self.name, example))

    async def forget(self) -> None:
        await self._client._run(self._client._plans.forget(self.name))
