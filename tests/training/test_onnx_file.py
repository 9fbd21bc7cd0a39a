from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.conftest import needs

pytestmark = pytest.mark.torch
needs("torch", "onnx", "onnxruntime", "onnxscript")

import onnx
from onnx import TensorProto, helper

from models.extractor_onnx import session
from tests.training.nets import DIM, net, write
from training import backbone, onnx_file, wrap
from training.backbone import Backbone, Refused
from training.config import ImportConfig


def config(file: Path, **more: Any) -> ImportConfig:
    return ImportConfig(backbone=file, data=file.parent, out=file.parent / "out", name="x", **more)


def read(file: Path, **more: Any) -> Backbone:
    return onnx_file.read(file, config(file, **more))


def pixels(found: Backbone, n: int = 5) -> np.ndarray:
    shape = (n, found.height, found.width, found.channels)
    return np.random.default_rng(4).integers(0, 256, shape, dtype=np.uint8)


def vectors(found: Backbone, images: np.ndarray, folder: Path, *, half: bool = False) -> np.ndarray:
    """What the graph gives that was put around the file and written."""
    wrap.save(wrap.vectors_of(found, images[:3]), folder / "w.safetensors", folder / "g.onnx", half=half)
    return np.asarray(session(str(folder / "g.onnx")).run(["vectors"], {"images": images})[0])


# What fits


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"shape": ("n", 24, 24, 3)},
        {"shape": ("n", 1, 24, 24)},
        {"shape": (1, 24, 20, 3)},
        {"shape": (1, 3, 24, 24)},
        {"shape": (1, 3, 24, 24), "ends": "fixed"},
        {"shape": ("n", 3, 24, 24), "ends": "fixed"},
        {"ends": "baked"},
        {"shape": ("n", 3, "h", "w")},
        {"shape": (None, None, None, 3), "kind": TensorProto.UINT8},
        {"kind": TensorProto.UINT8},
        {"kind": TensorProto.FLOAT16, "shape": ("n", 24, 24, 3)},
        {"ends": "pooled"},
        {"ends": "pooled.last"},
        {"opset": 9},
        {"opset": 11, "shape": (1, 3, 24, 24), "ends": "fixed"},
        {"relu": False, "given": "x", "opset": 13},
    ],
    ids=lambda given: ",".join(f"{name}={value}" for name, value in given.items()).replace(" ", "") or "plain",
)
def test_a_graph_of_any_layout_kind_and_batch_gives_what_the_file_gives(given: dict[str, Any], tmp_path: Path) -> None:
    found = read(
        write(net(**given), tmp_path), size=20 if "h" in given.get("shape", ()) or None in given.get("shape", ()) else 0
    )
    images = pixels(found)
    made = vectors(found, images, tmp_path)
    # Worked out here, from the file alone.
    source = session(str(tmp_path / "net.onnx"))
    name, kind = source.get_inputs()[0].name, onnx_file.KINDS[given.get("kind", TensorProto.FLOAT)]
    x: np.ndarray = images
    if kind != np.uint8:
        mean, std = np.array(backbone.IMAGENET)
        x = ((images / 255 - mean) / std) if found.channels == 3 else (images / 255 - mean.mean()) / std.mean()
    if found.first:
        x = x.transpose(0, 3, 1, 2)
    expected = np.concatenate([source.run(None, {name: row[None].astype(kind)})[0].reshape(1, -1) for row in x])
    assert made.shape == (5, DIM)
    assert made.dtype == np.float32
    assert np.abs(made - expected).max() < (1e-2 if kind == np.float16 else 1e-5)
    assert np.ptp(made, axis=0).max() > 1e-3  # images differ


def test_images_are_scanned_only_where_the_graph_mixes_them(tmp_path: Path) -> None:
    for ends, scanned in (("vector", False), ("fixed", True)):
        found = read(write(net(shape=(1, 3, 24, 24), ends=ends), tmp_path))
        kinds = [node.op_type for node in wrap.vectors_of(found, pixels(found, 3)).graph.node]
        assert ("Scan" in kinds) == scanned


