from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.training.conftest import needs

pytestmark = pytest.mark.torch
needs("torch", "onnx", "onnxruntime", "onnxscript")

import torch

from models.artifact import Artifact
from models.extractor import load_extractor
from models.extractor_torch import TorchExtractor
from service.settings import Settings
from service.stores.memory import MemoryStore
from service.web.app import create_app
from tests.service.live import served
from training import checkpoint, data, evaluate, export, inputs, language, metatrain, pretrain, pretrained, synthetic
from training.config import EvaluateConfig, ExportConfig, MetatrainConfig, PretrainConfig
from training.folders import DataError

SETTINGS = {
    "shape": "tiny-bytes",
    "size": 64,
    "objectives": "language=1,contrastive=0.5",
    "epochs": 3,
    "batch": 16,
    "optimizer": "adamw",
    "lr": 0.01,
    "device": "cpu",
    "precision": "float32",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten made-up languages: six to train on, two for validation, two for the test."""
    return synthetic.write_texts(tmp_path_factory.mktemp("data") / "texts", classes=10, texts=12)


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    pretrain.main(PretrainConfig(data=corpus, out=run, **SETTINGS))  # type: ignore[arg-type]
    return run


@pytest.fixture(scope="module")
def artifact(corpus: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "texts"
    learners = "prototype,ridge,whitened"
    metatrain.main(
        MetatrainConfig(data=corpus, out=finished, steps=6, check_steps=3, max_way=3, max_shot=3, learners=learners)
    )
    export.main(ExportConfig(checkpoint=finished, data=corpus, out=out, name="languages", episodes=10))
    return out


def test_the_loss_is_that_of_a_trunk_that_knows_nothing_and_never_counts_what_is_behind_the_end() -> None:
    objective = language.Language(4)
    torch.nn.init.zeros_(objective.predict.weight)
    torch.nn.init.zeros_(objective.predict.bias)
    texts = torch.tensor([[65, 66, 67, 0, 0], [65, 0, 0, 0, 0]], dtype=torch.uint8)
    held = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    assert objective(held, texts).item() == pytest.approx(np.log(256), abs=1e-5)
    torch.nn.init.normal_(objective.predict.weight)
    moved = held.clone()
    moved[0, :, 2:] += 1  # from the last byte on, and in the text of one byte, nothing is predicted
    moved[1] += 1
    assert torch.equal(objective(held, texts), objective(moved, texts))
    moved[0, :, 1] += 1
    assert not torch.equal(objective(held, texts), objective(moved, texts))


def test_both_losses_fall(finished: Path, corpus: Path) -> None:
    config = PretrainConfig(data=corpus, out=finished, **SETTINGS)  # type: ignore[arg-type]
    run = language.Run(config, data.load(corpus, "train", inputs.decoder(config)))
    first = [run.advance() for _ in range(2)]
    while run.step < run.steps:
        last = run.advance()
    for name in ("language", "contrastive"):
        assert last[name] < 0.9 * first[0][name], name


def test_a_run_that_was_stopped_ends_at_the_same_weights(finished: Path, corpus: Path, tmp_path: Path) -> None:
    config = PretrainConfig(data=corpus, out=tmp_path, minutes=1e-9, **SETTINGS)  # type: ignore[arg-type]
    starts = 0
    while "extractor" not in (checkpoint.load(tmp_path / pretrained.CHECKPOINT) if starts else {}):
        pretrain.main(config)  # one step, then the time is up
        starts += 1
    assert starts == 3 * (72 // 16)
    unbroken, resumed = (pretrained.load_extractor(folder)[0].state_dict() for folder in (finished, tmp_path))
    assert all(torch.equal(value, resumed[name]) for name, value in unbroken.items())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"objectives": "rotation=1"}, "for texts; its objectives: language"),
        ({"shape": "tiny"}, "for images; its objectives: contrastive"),
        ({"shape": "bytenet"}, "Known shapes: .*small-bytes"),
        ({"rotations": True}, "for images"),
    ],
)
def test_what_does_not_fit_texts_is_refused(corpus: Path, tmp_path: Path, wrong: dict[str, object], words: str) -> None:
    with pytest.raises(SystemExit, match=words):
        pretrain.main(PretrainConfig(data=corpus, out=tmp_path, **{**SETTINGS, **wrong}))  # type: ignore[arg-type]


def test_the_runtimes_agree_on_an_artifact_that_says_it_reads_texts(artifact: Path, corpus: Path) -> None:
    made = Artifact.load(artifact)
    assert (made.kind, dict(made.manifest.input), made.manifest.int8) == ("text", {"kind": "text", "length": 64}, None)
    texts = data.load(corpus, "test", made.decoder()).pixels
    on_torch, on_onnx = TorchExtractor(made, device="cpu")(texts), load_extractor(made)(texts)
    assert on_torch.shape == (24, made.manifest.dim)
    assert np.abs(on_torch - on_onnx).max() < 1e-4
    assert made.check(load_extractor(made)) < 1e-3


def test_made_up_languages_never_seen_are_told_apart(artifact: Path, corpus: Path) -> None:
    config = EvaluateConfig(artifact=artifact, data=corpus, way="2", shot="5", queries=5, episodes=40)
    assert all(row.accuracy > 75 for row in evaluate.main(config))
    with pytest.raises(DataError, match="for images"):
        evaluate.main(config.model_copy(update={"rotations": True}))


def test_it_is_served_and_a_task_leaves_as_a_file_that_answers_alike(
    artifact: Path, corpus: Path, tmp_path: Path
) -> None:
    files = sorted((corpus / "class00").glob("*.txt")), sorted((corpus / "class01").glob("*.txt"))
    support = [(label, path.read_bytes()) for label, paths in zip("ab", files, strict=True) for path in paths[:4]]
    with served(create_app(Settings(artifact=artifact, lanes=1), store=MemoryStore())) as client:
        form = [(label, ("a.txt", text)) for label, text in support]
        made = client.put("/v1/tasks/languages", files=form)
        assert made.status_code == 201, made.text
        asked = [path for paths in files for path in paths[4:]]
        answers = [
            client.post(
                "/v1/tasks/languages/classify", content=path.read_bytes(), headers={"Content-Type": "text/plain"}
            ).json()["predictions"][0]
            for path in asked
        ]
        right = [answer["probabilities"][label] > 0.5 for answer, label in zip(answers, "a" * 8 + "b" * 8, strict=True)]
        assert sum(right) >= 14
        bundle = client.get("/v1/tasks/languages/export?format=zip")
    assert bundle.status_code == 200, bundle.text
    zipfile.ZipFile(io.BytesIO(bundle.content)).extractall(tmp_path)
    ran = subprocess.run([sys.executable, "run.py", *asked], cwd=tmp_path, capture_output=True, text=True, check=True)
    shown = [block.splitlines() for block in ran.stdout.strip().split("\n/")]
    assert len(shown) == len(answers)
    for lines, answer in zip(shown, answers, strict=True):
        shares = dict(line.split() for line in lines[1:])
        for label, share in answer["probabilities"].items():
            assert float(shares[label]) == pytest.approx(share, abs=1e-4)
