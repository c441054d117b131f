"""A freezer with a delay: the same decisions, some steps later, without waiting, and also across checkpoints."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import smartfrz_jax as sfj
from smartfrz_jax.policies.two_phase import TwoPhase
from smartfrz_jax.pytrees import hosts
from tests.policies.every_policy import CASES, LAYERS, PARAMS, STEPS, X, Y, outputs, train_step

pytestmark = pytest.mark.usefixtures("jax_defaults")

DELAY = 2
IN_TWO_PHASES = [name for name, case in CASES.items() if case.make().phases is not None]


@functools.cache
def trained():
    """Parameters, gradients and loss after each step of a run in which nothing is frozen."""
    found, params = [], PARAMS
    for _ in range(STEPS):
        params, grads, loss = train_step(params, jax.tree.map(jnp.ones_like, PARAMS), X, Y)
        by_name = {f"{layer}/{kind}": grad for layer, kinds in grads.items() for kind, grad in kinds.items()}
        found.append((params, by_name, loss))
    return found


def freezer_of(policy, delay, **options):
    freezer = sfj.Freezer(policy, LAYERS, PARAMS, **options)
    freezer.delay = delay
    return freezer


def advance(freezer, until):
    """Shows the freezer the steps of that run; returns the names that are frozen after each."""
    names = []
    for params, grads, loss in trained()[freezer.steps : until]:
        frozen = freezer.observe(
            lambda params=params: params, grads=grads, loss=loss, features=lambda params=params: outputs(params, X)
        )
        names.append(frozen.names)
    return names


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * ("smartfrz" in n)) for n in IN_TWO_PHASES])
def test_decisions_are_the_same_but_later(name):
    policy = CASES[name].make()
    at_once, later = (advance(freezer_of(policy, delay), STEPS) for delay in (0, DELAY))
    assert later[DELAY:] == at_once[:-DELAY]
    assert not any(later[:DELAY])
    assert any(later)


def test_which_policies_make_the_loop_wait():
    assert {name.removesuffix("_paper") for name in IN_TWO_PHASES} == {
        "autofreeze", "grades", "relative_gradient_norm", "similarity_guided", "simfreeze", "smartfrz"
    }  # fmt: skip
    assert "slimfit" in CASES.keys() - set(IN_TWO_PHASES)  # read at once


def test_lead_counts_from_what_was_read():
    freezers = [freezer_of(CASES["autofreeze"].make(), delay, lead=3) for delay in (0, DELAY)]
    (first, *_), (later, *_) = ((advance(freezer, STEPS), freezer.events)[1] for freezer in freezers)
    assert later == first._replace(step=first.step + DELAY)


def asking(every):
    """A policy that has the device compute a number every few steps, and freezes layer 0 once it has read 1."""

    def dispatch(state, layers, *, step, params, **signals):
        asked = {"step": jax.device_put(np.int32(step))} if step % every == 0 else None
        return frozenset(["dense0"] if state else []), state, asked

    def conclude(state, layers, readings, *, step):
        assert readings["step"] == step
        state = np.asarray(state + 1, np.int32)
        return frozenset(["dense0"]), state

    return TwoPhase(dispatch, conclude).policy(lambda layers, params: np.zeros((), np.int32), {})


@pytest.mark.parametrize(("every", "delay"), [(5, 0), (5, 1), (5, 4), (1, 3)])
def test_what_is_asked_for_is_read_so_many_steps_later(monkeypatch, every, delay):
    read, fetch = [], hosts.fetch
    freezer = freezer_of(asking(every), delay)

    def noted(values):
        read.append((freezer.steps, int(values["step"])))
        return fetch(values)

    monkeypatch.setattr("smartfrz_jax.pytrees.hosts.fetch", noted)
    advance(freezer, 12)
    asked = range(every, 13 - delay, every)
    assert read == [(step + delay, step) for step in asked]
    assert freezer.policy_state == len(asked)


@pytest.mark.parametrize("at", [4, 5, 9, 16])
@pytest.mark.parametrize("name", ["autofreeze", "smartfrz"])
@pytest.mark.slow
def test_what_is_not_read_yet_is_part_of_a_checkpoint(tmp_path, name, at):
    def freezer():
        return freezer_of(CASES[name].make(), DELAY, lead=1)

    straight, stopped, resumed = freezer(), freezer(), freezer()
    advance(straight, STEPS)
    advance(stopped, at)
    stopped.save_run(tmp_path / "run", {"step": np.asarray(at)})
    resumed.restore_run(tmp_path / "run", {"step": np.asarray(0)})
    assert len(resumed._decisions.readings) == len(stopped._decisions.readings)
    advance(resumed, STEPS)
    assert resumed.events == straight.events != []
    jax.tree.map(np.testing.assert_array_equal, resumed.policy_state, straight.policy_state)


def test_the_cases_above_save_with_something_to_be_read(tmp_path):
    freezer = freezer_of(CASES["autofreeze"].make(), DELAY)
    advance(freezer, 9)
    assert [reading.step for reading in freezer._decisions.readings] == [8]


def test_a_delay_is_a_number_of_steps():
    with pytest.raises(ValueError, match="delay: got -1"):
        advance(freezer_of(CASES["never"].make(), -1), 1)
