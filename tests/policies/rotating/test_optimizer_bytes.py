"""Policies whose sets return: what the optimizer holds over a whole run, on the device, is what is predicted."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import smartfrz_jax as sfj

pytestmark = pytest.mark.usefixtures("jax_defaults")

BLOCKS, WIDTH, STEPS = 4, 6, 9
X = jnp.ones((2, WIDTH))
RNG = np.random.default_rng(0)
ROWS = jnp.asarray(RNG.standard_normal((BLOCKS, WIDTH, WIDTH)), jnp.float32)
ENDS = {name: jnp.asarray(RNG.standard_normal((WIDTH, 3 * WIDTH)), jnp.float32) for name in ("stem", "head")}
TX = optax.adam(0.1)


def stacked_loss(params, x):
    x, _ = jax.lax.scan(lambda x, row: (jnp.tanh(x @ row), None), x @ params["stem"][:, :WIDTH], params["blocks"])
    return jnp.square(x @ params["head"]).mean()


def loss(params, x):
    x = x @ params["stem"][:, :WIDTH]
    for i in range(BLOCKS):
        x = jnp.tanh(x @ params[f"block{i}"])
    return jnp.square(x @ params["head"]).mean()


NETWORKS = {
    "stacked": (stacked_loss, lambda: {**ENDS, "blocks": ROWS}),
    "unstacked": (loss, lambda: ENDS | {f"block{i}": row for i, row in enumerate(ROWS)}),
}
POLICIES = {
    "lisa": lambda: sfj.policies.lisa(1, switch_every=2),
    "badam": lambda: sfj.policies.badam(2, order="ascending"),
    "hift": lambda: sfj.policies.hift(2, switch_every=2),
    "slimfit": lambda: sfj.policies.slimfit(0.5, switch_every=2),
}


# Each policy with both networks, and with fresh and kept state.
CASES = [
    (policy, network, ("fresh", "kept")[(i + j) % 2])
    for i, policy in enumerate(POLICIES)
    for j, network in enumerate(NETWORKS)
]


def memory(arrays):
    """Bytes by their place in memory, which arrays share, without those of single numbers."""
    return {
        array.unsafe_buffer_pointer(): array.nbytes
        for array in arrays
        if np.ndim(array) and isinstance(array, jax.Array)
    }


def live_bytes(*others):
    """Of all that is on the device but for some."""
    gc.collect()
    places = set().union(*others)
    return sum(size for place, size in memory(jax.live_arrays()).items() if place not in places)


@pytest.fixture
def others_are_not_searched():
    """Collecting garbage after each step takes long where earlier tests have left many objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.usefixtures("others_are_not_searched")
@pytest.mark.parametrize(("policy", "network", "returning"), CASES)
def test_bytes_over_a_whole_run(policy, network, returning):
    there = jax.live_arrays()  # of other tests; held, so that nothing else comes in their place
    loss_fn, make = NETWORKS[network]
    params = jax.tree.map(jnp.copy, make())
    grads = jax.tree.map(jnp.ones_like, params)
    layers = sfj.find_layers(params, loss_fn, X, rows=True)
    sizes = {name: leaf.size for name, leaf in sfj.Frozen(layers).active_leaves(params).items()}
    account = sfj.account(params, layers, loss_fn, X, tx=TX)
    others = memory([*there, *jax.tree.leaves(grads)])
    state = sfj.linen.TrainState.create(apply_fn=None, params=params, tx=TX, layers=layers, returning=returning)
    del params
    freezer = sfj.Freezer(POLICIES[policy](), layers, state.params)
    frozen, measured, predicted, sets = freezer.start(), [], [], set()
    for _ in range(STEPS):
        old = state
        state = state.freeze(frozen)
        # Two moments of each active parameter in float32, and Adam's count.
        moments = 8 * sum(size for name, size in sizes.items() if layers.owner[name] not in frozen.names)
        assert freezer.summary(tx=TX, account=account).optimizer_bytes == moments + 4
        at_change = live_bytes(others, memory(jax.tree.leaves((state.params, freezer.policy_state))))
        assert at_change == sum(memory(jax.tree.leaves((old.opt_state, state.opt_state))).values())
        del old
        state = state.apply_gradients(grads=grads)
        measured.append(live_bytes(others, memory(jax.tree.leaves((state.params, freezer.policy_state)))))
        predicted.append(moments)
        sets.add(frozen.names)
        frozen = freezer.observe(lambda state=state: state.params)
    assert measured == predicted
    assert len(sets) > 2
    assert max(measured) < 0.8 * 8 * sum(sizes.values())
    kept = 0 if state.kept is None else sum(array.nbytes for array in state.kept.arrays.values())
    assert (kept > 0) == (returning == "kept")
