"""The convolutional networks: sizes, layers, names, initialisation, dtypes, dropout, and frozen layers held."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from models import efficientnet_lite, mobilenetv2
from models.efficientnet_lite import EfficientNetLite, MBConv, efficientnet_lite0
from models.layers.batch_norm import BatchNorm
from models.mobilenetv2 import MobileNetV2, rounded_width
from models.resnet import BasicBlock, Bottleneck, ResNet, resnet50
from models.vgg import VGG, adaptive_mean, vgg11

FULL = {
    "resnet50": (resnet50, 25_557_032),
    "vgg11": (vgg11, 132_863_336),
    "vgg11_bn": (lambda **kwargs: vgg11(batch_norm=True, **kwargs), 132_868_840),
    "mobilenetv2": (mobilenetv2.mobilenetv2, 3_504_872),
    "efficientnet_lite0": (efficientnet_lite0, 4_652_008),
}
TINY = {
    "resnet": lambda **kwargs: ResNet((1, 1), (4, 8), BasicBlock, stem="cifar", **kwargs),
    "vgg": lambda **kwargs: VGG([[4], [4]], hidden=8, batch_norm=True, **kwargs),
    "mobilenetv2": lambda **kwargs: MobileNetV2(
        [mobilenetv2.Stage(1, 8, 1, 1), mobilenetv2.Stage(2, 8, 1, 1)], width_multiplier=0.25, **kwargs
    ),
    "efficientnet_lite": lambda **kwargs: EfficientNetLite(
        [efficientnet_lite.Stage(1, 8, 1, 1, 3), efficientnet_lite.Stage(2, 8, 2, 2, 3)],
        **{"drop_connect": 0.5} | kwargs,
    ),
}
CONVOLUTIONS = ("conv_general_dilated", "custom_vjp_call")  # on a CPU, depthwise ones are the latter
every_tiny = pytest.mark.parametrize("make", TINY.values(), ids=TINY)


def abstract(make, **kwargs):
    return nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0), **kwargs))


@functools.cache
def full(name):
    return abstract(FULL[name][0])


def random_model(make, **kwargs):
    """The network with weights from NumPy, which saves compiling its initialisers."""
    graphdef, state = nnx.split(abstract(make, **kwargs))
    rng = np.random.default_rng(0)

    def fill(name, leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(len(name))
        if leaf.dtype == jnp.uint32:
            return jnp.zeros(leaf.shape, leaf.dtype)
        if name.endswith(("scale", "var")):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.normal(size=leaf.shape) / max(1, math.prod(leaf.shape[:-1])) ** 0.5, leaf.dtype)

    return nnx.merge(graphdef, sfj.pytrees.paths.tree_map(fill, nnx.as_pure(state)))


def images(size, n=2, channels=3, dtype=jnp.float32):
    return jax.ShapeDtypeStruct((n, size, size, channels), dtype)


def variables(model, *kinds):
    return sfj.pytrees.paths.flatten(nnx.state(model, kinds or (nnx.Param, nnx.BatchStat)))


def parameters(model):
    return sum(math.prod(leaf.shape) for leaf in variables(model, nnx.Param).values())


def run_abstract(model, x):
    graphdef, state = nnx.split(model)
    return jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state, copy=True)(x))(state, x)


def normalisation_of(layer):
    """Name of the BatchNorm behind a convolution, in all four naming schemes."""
    parent, _, name = layer.rpartition("/")
    if name.isdigit():
        norm = str(int(name) + 1)
    else:
        inner = {"conv": "bn", "conv_stem": "bn0", "conv_head": "bn1"}
        inner |= {"expand_conv": "bn0", "depthwise_conv": "bn1", "project_conv": "bn2"}
        norm = inner.get(name) or name.replace("conv", "bn")
    return f"{parent}/{norm}" if parent else norm


def forward_order(name):
    """The layers' names, written out from the architecture."""
    match name:
        case "resnet50":
            blocks = [(i, j) for i, size in enumerate((3, 4, 6, 3)) for j in range(size)]
            inner = [(i, j, ["conv1", "conv2", "conv3", *(["downsample/conv"] if j == 0 else [])]) for i, j in blocks]
            return ["conv1", *(f"stages/{i}/{j}/{conv}" for i, j, convs in inner for conv in convs), "fc"]
        case "vgg11":
            return [*(f"features/{i}" for i in (0, 3, 6, 8, 11, 13, 16, 18)), *(f"classifier/{i}" for i in (0, 3, 6))]
        case "vgg11_bn":
            return [*(f"features/{i}" for i in (0, 4, 8, 11, 15, 18, 22, 25)), *(f"classifier/{i}" for i in (0, 3, 6))]
        case "mobilenetv2":
            inner = [f"features/{i}/conv/{conv}" for i in range(2, 18) for conv in ("0/0", "1/0", "2")]
            first = ["features/0/0", "features/1/conv/0/0", "features/1/conv/1"]
            return [*first, *inner, "features/18/0", "classifier/1"]
        case _:
            convs = ("expand_conv", "depthwise_conv", "project_conv")
            inner = [f"blocks/{i}/{conv}" for i in range(16) for conv in convs if i > 0 or conv != "expand_conv"]
            return ["conv_stem", *inner, "conv_head", "fc"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_size_has_the_published_parameters_and_each_convolution_its_normalisation(name):
    model = full(name)
    assert parameters(model) == FULL[name][1]
    layers = sfj.nnx.find_layers(model, images(224))
    assert list(layers.names) == forward_order(name)
    leaves = variables(model)
    for layer in layers:
        kernel = f"{layer.name}/kernel"
        assert layer.kernels == (kernel,)
        expected = {kernel, f"{layer.name}/bias"} & leaves.keys()
        if len(leaves[kernel].shape) == 4 and name != "vgg11":
            norm = normalisation_of(layer.name)
            expected |= {f"{norm}/scale", f"{norm}/bias"}
            assert {f"{norm}/mean", f"{norm}/var"} <= set(layer.state)
        assert set(layer.params) == expected


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda **kwargs: ResNet((2, 2, 2, 2), block=BasicBlock, **kwargs), 11_689_512),  # ResNet18
        (lambda **kwargs: VGG([[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3], **kwargs), 138_357_544),  # VGG16
        (lambda **kwargs: MobileNetV2(width_multiplier=0.35, **kwargs), 1_677_128),
        (lambda **kwargs: MobileNetV2(width_multiplier=1.4, **kwargs), 6_108_776),
        (lambda **kwargs: EfficientNetLite(depth_multiplier=1.1, **kwargs), 5_416_680),  # Lite1
        (lambda **kwargs: EfficientNetLite(width_multiplier=1.4, depth_multiplier=1.8, **kwargs), 13_006_568),  # Lite4
    ],
)
@pytest.mark.slow
def test_relatives_have_the_published_parameters(make, count):
    assert parameters(abstract(make)) == count


