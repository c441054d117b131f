"""Programs compiled ahead: decisions that take effect a fixed number of steps later, whatever the machine's speed."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
import smartfrz_jax.programs.train_step as step_module
from smartfrz_jax.cost.check import SavingWarning
from smartfrz_jax.programs import arguments
from tests.support.loops import DEPTH, NAMES, TX, WIDTH, Loop, X, decided, loss_fn

pytestmark = pytest.mark.usefixtures("jax_defaults")


def slowed(monkeypatch, seconds):
    """Slow compiling; the semaphore that is returned counts the programs that are compiled."""
    measure = step_module.measure
    compiled = threading.Semaphore(0)

    def slow(*args):
        time.sleep(seconds)
        result = measure(*args)
        compiled.release()
        return result

    monkeypatch.setattr(step_module, "measure", slow)
    return compiled


TWICE = {3: NAMES[:1], 8: NAMES[:2]}


@pytest.mark.slow
def test_decisions_take_effect_after_the_lead():
    loop = Loop(decided(TWICE), lead=4).run(20)
    assert loop.frozen == [0] * 7 + [1] * 5 + [2] * 8
    assert [event.step for event in loop.freezer.events] == [7, 12]
    assert loop.freezer.pending is None


@pytest.mark.slow
def test_what_is_decided_meanwhile_waits_for_the_next():
    loop = Loop(decided({3: NAMES[:1], 4: NAMES[:2], 5: NAMES[:3]}), lead=4).run(20)
    assert loop.frozen == [0] * 7 + [1] * 5 + [3] * 8  # the two that came meanwhile are one change, 5 steps later
    assert len(loop.step.programs) == 3


@pytest.mark.slow
@pytest.mark.parametrize("lead", [0, 2, 7])
def test_the_speed_of_compiling_changes_nothing(monkeypatch, lead):
    fast = Loop(decided(TWICE), lead=lead).run(20)
    with monkeypatch.context() as patched:
        slowed(patched, 0.3)
        slow = Loop(decided(TWICE), lead=lead).run(20)
    assert slow.frozen == fast.frozen
    assert slow.freezer.events == fast.freezer.events
    jax.tree.map(np.testing.assert_array_equal, slow.params, fast.params)


@pytest.mark.slow
def test_programs_are_compiled_in_the_background_once():
    loop = Loop(decided(TWICE), lead=3)
    threads = []
    measure = step_module.measure

    def noted(*args):
        threads.append(threading.current_thread() is threading.main_thread())
        return measure(*args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(step_module, "measure", noted)
        loop.run(20)
    assert threads == [False] * 3  # also of the first, which the loop waits for
    assert [program.ahead for program in loop.step.programs] == [False, True, True]
    assert loop.traces == 3


@pytest.mark.slow
def test_waiting_is_known(monkeypatch):
    compiled = slowed(monkeypatch, 0.6)
    waiting = Loop(decided({2: NAMES[:1]}), lead=1).run(6)
    _, late = waiting.step.programs
    assert late.waited > 0.5
    assert waiting.step.wait_seconds == pytest.approx(sum(program.waited for program in waiting.step.programs))

    ready = Loop(decided({2: NAMES[:1]}), lead=3).run(4)
    assert ready.freezer.pending is not None
    for _ in range(4):
        assert compiled.acquire(timeout=60)
    ready.run(3)
    _, early = ready.step.programs
    assert early.waited - early.cost.trace_seconds < 0.3


@pytest.mark.slow
def test_small_savings_are_gathered():
    one_by_one = {i: NAMES[:i] for i in range(1, DEPTH)}
    shares = Loop(decided({}), account=True)
    sets = [sfj.Frozen(shares.layers, frozenset(NAMES[:i])) for i in range(DEPTH)]
    saving = shares.step.account.saving
    assert saving(sets[1]) < saving(sets[2], sets[1]) < saving(sets[2])
    between = saving(sets[2], sets[1]) + 0.01
    assert saving(sets[3], sets[2]) > between  # it is relative to the step as it is by then
    loop = Loop(decided(one_by_one), account=True, min_saving=between).run(6)
    assert loop.frozen == [0, 0, 2, 3, 3, 3]
    assert len(loop.step.programs) == 3
    assert len(Loop(decided(one_by_one), account=True).run(6).step.programs) == DEPTH
    more = Loop(decided(one_by_one), account=True, min_saving=0.95).run(6)
    assert set(more.frozen) == {0}


@pytest.mark.slow
def test_layers_return_at_once_however_little_is_saved():
    loop = Loop(decided({1: NAMES[:3], 4: NAMES[:1]}), account=True, min_saving=0.3).run(6)
    assert loop.frozen == [0, 3, 3, 3, 1, 1]
    assert loop.freezer.events[-1] == (4, (), NAMES[1:3])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(loop.params))


@pytest.mark.slow
def test_returning_layers_are_compiled_ahead_too():
    loop = Loop(decided({1: NAMES[:3], 4: NAMES[:1]}), lead=2).run(10)
    assert loop.frozen == [0] * 3 + [3] * 3 + [1] * 4
    assert loop.traces == 3
    assert [program.ahead for program in loop.step.programs] == [False, True, True]


@pytest.mark.slow
def test_a_restored_run_goes_on_with_what_is_pending(tmp_path):
    straight = Loop(decided(TWICE), lead=4).run(20)
    first = Loop(decided(TWICE), lead=4).run(5)
    assert first.freezer.pending == (7, sfj.Frozen(first.layers, frozenset(NAMES[:1])))
    first.freezer.save(tmp_path / "run")
    second = Loop(decided(TWICE), lead=4)
    second.freezer.restore(tmp_path / "run")
    assert second.freezer.pending == first.freezer.pending
    second.run(15)
    assert first.frozen + second.frozen == straight.frozen
    assert [program.ahead for program in second.step.programs] == [False, True, True]
    jax.tree.map(np.testing.assert_array_equal, second.params, straight.params)


@pytest.mark.slow
def test_a_linen_state_too():
    params = {name: jnp.eye(WIDTH) * 0.5 for name in "abc"}

    def apply_fn(params, x):
        for name in "abc":
            x = jnp.tanh(x @ params[name])
        return x

    layers = sfj.find_layers(params, apply_fn, X)
    state = sfj.linen.TrainState.create(apply_fn=apply_fn, params=params, tx=TX, layers=layers)
    traces = []

    def train_step(state, x):
        traces.append(1)
        loss, grads = state.value_and_grad(lambda params: (state.apply_fn(params, x) ** 2).mean())(state.params)
        return state.apply_gradients(grads=grads), loss

    step = sfj.TrainStep(train_step)
    freezer = sfj.linen.Freezer(state, decided({2: ("a",), 6: ("a", "b")}), train_step=step, lead=2)
    frozen = []
    for _ in range(12):
        state, loss = step(state, X)
        frozen.append(len(state.frozen.names))
        state = freezer.step(state, loss=loss)
    assert frozen == [0] * 4 + [1] * 4 + [2] * 4
    assert [program.ahead for program in step.programs] == [False, True, True]
    assert len(traces) == 3


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, True])
def test_a_saving_that_does_not_come_is_reported_once(wrong, recwarn):
    loop = Loop(decided({}), account=True)

    def train_step(model, optimizer, x):
        grad_fn = (nnx.value_and_grad if wrong else optimizer.value_and_grad)(loss_fn)
        loss, grads = grad_fn(model, x)
        optimizer.update(model, grads)
        return loss, optax.tree.norm(grads)

    step = sfj.TrainStep(train_step, account=loop.step.account)
    for n in range(3):
        loop.optimizer.freeze(loop.model, list(NAMES[:n]))
        step(loop.model, loop.optimizer, X)
    found = [warning for warning in recwarn if warning.category is SavingWarning]
    assert len(found) == wrong
    if wrong:
        assert "layers/0" in str(found[0].message)
        assert "norm" in str(found[0].message)


def test_errors():
    loop = Loop(decided({}))
    with pytest.raises(ValueError, match="owner: the step was not called yet"):
        loop.step.prepare(loop.optimizer, loop.optimizer)
    with pytest.raises(ValueError, match="max_programs: got 0"):
        Loop(decided({}), max_programs=0)
    with pytest.raises(ValueError, match="lead: got -1"):
        Loop(decided({}), lead=-1)
    with pytest.raises(ValueError, match=r"min_saving: got 1\.0, expected a share"):
        Loop(decided({}), account=True, min_saving=1.0)
    with pytest.raises(ValueError, match=r"min_saving: got 0.1, but nothing predicts .* give TrainStep the account"):
        Loop(decided({}), min_saving=0.1)
    with pytest.raises(TypeError, match=r"train_step: got <lambda> jitted by jax\.jit, expected the plain function"):
        sfj.TrainStep(jax.jit(lambda x: x))


def test_new_state_is_placed_by_the_whole_name_of_its_parameter():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P("data"), jax.P()))

    def shape(sharding=None):
        return jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)

    params = {"proj": shape(split), "z_proj": shape(whole), "block": {"proj": shape(whole)}, "last": shape(split)}
    shapes = {"trace": jax.tree.map(lambda _: shape(), params), "other": {"at_last": shape()}}
    placed = arguments.placed(shapes, {}, params)
    assert jax.tree.map(lambda leaf: leaf.sharding, placed["trace"]) == jax.tree.map(lambda leaf: leaf.sharding, params)
    assert placed["other"]["at_last"].sharding is None
    assert arguments.placed(params, {}, params) == params  # the name may be that of a parameter itself


@pytest.mark.slow
def test_sharded_runs_are_compiled_ahead_for_the_same_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.NamedSharding(mesh, jax.P("data"))
    whole = jax.NamedSharding(mesh, jax.P())
    plain = Loop(decided({3: NAMES[:2], 7: NAMES[:1]}), lead=2).run(12)
    loop = Loop(decided({3: NAMES[:2], 7: NAMES[:1]}), lead=2)
    for module in (loop.model, loop.optimizer):
        nnx.update(module, jax.device_put(nnx.state(module), whole))
    x = jax.device_put(X, over)
    for _ in range(12):
        loop.step(loop.model, loop.optimizer, x)
        loop.freezer.step()
    assert [program.ahead for program in loop.step.programs] == [False, True, True]
    assert loop.traces == 3
    for leaf in jax.tree.leaves((nnx.state(loop.model), nnx.state(loop.optimizer))):
        assert leaf.sharding.device_set == whole.device_set
    for ours, expected in zip(jax.tree.leaves(loop.params), jax.tree.leaves(plain.params), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
