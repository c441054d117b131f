"""The functional interface: gradients, optimizer states and updates of the layers that train."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze as frozen_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import keystr, tree_leaves_with_path

from smartfrz_jax import Frozen, find_layers, migrate_opt_state
from smartfrz_jax.freezing import transform as freezing
from smartfrz_jax.pytrees import paths
from tests.freezing.mlp import LAYERS, NAMES, PARAMS, X, loss, mlp, mlp_params
from tests.support.rounding import assert_close


@pytest.fixture(autouse=True)
def _standard_promotion():
    """Optax itself needs it (``b1**count`` in adam's bias correction)."""
    with jax.numpy_dtype_promotion("standard"):
        yield


GRADS = [mlp_params() for _ in range(9)]


def assert_bitwise(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, keystr(path)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), keystr(path)


@pytest.mark.parametrize(
    "tx",
    [
        optax.adafactor(0.1, min_dim_size_to_factor=2, momentum=0.9),
        optax.inject_hyperparams(optax.adamw)(learning_rate=0.1, weight_decay=0.1),
    ],
    ids=["adafactor", "inject_hyperparams"],
)
def test_step_counts_and_hyperparameters_are_all_that_is_left_with_everything_frozen(tx):
    everything = migrate_opt_state(tx.init(PARAMS), tx, PARAMS, Frozen(LAYERS, frozenset(NAMES)))
    assert all(leaf.size == 1 for leaf in jax.tree.leaves(everything))


def test_optimizer_memory_of_adam_is_that_of_the_active_layers():
    tx = optax.adam(0.1)
    state = freezing.freeze(tx, Frozen(LAYERS)).init(PARAMS)
    per_layer = 2 * 4 * (16 + 4)

    def nbytes(state):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    for frozen in (0, 1, 3, 4):
        state = migrate_opt_state(state, tx, PARAMS, Frozen(LAYERS, frozenset(NAMES[:frozen])))
        assert nbytes(state) == (4 - frozen) * per_layer + 4


MIXED = {
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=0.1, weight_decay=0.1),
    "schedule_free": optax.contrib.schedule_free_adamw(0.1),
    "adam": optax.adam(0.1),
}


@pytest.mark.parametrize("grads", [None, jnp.float32], ids=["grads as params", "float32 grads"])
@pytest.mark.parametrize("tx", MIXED.values(), ids=MIXED)
def test_precision_that_optax_changes_goes_on(tx, grads):
    """What it makes depends on all parameters that are active, and what an update leaves on the gradients."""

    own = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS) | {NAMES[1]: PARAMS[NAMES[1]]}
    params, state, dtypes = own, tx.init(own), {}
    for step, frozen in enumerate((set(), set(NAMES[:1]), set(NAMES[:2]), set(NAMES[:1]), set())):
        now = Frozen(LAYERS, frozen)
        state = migrate_opt_state(state, tx, params, now)
        for path, leaf in tree_leaves_with_path(state):
            assert leaf.dtype == dtypes.get(keystr(path), leaf.dtype), keystr(path)
        gradients = jax.tree.map(lambda leaf, param: leaf.astype(grads or param.dtype), GRADS[step], own)
        updates, state = freezing.freeze(tx, now).update(gradients, state, params)
        params = freezing.apply_updates(params, updates, now)
        dtypes = {keystr(path): leaf.dtype for path, leaf in tree_leaves_with_path(state)}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sets(st.sampled_from(NAMES)), max_size=5))
def test_any_sequence_of_frozen_sets(sets):
    """A layer's moments are those since it last became active, and its count goes on."""
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.trace(0.5)
        state, frozen = tx.init(PARAMS), Frozen(LAYERS)
        trace = {name: np.zeros((4, 4), np.float32) for name in NAMES}
        for step, names in enumerate(sets):
            new = Frozen(LAYERS, frozenset(names))
            state = migrate_opt_state(state, tx, PARAMS, new)
            for name in NAMES:
                if name in new.names or name in frozen.names:
                    trace[name] = np.zeros((4, 4), np.float32)
                if name not in new.names:
                    trace[name] = np.asarray(GRADS[step][name]["kernel"]) + np.float32(0.5) * trace[name]
            updates, state = freezing.freeze(tx, new).update(GRADS[step], state, PARAMS)
            for name in NAMES:
                np.testing.assert_allclose(updates[name]["kernel"], trace[name], rtol=1e-6)
            frozen = new


