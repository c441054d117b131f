"""What holds of every policy, on a small network that really trains."""

import functools
import itertools
import json
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smartfrz_jax import Freezer, Frozen, Policy, find_layers, policies
from smartfrz_jax.pytrees import checkpoint, paths
from tests.policies.every_policy import (
    CASES,
    LAYERS,
    PARAMS,
    STEPS,
    X,
    Y,
    every_policy,
    freezing_policy,
    outputs,
    train_step,
)

KIND = "policy"


class Moment(NamedTuple):
    params: dict
    frozen: Frozen
    state: object


def advance(policy, moment, step):
    """One train step and one update, with the loss and exactly the signals that the policy says it needs."""
    active = jax.tree.map(lambda label: jnp.float32(label == "train"), moment.frozen.labels(PARAMS))
    params, grads, loss = train_step(moment.params, active, X, Y)
    signals = {
        "grads": Frozen(LAYERS, moment.frozen.names).active_leaves(grads),
        "features": lambda: outputs(params, X),
    }
    signals = {name: value for name, value in signals.items() if name in policy.needs} | {"loss": loss}
    names, state = policy.update(moment.state, LAYERS, step=step, params=lambda: params, **signals)
    return Moment(params, Frozen(LAYERS, names), state), signals


def run(policy, first=1, last=STEPS, moment=None):
    moments = [moment or Moment(PARAMS, Frozen(LAYERS), policy.init(LAYERS, PARAMS))]
    for step in range(first, last + 1):
        moments.append(advance(policy, moments[-1], step)[0])
    return moments


@functools.cache
def straight_run(make):
    """A run that several tests compare with, or look at; tuples of what does not change."""
    return tuple(run(make()))


