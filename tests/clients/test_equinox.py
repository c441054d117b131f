"""Equinox as client. Its modules are pytrees, so a loop over them is one over bare pytrees::

    params, static = eqx.partition(model, eqx.is_inexact_array)
    layers = sfj.find_layers(params, lambda params, x: jax.vmap(eqx.combine(params, static))(x), x)
    frozen = sfj.Frozen(layers)
    opt_state = sfj.freeze(tx, frozen).init(params)

    @eqx.filter_jit
    def train_step(model, opt_state, frozen, x, y):
        params, static = eqx.partition(model, eqx.is_inexact_array)

        def loss_of(params):
            return loss_fn(eqx.combine(params, static), x, y)

        loss, grads = sfj.value_and_grad(loss_of, frozen)(params)
        updates, opt_state = sfj.freeze(tx, frozen).update(grads, opt_state, params)
        params = sfj.apply_updates(params, updates, frozen)
        return eqx.combine(params, static), opt_state, loss

A change of the frozen set, a policy's as well as one by hand, takes two lines::

    frozen = frozen.add(["layers/0"])
    opt_state = sfj.migrate_opt_state(opt_state, tx, eqx.filter(model, eqx.is_inexact_array), frozen)
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import smartfrz_jax as sfj
from smartfrz_jax.pytrees import paths

eqx = pytest.importorskip("equinox", reason="needs equinox, which `make test` installs")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("jax_defaults")]

TX = optax.adamw(1e-2)
KEYS = jax.random.split(jax.random.key(0), 8)


class ConvNet(eqx.Module):
    """Convolutions, a normalisation, and a linear map whose place in the fields is not that of its use."""

    head: eqx.nn.Linear
    convs: list
    norm: eqx.nn.GroupNorm
    pool: eqx.nn.AdaptiveAvgPool2d

    def __init__(self, keys):
        self.convs = [eqx.nn.Conv2d(1, 4, 3, key=keys[0]), eqx.nn.Conv2d(4, 4, 3, stride=2, key=keys[1])]
        self.norm = eqx.nn.GroupNorm(2, 4)
        self.pool = eqx.nn.AdaptiveAvgPool2d(2)
        self.head = eqx.nn.Linear(16, 3, key=keys[2])

    def __call__(self, x):
        x = jax.nn.relu(self.norm(self.convs[0](x)))
        return self.head(self.pool(jax.nn.relu(self.convs[1](x))).reshape(-1))


NETWORKS = {
    "mlp": (
        lambda: eqx.nn.MLP(6, 3, 8, 2, activation=jax.nn.gelu, key=KEYS[3]),
        jax.random.normal(KEYS[4], (8, 6)),
        ("layers/0", "layers/1", "layers/2"),
    ),
    "conv": (
        lambda: ConvNet(KEYS),
        jax.random.normal(KEYS[5], (8, 1, 8, 8)),
        ("convs/0", "convs/1", "head"),
    ),
}
Y = jax.random.normal(KEYS[6], (8, 3))


def loss_fn(model, x, y):
    return jnp.square(jax.vmap(model)(x) - y).mean()


@eqx.filter_jit
def stock_step(model, opt_state, x, y):
    loss, grads = eqx.filter_value_and_grad(loss_fn)(model, x, y)
    updates, opt_state = TX.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), opt_state, loss


@eqx.filter_jit
def stock_step_of_a_part(diff, rest, opt_state, x, y):
    """As Equinox freezes: what does not train is in the other part."""

    def loss_of(diff):
        return loss_fn(eqx.combine(diff, rest), x, y)

    loss, grads = eqx.filter_value_and_grad(loss_of)(diff)
    updates, opt_state = TX.update(grads, opt_state, diff)
    return eqx.apply_updates(diff, updates), opt_state, loss


@eqx.filter_jit
def train_step(model, opt_state, frozen, x, y):
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_of(params):
        return loss_fn(eqx.combine(params, static), x, y)

    loss, grads = sfj.value_and_grad(loss_of, frozen)(params)
    updates, opt_state = sfj.freeze(TX, frozen).update(grads, opt_state, params)
    params = sfj.apply_updates(params, updates, frozen)
    return eqx.combine(params, static), opt_state, loss


def arrays(model):
    return {name: np.asarray(leaf) for name, leaf in paths.flatten(eqx.filter(model, eqx.is_inexact_array)).items()}


def start(network):
    """The network, a batch, the state of a plain loop, and the frozen set and state of one that freezes."""
    make, x, names = NETWORKS[network]
    model = make()
    params, static = eqx.partition(model, eqx.is_inexact_array)
    layers = sfj.find_layers(params, lambda params, x: jax.vmap(eqx.combine(params, static))(x), x)
    assert layers.names == names
    frozen = sfj.Frozen(layers)
    return model, x, TX.init(params), frozen, sfj.freeze(TX, frozen).init(params)


@pytest.mark.parametrize("network", NETWORKS)
def test_runs_as_without_a_frozen_set_and_freezes(network):
    stock, x, stock_state, frozen, opt_state = start(network)
    model = stock
    for _ in range(3):
        stock, stock_state, expected = stock_step(stock, stock_state, x, Y)
        model, opt_state, loss = train_step(model, opt_state, frozen, x, Y)
        np.testing.assert_array_equal(loss, expected)
    before = arrays(model)
    for name, leaf in arrays(stock).items():
        np.testing.assert_array_equal(before[name], leaf, err_msg=name)

    unfrozen = sfj.program_cost(train_step, model, opt_state, frozen, x, Y)
    params = eqx.filter(model, eqx.is_inexact_array)
    frozen = frozen.add(frozen.layers.names[:1])
    opt_state = sfj.migrate_opt_state(opt_state, TX, params, frozen)
    trains = eqx.combine(
        paths.tree_map(lambda name, _: name not in frozen.params, params), jax.tree.map(lambda _: False, model)
    )
    diff, rest = eqx.partition(model, trains)
    mu, nu = (eqx.filter(moments, trains) for moments in (stock_state[0].mu, stock_state[0].nu))
    part_state = (stock_state[0]._replace(mu=mu, nu=nu), *stock_state[1:])
    for _ in range(2):
        diff, part_state, expected = stock_step_of_a_part(diff, rest, part_state, x, Y)
        model, opt_state, loss = train_step(model, opt_state, frozen, x, Y)
    after, by_hand = arrays(model), arrays(eqx.combine(diff, rest))
    for name, leaf in after.items():
        assert np.array_equal(leaf, before[name]) == (name in frozen.params), name
        np.testing.assert_array_equal(leaf, by_hand[name], err_msg=name)
    np.testing.assert_array_equal(loss, expected)
    assert sfj.program_cost(train_step, model, opt_state, frozen, x, Y).flops < unfrozen.flops


def test_a_policy_freezes_and_the_run_is_restored(tmp_path):
    def run(steps, restored=None):
        model, x, _, frozen, opt_state = start("mlp")
        params = eqx.filter(model, eqx.is_inexact_array)
        freezer = sfj.Freezer(sfj.static_prefix([(0.5, 0.4)], total_steps=4), frozen.layers, params)
        if restored is not None:
            frozen = freezer.saved_frozen(restored)
            opt_state = sfj.migrate_opt_state(opt_state, TX, params, frozen)
            params, opt_state = freezer.restore_run(restored, (params, opt_state))
            model = eqx.combine(params, model)
        for _ in range(steps):
            model, opt_state, _ = train_step(model, opt_state, frozen, x, Y)
            params = eqx.filter(model, eqx.is_inexact_array)
            new = freezer.observe(lambda params=params: params)
            if new != frozen:
                frozen, opt_state = new, sfj.migrate_opt_state(opt_state, TX, params, new)
        return model, freezer, (params, opt_state)

    whole, freezer, _ = run(4)
    assert freezer.frozen.names == {"layers/0"}
    _, half, carry = run(3)
    half.save_run(tmp_path / "run", carry)
    again, _, _ = run(1, tmp_path / "run")
    for name, leaf in arrays(whole).items():
        np.testing.assert_array_equal(arrays(again)[name], leaf, err_msg=name)
