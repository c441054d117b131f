import pickle

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

from smartfrz_jax import Frozen, find_layers, freezing, paths
from tests.rounding import assert_close

RNG = np.random.default_rng(0)
NAMES = ("a", "b", "c", "d")


@pytest.fixture(autouse=True)
def _standard_promotion():
    """Optax itself needs it (``b1**count`` in adam's bias correction)."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def mlp_params():
    return {name: {"kernel": normal(4, 4), "bias": normal(4)} for name in NAMES}


def mlp(params, x):
    for name in NAMES:
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x


PARAMS = mlp_params()
X = normal(5, 4)
LAYERS = find_layers(PARAMS, mlp, X)
GRADS = [mlp_params() for _ in range(9)]


def loss(params, x):
    return jnp.mean(mlp(params, x) ** 2)


def assert_bitwise(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, keystr(path)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), keystr(path)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.1),
    "adam with a schedule": optax.adam(optax.cosine_decay_schedule(0.1, 10)),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "adamw with a mask": optax.adamw(0.1, mask=lambda params: jax.tree.map(lambda w: w.ndim > 1, params)),
    "lion": optax.lion(0.1, weight_decay=0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2, weight_decay_rate=0.1, momentum=0.9),
    "lamb": optax.lamb(0.1, weight_decay=0.1),
    "MultiSteps": optax.MultiSteps(optax.adamw(0.1), every_k_schedule=2),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=0.1, weight_decay=0.1),
    "apply_if_finite": optax.apply_if_finite(optax.adam(0.1), max_consecutive_errors=3),
    "clip, adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
    "adam, ema": optax.chain(optax.adam(0.1), optax.ema(0.9)),
    "trace, decay": optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.1), optax.scale(-0.1)),
    "multi_transform": optax.multi_transform(
        {"train": optax.adam(0.1), "frozen": optax.sgd(0.01, momentum=0.9)},  # the labels that freeze uses, too
        paths.tree_map(lambda name, _: "train" if name.endswith("kernel") else "frozen", PARAMS),
    ),
    "multi_transform of a function": optax.multi_transform(
        {"kernel": optax.adamw(0.1), "bias": optax.adam(0.01)},
        lambda params: paths.tree_map(lambda name, _: name.rpartition("/")[2], params),
    ),
}
SLOW = {"MultiSteps", "apply_if_finite", "adafactor"}
parametrize_optimizers = pytest.mark.parametrize(
    "tx",
    [pytest.param(tx, id=name, marks=[pytest.mark.slow] if name in SLOW else []) for name, tx in OPTIMIZERS.items()],
)


def zeroed(grads, frozen):
    """As ``value_and_grad`` gives them: what clips over all leaves must not see those of frozen layers."""
    return paths.tree_map(lambda name, g: jnp.zeros_like(g) if name in frozen.params else g, grads)


def run(tx, schedule: dict[int, set[str]], migrate=freezing.migrate):
    """Nine steps; at the steps of ``schedule`` the frozen set changes. Yields (frozen, updates, state, params)."""
    params, state, frozen = PARAMS, tx.init(PARAMS), Frozen(LAYERS)
    transform = tx
    for step, grads in enumerate(GRADS):
        if step in schedule:
            frozen = Frozen(LAYERS, frozenset(schedule[step]))
            state, transform = migrate(state, tx, params, frozen), freezing.freeze(tx, frozen)
        updates, state = transform.update(zeroed(grads, frozen), state, params)
        params = freezing.apply_updates(params, updates, frozen)
        yield frozen, updates, state, params


def reference(tx, schedule: dict[int, set[str]]):
    """The optimizer that never freezes, fed the same gradients."""
    params, state, names = PARAMS, tx.init(PARAMS), set()
    for step, grads in enumerate(GRADS):
        names = schedule.get(step, names)
        updates, state = tx.update(zeroed(grads, Frozen(LAYERS, frozenset(names))), state, params)
        params = optax.apply_updates(params, updates)
        yield params


SCHEDULE = {0: set(), 3: {"b"}, 6: {"a", "b"}}


@parametrize_optimizers
def test_frozen_leaves_stay_and_active_leaves_go_on_as_if_nothing_had_happened(tx):
    held: dict[str, dict] = {}
    before = PARAMS
    for (frozen, updates, state, params), expected in zip(run(tx, SCHEDULE), reference(tx, SCHEDULE), strict=True):
        held |= {name: before[name] for name in frozen.names if name not in held}
        for name in NAMES:
            assert_bitwise(params[name], held[name] if name in frozen.names else expected[name])
            if name in frozen.names:
                assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates[name]))
        names = [keystr(path) for path, _ in tree_leaves_with_path(state)]
        assert not [path for path in names if any(f"['{name}']" in path for name in frozen.names)]
        abstract = jax.eval_shape(freezing.freeze(tx, frozen).init, PARAMS)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), abstract
        )
        assert jax.tree.structure(params) == jax.tree.structure(PARAMS)
        before = params
    assert held.keys() == {"a", "b"}


@parametrize_optimizers
def test_migrating_from_a_plain_state_keeps_every_value(tx):
    _, state = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    migrated = freezing.migrate(state, tx, PARAMS, Frozen(LAYERS))
    for got, expected in zip(jax.tree.leaves(migrated), jax.tree.leaves(state), strict=True):
        assert_bitwise(got, expected)
    everything = freezing.migrate(state, tx, PARAMS, Frozen(LAYERS, frozenset(NAMES)))
    sizes = [leaf.size for leaf in jax.tree.leaves(everything)]
    assert all(size == 1 for size in sizes)  # step counts and hyperparameters are all that is left


@parametrize_optimizers
def test_returning_layers_start_afresh_and_the_others_keep_their_state(tx):
    def leaves_of(state, names):
        return {
            keystr(path): leaf
            for path, leaf in tree_leaves_with_path(state)
            if any(f"['{name}']" in keystr(path) for name in names)
        }

    *_, (_, _, state, params) = run(tx, {0: set(), 3: {"b"}})
    returned = freezing.migrate(state, tx, params, Frozen(LAYERS))
    fresh = freezing.freeze(tx, Frozen(LAYERS)).init(params)
    assert_bitwise(leaves_of(returned, "b"), leaves_of(fresh, "b"))
    assert_bitwise(leaves_of(returned, "acd"), leaves_of(state, "acd"))
    updates, _ = freezing.freeze(tx, Frozen(LAYERS)).update(GRADS[0], returned, params)
    assert np.all(np.isfinite(updates["b"]["kernel"]))


def test_initialising_anew_would_be_wrong():
    """Guards the tests above: they would not pass with an optimizer state that starts again."""

    def start_again(state, tx, params, frozen):
        return freezing.freeze(tx, frozen).init(params)

    for name in ("momentum", "adam", "lion", "adafactor"):
        tx = OPTIMIZERS[name]
        *_, (_, _, _, params) = run(tx, SCHEDULE, migrate=start_again)
        *_, expected = reference(tx, SCHEDULE)
        assert not np.allclose(params["d"]["kernel"], expected["d"]["kernel"], atol=1e-3)


def test_optimizer_memory_of_adam_is_that_of_the_active_layers():
    tx = optax.adam(0.1)
    state = freezing.freeze(tx, Frozen(LAYERS)).init(PARAMS)
    per_layer = 2 * 4 * (16 + 4)

    def nbytes(state):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    for frozen in (0, 1, 3, 4):
        state = freezing.migrate(state, tx, PARAMS, Frozen(LAYERS, frozenset(NAMES[:frozen])))
        assert nbytes(state) == (4 - frozen) * per_layer + 4


def test_hyperparameters_set_by_hand_are_kept():
    tx = OPTIMIZERS["inject_hyperparams"]
    state = freezing.freeze(tx, Frozen(LAYERS)).init(PARAMS)
    state.inner_states["train"].inner_state.hyperparams["learning_rate"] = jnp.float32(0.02)
    state = freezing.migrate(state, tx, PARAMS, Frozen(LAYERS, frozenset("a")))
    assert state.inner_states["train"].inner_state.hyperparams["learning_rate"] == jnp.float32(0.02)


@pytest.mark.slow
def test_random_key_in_the_state():
    tx = optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1))
    state = freezing.freeze(tx, Frozen(LAYERS)).init(PARAMS)
    _, state = freezing.freeze(tx, Frozen(LAYERS)).update(GRADS[0], state, PARAMS)
    migrated = freezing.migrate(state, tx, PARAMS, Frozen(LAYERS, frozenset("a")))
    frozen = freezing.freeze(tx, Frozen(LAYERS, frozenset("a")))
    updates, _ = frozen.update(GRADS[1], migrated, PARAMS)
    assert not np.any(updates["a"]["kernel"])


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
            state = freezing.migrate(state, tx, PARAMS, new)
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
    adam, momentum, lion = OPTIMIZERS["adam"], OPTIMIZERS["momentum"], OPTIMIZERS["lion"]
    frozen = Frozen(LAYERS, frozenset("a"))
    for made_by, passed, path in [
        (adam, momentum, r"\[0\].trace\['b'\]\['bias'\] is missing"),
        (momentum, adam, r"\[0\].count is missing, but tx makes it int32\[\]"),
        (lion, adam, r"\[0\].nu\['b'\]\['bias'\] is missing"),
        (adam, optax.sgd(0.1), r"\[0\].count is int32\[\], but tx makes it missing"),
    ]:
        for state in (made_by.init(PARAMS), freezing.freeze(made_by, frozen).init(PARAMS)):
            with pytest.raises(ValueError, match=rf"opt_state: \S*{path}.*pass the tx that made opt_state"):
                freezing.migrate(state, passed, PARAMS, frozen)


def test_migrate_refuses_the_state_of_other_parameters():
    tx = optax.adam(0.1)
    wider = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), PARAMS)
    with pytest.raises(ValueError, match=r"mu\['b'\]\['bias'\] is float32\[8\], but tx makes it float32\[4\]"):
        freezing.migrate(tx.init(wider), tx, PARAMS, Frozen(LAYERS, frozenset("a")))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    with pytest.raises(ValueError, match=r"mu\['a'\]\['bias'\] is bfloat16\[4\], but tx makes it float32\[4\]"):
        freezing.migrate(tx.init(half), tx, PARAMS, Frozen(LAYERS))
    fewer = {name: PARAMS[name] for name in "abc"}
    with pytest.raises(ValueError, match=r"mu\['d'\]\['bias'\] is missing, but tx makes it float32\[4\]"):
        freezing.migrate(tx.init(fewer), tx, PARAMS, Frozen(LAYERS))


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


# The cost of a compiled step. All layers of the deep network cost the same forward: one unit.
DEPTH, WIDTH, BATCH = 8, 64, 512
DEEP = {f"l{i}": {"kernel": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)} for i in range(DEPTH)}
UNIT = 2 * BATCH * WIDTH * WIDTH


def deep_loss(params, x):
    for i in range(DEPTH):
        x = jax.nn.relu(x @ params[f"l{i}"]["kernel"])
    return jnp.mean(x)


DEEP_X = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)
DEEP_LAYERS = find_layers(DEEP, deep_loss, DEEP_X)


def units(tx, frozen, *, norm=False, ema=False) -> float:
    """Forward passes of one layer that a compiled step costs."""

    def step(params, average, state, x):
        value, grads = freezing.value_and_grad(deep_loss, frozen)(params, x)
        updates, state = freezing.freeze(tx, frozen).update(grads, state, params)
        params = freezing.apply_updates(params, updates, frozen)
        average = optax.incremental_update(params, average, 0.1) if ema else average
        return params, average, state, value, optax.tree.norm(grads) if norm else 0.0

    state = jax.eval_shape(freezing.freeze(tx, frozen).init, DEEP)
    compiled = jax.jit(step).lower(DEEP, DEEP, state, DEEP_X).compile()
    return compiled.cost_analysis()["flops"] / UNIT


def expected_units(frozen: set[int]) -> int:
    """Forward; weight gradients of active layers; activation gradients of all behind the first active one."""
    active = [i for i in range(DEPTH) if i not in frozen]
    return DEPTH + len(active) + (DEPTH - 1 - active[0] if active else 0)


@pytest.mark.parametrize(
    "frozen", [(), range(2), range(4), range(6), range(8), (3,), (0, 1, 5, 6)], ids=lambda frozen: str(list(frozen))
)
@pytest.mark.parametrize(
    ("tx", "extra"),
    [
        (optax.sgd(0.1, momentum=0.9), {}),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)), {"norm": True, "ema": True}),
    ],
    ids=["momentum", "clip, adamw, norm, ema"],
)
def test_compiled_step_gets_cheaper_by_the_expected_share(tx, extra, frozen):
    got = units(tx, Frozen(DEEP_LAYERS, frozenset(f"l{i}" for i in frozen)), **extra)
    assert expected_units(set(frozen)) <= got < expected_units(set(frozen)) + 0.6


@pytest.mark.parametrize(
    ("tx", "extra"),
    [
        (optax.adamw(0.1, weight_decay=0.1), {}),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), {}),
        (optax.sgd(0.1), {"norm": True}),
        (optax.sgd(0.1), {"ema": True}),
        (optax.apply_if_finite(optax.adam(0.1), 3), {}),
        (optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(), {}),
    ],
    ids=["adamw", "clip", "norm", "ema", "apply_if_finite", "MultiSteps"],
)
def test_nothing_brings_the_cost_of_frozen_layers_back(tx, extra):
    got = units(tx, Frozen(DEEP_LAYERS, frozenset(f"l{i}" for i in range(6))), **extra)
    assert expected_units(set(range(6))) <= got < expected_units(set(range(6))) + 0.6


@pytest.mark.slow
def test_convolutions_get_cheaper():
    params = {f"c{i}": jax.ShapeDtypeStruct((3, 3, 16, 16), jnp.float32) for i in range(4)}
    x = jax.ShapeDtypeStruct((8, 16, 16, 16), jnp.float32)

    def loss(params, x):
        for i in range(4):
            dims = ("NHWC", "HWIO", "NHWC")
            x = jax.nn.relu(jax.lax.conv_general_dilated(x, params[f"c{i}"], (1, 1), "VALID", dimension_numbers=dims))
        return jnp.mean(x)

    layers = find_layers(params, loss, x)

    def flops(names):
        frozen = Frozen(layers, frozenset(names))
        step = jax.jit(freezing.value_and_grad(loss, frozen))
        return step.lower(params, x).compile().cost_analysis()["flops"]

    forward = [2 * 8 * side**2 * 9 * 16 * 16 for side in (14, 12, 10, 8)]
    for count in range(4):
        # The activation gradient of a VALID convolution is counted with its padding by some compilers: not below.
        expected = sum(forward) + sum(forward[count:]) + sum(forward[count + 1 :])
        assert flops([f"c{i}" for i in range(count)]) == pytest.approx(expected, rel=0.12)
    assert flops(params) == pytest.approx(sum(forward), rel=0.05)


def test_memory_of_a_compiled_step_falls():
    def temporary(names):
        frozen = Frozen(DEEP_LAYERS, frozenset(names))
        compiled = jax.jit(freezing.value_and_grad(deep_loss, frozen)).lower(DEEP, DEEP_X).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    activation = 4 * BATCH * WIDTH
    assert temporary(()) - temporary([f"l{i}" for i in range(6)]) >= 4 * activation


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
        state = freezing.migrate(state, tx, params, frozen)
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
            freezing.migrate(freezing.freeze(tx, made_for).init(PARAMS), tx, PARAMS, target)
    with pytest.raises(
        ValueError, match=r"frozen: got all 4 layers, but tx cannot start without.*leave a layer active"
    ):
        freezing.migrate(tx.init(PARAMS), tx, PARAMS, Frozen(LAYERS, frozenset(NAMES)))


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
    state = freezing.migrate(tx.init(params), tx, params, frozen)
    for _ in range(3):
        _, grads = freezing.value_and_grad(lambda p: jnp.sum(forward(p, X) ** 2), frozen)(params)
        assert jax.tree.structure(grads) == jax.tree.structure(params)
        updates, state = freezing.freeze(tx, frozen).update(grads, state, params)
        params = freezing.apply_updates(params, updates, frozen)
    assert jax.tree.structure(params) == jax.tree.structure(before)
    old, new = paths.flatten(before), paths.flatten(params)
    for name in old:
        assert np.array_equal(old[name], new[name]) == (name in frozen.params)
    state = freezing.migrate(state, tx, params, Frozen(layers))
    freezing.freeze(tx, Frozen(layers)).update(grads, state, params)


def test_frozen_is_equal_and_hashable_by_value():
    frozen, same = Frozen(LAYERS, frozenset("ab")), Frozen(find_layers(PARAMS, mlp, X), frozenset("ba"))
    assert frozen == same
    assert hash(frozen) == hash(same)
    assert len({frozen, same, Frozen(LAYERS), Frozen(LAYERS, frozenset("a"))}) == 3
    assert frozen != frozenset("ab")
    other_order = find_layers(PARAMS, lambda p, x: x @ p["d"]["kernel"] @ p["a"]["kernel"], X)
    assert Frozen(other_order, frozenset("ab")) != frozen


def test_frozen_hashes_anew_where_it_is_unpickled():
    frozen = Frozen(LAYERS, frozenset("ab"))
    vars(frozen)["_hash"] = vars(frozen.layers)["_hash"] = 0  # as strings hash in another process
    try:
        copy = pickle.loads(pickle.dumps(frozen))
        same = Frozen(find_layers(PARAMS, mlp, X), frozenset("ab"))
        assert copy == same
        assert hash(copy) == hash(same)
    finally:
        del vars(frozen.layers)["_hash"]


def test_frozen_views():
    frozen = Frozen(LAYERS, frozenset("ca"))
    assert frozen.names == {"a", "c"}
    assert frozen.active == ("b", "d")
    assert frozen.mask.dtype == bool
    assert frozen.mask.tolist() == [True, False, True, False]
    assert Frozen.of_mask(LAYERS, frozen.mask) == frozen
    assert Frozen.of_mask(LAYERS, np.zeros(4, bool)) == Frozen(LAYERS)
    assert frozen.params == {"a/kernel", "a/bias", "c/kernel", "c/bias"}
    assert frozen.add(["d"]).names == {"a", "c", "d"}
    assert frozen.add([]) == frozen
    assert frozen.names == {"a", "c"}
    assert set(frozen.active_leaves(PARAMS)) == {"b/kernel", "b/bias", "d/kernel", "d/bias"}
    labels = frozen.labels(PARAMS)
    assert jax.tree.structure(labels) == jax.tree.structure(PARAMS)
    assert [labels[name]["kernel"] for name in NAMES] == ["frozen", "train", "frozen", "train"]


def test_names_of_a_single_layer():
    layers = find_layers({"conv": {"kernel": jnp.eye(4)}}, lambda p, x: x @ p["conv"]["kernel"], X)
    assert Frozen(layers).add("conv").names == {"conv"}


def test_frozen_validates():
    with pytest.raises(ValueError, match=r"names: no layer is called 'e'; did you mean"):
        Frozen(LAYERS, frozenset("ae"))
    with pytest.raises(ValueError, match=r"names: no layer is called 0; did you mean 'a' or 'b'"):
        Frozen(LAYERS, frozenset({0, "a"}))
    with pytest.raises(ValueError, match=r"names: no layer is called 'a/kernel'; did you mean 'a'"):
        Frozen(LAYERS).add(["a/kernel"])
    for mask in (np.ones(3, bool), np.ones((4, 1), bool), np.array(True)):
        with pytest.raises(ValueError, match=r"mask: got shape .* expected \(4,\)"):
            Frozen.of_mask(LAYERS, mask)


def test_parameters_of_no_layer_are_refused():
    frozen = Frozen(LAYERS, frozenset("a"))
    more = PARAMS | {"lora": {"kernel": jnp.eye(4)}}
    for call in (
        frozen.labels,
        frozen.stop_gradient,
        frozen.active_leaves,
        freezing.freeze(optax.sgd(0.1), frozen).init,
        lambda params: freezing.value_and_grad(loss, frozen)(params, X),
    ):
        with pytest.raises(ValueError, match=r"params: 'lora/kernel' belongs to no layer.*find_layers"):
            call(more)
