"""The folder that training exports and the service loads: verified, immutable, named by its digest.

    manifest.json            what it is, what it can do, how it was made, how well it does; sha256 of every other file
    extractor.safetensors    the weights, once, in half precision: read by torch, and by the graph as external data
    extractor.onnx           uint8 images [n, H, W, C] or texts [n, length] in, unit-length float32 features [n, dim]
                             out
    extractor.int8.onnx      the same, quantised (optional)
    learners.safetensors     learned arrays, named "<method>/<field>"
    probe.safetensors        fixed inputs and the features they must give

Knows nothing of how an artifact is made or served.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

from models.calibration import Rejection, Temperature
from models.errors import ArtifactInvalid
from models.extractor import Decoder, Extractor
from models.images import ImageDecoder
from models.learners import LEARNERS, Learner, build
from models.text import MAX_BYTES, TextDecoder

FORMAT = "fewshot-artifact-1"
MANIFEST = "manifest.json"
WEIGHTS = "extractor.safetensors"
GRAPH = "extractor.onnx"
INT8_GRAPH = "extractor.int8.onnx"
GRAPHS: Mapping[str, str] = {"float32": GRAPH, "int8": INT8_GRAPH}  # by precision
ARRAYS = "learners.safetensors"
PROBE = "probe.safetensors"
REQUIRED = (WEIGHTS, GRAPH, ARRAYS, PROBE)

# What is classified -> what graphs and probes call it.
KINDS: Mapping[str, str] = {"image": "images", "text": "texts"}

# Half-precision weights, other thread counts and fused kernels move features of unit length by less than this.
PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "int8": 0.5}


@dataclass(frozen=True, slots=True)
class Manifest:
    name: str
    description: str
    dim: int
    shape: Mapping[str, Any]  # of the network, by the name of its fields; of an imported one {"network": its name}
    input: Mapping[str, Any]  # {"kind": "image", "height", "width", "channels"} or {"kind": "text", "length"}
    methods: Mapping[str, Temperature]
    default: str
    training: Mapping[str, Any]
    accuracy: tuple[Mapping[str, Any], ...]
    int8: Mapping[str, Any] | None
    files: Mapping[str, str]  # file name -> sha256
    rejections: Mapping[str, Rejection] = field(default_factory=dict)  # of the methods that can say "none of these"
    twins: float = 0.0  # squared distance of features up to which two examples of a class show one thing; 0: not known
    # Digests of names, with blanks, of the classes "learned" from and "calibrated" on; nothing where that is not known.
    classes: Mapping[str, str] = field(default_factory=dict)

    @property
    def portable(self) -> bool:
        """Whether torch can run it as well: it has to know the network, and knows its own alone."""
        return "network" not in self.shape

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Raises KeyError, TypeError or ValueError where something is missing or of another kind."""
        if data["format"] != FORMAT:
            raise ValueError(f"unknown format {data['format']!r}")
        methods = {name: Temperature(**values["temperature"]) for name, values in data["methods"].items()}
        rejections = {
            name: Rejection(**{key: tuple(map(float, value)) for key, value in values["rejection"].items()})
            for name, values in data["methods"].items()
            if values.get("rejection")
        }
        unknown = set(methods) - set(LEARNERS)
        if unknown or data["default"] not in methods:
            raise ValueError(f"methods {sorted(methods)} with default {data['default']!r}")
        if data["input"]["kind"] not in KINDS:
            raise ValueError(f"unknown kind of input {data['input']['kind']!r}")
        return cls(
            name=str(data["name"]),
            description=str(data["description"]),
            dim=int(data["dim"]),
            shape=data["shape"],
            input=data["input"],
            methods=methods,
            default=data["default"],
            training=data["training"],
            accuracy=tuple(data["accuracy"]),
            int8=data.get("int8"),
            files=data["files"],
            rejections=rejections,
            twins=float(data.get("twins", 0.0)),
            classes={str(name): str(value) for name, value in data.get("classes", {}).items()},
        )


@dataclass(frozen=True, slots=True)
class Artifact:
    path: Path
    manifest: Manifest
    digest: str  # "sha256:..." of the manifest, which names every other file by its own

    @classmethod
    def load(cls, path: Path) -> Artifact:
        """Reads and verifies a folder. Raises ArtifactInvalid, with a sentence that names the file."""
        file = path / MANIFEST
        try:
            raw = file.read_bytes()
        except OSError:
            raise ArtifactInvalid(f"{file} cannot be read; ARTIFACT must name a folder made by `export`.") from None
        try:
            manifest = Manifest.from_json(json.loads(raw))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtifactInvalid(f"{file} is not a manifest this version understands ({error}).") from None
        missing = set(REQUIRED) - set(manifest.files)
        if missing:
            raise ArtifactInvalid(f"{file} does not list {', '.join(sorted(missing))}.")
        for name, digest in manifest.files.items():
            member = path / name
            if Path(name).name != name or member.is_symlink():
                raise ArtifactInvalid(f"{member} leads out of the artifact.")
            try:
                found = hashlib.sha256(member.read_bytes()).hexdigest()
            except OSError:
                raise ArtifactInvalid(f"{member} cannot be read.") from None
            if found != digest:
                raise ArtifactInvalid(f"{member} is not the file that the manifest names: its sha256 differs.")
        return cls(path, manifest, "sha256:" + hashlib.sha256(raw).hexdigest())

    @property
    def kind(self) -> str:
        """What it classifies: "image" or "text"."""
        return str(self.manifest.input["kind"])

    @property
    def input_name(self) -> str:
        """What its graphs call their input, and its probe what it feeds them."""
        return KINDS[self.kind]

    def decoder(
        self, *, max_pixels: int = 16_800_000, max_bytes: int = 8_000_000, max_text_bytes: int = MAX_BYTES
    ) -> Decoder:
        given = self.manifest.input
        if self.kind == "text":
            return TextDecoder(given["length"], max_text_bytes)
        return ImageDecoder(given["height"], given["width"], given["channels"], max_pixels, max_bytes)

    def learners(self, device: str = "cpu") -> Mapping[str, Learner]:
        """Every learner of the artifact, its arrays on `device` (numpy for "cpu")."""
        fields: dict[str, dict[str, np.ndarray]] = {}
        for name, value in load((self.path / ARRAYS).read_bytes()).items():
            method, field = name.split("/")
            fields.setdefault(method, {})[field] = value
        try:
            return {name: build(name, fields[name], device=device) for name in self.manifest.methods}
        except (KeyError, TypeError) as error:
            raise ArtifactInvalid(f"{self.path / ARRAYS} does not fit the manifest ({error}).") from None

    def check(self, extractor: Extractor, *, precision: str = "float32") -> float:
        """Runs the probe, which also warms up; returns the largest difference. Raises ArtifactInvalid if too large."""
        probe = load((self.path / PROBE).read_bytes())
        difference = float(np.abs(extractor(probe[self.input_name]) - probe["features"]).max())
        if not difference <= PROBE_TOLERANCE[precision]:
            raise ArtifactInvalid(f"The extractor gives other features than the probe expects (by {difference:.1e}).")
        return difference
