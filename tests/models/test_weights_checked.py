"""Files of weights whose names have a prefix, or whose values no training gives, are refused with what to do."""

import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from models import weights

from .test_weights import HEADS, NETWORKS, assert_same, deit, values


def prefixed(model, prefix):
    tensors = values(model) | {"step.num_batches_tracked": np.zeros((), np.int64)}
    return {prefix + name: value for name, value in tensors.items()}


PREFIXES = ("_orig_mod.", "model.", "net.", "_orig_mod.module.", "ema_", "bert.")


@pytest.mark.parametrize(
    ("name", "prefix"),
    [(name, "module.") for name in NETWORKS] + [("resnet", prefix) for prefix in PREFIXES] + [("bert", "bert.")],
)
def test_a_prefix_is_named_and_taken_off_on_request(name, prefix, tmp_path):
    model, other = NETWORKS[name](seed=1), NETWORKS[name](seed=2)
    file, before = tmp_path / "weights", values(other)
    save_file(prefixed(model, prefix), file)
    if prefix.endswith("."):
        with pytest.raises(
            ValueError, match=rf"path: .*weights: \d+ of the \d+ names begin with '{prefix}', .*prefix="
        ):
            weights.load(other, file)
        assert_same(values(other), before)
    weights.load(other, file, prefix=prefix)
    assert_same(values(other), values(model))


def test_a_prefix_of_a_bare_encoder_and_of_another_head(tmp_path):
    model, other = NETWORKS["bert"](num_classes=3, seed=1), NETWORKS["bert"](num_classes=2, seed=2)
    encoder = {
        f"module.{name.removeprefix('bert.')}": value for name, value in values(model).items() if "bert." in name
    }
    with pytest.raises(ValueError, match=r"tensors: .* begin with 'module\.'.*--weights-prefix module\."):
        weights.set_tensors(other, encoder, new_head=True)
    weights.set_tensors(other, encoder, prefix="module.", new_head=True)
    kept = {name: value for name, value in values(other).items() if name.startswith("bert.")}
    assert_same(kept, {name: values(model)[name] for name in kept})


def test_a_wrong_prefix_says_the_right_one_and_other_misfits_are_listed_as_ever():
    model = NETWORKS["resnet"](seed=1)
    with pytest.raises(
        ValueError, match=r"begin with 'module\.', expected those of the network behind 'model\.'; take"
    ):
        weights.set_tensors(model, prefixed(model, "module."), prefix="model.")
    tensors = prefixed(model, "module.")
    del tensors["module.conv1.weight"]
    with pytest.raises(ValueError, match=r"missing: conv1.weight"):
        weights.set_tensors(model, tensors, prefix="module.")
    with pytest.raises(ValueError, match=r"missing: conv1.weight"):
        weights.set_tensors(model, {"layer1.else": np.ones(1, np.float32)})


@pytest.mark.parametrize(
    ("name", "value"), [(name, np.nan) for name in NETWORKS] + [("resnet", np.inf), ("resnet", -np.inf)]
)
def test_every_tensor_with_a_value_that_is_not_finite_is_named(name, value):
    model = NETWORKS[name](seed=1)
    before = values(model)
    names = [tensor for tensor in before if not tensor.startswith(HEADS[name])][:2]
    for tensor in names:
        wrong = {one: array.copy() for one, array in before.items()}
        wrong[tensor].flat[-1] = value
        with pytest.raises(ValueError, match=rf"tensors: .*\n  {tensor} has 1 of \d+ values NaN or infinite"):
            weights.set_tensors(model, wrong, new_head=True)
    assert_same(values(model), before)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2])
def test_values_that_are_not_finite_in_other_types(dtype):
    model = NETWORKS["resnet"](seed=1)
    tensors = {name: value.astype(dtype) for name, value in values(model).items()}
    tensors["fc.bias"][0] = np.nan
    with pytest.raises(ValueError, match=r"fc\.bias has 1 of 3 values NaN or infinite"):
        weights.set_tensors(model, tensors)
    weights.set_tensors(model, tensors, new_head=True)  # which does not take it


@pytest.mark.parametrize("name", ["resnet", "vgg", "mobilenet", "efficientnet"])
def test_every_negative_variance_is_named(name):
    model = NETWORKS[name](seed=1)
    tensors = values(model)
    variances = [tensor for tensor in tensors if tensor.endswith("running_var")]
    for tensor in variances:
        with pytest.raises(
            ValueError, match=rf"  {tensor} has 1 of \d+ values below 0, though it is a variance\nchoose"
        ):
            weights.set_tensors(
                model, tensors | {tensor: tensors[tensor] * np.r_[-1, [1] * (tensors[tensor].size - 1)]}
            )
    zero = {tensor: np.zeros_like(tensors[tensor]) for tensor in variances}
    weights.set_tensors(model, tensors | zero)  # of channels that are always the same
    assert variances


@pytest.mark.parametrize("resample", [False, True])
@pytest.mark.parametrize(
    ("distilled", "network"),
    [
        (True, "that is distilled: build it with distilled=True (of train.finetune: --model deit-tiny-distilled)"),
        (False, "that is not distilled: build it with distilled=False (of train.finetune: --model deit-tiny)"),
    ],
)
def test_weights_of_the_other_kind_of_deit_name_the_network_to_take(distilled, network, resample, tmp_path):
    model, other = deit(seed=1, distilled=not distilled), deit(seed=2, distilled=distilled)
    weights.save(other, tmp_path / "file")
    before, message = values(model), "path: .*file: (.|\n)*" + re.escape(f"\nthe file is of a network {network}")
    with pytest.raises(ValueError, match=message + "$"):  # nothing else is to be done
        weights.load(model, tmp_path / "file", resample=resample)
    with pytest.raises(ValueError, match=message):
        weights.load(model, tmp_path / "file", resample=resample, new_head=True)
    assert_same(values(model), before)


def test_a_head_of_another_width_names_the_options_that_make_a_new_one():
    tensors = values(NETWORKS["resnet"](num_classes=2))
    with pytest.raises(ValueError, match=r"pass new_head=True \(of train.finetune: --head new\)$"):
        weights.set_tensors(NETWORKS["resnet"](), tensors)