@pytest.mark.slow
def test_names_are_those_of_the_original():
    for name in FULL:
        model = full(name)
        names = [type(model).tensor_name(variable) for variable in variables(model)]
        assert len(set(names)) == len(names), name
        assert {tensor.split(".")[-1] for tensor in names} <= {"weight", "bias", "running_mean", "running_var"}
    assert ResNet.tensor_name("bn1/var") == "bn1.running_var"
    assert ResNet.tensor_name("stages/0/0/downsample/conv/kernel") == "layer1.0.downsample.0.weight"
    assert ResNet.tensor_name("stages/3/2/bn3/scale") == "layer4.2.bn3.weight"
    assert ResNet.tensor_name("stages/11/10/downsample/bn/bias") == "layer12.10.downsample.1.bias"
    assert ResNet.tensor_name("fc/kernel") == "fc.weight"
    assert VGG.tensor_name("features/26/mean") == "features.26.running_mean"
    assert VGG.tensor_name("classifier/6/bias") == "classifier.6.bias"
    assert MobileNetV2.tensor_name("features/0/1/scale") == "features.0.1.weight"
    assert MobileNetV2.tensor_name("features/17/conv/2/kernel") == "features.17.conv.2.weight"


def test_efficientnet_lite0_has_the_tensors_of_the_port(shared):
    shapes = json.loads((shared / "data" / "weights" / "efficientnet_lite0_shapes.json").read_text())
    ours = {}
    for name, leaf in variables(full("efficientnet_lite0")).items():
        order = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[len(leaf.shape)]
        ours[EfficientNetLite.tensor_name(name)] = [leaf.shape[axis] for axis in order]
    assert ours == {name: shape for name, shape in shapes.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    ("width", "multiplier", "rounded"),
    [(32, 1, 32), (1280, 1, 1280), (32, 0.35, 16), (24, 0.5, 16), (16, 0.1, 8), (96, 0.75, 72), (40, 1.2, 48)],
)
def test_rounded_width_is_a_multiple_of_8_not_far_below(width, multiplier, rounded):
    assert rounded_width(width, multiplier) == rounded
    assert rounded % 8 == 0
    assert rounded >= 0.9 * width * multiplier