def test_migrate_refuses_the_state_of_another_optimizer():
    adam, momentum, lion = optax.adam(0.1), optax.sgd(0.1, momentum=0.9), optax.lion(0.1)
    frozen = Frozen(LAYERS, frozenset("a"))
    for made_by, passed, path in [
        (adam, momentum, r"\[0\].trace\['b'\]\['bias'\] is missing"),
        (momentum, adam, r"\[0\].count is missing, but tx makes it int32\[\]"),
        (lion, adam, r"\[0\].nu\['b'\]\['bias'\] is missing"),
        (adam, optax.sgd(0.1), r"\[0\].count is int32\[\], but tx makes it missing"),
    ]:
        for state in (made_by.init(PARAMS), freezing.freeze(made_by, frozen).init(PARAMS)):
            with pytest.raises(ValueError, match=rf"opt_state: \S*{path}.*pass the tx that made opt_state"):
                migrate_opt_state(state, passed, PARAMS, frozen)


@pytest.mark.parametrize("tx", [optax.adam(0.1), optax.sgd(0.1, momentum=0.9)], ids=["adam", "momentum"])
def test_update_says_that_a_state_is_of_another_frozen_set(tx):
    none, some = Frozen(LAYERS), Frozen(LAYERS, "a")
    for frozen, state in [
        (some, freezing.freeze(tx, none).init(PARAMS)),
        (none, freezing.freeze(tx, some).init(PARAMS)),
        (some, tx.init(PARAMS)),
    ]:
        with pytest.raises(ValueError, match=r"opt_state: got .* another frozen set.*call migrate_opt_state"):
            jax.jit(freezing.freeze(tx, frozen).update)(GRADS[0], state, PARAMS)
        moved = migrate_opt_state(state, tx, PARAMS, frozen)
        freezing.freeze(tx, frozen).update(GRADS[0], moved, PARAMS)
    with pytest.raises(TypeError, match=r"^(?!opt_state)"):  # of the optimizer's own
        freezing.freeze(tx, some).update({**GRADS[0], "b": {"kernel": "x", "bias": "x"}}, moved, PARAMS)


def test_migrate_refuses_the_state_of_other_parameters():
    tx = optax.adam(0.1)
    wider = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), PARAMS)
    with pytest.raises(ValueError, match=r"mu\['b'\]\['bias'\] is float32\[8\], but tx makes it float32\[4\]"):
        migrate_opt_state(tx.init(wider), tx, PARAMS, Frozen(LAYERS, frozenset("a")))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    with pytest.raises(ValueError, match=r"mu\['a'\]\['bias'\] is bfloat16\[4\], but tx makes it float32\[4\]"):
        migrate_opt_state(tx.init(half), tx, PARAMS, Frozen(LAYERS))
    fewer = {name: PARAMS[name] for name in "abc"}
    with pytest.raises(ValueError, match=r"mu\['d'\]\['bias'\] is missing, but tx makes it float32\[4\]"):
        migrate_opt_state(tx.init(fewer), tx, PARAMS, Frozen(LAYERS))


@pytest.mark.slow
def test_gradients_of_frozen_layers_are_exact_zeros_and_the_others_right():
    frozen = Frozen(LAYERS, frozenset("ac"))
    value, grads = freezing.value_and_grad(loss, frozen)(PARAMS, X)
    expected_value, expected = jax.value_and_grad(loss)(PARAMS, X)
    assert value == expected_value
    for name in NAMES:
        if name in frozen.names:
            assert_bitwise(grads[name], jax.tree.map(jnp.zeros_like, PARAMS[name]))
        else:
            assert_close(grads[name], expected[name])
    np.testing.assert_allclose(optax.tree.norm(grads), optax.tree.norm([expected["b"], expected["d"]]), rtol=1e-6)


