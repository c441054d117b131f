"""Freezing in Tunix's ``PeftTrainer``, with or without LoRA; MaxText's post-training builds on it.

>>> freezer = freeze_layers(trainer, policy, batch)  # doctest: +SKIP
>>> trainer.train(batches)  # doctest: +SKIP
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax
from flax import nnx

from smartfrz_jax.callbacks.base import Callback
from smartfrz_jax.freezing import migrate
from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.integrations.tunix_checkpoints import Checkpoints
from smartfrz_jax.layers.find import Granularity
from smartfrz_jax.nnx.accounting import account
from smartfrz_jax.nnx.freezer import Freezer
from smartfrz_jax.nnx.layers import find_layers
from smartfrz_jax.nnx.optimizer import Optimizer
from smartfrz_jax.policies.base import Policy
from smartfrz_jax.programs.train_step import TrainStep
from smartfrz_jax.pytrees import checks, paths
from smartfrz_jax.pytrees.types import PyTree


def freeze_layers(
    trainer: Any,
    policy: Policy,
    batch: Any,
    *,
    lead: int = 0,
    min_saving: float = 0.0,
    granularity: Granularity = "layer",
    callbacks: Iterable[Callback] = (),
) -> Freezer:
    """Lets a policy freeze layers of the model that a ``PeftTrainer`` trains, from its next ``train`` on.

    With nothing frozen every number is that of the trainer alone. Frozen layers leave the backward pass and the
    optimizer's state; the norm of the gradients that the trainer logs is over the active ones. The policy is asked
    after every update of the model: with gradient accumulation, that is after the last batch of it. It sees the loss of
    that batch. Training hooks, data hooks and metrics are the trainer's as before.

    Checkpoints stay as Tunix writes them, with the optimizer state of the whole model (frozen layers have what the
    optimizer starts with), so a trainer without this library goes on from them. What the policy knows lies beside
    them, in a folder with ``-freezing`` behind its name. Make a trainer for the same folder, and call this function
    again, and the run goes on with the frozen set that it had.

    Args:
        trainer: The trainer, with its loss function and whatever else has been set; call this once.
        policy: The policy.
        batch: What the data set yields, an example: it is only traced.
        lead: Steps from a decision to its effect, in which its program is compiled; see :class:`smartfrz_jax.Freezer`.
        min_saving: Share of a step's FLOPs that a change must save.
        granularity: As of :func:`smartfrz_jax.nnx.find_layers`.
        callbacks: What is told of every step and of what freezes; see :mod:`smartfrz_jax.callbacks`.

    Returns:
        The freezer, with the events so far and ``summary()``.

    Raises:
        TypeError: If ``trainer`` is no ``PeftTrainer``, or one with a train step of its own.
        ValueError: If layers cannot be found, or what the policy knew is of another policy or network.
    """
    _check_trainer(trainer)
    wrt = nnx.LoRAParam if trainer._lora_enabled else nnx.Param
    inputs = trainer.gen_model_input_fn(trainer._prepare_inputs(batch))

    def loss_of(model: nnx.Module, inputs: Any) -> jax.Array:
        out = trainer.loss_fn(model, **inputs)
        return out[0] if trainer._has_aux else out

    model, plain = trainer.model, trainer.optimizer
    layers = find_layers(model, inputs, forward=loss_of, granularity=granularity, wrt=wrt)
    costs = account(model, layers, loss_of, inputs, tx=plain.tx, wrt=wrt)
    optimizer = Optimizer(model, plain.tx, wrt=wrt, layers=layers)
    step = TrainStep(functools.partial(_train_step, trainer), account=costs, donate=("optimizer",))
    freezer = Freezer(model, optimizer, policy, train_step=step, lead=lead, min_saving=min_saving, callbacks=callbacks)
    checkpoints = Checkpoints(trainer, freezer, plain.tx)
    frozen = checkpoints.restore()
    _take_over(optimizer, plain, model, frozen)
    trainer.optimizer, trainer.checkpoint_manager = optimizer, checkpoints
    trainer.jit_train_and_eval_step = functools.partial(_steps, trainer, _Step(trainer, freezer, step))
    return freezer


class _Step:
    """The train step of a batch, and after every update of the model the policy's turn."""

    def __init__(self, trainer: Any, freezer: Freezer, step: TrainStep):
        self._trainer, self._freezer, self._step = trainer, freezer, step
        self.programs = step.programs
        # The trainer logs how many programs there are, where functools.partial has its function.
        self.func = types.SimpleNamespace(jitted_fn=types.SimpleNamespace(_cache_size=lambda: len(step.programs)))

    def __call__(self, batch: Any) -> Any:
        out = self._step(self._trainer.model, self._trainer.optimizer, batch)
        batches = self._trainer.config.get_with_default("gradient_accumulation_steps", 1)
        if (self._trainer.iter_steps + 1) % batches == 0:
            self._freezer.step(loss=out[0])
        return out


