"""A freeze after which the network got worse."""

import numpy as np
import pytest

import smartfrz_jax as sfj
from tests.train.recovery.small_run import STEP, STEPS, X, make
from train import log
from train.log import Evaluation
from train.loop import Loop
from train.options import parse
from train.recovery.config import RecoveryConfig
from train.recovery.regression import react

pytestmark = pytest.mark.usefixtures("jax_defaults")


def run(tmp_path, config, losses, saved_at=None, resumed=None):
    """A run whose loss is one thing while nothing is frozen, and another while something is."""
    freezer, said = make("kept"), []
    history = log.Run("static_prefix", freezer.layers.names)
    if resumed is not None:
        freezer.restore(resumed)
        history = log.read(tmp_path / "log.jsonl", until=freezer.steps)
    with log.Log(tmp_path / "log.jsonl", history) as written:
        loop = Loop(written, freezer, STEP)
        for done in loop.run([(X,)] * (STEPS - freezer.steps)):
            if done % 2 == 0:
                loop.drain()
                found = {"accuracy": 0.9, "loss": losses[bool(freezer.frozen.names)]}
                react(freezer, written, Evaluation(done, found), config, said.append)
            if done == saved_at:
                freezer.save(tmp_path / "checkpoint")
    return freezer, log.read(tmp_path / "log.jsonl"), said


def test_it_is_taken_back_once_and_for_all_and_its_moments_come_back(tmp_path):
    config = RecoveryConfig(unfreeze_on_regression=True)
    freezer, history, said = run(tmp_path, config, (0.5, 0.9), saved_at=5)
    assert [(event.step, len(event.names), len(event.returned)) for event in history.freezes] == [(3, 1, 0), (4, 0, 1)]
    assert said == ["warning: the evaluation's loss rose from 0.5 to 0.9 after layers/0 froze; they train again"]
    assert not freezer.frozen.names
    assert freezer.optimizer.kept is not None
    assert not freezer.optimizer.kept.arrays
    again, resumed_history, _ = run(tmp_path, config, (0.5, 0.9), resumed=tmp_path / "checkpoint")
    assert resumed_history.freezes == history.freezes
    for name, array in freezer.contents().state.items():
        np.testing.assert_array_equal(np.asarray(again.contents().state[name]), np.asarray(array), err_msg=name)


@pytest.mark.parametrize(
    ("regression", "losses", "says"),
    [(0.1, (0.5, 0.56), 1), (0.1, (0.5, 0.54), 0), (0.9, (0.5, 0.94), 0), (0.1, (0.9, 0.5), 0), (0.1, (0.0, 0.1), 1)],
)
def test_by_default_it_is_told_and_stays(tmp_path, regression, losses, says):
    freezer, history, said = run(tmp_path, RecoveryConfig(regression=regression), losses)
    assert len(said) == says
    assert all("layers/0 froze; --unfreeze-on-regression would" in text for text in said)
    assert freezer.frozen.names == {"layers/0"}
    assert history.freezes == [sfj.FreezeEvent(3, ("layers/0",), ())]


def test_it_needs_an_optimizer_that_keeps_what_it_holds(capsys):
    arguments = ["--model", "resnet50", "--data", "x", "--data-dir", "y", "--out", "z", "--unfreeze-on-regression"]
    assert parse([*arguments, "--returning", "kept"]).recovery.unfreeze_on_regression
    with pytest.raises(SystemExit):
        parse(arguments)
    assert "--unfreeze-on-regression" in capsys.readouterr().err