def test_value_and_grad_with_aux_and_keywords():
    def scaled(params, x, *, factor):
        return factor * loss(params, x), {"factor": factor}

    (value, aux), grads = freezing.value_and_grad(scaled, Frozen(LAYERS, frozenset(NAMES)), has_aux=True)(
        PARAMS, X, factor=2.0
    )
    np.testing.assert_allclose(value, 2 * loss(PARAMS, X), rtol=1e-6)
    assert aux == {"factor": 2.0}
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
def test_one_program_per_frozen_set():
    traces = []
    tx = optax.adam(0.1)

    @jax.tree_util.Partial
    def step(params, state, x, frozen):
        traces.append(frozen)
        value, grads = freezing.value_and_grad(loss, frozen)(params, x)
        updates, state = freezing.freeze(tx, frozen).update(grads, state, params)
        return freezing.apply_updates(params, updates, frozen), state, value

    jitted = jax.jit(step, static_argnames="frozen")
    params, state = PARAMS, tx.init(PARAMS)
    for names in ("", "", "a", "a", "ab", "ab", "a", ""):
        layers = find_layers(PARAMS, mlp, X)  # equal, not the same
        frozen = Frozen(layers, frozenset(names))
        state = migrate_opt_state(state, tx, params, frozen)
        params, state, _ = jitted(params, state, X, frozen=frozen)
    assert len(traces) == jitted._cache_size() == 3


def test_equal_transformations_are_equal_and_do_not_recompile():
    tx = optax.adam(0.1)
    first, same = (freezing.freeze(tx, Frozen(LAYERS, frozenset("a"))) for _ in range(2))
    assert first == same
    assert hash(first) == hash(same)
    assert first != freezing.freeze(tx, Frozen(LAYERS, frozenset("b")))
    assert first != freezing.freeze(optax.adam(0.1), Frozen(LAYERS, frozenset("a")))
    assert first.init != first.update
    jitted = jax.jit(lambda transform, params: transform.init(params), static_argnums=0)
    jitted(first, PARAMS)
    jitted(same, PARAMS)
    assert jitted._cache_size() == 1


def test_extra_arguments_reach_the_optimizer():
    tx = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1))
    transform = freezing.freeze(tx, Frozen(LAYERS, frozenset("a")))
    updates, _ = transform.update(GRADS[0], transform.init(PARAMS), PARAMS, value=1.0)
    assert not np.any(updates["a"]["kernel"])
    np.testing.assert_allclose(updates["b"]["kernel"], -0.1 * GRADS[0]["b"]["kernel"], rtol=1e-6)


@pytest.mark.parametrize("name", ["line search", "sharpness"])
@pytest.mark.slow
def test_functions_of_the_parameters_reach_the_optimizer(name):
    """The step is that of an optimizer which knows the active layers alone."""
    frozen, rest = Frozen(LAYERS, frozenset("abc")), {name: PARAMS[name] for name in "abc"}

    def of_active(active):
        return loss(rest | active, X)

    tx, extra = {
        "line search": (optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(3)), lambda value_fn: {
            "value": jnp.array(0.7), "grad": GRADS[1], "value_fn": value_fn}),
        "sharpness": (optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True), lambda value_fn: {
            "grad_fn": lambda params, i: jax.grad(value_fn)(params)}),
    }[name]  # fmt: skip
    transform, active = freezing.freeze(tx, frozen), {"d": PARAMS["d"]}
    got, _ = transform.update(GRADS[0], transform.init(PARAMS), PARAMS, **extra(lambda params: loss(params, X)))
    some = {key: {"d": arg["d"]} if key == "grad" else arg for key, arg in extra(of_active).items()}
    expected, _ = tx.update({"d": GRADS[0]["d"]}, tx.init(active), active, **some)
    assert_close(got["d"]["kernel"], expected["d"]["kernel"])
    assert not any(np.any(got[name]["kernel"]) for name in "abc")


def test_lbfgs_takes_its_arguments_of_the_active_layers():
    frozen = Frozen(LAYERS, frozenset("abc"))
    transform = freezing.freeze(optax.lbfgs(memory_size=2), frozen)
    value, grads = freezing.value_and_grad(loss, frozen)(PARAMS, X)
    state = jax.eval_shape(transform.init, PARAMS)
    updates, _ = jax.eval_shape(
        lambda state: transform.update(
            grads, state, PARAMS, value=value, grad=grads, value_fn=lambda params: loss(params, X)
        ),
        state,
    )
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)


