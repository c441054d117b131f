"""What is compared: freezing policies at several settings, and shorter schedules of equal compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

import smartfrz_jax as sfj

_SHORTER = (0.4, 0.65)
_RATE_FACTORS = (0.5, 1.0, 2.0)
# Of smartfrz: with the default target, and with others.
_OTHERS = ("cka", "own_cka", "swap_harm")
_PREDICTORS = {"smartfrz": "predictor"} | {name: f"{name}_predictor" for name in _OTHERS}
_CAUTION = (0.2, 0.5, 0.8, 0.9, 0.95)
_DECISIONS = 20  # of autofreeze and similarity_guided in a run: four in each of five epochs


class Situation(NamedTuple):
    """What a policy can be made from.

    Attributes:
        total_steps: Train steps of the run.
        costs: Forward FLOPs of every layer.
        reference: Gives the outputs of every layer of a well-trained network on the probe batch.
        predictor: Checkpoint of the predictor that the strategy needs, which has not seen the network; ``None`` if it
            needs none.
        probe: From parameters to the training loss on a fixed batch; ``None`` if nothing may be measured.
        seed: Seed of the run.
    """

    total_steps: int
    costs: Mapping[str, float]
    reference: Callable[[], Mapping[str, jax.Array]]
    predictor: Path | None
    probe: Callable[[Any], Any] | None
    seed: int


class Strategy(NamedTuple):
    """A way to spend less.

    Attributes:
        policy: Makes the policy.
        needs: Name of the predictor that it takes, such as ``predictor`` or ``paper_predictor``.
        freezeout: Whether every layer has the learning rates of FreezeOut.
        length: Steps, as a share of the full run.
        rate: Factor of the learning rate.
    """

    policy: Callable[[Situation], sfj.Policy]
    needs: str | None = None
    freezeout: bool = False
    length: float = 1.0
    rate: float = 1.0


def strategies() -> dict[str, Strategy]:
    """All strategies by name; ``never`` comes first."""
    found = {
        "never": Strategy(lambda situation: sfj.policies.never()),
        "linear": Strategy(lambda situation: sfj.freezeout(total_steps=situation.total_steps, t0=0.5), freezeout=True),
        "autofreeze": Strategy(lambda situation: sfj.autofreeze(max(1, situation.total_steps // _DECISIONS))),
        "similarity_guided": Strategy(
            lambda situation: sfj.policies.similarity_guided(
                situation.reference(), max(1, situation.total_steps // _DECISIONS)
            )
        ),
        "random": Strategy(
            lambda situation: sfj.policies.random(
                0.5, total_steps=situation.total_steps, seed=situation.seed, costs=situation.costs
            )
        ),
    }
    stages: dict[str, Any] = {
        "static:half": [(0.0, 0.5)],
        "static:all": [(0.0, 1.0)],
        "static:half,all": [(0.0, 0.5), (0.5, 1.0)],
        "static:half,all:0.4": [(0.0, 0.5), (0.4, 1.0)],
        "static:half,all:0.6": [(0.0, 0.5), (0.6, 1.0)],
        "static:half,3/4:0.4,all:0.7": [(0.0, 0.5), (0.4, 0.75), (0.7, 1.0)],
    }
    for name, chosen in stages.items():
        found[name] = Strategy(
            lambda situation, chosen=chosen: sfj.static_prefix(
                chosen, total_steps=situation.total_steps, costs=situation.costs
            )
        )
    for caution in _CAUTION:
        found[f"progress:{caution}"] = Strategy(
            lambda situation, caution=caution: sfj.progress(total_steps=situation.total_steps, caution=caution)
        )
        for name, needs in _PREDICTORS.items():
            found[f"{name}:{caution}"] = Strategy(
                lambda situation, caution=caution: _smartfrz(situation, caution, probe=situation.probe),
                needs=needs,
            )
    found["paper"] = Strategy(
        lambda situation: _smartfrz(situation, 0.5, order="any", schedule=sfj.policies.Schedule(patience=1)),
        needs="paper_predictor",
    )
    for length in _SHORTER:
        for rate in _RATE_FACTORS:
            found[f"shorter:{length},{rate}"] = Strategy(
                lambda situation: sfj.policies.never(), length=length, rate=rate
            )
    return found


def _smartfrz(situation: Situation, caution: float, **options: Any) -> sfj.Policy:
    if situation.predictor is None:
        raise ValueError("predictors: smartfrz needs the checkpoint of a predictor; name their folder")
    return sfj.smartfrz(
        sfj.Predictor.restore(situation.predictor),
        total_steps=situation.total_steps,
        caution=caution,
        seed=situation.seed,
        **options,
    )
