"""The data set of recorded runs from which the predictor learns.

A data set is a directory. Each recording, one training run, is a compressed NumPy archive in it, ``<name>.npz``, which
``numpy.load(path, allow_pickle=False)`` reads. Its arrays are

===================  =========================================  ==================================================
``format_version``   int64, ``()``                              2
``layers``           unicode, ``(layers,)``                     layer names, front to back
``steps``            int64, ``(records,)``                      train steps done at each record, ascending
``record_every``     int64, ``()``                              train steps between records
``total_steps``      int64, ``()``                              train steps of the whole run
``weights``          float32, ``(records, layers, size)``       tailored weights; ``size`` 0 in a recording without
``start``            float32, ``(layers, size)``                the same before the first step
``losses``           float32, ``(records,)``                    mean training loss over the interval that ended with
                                                                each record; NaN where it is unknown
``first_loss``       float32, ``()``                            the same over the first interval of the run
``metadata``         unicode, ``()``                            a JSON object: architecture, data set, seed, ...
===================  =========================================  ==================================================

and what tells when a layer could have been frozen, at least one of these, each float32 of shape ``(records, layers)``:

===================  ===============================================================================================
``cka``              linear CKA of a layer's output with that of a well-trained reference (the paper's)
``own_cka``          linear CKA of a layer's output with its own at the last record
``swap_harm``        what it costs the finished network to get the weights of the layers up to this one back as they
                     were then: increase of the held-out loss in nats; NaN where it was not measured
``branch_harm``      what it costs a short branch of the run, from then on, that the layers up to this one are frozen:
                     as above (see :mod:`smartfrz_jax.learning.harm` for both)
===================  ===============================================================================================

A recording may also have ``contribution``, float32 of shape ``(records, layers)``: what the layers up to this one had
contributed to the fall of the training loss (:mod:`smartfrz_jax.predictor.probe`); NaN where it was not measured.
Other arrays are ignored.

Without its weights (:meth:`~smartfrz_jax.learning.Recording.without_weights`) a recording takes kilobytes instead of
megabytes; predictors that read no weights can learn from it.

A data set grows by adding files; files that are there are never written to.
"""

from __future__ import annotations

import json
import os

import numpy as np

from smartfrz_jax.learning.recording import ARRAYS, OPTIONAL, SCALARS, Recording
from smartfrz_jax.pytrees.file_paths import Path, PathLike, as_path, is_remote

FORMAT_VERSION = 2


def save(recording: Recording, directory: PathLike, name: str) -> Path:
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
    if not name or os.path.basename(name) != name or name.startswith("."):
        raise ValueError(f"name: got {name!r}, expected a file name without directories, such as 'resnet18-cifar10-0'")
    directory = as_path(directory, "directory")
    target = directory / f"{name}.npz"
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{name}.{os.getpid()}.tmp"
    arrays = {field: getattr(recording, field) for field in ARRAYS}
    try:
        with temporary.open("wb") as file:
            np.savez_compressed(
                file,
                format_version=np.int64(FORMAT_VERSION),
                layers=np.array(recording.layers),
                record_every=np.int64(recording.record_every),
                total_steps=np.int64(recording.total_steps),
                first_loss=np.float32(recording.first_loss),
                metadata=np.array(json.dumps(recording.metadata)),
                **{field: array for field, array in arrays.items() if array is not None},
            )
            file.flush()
            if not is_remote(temporary):
                os.fsync(file.fileno())
        if target.exists():
            raise FileExistsError(
                f"name: {target} exists, and recordings are not overwritten; choose another name or delete the file"
            )
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def load(directory: PathLike) -> list[Recording]:
    """Reads all recordings of a data set.

    Args:
        directory: The data set.

    Returns:
        The recordings, in the order of their file names.

    Raises:
        FileNotFoundError: If there is no such directory, or no recording in it.
        ValueError: If a file is damaged, or of another version of the format.
    """
    directory = as_path(directory, "directory")
    if not directory.is_dir():
        raise FileNotFoundError(f"directory: there is no directory {directory}; expected a data set of recordings")
    files = sorted(directory.glob("*.npz"))
    if not files:
        raise FileNotFoundError(f"directory: {directory} holds no recordings (*.npz); add some with save(...)")
    return [_read(file, "directory") for file in files]


def read(path: PathLike) -> Recording:
    """Reads one recording.

    Args:
        path: Its file.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is damaged, or of another version of the format.
    """
    path = as_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: there is no file {path}; expected a recording (*.npz)")
    return _read(path, "path")


def _read(path: Path, argument: str) -> Recording:
    """Reads one recording; errors name the argument that led to it."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
        version = int(arrays["format_version"])
    except Exception as error:  # NumPy and zipfile raise many kinds for damaged files
        raise ValueError(_damaged(path, argument, error)) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{argument}: {path} has format version {version}, expected {FORMAT_VERSION}; record that run again"
            + (" (version 1 lacks its losses and the weights before the first step)" if version == 1 else "")
            + ", or read it with the version of smartfrz_jax that wrote it"
        )
    try:
        return Recording(
            layers=tuple(arrays["layers"].tolist()),
            metadata=json.loads(str(arrays["metadata"])),
            **{field: kind(arrays[field]) for field, kind in SCALARS.items()},
            **{field: arrays[field] for field in ARRAYS if field not in OPTIONAL or field in arrays},
        )
    except Exception as error:  # as above, and what Recording refuses
        raise ValueError(_damaged(path, argument, error)) from error


def _damaged(path: Path, argument: str, error: Exception) -> str:
    return (
        f"{argument}: {path} is not a complete recording ({type(error).__name__}: {error}); restore another copy, or "
        "delete it and record that run again"
    )
