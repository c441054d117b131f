"""Bad input for what compiles a train step, and keeps programs."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import jax
from flax.training import train_state as flax_state

import smartfrz_jax as sfj
from tests.bad_input import scenes
from tests.bad_input.scenes import X, params
from tests.bad_input.table import Case, Door


def train_step(state: Any, x: Any) -> Any:
    value, grads = state.value_and_grad(scenes.loss)(state.params, x)
    return state.apply_gradients(grads=grads), value


@functools.cache
def called() -> sfj.TrainStep:
    step = sfj.TrainStep(train_step)
    step(scenes.train_state(), X)
    return step


DOORS = [
    Door("TrainStep", lambda: {"train_step": train_step}),
    Door("TrainStep.prepare", lambda: {"owner": scenes.train_state(), "new": scenes.train_state()}, on=called),
    Door("program_cost", lambda: {"step": jax.jit(scenes.loss), "args": (params(), X)}),
    Door("enable_compilation_cache", lambda: {"directory": tempfile.mkdtemp()}),
]

CASES = [
    Case("step-jitted", "train_step", TypeError, ("jax.jit", "plain"), lambda: sfj.TrainStep(jax.jit(train_step))),
    Case("step-no-programs", "max_programs", ValueError, ("0", "at least 1"), lambda: step(max_programs=0)),
    Case("step-donates-number", "donate", TypeError, ("int 0", "names of arguments"), lambda: step(donate=[0])),
    Case("step-donates-unknown", "donate", ValueError, ("'params'", "state, x"), lambda: step(donate="params")),
    Case("step-account-flops", "account", TypeError, ("dict", "smartfrz_jax.account"), lambda: step(account={})),
    Case("step-no-state", "args", TypeError, ("dict", "TrainState"), lambda: step()(params(), X)),
    Case("step-plain-state", "args", TypeError, ("frozen set",), lambda: step()(plain_state(), X)),
    Case("step-program-nothing", "args", TypeError, ("frozen set",), lambda: step().program()),
    Case("step-ahead-nothing", "args", TypeError, ("frozen set",), lambda: step().compile_ahead(params(), X)),
    Case("step-early", "owner", ValueError, ("call it first",), lambda: step().prepare(*2 * [scenes.train_state()])),
    Case("step-prepare-set", "new", TypeError, ("Frozen", "TrainState"), lambda: prepared(scenes.frozen("a"))),
    Case("step-prepare-other", "new", TypeError, ("Optimizer", "TrainState"), lambda: prepared(scenes.optimizer())),
    Case("cost-not-jitted", "step", TypeError, ("function", "jax.jit"), lambda: sfj.program_cost(scenes.loss)),
    Case("cache-in-a-file", "directory", OSError, ("/dev/null",), lambda: sfj.enable_compilation_cache("/dev/null")),
    Case(
        "cache-strange", "directory", ValueError, ("s4://b",), lambda: sfj.enable_compilation_cache("s4://b/programs")
    ),
]


def step(**options: Any) -> sfj.TrainStep:
    return sfj.TrainStep(train_step, **options)


def plain_state() -> Any:
    return flax_state.TrainState.create(apply_fn=scenes.forward, params=params(), tx=scenes.TX)


def prepared(new: Any) -> Any:
    return called().prepare(scenes.train_state(), new)
