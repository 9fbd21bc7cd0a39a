from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.conftest import needs

pytestmark = pytest.mark.torch
needs("torch", "onnx", "onnxruntime", "onnxscript", "transformers")

import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors

from models.artifact import Artifact
from models.extractor_onnx import session
from service.settings import Settings
from service.stores.memory import MemoryStore
from service.web.app import create_app
from tests.service.live import served
from training import __main__ as commands
from training import backbone, huggingface, wrap
from training.backbone import Backbone, Refused
from training.config import ImportConfig

# The published shapes, made small: what a model of random weights sees means nothing, so its size is of no use here.
SMALL: dict[str, dict[str, Any]] = {
    "dinov2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 70, "patch_size": 14},
    "vit": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 16,
    },
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
}
CLASSES = {"dinov2": "Dinov2", "vit": "ViT", "resnet": "ResNet"}
# As they are published: DINOv2 ViT-S/14, ResNet-18 and ResNet-50.
REAL: dict[str, tuple[str, dict[str, Any], int]] = {
    "ViT-S/14": ("dinov2", {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518}, 224),
    "ResNet-18": (
        "resnet",
        {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"},
        224,
    ),
    "ResNet-50": ("resnet", {}, 224),
}


def model(family: str, fields: dict[str, Any], kind: str = "Model") -> Any:
    """A model of transformers with random weights, and in each normalisation statistics of its own."""
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, CLASSES[family] + kind)(getattr(transformers, CLASSES[family] + "Config")(**fields))
    with torch.no_grad():
        for name, buffer in made.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand_like(buffer) * 0.5 + (0.5 if name.endswith("var") else -0.25))
    return made.eval()


def folder_of(family: str, into: Path, fields: dict[str, Any] | None = None, kind: str = "Model") -> Path:
    model(family, SMALL[family] if fields is None else fields, kind).save_pretrained(into)
    return into


def config(folder: Path, **more: Any) -> ImportConfig:
    return ImportConfig(backbone=folder, data=folder, out=folder / "out", name="x", **more)


def read(folder: Path, **more: Any) -> Backbone:
    return huggingface.read(folder, config(folder, **more))


