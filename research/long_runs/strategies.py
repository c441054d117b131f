"""What is compared: freezing policies, and shorter schedules."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import smartfrz_jax as sfj
from smartfrz_jax.freezing.returning import Returning
from smartfrz_jax.predictor.predictor import Pretrained

KEPT = ",kept"  # ends the name of a strategy that is another one, but for the moments with which layers return
CACHED = ",cached"  # ends the name of one that keeps the activations of its frozen front, of up to three views
CACHED_OF_TWO = ",cached:2"


class Situation(NamedTuple):
    """What a policy can be made from.

    Attributes:
        total_steps: Train steps of the run.
        steps_per_epoch: Train steps of an epoch.
        costs: Forward FLOPs of every layer.
        before: Outputs of every layer on the probe batch before the first step.
        probe: From parameters to the training loss on a fixed batch.
        reference: Outputs of every layer of a network trained to the end on the probe batch; None if there is none yet.
        seed: Seed of the run.
    """

    total_steps: int
    steps_per_epoch: int
    costs: Mapping[str, float]
    before: Callable[[], Mapping[str, Any]]
    probe: Callable[[Any], Any]
    reference: Mapping[str, Any] | None
    seed: int


class Strategy(NamedTuple):
    """A way to spend less.

    Attributes:
        policy: Makes the policy.
        freezeout: The t0 of FreezeOut, where every layer has its learning rates; None where all have one.
        length: Steps, as a share of the full run.
        rate: Factor of the learning rate.
        reference: Whether it needs a network trained to the end.
        returning: What the optimizer starts from for layers that train again.
        begins_frozen: Whether layers are frozen before the first step that train later.
        views: Augmented views of each example, of which the activations of the frozen front are kept, at most: fewer
            in short runs, one where nothing is augmented. 0 keeps none, and augments anew in every epoch.
    """

    policy: Callable[[Situation], sfj.Policy]
    freezeout: float | None = None
    length: float = 1.0
    rate: float = 1.0
    reference: bool = False
    returning: Returning = "fresh"
    begins_frozen: bool = False
    views: int = 0

    @property
    def follows_never(self) -> bool:
        """Whether it takes the very steps of ``never`` until something freezes."""
        return self.freezeout is None and self.length == self.rate == 1.0 and not self.begins_frozen


def _static(*stages: tuple[float, float]) -> Strategy:
    falls = any(later < earlier for (_, earlier), (_, later) in itertools.pairwise(stages))
    return Strategy(lambda s: sfj.static_prefix(stages, total_steps=s.total_steps, costs=s.costs), begins_frozen=falls)


def _auto(caution: float) -> Strategy:
    def policy(s: Situation) -> sfj.Policy:
        return sfj.auto(total_steps=s.total_steps, costs=s.costs, caution=caution)

    return Strategy(policy, begins_frozen=True)


def _smartfrz(name: Pretrained, **options: Any) -> Strategy:
    def policy(s: Situation) -> sfj.Policy:
        predictor = sfj.Predictor.pretrained(name)
        probe = s.probe if name == "default" else None
        return sfj.smartfrz(predictor, total_steps=s.total_steps, seed=s.seed, probe=probe, **options)

    return Strategy(policy)


def _freezeout(t0: float) -> Strategy:
    return Strategy(lambda s: sfj.freezeout(total_steps=s.total_steps, t0=t0), freezeout=t0)


def _autofreeze(evaluations: int) -> Strategy:
    return Strategy(lambda s: sfj.autofreeze(max(1, s.steps_per_epoch // evaluations)))


def _never(length: float = 1.0, rate: float = 1.0) -> Strategy:
    return Strategy(lambda s: sfj.policies.never(), length=length, rate=rate)


def _badam(returning: Returning = "fresh") -> Strategy:
    return Strategy(lambda s: sfj.policies.badam(_turn(s), seed=s.seed), returning=returning, begins_frozen=True)


def _lisa(returning: Returning = "fresh") -> Strategy:
    def policy(s: Situation) -> sfj.Policy:
        return sfj.policies.lisa(2, switch_every=_turn(s), rest="freeze", seed=s.seed)

    return Strategy(policy, returning=returning, begins_frozen=True)


def _turn(situation: Situation) -> int:
    """Steps of a turn: of six blocks, each has five of one alone, and about ten of two together."""
    return max(1, situation.total_steps // 30)


_BATCHES = 5  # of an epoch, whose gradients the paper's relative norms are made of

# What is no longer there, as it was no better (docs/results/long-runs.md); its rows stay.
WITHDRAWN = ("gain:0.25", "gain:0.5", "gain:1", "gain:0.5,apart", "gain:1,apart", "gain:0.5,apart,returns")
# Most valuable first; the queue takes them in this order, and these with all seeds before the others.
_FIRST: dict[str, Strategy] = {
    "never": _never(),
    "static:half": _static((0.0, 0.5)),
    "static:half,all:0.6": _static((0.0, 0.5), (0.6, 1.0)),
    "smartfrz": _smartfrz("default"),
    "paper": _smartfrz("paper", caution=0.5, order="any", schedule=sfj.policies.Schedule(patience=1)),
    "shorter:0.5": _never(0.5),
    "progress": Strategy(lambda s: sfj.progress(total_steps=s.total_steps)),
    "auto:0.95": _auto(0.95),
}
FIRST = len(_FIRST)
# Fronts that train later: gradual unfreezing (arXiv 1801.06146), and linear probing before fine-tuning (2202.10054).
_WAITING = {
    **{f"static:half,none:{until}": _static((0.0, 0.5), (until, 0.0)) for until in (0.35, 0.6, 0.8)},
    **{f"static:three-quarters,none:{until}": _static((0.0, 0.75), (until, 0.0)) for until in (0.6, 0.8)},
    **{
        f"static:three-quarters,half:{half},none:{none}": _static((0.0, 0.75), (half, 0.5), (none, 0.0))
        for half, none in ((0.5, 0.8), (0.65, 0.85), (0.8, 0.9))
    },
    **{f"static:three-quarters,half:{half}": _static((0.0, 0.75), (half, 0.5)) for half in (0.5, 0.6, 0.7)},
    **{
        f"static:three-quarters,half:{half},quarter:{quarter}": _static((0.0, 0.75), (half, 0.5), (quarter, 0.25))
        for half, quarter in ((0.6, 0.8), (0.7, 0.9))
    },
    "static:all,half:0.3,none:0.8": _static((0.0, 1.0), (0.3, 0.5), (0.8, 0.0)),
    "static:all,none:0.5": _static((0.0, 1.0), (0.5, 0.0)),
}
_WITH_ACTIVATIONS = ("static:half", "static:half,all:0.6", "progress", "smartfrz", *_WAITING)
_OF_TWO_VIEWS = ("static:three-quarters,half:0.6", "static:three-quarters,half:0.7")

STRATEGIES: dict[str, Strategy] = {
    **_FIRST,
    **{f"{name}{CACHED}": (_FIRST | _WAITING)[name]._replace(views=3) for name in _WITH_ACTIVATIONS},
    **{f"{name}{CACHED_OF_TWO}": _WAITING[name]._replace(views=2) for name in _OF_TWO_VIEWS},
    "freezeout": _freezeout(0.5),
    "smartfrz:0.5": _smartfrz("default", caution=0.5),
    "progress:0.5": Strategy(lambda s: sfj.progress(total_steps=s.total_steps, caution=0.5)),
    "autofreeze": _autofreeze(4),
    "shorter:0.5,2": _never(0.5, 2.0),
    "static:all:0.5": _static((0.5, 1.0)),
    "similarity_guided": Strategy(
        lambda s: sfj.policies.similarity_guided(_known(s), max(1, s.steps_per_epoch // 4)), reference=True
    ),
    "random": Strategy(lambda s: sfj.policies.random(0.5, total_steps=s.total_steps, seed=s.seed, costs=s.costs)),
    "simfreeze": Strategy(
        lambda s: sfj.policies.simfreeze(s.before(), max(1, s.steps_per_epoch // 4)), returning="kept"
    ),
    "relative_gradient_norm:0.1": Strategy(
        lambda s: sfj.policies.relative_gradient_norm(0.1, max(_BATCHES, s.steps_per_epoch), batches=_BATCHES),
        returning="kept",
    ),
    "static:half,all:0.4": _static((0.0, 0.5), (0.4, 1.0)),
    **_WAITING,
    "static:half,none:0.35,half:0.75": _static((0.0, 0.5), (0.35, 0.0), (0.75, 0.5)),
    "static:quarter": _static((0.0, 0.25)),
    "shorter:0.85": _never(0.85),
    "shorter:0.7": _never(0.7),
    "shorter:0.3": _never(0.3),
    "badam": _badam(),
    f"badam{KEPT}": _badam("kept"),
    "lisa": _lisa(),
    f"lisa{KEPT}": _lisa("kept"),
    # Of the paper's Tables 8 and 9.
    **{f"freezeout:{t0}": _freezeout(t0) for t0 in (0.3, 0.4, 0.6)},
    **{f"autofreeze:{m}": _autofreeze(m) for m in (2, 3, 5)},
}


def _known(situation: Situation) -> Mapping[str, Any]:
    if situation.reference is None:
        raise ValueError("reference: there is none yet; run never with another seed first")
    return situation.reference
