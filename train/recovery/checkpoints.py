"""The checkpoints of a run: written beside its training by Orbax's manager, and which of them stay."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

import smartfrz_jax as sfj
from smartfrz_jax.pytrees.file_paths import Path
from train.recovery.config import Every, RecoveryConfig

# Several processes look at the clock of the first: that waits for the device.
_CLOCK_STEPS = 16


class Checkpoints:
    """Saves a run while it goes on, and removes what is not to stay.

    A checkpoint is written beside training, and appears under its name when it is whole; only then are others removed.
    All processes of a run make one, and call its methods at the same steps.

    Args:
        folder: Where they are; it is made.
        every: When :meth:`is_due`; never by default.
        keep_last: How many of the newest stay.
        keep_best: How many of the best stay, too.
        figure: Name of the figure that tells which are: higher is better.

    A context manager, which waits for the last one.
    """

    def __init__(
        self, folder: Path, *, every: Every | None = None, keep_last: int = 1, keep_best: int = 0, figure: str = ""
    ):
        from orbax.checkpoint import v1  # takes long to import

        _remove_remains(folder)
        context = v1.Context()
        # Else threads wait for a folder that cannot be made for as long as a save may take.
        context.asynchronous.create_directories_asynchronously = False
        policies = v1.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda figures: figures[figure], n=keep_best, keep_checkpoints_without_metrics=False
        )
        kept = [policies.LatestN(keep_last), *([best] if keep_best else [])]
        self._manager = v1.training.Checkpointer(
            str(folder),
            context=context,
            preservation_policy=policies.AnyPreservationPolicy(kept),  # pyright: ignore[reportArgumentType]
            step_name_format=v1.path.step.standard_name_format(step_format_fixed_length=8),
            cleanup_tmp_directories=True,  # of a run that was killed
        )
        self._every = every or Every()
        self._saving: Any = None
        self._is_broken = False
        self._begun = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether it is time for the next one.

        Args:
            step: Train steps done.
        """
        if self._every.steps:
            return step % self._every.steps == 0
        if not self._every.seconds or (jax.process_count() > 1 and step % _CLOCK_STEPS):
            return False
        passed = time.monotonic() - self._begun >= self._every.seconds
        return bool(multihost_utils.broadcast_one_to_all(np.array(passed))) if jax.process_count() > 1 else passed

    def save(self, freezer: sfj.nnx.Freezer, figures: Mapping[str, float] | None = None) -> None:
        """Begins to write a checkpoint, unless that of this step is there. The arrays may change afterwards.

        Args:
            freezer: The run.
            figures: Of its evaluation at this step, if there was one.

        Raises:
            FloatingPointError: If a weight, or what the optimizer holds of it, is not finite; nothing is written then,
                and what was saved before stays.
            OSError: If the one before could not be written.
        """
        self.wait()
        self._begun = time.monotonic()
        if any(there.step == freezer.steps for there in self._manager.checkpoints):
            return
        contents = freezer.contents()
        if bad := _not_finite(contents.state):
            raise FloatingPointError(
                f"after step {freezer.steps}, {bad} is not finite, so that the run is not saved; lower its rate"
                f"{self._last_good()}"
            )
        try:
            self._saving = self._manager.save_async(
                freezer.steps, **contents._asdict(), force=True, metrics=dict(figures) if figures else None
            )
        except Exception as error:  # Orbax, TensorStore and object stores raise many kinds
            raise self._not_written(error) from error

    def wait(self) -> None:
        """Waits until what is being written is there, whole.

        Raises:
            OSError: If it cannot be written.
        """
        saving, self._saving = self._saving, None
        try:
            if saving is not None:
                saving.result()
        except Exception as error:
            raise self._not_written(error) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            self.wait()
            self._manager.close()
        except Exception:
            if kind is None and not self._is_broken:  # else what ended the run is what is to be told
                raise

    def _not_written(self, error: Exception) -> OSError:
        self._is_broken = True
        text = str(error).splitlines()[0] if str(error) else "no message"
        reason = text.partition(" [tensorstore_spec")[0].rpartition("Failed ")  # TensorStore's reason comes last
        return OSError(
            f"a checkpoint could not be written to {self._manager.directory} ({type(error).__name__}: "
            f"{''.join(reason[1:]):.300}); make room, or see that the folder is there and may be written to"
            f"{self._last_good()}"
        )

    def _last_good(self) -> str:
        self._manager.reload()  # of one that failed it has forgotten those that were to be removed
        latest = self._manager.latest
        return "" if latest is None else f"; the last good checkpoint, of step {latest.step}, is kept for --resume"


def make_checkpoints(config: RecoveryConfig, out: Path, figure: str) -> Checkpoints:
    """Those of a run, as the command line has it.

    Args:
        config: When, and which stay.
        out: The folder of the run.
        figure: Name of the main figure of its evaluations.
    """
    return Checkpoints(
        out / "checkpoints",
        every=config.checkpoint_every,
        keep_last=config.keep_last,
        keep_best=config.keep_best,
        figure=figure,
    )


def _remove_remains(folder: Path) -> None:
    """Removes what a run left behind that was killed while it removed checkpoints; Orbax would stumble over it."""
    if jax.process_index() == 0:
        for path in folder.glob("*"):
            if path.name.isdigit() and not (path / "_CHECKPOINT_METADATA").exists():
                epath.Path(path).rmtree()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("remains are removed")


def _not_finite(state: Mapping[str, Any]) -> str | None:
    """The name of an array of the model or its optimizer that is not finite; the same on every process."""
    names = [name for name in state if name.startswith("['run']")]
    bad = [name for name in names if not all(map(_is_finite, _parts(state[name])))]
    found = [names.index(name) for name in bad[:1]] or [len(names)]
    if jax.process_count() > 1:
        found = [int(np.min(multihost_utils.process_allgather(np.array(found))))]
    return (*names, None)[found[0]]


def _parts(array: Any) -> Iterable[np.ndarray]:
    """What of an array this process holds."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return (np.asarray(shard.data) for shard in array.addressable_shards)
    return (np.asarray(array),)


def _is_finite(array: np.ndarray) -> bool:
    return not jax.numpy.issubdtype(array.dtype, np.inexact) or bool(np.isfinite(array).all())
