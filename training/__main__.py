"""`python -m training COMMAND`: the table below has them all."""

from __future__ import annotations

import os
import sys

# Threads that spin while they wait collapse as soon as something else needs a core. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's own threads spin whatever is asked for

from pathlib import Path

from pydantic import Field
from safetensors import SafetensorError

from models.errors import FewshotError
from training.config import (
    BaselineConfig,
    CompareObjectivesConfig,
    Config,
    ContinualConfig,
    EvaluateConfig,
    ExportConfig,
    ImportConfig,
    LakeConfig,
    MetatrainConfig,
    PretextConfig,
    PretrainConfig,
    ResultsConfig,
    TextDemoConfig,
    parse,
)
from training.folders import DataError
from training.stopping import STATUS


class DemoConfig(Config):
    """From data to a table on drawn shapes, in about a minute: shows what each step prints and leaves behind."""

    out: Path = Field(Path("runs/demo"), description="folder for data, checkpoints and the artifact")


def demo(config: DemoConfig) -> None:
    from training import evaluate, export, metatrain, pretrain, synthetic

    shapes = synthetic.write(config.out / "shapes", classes=30, images=20)
    run, artifact = config.out / "run", config.out / "artifact"
    pretrain.main(
        PretrainConfig(data=shapes, out=run, shape="tiny", size=32, epochs=6, batch=32, lr=0.05, precision="float32")
    )
    metatrain.main(MetatrainConfig(data=shapes, out=run, steps=60, check_steps=20, max_way=8, max_shot=5, slots=32))
    if not artifact.exists():
        export.main(ExportConfig(checkpoint=run, data=shapes, out=artifact, name="demo", episodes=20))
    evaluate.main(EvaluateConfig(artifact=artifact, data=shapes, shot="1,5", episodes=200))


COMMANDS: dict[str, tuple[type[Config], str]] = {
    "pretrain": (PretrainConfig, "learn an extractor"),
    "metatrain": (MetatrainConfig, "train the learners on episodes"),
    "evaluate": (EvaluateConfig, "measure an artifact on frozen episodes"),
    "continual": (ContinualConfig, "add classes one at a time, take some away: what is forgotten"),
    "export": (ExportConfig, "turn checkpoints into an artifact"),
    "import": (ImportConfig, "make an artifact of a backbone trained elsewhere"),
    "lake": (LakeConfig, "measure an artifact on Lake's one-shot runs"),
    "results": (ResultsConfig, "make RESULTS.md from raw results"),
    "compare-objectives": (CompareObjectivesConfig, "weigh self-supervised losses in several ways, at equal time"),
    "pretext": (PretextConfig, "learn self-supervised tasks that were not trained on, by a head alone"),
    "baseline": (BaselineConfig, "measure another method on the same episodes"),
    "demo": (DemoConfig, "all of them on drawn shapes"),
    "text-demo": (TextDemoConfig, "all of them on Python's standard library"),
}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in COMMANDS:
        print("python -m training COMMAND [--help]\n", file=sys.stderr)
        print("\n".join(f"  {name:18} {text}" for name, (_, text) in COMMANDS.items()), file=sys.stderr)
        return 2
    name = arguments[0]
    config = parse(COMMANDS[name][0], arguments[1:], prog=f"python -m training {name}")
    try:
        if isinstance(config, DemoConfig):
            demo(config)
        else:
            import importlib

            # `import` is no name that a module can be imported by, and no module has a hyphen.
            module = {"import": "imports"}.get(name, name).replace("-", "_")
            importlib.import_module(f"training.{module}").main(config)
    except (DataError, FewshotError, OSError, SafetensorError) as error:  # the last two: a full disk, mostly
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: stopped.", file=sys.stderr)
        return STATUS
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
