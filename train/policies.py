"""The freezing policies of the training scripts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax

import smartfrz_jax as sfj
from smartfrz_jax.predictor.probe import Probe

if TYPE_CHECKING:
    from train.options import Options

PolicyName = Literal[
    "never", "smartfrz", "progress", "freezeout", "autofreeze", "similarity_guided", "static_prefix", "random"
]


def make_policy(
    options: Options,
    *,
    steps_per_epoch: int,
    costs: Mapping[str, float],
    reference: Mapping[str, jax.Array] | None,
    probe: Probe | None = None,
) -> sfj.Policy:
    """The policy that the command line asks for.

    Args:
        options: The command line.
        steps_per_epoch: Train steps of an epoch.
        costs: Forward FLOPs of each layer, for policies with a budget.
        reference: Outputs of the reference network's layers on the probe batch, for ``similarity_guided``.
        probe: From parameters to the training loss on a fixed batch, for ``smartfrz``.

    Returns:
        The policy.

    Raises:
        FileNotFoundError: If the predictor's checkpoint is not there.
        ValueError: If it is damaged, or an option is out of range.
    """
    total_steps = options.epochs * steps_per_epoch
    evaluate_every = max(1, steps_per_epoch // options.evaluations_per_epoch)
    caution: dict[str, Any] = {} if options.caution is None else {"caution": options.caution}
    match options.policy:
        case "never":
            return sfj.policies.never()
        case "smartfrz":
            return sfj.smartfrz(
                _predictor(options.predictor),
                total_steps=total_steps,
                **caution,
                order="any" if options.order == "any" else "front_to_back",
                schedule=sfj.policies.Schedule(patience=options.patience, window=options.window),
                probe=probe,
                seed=options.seed,
            )
        case "progress":
            return sfj.progress(total_steps=total_steps, **caution)
        case "freezeout":
            spacing = "cubic" if options.spacing == "cubic" else "linear"
            return sfj.freezeout(total_steps=total_steps, t0=options.t0, spacing=spacing)
        case "autofreeze":
            return sfj.autofreeze(evaluate_every, percentile=options.percentile)
        case "similarity_guided":
            assert reference is not None
            return sfj.policies.similarity_guided(reference, evaluate_every, tolerance=options.tolerance)
        case "static_prefix":
            return sfj.static_prefix(options.stages, total_steps=total_steps, costs=costs)
        case "random":
            return sfj.policies.random(options.budget, total_steps=total_steps, seed=options.seed, costs=costs)


def _predictor(name: str) -> sfj.Predictor:
    return sfj.Predictor.pretrained(name) if name in ("default", "paper") else sfj.Predictor.restore(name)
