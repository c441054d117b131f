"""Checkpoints of Tunix's trainer, with what the policy knows beside them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from flax import nnx

from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.nnx.freezer import Freezer
from smartfrz_jax.pytrees.file_paths import as_path


class Checkpoints:
    """In place of a trainer's ``checkpoint_manager``: writes its checkpoints as if nothing had been frozen.

    Args:
        trainer: The trainer.
        freezer: What freezes its layers.
        tx: Its optimizer.
    """

    def __init__(self, trainer: Any, freezer: Freezer, tx: optax.GradientTransformation):
        self._trainer, self._manager, self._freezer, self._tx = trainer, trainer.checkpoint_manager, freezer, tx
        root = trainer.config.checkpoint_root_directory
        beside = None if root is None else as_path(f"{str(root).rstrip('/')}-freezing", "checkpoint_root_directory")
        self._folder = None if beside is None else epath.Path(beside)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def save(self, step: int, model: nnx.Module, optimizer: Any = None, **options: Any) -> bool:
        """As Tunix's own; its optimizer state is that of the whole model."""
        inner = self._manager._checkpoint_manager
        if self._folder is None or inner is None or not (options.get("force") or inner.should_save(step)):
            return False
        if step not in inner.all_steps():
            self._freezer.adopt(self._freezer.optimizer.frozen)
            self._freezer.save_run(self._folder / str(step), {"step": np.int64(step)}, overwrite=True)
        saved = self._manager.save(step, model, None if optimizer is None else self._plain(model), **options)
        there = {str(one) for one in inner.all_steps()}
        if jax.process_index() == 0 and self._folder.exists():
            for other in self._folder.iterdir():
                if other.name not in there:
                    other.rmtree(missing_ok=True)
        return saved

    def restore(self) -> Frozen:
        """Takes up what the policy knew at the step from which the trainer goes on; returns the frozen set."""
        done = self._trainer.train_steps
        if self._folder is None or not (self._folder / str(done)).exists():
            self._freezer.steps = done
            return self._freezer.frozen
        self._freezer.restore_run(self._folder / str(done), {"step": np.int64(0)})
        return self._freezer.frozen

    def _plain(self, model: nnx.Module) -> nnx.Optimizer:
        """The optimizer as the trainer made it."""
        optimizer = self._freezer.optimizer
        plain = nnx.Optimizer(model, self._tx, wrt=optimizer.wrt)
        nnx.update(plain.opt_state, nnx.state(optimizer.unfrozen_opt_state(model)))
        plain.step[...] = optimizer.step[...]
        return plain
