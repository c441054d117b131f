"""The freezing policies of the training scripts."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import optax

import smartfrz_jax as sfj
from smartfrz_jax.freezing.returning import Returning
from smartfrz_jax.predictor.probe import Probe
from smartfrz_jax.pytrees.file_paths import Path
from train.command_line import check_least

PolicyName = Literal[
    "never", "auto", "smartfrz", "progress", "freezeout", "autofreeze", "similarity_guided", "static_prefix",
    "random", "lisa", "badam", "hift", "slimfit", "grades", "simfreeze", "relative_gradient_norm",
]  # fmt: skip

_TURNS: dict[str, Callable[..., sfj.Policy]] = {
    "lisa": sfj.policies.lisa,
    "badam": sfj.policies.badam,
    "hift": sfj.policies.hift,
    "slimfit": sfj.policies.slimfit,
}
_RETURNING_KEPT = frozenset({"hift", "simfreeze", "relative_gradient_norm"})
_BATCHES = 5  # of an epoch, whose gradients relative norms are made of: the paper's
Stages: TypeAlias = tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """What decides when layers freeze."""

    policy: PolicyName = "never"
    """what decides when layers freeze"""
    predictor: str = "default"
    """smartfrz: default or paper, which come with the library, or the path of a checkpoint"""
    caution: float | None = None
    """auto, smartfrz, progress: from 0, save more, to 1, never lose; without it 1 for auto with --weights, else 0.95"""
    order: Literal["front_to_back", "any"] = "front_to_back"
    """smartfrz: whether a layer waits for those before it; the paper's is any"""
    patience: int = 2
    """smartfrz: decisions in a row that it takes; the paper's is 1"""
    window: int = 30
    """smartfrz: records that the predictor sees"""
    t0: float = 0.5
    """freezeout: share of training after which the first layer freezes"""
    spacing: Literal["linear", "cubic"] = "linear"
    """freezeout: of the moments of freezing"""
    evaluations_per_epoch: int | None = None
    """autofreeze, similarity_guided, simfreeze: decisions in an epoch, 4 without it; relative_gradient_norm: 1"""
    percentile: float = 50.0
    """autofreeze: share of active layers taken as converged, in percent"""
    tolerance: float | None = None
    """similarity_guided, simfreeze: change in CKA that counts as none; without it 0.02 and 0.01"""
    reference: Path | None = None
    """similarity_guided: model.safetensors of a finished run of that network"""
    stages: Stages = ((0.0, 0.5),)
    """static_prefix: from which share of training on which share of the forward FLOPs is frozen, such as 0:0.5,0.5:1;
    where the share falls, as in 0:0.5,0.4:0, layers train again"""
    budget: float = 0.5
    """random: share of the forward FLOPs to freeze"""
    switch_every: int | None = None
    """lisa, badam, hift, slimfit: steps of a set; without it 20, 100, 1 and 50"""
    active_blocks: int | None = None
    """lisa, hift: blocks that train at a time; without it 2 and 1"""
    max_sets: int | None = None
    """lisa: different sets that are drawn; without it all that there are"""
    block_order: Literal["ascending", "descending", "random"] | None = None
    """badam, hift: order of the blocks; without it random and ascending"""
    rest: Literal["train", "freeze", "turn"] | None = None
    """lisa, badam, hift: what is in no block trains always, never, or in turn; without it train, freeze and turn"""
    freezing_rate: float = 0.5
    """slimfit: share of the layers to freeze"""
    threshold: float | None = None
    """grades: change of a layer's gradients below which it freezes; relative_gradient_norm: share of the largest norm;
    to be tuned for each network, without it 0.01 and 0.1"""
    grace: float = 0.5
    """grades: share of training in which nothing freezes"""
    lead: int = 20
    """steps from a decision to its effect, in which its program is compiled; less than those of a set that returns"""
    min_saving: float = 0.01
    """share of a step's FLOPs that a new program must save"""

    def __post_init__(self) -> None:
        check_least(self, patience=1, window=1, evaluations_per_epoch=1, switch_every=1, lead=0, min_saving=0)
        if (turns := _TURNS.get(self.policy)) is not None:  # else a set would be over before it took effect
            own = inspect.signature(turns).parameters["switch_every"].default
            object.__setattr__(self, "lead", min(self.lead, (self.switch_every or own) - 1))
        if self.policy == "similarity_guided" and self.reference is None:
            raise ValueError("--policy: got similarity_guided, expected --reference, too; see --help")
        if self.policy != "similarity_guided" and self.reference is not None:
            raise ValueError(
                f"--reference: got {self.reference} for {self.policy}, which reads none, expected --policy "
                "similarity_guided; or leave it out"
            )

    @property
    def returning(self) -> Returning:
        """What the optimizer holds of a layer that trains again, unless the user says."""
        return "kept" if self.policy in _RETURNING_KEPT else "fresh"


