"""The extractor of an artifact on onnxruntime: one session of one thread, called by as many threads as there are cores.

The only importer of onnxruntime while serving. A pool of onnxruntime's own, with spinning threads, collapses as soon
as something else needs a core; callers that bring their own thread do not.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from models.artifact import GRAPHS, Artifact
from models.errors import ArtifactInvalid

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is first imported

import onnxruntime


def session(model: str | bytes, *, quiet: bool = False) -> Any:
    """A graph, from its path or its bytes, ready to be called from any thread.

    `quiet`: what fails is raised as ever, and not printed besides; for what is only tried.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4 if quiet else 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class OnnxExtractor:
    def __init__(self, artifact: Artifact, *, precision: str = "float32"):
        if precision not in GRAPHS:
            raise ArtifactInvalid(f"{precision} is for a GPU: on a CPU FEWSHOT_PRECISION is {' or '.join(GRAPHS)}.")
        file = artifact.path / GRAPHS[precision]
        if file.name not in artifact.manifest.files:
            raise ArtifactInvalid(f"The artifact {artifact.manifest.name!r} has no {precision} graph.")
        self._session = session(str(file))
        self._input = artifact.input_name
        self.dim = artifact.manifest.dim
        self.precision = precision

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        (features,) = self._session.run(["features"], {self._input: batch})
        return np.asarray(features, dtype=np.float32)
