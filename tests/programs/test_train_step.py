"""The account of programs: ``step`` and ``cost``."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj


def test_program_cost_is_that_of_the_program():
    a, b = jnp.ones((32, 16)), jnp.ones((16, 8))
    cost = sfj.program_cost(jax.jit(jnp.dot), a, b)
    assert cost.flops == 2 * 32 * 16 * 8
    assert cost.argument_bytes == 4 * (32 * 16 + 16 * 8)
    assert cost.trace_seconds > 0
    assert cost.compile_seconds > 0


def test_program_cost_does_not_compile_twice():
    traces = []

    @jax.jit
    def step(x):
        traces.append(x)
        return x * 2

    sfj.program_cost(step, jnp.ones(3))
    step(jnp.ones(3))
    assert len(traces) == 1


def test_program_cost_needs_a_jitted_function():
    with pytest.raises(TypeError, match=r"step: got function, expected a function made by jax.jit or nnx.jit"):
        sfj.program_cost(lambda x: x, 1.0)


def test_temporary_memory_of_activations_is_counted_and_falls_with_freezing():
    params = {f"l{i}": {"kernel": jnp.eye(64)} for i in range(6)}

    def loss(params, x):
        for layer in params.values():
            x = jnp.tanh(x @ layer["kernel"])
        return x.sum()

    layers = sfj.find_layers(params, loss, jnp.ones((256, 64)))
    cost = [
        sfj.program_cost(
            jax.jit(sfj.value_and_grad(loss, sfj.Frozen(layers, frozenset(layers.names[:n])))),
            params,
            jnp.ones((256, 64)),
        )
        for n in (0, 3, 6)
    ]
    assert cost[0].temp_bytes > cost[1].temp_bytes > cost[2].temp_bytes
    # Three parts of work for each layer but the first, which needs no gradient of its input.
    assert [c.flops / (2 * 256 * 64 * 64) for c in cost] == pytest.approx([17, 6 + 3 + 2, 6], rel=0.03)


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
def test_a_train_step_keeps_one_program_for_each_optimizer_and_frozen_set():
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 1, rngs=nnx.Rngs(1)))
    x = jnp.ones((2, 4))
    layers = sfj.nnx.find_layers(model, x)
    first, second = (sfj.nnx.Optimizer(model, optax.sgd(rate), layers=layers) for rate in (0.1, 0.2))
    traces = []

    def step(model, optimizer, x):
        traces.append(1)
        loss, grads = optimizer.value_and_grad(lambda model: model(x).sum())(model)
        optimizer.update(model, grads)
        return loss

    programs = sfj.TrainStep(step)
    assert float(programs(model, first, x)) != float(programs(model, second, x))
    first.freeze(model, ["layers/0"])
    for optimizer in (first, second, first):
        programs(model, optimizer, x)
    assert [len(program.frozen.names) for program in programs.programs] == [0, 0, 1]
    assert len(traces) == 3
    total = sum(program.cost.trace_seconds + program.cost.compile_seconds for program in programs.programs)
    assert programs.compile_seconds == pytest.approx(total)


def test_a_train_step_needs_something_with_a_frozen_set():
    with pytest.raises(TypeError, match=r"args: none of ArrayImpl has a frozen set"):
        sfj.TrainStep(lambda x: x)(jnp.ones(2))