def agrees(found: Backbone, expected: Callable[[torch.Tensor], torch.Tensor], *, n: int = 3) -> None:
    """The graph gives for pixels what the model gives for them as ImageNet's mean and deviation prepare them."""
    shape = (n, found.height, found.width, found.channels)
    pixels = np.random.default_rng(4).integers(0, 256, shape, dtype=np.uint8)
    (made,) = session(wrap.vectors_of(found, pixels).SerializeToString()).run(["vectors"], {"images": pixels})
    mean, std = (torch.tensor(values)[:, None, None] for values in backbone.IMAGENET)
    with torch.inference_mode():
        wanted = expected((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std).numpy()
    assert made.shape == wanted.shape
    assert np.abs(wrap.unit(made) - wrap.unit(wanted)).max() < 1e-4
    assert np.abs(made[0] - made[1]).max() > 1e-3


@pytest.mark.slow
def test_dinov2_at_another_size_than_its_positions_gives_the_class_token(tmp_path: Path) -> None:
    source = model("dinov2", SMALL["dinov2"])
    source.save_pretrained(tmp_path)
    found = read(tmp_path, size=56)  # the model itself fits its positions, each time anew
    assert (found.name, found.height, found.channels) == ("dinov2", 56, 3)
    agrees(found, lambda x: source(x).last_hidden_state[:, 0])


@pytest.mark.slow
def test_a_classifier_that_is_a_vit_gives_the_mean_of_its_tokens_where_that_is_asked_for(tmp_path: Path) -> None:
    source = model("vit", SMALL["vit"], "ForImageClassification")
    source.save_pretrained(tmp_path)
    found = read(tmp_path, pooling="mean", size=48)
    agrees(found, lambda x: source.vit(x, interpolate_pos_encoding=True).last_hidden_state[:, 1:].mean(dim=1))


@pytest.mark.slow
def test_a_resnet_gives_its_pooled_maps(tmp_path: Path) -> None:
    source = model("resnet", SMALL["resnet"])
    source.save_pretrained(tmp_path)
    found = read(tmp_path, size=40)
    agrees(found, lambda x: source(x).pooler_output.flatten(1))


@pytest.mark.slow
@pytest.mark.parametrize("family", SMALL)
def test_a_folder_becomes_an_artifact_with_learners_that_is_calibrated_and_served(
    family: str, tmp_path: Path, shapes: Path
) -> None:
    """`python -m training import` as its user types it, and then a task of their own images."""
    source = folder_of(family, tmp_path / "source")
    out = tmp_path / "artifact"
    size = str(SMALL[family].get("image_size", 32))
    words = ["import", "--backbone", str(source), "--data", str(shapes), "--out", str(out), "--name", "theirs"]
    commands.main(
        [*words, "--size", size, "--learners", "prototype,ridge,whitened", "--steps", "2", "--episodes", "10"]
    )
    artifact = Artifact.load(out)
    assert set(artifact.manifest.methods) == set(artifact.manifest.rejections) == {"prototype", "ridge", "whitened"}
    folders = sorted(path for path in shapes.iterdir() if path.is_dir())[:3]
    support = [(folder.name, one.read_bytes()) for folder in folders for one in sorted(folder.glob("*.png"))[:5]]
    with served(create_app(Settings(artifact=out), store=MemoryStore())) as http:
        taught = http.put("/v1/tasks/t", files=support)
        assert taught.status_code == 201, taught.text
        asked = http.post("/v1/tasks/t/classify?reject=off", files=[("image", payload) for _, payload in support])
        labels = [row["label"] for row in asked.json()["predictions"]]
    assert sum(a == b for a, (b, _) in zip(labels, support, strict=True)) > 8  # chance is 5


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_published_shapes_at_their_real_size(name: str, tmp_path: Path) -> None:
    family, fields, size = REAL[name]
    source = model(family, fields)
    source.save_pretrained(tmp_path)
    found = read(tmp_path, size=size)
    agrees(
        found,
        lambda x: source(x).pooler_output.flatten(1) if family == "resnet" else source(x).last_hidden_state[:, 0],
        n=2,
    )


@pytest.mark.parametrize("family", ["dinov2", "vit"])
def test_a_size_that_no_patches_fill_is_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"sees squares of \d\d pixels; 50 x 50 is no square of those"):
        read(folder_of(family, tmp_path), size=50)


def test_a_resnet_has_no_class_token(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="is a ResNet and has no class token"):
        read(folder_of("resnet", tmp_path), pooling="cls")


# A configuration from a stranger


def said(folder: Path, text: str) -> Path:
    (folder / "config.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is no JSON"),
        ("[]", "is no JSON object"),
        ("{}", "a model of type None; known are dinov2, vit, resnet"),
        ('{"model_type": "llama"}', "a model of type 'llama'"),
        ('{"model_type": ["vit"]}', r"a model of type \['vit'\]"),
        ('{"model_type": "vit", "auto_map": {"AutoModel": "evil.Model"}}', "asks for code of its own"),
        ('{"model_type": "vit", "hidden_size": 1000000}', "has hidden_size = 1000000, which is not within"),
        ('{"model_type": "vit", "hidden_size": "768"}', "has hidden_size = '768'"),
        ('{"model_type": "vit", "hidden_size": 768.5}', "has hidden_size"),
        ('{"model_type": "vit", "num_hidden_layers": true}', "has num_hidden_layers = True"),
        ('{"model_type": "vit", "num_hidden_layers": -1}', "has num_hidden_layers = -1"),
        ('{"model_type": "vit", "num_attention_heads": 0}', "has num_attention_heads = 0"),
        ('{"model_type": "vit", "num_attention_heads": 7}', "do not divide"),
        ('{"model_type": "vit", "image_size": [224, 224]}', "has image_size"),
        ('{"model_type": "vit", "num_channels": 4}', "has num_channels = 4"),
        ('{"model_type": "vit", "hidden_act": "os.system"}', "has hidden_act = 'os.system'"),
        ('{"model_type": "vit", "layer_norm_eps": NaN}', "has layer_norm_eps = nan"),
        ('{"model_type": "vit", "qkv_bias": 1}', "has qkv_bias = 1"),
        ('{"model_type": "resnet", "depths": [3, 4]}', "depths and hidden_sizes of different lengths"),
        ('{"model_type": "resnet", "depths": [3, 4, 6, 1000]}', "has depths"),
        ('{"model_type": "resnet", "layer_type": "evil"}', "has layer_type = 'evil'"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=sentence) as refused:
        read(said(tmp_path, text))
    assert "config.json" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_configuration_of_more_weights_than_fit_is_refused_without_making_them(tmp_path: Path) -> None:
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    fields = '{"model_type": "vit", "hidden_size": 4096, "num_hidden_layers": 64, "intermediate_size": 32768}'
    with pytest.raises(Refused, match=r"describes weights of \d{11,} bytes; at most 1500000000"):
        read(said(tmp_path, fields.replace("}", ', "num_attention_heads": 64}')))