def batch_norm_in_float64(x, scale, bias, epsilon=1e-5):
    mean, var = x.mean(axis=(0, 1)), x.var(axis=(0, 1))
    return (x - mean) / np.sqrt(var + epsilon) * scale + bias, mean, var


def random_norm(features=3, **kwargs):
    norm = BatchNorm(features, rngs=nnx.Rngs(0), **kwargs)
    rng = np.random.default_rng(1)
    for variable in (norm.scale, norm.bias, norm.mean):
        variable[...] = jnp.asarray(rng.normal(size=features), variable.dtype)
    norm.var[...] = jnp.asarray(rng.uniform(0.5, 2, size=features), jnp.float32)
    return norm


def test_batch_norm_normalizes_with_the_biased_and_keeps_the_unbiased_variance():
    x = np.random.default_rng(0).normal(1.5, 2, size=(2, 4, 3))
    norm = random_norm(momentum=0.7)
    before = [np.asarray(v[...], np.float64) for v in (norm.scale, norm.bias, norm.mean, norm.var)]
    expected, mean, var = batch_norm_in_float64(x, *before[:2])
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], 0.7 * before[2] + 0.3 * mean, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(norm.var[...], 0.7 * before[3] + 0.3 * var * 8 / 7, rtol=1e-6)


def test_batch_norm_in_evaluation_mode_uses_and_does_not_touch_the_running_statistics():
    x = np.random.default_rng(0).normal(1.5, 2, size=(2, 4, 3))
    norm = random_norm()
    norm.eval()
    scale, bias, mean, var = (np.asarray(v[...], np.float64) for v in (norm.scale, norm.bias, norm.mean, norm.var))
    held = norm.mean.get_value(), norm.var.get_value()
    y = norm(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5) * scale + bias, rtol=1e-5, atol=1e-5)
    assert norm.mean.get_value() is held[0]
    assert norm.var.get_value() is held[1]
    np.testing.assert_array_equal(norm(jnp.asarray(x, jnp.float32), use_running_average=True), y)
    norm(jnp.asarray(x, jnp.float32), use_running_average=False)
    assert norm.mean.get_value() is not held[0]


@pytest.mark.slow
def test_gradients_of_batch_norm_are_the_closed_form():
    rng = np.random.default_rng(0)
    x, dy = rng.normal(1.5, 2, size=(2, 6, 4, 3))
    norm = random_norm()

    def loss(norm, x):
        return jnp.sum(norm(x) * jnp.asarray(dy, jnp.float32))

    grads, dx = nnx.grad(loss, argnums=(0, 1))(norm, jnp.asarray(x, jnp.float32))
    deviation = np.sqrt(x.var(axis=(0, 1)) + 1e-5)
    normalized = (x - x.mean(axis=(0, 1))) / deviation
    scale = np.asarray(norm.scale[...], np.float64)
    centred = dy - dy.mean(axis=(0, 1)) - normalized * (dy * normalized).mean(axis=(0, 1))
    np.testing.assert_allclose(dx, scale / deviation * centred, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads["scale"][...], (dy * normalized).sum(axis=(0, 1)), rtol=1e-4)
    np.testing.assert_allclose(grads["bias"][...], dy.sum(axis=(0, 1)), rtol=1e-4, atol=1e-5)


def test_batch_norm_is_exact_where_the_mean_is_far_from_zero():
    x = np.random.default_rng(0).normal(1000, 1, size=(16, 16, 3)).astype(np.float32)
    norm = BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0))
    expected, _, var = batch_norm_in_float64(x.astype(np.float64), 1, 0)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=1e-3)  # x itself is only known to 6e-5
    np.testing.assert_allclose(norm.var[...], var * 256 / 255, rtol=1e-5)


def test_batch_norm_in_bfloat16_has_statistics_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(3, 1, size=(8, 32, 3)), jnp.bfloat16)
    norm = BatchNorm(3, momentum=0.0, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    assert {v.dtype for v in variables(norm).values()} == {jnp.dtype(jnp.float32)}
    wide = np.asarray(x, np.float64)
    expected, mean, var = batch_norm_in_float64(wide, 1, 0)
    np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-6)
    np.testing.assert_allclose(norm.var[...], var * 256 / 255, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-6)
    norm.eval()
    assert norm(x).dtype == jnp.bfloat16


def test_batch_norm_of_one_value_leaves_the_statistics_finite():
    norm = BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(norm(jnp.array([[3.0, 4.0]])), [[0, 0]])
    np.testing.assert_array_equal(norm.mean[...], [1.5, 2.0])
    np.testing.assert_array_equal(norm.var[...], [0.5, 0.5])


