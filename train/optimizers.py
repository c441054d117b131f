"""The optimizers of the training scripts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import jax
import optax

import smartfrz_jax as sfj
from smartfrz_jax.pytrees.types import PyTree

if TYPE_CHECKING:
    from train.options import Options

OptimizerName = Literal["sgd", "adamw"]


def make_optimizer(options: Options, layers: sfj.Layers, total_steps: int) -> optax.GradientTransformation:
    """SGD with momentum, or AdamW, under a cosine schedule; clipping inside, so that it is over active layers only.

    With the policy ``freezeout`` every layer has the schedule of FreezeOut, which ends when it freezes.

    Args:
        options: The command line.
        layers: The network's layers.
        total_steps: Steps of the whole run.

    Returns:
        The transformation. Make it once: another one is another program.

    Raises:
        ValueError: If the warm-up is longer than the run, or is asked for together with FreezeOut.
    """
    warmup = round(options.warmup_epochs * total_steps / options.epochs)
    if warmup >= total_steps or (warmup and options.policy == "freezeout"):
        raise ValueError(
            f"warmup_epochs: got {options.warmup_epochs} of {options.epochs} epochs with policy {options.policy!r}; "
            "expected fewer than the epochs, and 0 with 'freezeout', which has a schedule of its own for every layer"
        )
    if options.policy == "freezeout":
        schedules = sfj.policies.freezeout_schedules(
            layers,
            learning_rate=options.learning_rate,
            total_steps=total_steps,
            t0=options.t0,
            spacing=options.spacing,  # pyright: ignore[reportArgumentType]  # argparse has checked it
        )
        step = sfj.policies.scale_by_layer_schedule(layers, schedules)
    else:
        peak = options.learning_rate
        rate = (
            optax.warmup_cosine_decay_schedule(0.0, peak, warmup, total_steps)
            if warmup
            else optax.cosine_decay_schedule(peak, total_steps)
        )
        step = optax.scale_by_learning_rate(rate)
    clip = [] if options.clip is None else [optax.clip_by_global_norm(options.clip)]
    return optax.chain(*clip, *directions(options.optimizer, options.weight_decay or None, options.momentum), step)


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
