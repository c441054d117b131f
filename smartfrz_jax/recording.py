"""What is recorded while a network trains again beside its well-trained reference: the predictor's training data.

A data set is a directory. Each recording, one training run, is a compressed NumPy archive in it, ``<name>.npz``, which
``numpy.load(path, allow_pickle=False)`` reads. Its arrays are

===================  =========================================  ==================================================
``format_version``   int64, ``()``                              1
``layers``           unicode, ``(layers,)``                     layer names, front to back
``steps``            int64, ``(records,)``                      train steps done at each record, ascending
``weights``          float32, ``(records, layers, size)``       tailored weights
``cka``              float32, ``(records, layers)``             linear CKA of a layer's output with the reference's
``total_steps``      int64, ``()``                              train steps of the whole run
``metadata``         unicode, ``()``                            a JSON object: architecture, data set, seed, ...
===================  =========================================  ==================================================

A data set grows by adding files; files that are there are never written to.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smartfrz_jax.cka import layer_cka
from smartfrz_jax.layers import Layers
from smartfrz_jax.tailoring import Tailoring

if TYPE_CHECKING:
    import jax
    from jaxtyping import Float, Int

PyTree = Any

FORMAT_VERSION = 1

_DTYPES = {"steps": np.int64, "weights": np.float32, "cka": np.float32}


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
    """One training run beside its reference.

    Attributes:
        layers: Layer names, front to back.
        steps: Train steps done at each record, ascending, int64 of shape ``(records,)``.
        weights: Tailored weights, float32 of shape ``(records, layers, size)``.
        cka: CKA of each layer's output with the reference's, float32 of shape ``(records, layers)``.
        total_steps: Train steps of the whole run.
        metadata: Anything that JSON can hold: architecture, data set, schedule, seed.

    Raises:
        ValueError: If shapes do not fit, steps do not ascend or exceed ``total_steps``, a weight or CKA is NaN or
            infinite, or ``metadata`` is not for JSON.
        TypeError: If an array has a dtype of another kind.
    """

    layers: tuple[str, ...]
    steps: Int[np.ndarray, " records"]
    weights: Float[np.ndarray, "records layers size"]
    cka: Float[np.ndarray, "records layers"]
    total_steps: int
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "total_steps", int(self.total_steps))
        for field, dtype in _DTYPES.items():
            array = np.asarray(getattr(self, field))
            if not np.can_cast(array.dtype, dtype, "same_kind"):
                raise TypeError(f"{field}: got dtype {array.dtype}, expected {np.dtype(dtype)}")
            object.__setattr__(self, field, array.astype(dtype, copy=False))
        object.__setattr__(self, "metadata", json.loads(_json(self.metadata)))
        records, layers = len(self.steps) if self.steps.ndim else 0, len(self.layers)
        if not records or not layers or self.steps.ndim != 1:
            raise ValueError(
                f"steps, layers: got steps of shape {self.steps.shape} and {layers} layers, "
                "expected a vector of at least one step and at least one layer"
            )
        if self.weights.ndim != 3 or self.weights.shape[:2] != (records, layers) or not self.weights.shape[2]:
            raise ValueError(
                f"weights: got shape {self.weights.shape}, expected ({records}, {layers}, size): "
                f"{records} records of {layers} layers, at least one weight each"
            )
        if self.cka.shape != (records, layers):
            raise ValueError(
                f"cka: got shape {self.cka.shape}, expected {(records, layers)}, as steps and layers have it"
            )
        _check_ascending(self.steps)
        _check_finite(self.layers, self.steps, self.weights, self.cka)
        if self.total_steps < self.steps[-1]:
            raise ValueError(
                f"total_steps: got {self.total_steps}, expected at least the last recorded step, {self.steps[-1]}"
            )


class Recorder:
    """Records tailored weights and CKA of a network while it trains.

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax import Tailoring, find_layers
        >>> params = {"a": {"kernel": jnp.eye(2)}}
        >>> layers = find_layers(params, lambda p, x: x @ p["a"]["kernel"], jnp.eye(2))
        >>> recorder = Recorder(layers, Tailoring.create(layers, params, size=8), {"a": jnp.eye(2)})
        >>> recorder.record(10, params, {"a": jnp.eye(2)})
        >>> recorder.finish(20, seed=0).weights.shape
        (1, 1, 8)
    """

    def __init__(self, layers: Layers, tailoring: Tailoring, reference_features: Mapping[str, jax.Array]):
        """Starts with no records.

        Args:
            layers: The network's layers.
            tailoring: Their tailoring.
            reference_features: Output of each layer of the well-trained network on the probe batch, by layer name.

        Raises:
            ValueError: If ``tailoring`` is for other layers, or a layer's reference output is missing.
        """
        if tailoring.layers != layers:
            raise ValueError(
                f"tailoring: made for other layers ({len(tailoring.layers)} from {tailoring.layers.names[0]!r} on) "
                f"than layers ({len(layers)} from {layers.names[0]!r} on); make it with Tailoring.create(layers, ...)"
            )
        self.layers = layers
        self.tailoring = tailoring
        self.reference_features = _of_layers(layers, reference_features, "reference_features")
        self._steps: list[int] = []
        self._weights: list[np.ndarray] = []
        self._cka: list[np.ndarray] = []

    def record(self, step: int, params: PyTree, features: Mapping[str, jax.Array]) -> None:
        """Adds a record.

        Args:
            step: Train steps done.
            params: The network's parameters after that step.
            features: Output of each of its layers on the probe batch, by layer name; others are ignored.

        Raises:
            ValueError: If ``step`` does not ascend, a layer's output is missing or of another number of examples than
                the reference's, or a weight or CKA is NaN or infinite. Nothing is recorded then.
        """
        _check_ascending(np.array([*self._steps[-1:], step]))
        cka = np.asarray(layer_cka(_of_layers(self.layers, features, "features"), self.reference_features))
        weights = np.asarray(self.tailoring(params))
        _check_finite(self.layers.names, np.array([step]), weights[None], cka[None])
        self._steps.append(step)
        self._weights.append(weights)
        self._cka.append(cka)

    def finish(self, total_steps: int, **metadata: Any) -> Recording:
        """The records so far.

        Args:
            total_steps: Train steps of the whole run.
            **metadata: Anything that JSON can hold: architecture, data set, schedule, seed.

        Raises:
            ValueError: If nothing was recorded, or as :class:`Recording` does.
        """
        if not self._steps:
            raise ValueError(
                "finish: nothing was recorded; call record(step, params, features) while the network trains"
            )
        return Recording(
            layers=self.layers.names,
            steps=np.array(self._steps, np.int64),
            weights=np.stack(self._weights),
            cka=np.stack(self._cka),
            total_steps=total_steps,
            metadata=metadata,
        )


def save(recording: Recording, directory: str | Path, name: str) -> Path:
    """Adds a recording to a data set. The file appears complete or not at all.

    Args:
        recording: The recording.
        directory: The data set; made if it does not exist.
        name: Name of the file, without ``.npz``.

    Returns:
        Path of the file.

    Raises:
        FileExistsError: If the data set has a recording of that name.
        ValueError: If ``name`` is not a plain file name.
    """
    if not name or Path(name).name != name or name.startswith("."):
        raise ValueError(f"name: got {name!r}, expected a file name without directories, such as 'resnet18-cifar10-0'")
    directory = Path(directory)
    target = directory / f"{name}.npz"
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{name}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            np.savez_compressed(
                file,
                format_version=np.int64(FORMAT_VERSION),
                layers=np.array(recording.layers),
                steps=recording.steps,
                weights=recording.weights,
                cka=recording.cka,
                total_steps=np.int64(recording.total_steps),
                metadata=np.array(_json(recording.metadata)),
            )
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            raise FileExistsError(
                f"name: {target} exists, and recordings are not overwritten; choose another name or delete the file"
            )
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def load(directory: str | Path) -> list[Recording]:
    """Reads all recordings of a data set.

    Args:
        directory: The data set.

    Returns:
        The recordings, in the order of their file names.

    Raises:
        FileNotFoundError: If there is no such directory, or no recording in it.
        ValueError: If a file is damaged, or of another version of the format.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"directory: there is no directory {directory}; expected a data set of recordings")
    files = sorted(directory.glob("*.npz"))
    if not files:
        raise FileNotFoundError(f"directory: {directory} holds no recordings (*.npz); add some with save(...)")
    return [_read(file) for file in files]