@pytest.mark.slow
def test_batch_norm_takes_its_statistics_over_a_named_axis_too():
    x = jnp.asarray(np.random.default_rng(0).normal(1, 2, size=(4, 5, 3)), jnp.float32)
    graphdef, state = nnx.split(random_norm(axis_name="devices"))

    def shard(x):
        norm = nnx.merge(graphdef, state, copy=True)
        y = norm(x)
        return y, norm.mean[...], norm.var[...]

    y, mean, var = jax.vmap(shard, axis_name="devices")(x)
    whole = random_norm()
    np.testing.assert_allclose(y.reshape(20, 3), whole(x.reshape(20, 3)), rtol=1e-5, atol=1e-5)
    for shards, expected in ((mean, whole.mean), (var, whole.var)):
        np.testing.assert_allclose(shards, np.broadcast_to(expected[...], (4, 3)), rtol=1e-6)


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


def normal(deviation):
    return deviation, 3.0


def uniform(bound):
    return bound / math.sqrt(3), 1.8


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda rngs: ResNet((1,), (32,), Bottleneck, num_classes=100, rngs=rngs),
            {
                "conv1/kernel": normal(math.sqrt(2 / (49 * 32))),
                "stages/0/0/conv2/kernel": normal(math.sqrt(2 / (9 * 32))),
                "stages/0/0/downsample/conv/kernel": normal(math.sqrt(2 / 128)),
                "fc/kernel": uniform(1 / math.sqrt(128)),
                "fc/bias": uniform(1 / math.sqrt(128)),
            },
        ),
        (
            lambda rngs: VGG([[32]], hidden=64, num_classes=100, rngs=rngs),
            {
                "features/0/kernel": normal(math.sqrt(2 / (9 * 32))),
                "classifier/0/kernel": normal(0.01),
                "classifier/6/kernel": normal(0.01),
            },
        ),
        (
            lambda rngs: MobileNetV2([mobilenetv2.Stage(6, 32, 1, 1)], num_classes=10, rngs=rngs),
            {
                "features/0/0/kernel": normal(math.sqrt(2 / (9 * 32))),
                "features/1/conv/1/0/kernel": normal(math.sqrt(2 / (9 * 192))),
                "features/1/conv/2/kernel": normal(math.sqrt(2 / 32)),
                "classifier/1/kernel": normal(0.01),
            },
        ),
        (
            lambda rngs: EfficientNetLite([efficientnet_lite.Stage(6, 32, 1, 1, 5)], num_classes=10, rngs=rngs),
            {
                "conv_stem/kernel": normal(math.sqrt(2 / (9 * 32))),
                "blocks/0/depthwise_conv/kernel": normal(math.sqrt(2 / 25)),
                "blocks/0/project_conv/kernel": normal(math.sqrt(2 / 32)),
                "fc/kernel": uniform(1 / math.sqrt(1280)),
            },
        ),
    ],
    ids=["resnet", "vgg", "mobilenetv2", "efficientnet_lite"],
)
@pytest.mark.slow
def test_initialisation_has_the_statistics_of_the_original(make, expected):
    rngs = nnx.Rngs(jax.random.key(0, impl="rbg"))  # compiles faster than the default
    leaves = variables(nnx.jit(make)(rngs), nnx.Param)
    for name, (deviation, kurtosis) in expected.items():
        x = np.asarray(leaves[name], np.float64).ravel() / deviation
        error = 5 / math.sqrt(x.size)  # five standard errors of mean, variance and fourth moment of a normal
        assert abs(x.mean()) < error, name
        assert abs(x.var() - 1) < error * math.sqrt(2), name
        assert abs(np.mean(x**4) - kurtosis) < error * math.sqrt(96), name
        if kurtosis < 3:
            assert np.abs(x).max() <= math.sqrt(3) * (1 + 1e-6), name
    for name, leaf in leaves.items():
        if name.endswith(("scale", "bias")) and name not in expected:
            np.testing.assert_array_equal(leaf, 1 if name.endswith("scale") else 0, name)


@pytest.mark.slow
def test_batch_norms_have_the_originals_momentum_and_epsilon():
    for model in map(full, FULL):
        norms = [module for _, module in nnx.iter_modules(model) if isinstance(module, nnx.BatchNorm)]
        expected = (0.99, 1e-3) if isinstance(model, EfficientNetLite) else (0.9, 1e-5)
        assert {(norm.momentum, norm.epsilon) for norm in norms} <= {expected}
        assert len(norms) == len(variables(model, nnx.BatchStat)) // 2


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


