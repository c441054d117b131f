"""Whatever a loss may do with its arguments under ``nnx.value_and_grad``, it may do under the optimizer's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj

pytestmark = [
    pytest.mark.usefixtures("jax_defaults"),
    pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning"),
]

X = jax.random.normal(jax.random.key(0), (4, 4))
TX = optax.sgd(0.1, momentum=0.9)


class Net(nnx.Module):
    """With a BatchNorm and, if the loss has streams for it, a dropout."""

    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.first, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.drop, self.second = nnx.Dropout(0.5), nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x, rngs=None):
        x = nnx.relu(self.norm(self.first(x)))
        self.sow(nnx.Intermediate, "features", x)
        return self.second(x if rngs is None else self.drop(x, rngs=rngs))


def with_streams(model, x, rngs):
    return jnp.square(model(x, rngs)).mean()


def adversarial(generator, critic, x):
    """As a generator is trained: the statistics of the critic change too."""
    return -critic(generator(x)).mean() + jnp.square(generator(x)).mean()


def with_popped(model, x):
    out = model(x)
    return jnp.square(out).mean(), nnx.pop(model, nnx.Intermediate)


def by_keyword(model, *, x, rngs):
    return with_streams(model, x, rngs)


def with_new(model, x):
    """Makes a variable, as a cache is."""
    model.seen = nnx.Cache(x.mean(0))
    return jnp.square(model(x)).mean()


# Loss, the arguments besides the networks, options; the networks are the first arguments, as many as it says.
BIAS, WIDER = nnx.PathContains("bias"), nnx.Any(nnx.Param, nnx.BatchStat)
CASES = {
    "random streams": (with_streams, 1, lambda: (X, nnx.Rngs(1)), {}),
    "a second network": (adversarial, 2, lambda: (X,), {}),
    "the second network": (adversarial, 2, lambda: (X,), {"argnums": 1}),
    "both networks": (adversarial, 2, lambda: (X,), {"argnums": (0, 1)}),
    "a network and an array": (with_streams, 1, lambda: (X, nnx.Rngs(1)), {"argnums": (0, 1)}),
    "a filter": (with_streams, 1, lambda: (X, nnx.Rngs(1)), {"argnums": nnx.DiffState(0, WIDER)}),
    "filters": (adversarial, 2, lambda: (X,), {"argnums": (nnx.DiffState(0, nnx.Param), nnx.DiffState(1, BIAS))}),
    "popped": (with_popped, 1, lambda: (X,), {"has_aux": True}),
    "a new variable": (with_new, 1, lambda: (X,), {}),
    "a partial function": (functools.partial(with_popped), 1, lambda: (X,), {"has_aux": True}),
}


def leaves(*trees):
    return [
        np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
        for leaf in jax.tree.leaves([nnx.as_pure(tree) for tree in trees])
    ]


def run(case, value_and_grad, make_optimizer, transform=lambda step: step):
    """What two steps return, and all that they change."""
    loss_fn, n_networks, make_arguments, options = CASES[case]
    networks, arguments = [Net(seed) for seed in range(n_networks)], make_arguments()
    argnums = options.get("argnums", 0)
    first = argnums[0] if isinstance(argnums, tuple) else argnums
    place = first.argnum if isinstance(first, nnx.DiffState) else first
    optimizer = make_optimizer(networks[place])

    def step(optimizer, networks, arguments):
        value, grads = value_and_grad(optimizer)(loss_fn, **options)(*networks, *arguments)
        optimizer.update(networks[place], grads[0] if isinstance(argnums, tuple) else grads)
        return value, grads

    step = transform(step)
    found = [step(optimizer, networks, arguments) for _ in range(2)]
    modules = [each for each in (*networks, *arguments) if isinstance(each, nnx.Module | nnx.Rngs)]
    return found, [optimizer.step[...], *map(nnx.state, modules)]


def ours(model):
    layers = sfj.nnx.find_layers(model, X)
    nnx.pop(model, nnx.Intermediate)
    return sfj.nnx.Optimizer(model, TX, layers=layers)


def stock(model):
    return nnx.Optimizer(model, TX, wrt=nnx.Param)


def assert_same(case, transform=lambda step: step):
    actual = run(case, lambda optimizer: optimizer.value_and_grad, ours, transform)
    expected = run(case, lambda _: nnx.value_and_grad, stock, transform)
    assert jax.tree.structure(nnx.as_pure(actual)) == jax.tree.structure(nnx.as_pure(expected))
    for mine, theirs in zip(leaves(*actual), leaves(*expected), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_the_loss_may_change_its_arguments(case):
    assert_same(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["random streams", "a second network", "popped"])
def test_the_loss_may_change_its_arguments_in_a_compiled_step(case):
    assert_same(case, nnx.jit)


def test_arguments_may_be_given_by_keyword():
    """By position, as far as the stock function takes them; by keyword alone, which it does not."""
    found = []
    for loss_fn in (with_streams, by_keyword):
        model, rngs = Net(0), nnx.Rngs(1)
        value, grads = ours(model).value_and_grad(loss_fn)(model=model, rngs=rngs, x=X)
        found.append(leaves(value, grads, nnx.state(model), nnx.state(rngs)))
    model, rngs = Net(0), nnx.Rngs(1)
    value, grads = nnx.value_and_grad(with_streams)(model, X, rngs)
    found.append(leaves(value, grads, nnx.state(model), nnx.state(rngs)))
    for each in zip(*found, strict=True):
        np.testing.assert_array_equal(each[0], each[2])
        np.testing.assert_array_equal(each[1], each[2])


def plain(model, x):
    out = model(x)
    nnx.pop(model, nnx.Intermediate)
    return jnp.square(out).mean()


def scanned(optimizer, model):
    """Two steps in a scan."""

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def steps(carry, x):
        model, optimizer = carry
        value, grads = differentiate(optimizer)(plain)(model, x)
        optimizer.update(model, grads)
        return carry, value

    return steps((model, optimizer), jnp.stack([X, 2 * X]))[1]


def differentiate(optimizer):
    return optimizer.value_and_grad if isinstance(optimizer, sfj.nnx.Optimizer) else nnx.value_and_grad


@pytest.mark.slow
def test_steps_may_be_scanned():
    found = []
    for make in (ours, stock):
        model = Net(0)
        optimizer = make(model)
        found.append(leaves(nnx.jit(scanned)(optimizer, model), nnx.state(model), nnx.state(optimizer)))
    for mine, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [(), ("first",)])
def test_a_step_may_be_vmapped_over_several_networks(frozen):
    """Each of them trains as it does alone, and frozen layers hold still."""
    layers = ours(Net(0)).frozen.layers

    def make(key):
        model = Net(key)
        optimizer = sfj.nnx.Optimizer(model, TX, layers=layers)
        optimizer.freeze(model, frozen)
        return model, optimizer

    def step(model, optimizer):
        value, grads = optimizer.value_and_grad(plain)(model, X)
        optimizer.update(model, grads)
        return value

    keys = jax.random.split(jax.random.key(3), 2)
    models, optimizers = nnx.vmap(make)(keys)
    nnx.vmap(step)(models, optimizers)
    actual = nnx.state(models)
    for i, key in enumerate(keys):
        model, optimizer = make(key)
        before = leaves(nnx.state(model.first))
        step(model, optimizer)
        for mine, alone in zip(leaves(actual), leaves(nnx.state(model)), strict=True):
            np.testing.assert_allclose(mine[i], alone, rtol=1e-6, atol=1e-7)
        for old, new in zip(before, leaves(nnx.state(model.first)), strict=True):
            assert np.array_equal(old, new) == bool(frozen)
