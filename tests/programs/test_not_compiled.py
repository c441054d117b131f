"""Programs that cannot be compiled: the run goes on with the one that it has, and with its frozen set."""

import concurrent.futures
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import smartfrz_jax as sfj
import smartfrz_jax.programs.train_step as step_module
from smartfrz_jax.freezing.freezer import Freezer
from tests.support.loops import NAMES, TX, WIDTH, Loop, X, decided, loss_fn
from tests.support.train_steps import make_step

pytestmark = pytest.mark.usefixtures("jax_defaults")
OUT_OF_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 16 bytes.\nMore.")


def broken(monkeypatch, error, at):
    """Programs are compiled, but for those with these numbers, from 0 on."""
    measure, numbers = step_module.measure, iter(range(100))

    def some(*args):
        if next(numbers) in at:
            raise error
        return measure(*args)

    monkeypatch.setattr(step_module, "measure", some)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "message"),
    [
        pytest.param(OUT_OF_MEMORY, "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of", id="out of memory"),
        pytest.param(ValueError("unknown"), "ValueError: unknown", id="another"),
        pytest.param(SystemExit(3), r"RuntimeError: the thread .* ended by SystemExit\(3", id="thread dies"),
    ],
)
def test_the_run_goes_on_with_what_it_has_and_says_so(monkeypatch, error, message):
    loop = Loop(decided({2: NAMES[:1], 6: NAMES[:2]}), lead=2)
    broken(monkeypatch, error, at=[1])
    loop.run(3)
    with pytest.warns(RuntimeWarning, match=f"freeze layers/0, due after step 4: its .* compiled .{message}") as warned:
        loop.run(1)
    assert len(warned) == 1
    assert "frozen set, nothing. Other decisions are tried" in str(warned[0].message)
    loop.run(6)  # says nothing, for warnings are errors
    assert loop.frozen == [0] * 8 + [2] * 2
    assert loop.freezer.refused == (sfj.Frozen(loop.layers, NAMES[:1]),)
    assert [len(program.frozen.names) for program in loop.step.programs] == [0, 2]
    never = Loop(decided({6: NAMES[:2]}), lead=2).run(10)
    jax.tree.map(np.testing.assert_array_equal, loop.params, never.params)


@pytest.mark.slow
def test_a_resumed_run_knows_what_was_refused(monkeypatch, tmp_path):
    loop = Loop(decided({2: NAMES[:1]}), lead=2)
    broken(monkeypatch, OUT_OF_MEMORY, at=[1])
    with pytest.warns(RuntimeWarning):
        loop.run(4)
    loop.freezer.save(tmp_path / "run")
    again = Loop(decided({2: NAMES[:1]}), lead=2)
    again.freezer.restore(tmp_path / "run")
    assert again.run(6).frozen == [0] * 6


@pytest.mark.slow
def test_in_the_foreground_it_is_an_error_that_can_be_tried_again(monkeypatch):
    loop = Loop(decided({2: NAMES[:1]}))
    broken(monkeypatch, OUT_OF_MEMORY, at=[1])
    loop.run(2)
    before = loop.params
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as caught:
        loop.run(1)
    (note,) = caught.value.__notes__
    assert note.startswith("train_step: the program for <Frozen: 1 of 4 layers: 'layers/0'> could not be compiled; ")
    jax.tree.map(np.testing.assert_array_equal, loop.params, before)
    loop.run(1)
    assert loop.frozen == [0, 0, 1]


