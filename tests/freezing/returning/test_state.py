"""The optimizer state of layers that train again: fresh or as it was; all other state goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import keystr, tree_leaves_with_path

from smartfrz_jax import Frozen, migrate_opt_state
from smartfrz_jax.freezing import migrate as migration
from smartfrz_jax.freezing import transform
from tests.freezing.mlp import LAYERS, NAMES, PARAMS
from tests.freezing.returning.networks import GRADS, OPTIMIZERS, make, make_nnx

pytestmark = pytest.mark.usefixtures("jax_defaults")
SLOW = {"MultiSteps"}
parametrize_optimizers = pytest.mark.parametrize(
    "tx",
    [pytest.param(tx, id=name, marks=[pytest.mark.slow] if name in SLOW else []) for name, tx in OPTIMIZERS.items()],
)


def advance(state, grads):
    for grad in grads:
        state = state.apply_gradients(grads=grad)
    return state


def frozen(names) -> Frozen:
    return Frozen(LAYERS, frozenset(names))


def leaves_of(state, names) -> dict[str, bytes]:
    """The optimizer's leaves that belong to some layers."""
    return {
        keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in tree_leaves_with_path(state.opt_state)
        if any(f"['{name}']" in keystr(path) for name in names)
    }


def shared_leaves(state) -> dict[str, bytes]:
    every = {keystr(path): np.asarray(leaf).tobytes() for path, leaf in tree_leaves_with_path(state.opt_state)}
    return {path: leaf for path, leaf in every.items() if path not in leaves_of(state, NAMES)}


@pytest.mark.parametrize("returning", ["fresh", "kept"])
@parametrize_optimizers
@pytest.mark.slow
def test_state_of_returning_layers_is_fresh_or_what_it_was_and_all_other_state_goes_on(tx, returning):
    before = advance(make(tx, returning), GRADS[:3])
    held = advance(before.freeze("b"), GRADS[3:6])
    after = held.freeze(frozen(()))
    fresh = make(tx).replace(opt_state=transform.freeze(tx, frozen(())).init(held.params))
    kept = leaves_of(before, "b") | {p: leaf for p, leaf in leaves_of(fresh, "b").items() if ".acc_grads" in p}
    assert leaves_of(after, "b") == (leaves_of(fresh, "b") if returning == "fresh" else kept)
    assert leaves_of(after, "b")
    assert leaves_of(before, "b") != leaves_of(fresh, "b")
    assert leaves_of(after, "acd") == leaves_of(held, "acd")
    assert leaves_of(held, "acd") != leaves_of(before, "acd")
    assert shared_leaves(after) == shared_leaves(held)
    assert jax.tree.structure(after.opt_state) == jax.tree.structure(before.opt_state)
    last = advance(after, GRADS[6:8])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(last.params))
    assert not np.array_equal(last.params["b"]["kernel"], held.params["b"]["kernel"])


@pytest.mark.parametrize("tx", [OPTIMIZERS["momentum"], optax.adamw(0.1, weight_decay=0.1)], ids=["momentum", "adamw"])
@settings(max_examples=10, deadline=None)
@given(sets=st.lists(st.sets(st.sampled_from(NAMES)), max_size=6))
@pytest.mark.slow
def test_any_sequence_of_frozen_sets(tx, sets):
    """A layer's kept moments are those of a run in which its gradients simply did not come while it was frozen."""
    state, expected = make(tx), {name: leaves_of(make(tx), name) for name in NAMES}
    for names, grads in zip(sets, GRADS, strict=False):
        state = state.freeze(frozen(names))
        for name in NAMES:
            assert leaves_of(state, name) == ({} if name in names else expected[name])
        state = advance(state, [grads])
        expected |= {name: leaves_of(state, name) for name in NAMES if name not in names}
    assert all(isinstance(array, np.ndarray) for array in state.kept.arrays.values())
    assert len(state.kept.arrays) == sum(len(expected[name]) for name in state.frozen.names)


