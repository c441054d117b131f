"""Two networks with an optimizer each in one step: a generator and a discriminator, or two critics alike."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj

pytestmark = pytest.mark.usefixtures("jax_defaults")
X = jax.random.normal(jax.random.key(1), (8, 4))
TX = optax.adam(1e-2)


class Net(nnx.Module):
    def __init__(self, width, seed, depth=2):
        widths = (4, *[width] * (depth - 1), 4)
        self.layers = nnx.List([nnx.Linear(*widths[i : i + 2], rngs=nnx.Rngs(seed + i)) for i in range(depth)])
        self.out = nnx.Linear(4, 4, rngs=nnx.Rngs(seed + depth))

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.tanh(layer(x))
        return self.out(x)


def setting(width, seed, depth=2):
    net = Net(width, seed, depth)
    return net, sfj.nnx.Optimizer(net, TX, layers=sfj.nnx.find_layers(net, X))


def gan_step(nets, optimizers, x):
    (generator, g_optimizer), (discriminator, d_optimizer) = zip(nets, optimizers, strict=True)
    fake = generator(x)

    def d_loss_fn(discriminator):
        return ((discriminator(x) - 1) ** 2).mean() + (discriminator(jax.lax.stop_gradient(fake)) ** 2).mean()

    def g_loss_fn(generator):
        return ((discriminator(generator(x)) - 1) ** 2).mean()

    d_loss, grads = d_optimizer.value_and_grad(d_loss_fn)(discriminator)
    d_optimizer.update(discriminator, grads)
    g_loss, grads = g_optimizer.value_and_grad(g_loss_fn)(generator)
    g_optimizer.update(generator, grads)
    return g_loss, d_loss


def decided(at):
    """Freezes so many layers from the steps on that it is told."""

    def update(state, layers, *, step, **signals):
        return frozenset(layers.names[: max([n for since, n in at.items() if step >= since], default=0)]), state

    return sfj.Policy(lambda layers, params: (), update, "decided")


def run(widths, schedules, lead, steps=9, ahead=True):
    """Frozen layers of each network at every step, the programs, and the parameters at the end."""
    nets, optimizers = zip(*(setting(width, seed) for width, seed in zip(widths, (0, 9), strict=True)), strict=True)
    step = sfj.TrainStep(gan_step)
    freezers = [
        sfj.nnx.Freezer(net, optimizer, decided(schedule), train_step=step if ahead else None, lead=lead)
        for net, optimizer, schedule in zip(nets, optimizers, schedules, strict=True)
        if schedule is not None
    ]
    seen = []
    for _ in range(steps):
        step(list(nets), list(optimizers), X)
        assert step.last is not None
        assert step.last.frozen_sets == tuple(optimizer.frozen for optimizer in optimizers)
        assert step.last.frozen == optimizers[0].frozen
        seen.append(tuple(len(optimizer.frozen.names) for optimizer in optimizers))
        for freezer in freezers:
            freezer.step()
    return seen, step.programs, [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(list(nets)))]


CASES = {
    "generator": ({2: 1, 5: 2}, None, [False, True, True]),
    "discriminator": (None, {2: 1, 5: 2}, [False, True, True]),
    "in turn": ({2: 1}, {5: 1}, [False, True, True]),
    "one before the other has changed": ({2: 1}, {3: 1}, [False, True, True]),
    "both at once": ({2: 1}, {2: 2}, [False, True]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second", "ahead"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("widths", [(5, 6), (5, 5)], ids=["unlike", "alike"])
def test_the_right_one_is_compiled_ahead(widths, first, second, ahead):
    seen, programs, params = run(widths, (first, second), 2)
    assert [program.ahead for program in programs] == ahead
    assert [tuple(len(one.names) for one in program.frozen_sets) for program in programs] == list(dict.fromkeys(seen))
    again, _, expected = run(widths, (first, second), 2, ahead=False)
    assert again == seen
    for ours, theirs in zip(params, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_trained_apart_with_one_step():
    """Two trainings that take turns: what the last call was for is not what is prepared."""
    step = sfj.TrainStep(
        lambda net, optimizer, x: optimizer.update(
            net, optimizer.value_and_grad(lambda net: (net(x) ** 2).mean())(net)[1]
        )
    )
    settings = [setting(5, seed) for seed in (0, 9)]
    freezers = [
        sfj.nnx.Freezer(*one, decided({2: n}), train_step=step, lead=2) for n, one in enumerate(settings, start=1)
    ]
    for _ in range(6):
        for one, freezer in zip(settings, freezers, strict=True):
            step(*one, X)
            freezer.step()
    assert [program.ahead for program in step.programs] == [False, True, True]


def linen_state(seed, width):
    params = {
        name: jax.random.normal(jax.random.key(seed + n), shape) for n, (name, shape) in enumerate(
            {"a": (4, width), "b": (width, 4), "c": (4, 4)}.items()
        )
    }  # fmt: skip
    layers = sfj.find_layers(params, forward, X)
    return sfj.linen.TrainState.create(apply_fn=forward, params=params, tx=TX, layers=layers)


def forward(params, x):
    for name in "abc":
        x = jnp.tanh(x @ params[name])
    return x


def linen_step(states, x):
    losses = []
    for name, state in states.items():
        loss, grads = state.value_and_grad(lambda params: (forward(params, x) ** 2).mean())(state.params)
        states, losses = states | {name: state.apply_gradients(grads=grads)}, [*losses, loss]
    return states, losses


@pytest.mark.slow
@pytest.mark.parametrize("width", [5, 6], ids=["alike", "unlike"])
@pytest.mark.parametrize("donate", [False, True])
def test_train_states_too(donate, width):
    step = sfj.TrainStep(linen_step, donate=donate)
    states = {"d": linen_state(0, 5), "g": linen_state(9, width)}
    freezer = sfj.linen.Freezer(states["g"], decided({2: 1, 5: 2}), train_step=step, lead=2)
    plain = {"d": linen_state(0, 5), "g": linen_state(9, width)}
    reference = jax.jit(linen_step)
    for _ in range(9):
        plain = plain | {"g": plain["g"].freeze(states["g"].frozen)}
        plain, expected = reference(plain, X)
        states, losses = step(states, X)
        np.testing.assert_array_equal(losses, expected)
        states["g"] = freezer.step(states["g"])
    assert [program.ahead for program in step.programs] == [False, True, True]
    assert [len(program.frozen_sets[1].names) for program in step.programs] == [0, 1, 2]
    assert {len(program.frozen.names) for program in step.programs} == {0}


@pytest.mark.slow
def test_an_owner_of_another_step_is_an_error():
    nets, optimizers = zip(setting(5, 0), setting(6, 9), strict=True)
    step = sfj.TrainStep(gan_step)
    step(nets, optimizers, X)
    stranger = setting(5, 3)[1]
    with pytest.raises(ValueError, match="owner: got Optimizer that is none of the 2 in the last call"):
        step.prepare(stranger, stranger)


def wasteful_step(nets, optimizers, x):
    """A norm over all gradients of the second network brings their cost back."""
    loss, grads = nnx.value_and_grad(d_loss_fn)(nets[1], x)
    optimizers[1].update(nets[1], grads)
    return loss, optax.tree.norm(grads), gan_step(nets[:1] * 2, optimizers[:1] * 2, x)


def d_loss_fn(net, x):
    return ((net(x) - 1) ** 2).mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train_step", "depth", "warns"),
    [(gan_step, 3, False), (gan_step, 2, False), (wasteful_step, 3, True)],
    ids=["as it should be", "which network is not known", "without value_and_grad"],
)
def test_the_account_of_one_network_is_that_of_its_layers(recwarn, train_step, depth, warns):
    nets, optimizers = zip(setting(5, 0), setting(6, 9, depth), strict=True)
    layers = optimizers[1].frozen.layers
    step = sfj.TrainStep(train_step, account=sfj.nnx.account(nets[1], layers, d_loss_fn, X, tx=TX))
    step(nets, optimizers, X)
    optimizers[1].freeze(nets[1], layers.names[:2])
    step(nets, optimizers, X)
    optimizers[0].freeze(nets[0], optimizers[0].frozen.layers.names[:2])
    step(nets, optimizers, X)
    found = [str(one.message) for one in recwarn if one.category is sfj.SavingWarning]
    assert len(found) == warns
    assert all("layers/0" in text for text in found)
