"""What an optimizer holds of stacked parameters: of the rows that train alone, and moved exactly when these change."""

import functools

import jax
import numpy as np
import optax
import pytest

import smartfrz_jax as sfj
from smartfrz_jax.freezing.migrate import dropped, held, unfrozen_opt_state
from smartfrz_jax.pytrees import checkpoint
from tests.freezing.stacked.networks import BLOCKS, DEPTH, LAYERS, PARAMS, UNROLLED, X, like_params, loss, rows
from tests.optimizers.network import arrays, bits
from tests.optimizers.table import CASES

pytestmark = pytest.mark.usefixtures("jax_defaults")

GRADS = [like_params() for _ in range(6)]
# Some rows freeze, then others do while these return, then all train again.
NAMES = [(), ("stem", *BLOCKS[:2]), ("stem", *BLOCKS[:2]), BLOCKS[1:4], BLOCKS, ()]
# Each number of theirs depends on numbers of the same place alone.
ELEMENTWISE = {
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "MultiSteps": optax.MultiSteps(optax.sgd(0.1, momentum=0.9), every_k_schedule=3),
    "masked": optax.lion(0.1, mask=lambda tree: jax.tree.map(lambda leaf: leaf.shape[-1] > 3, tree)),
}
# Those with loops, whose state has other shapes than the parameters, or whose update takes more than gradients.
OTHERS = ("optax.lbfgs", "contrib.muon")


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, True], ids=["fresh", "kept"])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_rows_move_by_the_bits_by_which_layers_of_their_own_do(name, kept):
    tx = ELEMENTWISE[name]

    def run(params, layers, of_tree):
        state, aside = sfj.freeze(tx, sfj.Frozen(layers)).init(params), {}
        for step, names in enumerate(NAMES):
            frozen = sfj.Frozen(layers, names)
            now = aside | dropped(state, tx, params, frozen)
            state = sfj.migrate_opt_state(state, tx, params, frozen, kept=now if kept else None)
            aside = {path: leaf for path, leaf in now.items() if path not in held(state, tx, params, frozen)}
            updates, state = sfj.freeze(tx, frozen).update(of_tree(GRADS[step]), state, params)
            params = sfj.apply_updates(params, updates, frozen)
        return params

    assert arrays(rows(run(PARAMS, LAYERS, lambda tree: tree))) == arrays(run(rows(PARAMS), UNROLLED, rows))


def test_state_is_of_the_rows_that_train():
    tx, frozen = optax.adam(0.1), sfj.Frozen(LAYERS, ("stem", *BLOCKS[:3]))
    state = jax.eval_shape(sfj.freeze(tx, frozen).init, PARAMS)
    adam = state.inner_states["train"].inner_state[0]
    assert adam.mu["up"].shape == (DEPTH - 3, *PARAMS["up"].shape[1:])
    assert adam.nu["bias"].shape == (DEPTH - 3, *PARAMS["bias"].shape[1:])
    nothing = jax.eval_shape(sfj.freeze(tx, sfj.Frozen(LAYERS)).init, PARAMS)
    assert nothing.inner_states["train"].inner_state == jax.eval_shape(tx.init, PARAMS)


@functools.cache
def moved(name):
    """Three states of an optimizer: with all rows training, with some, and with all again."""
    case, states = CASES[name], []
    params, state = PARAMS, sfj.freeze(CASES[name].tx, sfj.Frozen(LAYERS)).init(PARAMS)
    for step, names in enumerate([(), BLOCKS[::2], ()]):
        frozen = sfj.Frozen(LAYERS, names)
        state = sfj.migrate_opt_state(state, case.tx, params, frozen)
        tx, extra = sfj.freeze(case.tx, frozen), case.extra(lambda params: loss(params, X), params)
        grads = GRADS[step]
        update = jax.jit(lambda *args, tx=tx, extra=extra: tx.update(*args, **extra)) if case.compiled else tx.update
        updates, state = update(grads, state, params, **({} if case.compiled else extra))
        params = sfj.apply_updates(params, updates, frozen)
        states.append((updates, state, params))
    return states


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_optimizers_of_other_kinds_leave_frozen_rows_and_go_on_with_the_others(name):
    (_, before, old), (updates, state, params), _ = moved(name)
    frozen = sfj.Frozen(LAYERS, BLOCKS[::2])
    for row, array in rows(params).items():
        if row in frozen.params:
            assert bits(array) == bits(rows(old)[row])
            assert not np.any(rows(updates)[row])
    back = sfj.migrate_opt_state(state, CASES[name].tx, params, sfj.Frozen(LAYERS))
    assert jax.tree.structure(back) == jax.tree.structure(before)
    assert jax.tree.map(np.shape, back) == jax.tree.map(np.shape, before)


def test_unfrozen_state_has_all_rows():
    tx, frozen = optax.adam(0.1), sfj.Frozen(LAYERS, BLOCKS[:2])
    state = sfj.freeze(tx, frozen).init(PARAMS)
    _, state = sfj.freeze(tx, frozen).update(GRADS[0], state, PARAMS)
    own = unfrozen_opt_state(state, tx, PARAMS, LAYERS)
    assert jax.tree.structure(own) == jax.tree.structure(tx.init(PARAMS))
    assert not np.any(own[0].mu["up"][:2])
    assert np.all(own[0].mu["up"][2:])


def test_a_state_that_is_of_other_rows_than_it_says_is_refused():
    tx, frozen = optax.adam(0.1), sfj.Frozen(LAYERS, BLOCKS[:2])
    state = sfj.freeze(tx, frozen).init(PARAMS)
    wrong = jax.tree.map(lambda leaf: leaf[:1] if np.ndim(leaf) else leaf, state)
    with pytest.raises(ValueError, match="opt_state"):
        sfj.migrate_opt_state(wrong, tx, PARAMS, sfj.Frozen(LAYERS, BLOCKS[:3]))


def test_a_state_comes_back_from_a_checkpoint(tmp_path):
    tx, frozen = optax.adam(0.1), sfj.Frozen(LAYERS, BLOCKS[:2])
    state = sfj.freeze(tx, frozen).update(GRADS[0], sfj.freeze(tx, frozen).init(PARAMS), PARAMS)[1]
    checkpoint.write(tmp_path / "state", state, "optimizer", {})
    restored = checkpoint.read(tmp_path / "state", sfj.freeze(tx, frozen).init(PARAMS), "optimizer")
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert arrays(restored) == arrays(state)