# Weights from a stranger


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickled_weights_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(Refused, match="has pickled weights, which may run code when read"):
        read(said(tmp_path, '{"model_type": "vit"}'))


def test_weights_that_are_absent_in_parts_damaged_or_too_large_are_refused(tmp_path: Path) -> None:
    said(tmp_path, '{"model_type": "vit"}')
    with pytest.raises(Refused, match=r"has no model\.safetensors"):
        read(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(Refused, match="has its weights in parts"):
        read(tmp_path)
    for content in (b"", b"\xff" * 64, b"\x80\x04.", (10**6).to_bytes(8, "little") + b"{}"):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(Refused, match="is no safetensors file, or a damaged one"):
            read(tmp_path)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(backbone.MOST_BYTES + 1)
    with pytest.raises(Refused, match="has 1500000001 bytes"):
        read(tmp_path)
    save_file({"x": np.zeros(3, np.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(Refused, match="kinds U8, no plain floats"):
        read(tmp_path)


def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path: Path) -> None:
    folder = folder_of("dinov2", tmp_path)
    weights = load_file(folder / "model.safetensors")

    def given(change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        changed = dict(weights)
        change(changed)
        save_tensors(changed, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    with pytest.raises(Refused, match=r"lacks 1 weights that config\.json asks for, 'embeddings\.cls_token' first"):
        read(given(lambda one: one.pop("embeddings.cls_token")))
    with pytest.raises(Refused, match=r"holds 1 weights that config\.json knows nothing of, 'encoder\.layer\.7"):
        read(given(lambda one: one.update({"encoder.layer.7.norm1.weight": torch.zeros(32)})))
    with pytest.raises(Refused, match=r"model\.safetensors of .* does not fit its config\.json"):
        read(given(lambda one: one.update({"embeddings.cls_token": torch.zeros(1, 1, 16)})))


def test_nothing_else_in_the_folder_is_looked_at(tmp_path: Path) -> None:
    """Code, adapters and other names for the weights lie there in vain."""
    folder = folder_of("resnet", tmp_path)
    ran = tmp_path / "ran"
    for name in ("modeling_evil.py", "configuration_evil.py", "__init__.py"):
        (folder / name).write_text(f"open({str(ran)!r}, 'w')")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "evil/base"}')
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    written = json.loads((folder / "config.json").read_text())
    more = {"_name_or_path": "evil/model", "quantization_config": {"quant_method": "evil"}, "architectures": ["Evil"]}
    said(folder, json.dumps({**written, **more}))
    family, fields = huggingface.configuration(folder)
    found = huggingface.build(folder, family, fields, huggingface.weights_of(folder))
    assert type(found).__name__ == "ResNetModel"
    assert not ran.exists()
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(found.state_dict()[name], value)
