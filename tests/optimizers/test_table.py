"""Every optimizer of optax: frozen layers hold still, the others go on as the same optimizer does without them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

from smartfrz_jax import apply_updates, freeze, migrate_opt_state
from smartfrz_jax.freezing.migrate import dropped, unfrozen_opt_state
from smartfrz_jax.pytrees import checkpoint
from tests.optimizers.network import GRADS, LAYERS, NAMES, PARAMS, PER_EXAMPLE_GRADS, arrays, bits, frozen, loss
from tests.optimizers.table import CASES, EXCEPTIONS, Case, public_names

pytestmark = pytest.mark.usefixtures("jax_defaults")


def is_quick(name: str) -> bool:
    """The quick subset leaves out what is only a part of an optimizer, or contributed."""
    return not (CASES[name].compiled or name.startswith(("optax.scale_by_", "contrib.")))


parametrize = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if is_quick(name) else [pytest.mark.slow]) for name in CASES]
)

# From step 2 on layer b is frozen, from step 4 on it trains again.
FROZEN = [frozen(), frozen(), frozen("b"), frozen("b"), frozen(), frozen()]
HELD = slice(2, 4)


def test_every_public_optimizer_is_in_the_table_or_an_exception_with_a_reason():
    """A name that a new release of optax brings goes into the table, with arguments, and is checked by all of this."""
    assert public_names() == CASES.keys() | EXCEPTIONS.keys()


class Step(NamedTuple):
    updates: Any
    state: Any
    params: Any


def grads_of(case: Case, step: int, names) -> Any:
    """As ``value_and_grad`` gives them: zeros for frozen layers."""
    grads = (PER_EXAMPLE_GRADS if case.per_example else GRADS)[step]
    return {name: grads[name] if name in names else jax.tree.map(jnp.zeros_like, grads[name]) for name in grads}


def update_of(case: Case) -> Any:
    def update(tx, grads, state, params, others):
        return tx.update(grads, state, params, **case.extra(lambda params: loss(others | params), params))

    return jax.jit(update, static_argnums=0) if case.compiled else update


@functools.cache
def frozen_run(name: str) -> list[Step]:
    """Six steps by the library."""
    case, steps, update = CASES[name], [], update_of(CASES[name])
    params, state, before = PARAMS, freeze(CASES[name].tx, FROZEN[0]).init(PARAMS), FROZEN[0]
    for step, now in enumerate(FROZEN):
        if now != before:
            state = migrate_opt_state(state, case.tx, params, now)
        updates, state = update(freeze(case.tx, now), grads_of(case, step, now.active), state, params, {})
        params, before = apply_updates(params, updates, now), now
        steps.append(Step(updates, state, params))
    return steps


def filled(fresh: Any, old: Any) -> Any:
    """The fresh state with every value for which the old one has a place."""
    has = {keystr(path): leaf for path, leaf in tree_leaves_with_path(old)}
    return tree_map_with_path(lambda path, leaf: has.get(keystr(path), leaf), fresh)


@functools.cache
def stock_run(name: str) -> list[Step]:
    """The same by optax alone, on a dictionary of the layers that train; its state is cut and filled up by hand."""
    case, steps, update = CASES[name], [], update_of(CASES[name])
    params, state = PARAMS, CASES[name].tx.init(PARAMS)
    for step, now in enumerate(FROZEN):
        some = {layer: params[layer] for layer in now.active}
        state = filled(case.tx.init(some), state)
        grads = grads_of(case, step, now.active)
        others = {layer: params[layer] for layer in now.names}
        updates, state = update(case.tx, {layer: grads[layer] for layer in some}, state, some, others)
        params = params | optax.apply_updates(some, updates)
        steps.append(Step(updates, state, params))
    return steps


@parametrize
@pytest.mark.slow
def test_every_number_is_that_of_the_optimizer_of_the_active_layers_alone(name):
    case = CASES[name]
    for got, expected, now in zip(frozen_run(name), stock_run(name), FROZEN, strict=True):
        for layer in NAMES:
            if layer in now.names:
                assert not any(np.any(leaf) for leaf in jax.tree.leaves(got.updates[layer]))
            else:
                assert arrays(got.updates[layer]) == arrays(expected.updates[layer])
        assert arrays(got.params) == arrays(expected.params)
        own = unfrozen_opt_state(got.state, case.tx, got.params, LAYERS)
        state = arrays(expected.state)
        assert {path: leaf for path, leaf in arrays(own).items() if path in state} == state
        assert len(jax.tree.leaves(got.state)) - len(state) in (0, 2 * len(now.active))  # MultiSteps: what was missed


# Their step is made of all parameters at once: of a norm or a distance, of noise drawn for all, of a search along them.
OF_ALL = {
    "optax.add_noise",
    "optax.lbfgs",
    "optax.noisy_sgd",
    "optax.scale_by_lbfgs",
    "contrib.differentially_private_aggregate",
    "contrib.dog",
    "contrib.dowg",
    "contrib.dpsgd",
    "contrib.hutchinson_estimator_diag_hessian",
    "contrib.momo",
    "contrib.sam",
}


@parametrize
@pytest.mark.slow
def test_active_layers_go_on_as_if_nothing_had_frozen(name):
    """The optimizer that never freezes, fed the same gradients, moves layers a and c by the same bits."""
    case, update = CASES[name], update_of(CASES[name])
    _, state, params = stock_run(name)[HELD.start - 1]
    same = []
    for step in range(HELD.start, HELD.stop):
        updates, state = update(case.tx, grads_of(case, step, FROZEN[step].active), state, params, {})
        params, got = optax.apply_updates(params, updates), frozen_run(name)[step].params
        same.append(all(arrays(params[layer]) == arrays(got[layer]) for layer in "ac"))
    assert all(same) == (name not in OF_ALL)


@parametrize
def test_what_is_kept_of_a_layer_comes_back_bit_for_bit(name):
    case, (before, held) = CASES[name], (frozen_run(name)[step - 1] for step in (HELD.start, HELD.stop))
    aside = dropped(before.state, case.tx, before.params, frozen("b"))
    back = arrays(migrate_opt_state(held.state, case.tx, held.params, frozen(), kept=aside))
    assert {path: leaf for path, leaf in back.items() if path in aside} == {
        path: bits(leaf) for path, leaf in aside.items()
    }
    went_on = arrays(held.state)
    assert {path: leaf for path, leaf in back.items() if path in went_on} == went_on
    started = {path for path in back if path not in aside and path not in went_on}
    assert all(".acc_grads" in path or ".missed" in path or ".grad_acc" in path for path in started)


@pytest.mark.slow
def test_the_state_of_every_optimizer_comes_back_from_a_checkpoint(tmp_path):
    """One checkpoint of all of them, with layer b frozen."""
    states = {name: frozen_run(name)[HELD.stop - 1].state for name in CASES}
    checkpoint.write(tmp_path / "state", states, "optimizers", {})
    restored = checkpoint.read(tmp_path / "state", states, "optimizers")
    assert jax.tree.structure(restored) == jax.tree.structure(states)
    assert arrays(restored) == arrays(states)
