"""More programs take turns than are kept: a warning says so, once, with the cure. And each program knows its reason."""

import jax
import jax.numpy as jnp
import optax
import pytest

import smartfrz_jax as sfj

pytestmark = pytest.mark.usefixtures("jax_defaults")
NAMES = "abc"


def setting(**options):
    params = {name: jnp.ones((2,)) for name in NAMES}

    def apply_fn(params, x):
        return x * params["a"] * params["b"] * params["c"]

    layers = sfj.find_layers(params, apply_fn, jnp.ones((1, 2)))
    state = sfj.linen.TrainState.create(apply_fn=apply_fn, params=params, tx=optax.sgd(0.1), layers=layers)

    def train_step(state, x):
        _, grads = state.value_and_grad(lambda params: apply_fn(params, x).sum())(state.params)
        return state.apply_gradients(grads=grads)

    return state, sfj.TrainStep(train_step, **options)


def subsets(state, number):
    """So many frozen sets."""
    for mask in range(number):
        yield sfj.Frozen(state.frozen.layers, frozenset(name for n, name in enumerate(NAMES) if mask >> n & 1))


def found(recwarn):
    return [str(one.message) for one in recwarn if one.category is sfj.SavingWarning]


@pytest.mark.slow
def test_batch_shapes_in_turn(recwarn):
    state, step = setting()
    for n in range(9):
        step(state, jnp.ones((n + 1, 2)))
    assert not found(recwarn)
    for _ in range(2):
        for n in range(9):
            step(state, jnp.ones((n + 1, 2)))
    (text,) = found(recwarn)
    assert text == (
        "max_programs: got 8, but 9 programs take turns, so they are compiled anew again and again; they are for "
        "batches of 9 shapes, (float32[1,2]), (float32[2,2]), (float32[3,2]), (float32[4,2]), (float32[5,2]) and 4 "
        "more. Cure: keep them all, with max_programs=9; or pad batches to a few shapes, and leave out the last of an "
        "epoch"
    )


@pytest.mark.slow
def test_frozen_sets_in_turn(recwarn):
    state, step = setting(max_programs=2)
    for _ in range(3):
        for frozen in subsets(state, 3):
            step(state.freeze(frozen), jnp.ones((1, 2)))
    (text,) = found(recwarn)
    assert "max_programs: got 2, but 3 programs take turns" in text
    assert "they are for 3 frozen sets, {}, {a}, {b}. Cure: keep them all, with max_programs=3; or let fewer" in text


def test_the_number_that_it_names_is_enough(recwarn):
    state, step = setting(max_programs=3)
    for _ in range(3):
        for frozen in subsets(state, 3):
            step(state.freeze(frozen), jnp.ones((1, 2)))
    assert not found(recwarn)
    assert len(step.programs) == 3


def test_one_program_may_return_after_a_long_while(recwarn):
    state, step = setting(max_programs=2)
    for frozen in (*subsets(state, 4), *subsets(state, 1)):
        for _ in range(2):
            step(state.freeze(frozen), jnp.ones((1, 2)))
    assert len(step.programs) == 5
    assert not found(recwarn)


def on_another_device(state, step):
    step(jax.device_put(state, jax.devices()[1]), jax.device_put(jnp.ones((1, 2)), jax.devices()[1]))


def released(state, step):
    for frozen in (*subsets(state, 3), *subsets(state, 1)):
        step(state.freeze(frozen), jnp.ones((1, 2)))


@pytest.mark.parametrize(
    ("happens", "reason"),
    [
        (
            lambda state, step: step(state, jnp.ones((3, 2))),
            "its batch is (float32[3,2]), not (float32[1,2])",
        ),
        (lambda state, step: step(state.replace(apply_fn=print), jnp.ones((1, 2))), "are not those of before"),
        (on_another_device, "or lie on other devices, than before"),
        (released, "it was released, as more programs take turns than max_programs, 2, allows"),
    ],
)
def test_a_program_for_the_same_frozen_set_has_a_reason(happens, reason):
    state, step = setting(max_programs=2)
    step(state, jnp.ones((1, 2)))
    step(state.freeze(["a"]), jnp.ones((1, 2)))
    assert [program.reason for program in step.programs] == [None, None]
    happens(state, step)
    assert reason in step.programs[-1].reason
