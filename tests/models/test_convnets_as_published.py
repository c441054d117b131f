"""The convolutional networks in full size: parameters, layers, names and initialisation are those of the originals."""

import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

import smartfrz_jax as sfj
from models import efficientnet_lite, mobilenetv2
from models.efficientnet_lite import EfficientNetLite
from models.mobilenetv2 import MobileNetV2, rounded_width
from models.resnet import BasicBlock, Bottleneck, ResNet
from models.vgg import VGG
from tests.models.convnets import FULL, abstract, full, images, normalisation_of, variables


def parameters(model):
    return sum(math.prod(leaf.shape) for leaf in variables(model, nnx.Param).values())


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


@pytest.mark.slow
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
