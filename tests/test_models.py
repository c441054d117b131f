"""The networks of ``models/``: sizes against the published ones, layers, and that they are what they say."""

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
    history = sfj.History.create(len(sfj.nnx.find_layers(model, IMAGE)))
    assert history.values.nbytes == 54 * 30 * 1024 * 4 == 6_635_520
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(history)) < 6.7e6


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize(("stem", "size"), [("cifar", 8), ("imagenet", 32)])
@pytest.mark.slow
def test_resnet_gives_logits_and_a_gradient_everywhere(block, stem, size):
    model = ResNet((1, 2), (4, 8), block, num_classes=3, channels=1, stem=stem, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, size, size, 1))
    assert model(x).shape == (4, 3)
    grads = nnx.grad(lambda model: jnp.square(model(x)).mean())(model)
    for path, grad in sfj.paths.flatten(nnx.as_pure(grads)).items():
        assert float(jnp.abs(grad).max()) > 0, path
