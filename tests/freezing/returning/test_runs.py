"""Runs in which layers freeze and return, and their checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.tree_util import keystr, tree_leaves_with_path

import smartfrz_jax as sfj
from smartfrz_jax import Frozen
from smartfrz_jax.freezing.returning import Kept
from smartfrz_jax.pytrees import paths
from tests.freezing.mlp import LAYERS, X, normal
from tests.freezing.returning.networks import GRADS, OPTIMIZERS, make, make_nnx

pytestmark = pytest.mark.usefixtures("jax_defaults")
Y = normal(5, 2)


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
@pytest.mark.parametrize(("saved", "own"), [("fresh", "kept"), ("kept", "fresh")])
def test_a_checkpoint_of_the_other_kind_of_return_is_refused(tmp_path, saved, own):
    message = rf"path: .* saved with returning='{saved}', expected returning='{own}'.* make it with returning='{saved}'"
    model, optimizer = make_nnx(returning=saved)
    sfj.nnx.Freezer(model, optimizer, policy()).save(tmp_path / "nnx")
    model, optimizer = make_nnx(returning=own)
    with pytest.raises(ValueError, match=message):
        sfj.nnx.Freezer(model, optimizer, policy()).restore(tmp_path / "nnx")
    states = {kind: make(optax.adam(0.1), returning=kind) for kind in (saved, own)}
    sfj.linen.Freezer(states[saved], policy()).save(tmp_path / "linen", states[saved])
    with pytest.raises(ValueError, match=message):
        sfj.linen.Freezer(states[own], policy()).restore(tmp_path / "linen", states[own])


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


@pytest.mark.slow
def test_what_is_kept_belongs_to_one_run():
    assert Kept() != Kept()
    assert make_nnx()[1].kept is not make_nnx()[1].kept


@pytest.mark.slow
def test_a_checkpoint_is_restored_into_an_older_state_of_the_same_run(tmp_path):
    first = state = make(OPTIMIZERS["momentum"])
    freezer = sfj.linen.Freezer(state, sfj.policies.never())
    state = state.apply_gradients(grads=GRADS[0]).freeze(["a"])
    freezer.step(state)
    freezer.save(tmp_path / "run", state)
    kept = dict(state.kept.arrays)
    restored = freezer.restore(tmp_path / "run", first)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    jax.tree.map(np.testing.assert_array_equal, restored.kept.arrays, kept)
    assert not restored.freeze(Frozen(LAYERS)).kept.arrays


@pytest.mark.slow
def test_a_checkpoint_is_restored_into_a_clone_that_another_has_left_behind(tmp_path):
    model, optimizer = make_nnx()
    other, other_optimizer = make_nnx(optax.sgd(0.1, momentum=0.5))
    train_step(other, other_optimizer, X, Y)
    sfj.nnx.Freezer(other, other_optimizer, sfj.policies.never()).save(tmp_path / "other")
    clone, cloned = nnx.clone((model, optimizer))
    train_step(model, optimizer, X, Y)
    optimizer.freeze(model, ["stem"])
    sfj.nnx.Freezer(model, optimizer, sfj.policies.never()).save(tmp_path / "run")
    before, expected, kept = arrays(cloned), arrays(model, optimizer), dict(optimizer.kept.arrays)
    assert cloned.kept is optimizer.kept
    freezer = sfj.nnx.Freezer(clone, cloned, sfj.policies.never())
    with pytest.raises(ValueError, match="does not fit"):
        freezer.restore(tmp_path / "other")
    jax.tree.map(np.testing.assert_array_equal, arrays(cloned), before)
    assert optimizer.kept.version == 1
    freezer.restore(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, arrays(clone, cloned), expected)
    jax.tree.map(np.testing.assert_array_equal, cloned.kept.arrays, kept)
    cloned.freeze(clone, Frozen(cloned.frozen.layers))
    assert not cloned.kept.arrays