def make_policy(
    config: PolicyConfig,
    *,
    epochs: int,
    steps_per_epoch: int,
    seed: int,
    costs: Mapping[str, float],
    reference: Mapping[str, jax.Array] | None,
    pretrained: bool,
    probe: Probe | None = None,
) -> sfj.Policy:
    """The policy.

    Args:
        config: Which one.
        epochs: Epochs of the whole run.
        steps_per_epoch: Train steps of an epoch.
        seed: Of policies that draw.
        costs: Forward FLOPs of each layer, for policies with a budget.
        reference: Outputs on the probe batch of the reference network's layers, for ``similarity_guided``, or of this
            network's before the run, for ``simfreeze``.
        pretrained: Whether the network starts from trained weights, for ``auto``.
        probe: From parameters to the training loss on a fixed batch, for ``smartfrz``.

    Raises:
        FileNotFoundError: If the predictor's checkpoint is not there.
        ValueError: If it is damaged, or an option is out of range.
    """
    total_steps = epochs * steps_per_epoch
    own = 1 if config.policy == "relative_gradient_norm" else 4
    evaluate_every = max(1, steps_per_epoch // (config.evaluations_per_epoch or own))
    caution: dict[str, Any] = {} if config.caution is None else {"caution": config.caution}
    match config.policy:
        case "never":
            return sfj.policies.never()
        case "smartfrz":
            return sfj.smartfrz(
                _predictor(config.predictor),
                total_steps=total_steps,
                **caution,
                order=config.order,
                schedule=sfj.policies.Schedule(patience=config.patience, window=config.window),
                probe=probe,
                seed=seed,
            )
        case "auto":
            return sfj.auto(total_steps=total_steps, costs=costs, pretrained=pretrained, **caution)
        case "progress":
            return sfj.progress(total_steps=total_steps, **caution)
        case "freezeout":
            return sfj.freezeout(total_steps=total_steps, t0=config.t0, spacing=config.spacing)
        case "autofreeze":
            return sfj.autofreeze(evaluate_every, percentile=config.percentile)
        case "similarity_guided":
            assert reference is not None
            return sfj.policies.similarity_guided(reference, evaluate_every, **_given(config, "tolerance"))
        case "simfreeze":
            assert reference is not None
            return sfj.policies.simfreeze(reference, evaluate_every, **_given(config, "tolerance"))
        case "static_prefix":
            return sfj.static_prefix(config.stages, total_steps=total_steps, costs=costs)
        case "random":
            return sfj.policies.random(config.budget, total_steps=total_steps, seed=seed, costs=costs)
        case "lisa":
            chosen = _given(config, "switch_every", "max_sets", "rest", active="active_blocks")
            return sfj.policies.lisa(**chosen, seed=seed)
        case "badam":
            return sfj.policies.badam(**_given(config, "switch_every", "rest", order="block_order"), seed=seed)
        case "hift":
            chosen = _given(config, "switch_every", "rest", group="active_blocks", order="block_order")
            return sfj.policies.hift(**chosen, seed=seed)
        case "slimfit":
            return sfj.policies.slimfit(config.freezing_rate, **_given(config, "switch_every"), seed=seed)
        case "grades":
            threshold = 0.01 if config.threshold is None else config.threshold
            return sfj.policies.grades(threshold, total_steps=total_steps, grace=config.grace)
        case "relative_gradient_norm":
            threshold = 0.1 if config.threshold is None else config.threshold
            batches = min(_BATCHES, evaluate_every)
            return sfj.policies.relative_gradient_norm(threshold, evaluate_every, batches=batches)


def _given(config: PolicyConfig, *same: str, **renamed: str) -> dict[str, Any]:
    """Arguments of a policy that were given: some by their names here, others by the names that they have here."""
    values = {argument: getattr(config, name) for argument, name in ({name: name for name in same} | renamed).items()}
    return {argument: value for argument, value in values.items() if value is not None}


def layer_rates(
    config: PolicyConfig, layers: sfj.Layers, *, learning_rate: float, total_steps: int
) -> optax.GradientTransformation | None:
    """What multiplies by the learning rate of every layer, where the policy has one for each; else None.

    Args:
        config: The policy.
        layers: The network's layers.
        learning_rate: The rate at the start.
        total_steps: Steps of the whole run.
    """
    if config.policy != "freezeout":
        return None
    schedules = sfj.policies.freezeout_schedules(
        layers, learning_rate=learning_rate, total_steps=total_steps, t0=config.t0, spacing=config.spacing
    )
    return sfj.policies.scale_by_layer_schedule(layers, schedules)


def _predictor(name: str) -> sfj.Predictor:
    return sfj.Predictor.pretrained(name) if name in ("default", "paper") else sfj.Predictor.restore(name)
