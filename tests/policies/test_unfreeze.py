"""Layers that train again by hand, beside every policy of the conformance suite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smartfrz_jax import Freezer
from tests.policies.every_policy import LAYERS, PARAMS, STEPS, X, Y, freezing_policy, outputs, train_step
from tests.policies.test_conformance import bits


class Run:
    """A run that notes what its policy decided."""

    def __init__(self, policy):
        self.decided = []

        def update(*args, **signals):
            names, state = policy.update(*args, **signals)
            self.decided.append(names)
            return names, state

        self.params = PARAMS
        self.freezer = Freezer(policy._replace(update=update), LAYERS, PARAMS)

    def step(self):
        active = jax.tree.map(lambda label: jnp.float32(label == "train"), self.freezer.frozen.labels(PARAMS))
        self.params, grads, loss = train_step(self.params, active, X, Y)
        return self.freezer.observe(
            lambda: self.params,
            grads=self.freezer.frozen.active_leaves(grads),
            features=lambda: outputs(self.params, X),
            loss=loss,
        ).names


def until_first_freeze(case):
    run = Run(case.make())
    while not run.step():
        assert run.freezer.steps < STEPS
    return run


@freezing_policy
def test_what_was_taken_back_trains_on_and_the_policy_decides_about_the_rest(case):
    run = until_first_freeze(case)
    back = set(run.freezer.events[-1].names)
    taken_back = set(back)
    assert run.freezer.unfreeze_layers().names == set()
    assert set(run.freezer.events[-1].returned) == back
    while run.freezer.steps < STEPS:
        before = jax.tree.map(np.asarray, run.params)
        frozen = run.step()
        for name in back:
            assert not np.array_equal(run.params[name]["kernel"], before[name]["kernel"])
        back &= run.decided[-1]  # what the policy lets go of may freeze again
        assert frozen == run.decided[-1] - back
    assert case.returns or case.may_return or back == taken_back


@freezing_policy
@pytest.mark.slow
def test_a_run_that_is_resumed_knows_what_was_taken_back(case, tmp_path):
    run = until_first_freeze(case)
    run.freezer.unfreeze_layers()
    run.freezer.save_run(tmp_path / "run", run.params)
    again = Run(case.make())
    again.params = again.freezer.restore_run(tmp_path / "run", PARAMS)
    for _ in range(3):
        assert again.step() == run.step()
    assert again.freezer.events == run.freezer.events
    assert bits((again.params, again.freezer.policy_state)) == bits((run.params, run.freezer.policy_state))