def adam_in_float64(grads, counts, kernel, lr=0.1, b1=0.5, b2=0.9375, eps=1e-8, start=None):
    """Adam with the count given for each update. Returns the parameter and its moments.

    The decays are exact in float32: optax's ``1 - 0.999**count`` is off by 6e-5.
    """
    mu, nu = (np.zeros_like(kernel), np.zeros_like(kernel)) if start is None else start
    for grad, count in zip(grads, counts, strict=True):
        mu, nu = b1 * mu + (1 - b1) * grad, b2 * nu + (1 - b2) * grad**2
        kernel = kernel - lr * (mu / (1 - b1**count)) / (np.sqrt(nu / (1 - b2**count)) + eps)
    return kernel, (mu, nu)


@pytest.mark.parametrize("returning", ["fresh", "kept"])
def test_adam_corrects_returning_layers_by_the_count_of_the_run(returning):
    grads = [np.float64(grad["b"]["kernel"]) for grad in GRADS]
    state = advance(make(optax.adam(0.1, b1=0.5, b2=0.9375), returning), GRADS[:4]).freeze("b")
    state = advance(advance(state, GRADS[4:9]).freeze(frozen(())), GRADS[9:])
    kernel, moments = adam_in_float64(grads[:4], range(1, 5), np.float64(PARAMS["b"]["kernel"]))
    expected, _ = adam_in_float64(
        grads[9:], range(10, 13), kernel, start=moments if returning == "kept" else None
    )  # fmt: skip
    np.testing.assert_allclose(state.params["b"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    own_count, _ = adam_in_float64(
        grads[9:], range(5, 8) if returning == "kept" else range(1, 4), kernel,
        start=moments if returning == "kept" else None,
    )  # fmt: skip
    assert np.abs(own_count - expected).max() > 0.01  # the two are told apart


def test_how_much_too_long_fresh_steps_of_adam_are():
    """The figures in the documentation of ``Kept``; constant gradients, so that a right step is the learning rate."""
    tx = optax.adam(1.0)
    grads = {"w": jnp.ones(1)}
    state = tx.init(grads)
    state = (state[0]._replace(count=jnp.int32(1_000_000)), *state[1:])

    def update(state, _):
        updates, state = tx.update(grads, state)
        return state, -updates["w"][0]

    _, lengths = jax.lax.scan(update, state, length=1000)
    np.testing.assert_allclose(lengths[np.array([1, 10, 100, 1000]) - 1], [3.16, 6.5, 3.24, 1.26], rtol=0.01)
    _, lengths = jax.lax.scan(update, (state[0]._replace(mu=grads, nu={"w": state[0].nu["w"] + 1 - 0.999**1000}),
                                       *state[1:]), length=1)  # fmt: skip
    np.testing.assert_allclose(lengths, 1.26, rtol=0.01)


@pytest.mark.parametrize(("clipping", "length"), [(1.0, 1.0), (None, 10_000**0.4)])
@pytest.mark.slow
def test_only_its_clipping_bounds_fresh_steps_of_adafactor(clipping, length):
    tx = optax.adafactor(
        1.0, min_dim_size_to_factor=2, multiply_by_parameter_scale=False, clipping_threshold=clipping
    )  # fmt: skip
    grads = {"w": jnp.ones((4, 4))}
    state = tx.init(grads)
    state = (state[0]._replace(count=jnp.int32(10_000 - 1)), *state[1:])
    updates, _ = tx.update(grads, state, grads)
    np.testing.assert_allclose(-updates["w"], length, rtol=1e-3)


def test_kept_state_is_not_on_a_device_and_not_an_argument_of_the_step():
    tx = optax.adam(0.1)
    state = advance(make(tx), GRADS[:1])
    moments = sum(len(leaf) for leaf in leaves_of(state, "ab").values())
    everything = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    others = {id(array) for array in jax.live_arrays()} - {id(leaf) for leaf in jax.tree.leaves(state.opt_state)}
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    state = state.freeze(["a", "b"])
    alive = [array for array in jax.live_arrays() if id(array) not in others]
    assert sum(array.nbytes for array in alive) == everything - moments + state.kept_version.nbytes
    assert sum(array.nbytes for array in state.kept.arrays.values()) == moments
    arguments = jax.tree.leaves(step.lower(state, GRADS[0]).args_info)
    assert sum(arg.dtype.itemsize * int(np.prod(arg.shape)) for arg in arguments) == sum(
        leaf.nbytes for leaf in jax.tree.leaves((state, GRADS[0]))
    )
    assert not {array.ctypes.data for array in state.kept.arrays.values()} & {
        leaf.unsafe_buffer_pointer() for leaf in jax.live_arrays()
    }


def test_returning_to_a_former_frozen_set_makes_no_new_program():
    traces = []

    @jax.jit
    def step(state, grads):
        traces.append(state.frozen.names)
        return state.apply_gradients(grads=grads)

    state = make(optax.adam(0.1))
    for names in ("", "ab", "a", "", "ab", "a"):
        state = state.freeze(frozen(names))
        for grads in GRADS[:2]:
            state = step(state, grads)
    assert traces == [frozenset(), frozenset("ab"), frozenset("a")]


def test_donated_state_leaves_what_was_kept_alone():
    state = advance(make(optax.adam(0.1)), GRADS[:2])
    before = leaves_of(state, "b")
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads), donate_argnums=0)
    state = state.replace(params=jax.tree.map(jnp.array, state.params))  # for these are everyone's
    for _ in range(2):
        state = state.freeze("b")
        state = step(step(state, GRADS[0]), GRADS[1]).freeze(frozen(()))
        assert leaves_of(state, "b") == before
        copies = {path: array.copy() for path, array in state.kept.arrays.items()}
        assert all(np.array_equal(array, state.kept.arrays[path]) for path, array in copies.items())


