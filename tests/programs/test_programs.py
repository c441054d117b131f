"""Programs of a train step: which there are, for which batches, and which are let go."""

import gc

import jax
import numpy as np
import pytest
from flax import nnx

import smartfrz_jax as sfj
from tests.support.loops import DEPTH, NAMES, WIDTH, Loop, X, decided, loss_fn

pytestmark = pytest.mark.usefixtures("jax_defaults")


def live_programs() -> int:
    gc.collect()
    return len(jax.devices()[0].client.live_executables())


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.slow
def test_old_programs_and_old_optimizer_state_are_released():
    loop = Loop(decided({}), max_programs=1).run(1)
    programs, arrays = live_programs(), live_bytes()
    one = WIDTH * (WIDTH + 1) * 4
    for n in range(1, DEPTH):
        loop.optimizer.freeze(loop.model, list(NAMES[:n]))
        loop.step(loop.model, loop.optimizer, X)
        assert live_bytes() == arrays - 2 * n * one  # Adam's two moments
    # What moving the optimizer state compiled stays; the steps' programs do not.
    assert len(loop.step.programs) == DEPTH
    assert live_programs() <= programs
    many = Loop(decided({}), max_programs=DEPTH).run(1)
    before = live_programs()
    for n in range(1, DEPTH):
        many.optimizer.freeze(many.model, list(NAMES[:n]))
        many.step(many.model, many.optimizer, X)
    assert live_programs() >= before + DEPTH - 1


@pytest.mark.slow
def test_a_batch_of_another_shape_is_another_program():
    loop = Loop(decided({}))
    for n in (16, 8, 16):
        loop.step(loop.model, loop.optimizer, X[:n])
    assert loop.traces == len(loop.step.programs) == 2


@pytest.mark.slow
def test_programs_are_prepared_for_the_usual_batch_and_not_for_the_last_of_an_epoch():
    loop = Loop(decided({5: NAMES[:1]}), lead=2)
    for n in (16, 16, 16, 8, 16, 16, 16, 16):
        loop.step(loop.model, loop.optimizer, X[:n])
        loop.freezer.step()
    assert [(len(program.frozen.names), program.ahead) for program in loop.step.programs] == [
        (0, False),
        (0, False),
        (1, True),
    ]


@pytest.mark.slow
def test_the_program_in_use_is_not_released():
    loop = Loop(decided({}), max_programs=2)
    for n in (16, 16, 8, 16, 16, 4, 16):
        loop.step(loop.model, loop.optimizer, X[:n])
    assert loop.traces == 3


@pytest.mark.slow
def test_modules_inside_of_other_arguments_are_changed_and_programs_with_them_compiled_ahead():
    loop = Loop(decided({}))
    metric, average = nnx.metrics.Average(), nnx.clone(loop.model)

    def train_step(model, optimizer, others, x):
        loss, grads = optimizer.value_and_grad(loss_fn)(model, x)
        optimizer.update(model, grads)
        others["metric"].update(values=loss)
        nnx.update(others["copies"][0], nnx.state(model))
        return loss

    step = sfj.TrainStep(train_step)
    freezer = sfj.nnx.Freezer(loop.model, loop.optimizer, decided({3: NAMES[:1]}), train_step=step, lead=2)
    for n in range(1, 8):
        step(loop.model, loop.optimizer, {"metric": metric, "copies": [average]}, X)
        freezer.step()
        assert metric.count[...] == n
        assert jax.tree.all(jax.tree.map(np.array_equal, nnx.state(average), nnx.state(loop.model)))
    assert [program.ahead for program in step.programs] == [False, True]
    other = nnx.metrics.Average()
    step(loop.model, loop.optimizer, {"metric": other, "copies": [average]}, X)
    assert (metric.count[...], other.count[...], len(step.programs)) == (7, 1, 2)
