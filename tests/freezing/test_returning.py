"""Layers that train again: where their optimizer state starts from, and what goes on as if nothing had happened."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import keystr, tree_leaves_with_path

import smartfrz_jax as sfj
from smartfrz_jax import Frozen, migrate_opt_state
from smartfrz_jax.freezing import migrate as migration
from smartfrz_jax.freezing import transform
from smartfrz_jax.freezing.returning import Kept
from smartfrz_jax.pytrees import paths

pytestmark = pytest.mark.usefixtures("jax_defaults")

RNG = np.random.default_rng(0)
NAMES = ("a", "b", "c", "d")


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def mlp_params():
    return {name: {"kernel": normal(4, 4), "bias": normal(4)} for name in NAMES}


def mlp(params, x):
    for name in NAMES:
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x


PARAMS, X = mlp_params(), normal(5, 4)
LAYERS = sfj.find_layers(PARAMS, mlp, X)
GRADS = [mlp_params() for _ in range(12)]

OPTIMIZERS = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam in bfloat16": optax.adam(0.1, mu_dtype=jnp.bfloat16),
    "MultiSteps": optax.MultiSteps(optax.sgd(0.1, momentum=0.9), every_k_schedule=2),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=0.1, weight_decay=0.1),
}
SLOW = {"MultiSteps"}
parametrize_optimizers = pytest.mark.parametrize(
    "tx",
    [pytest.param(tx, id=name, marks=[pytest.mark.slow] if name in SLOW else []) for name, tx in OPTIMIZERS.items()],
)


def make(tx, returning="kept"):
    return sfj.linen.TrainState.create(apply_fn=mlp, params=PARAMS, tx=tx, layers=LAYERS, returning=returning)


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


class Net(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.middle = nnx.Linear(4, 4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.middle(nnx.relu(self.norm(self.stem(x))))))


TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05))
Y = normal(5, 2)


def make_nnx(tx=TX, returning="kept"):
    model = Net(nnx.Rngs(0))
    layers = sfj.nnx.find_layers(model, X)
    return model, sfj.nnx.Optimizer(model, tx, wrt=nnx.Param, layers=layers, returning=returning)


@nnx.jit
def train_step(model, optimizer, x, y):
    loss, grads = optimizer.value_and_grad(lambda model, x: jnp.square(model(x) - y).mean())(model, x)
    optimizer.update(model, grads)
    return loss


def arrays(*modules):
    return {
        f"{i}/{name}": np.asarray(leaf)
        for i, module in enumerate(modules)
        for name, leaf in paths.flatten(nnx.as_pure(nnx.state(module))).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("returning", ["fresh", "kept"])
def test_nnx_optimizer(returning):
    model, optimizer = make_nnx(returning=returning)
    train_step(model, optimizer, X, Y)
    before = arrays(optimizer)
    optimizer.freeze(model, ["stem"])
    train_step(model, optimizer, X, Y)
    held = arrays(optimizer)
    optimizer.freeze(model, Frozen(optimizer.frozen.layers))
    after = arrays(optimizer)
    assert after.keys() == before.keys()
    for name, leaf in after.items():
        if name in held:
            expected = held[name] if "kept_version" not in name else np.int32(2)
        else:
            assert "/stem/" in name or "/norm/" in name
            expected = before[name] if returning == "kept" else np.zeros_like(leaf)
        np.testing.assert_array_equal(leaf, expected, err_msg=name)
    assert any(np.any(before[name]) for name in before.keys() - held.keys())
    train_step(model, optimizer, X, Y)


@pytest.mark.slow
def test_statistics_of_a_returning_batch_norm_go_on_from_where_they_were_held():
    model, optimizer = make_nnx()
    train_step(model, optimizer, X, Y)
    mean = np.asarray(model.norm.mean[...])
    optimizer.freeze(model, ["stem"])
    for _ in range(2):
        train_step(model, optimizer, X, Y)
    assert np.array_equal(mean, model.norm.mean[...])
    optimizer.freeze(model, Frozen(optimizer.frozen.layers))
    batch_mean = np.mean(np.float64(X) @ np.float64(model.stem.kernel[...]) + np.float64(model.stem.bias[...]), 0)
    train_step(model, optimizer, X, Y)
    np.testing.assert_allclose(model.norm.mean[...], 0.99 * mean + 0.01 * batch_mean, rtol=1e-5, atol=1e-7)


SCHEDULE = {0: (), 2: ("stem",), 4: ("stem", "middle"), 6: (), 8: ("stem",), 9: ()}


def policy():
    """A policy that lets layers return."""

    def update(state, layers, *, step, **signals):
        return frozenset(SCHEDULE[max(at for at in SCHEDULE if at <= step)]), state

    return sfj.Policy(lambda layers, params: (), update)


def run_nnx(tmp_path, saves, steps=11):
    model, optimizer = make_nnx()
    freezer = sfj.nnx.Freezer(model, optimizer, policy())
    for step in range(1, steps):
        train_step(model, optimizer, X, Y)
        freezer.step()
        if step in saves:
            freezer.save(tmp_path / str(step))
            model, optimizer = make_nnx()
            freezer = sfj.nnx.Freezer(model, optimizer, policy())
            freezer.restore(tmp_path / str(step))
    return arrays(model, optimizer), freezer


@pytest.mark.slow
def test_a_restored_nnx_run_returns_to_the_same_moments(tmp_path):
    straight, freezer = run_nnx(tmp_path, ())
    restored, again = run_nnx(tmp_path, (2, 5, 8))
    assert freezer.events == again.events
    assert straight.keys() == restored.keys()
    for name, leaf in straight.items():
        np.testing.assert_array_equal(leaf, restored[name], err_msg=name)


@pytest.mark.slow
def test_a_restored_run_of_a_bare_pytree_returns_to_the_same_moments(tmp_path):
    schedule = {0: "", 2: "b", 3: "bd", 5: "", 6: "b", 7: ""}
    tx = OPTIMIZERS["adam in bfloat16"]
    returns = sfj.Policy(
        lambda layers, params: (),
        lambda state, layers, *, step, **_: (frozenset(schedule[max(at for at in schedule if at <= step)]), state),
    )

    def run(saves):
        state = make(tx)
        freezer = sfj.linen.Freezer(state, returns)
        for step, grads in enumerate(GRADS[:9], start=1):
            state = freezer.step(state.apply_gradients(grads=grads))
            if step in saves:
                freezer.save(tmp_path / str(step), state)
                state = make(tx)
                freezer = sfj.linen.Freezer(state, returns)
                state = freezer.restore(tmp_path / str(step), state)
        return state

    straight, restored = run(()), run((2, 4, 6))
    assert jax.tree.structure(straight.opt_state) == jax.tree.structure(restored.opt_state)
    for (path, leaf), other in zip(tree_leaves_with_path(straight), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(leaf, other, err_msg=keystr(path))


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_leaves_what_was_kept_as_it_is(tmp_path):
    model, optimizer = make_nnx()
    freezer = sfj.nnx.Freezer(model, optimizer, policy())
    freezer.save(tmp_path / "nothing frozen")
    other, other_optimizer = make_nnx(optax.sgd(0.1, momentum=0.5))
    other_freezer = sfj.nnx.Freezer(other, other_optimizer, policy())
    train_step(other, other_optimizer, X, Y)
    other_optimizer.freeze(other, ["stem"])
    before, kept = arrays(other_optimizer), dict(other_optimizer.kept.arrays)
    with pytest.raises(ValueError, match="does not fit"):
        other_freezer.restore(tmp_path / "nothing frozen")
    assert other_optimizer.kept.arrays == kept
    assert before.keys() == arrays(other_optimizer).keys()
    other_optimizer.freeze(other, Frozen(other_optimizer.frozen.layers))
    assert not other_optimizer.kept.arrays


def test_what_is_kept_belongs_to_one_run():
    assert Kept() != Kept()
    assert make_nnx()[1].kept is not make_nnx()[1].kept
