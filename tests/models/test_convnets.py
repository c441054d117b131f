"""The convolutional networks: images they take, dtypes, dropout, stochastic depth, and what they refuse."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import efficientnet_lite, mobilenetv2
from models.efficientnet_lite import EfficientNetLite, MBConv, efficientnet_lite0
from models.mobilenetv2 import MobileNetV2
from models.resnet import ResNet, resnet50
from models.vgg import VGG, adaptive_mean, vgg11
from tests.models.convnets import TINY, abstract, every_tiny, full, images, random_model, variables

CONVOLUTIONS = ("conv_general_dilated", "custom_vjp_call")  # on a CPU, depthwise ones are the latter


def run_abstract(model, x):
    graphdef, state = nnx.split(model)
    return jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state, copy=True)(x))(state, x)


def test_adaptive_mean_covers_the_axis_as_pytorch_does():
    sizes = (1, 2, 3, 6, 7, 8, 13, 14, 20)
    arrays = [np.random.default_rng(size).normal(size=(2, size)).astype(np.float32) for size in sizes]
    means = jax.jit(lambda arrays: [adaptive_mean(x, 1, 7) for x in arrays])(arrays)
    for size, x, mean in zip(sizes, arrays, means, strict=True):
        expected = [
            x[:, math.floor(i * size / 7) : math.ceil((i + 1) * size / 7)].astype(np.float64).mean(axis=1)
            for i in range(7)
        ]
        np.testing.assert_allclose(mean, np.stack(expected, 1), rtol=1e-5, atol=1e-6)


def test_linear_layers_of_vgg_see_the_channels_first():
    model = random_model(lambda rngs: VGG([[2]], hidden=4, num_classes=3, rngs=rngs))
    model.eval()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 14, 14, 3)), jnp.float32)
    features, logits = nnx.jit(lambda model, x: (model.features(x), model(x)))(model, x)
    y = np.asarray(features, np.float64).transpose(0, 3, 1, 2).reshape(2, -1)
    for index in (0, 3, 6):
        linear = model.classifier[index]
        y = y @ np.asarray(linear.kernel[...], np.float64) + np.asarray(linear.bias[...], np.float64)
        y = y if index == 6 else np.maximum(y, 0)
    np.testing.assert_allclose(logits, y, rtol=1e-4, atol=1e-5)


@every_tiny
@pytest.mark.slow
def test_images_of_any_size_and_number_of_channels(make):
    model = abstract(make, num_classes=5, channels=1)
    smallest = 4 if isinstance(model, VGG) else 1
    for size in (smallest, 7, 32, 33):
        assert run_abstract(model, images(size, channels=1)).out_avals[0].shape == (2, 5)
    assert run_abstract(model, jax.ShapeDtypeStruct((1, 32, 17, 1), jnp.float32)).out_avals[0].shape == (1, 5)


@pytest.mark.parametrize(
    ("make", "pools"),
    [
        (lambda **kwargs: ResNet((1,), (4,), **kwargs), True),
        (lambda **kwargs: MobileNetV2(mobilenetv2.STAGES[:1], **kwargs), False),
        (lambda **kwargs: EfficientNetLite(efficientnet_lite.STAGES[:1], **kwargs), False),
    ],
    ids=["resnet", "mobilenetv2", "efficientnet_lite"],
)
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_the_stem_for_small_images_keeps_their_resolution(make, pools, stem):
    jaxpr = run_abstract(abstract(make, stem=stem), images(32))
    convs = [eqn for eqn in jaxpr.eqns if eqn.primitive.name in CONVOLUTIONS]
    kept = 32 if stem == "cifar" else 16
    assert convs[0].outvars[0].aval.shape[1:3] == (kept, kept)
    pooled = 2 if pools and stem == "imagenet" else 1
    assert convs[1].outvars[0].aval.shape[1:3] == (kept // pooled, kept // pooled)


@every_tiny
def test_computation_in_bfloat16_with_float32_weights(make):
    model = abstract(make, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in variables(model).values()} == {jnp.dtype(jnp.float32)}
    jaxpr = run_abstract(model, images(16))
    products = [eqn for eqn in jaxpr.eqns if eqn.primitive.name in {*CONVOLUTIONS, "dot_general"}]
    assert len(products) == sum(name.endswith("kernel") for name in variables(model, nnx.Param))
    assert {eqn.outvars[0].aval.dtype for eqn in products} == {jnp.dtype(jnp.bfloat16)}
    assert jaxpr.out_avals[0].dtype == jnp.float32


@every_tiny
def test_weights_in_bfloat16(make):
    model = abstract(make, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in variables(model, nnx.Param).values()} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in variables(model, nnx.BatchStat).values()} == {jnp.dtype(jnp.float32)}
    assert run_abstract(model, images(16)).out_avals[0].dtype == jnp.float32


@pytest.mark.slow
def test_dropout_is_where_the_original_has_it():
    def rates(model):
        modules = [module for _, module in nnx.iter_modules(model) if isinstance(module, nnx.Dropout)]
        return sorted(module.rate for module in modules if module.rate)

    assert rates(full("resnet50")) == []
    assert rates(full("vgg11")) == [0.5, 0.5]
    assert rates(full("mobilenetv2")) == [0.2]
    model = full("efficientnet_lite0")
    shortcuts = (2, 4, 6, 7, 9, 10, 12, 13, 14)
    assert [block.drop.rate for block in model.blocks] == pytest.approx(
        [0.2 * i / 16 if i in shortcuts else 0 for i in range(16)]
    )
    assert model.dropout.rate == 0.2
    for name in ("vgg", "mobilenetv2", "efficientnet_lite"):
        without = {"dropout": 0.0} | ({"drop_connect": 0.0} if name == "efficientnet_lite" else {})
        assert not variables(abstract(TINY[name], **without), nnx.RngState)


@pytest.mark.slow
def test_stochastic_depth_drops_the_branch_of_whole_examples():
    block = random_model(lambda rngs: MBConv(4, 4, 3, 1, 2, 0.25, rngs=rngs))
    block.eval()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 3, 3, 4)), jnp.float32)
    run = nnx.jit(lambda block, x: block(x))
    branch = np.asarray(run(block, x) - x)
    block.drop.deterministic = False
    dropped = np.asarray(run(block, x) - x)
    kept = np.abs(dropped).max(axis=(1, 2, 3)) > 0
    np.testing.assert_allclose(dropped[kept], branch[kept] / 0.75, rtol=1e-4, atol=1e-5)
    assert 40 <= kept.sum() <= 56  # 48 expected, 2.3 standard deviations


@pytest.mark.parametrize(
    ("make", "x", "error", "match"),
    [
        (TINY["resnet"], images(8, channels=1), ValueError, r"x: got images of shape \(2, 8, 8, 1\), expected .* 3\)"),
        (TINY["vgg"], jax.ShapeDtypeStruct((8, 8, 3), jnp.float32), ValueError, r"x: got images of shape \(8, 8, 3\)"),
        (TINY["mobilenetv2"], images(8, dtype=jnp.uint8), TypeError, "x: got uint8 pixels, expected floating point"),
        (TINY["efficientnet_lite"], images(0), ValueError, "x: got images of 0 x 0, expected at least 1 x 1"),
        (vgg11, images(31), ValueError, "x: got images of 31 x 31, expected at least 32 x 32, or the strides"),
    ],
)
def test_refuses_images_that_do_not_fit(make, x, error, match):
    with pytest.raises(error, match=match):
        run_abstract(abstract(make), x)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ResNet((1, 1), (4,), rngs=nnx.Rngs(0)), "stage_sizes, widths: got 2 and 1"),
        (lambda: resnet50(stem="svhn", rngs=nnx.Rngs(0)), "stem: got 'svhn', expected 'imagenet', or 'cifar'"),
        (lambda: mobilenetv2.mobilenetv2(stem="svhn", rngs=nnx.Rngs(0)), "stem: got 'svhn'"),
        (lambda: efficientnet_lite0(stem="svhn", rngs=nnx.Rngs(0)), "stem: got 'svhn'"),
        (lambda: vgg11(dropout=1.0, rngs=nnx.Rngs(0)), "dropout: got 1.0, expected the share to drop"),
        (lambda: mobilenetv2.mobilenetv2(dropout=-0.1, rngs=nnx.Rngs(0)), "dropout: got -0.1"),
        (lambda: efficientnet_lite0(drop_connect=1.5, rngs=nnx.Rngs(0)), "drop_connect: got 1.5"),
    ],
)
def test_refuses_bad_configurations(make, match):
    with pytest.raises(ValueError, match=match):
        make()
