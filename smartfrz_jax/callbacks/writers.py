"""Ready callbacks: for TensorBoard, Weights & Biases and files of JSON lines."""

from __future__ import annotations

import abc
import importlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import jax

from smartfrz_jax.callbacks.base import FreezeEvent
from smartfrz_jax.pytrees import checks
from smartfrz_jax.pytrees.file_paths import PathLike, as_path, local_path


class Writer(abc.ABC):
    """What the ready callbacks have in common: a context manager, which closes what is written to.

    Where several processes train one network, only the first writes.

    Args:
        every: Of train steps, those whose number it divides are written. To write a value, it waits for the step's end;
            so a loop that must not wait for every step takes a larger number.
    """

    def __init__(self, *, every: int = 1):
        checks.count(every, "every")
        self._every = every
        self._is_first = jax.process_index() == 0

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of a step.

        Raises:
            TypeError: If one is no number.
            ValueError: If one is an array of several.
        """
        checks.count(step, "step", least=0)
        checks.by_name(metrics, "metrics", "a mapping from names to scalars")
        for name, value in metrics.items():
            checks.scalar(value, f"metrics[{name!r}]", "a scalar; pass its mean")
        if self._is_first and step % self._every == 0:
            self._write_step(int(step), {name: float(value) for name, value in metrics.items()})

    def on_freeze(self, event: FreezeEvent) -> None:
        """Writes what froze and what trains again."""
        checks.instance(event, FreezeEvent, "event", "a FreezeEvent, such as a freezer's events have")
        if self._is_first:
            self._write_freeze(event)

    @abc.abstractmethod
    def _write_step(self, step: int, metrics: dict[str, float]) -> None: ...

    @abc.abstractmethod
    def _write_freeze(self, event: FreezeEvent) -> None: ...

    @abc.abstractmethod
    def close(self) -> None:
        """Writes what is left."""

    def __enter__(self):
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class JsonLines(Writer):
    """Writes to a file, a line of JSON each; those of a file that is there stay.

    A step is ``{"event": "step", "step": 3, "metrics": {"loss": 0.5}}``, where a metric that is not finite is ``null``;
    what froze is ``{"event": "freeze", "step": 3, "names": ["stem"], "returned": []}``.

    Args:
        path: The file.
        every: See :class:`Writer`.

    Raises:
        OSError: If it cannot be written.
        ValueError: If it is in an object store, where nothing can be added to a file.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> with JsonLines(path) as callback:
        ...     callback.on_step(1, {"loss": 0.5})
        ...     callback.on_freeze(FreezeEvent(1, ("stem",)))
        >>> print(path.read_text(), end="")
        {"event": "step", "step": 1, "metrics": {"loss": 0.5}}
        {"event": "freeze", "step": 1, "names": ["stem"], "returned": []}
    """

    def __init__(self, path: PathLike, *, every: int = 1):
        super().__init__(every=every)
        self._path = local_path(path)
        if self._is_first:
            self._path.open("a").close()

    def _write_step(self, step: int, metrics: dict[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._write({"event": "step", "step": step, "metrics": finite})

    def _write_freeze(self, event: FreezeEvent) -> None:
        self._write({"event": "freeze"} | event._asdict())

    def _write(self, entry: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")

    def close(self) -> None:
        """Nothing: every line is in the file once it is written."""


class TensorBoard(Writer):
    """Writes for TensorBoard, without TensorFlow: metrics as scalars, what froze as texts named ``freeze``.

    Args:
        folder: Folder of the run, as ``tensorboard --logdir`` finds it.
        every: See :class:`Writer`.
        purge_step: Of a run that goes on from a checkpoint, its next step: TensorBoard hides what was written before of
            that and later ones.

    Raises:
        ImportError: If tensorboardX is not installed.
    """

    def __init__(self, folder: PathLike, *, every: int = 1, purge_step: int | None = None):
        super().__init__(every=every)
        path, purge = os.fspath(as_path(folder, "folder")), {}
        if purge_step is not None:
            checks.count(purge_step, "purge_step", least=0)
            purge = {"purge_step": purge_step}
        self._writer = _optional("tensorboardX", "TensorBoard").SummaryWriter(path, **purge) if self._is_first else None

    def _write_step(self, step: int, metrics: dict[str, float]) -> None:
        assert self._writer is not None
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def _write_freeze(self, event: FreezeEvent) -> None:
        assert self._writer is not None
        for verb, names in (("frozen", event.names), ("training again", event.returned)):
            if names:
                self._writer.add_text("freeze", f"{verb}: {', '.join(names)}", event.step)

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is not None:
            self._writer.close()


class WandB(Writer):
    """Logs to Weights & Biases: metrics under their names, names of layers as ``frozen`` and ``training again``.

    Args:
        every: See :class:`Writer`.
        **options: Those of ``wandb.init``, such as ``project="mine"`` or ``mode="offline"``. A run that the script has
            begun is gone on with.

    Raises:
        ImportError: If wandb is not installed.
    """

    def __init__(self, *, every: int = 1, **options: Any):
        super().__init__(every=every)
        self._run = _optional("wandb", "WandB").init(**options) if self._is_first else None

    def _write_step(self, step: int, metrics: dict[str, float]) -> None:
        assert self._run is not None
        self._run.log(metrics, step=step)

    def _write_freeze(self, event: FreezeEvent) -> None:
        assert self._run is not None
        changes = {"frozen": event.names, "training again": event.returned}
        self._run.log({verb: ", ".join(names) for verb, names in changes.items() if names}, step=event.step)

    def close(self) -> None:
        """Finishes the run of W&B."""
        if self._run is not None:
            self._run.finish()


def _optional(module: str, callback: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{callback}: the package {module} is not here; pip install {module}") from error
