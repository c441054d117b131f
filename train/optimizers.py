"""The optimizers of the training scripts."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import optax

from smartfrz_jax.freezing.returning import Returning
from smartfrz_jax.pytrees.types import PyTree
from train.command_line import check_least

OptimizerName = Literal["sgd", "adamw"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rate."""

    optimizer: OptimizerName = "sgd"
    """the paper's is sgd"""
    learning_rate: float = 0.01
    """at the start; annealed to 0 by a cosine"""
    momentum: float = 0.9
    """of sgd"""
    weight_decay: float = 0.0
    """of kernels and embeddings, not of biases and normalisations"""
    warmup_epochs: float = 0.0
    """in which the learning rate rises from 0"""
    clip: float | None = None
    """largest norm of the gradients of active layers; any without it"""
    returning: Returning | None = None
    """what the optimizer holds of a layer that trains again: nothing, or what it held when the layer froze; without it
    kept of hift, simfreeze and relative_gradient_norm, else fresh"""

    def __post_init__(self) -> None:
        check_least(self, learning_rate=0, momentum=0, weight_decay=0, warmup_epochs=0)
        if self.clip is not None and not 0 < self.clip < float("inf"):
            raise ValueError(f"--clip: got {self.clip}, expected a norm above 0; leave it out for none")


def make_optimizer(
    config: OptimizerConfig, *, epochs: int, total_steps: int, rates: optax.GradientTransformation | None = None
) -> optax.GradientTransformation:
    """SGD with momentum, or AdamW, under a cosine schedule; clipping inside, so that it is over active layers only.

    Args:
        config: The optimizer.
        epochs: Epochs of the whole run.
        total_steps: Its steps.
        rates: What multiplies by the learning rates, in place of the cosine: that of a policy which anneals every layer
            on a schedule of its own.

    Returns:
        The transformation. Make it once: another one is another program.

    Raises:
        ValueError: If the warm-up is longer than the run, or is asked for together with ``rates``.
    """
    warmup = round(config.warmup_epochs * total_steps / epochs)
    if warmup >= total_steps:
        raise ValueError(f"warmup_epochs: got {config.warmup_epochs}, expected fewer than the {epochs} of --epochs")
    if warmup and rates is not None:
        raise ValueError(
            f"warmup_epochs: got {config.warmup_epochs}, expected 0 with --policy freezeout, which has a schedule of "
            "its own for every layer"
        )
    if rates is None:
        peak = config.learning_rate
        rates = optax.scale_by_learning_rate(
            optax.warmup_cosine_decay_schedule(0.0, peak, warmup, total_steps)
            if warmup
            else optax.cosine_decay_schedule(peak, total_steps)
        )
    clip = [] if config.clip is None else [optax.clip_by_global_norm(config.clip)]
    return optax.chain(*clip, *directions(config.optimizer, config.weight_decay or None, config.momentum), rates)


def directions(name: OptimizerName, decay: Any = None, momentum: float = 0.9) -> list[optax.GradientTransformation]:
    """What an optimizer does before the learning rate, to be chained with that.

    Args:
        name: The optimizer.
        decay: Weight decay of kernels and embeddings, a number or a traced one; None for none.
        momentum: Of sgd.
    """
    decayed = [] if decay is None else [optax.add_decayed_weights(decay, _decayed)]
    match name:
        case "sgd":
            return [*decayed, optax.trace(momentum)]
        case "adamw":
            return [optax.scale_by_adam(), *decayed]


def _decayed(params: PyTree) -> PyTree:
    """Kernels and embeddings, not biases and normalisations."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
