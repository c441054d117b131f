import json
import re
import struct
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from models import weights
from models.bert import Bert
from models.deit import DeiT, deit_tiny
from models.efficientnet_lite import EfficientNetLite, efficientnet_lite0
from models.efficientnet_lite import Stage as LiteStage
from models.layers.positions import resample_pos_embed
from models.mobilenetv2 import MobileNetV2
from models.mobilenetv2 import Stage as MobileStage
from models.resnet import BasicBlock, ResNet, resnet50
from models.vgg import VGG


def filled(network):
    """Random values at once, instead of initialisation, which compiles a program for every shape."""

    def make(num_classes=3, seed=0, **kwargs):
        model = nnx.eval_shape(lambda: network(num_classes=num_classes, rngs=nnx.Rngs(0), **kwargs))
        generator = np.random.default_rng(seed)
        shapes = nnx.as_pure(nnx.state(model, (nnx.Param, nnx.BatchStat)))
        draw = lambda leaf: jnp.asarray(generator.uniform(0.1, 1, leaf.shape).astype(leaf.dtype))  # noqa: E731
        nnx.update(model, jax.tree.map(draw, shapes))
        return model

    return make


resnet = filled(partial(ResNet, (1,), (4,), BasicBlock, stem="cifar"))
deit = filled(lambda **kwargs: DeiT(**{"image_size": 8, "patch_size": 4, "dim": 8, "depth": 1, "heads": 2} | kwargs))
bert = filled(partial(Bert, vocab_size=11, max_positions=5, dim=8, depth=1, heads=2, hidden=12))
vgg = filled(partial(VGG, [[2], [4]], hidden=5, batch_norm=True))
mobilenet = filled(partial(MobileNetV2, [MobileStage(6, 8, 1, 2)], width_multiplier=0.25))
efficientnet = filled(partial(EfficientNetLite, [LiteStage(6, 8, 1, 2, 3)]))

NETWORKS = {
    "resnet": resnet, "deit": deit, "bert": bert, "vgg": vgg, "mobilenet": mobilenet, "efficientnet": efficientnet,
}  # fmt: skip
HEADS = {
    "resnet": "fc", "deit": "head", "bert": "classifier", "vgg": "classifier.6", "mobilenet": "classifier.1",
    "efficientnet": "_fc",
}  # fmt: skip