def _steps(trainer: Any, step: _Step, skip_jit: bool = False, cache_nnx_graph: bool = False) -> tuple[Any, Any]:
    """In place of ``jit_train_and_eval_step``, of which the train step holds on to one frozen set."""
    if skip_jit:
        raise ValueError("skip_jit: got True, expected False; a frozen set saves nothing unless the step is compiled")
    evaluate = nnx.jit(trainer.create_eval_step_fn())
    bound = nnx.cached_partial(evaluate, trainer.model) if cache_nnx_graph else evaluate
    return step, bound if cache_nnx_graph else functools.partial(evaluate, trainer.model)


def _train_step(trainer: Any, model: nnx.Module, optimizer: Optimizer, batch: Any) -> tuple[Any, Any, jax.Array]:
    """Tunix's own, but for gradients and their norm, which are of the active layers."""
    inputs = trainer.gen_model_input_fn(batch)
    grad_fn = optimizer.value_and_grad(trainer.loss_fn, has_aux=trainer._has_aux)
    out, grads = grad_fn(model, **inputs)
    active = [leaf for name, leaf in paths.flatten(grads).items() if name not in optimizer.frozen.params]
    norm = optax.global_norm(active)
    optimizer.update(model, grads)
    loss, aux = out if trainer._has_aux else (out, None)
    return loss, aux, norm


def _take_over(optimizer: Optimizer, plain: nnx.Optimizer, model: nnx.Module, frozen: Frozen) -> None:
    """Gives the optimizer the state that the trainer's own has, from its start or from a checkpoint."""
    params: PyTree = nnx.as_pure(nnx.state(model, optimizer.wrt))
    optimizer.freeze(model, frozen)
    migrated = migrate.migrate_opt_state(nnx.as_pure(plain.opt_state), plain.tx, params, frozen)
    nnx.update(optimizer.opt_state, nnx.state(migrated))
    optimizer.step[...] = plain.step[...]


def _check_trainer(trainer: Any) -> None:
    expected = "a PeftTrainer of tunix.sft.peft_trainer"
    base = next((kind for kind in type(trainer).__mro__ if kind.__name__ == "PeftTrainer"), None)
    if base is None:
        raise TypeError(f"trainer: got {checks.got(trainer)}, expected {expected}")
    own: list[Callable[..., Any]] = [type(trainer)._train_step, type(trainer).create_train_step_fn]
    if own != [base._train_step, base.create_train_step_fn]:
        raise TypeError(
            f"trainer: got a {type(trainer).__name__}, which has a train step of its own, expected {expected}; in a "
            "loop of your own take the gradients from smartfrz_jax.nnx.Optimizer"
        )
    if isinstance(trainer.optimizer, Optimizer):
        raise ValueError(f"trainer: a policy freezes its layers already, expected {expected} as it was made")
