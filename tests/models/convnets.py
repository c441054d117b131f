"""The convolutional networks of the tests: in full size without their values, and tiny with random ones."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import smartfrz_jax as sfj
from models import efficientnet_lite, mobilenetv2
from models.efficientnet_lite import EfficientNetLite, efficientnet_lite0
from models.mobilenetv2 import MobileNetV2
from models.resnet import BasicBlock, ResNet, resnet50
from models.vgg import VGG, vgg11

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