def test_a_try_that_fails_prints_nothing_and_the_last_one_says_why(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = read(write(net(shape=(1, 3, 24, 24), ends="baked"), tmp_path))
    wrap.vectors_of(found, pixels(found, 3))
    assert "onnxruntime" not in "".join(capfd.readouterr())
    del found.graph.graph.node[:1]  # what it makes is missed by the others, whichever way they are put together
    with pytest.raises(
        Refused, match=r"could not be made to take uint8 images in batches of any size: .*INVALID_GRAPH"
    ) as why:
        wrap.vectors_of(found, pixels(found, 3))
    assert "\n" not in str(why.value)
    assert "onnxruntime" not in "".join(capfd.readouterr())


def test_older_operators_are_converted_so_that_a_task_can_become_a_file(tmp_path: Path) -> None:
    found = read(write(net(opset=11), tmp_path))
    (opset,) = wrap.vectors_of(found, pixels(found, 3)).opset_import
    assert opset.version == wrap.TASKS


@pytest.mark.parametrize(("ends", "pooling"), [("tokens", "cls"), ("tokens", "mean"), ("maps", "mean")])
def test_tokens_and_maps_are_pooled_as_asked(ends: str, pooling: str, tmp_path: Path) -> None:
    file = write(net(ends=ends), tmp_path)
    found = read(file, pooling=pooling)
    images = pixels(found)
    (raw,) = session(str(file)).run(None, {"images": found.given(images)})
    raw = raw if ends == "tokens" else raw.reshape(5, DIM, -1).transpose(0, 2, 1)
    expected = raw[:, 0] if pooling == "cls" else raw.mean(axis=1)
    assert np.abs(vectors(found, images, tmp_path) - expected).max() < 1e-5
    with pytest.raises(Refused, match="--pooling mean or cls makes one"):
        read(file)


@pytest.mark.parametrize("shape", [("n", 3, 24, 24), ("n", 24, 24, 3), ("n", 3, 24, 48), (1, 40, 16, 3)], ids=str)
@pytest.mark.parametrize("ends", ["maps", "maps.last", "pooled", "pooled.last"])
def test_the_mean_of_maps_is_over_height_and_width_wherever_their_channels_are(
    ends: str, shape: tuple[Any, ...], tmp_path: Path
) -> None:
    file = write(net(ends=ends, shape=shape), tmp_path)
    found = read(file, pooling="mean")
    images = pixels(found)
    source = session(str(file))
    raw = np.concatenate([source.run(None, {"images": one[None]})[0] for one in found.given(images)])
    expected = raw.mean(axis=(1, 2) if ends.endswith("last") else (2, 3))
    assert expected.shape == (5, DIM)
    assert np.abs(found.reference(found.given(images)) - expected).max() < 1e-6
    assert np.abs(vectors(found, images, tmp_path) - expected).max() < 1e-5


@pytest.mark.parametrize("ends", ["maps", "maps.last"])
def test_maps_that_could_be_read_either_way_are_refused(ends: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"gives maps of 1 x 8 x 8 x 8 for one image of 32 x 32; which .* channels"):
        read(write(net(ends=ends, shape=("n", 3, 32, 32)), tmp_path), pooling="mean")


def test_one_of_several_outputs_is_named(tmp_path: Path) -> None:
    file = write(net(ends="two"), tmp_path)
    with pytest.raises(Refused, match="has 2 outputs; --output names one of vectors, tokens"):
        read(file)
    with pytest.raises(Refused, match="has no output 'third'; it has vectors, tokens"):
        read(file, output="third")
    found = read(file, output="vectors")
    assert vectors(found, pixels(found), tmp_path).shape == (5, DIM)


def test_initializers_that_are_listed_as_inputs_are_none(tmp_path: Path) -> None:
    model = net()
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    found = read(write(model, tmp_path))
    assert vectors(found, pixels(found), tmp_path).shape == (5, DIM)


def test_weights_beside_the_file_are_taken_in(tmp_path: Path) -> None:
    plain = read(write(net(), tmp_path, "plain.onnx"))
    onnx.save(net(), tmp_path / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    assert (tmp_path / "net.data").exists()
    found = read(tmp_path / "net.onnx")
    images = pixels(found)
    assert np.array_equal(vectors(found, images, tmp_path), vectors(plain, images, tmp_path))


def test_half_precision_is_stored_where_it_holds_a_number_and_read_by_the_graph(tmp_path: Path) -> None:
    model = net()
    big = next(tensor for tensor in model.graph.initializer if tensor.name == "w2")
    value = onnx.numpy_helper.to_array(big).copy()
    value[0, 0, 0, 0] = 1e5  # more than half precision can say
    big.CopyFrom(onnx.numpy_helper.from_array(value, "w2"))
    found = read(write(model, tmp_path))
    images = pixels(found)
    whole, half = vectors(found, images, tmp_path), vectors(found, images, tmp_path, half=True)
    assert 0 < np.abs(wrap.unit(whole) - wrap.unit(half)).max() < 1e-2
    kinds = {t.name: t.data_type for t in onnx.load(tmp_path / "g.onnx", load_external_data=False).graph.initializer}
    assert kinds["backbone.w1.half"] == TensorProto.FLOAT16
    assert kinds["backbone.w2"] == TensorProto.FLOAT


@pytest.mark.parametrize("root", [True, False])
def test_features_are_rooted_centred_and_of_unit_length_as_our_own_are(root: bool, tmp_path: Path) -> None:
    found = read(write(net(relu=root), tmp_path))
    images = pixels(found, 6)
    model = wrap.vectors_of(found, images[:3])
    raw = vectors(found, images, tmp_path)
    normalisation = wrap.Normalisation.of(raw)
    assert normalisation.root == root
    (features,) = session(wrap.normalised(model, normalisation).SerializeToString()).run(
        ["features"], {"images": images}
    )
    x = np.sqrt(raw + 1e-6) if root else raw
    x = x - x.mean(axis=0)
    assert np.abs(features - x / np.linalg.norm(x, axis=1, keepdims=True)).max() < 1e-4
    assert np.allclose(np.linalg.norm(features, axis=1), 1, atol=1e-4)


# Preparation


def test_colours_and_size_are_prepared_as_the_file_beside_says(tmp_path: Path) -> None:
    said = {"image_mean": [0.5, 0.25, 0], "image_std": [0.5, 0.5, 1], "crop_size": {"height": 24, "width": 24}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**said, "size": {"shortest_edge": 32}}))
    found = read(write(net(shape=("n", 3, "h", "w")), tmp_path))
    assert (found.height, found.width) == (24, 24)
    white = found.given(np.full((1, 24, 24, 3), 255, np.uint8))[0, :, 0, 0]
    assert np.allclose(white, [1.0, 1.5, 1.0], atol=1e-5)
    assert np.allclose(read(tmp_path / "net.onnx", mean="0", std="1").given(np.full((1, 24, 24, 3), 51, np.uint8)), 0.2)


