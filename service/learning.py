"""From examples to a record, and from a record to a head: with the learners of one artifact, on the batcher's lanes.

Knows nothing of stores, nor of which task a record is of but for what it says in its errors.
"""

from __future__ import annotations

from models.artifact import Artifact
from models.errors import TaskStale, TooLarge, UndecodableExample, UnknownMethod
from models.head import Head
from models.learners import Learner
from models.report import Report
from service.batcher import Batcher
from service.stores import Record
from service.support import UNLIMITED, Example, Learned, Limits, Rows, learn, like, record_of, usable


class Learning:
    def __init__(self, artifact: Artifact, batcher: Batcher, limits: Limits, *, default_method: str, device: str):
        """Raises UnknownMethod when the default is no learner of the artifact."""
        self.artifact = artifact
        self.batcher = batcher
        self.limits = limits
        self.learners = artifact.learners(device)
        self.default_method = default_method or artifact.manifest.default
        self._device = device
        self.learner(self.default_method)

    def learner(self, method: str) -> Learner:
        try:
            return self.learners[method]
        except KeyError:
            known = ", ".join(self.learners)
            raise UnknownMethod(f"There is no method {method[:64]!r}; this artifact has {known}.") from None

    def is_ours(self, made: Record | Head) -> bool:
        """Whether it is of features of the artifact that is served."""
        return made.artifact == self.artifact.digest

    def record(self, rows: Rows, method: str, *, known: bool = False) -> Record:
        """Raises TooLarge, but for what is `known`: of a task that is there, however large it was allowed to be."""
        dim, limits = self.artifact.manifest.dim, UNLIMITED if known else self.limits
        return record_of(rows, artifact=self.artifact.digest, method=method, dim=dim, limits=limits)

    async def head(self, record: Record) -> Head:
        """For questions whose images were let in, or once for all who ask."""
        return await self.batcher.run(lambda: self._learn(record).head, admitted=True)

    async def head_and_report(self, record: Record, *, admitted: bool) -> tuple[Head, Report]:
        """`admitted`: see Batcher.run, whose errors are raised."""

        def work() -> tuple[Head, Report]:
            learned = self._learn(record)
            return learned.head, learned.report

        return await self.batcher.run(work, admitted=admitted)

    def _learn(self, record: Record) -> Learned:
        learner, manifest = self.learner(record.method), self.artifact.manifest
        temperature, rejection = manifest.methods[record.method], manifest.rejections.get(record.method)
        return learn(record, learner, temperature, rejection, device=self._device, near=manifest.twins)

    async def ours(self, task: str, record: Record) -> Record:
        """The record, or the same task for the artifact that is served now. Raises TaskStale."""
        return record if self.is_ours(record) else await self.renewed(task, record)

    async def renewed(self, task: str, record: Record) -> Record:
        """The same task for the artifact that is served now, from its retained images. Raises TaskStale without."""
        if not record.images:
            raise TaskStale(f"The task {task!r} was learned with another artifact; send its examples again.")
        embedded = await self.batcher.embed(record.images)
        labels = [record.labels[c] for c in record.classes]
        examples = [Example(label, image) for label, image in zip(labels, record.images, strict=False)]
        try:
            rows, _ = usable(examples, record.images[len(labels) :], embedded.items, on_bad_image="fail", retain=True)
        except (UndecodableExample, TooLarge):  # a limit was lowered since; the caller sent no such image
            raise TaskStale(f"Not all images of the task {task!r} can be read now; send its examples again.") from None
        method = record.method if record.method in self.learners else self.default_method
        return like(self.record(rows, method, known=True), record)
