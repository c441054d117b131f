"""Lets a policy freeze the layers of an NNX model."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.extend.core import get_opaque_trace_state

from smartfrz_jax.callbacks.base import Callback, check_callbacks
from smartfrz_jax.freezing import freezer
from smartfrz_jax.freezing.coming import wait_for_all
from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.freezing.saved_run import check_returning, frozen_sets, kept_like
from smartfrz_jax.freezing.summary import Summary
from smartfrz_jax.layers.select import Selectors
from smartfrz_jax.nnx.cached_step import CachedStep
from smartfrz_jax.nnx.layers import check_model
from smartfrz_jax.nnx.optimizer import Optimizer
from smartfrz_jax.policies.base import Policy, check_features, check_policy
from smartfrz_jax.programs import arguments
from smartfrz_jax.programs.train_step import TrainStep
from smartfrz_jax.pytrees import checks, hosts
from smartfrz_jax.pytrees.checkpoint import Contents
from smartfrz_jax.pytrees.file_paths import PathLike
from smartfrz_jax.pytrees.types import PyTree


class Freezer(freezer.Freezer):
    """Lets a policy freeze the layers of an NNX model: call :meth:`step` after every train step.

    Args:
        model: The model.
        optimizer: Its :class:`Optimizer`.
        policy: The policy.
        features: A function of the model to its layers' outputs on a probe batch (see :func:`features`), for policies
            that compare representations.
        train_step: The step, to have the program for what is decided compiled ahead.
        lead: Steps from a decision to its effect; see :class:`smartfrz_jax.Freezer`.
        min_saving: Share of a step's FLOPs that a change must save; the train step's account predicts it.
        callbacks: What is told of every step and of what freezes; see :mod:`smartfrz_jax.callbacks`.

    Raises:
        TypeError: If ``optimizer`` is a plain ``nnx.Optimizer``, or ``policy`` not a policy.
        ValueError: If the optimizer was made for a policy that has other layers frozen from the beginning.
    """

    def __init__(
        self,
        model: nnx.Module,
        optimizer: Optimizer,
        policy: Policy,
        *,
        features: Callable[[nnx.Module], dict[str, jax.Array]] | None = None,
        train_step: TrainStep | CachedStep | None = None,
        lead: int = 0,
        min_saving: float = 0.0,
        callbacks: Iterable[Callback] = (),
    ):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer: got {type(optimizer).__module__}.{type(optimizer).__name__}, expected a smartfrz_jax.nnx."
                "Optimizer; make it in place of nnx.Optimizer, with the same arguments"
            )
        check_model(model)
        check_policy(policy)
        check_features(policy, features)
        checks.instance(train_step, TrainStep | CachedStep | None, "train_step", "a TrainStep or CachedStep")
        frozen, params = optimizer.frozen, _params(model, optimizer.wrt)
        account = None if train_step is None else train_step.account
        super().__init__(
            policy,
            frozen.layers,
            params,
            step=int(optimizer.step[...]),
            frozen=frozen,
            lead=lead,
            min_saving=min_saving,
            saving=None if account is None else account.saving,
        )
        self._begin(optimizer.frozen_by_policy)
        self.callbacks = check_callbacks(callbacks)
        self._tx, self._account = optimizer.unfrozen_tx, account
        self.model, self.optimizer = model, optimizer
        self._features = features
        self._train_step = train_step
        self._last_step = weakref.ref(optimizer.step.get_raw_value())
        self._trace = get_opaque_trace_state(convention="nnx")
        if "grads" in policy.needs:
            optimizer.record_grads(model)

    def start(self) -> Frozen:
        """As :meth:`smartfrz_jax.Freezer.start`; the optimizer holds nothing of frozen layers from then on.

        Layers that were frozen by hand since the freezer was made stay so.
        """
        by_hand = self.optimizer.frozen.names - self.frozen.names
        super().start()
        self._by_hand = self._by_hand.freeze(by_hand)  # also of what the policy has frozen from the beginning
        self.adopt(Frozen(self.layers, self.frozen.names | by_hand))
        self._change(self.frozen)
        return self.frozen

    def compile_ahead(self, steps: int) -> Callable[[], None]:
        """Begins to compile the programs for all frozen sets of the next steps, one after the other in the background.

        For policies that do not look at the network, such as ``lisa`` and ``badam``: a turn then waits for no program.
        Call it after the first step, and give ``TrainStep`` as many ``max_programs`` as there are sets.

        Args:
            steps: Train steps.

        Returns:
            A function without arguments that waits for all. It raises what kept one from being compiled.

        Raises:
            ValueError: If the policy looks at the network, the step was not called yet, or ``steps`` is no number of
                steps.
            TypeError: If the freezer has no ``TrainStep``.
        """
        step: Any = self._train_step
        checks.instance(step, TrainStep, "train_step", "a TrainStep; give the freezer the loop's")
        new = [_abstract(self.model, self.optimizer, each) for each in self.sets_to_come(steps)]
        return functools.partial(wait_for_all, [step.prepare(self.optimizer, one) for one in new])

    def step(self, *, loss: jax.Array | None = None, metrics: Mapping[str, Any] | None = None) -> Frozen:
        """Shows the policy the train step just done, and freezes what it decides.

        Layers that were frozen by hand since the last call stay frozen, whatever the policy decides.

        Args:
            loss: Loss of the step, for policies that look at it; NaN for one that was skipped, which is left out.
            metrics: Further scalars by name, for the callbacks.

        Returns:
            The frozen set from now on.

        Raises:
            TypeError: If it is called in a compiled function, or ``loss`` is no number.
            ValueError: If layers train that the freezer has frozen, or a change is due and the optimizer has made no
                step since the last one: a loop trains a copy of it, such as ``nnx.split`` makes.
        """
        if get_opaque_trace_state(convention="nnx") != self._trace:
            raise TypeError("freezer: is asked in a compiled function, expected after it; call it outside of nnx.jit")
        self.adopt(self.optimizer.frozen)
        model, optimizer, make_features, train_step = self.model, self.optimizer, self._features, self._train_step
        frozen = self.observe(
            lambda: _params(model, optimizer.wrt),
            prepare=None
            if train_step is None
            else lambda new: train_step.prepare(optimizer, _abstract(model, optimizer, new)),
            metrics=metrics,
            loss=loss,
            grads={name: grad[...] for name, grad in optimizer.grads.items()} if optimizer.keep_grads else None,
            features=None if make_features is None else lambda: make_features(model),
        )
        self._freeze(frozen, loss)
        return frozen

    def unfreeze(self, names: Selectors | None = None) -> Frozen:
        """Lets layers train again, at once; see :meth:`smartfrz_jax.Freezer.unfreeze_layers`.

        Args:
            names: The layers; ``None`` takes back the last freeze.

        Returns:
            The frozen set from now on.

        Raises:
            TypeError: If ``names`` selects no layers.
            ValueError: If one of ``names`` is not a layer of the network, ``None`` finds no freeze in this run, or as
                in :meth:`step`.
        """
        self.adopt(self.optimizer.frozen)
        frozen = self.unfreeze_layers(names)
        self._change(frozen)
        return frozen

    def summary(self, *, tx: optax.GradientTransformation | None = None, account: Any = None) -> Summary:
        """As :meth:`smartfrz_jax.Freezer.summary`, with what was frozen by hand since the last step."""
        self.adopt(self.optimizer.frozen)
        return super().summary(tx=tx, account=account)

    def _freeze(self, frozen: Frozen, loss: Any) -> None:
        """Freezes, unless the optimizer has made no step since the last change: then it is a copy of it that trains.

        Or the step was skipped, which is what a loss that is not finite says.
        """
        is_same = frozen != self.optimizer.frozen and self.optimizer.step.get_raw_value() is self._last_step()
        if is_same and (loss is None or np.isfinite(hosts.fetch(loss))):
            raise ValueError(
                "optimizer: has made no step since its frozen set changed last, so the loop trains a copy of it and of "
                "the model, of which the layers to be frozen would go on training; call the step with the model and "
                "the optimizer themselves, or before every call put the loop's state into them, by "
                "nnx.update((model, optimizer), state), and split them again where the frozen set has changed"
            )
        self._change(frozen)

    def _change(self, frozen: Frozen) -> None:
        if frozen != self.optimizer.frozen:
            self.optimizer.freeze(self.model, frozen)
            self._last_step = weakref.ref(self.optimizer.step.get_raw_value())

    def save(self, path: PathLike, *, overwrite: bool = False) -> None:
        """Writes model, optimizer, policy state and frozen set as one Orbax checkpoint.

        Raises:
            FileExistsError: If ``path`` exists and ``overwrite`` is false.
            TypeError: If the policy's state holds what is neither an array nor a number.
            ValueError: As in :meth:`step`.
        """
        self.adopt(self.optimizer.frozen)
        self.save_run(path, self._arrays(), overwrite=overwrite)

    def contents(self) -> Contents:
        """What :meth:`save` writes, for a manager of Orbax's checkpoints that saves beside the training loop.

        Returns:
            ``state``, arrays by name, and ``custom_metadata``: arguments of
            ``orbax.checkpoint.v1.training.Checkpointer.save_async``; :meth:`restore` reads what it writes.

        Raises:
            TypeError: As in :meth:`save`.
            ValueError: As in :meth:`save`.

        Example:
            >>> from orbax.checkpoint import v1  # doctest: +SKIP
            >>> with v1.training.Checkpointer(folder) as checkpointer:  # doctest: +SKIP
            ...     checkpointer.save_async(freezer.steps, **freezer.contents()._asdict())
        """
        self.adopt(self.optimizer.frozen)
        return self.run_contents(self._arrays())

    def restore(self, path: PathLike) -> None:
        """Reads a checkpoint into the model and the optimizer; the run goes on as if it had never stopped.

        Raises:
            FileNotFoundError: If there is no such directory.
            ValueError: If the checkpoint is damaged, or of another network; nothing has changed then.
        """
        optimizer = self.optimizer
        check_returning(path, optimizer.kept)
        before = optimizer.frozen, optimizer.tx, optimizer.opt_state, optimizer.grads, optimizer.kept_version
        try:
            with optimizer.kept.unchanged_on_error() if optimizer.kept else contextlib.nullcontext():
                if optimizer.kept and optimizer.kept_version is not None:  # a clone may have frozen something since
                    optimizer.kept_version = nnx.OptState(optimizer.kept.current(optimizer.kept_version[...]))
                optimizer.freeze(self.model, self.saved_frozen(path))
                like = self._arrays() | ({"kept": kept_like(path)} if optimizer.kept else {})
                arrays = self.restore_run(path, like)
        except Exception:  # not by freezing back, which would initialise returning layers afresh
            optimizer.frozen, optimizer.tx, opt_state, grads, optimizer.kept_version = before
            optimizer.opt_state, optimizer.grads = nnx.data(opt_state), nnx.data(grads)
            raise
        nnx.update(self.model, arrays["model"])
        nnx.update(self.optimizer, arrays["optimizer"])
        if optimizer.kept is not None:
            optimizer.kept.load(arrays["optimizer"]["kept_version"], arrays["kept"])
        if isinstance(self._train_step, CachedStep):
            self._train_step.restored(frozen_sets(self.frozen, self.events))

    def _arrays(self) -> dict[str, Any]:
        arrays = {"model": nnx.as_pure(nnx.state(self.model)), "optimizer": nnx.as_pure(nnx.state(self.optimizer))}
        return arrays if self.optimizer.kept is None else arrays | {"kept": self.optimizer.kept.arrays}


def _params(model: nnx.Module, wrt: nnx.filterlib.Filter) -> PyTree:
    return nnx.as_pure(nnx.state(model, wrt))


def _abstract(model: nnx.Module, optimizer: Optimizer, frozen: Frozen) -> Optimizer:
    """The optimizer as it will be with another frozen set, with shapes, and where they lie, in place of arrays."""
    graphdef, state = nnx.split((model, optimizer))

    def freeze(state: Any) -> Optimizer:
        model, optimizer = nnx.merge(graphdef, state, copy=True)
        optimizer.freeze(model, frozen)
        return optimizer

    new, shapes = nnx.split(nnx.eval_shape(freeze, state))
    before, params = nnx.as_pure(nnx.state(optimizer)), _params(model, optimizer.wrt)
    return nnx.merge(new, arguments.placed(nnx.as_pure(shapes), before, params))