def test_means_that_the_file_beside_says_are_not_used_are_not(tmp_path: Path) -> None:
    said = {"do_normalize": False, "image_mean": [0.5, 0.25, 0], "image_std": [0.5, 0.5, 1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    grey = np.full((1, 24, 24, 3), 51, np.uint8)
    assert np.allclose(read(write(net(), tmp_path)).given(grey), 0.2)
    assert np.allclose(read(tmp_path / "net.onnx", mean="0.1", std="0.5").given(grey), 0.2)
    assert np.allclose(read(tmp_path / "net.onnx", mean="0.1").given(grey), 0.1)


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("{", "is no JSON"),
        ("[1]", "is no JSON object"),
        (" " * 1_000_001, "no configuration is that long"),
        ('{"image_mean": [NaN, 0, 0]}', "image_mean is no list"),
        ('{"image_mean": "red"}', "image_mean is no list"),
        ('{"image_std": [0, 1, 1]}', "image_std holds 0"),
        ('{"rescale_factor": 1e9}', "rescale_factor is"),
        ('{"size": {"shortest_edge": 100000}}', "its size 100000 x 100000"),
        ("[" * 100_000, "is no JSON"),
    ],
)
def test_a_preparation_that_makes_no_sense_is_refused(said: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(said)
    with pytest.raises(Refused, match=sentence):
        read(write(net(), tmp_path))


# What does not fit


@pytest.mark.parametrize(
    ("given", "more", "sentence"),
    [
        ({"ends": "maps"}, {}, "gives 1 x 8 x 6 x 6 for one image, no vector"),
        ({"ends": "maps"}, {"pooling": "cls"}, "no vector that --pooling cls can take"),
        ({"ends": "vector"}, {"pooling": "mean"}, "no vector that --pooling mean can take"),
        ({"ends": "label"}, {}, "gives int64, no float vector"),
        ({"ends": "long", "shape": ("n", 3, 160, 160)}, {}, "vectors of 12800 numbers; 2 to 4096"),
        ({"shape": (4, 3, 24, 24)}, {}, "batches of exactly 4 images"),
        ({"shape": ("n", 3, "h", "w")}, {}, "images of any size; --size says"),
        ({}, {"size": 32}, "takes images of 24 x 24, so not of --size 32"),
        ({"shape": ("n", 3, 2000, 24)}, {}, "takes images of 2000 x 24; 8 to 1024"),
        ({"kind": TensorProto.INT32}, {}, "takes neither float nor uint8"),
        ({"kind": TensorProto.UINT8}, {"mean": "0.5"}, "takes uint8 pixels as they are"),
        ({}, {"mean": "red"}, "^--mean is one number, or three"),
        ({}, {"mean": "0.5,0.5"}, "^--mean is one number, or three"),
        ({}, {"std": "nan"}, "^--std is one number, or three"),
        ({}, {"std": "0.5,0,1"}, r"^--std holds 0; at least 1e-06 is needed\.$"),
        ({"factor": float("inf")}, {}, "not finite"),
    ],
    ids=str,
)
def test_a_graph_that_does_not_fit_is_refused_in_a_sentence(
    given: dict[str, Any], more: dict[str, Any], sentence: str, tmp_path: Path
) -> None:

    def wrapped(file: Path) -> None:
        found = read(file, **more)
        wrap.vectors_of(found, pixels(found, 3))

    file = write(net(**given), tmp_path)
    with pytest.raises(Refused, match=sentence) as refused:
        wrapped(file)
    assert "\n" not in str(refused.value)


def test_several_inputs_or_none_are_refused(tmp_path: Path) -> None:
    model = net()
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))
    with pytest.raises(Refused, match=r"has 2 inputs \(images, mask\)"):
        read(write(model, tmp_path))
    model.graph.ClearField("input")
    with pytest.raises(Refused, match=r"has 0 inputs \(none\)"):
        read(write(model, tmp_path))


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [((None,), "has 1 dimensions"), ((1, 5, 24, 24), "where its 1 or 3 channels are: .*1 x 5 x 24")],
)
def test_an_input_that_is_no_image_is_refused(shape: tuple[Any, ...], sentence: str, tmp_path: Path) -> None:
    model = net()
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("images", TensorProto.FLOAT, shape))
    with pytest.raises(Refused, match=sentence):
        read(write(model, tmp_path))


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"PK\x03\x04", b"not a model"])
def test_what_is_no_onnx_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(Refused, match="is no ONNX file"):
        read(tmp_path / "net.onnx")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    raw = write(net(), tmp_path).read_bytes()
    for end in (10, len(raw) // 2, len(raw) - 3):
        (tmp_path / "net.onnx").write_bytes(raw[:end])
        with pytest.raises(Refused):
            read(tmp_path / "net.onnx")


def test_too_large_a_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "net.onnx").open("wb") as file:
        file.truncate(backbone.MOST_BYTES + 1)  # a hole, which takes no space
    with pytest.raises(Refused, match="at most 1500000000 can be imported"):
        read(tmp_path / "net.onnx")