def _read(path: Path) -> Recording:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
        version = int(arrays["format_version"])
    except Exception as error:  # NumPy and zipfile raise many kinds for damaged files
        raise ValueError(_damaged(path, error)) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"directory: {path} has format version {version}, expected {FORMAT_VERSION}; "
            "read it with the version of smartfrz_jax that wrote it"
        )
    try:
        return Recording(
            layers=tuple(arrays["layers"].tolist()),
            steps=arrays["steps"],
            weights=arrays["weights"],
            cka=arrays["cka"],
            total_steps=int(arrays["total_steps"]),
            metadata=json.loads(str(arrays["metadata"])),
        )
    except Exception as error:  # as above, and what Recording refuses
        raise ValueError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    return (
        f"directory: {path} is not a complete recording ({type(error).__name__}: {error}); restore another copy, or "
        "delete it and record that run again"
    )


def _of_layers(layers: Layers, features: Mapping[str, jax.Array], argument: str) -> dict[str, jax.Array]:
    """The outputs of the layers, in their order."""
    missing = [name for name in layers.names if name not in features]
    if missing:
        raise ValueError(
            f"{argument}: lacks the output of {len(missing)} of {len(layers)} layers: {', '.join(map(repr, missing))}; "
            "dataflow.tapped makes a function that gives them all"
        )
    return {name: features[name] for name in layers.names}


def _check_ascending(steps: np.ndarray) -> None:
    if steps.dtype.kind not in "iu":
        raise TypeError(f"step: got {steps[-1]!r}, expected an integer, the number of train steps done")
    if steps[0] < 0:
        raise ValueError(f"step: got {steps[0]}, expected 0 or more, the number of train steps done")
    for index in np.flatnonzero(np.diff(steps) <= 0)[:1]:
        raise ValueError(
            f"step: got {steps[index + 1]} after {steps[index]}, expected ascending steps; "
            "use a new Recorder for a new run"
        )


def _check_finite(layers: tuple[str, ...], steps: np.ndarray, weights: np.ndarray, cka: np.ndarray) -> None:
    finite_weights = np.all(np.isfinite(weights), axis=-1)
    for record, layer in np.argwhere(~(finite_weights & np.isfinite(cka)))[:1]:
        what = "cka" if finite_weights[record, layer] else "weights"
        raise ValueError(
            f"{what}: not finite for layer {layers[layer]!r} at step {steps[record]}; if the training diverged, "
            "lower its learning rate"
        )


def _json(metadata: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metadata: JSON cannot hold it ({error}); pass numbers, texts, lists and dicts, arrays as lists"
        ) from error
