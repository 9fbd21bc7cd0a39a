"""A Hugging Face model folder -> a Backbone: config.json, model.safetensors and, if there, preprocessor_config.json.

The folder is a stranger's. transformers sees a configuration that is written anew here, of known fields within bounds,
and the weights, which hold no code; nothing else in the folder is looked at and nothing is fetched.

    dinov2   Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2023,
             https://arxiv.org/abs/2304.07193
    vit      Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020, https://arxiv.org/abs/2010.11929
    resnet   He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2015,
             https://arxiv.org/abs/1512.03385
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from training.backbone import MOST_BYTES, MOST_PIXELS, Backbone, Refused, preparation, text
from training.config import ImportConfig
from training.graphs import exported

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def _whole(most: int, least: int = 1) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _list(most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and 1 <= len(value) <= 8 and all(map(_whole(most), value))


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _either(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values and type(value) in {type(one) for one in values}


_BOTH = {
    "hidden_act": _either("gelu", "relu", "silu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu"),
    "num_channels": _either(1, 3),
}
_TRANSFORMER = {
    **_BOTH,
    "hidden_size": _whole(4096),
    "num_hidden_layers": _whole(64),
    "num_attention_heads": _whole(64),
    "image_size": _whole(MOST_PIXELS, 8),
    "patch_size": _whole(64),
    "layer_norm_eps": _number,
    "qkv_bias": _either(True, False),
}
# What is read of a configuration, with what it may say; what is absent is transformers' own default.
FIELDS: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    "dinov2": {**_TRANSFORMER, "mlp_ratio": _whole(16), "use_swiglu_ffn": _either(True, False)},
    "vit": {**_TRANSFORMER, "intermediate_size": _whole(32768)},
    "resnet": {
        **_BOTH,
        "embedding_size": _whole(4096),
        "hidden_sizes": _list(4096),
        "depths": _list(64),
        "layer_type": _either("basic", "bottleneck"),
        "downsample_in_first_stage": _either(True, False),
        "downsample_in_bottleneck": _either(True, False),
    },
}
# Weights of a published file that features do not need.
SPARE = ("classifier.", "pooler.", "head.", "decoder.")


class Pooled(nn.Module):
    """Prepared images [n, C, H, W] -> vectors [n, dim]: the first token, the mean of the others, or the pooled maps."""

    def __init__(self, model: nn.Module, pooling: str):
        super().__init__()
        self.model = model
        self.pooling = pooling

    def forward(self, images: Tensor) -> Tensor:
        found = self.model(images)
        if self.pooling == "maps":
            pooled: Tensor = found.pooler_output.flatten(1)
            return pooled
        tokens: Tensor = found.last_hidden_state
        return tokens[:, 0] if self.pooling == "cls" else tokens[:, 1:].mean(dim=1)


def read(folder: Path, config: ImportConfig) -> Backbone:
    """Raises Refused, with one sentence, for a folder that does not fit."""
    family, fields = configuration(folder)
    weights = weights_of(folder)
    prepared = preparation(folder, config)
    model = build(folder, family, fields, weights)
    channels = int(model.config.num_channels)
    trained = getattr(model.config, "image_size", None)
    height, width = prepared.size or (trained or 224,) * 2
    if family == "resnet":
        if config.pooling == "cls":
            raise Refused(f"{folder} is a ResNet and has no class token; its pooling is the mean.")
        pooling = "maps"
    else:
        if height != width or height % model.config.patch_size:
            patch = model.config.patch_size
            raise Refused(
                f"{folder} sees squares of {patch} pixels; {height} x {width} is no square of those (--size)."
            )
        resize(model, height)
        pooling = "mean" if config.pooling == "mean" else "cls"
    module = Pooled(model, pooling).eval()
    graph = exported(module, torch.zeros(2, channels, height, width), "image", "vector")

    @torch.inference_mode()
    def reference(given: np.ndarray) -> np.ndarray:
        return np.asarray(module(torch.from_numpy(given)).numpy())

    return Backbone(
        name=family,
        graph=graph,
        output="vector",
        how="vector",
        height=height,
        width=width,
        channels=channels,
        first=True,
        raw=False,
        preparation=prepared,
        reference=reference,
    )


def configuration(folder: Path) -> tuple[str, dict[str, Any]]:
    """The family and what may be said of it. Raises Refused."""
    file = folder / CONFIG
    said = text(file)
    if "auto_map" in said:
        raise Refused(f"{file} asks for code of its own (auto_map), which is not run.")
    family = said.get("model_type")
    if not isinstance(family, str) or family not in FIELDS:
        raise Refused(f"{file} describes a model of type {family!r:.60}; known are {', '.join(FIELDS)}.")
    fields = {name: said[name] for name in FIELDS[family] if name in said}
    for name, value in fields.items():
        if not FIELDS[family][name](value):
            raise Refused(f"{file} has {name} = {value!r:.60}, which is not within what can be imported.")
    if fields.get("hidden_size", 768) % fields.get("num_attention_heads", 12):
        raise Refused(f"{file} has a hidden_size that its num_attention_heads do not divide.")
    if len(fields.get("depths", [0] * 4)) != len(fields.get("hidden_sizes", [0] * 4)):
        raise Refused(f"{file} has depths and hidden_sizes of different lengths.")
    return family, fields


def weights_of(folder: Path) -> Path:
    """The one file of weights. Raises Refused where there is none, or it is pickled, in parts or too large."""
    file = folder / WEIGHTS
    if not file.is_file():
        if (folder / (WEIGHTS + ".index.json")).exists():
            raise Refused(f"{folder} has its weights in parts; save them as one {WEIGHTS}.")
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")) or any(folder.glob("*.ckpt")):
            raise Refused(f"{folder} has pickled weights, which may run code when read; save them as {WEIGHTS}.")
        raise Refused(f"{folder} has no {WEIGHTS}.")
    if file.stat().st_size > MOST_BYTES:
        raise Refused(f"{file} has {file.stat().st_size} bytes; at most {MOST_BYTES} can be imported.")
    try:
        with safe_open(file, framework="pt") as opened:
            kinds = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError):
        raise Refused(f"{file} is no safetensors file, or a damaged one.") from None
    if not kinds <= {"F32", "F16", "BF16", "I64"}:
        raise Refused(f"{file} holds numbers of the kinds {', '.join(sorted(map(str, kinds)))}, no plain floats.")
    return file.resolve()


def build(folder: Path, family: str, fields: dict[str, Any], weights: Path) -> Any:
    """The model of transformers with all its weights, in float32. Raises Refused where they do not fit."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is first imported
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        import transformers
    except ImportError:
        raise Refused("transformers is not installed: pip install -e '.[train,import]'.") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind = {"dinov2": "Dinov2", "vit": "ViT", "resnet": "ResNet"}[family]
    model_class = getattr(transformers, kind + "Model")
    config = getattr(transformers, kind + "Config")(**fields)
    more = {"add_pooling_layer": False} if family == "vit" else {}
    with torch.device("meta"):  # shapes alone: a configuration is cheap to write and dear to fill
        size = sum(4 * value.numel() for value in model_class(config, **more).state_dict().values())
    if size > MOST_BYTES:
        raise Refused(f"{folder / CONFIG} describes weights of {size} bytes; at most {MOST_BYTES} can be imported.")
    with tempfile.TemporaryDirectory() as clean, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (Path(clean) / CONFIG).write_text(json.dumps({**fields, "model_type": family}))
        (Path(clean) / WEIGHTS).symlink_to(weights)
        try:
            model, told = model_class.from_pretrained(
                clean,
                **more,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except Exception as error:  # shapes that differ come as errors of several kinds
            raise Refused(
                f"{weights.name} of {folder} does not fit its {CONFIG}: {str(error).splitlines()[0][:200]}"
            ) from None
    missing = sorted(name for name in told["missing_keys"] if "mask_token" not in name)
    if missing:
        raise Refused(
            f"{folder / WEIGHTS} lacks {len(missing)} weights that {CONFIG} asks for, {missing[0][:100]!r} first."
        )
    spare = sorted(name for name in told["unexpected_keys"] if not name.startswith(SPARE))
    if spare:
        raise Refused(
            f"{folder / WEIGHTS} holds {len(spare)} weights that {CONFIG} knows nothing of, {spare[0][:100]!r} first."
        )
    return model.eval()


@torch.no_grad()
def resize(model: Any, size: int) -> None:
    """Fits the learned positions to images of another size, once, instead of in the graph."""
    embeddings = model.embeddings
    patch = model.config.patch_size
    side, old = size // patch, model.config.image_size // patch
    if side != old:
        learned = embeddings.position_embeddings
        grid = learned[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
        grid = grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)
        embeddings.position_embeddings = nn.Parameter(torch.cat([learned[:, :1], grid], dim=1))
    embeddings.patch_embeddings.image_size = (size, size)
    if hasattr(embeddings, "image_size"):
        embeddings.image_size = (size, size)
