"""A freeze after which the network got worse: it is told, and taken back if asked for."""

from __future__ import annotations

from collections.abc import Callable

import smartfrz_jax as sfj
from train.log import Evaluation, Log, Run
from train.recovery.config import RecoveryConfig


def evaluated(log: Log, evaluation: Evaluation) -> list[str]:
    """Adds an evaluation to the log; the layers whose freeze it is the first after.

    Args:
        log: Of the run.
        evaluation: Of its network as it is now.

    Returns:
        What froze since the evaluation before, and is frozen still; nothing if this is the first.
    """
    before = log.run.evaluations[-1].step if log.run.evaluations else evaluation.step
    log.add(evaluation)
    frozen: dict[str, None] = {}
    for event in log.run.freezes:
        if before <= event.step < evaluation.step:
            frozen |= dict.fromkeys(event.names)
            frozen = {name: None for name in frozen if name not in event.returned}
    return list(frozen)


def has_risen(run: Run, share: float) -> bool:
    """Whether the loss rose by more than a share of it from the last evaluation but one to the last."""
    before, now = (evaluation.metrics["loss"] for evaluation in run.evaluations[-2:])
    return now > (1 + share) * before


def react(
    freezer: sfj.nnx.Freezer, log: Log, evaluation: Evaluation, config: RecoveryConfig, say: Callable[[str], None]
) -> None:
    """Adds an evaluation to the log, and looks whether a freeze since the one before has done harm.

    It has if the loss on the evaluation split rose by more than ``--regression``, a share of it. Then the layers that
    froze since train again under ``--unfreeze-on-regression``, and freeze anew only once the policy has let go of them,
    see :meth:`smartfrz_jax.Freezer.unfreeze_layers`. That depends on nothing but the log and the freezer, so that a run
    that was stopped goes on as it would have.

    Args:
        freezer: Of the run; the step that the evaluation is of was its last.
        log: Of the run.
        evaluation: Of its network as it is now.
        config: How far the loss may rise, and what is done then.
        say: Prints.
    """
    names = [name for name in evaluated(log, evaluation) if name in freezer.frozen.names]
    if not names or not has_risen(log.run, config.regression):
        return
    before, now = (one.metrics["loss"] for one in log.run.evaluations[-2:])
    text = f"warning: the evaluation's loss rose from {before:.4g} to {now:.4g} after {', '.join(names)} froze"
    if not config.unfreeze_on_regression:
        say(f"{text}; --unfreeze-on-regression would let them train again")
        return
    freezer.unfreeze(names)
    log.add(freezer.events[-1])
    say(f"{text}; they train again")