@pytest.mark.parametrize("domain", ["", "inside"])
def test_operators_that_bring_their_own_code_are_refused_wherever_they_stand(domain: str, tmp_path: Path) -> None:
    model = net()
    foreign = helper.make_node("Shell", ["x"], ["y"], domain="evil.example")
    if domain:
        held = helper.make_graph([foreign], "then", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])
        foreign = helper.make_node("If", ["c"], ["z"], then_branch=held, else_branch=held)
    model.graph.node.append(foreign)
    with pytest.raises(Refused, match=r"operators from 'evil\.example'"):
        read(write(model, tmp_path))


def test_an_operator_set_that_is_not_understood_is_refused(tmp_path: Path) -> None:
    model = net()
    model.opset_import[0].version = 99
    with pytest.raises(Refused, match="is of operator set 99; 9 to 26"):
        read(write(model, tmp_path))


@pytest.mark.parametrize("where", ["../secret", "/etc/hostname", "link"])
def test_weights_are_read_from_no_other_folder(where: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"\0" * 4096)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    model = net()
    tensor = next(one for one in model.graph.initializer if one.name == "w1")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=where)
    with pytest.raises(Refused, match="lies outside its folder"):
        read(write(model, folder))


def test_weights_that_are_missing_too_large_or_too_short_are_refused(tmp_path: Path) -> None:
    onnx.save(net(), tmp_path / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    whole = (tmp_path / "net.data").read_bytes()
    (tmp_path / "net.data").write_bytes(whole[:20])
    with pytest.raises(Refused, match=r"The weights .* cannot be read|does not load"):
        read(tmp_path / "net.onnx")
    with (tmp_path / "net.data").open("wb") as file:
        file.truncate(backbone.MOST_BYTES + 1)
    with pytest.raises(Refused, match="has weights of 1500000001 bytes"):
        read(tmp_path / "net.onnx")
    (tmp_path / "net.data").unlink()
    with pytest.raises(Refused, match=r"has weights in 'net\.data', which is not there"):
        read(tmp_path / "net.onnx")