def test_optimizers_that_join_the_parameters_are_refused():
    """Their state cannot be split; nor can that of some be made for nothing."""
    tx, some = optax.flatten(optax.adam(0.1)), Frozen(LAYERS, frozenset("a"))
    message = (
        r"opt_state: \S*mu is float32\[\d+\], but tx makes it float32\[\d+\] with this.*cannot be split.*Leave out"
    )
    for made_for, target in ((Frozen(LAYERS), some), (some, Frozen(LAYERS)), (some, some.add("b"))):
        with pytest.raises(ValueError, match=message):
            migrate_opt_state(freezing.freeze(tx, made_for).init(PARAMS), tx, PARAMS, target)
    with pytest.raises(
        ValueError, match=r"frozen: got all 4 layers, but tx cannot start without.*leave a layer active"
    ):
        migrate_opt_state(tx.init(PARAMS), tx, PARAMS, Frozen(LAYERS, frozenset(NAMES)))


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_apply_updates_keeps_frozen_leaves_bit_for_bit(jitted):
    special = jnp.array([-0.0, np.nan, np.inf, 1e-45], jnp.float32)
    params = {name: {"kernel": jnp.eye(4), "bias": special} for name in NAMES}
    updates = jax.tree.map(jnp.zeros_like, params)
    frozen = Frozen(LAYERS, frozenset("ab"))

    def apply(params, updates):
        return freezing.apply_updates(params, updates, frozen)

    got = (jax.jit(apply) if jitted else apply)(params, updates)
    for name in "ab":
        assert_bitwise(got[name], params[name])
    assert not np.signbit(got["c"]["bias"][0])  # what 0.0 + -0.0 does to a layer that is not held
    assert jax.tree.structure(got) == jax.tree.structure(params)


@pytest.mark.slow
def test_bfloat16_parameters_stay_bfloat16():
    tx = optax.adamw(0.1)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    frozen = Frozen(LAYERS, frozenset("a"))
    transform = freezing.freeze(tx, frozen)
    _, grads = freezing.value_and_grad(lambda p: loss(p, X.astype(jnp.bfloat16)), frozen)(params)
    updates, _ = transform.update(grads, transform.init(params), params)
    got = freezing.apply_updates(params, updates, frozen)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(got))
    assert_bitwise(got["a"], params["a"])


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(3)])

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.tanh(layer(x))
        return x


@pytest.mark.parametrize("kind", ["nnx state", "pure nnx state", "FrozenDict"])
@pytest.mark.slow
def test_other_parameter_trees_keep_their_structure(kind):
    if kind == "FrozenDict":
        params, forward = frozen_dict(PARAMS), mlp
    else:
        graphdef, params = nnx.split(Net(nnx.Rngs(0)))
        params = nnx.as_pure(params) if kind == "pure nnx state" else params

        def forward(params, x):
            return nnx.merge(graphdef, params, copy=True)(x)

    layers = find_layers(params, forward, X)
    tx, before = optax.adamw(0.1), params
    frozen = Frozen(layers, frozenset(layers.names[:1]))
    state = migrate_opt_state(tx.init(params), tx, params, frozen)
    for _ in range(3):
        _, grads = freezing.value_and_grad(lambda p: jnp.sum(forward(p, X) ** 2), frozen)(params)
        assert jax.tree.structure(grads) == jax.tree.structure(params)
        updates, state = freezing.freeze(tx, frozen).update(grads, state, params)
        params = freezing.apply_updates(params, updates, frozen)
    assert jax.tree.structure(params) == jax.tree.structure(before)
    old, new = paths.flatten(before), paths.flatten(params)
    for name in old:
        assert np.array_equal(old[name], new[name]) == (name in frozen.params)
    state = migrate_opt_state(state, tx, params, Frozen(layers))
    freezing.freeze(tx, Frozen(layers)).update(grads, state, params)
