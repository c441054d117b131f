"""The networks of ``models/``: sizes against the published ones, layers, and that they are what they say."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import smartfrz_jax as sfj
from models.resnet import BasicBlock, Bottleneck, ResNet

IMAGE = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)


def parameters(model):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.slow
def test_resnet50_has_the_published_number_of_parameters_and_54_layers():
    model = nnx.eval_shape(lambda: ResNet((3, 4, 6, 3), rngs=nnx.Rngs(0)))
    assert parameters(model) == 25_557_032
    layers = sfj.nnx.find_layers(model, IMAGE)
    assert len(layers) == 54
    assert layers.names[0] == "conv1"
    assert layers.head == "fc"
    block = [name for name in layers.names if name.startswith("stages/1/0/")]
    assert set(block) == {f"stages/1/0/{name}" for name in ("conv1", "conv2", "conv3", "downsample/conv")}
    assert all(any(param.endswith("scale") for param in layer.params) for layer in layers[:-1])
    assert len(sfj.nnx.find_layers(model, IMAGE, granularity="block")) == 1 + 16 + 1


@pytest.mark.slow
def test_history_of_resnet50_takes_about_6_megabytes():
    model = nnx.eval_shape(lambda: ResNet((3, 4, 6, 3), rngs=nnx.Rngs(0)))
    history = sfj.predictor.History.create(len(sfj.nnx.find_layers(model, IMAGE)))
    assert history.values.nbytes == 54 * 30 * 1024 * 4 == 6_635_520
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(history)) < 6.7e6


@pytest.mark.parametrize(("block", "stem", "size"), [(BasicBlock, "cifar", 8), (Bottleneck, "imagenet", 32)])
@pytest.mark.slow
def test_resnet_gives_logits_and_a_gradient_everywhere(block, stem, size):
    make = partial(ResNet, (1, 2), (4, 8), block, num_classes=3, channels=1, stem=stem)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def start(name, leaf):  # as the network does, but without compiling
        if name.endswith("kernel"):
            return (rng.normal(size=leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5).astype(leaf.dtype)
        return np.full(leaf.shape, name.endswith(("scale", "var")), leaf.dtype)

    @jax.jit
    def logits_and_gradients(state, x):
        model = nnx.merge(graphdef, state)
        grads, logits = nnx.grad(lambda model: (jnp.square(y := model(x)).mean(), y), has_aux=True)(model)
        return logits, nnx.as_pure(grads)

    x = rng.normal(size=(4, size, size, 1)).astype(np.float32)
    logits, grads = logits_and_gradients(sfj.pytrees.paths.tree_map(start, nnx.as_pure(state)), x)
    assert logits.shape == (4, 3)
    for path, grad in sfj.pytrees.paths.flatten(grads).items():
        assert float(np.abs(grad).max()) > 0, path