@every_tiny
@pytest.mark.slow
def test_frozen_layers_are_held_and_the_others_train(make):
    model = random_model(make, num_classes=3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.float32)
    layers = sfj.nnx.find_layers(model, x)
    assert set().union(*(layer.state for layer in layers)) == set(variables(model, nnx.BatchStat, nnx.RngState))
    tx = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))

    @nnx.jit
    def train_step(model, optimizer, x):
        _, grads = optimizer.value_and_grad(lambda model, x: jnp.square(model(x) - 1).mean())(model, x)
        optimizer.update(model, grads)

    third = len(layers) // 3
    # At the front, and behind layers that train.
    frozen = (layers.names[0], *layers.names[third + 1 : 2 * third + 1])
    optimizer = sfj.nnx.Optimizer(model, tx, wrt=nnx.Param, layers=layers)
    optimizer.freeze(model, list(frozen))
    before = jax.device_get(as_data(model))
    for _ in range(2):
        train_step(model, optimizer, x)
    after = jax.device_get(as_data(model))
    for layer in layers:
        for name in (*layer.params, *layer.state):
            if layer.name in frozen:
                np.testing.assert_array_equal(after[name], before[name], name)
            elif not name.endswith("rngs/key"):
                assert (after[name] != before[name]).any(), name


def as_data(model):
    leaves = variables(model, ...)
    return {name: jax.random.key_data(leaf) if name.endswith("key") else leaf for name, leaf in leaves.items()}


@every_tiny
@pytest.mark.slow
def test_features_are_the_outputs_of_the_normalisations(make):
    model = random_model(make, num_classes=3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.float32)
    layers = sfj.nnx.find_layers(model, x)
    taps = sfj.nnx.features(model, layers, x)
    outputs = taps(model, x)
    assert tuple(outputs) == layers.names
    recorded = outputs_of_norms(model, x)
    for layer in layers:
        norm = normalisation_of(layer.name)
        if norm in recorded:
            np.testing.assert_allclose(outputs[layer.name], recorded.pop(norm), rtol=1e-4, atol=1e-5)
    assert not recorded


@pytest.mark.slow
def test_every_policy_decides():
    """For one network, as they see nothing of it but its layers, and the features, which are alike."""
    model = random_model(TINY["mobilenetv2"], num_classes=3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.float32)
    layers = sfj.nnx.find_layers(model, x)
    taps = sfj.nnx.features(model, layers, x)
    outputs = taps(model, x)
    predictor = sfj.Predictor(
        sfj.predictor.PredictorConfig(size=16, hidden=8, features=4, head_hidden=4), rngs=nnx.Rngs(0)
    )
    predictor.classifier.layers[2].bias[...] = jnp.array([0.0, 100.0])  # always confident that a layer can be frozen
    policies = {
        "never": sfj.policies.never(),
        "linear": sfj.policies.freezeout(total_steps=6, t0=0.5),
        "autofreeze": sfj.policies.autofreeze(2),
        "similarity_guided": sfj.policies.similarity_guided(outputs, 2, window=2, tolerance=0.1),
        "smartfrz": sfj.policies.smartfrz(predictor, total_steps=6, record_every=1, evaluate_every=3, window=2),
        "static_prefix": sfj.policies.static_prefix([(0.5, 0.8)], total_steps=6),
        "random": sfj.policies.random(0.4, total_steps=6),
    }
    for name, policy in policies.items():
        optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param, layers=layers)
        freezer = sfj.nnx.Freezer(model, optimizer, policy, features=lambda model: taps(model, x))
        for step in range(1, 7):
            if optimizer.keep_grads:
                for param, grad in optimizer.grads.items():  # those of front layers change least
                    grad[...] = jnp.full_like(grad[...], 1 + layers.names.index(layers.owner[param]) / step)
            optimizer.step[...] += 1
            freezer.step(loss=jnp.float32(1))
        assert bool(freezer.frozen.names) == (name != "never"), name
        assert layers.head not in freezer.frozen.names


def outputs_of_norms(model, x):
    """Outputs of the BatchNorms on the way through the network in evaluation mode, by module."""
    graphdef, state = nnx.split(model)

    class Recording(BatchNorm):
        def __call__(self, x, use_running_average=None):
            recorded[names[id(self)]] = super().__call__(x, use_running_average)
            return recorded[names[id(self)]]

    def run(state, x):
        module = nnx.merge(graphdef, state, copy=True)
        module.eval()
        for path, inner in nnx.iter_modules(module):
            if isinstance(inner, BatchNorm):
                names[id(inner)] = "/".join(map(str, path))
                inner.__class__ = Recording
        module(x)
        return recorded

    names, recorded = {}, {}
    return dict(jax.jit(run)(state, x))
