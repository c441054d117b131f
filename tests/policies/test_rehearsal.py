"""Rehearsals: harms against numbers worked out by hand, and networks whose front is as needed, or is not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import smartfrz_jax as sfj

START = np.array([2.0, 2.0, 2.0, 2.0])
NEVER = np.array([1.0, 1.0, 2.0, 0.0])
SOME = np.array([0.1, 0.3, -0.1, 0.1])


class Training:
    """Losses by policy; remembers how it was called."""

    def __init__(self, **losses):
        self.made = {}
        self.losses = losses
        self.calls = []

    def policies(self):
        return {name: functools.partial(self.make, name) for name in self.losses}

    def make(self, name, steps):
        policy = sfj.static_prefix([(0.0, 0.5)], total_steps=steps)
        self.made[id(policy)] = policy, name, steps
        return policy

    def __call__(self, policy, steps):
        _, name, made_for = self.made.get(id(policy), (None, "never", steps))
        self.calls.append((name, made_for, steps))
        if name == "never":
            return START if steps == 0 else NEVER
        return self.losses[name]


def test_harms_by_hand():
    # Learned: 2 - 1 = 1. Differences of "some": .1 .3 -.1 .1, mean .1, standard deviation .163, over 2: .0816.
    train = Training(some=NEVER + SOME, less=NEVER - 0.5)
    rehearsal = sfj.rehearse(train, train.policies(), steps=7)
    assert (rehearsal.steps, rehearsal.start, rehearsal.never) == (7, 2.0, 1.0)
    np.testing.assert_allclose(rehearsal.harms["some"], (0.1, np.sqrt(0.08 / 3) / 2), rtol=1e-12)
    np.testing.assert_allclose(rehearsal.harms["less"], (-0.5, 0.0), atol=1e-12)
    assert train.calls == [("never", 0, 0), ("never", 7, 7), ("some", 7, 7), ("less", 7, 7)]


@pytest.mark.parametrize(
    ("tolerance", "chosen"),
    # Upper ends: a is at -.2, b at .1 + .0816, c at .5.
    [(-0.3, None), (-0.2, "a"), (0.0, "a"), (0.18, "a"), (0.19, "b"), (0.5, "c")],
)
def test_the_last_policy_within_the_tolerance_is_chosen_and_the_error_counts(tolerance, chosen):
    train = Training(a=NEVER - 0.2, b=NEVER + SOME, c=NEVER + 0.5)
    assert sfj.rehearse(train, train.policies(), steps=5, tolerance=tolerance + 1e-9).chosen == chosen


def test_a_number_for_all_examples_has_no_error():
    losses = iter([2.0, jnp.float32(1.0), 0.9])
    rehearsal = sfj.rehearse(lambda policy, steps: next(losses), {"half": lambda steps: sfj.policies.never()}, steps=5)
    assert np.isnan(rehearsal.harms["half"].error)
    assert rehearsal.chosen == "half"


# The standard error of the mean of SOME, .1, is .0816: with .06 more the mean is less than two of them, with .07 more.
@pytest.mark.parametrize("never", [START, START + 0.1, START - SOME - 0.06])
def test_where_nothing_is_learned_nothing_is_chosen(never):
    losses = iter([START, never, START - 1])
    rehearsal = sfj.rehearse(lambda policy, steps: next(losses), {"half": lambda steps: sfj.policies.never()}, steps=5)
    assert rehearsal.chosen is None
    assert np.isnan(rehearsal.harms["half"]).all()


def test_a_little_more_than_the_held_out_examples_leave_in_doubt_is_enough():
    losses = iter([START, START - SOME - 0.07, START - 1])
    rehearsal = sfj.rehearse(lambda policy, steps: next(losses), {"half": lambda steps: sfj.policies.never()}, steps=5)
    assert rehearsal.chosen == "half"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"policies": {}}, "policies: got none"),
        ({"tolerance": float("nan")}, "tolerance: got nan"),
    ],
)
def test_bad_options(options, message):
    train = Training(half=NEVER)
    with pytest.raises(ValueError, match=message):
        sfj.rehearse(**{"train": train, "policies": train.policies(), "steps": 5} | options)
    assert not train.calls


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([START, NEVER[:3]], r"train: got losses of shape \(3,\) with nothing frozen, expected .* \(4,\)"),
        ([START, NEVER, 1.0], r"train: got losses of shape \(1,\) under 'half'"),
        ([START, NEVER, NEVER * np.nan], "train: got a loss that is NaN or infinite under 'half'"),
        ([np.zeros((2, 2))], r"train: got losses of shape \(2, 2\) before the first step"),
        ([np.zeros(0)], r"train: got losses of shape \(0,\)"),
        ([START * np.inf], "NaN or infinite before the first step"),
    ],
)
def test_bad_losses(losses, message):
    losses = iter(losses)
    with pytest.raises(ValueError, match=message):
        sfj.rehearse(lambda policy, steps: next(losses), {"half": lambda steps: sfj.policies.never()}, steps=5)


def student(front):
    """Trains a network with a given front, of a teacher's shape, on what the teacher says."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, held_out = jax.random.normal(keys[0], (2, 128, 8))
    teacher = {"front": jax.random.normal(keys[1], (8, 6)), "head": jax.random.normal(keys[2], (6, 1))}

    def apply(params, x):
        return jnp.tanh(x @ params["front"]) @ params["head"]

    start = {"front": front(teacher["front"]), "head": jnp.zeros((6, 1))}
    layers = sfj.find_layers(start, apply, x)

    @functools.partial(jax.jit, static_argnames="frozen")
    def train_step(params, rate, frozen):
        def loss(params):
            return jnp.square(apply(params, x) - apply(teacher, x)).mean()

        grads = sfj.value_and_grad(loss, frozen)(params)[1]
        return sfj.apply_updates(params, jax.tree.map(lambda grad: -rate * grad, grads), frozen)

    def train(policy, steps):
        params, state, frozen = start, policy.init(layers, start), sfj.Frozen(layers, ())
        for step in range(1, steps + 1):
            params = train_step(params, jnp.float32(0.3 * (1 - (step - 1) / steps)), frozen)
            names, state = policy.update(state, layers, step=step, params=lambda params=params: params)
            frozen = sfj.Frozen(layers, names)
        return jnp.square(apply(params, held_out) - apply(teacher, held_out))[:, 0]

    return train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("front", "chosen"),
    [
        (lambda teacher: teacher, "front"),  # ready: training it can only disturb it
        (lambda teacher: jnp.flip(teacher, 0) * 0.3, None),
    ],
)
def test_a_front_that_is_ready_is_told_from_one_that_is_not(front, chosen):
    from_the_start = {"front": lambda steps: sfj.static_prefix([(0.0, 0.5)], total_steps=steps)}
    rehearsal = sfj.rehearse(student(front), from_the_start, steps=20)
    assert rehearsal.chosen == chosen
    assert abs(rehearsal.harms["front"].harm) > 2 * rehearsal.harms["front"].error > 0
