"""Errors between two sides' outputs, whole or sampled, and the files of sampled outputs."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.parity import drawing

FOLDER = Path(__file__).parent / "goldens"
TOLERANCES = {"eval": 1e-4, "train": 1e-4, "statistics": 1e-4, "gradients": 1e-3}

# A gradient is taken to be zero in exact arithmetic (a bias before a BatchNorm, or of attention's keys) if it is this
# much smaller than the median tensor's, in float64.
ZERO = 1e-9
# Entries stored of a tensor: all of a small one, such as logits, or so many of a large one.
WHOLE, SAMPLES = 128, 12
_PART = 2**16


class Sample(NamedTuple):
    """What is kept of a tensor: its size, largest absolute value and norm, and entries at drawn positions."""

    size: int
    largest: float
    norm: float
    entries: np.ndarray


def sample(name, array, *, few):
    """What is kept of a tensor; ``few`` unless it is an output."""
    flat = np.asarray(array).reshape(-1)
    entries = flat if flat.size <= (SAMPLES if few else WHOLE) else flat[drawing.integers(name, (SAMPLES,), flat.size)]
    # A part at a time: in float64 all of a large tensor would be a gigabyte.
    parts = (flat[start : start + _PART].astype(np.float64) for start in range(0, flat.size, _PART))
    norm = np.sqrt(sum(part @ part for part in parts))
    return Sample(flat.size, float(max(flat.max(), -flat.min())), float(norm), entries.astype(np.float64))


def errors(got, expected):
    """Largest error of each kind of outputs, relative to the largest absolute value of the same tensor.

    Where the expected tensor is zero but for rounding, the error is relative to the median over the kind's tensors of
    their largest absolute value.

    Args:
        got: Arrays by kind and name.
        expected: As ``got``, or samples.

    Returns:
        By kind, the largest error and the name of its tensor.
    """
    assert got.keys() == expected.keys()
    return {kind: _worst(kind, got[kind], expected[kind]) for kind in got}


def _worst(kind, got, expected):
    assert got.keys() == expected.keys(), f"{kind}: {sorted(got.keys() ^ expected.keys())}"
    if not expected:
        return 0.0, "none"
    largest = {name: _largest(value) for name, value in expected.items()}
    median = float(np.median(list(largest.values())))
    scales = {name: value if value > ZERO * median else median for name, value in largest.items()}
    return max((_error(name, got[name], value, scales[name], kind), name) for name, value in expected.items())


def _largest(value):
    return value.largest if isinstance(value, Sample) else float(np.abs(value).max())


def _error(name, got, expected, scale, kind):
    if not isinstance(expected, Sample):
        assert got.shape == expected.shape, f"{name}: {got.shape}, expected {expected.shape}"
        return _finite(np.abs(got - expected).max() / scale)
    got = sample(name, got, few=kind in ("statistics", "gradients"))
    assert got.size == expected.size, f"{name}: {got.size} entries, expected {expected.size}"
    apart = np.abs(got.entries - expected.entries).max() / scale
    # The norm of a tensor of zeros is relative to one whose every entry is the scale.
    norms = abs(got.norm - expected.norm) / max(
        expected.norm, 0 if expected.largest == scale else scale * got.size**0.5
    )
    return _finite(max(apart, abs(got.largest - expected.largest) / scale, norms))


def _finite(error):
    return float(error) if np.isfinite(error) else np.inf


def write(name, outputs, float32_errors):
    """Stores samples of outputs (all of logits and loss), and the errors of the original itself in float32."""
    arrays = {}
    for kind, tensors in outputs.items():
        samples = [sample(key, value, few=kind in ("statistics", "gradients")) for key, value in tensors.items()]
        arrays[f"{kind}/names"] = np.array(list(tensors))
        arrays[f"{kind}/sizes"] = np.array([each.size for each in samples], np.int32)
        arrays[f"{kind}/norms"] = np.array([(each.largest, each.norm) for each in samples], np.float32)
        arrays[f"{kind}/entries"] = np.concatenate([each.entries for each in samples] or [[]]).astype(np.float32)
        arrays[f"{kind}/float32_error"] = np.float32(float32_errors[kind][0])
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / f"{name}.npz", **arrays)


def read(name):
    """What :func:`write` stored: samples by kind and name, and the float32 errors by kind."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    outputs, float32_errors = {}, {}
    for kind in TOLERANCES:
        few = kind in ("statistics", "gradients")
        sizes = arrays[f"{kind}/sizes"].tolist()
        counts = [size if size <= (SAMPLES if few else WHOLE) else SAMPLES for size in sizes]
        entries = np.split(arrays[f"{kind}/entries"].astype(np.float64), np.cumsum(counts)[:-1]) if counts else []
        rows = zip(arrays[f"{kind}/names"].tolist(), sizes, arrays[f"{kind}/norms"].tolist(), entries, strict=True)
        outputs[kind] = {key: Sample(size, *norms, values) for key, size, norms, values in rows}
        float32_errors[kind] = float(arrays[f"{kind}/float32_error"])
    return outputs, float32_errors