def bits(tree):
    """Structure and leaves, to be compared with ==."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) for leaf in leaves]


@every_policy
@pytest.mark.slow
def test_is_a_policy_with_known_needs(case):
    policy = case.make()
    assert isinstance(policy, Policy)
    assert policy.needs <= {"grads", "features"}


@every_policy
@pytest.mark.slow
def test_state_is_a_pytree_of_arrays(case):
    for moment in run(case.make(), last=6):
        assert all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(moment.state))


@pytest.mark.slow
@every_policy
def test_deterministic(case):
    for a, b in zip(run(case.make()), straight_run(case.make), strict=True):
        assert a.frozen == b.frozen
        assert bits(a.state) == bits(b.state)


@every_policy
@pytest.mark.slow
def test_pure(case):
    policy = case.make()
    moment = Moment(PARAMS, Frozen(LAYERS), policy.init(LAYERS, PARAMS))
    for step in range(1, STEPS + 1):
        before = bits(moment.state)
        after, signals = advance(policy, moment, step)
        assert bits(moment.state) == before
        again = policy.update(moment.state, LAYERS, step=step, params=lambda after=after: after.params, **signals)
        assert (again[0], bits(again[1])) == (after.frozen.names, bits(after.state))
        moment = after


@every_policy
def test_only_known_names_and_what_is_frozen_stays_so_unless_sets_return(case):
    moments = run(case.make(keep=()))
    returned = False
    for before, after in itertools.pairwise(moments):
        returned |= not before.frozen.names <= after.frozen.names
        assert after.frozen.names <= set(LAYERS.names)
        assert type(after.frozen.names) is frozenset
    assert returned == case.returns


@freezing_policy
def test_something_freezes_but_not_the_head(case):
    frozen = straight_run(case.make)[-1].frozen.names
    assert frozen
    assert LAYERS.head not in frozen


@pytest.mark.slow
@freezing_policy
def test_keeps_what_it_is_told_to_keep(case):
    kept = straight_run(case.make)[-1].frozen.names
    name = min(kept)
    for keep in ([name], name, iter([name]), lambda layer: layer.name == name):
        policy = case.make(keep=keep)
        policy.init(LAYERS, PARAMS)  # an iterator is not used up
        assert name not in run(policy)[-1].frozen.names


@pytest.mark.parametrize(
    "name",
    ["freezeout", "freezeout_cubic", "smartfrz", "smartfrz_paper", "progress", "similarity_guided", "random", "badam"],
)
def test_keep_nothing_lets_the_head_freeze(name):
    policy = policies.random(1.0, total_steps=STEPS, keep=()) if name == "random" else CASES[name].make(keep=())
    assert LAYERS.head in run(policy)[-1].frozen.names


@every_policy
def test_decides_only_when_it_says(case):
    moments = run(case.make(keep=()))
    changes = {step for step in range(1, STEPS + 1) if moments[step].frozen != moments[step - 1].frozen}
    assert changes <= case.decides_at


@freezing_policy
def test_refuses_unknown_layers_in_keep(case):
    with pytest.raises(ValueError, match=r"keep: no layer is called 'dense9'; did you mean 'dense"):
        case.make(keep=["dense9"]).init(LAYERS, PARAMS)


@freezing_policy
def test_selectors_in_keep_are_in_the_options_as_text(case):
    assert json.loads(json.dumps(dict(case.make(keep=re.compile("dense.")).options)))["keep"] == [
        "re.compile('dense.')"
    ]


@every_policy
@pytest.mark.parametrize("at", [7, 19])
def test_survives_a_checkpoint(case, at, tmp_path):
    straight = straight_run(case.make)
    checkpoint.write(tmp_path / "state", {"policy": straight[at].state, "step": np.int32([at])}, KIND, {})

    policy = case.make()
    like = checkpoint.with_dropped(tmp_path / "state", policy.init(LAYERS, PARAMS), KIND, prefix="['policy']")
    saved = checkpoint.read(tmp_path / "state", {"policy": like, "step": np.int32([0])}, KIND)
    assert bits(saved["policy"]) == bits(straight[at].state)

    resumed = run(policy, first=at + 1, moment=straight[at]._replace(state=saved["policy"]))
    for a, b in zip(resumed, straight[at:], strict=True):
        assert a.frozen == b.frozen
        assert bits(a.state) == bits(b.state)


@pytest.mark.slow
@every_policy
def test_resumes_on_another_set_of_devices(case, tmp_path):
    """Restored arrays must not insist on the device they were read onto."""
    at = 11
    straight = straight_run(case.make)
    checkpoint.write(tmp_path / "state", {"policy": straight[at].state, "step": np.int32([at])}, KIND, {})
    policy = case.make()
    everywhere = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P())
    params = jax.device_put(PARAMS, everywhere)
    like = checkpoint.with_dropped(tmp_path / "state", policy.init(LAYERS, params), KIND, prefix="['policy']")
    saved = checkpoint.read(tmp_path / "state", {"policy": like, "step": np.int32([0])}, KIND)

    def reset(moment):
        return moment._replace(params=jax.device_put(moment.params, everywhere), state=saved["policy"])

    resumed = run(policy, first=at + 1, moment=reset(straight[at]))
    assert [m.frozen for m in resumed] == [m.frozen for m in straight[at:]]


def observed_step(freezer, params):
    """A train step of what is active, shown to the freezer; returns the new parameters."""
    active = jax.tree.map(lambda label: jnp.float32(label == "train"), freezer.frozen.labels(PARAMS))
    params, grads, loss = train_step(params, active, X, Y)
    grads = freezer.frozen.active_leaves(grads)
    freezer.observe(lambda: params, grads=grads, features=lambda: outputs(params, X), loss=loss)
    return params


@pytest.mark.parametrize("name", ["autofreeze", "similarity_guided", "smartfrz", "progress"])
@pytest.mark.slow
def test_layers_frozen_before_the_run_stay_so_and_others_follow(name):
    before = frozenset({"dense0", "dense3"})
    freezer = Freezer(CASES[name].make(), LAYERS, PARAMS, frozen=Frozen(LAYERS, before))
    params = PARAMS
    for _ in range(STEPS):
        params = observed_step(freezer, params)
        assert before <= freezer.frozen.names
    assert before < freezer.frozen.names


def test_says_which_signal_is_missing():
    made = {name: case.make() for name, case in CASES.items()}
    needy = {name: policy for name, policy in made.items() if policy.needs}
    assert set(needy) == {"autofreeze", "similarity_guided", "simfreeze", "grades", "relative_gradient_norm"}
    for name, policy in needy.items():
        (signal,) = policy.needs
        state = policy.init(LAYERS, PARAMS)
        with pytest.raises(ValueError, match=f"{signal}: the policy '{name}' needs it and got none; pass "):
            policy.update(state, LAYERS, step=1, params=lambda: PARAMS)


def test_update_refuses_a_network_with_other_layers():
    policy = CASES["freezeout"].make()
    state = policy.init(LAYERS, PARAMS)
    fewer = {name: PARAMS[name] for name in ("dense0", "dense1")}
    layers = find_layers(fewer, lambda p, x: x @ p["dense0"]["kernel"] @ p["dense1"]["kernel"], X)
    with pytest.raises(ValueError, match="layers: got 2, but the policy's state is for 6; "):
        policy.update(state, layers, step=1, params=lambda: fewer)


@every_policy
@pytest.mark.slow
def test_goes_on_where_all_layers_are_frozen_by_hand(case):
    freezer = Freezer(case.make(), LAYERS, PARAMS)
    params, everything = PARAMS, Frozen(LAYERS, frozenset(LAYERS.names))
    for step in range(1, STEPS + 1):
        if step >= 7:
            freezer.adopt(everything)  # what the policy had frozen then may return once
        params = observed_step(freezer, params)
    assert case.returns or freezer.frozen == everything


@pytest.mark.slow
@pytest.mark.parametrize("name", ["autofreeze", "grades", "relative_gradient_norm", "slimfit", "lisa"])
@pytest.mark.parametrize("at", [1, 5, 11])
def test_a_run_in_bfloat16_survives_a_checkpoint(name, at, tmp_path):
    def drawn_step(freezer, params, number):
        rng, active = np.random.default_rng(number), freezer.frozen.active_leaves(params)
        grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.bfloat16), PARAMS)
        params = paths.tree_map(lambda name, leaf: leaf * 0.9 if name in active else leaf, params)
        freezer.observe(lambda: params, grads=freezer.frozen.active_leaves(grads))
        return params

    def train(freezer, params, first, last):
        for number in range(first, last + 1):
            params = drawn_step(freezer, params, number)
        return params

    start = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    freezer = Freezer(CASES[name].make(), LAYERS, start)
    params = train(freezer, start, 1, at)
    freezer.save_run(tmp_path / "run", params)
    again = Freezer(CASES[name].make(), LAYERS, start)
    restored = again.restore_run(tmp_path / "run", start)
    assert bits(restored) == bits(params)
    assert bits(again.policy_state) == bits(freezer.policy_state)
    train(freezer, params, at + 1, STEPS)
    train(again, restored, at + 1, STEPS)
    assert again.events == freezer.events
    assert bits(again.policy_state) == bits(freezer.policy_state)
