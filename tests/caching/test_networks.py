"""Networks with their frozen front cached take the steps that they take without."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import smartfrz_jax as sfj
from models.bert import Bert
from models.deit import DeiT
from models.resnet import BasicBlock, ResNet
from smartfrz_jax.caching.prefix_cache import PrefixCache
from smartfrz_jax.nnx.prefix_cache import PrefixCache as NNXPrefixCache
from smartfrz_jax.pytrees import paths
from tests.support.prefix_caches import IDS, IMAGES, LABELS, MASK, X, Y
from tests.support.rounding import assert_close

pytestmark = pytest.mark.usefixtures("jax_defaults")


def cross_entropy(model, *inputs):
    *inputs, labels = inputs
    return optax.softmax_cross_entropy_with_integer_labels(model(*inputs), labels).mean()


def resnet():
    return ResNet((1, 1), (4, 8), BasicBlock, num_classes=3, stem="cifar", rngs=nnx.Rngs(0))


def started(make):
    """The network with values from NumPy, which saves compiling its initialisers."""
    rng, (graphdef, state) = np.random.default_rng(0), nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    streams = iter(jax.random.split(jax.random.key(0), 99))

    def draw(name, leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return next(streams)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(np.zeros(leaf.shape, leaf.dtype))
        if name.endswith(("scale", "depth")):
            return jnp.asarray(rng.uniform(0.5, 1, leaf.shape), leaf.dtype)
        return jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype)

    return nnx.merge(graphdef, paths.tree_map(draw, nnx.as_pure(state)))


def deit(**kwargs):
    sizes = {"image_size": 8, "patch_size": 4, "dim": 8, "depth": 2, "heads": 2, "num_classes": 3}
    return started(partial(DeiT, **{**sizes, "dropout": 0.1, "drop_path": 0.2, **kwargs}))


def bert():
    sizes = {"vocab_size": 20, "max_positions": 8, "dim": 8, "depth": 2, "heads": 2, "hidden": 12, "num_classes": 3}
    return started(partial(Bert, **sizes))


RESNET_STEM = ["conv1", "stages/0/0/conv1", "stages/0/0/conv2"]
NETWORKS = {
    "resnet": (resnet, (IMAGES, LABELS), ("stages/1", "fc"), [(8, 8, 4)], {"inputs:1"}),
    "resnet, all": (resnet, (IMAGES, LABELS), ("fc",), [(8,)], {"inputs:1"}),
    "deit": (deit, (IMAGES, LABELS), ("blocks/1", "norm", "head"), [(5, 8)], {"inputs:1"}),
    "deit, all": (lambda: deit(drop_path=0.0), (IMAGES, LABELS), ("head",), [(8,)], {"inputs:1"}),
    "deit, scan": (
        lambda: deit(depth=3, scan=True),
        (IMAGES, LABELS),
        ("blocks/1", "blocks/2", "norm", "head"),
        [(5, 8)],
        {"inputs:1"},
    ),
    "bert": (
        bert,
        (IDS, MASK, LABELS),
        ("encoder/layer/1", "pooler", "classifier"),
        [(6, 8)],
        {"inputs:1", "inputs:2"},
    ),
    "bert, all": (bert, (IDS, MASK, LABELS), ("classifier",), [(8,)], {"inputs:2"}),
}


@nnx.jit(static_argnums=2)
def uncached_step(model, optimizer, loss_fn, *inputs):
    return optimizer.value_and_grad(loss_fn)(model, *inputs)


@nnx.jit(static_argnums=2)
def cached_step(model, optimizer, cache, activations, *inputs):
    return optimizer.value_and_grad(cache.loss)(model, activations, *inputs)


def optimizer_for(model, inputs, active):
    layers = sfj.nnx.find_layers(model, *inputs[:-1])
    optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), layers=layers)
    optimizer.freeze(model, [name for name in layers.names if not name.startswith(active)])
    return optimizer


def variables(module):
    leaves = paths.flatten(nnx.as_pure(nnx.state(module)))
    return {name: leaf for name, leaf in leaves.items() if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    make, inputs, active, frontier, needed = NETWORKS[name]
    model, other = make(), make()
    optimizer = optimizer_for(model, inputs, active)
    cache = NNXPrefixCache(model, optimizer.frozen, cross_entropy, *inputs)
    assert [value.shape for value in cache.frontier] == frontier
    assert cache.needed == needed
    of_two = jax.eval_shape(lambda *inputs: cache.activations(model, *inputs), *(x[:2] for x in inputs))
    assert [value.shape for value in of_two] == [(2, *shape) for shape in frontier]
    activations = cache.activations(model, *inputs)
    left = [x if f"inputs:{i}" in needed else None for i, x in enumerate(inputs)]
    expected = uncached_step(model, optimizer, cross_entropy, *inputs)
    got = cached_step(other, optimizer, cache, activations, *left)
    assert_close(got[0], expected[0])
    gradients, references = (paths.flatten(nnx.as_pure(pair[1])) for pair in (got, expected))
    for leaf in [leaf for leaf in references if "/query/" in leaf or "/key/" in leaf]:
        # Softmax's derivative is a difference of what the values' gradients are sums of, and has its last bits from
        # there; of a key's bias, which softmax does not see, it has nothing else.
        scale = float(np.abs(references[leaf.split("/self/")[0] + "/self/value/kernel"]).max())
        assert_close(gradients.pop(leaf), references.pop(leaf), scale)
    assert_close(gradients, references)
    assert_close(variables(other), variables(model))  # statistics, and the counts of random streams


@pytest.mark.slow
def test_frontier_of_a_residual_network_is_its_last_relu_and_the_step_is_that_of_the_rest():
    model = resnet()
    optimizer = optimizer_for(model, (IMAGES, LABELS), ("stages/1", "fc"))
    assert sorted(optimizer.frozen.names) == RESNET_STEM
    cache = NNXPrefixCache(model, optimizer.frozen, cross_entropy, IMAGES, LABELS)
    (activations,) = cache.activations(model, IMAGES, LABELS)
    model.eval()
    expected = model.stages[0][0](nnx.relu(model.bn1(model.conv1(IMAGES))))
    model.train()
    assert_close(activations, expected)

    def rest(model, x, labels):
        logits = model.fc(jnp.mean(model.stages[1][0](x), axis=(1, 2)))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    by_hand = sfj.program_cost(uncached_step, model, optimizer, rest, activations, LABELS).flops
    got = sfj.program_cost(cached_step, model, optimizer, cache, (activations,), None, LABELS).flops
    assert got == pytest.approx(by_hand, rel=1e-3)


class Norms(nnx.Module):
    """A layer whose own counter changes what it does, and a statistic that no BatchNorm holds."""

    def __init__(self, rngs, kind):
        self.first, self.second = nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)
        self.kind, self.seen = kind, nnx.BatchStat(jnp.zeros(()) if kind == "count" else jnp.zeros(5))

    def __call__(self, x):
        x = self.first(x)
        if self.kind == "count":
            self.seen[...] += 1
            x = x * (1 + self.seen[...])
        elif self.kind == "average":
            x = x - self.seen[...]
            self.seen[...] = 0.9 * self.seen[...] + 0.1 * x.mean(0)
        return self.head(nnx.relu(self.second(x)))


@pytest.mark.parametrize("kind", ["count", "average"])
@pytest.mark.slow
def test_variables_that_frozen_layers_change_are_held_so_activations_can_be_kept(kind):
    model = Norms(nnx.Rngs(0), kind)
    layers = sfj.nnx.find_layers(model, X)
    optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), layers=layers)
    optimizer.freeze(model, ["first", "second"])
    before = np.asarray(model.seen[...])

    def loss_fn(model, x):
        return model(x).mean()

    cache = NNXPrefixCache(model, optimizer.frozen, loss_fn, X)
    for _ in range(2):
        got = cache.loss(model, cache.activations(model, X), X)
        assert_close(got, optimizer.with_frozen(loss_fn)(model, X))
        np.testing.assert_array_equal(model.seen[...], before)


def test_a_batch_norm_told_to_train_is_refused():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.norm = nnx.Linear(6, 5, rngs=rngs), nnx.BatchNorm(5, rngs=rngs)
            self.second, self.head = nnx.Linear(5, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.second(self.norm(self.first(x), use_running_average=False)))

    model = Net(nnx.Rngs(0))
    frozen = sfj.Frozen(sfj.nnx.find_layers(model, X), frozenset({"first", "second"}))
    with pytest.raises(ValueError, match=r"BatchNorm of 'norm/mean' with use_running_average=False, .* model.eval\(\)"):
        NNXPrefixCache(model, frozen, lambda model, x: model(x).mean(), X)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm0")(nn.Dense(5, name="dense0")(x)))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm1")(nn.Dense(4, name="dense1")(x)))
        return nn.Dense(2, name="head")(x)


@pytest.mark.slow
def test_linen():
    net = LinenNet()
    init = jax.jit(net.init)({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)
    layers = sfj.linen.find_layers(net, init, X, train=False)

    def loss_fn(params, stats, x, y, key):
        variables = {"params": params, "batch_stats": stats}
        out, updates = net.apply(variables, x, mutable=["batch_stats"], rngs={"dropout": key})
        return jnp.square(out - y).mean(), updates["batch_stats"]

    state = sfj.linen.TrainState.create(apply_fn=net.apply, params=init["params"], tx=optax.sgd(0.1), layers=layers)
    state = state.freeze(["dense0"])
    inputs = (init["batch_stats"], X, Y, jax.random.key(2))
    cache = PrefixCache(state.params, state.frozen, loss_fn, *inputs, hold=sfj.linen.hold, state_inputs=[0])
    assert [value.shape for value in cache.frontier] == [(5,)]
    activations = cache.activations(state.params, *inputs)
    step = jax.jit(state.value_and_grad(cache.loss, has_aux=True))
    got = step(state.params, activations, inputs[0], None, *inputs[2:])
    assert_close(got, jax.jit(state.value_and_grad(loss_fn, has_aux=True))(state.params, *inputs))
    both = state.freeze(["dense1"]).frozen
    assert PrefixCache(state.params, both, loss_fn, *inputs, hold=sfj.linen.hold, state_inputs=[0]).needed
    with pytest.raises(ValueError, match=r"dense1.*evaluation mode"):  # without `hold` its input is dropped from
        PrefixCache(state.params, both, loss_fn, *inputs, state_inputs=[0])


@pytest.mark.slow
def test_the_model_must_stay_as_it_was():
    model = resnet()
    optimizer = optimizer_for(model, (IMAGES, LABELS), ("stages/1", "fc"))
    cache = NNXPrefixCache(model, optimizer.frozen, cross_entropy, IMAGES, LABELS)
    activations = cache.activations(model, IMAGES, LABELS)
    model.stages[0][0].bn1.epsilon = 0.5
    with pytest.raises(ValueError, match="make a new PrefixCache"):
        cache.loss(model, activations, IMAGES, LABELS)


@pytest.mark.slow
def test_growth_of_a_network():
    model = resnet()
    optimizer = optimizer_for(model, (IMAGES, LABELS), ("stages", "fc"))
    first = NNXPrefixCache(model, optimizer.frozen, cross_entropy, IMAGES, LABELS)
    second = first.follow(model, optimizer.frozen.add(RESNET_STEM))
    grown = second.grown_from(first)(model, first.activations(model, IMAGES, LABELS), None, LABELS)
    assert_close(grown, second.activations(model, IMAGES, LABELS))
    assert second.follow(model, second.frozen) is second