def test_going_on_from_an_older_state_is_an_error_and_not_a_mixture():
    first = advance(make(optax.adam(0.1)), GRADS[:1]).freeze("a")
    second = advance(first, GRADS[:1]).freeze("b")
    with pytest.raises(ValueError, match=r"opt_state: is of version 1.*is of version 2.*restore a checkpoint"):
        first.freeze(frozen(()))
    second.freeze(frozen(()))


def test_clones_of_an_optimizer_share_what_was_kept():
    model, optimizer = make_nnx(optax.adam(0.1))
    clone, copy = nnx.clone(model), nnx.clone(optimizer)
    optimizer.freeze(model, ["stem"])
    with pytest.raises(ValueError, match="version 0"):
        copy.freeze(clone, ["stem"])


def test_state_that_was_not_put_aside_is_asked_for():
    tx = optax.adam(0.1)
    state = migrate_opt_state(tx.init(PARAMS), tx, PARAMS, frozen("ab"))
    dropped = migration.dropped(tx.init(PARAMS), tx, PARAMS, frozen("a"))
    assert sorted(path.rpartition(".")[2] for path in dropped) == [
        f"{moment}['a']['{leaf}']" for moment in ("mu", "nu") for leaf in ("bias", "kernel")
    ]
    migrate_opt_state(state, tx, PARAMS, frozen("b"), kept=dropped)
    with pytest.raises(ValueError, match=r"kept: \S*mu\['b'\]\['bias'\] is missing, but tx makes it float32\[4\]"):
        migrate_opt_state(state, tx, PARAMS, frozen("a"), kept=dropped)


def test_returning_validates():
    with pytest.raises(ValueError, match=r"returning: got 'keep', expected 'fresh' .* or 'kept'"):
        make(optax.adam(0.1), returning="keep")
    with pytest.raises(ValueError, match=r"returning: got None"):
        make_nnx(optax.adam(0.1), returning=None)


def test_shapes_of_a_state_that_freezes_put_nothing_aside():
    state = advance(make(optax.adam(0.1)), GRADS[:1]).freeze("a")
    kept = dict(state.kept.arrays)
    shapes = jax.eval_shape(lambda state: state.freeze(frozen("b")), state)
    assert state.kept.arrays == kept
    actual = state.freeze(frozen("b"))
    assert jax.tree.structure(shapes) == jax.tree.structure(actual)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), shapes) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), actual
    )