@pytest.mark.slow
def test_a_linen_state_stays_as_it_is(monkeypatch):
    params = {name: jnp.eye(WIDTH) * 0.5 for name in "ab"}

    def apply_fn(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    def train_step(state, x):
        loss, grads = state.value_and_grad(lambda params: (state.apply_fn(params, x) ** 2).mean())(state.params)
        return state.apply_gradients(grads=grads), loss

    layers = sfj.find_layers(params, apply_fn, X)
    state = sfj.linen.TrainState.create(apply_fn=apply_fn, params=params, tx=TX, layers=layers)
    step = sfj.TrainStep(train_step)
    freezer = sfj.linen.Freezer(state, decided({1: ("a",)}), train_step=step, lead=1)
    broken(monkeypatch, OUT_OF_MEMORY, at=[1])
    before, _ = step(state, X)
    state, _ = step(freezer.step(before), X)
    with pytest.warns(RuntimeWarning, match="decision to freeze a, due after step 2"):
        state = freezer.step(state)
    assert state.frozen.names == set()
    state, _ = step(state, X)
    assert len(step.programs) == 1


@pytest.mark.slow
def test_a_step_with_kept_activations_goes_on_without_them(monkeypatch):
    loop = Loop(decided({}))
    step = sfj.nnx.CachedStep(make_step, loss_fn, examples=len(X))
    freezer = sfj.nnx.Freezer(loop.model, loop.optimizer, decided({1: NAMES[:1]}), train_step=step, lead=1)
    broken(monkeypatch, OUT_OF_MEMORY, at=[1])
    for number in range(3):
        step(loop.model, loop.optimizer, np.arange(len(X)), X)
        if number == 1:
            with pytest.warns(RuntimeWarning, match="decision to freeze layers/0, due after step 2"):
                freezer.step()
        else:
            freezer.step()
    assert loop.optimizer.frozen.names == set()
    assert step.cache is None
    assert len(step.programs) == 1


PARAMS = {name: jnp.eye(2) for name in "abc"}
LAYERS = sfj.find_layers(PARAMS, lambda params, x: x @ params["a"] @ params["b"] @ params["c"], jnp.ones((1, 2)))


def raising(error):
    def function(*args):
        raise error

    return function


def in_a_bare_loop(prepare, at=None, lead=1, steps=3):
    freezer = Freezer(decided(at or {1: ("a",)}), LAYERS, PARAMS, lead=lead)
    for _ in range(steps):
        freezer.observe(lambda: PARAMS, prepare=prepare)
    return freezer


@pytest.mark.parametrize(
    "prepare", [raising(MemoryError("no room")), lambda frozen: raising(MemoryError("no room"))], ids=["now", "later"]
)
def test_a_bare_loop_says_by_its_function_that_there_is_no_program(prepare):
    with pytest.warns(RuntimeWarning, match=r"freeze a, due after step \d: .*\(MemoryError: no room\), so the run"):
        freezer = in_a_bare_loop(prepare)
    assert freezer.frozen.names == set()
    assert freezer.pending is None
    assert len(freezer.refused) == 1


def test_layers_that_were_to_train_again_stay_frozen():
    def prepare(frozen):
        return None if frozen.names else raising(MemoryError())

    with pytest.warns(RuntimeWarning, match=r"decision to unfreeze a, due .* frozen set, a\. Other"):
        freezer = in_a_bare_loop(prepare, at={1: ("a",), 3: ()}, steps=5)
    assert freezer.frozen.names == {"a"}


def test_mistakes_in_the_function_itself_are_raised():
    with pytest.raises(ZeroDivisionError):
        in_a_bare_loop(raising(ZeroDivisionError()))
    with pytest.raises(TypeError, match="prepare: got int 3, expected it to return None, or a function without"):
        in_a_bare_loop(lambda frozen: 3)


def test_one_of_several_processes_cannot_go_on_alone(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(MemoryError, match="no room") as caught:
        in_a_bare_loop(raising(MemoryError("no room")))
    assert caught.value.__notes__[0].startswith("policy's decision: several processes change to the next program")


@pytest.mark.slow
def test_without_threads_programs_are_compiled_in_the_loop(monkeypatch):
    def no_threads(*args, **kwargs):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, "submit", no_threads)
    loop = Loop(decided({1: NAMES[:1]}), lead=1).run(4)
    assert loop.frozen == [0, 0, 1, 1]


PROGRAM = """
import atexit, sys, threading, time
import smartfrz_jax.programs.train_step as step_module
from tests.support.loops import Loop, NAMES, decided

loop = Loop(decided({{2: NAMES[:1], 9: NAMES[:2]}}), lead=50).run(1)
begun, measure = threading.Event(), step_module.measure

def slow(*args):
    begun.set()
    time.sleep(0.5)
    return measure(*args)

step_module.measure = slow
loop.run(2)
assert begun.wait(30)
{end}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "code", "error"),
    [
        ("sys.exit(3)", 3, ""),
        ("raise KeyError('the only traceback')", 1, "KeyError: 'the only traceback'"),
        ("atexit.register(lambda: print(loop.optimizer.freeze(loop.model, NAMES[:2]), loop.run(1).frozen[-1]))", 0, ""),
    ],
    ids=["exit", "exception", "a step at the exit"],
)
def test_an_interpreter_that_exits_amid_a_compile_does_so_as_if_there_was_none(end, code, error):
    program = textwrap.dedent(PROGRAM).format(end=end)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("Traceback") == (1 if error else 0)
    assert done.stderr.rstrip().endswith(error)
    assert done.stdout.strip() == ("None 2" if "atexit" in end else "")