def values(model):
    return {name: np.asarray(value) for name, value in weights.get_tensors(model).items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_saved_is_loaded_and_saved_again_byte_by_byte(name, tmp_path):
    model, other = NETWORKS[name](seed=0), NETWORKS[name](seed=1)
    weights.save(model, tmp_path / "a.safetensors")
    weights.load(other, tmp_path / "a.safetensors")
    assert_same(values(other), values(model))
    weights.save(other, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_head_of_another_size_is_kept_on_request_only(name, tmp_path):
    trained, fresh = NETWORKS[name](num_classes=3), NETWORKS[name](num_classes=5, seed=1)
    weights.save(trained, tmp_path / "three")
    before = values(fresh)
    with pytest.raises(ValueError, match=rf"{HEADS[name]}\.weight is \[3, \d+\], expected \[5, \d+\]") as error:
        weights.load(fresh, tmp_path / "three")
    assert "new_head=True" in str(error.value)
    assert str(error.value).count("other shape") == 2
    assert_same(values(fresh), before)
    weights.load(fresh, tmp_path / "three", new_head=True)
    head = {f"{HEADS[name]}.{leaf}" for leaf in ("weight", "bias")}
    expected = {key: before[key] if key in head else value for key, value in values(trained).items()}
    assert_same(values(fresh), expected)


def test_names_and_layouts_are_those_of_the_original():
    model = resnet()
    tensors = weights.get_tensors(model)
    kernel = np.asarray(model.stages[0][0].conv2.kernel[...])
    conv = tensors["layer1.0.conv2.weight"]
    assert conv.shape == (4, 4, 3, 3)
    for out, into, row, column in np.ndindex(conv.shape):
        assert conv[out, into, row, column] == kernel[row, column, into, out]
    linear = np.asarray(model.fc.kernel[...])
    assert tensors["fc.weight"].shape == (3, 4)
    assert tensors["fc.weight"][2, 1] == linear[1, 2]
    np.testing.assert_array_equal(tensors["bn1.running_var"], model.bn1.var[...])
    embedding = weights.get_tensors(bert())["bert.embeddings.word_embeddings.weight"]
    assert embedding.shape == (11, 8)
    assert all(value.flags.c_contiguous for value in tensors.values())
    depthwise = weights.get_tensors(mobilenet())["features.1.conv.1.0.weight"]
    assert depthwise.shape == (48, 1, 3, 3)


@pytest.mark.slow
def test_full_networks_have_the_published_numbers_of_tensors(shared):
    counts = {}
    for network in (resnet50, deit_tiny, efficientnet_lite0):
        model = nnx.eval_shape(lambda network=network: network(rngs=nnx.Rngs(0)))
        zeros = jax.tree.map(
            lambda leaf: np.broadcast_to(np.float32(0), leaf.shape),
            nnx.as_pure(nnx.state(model, (nnx.Param, nnx.BatchStat))),
        )
        tensors = weights.get_tensors(model, zeros)
        counts[network.__name__] = len(tensors)
    assert counts == {"resnet50": 161 + 2 * 53, "deit_tiny": 152, "efficientnet_lite0": 296 - 49}
    shapes = json.loads((shared / "data" / "weights" / "efficientnet_lite0_shapes.json").read_text())
    expected = {name: tuple(shape) for name, shape in shapes.items() if not name.endswith("num_batches_tracked")}
    assert {name: value.shape for name, value in tensors.items()} == expected


def test_all_that_does_not_fit_is_in_the_error_and_nothing_is_set(tmp_path):
    model = resnet()
    before = values(model)
    tensors = {name: value + 1 for name, value in before.items()}
    del tensors["layer1.0.bn1.running_mean"], tensors["conv1.weight"]
    tensors["bn1.weight"] = np.ones(7, np.float32)
    tensors["layer9.conv.weight"] = np.ones((2, 3), np.float32)
    save_file(tensors, tmp_path / "other")
    with pytest.raises(ValueError, match="the tensors do not fit this ResNet") as error:
        weights.load(model, tmp_path / "other")
    lines = str(error.value).splitlines()
    assert str(tmp_path / "other") in lines[0]
    assert sorted(lines[1:-1]) == [
        "  left over: layer9.conv.weight [2, 3]",
        "  missing: conv1.weight, expected [4, 3, 3, 3]",
        "  missing: layer1.0.bn1.running_mean, expected [4]",
        "  other shape: bn1.weight is [7], expected [4]",
    ]
    assert lines[-1].startswith("build the network with the options")
    with pytest.raises(ValueError, match=r"layer9.conv.weight"):
        weights.load(model, tmp_path / "other", new_head=True)
    assert_same(values(model), before)


def test_a_value_that_cannot_be_cast_leaves_the_model_as_it_was():
    model = resnet(param_dtype=jnp.float16)
    before = values(model)
    tensors = {name: value.astype(np.float32) + 1 for name, value in before.items()}
    tensors["fc.bias"] = np.full(3, 1e6, np.float32)
    with pytest.raises(ValueError, match=r"fc\.bias has values too large for float16"):
        weights.set_tensors(model, tensors)
    tensors["fc.bias"] = np.ones(3, np.int32)
    with pytest.raises(ValueError, match=r"fc\.bias is int32, expected floating-point"):
        weights.set_tensors(model, tensors)
    assert_same(values(model), before)


def test_buffers_without_weights_are_ignored_and_old_names_and_bare_encoders_are_read(tmp_path):
    model = bert(seed=1)
    trained = values(bert())
    old = {
        re.sub("^bert.", "", name).replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in trained.items()
        if not name.startswith("classifier")
    }  # fmt: skip
    old["embeddings.position_ids"] = np.arange(5)[None]
    save_file(old, tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"missing: classifier.bias(.|\n)*missing: classifier.weight") as error:
        weights.load(model, tmp_path / "encoder")
    assert "build the network" not in str(error.value)
    head = values(model)["classifier.weight"]
    weights.load(model, tmp_path / "encoder", new_head=True)
    after = values(model)
    np.testing.assert_array_equal(after["classifier.weight"], head)
    np.testing.assert_array_equal(after["bert.embeddings.LayerNorm.weight"], old["embeddings.LayerNorm.gamma"])
    assert_same({name: after[name] for name in trained if "classifier" not in name},
                {name: trained[name] for name in trained if "classifier" not in name})  # fmt: skip

    tensors = values(resnet(seed=2)) | {"bn1.num_batches_tracked": np.int64(3)}
    network = resnet()
    weights.set_tensors(network, tensors)
    tensors.pop("bn1.num_batches_tracked")
    assert_same(values(network), tensors)


@pytest.mark.slow
def test_heads_of_pretraining_and_a_pooler_on_one_side_only():
    tensors = values(bert())
    tensors = {name: value for name, value in tensors.items() if not name.startswith(("classifier", "bert.pooler"))}
    tensors |= {"cls.predictions.bias": np.ones(11, np.float32), "cls.seq_relationship.weight": np.ones((2, 8), "f4")}
    model = bert(seed=1)
    own = values(model)
    with pytest.raises(ValueError, match=r"missing: bert\.pooler\.dense\.weight"):
        weights.set_tensors(model, tensors)
    weights.set_tensors(model, tensors, new_head=True)
    np.testing.assert_array_equal(values(model)["bert.pooler.dense.weight"], own["bert.pooler.dense.weight"])
    mean = bert(pool="mean")
    weights.set_tensors(mean, values(bert(seed=2)), new_head=True)
    encoder = {name.removeprefix("bert."): value for name, value in values(bert(seed=4)).items() if "bert." in name}
    weights.set_tensors(mean, encoder, new_head=True)
    name = "embeddings.word_embeddings.weight"
    np.testing.assert_array_equal(values(mean)[f"bert.{name}"], encoder[name])
    both = bert(seed=3)
    weights.set_tensors(both, values(bert(seed=2)), new_head=True)
    for name, value in values(bert(seed=2)).items():
        if "classifier" not in name:
            np.testing.assert_array_equal(values(both)[name], value)


@pytest.mark.slow
def test_position_embeddings_of_another_size_are_resampled_on_request():
    for distilled in (False, True):
        tensors = values(deit(image_size=16, distilled=distilled))
        model = deit(seed=1, image_size=(8, 24), distilled=distilled)
        with pytest.raises(ValueError, match=r"pos_embed is (.|\n)*pass resample=True .*$"):
            weights.set_tensors(model, tensors)
        weights.set_tensors(model, tensors, resample=True)
        expected = resample_pos_embed(jnp.asarray(tensors["pos_embed"]), (2, 6), prefix_tokens=1 + distilled)
        np.testing.assert_array_equal(values(model)["pos_embed"], expected)
        same = deit(seed=1, image_size=16, distilled=distilled)
        weights.set_tensors(same, tensors, resample=True)
        assert_same(values(same), tensors)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_dtypes_are_read_and_written(dtype, tmp_path):
    model = resnet(seed=1)
    weights.save(model, tmp_path / "half", dtype=dtype)
    stored = load_file(tmp_path / "half")
    assert {value.dtype for value in stored.values()} == {np.dtype(dtype)}
    loaded = resnet()
    weights.load(loaded, tmp_path / "half")
    for name, value in values(model).items():
        got = values(loaded)[name]
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, value.astype(dtype).astype(np.float32))


def test_values_are_cast_to_the_models_param_dtype(tmp_path):
    weights.save(resnet(), tmp_path / "full")
    model = resnet(seed=1, param_dtype=jnp.bfloat16)
    weights.load(model, tmp_path / "full")
    assert model.conv1.kernel[...].dtype == jnp.bfloat16
    assert model.bn1.mean[...].dtype == jnp.float32
    np.testing.assert_array_equal(
        np.asarray(values(model)["conv1.weight"]), values(resnet())["conv1.weight"].astype(ml_dtypes.bfloat16)
    )


def test_values_go_where_the_models_arrays_are():
    device = jax.devices()[3]
    model = resnet()
    nnx.update(model, jax.device_put(nnx.as_pure(nnx.state(model)), device))
    weights.set_tensors(model, values(resnet(seed=1)))
    assert {leaf.device for leaf in jax.tree.leaves(nnx.as_pure(nnx.state(model)))} == {device}


def test_an_abstract_model_becomes_one_with_values():
    model = nnx.eval_shape(lambda: ResNet((1,), (4,), BasicBlock, num_classes=3, stem="cifar", rngs=nnx.Rngs(0)))
    expected = values(resnet(seed=1))
    weights.set_tensors(model, expected)
    assert_same(values(model), expected)
    assert nnx.jit(lambda model, x: model(x))(model, jnp.ones((2, 8, 8, 3))).shape == (2, 3)


@pytest.mark.slow
def test_gradients_have_names_too():
    model = resnet()
    model.train()
    grads = nnx.jit(nnx.grad(lambda model: jnp.sum(jnp.square(model(jnp.ones((2, 8, 8, 3)) / 3)))))(model)
    named = weights.get_tensors(model, grads)
    parameters = {name for name in weights.get_tensors(model) if "running" not in name}
    assert set(named) == parameters
    np.testing.assert_array_equal(named["fc.weight"], np.asarray(grads["fc"]["kernel"][...]).T)


def test_files_that_are_not_there_or_no_safetensors_files(tmp_path):
    model = resnet()
    before = values(model)
    with pytest.raises(FileNotFoundError, match=r"path: .*nothing does not exist; expected a safetensors file"):
        weights.load(model, tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="is a directory"):
        weights.load(model, tmp_path)
    weights.save(model, tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for damaged in (content[:-1], content[:100], content[:4], b"", struct.pack("<Q", 9) + b"not json!"):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged is not a complete safetensors file .*download it again"):
            weights.load(model, tmp_path / "damaged")
    for start in (b"PK\x03\x04", b"\x80\x02}q"):
        (tmp_path / "resnet.pth").write_bytes(start + bytes(200))
        with pytest.raises(ValueError, match=r"looks like a file of torch\.save: convert it"):
            weights.load(model, tmp_path / "resnet.pth")
    assert_same(values(model), before)


def test_saving_overwrites_on_request_only_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    weights.save(resnet(), tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        weights.save(resnet(seed=1), tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        weights.save(resnet(), tmp_path / "b" / "a")
    model = resnet()
    model.fc.bias[...] = jnp.full(3, 1e6)
    with pytest.raises(ValueError, match=r"fc\.bias has values too large for float16; choose bfloat16"):
        weights.save(model, tmp_path / "a", dtype=jnp.float16, overwrite=True)

    def interrupted(tensors, path, **kwargs):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(weights.safetensors.numpy, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        weights.save(model, tmp_path / "a", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == content
    monkeypatch.undo()
    weights.save(model, tmp_path / "a", overwrite=True)
    assert (tmp_path / "a").read_bytes() != content


def test_networks_without_names_of_tensors_are_refused():
    with pytest.raises(TypeError, match=r"model: got Linear, expected a network whose class has .*tensor_name"):
        weights.get_tensors(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
