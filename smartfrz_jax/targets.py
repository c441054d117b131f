"""From CKA curves to freeze/keep targets, and the predictor's training examples.

Paper, section 3.4: once a layer's CKA with the well-trained reference has stabilised, the target is *freeze*. What
"stabilised" means the paper leaves open; two criteria are here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from smartfrz_jax.recording import Recording

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Criterion = Callable[[np.ndarray], np.ndarray]


def stabilised(
    cka: Float[np.ndarray, "records layers"], *, window: int = 5, tolerance: float = 0.02
) -> Bool[np.ndarray, "records layers"]:
    """Has the curve been flat lately? Needs no hindsight, so a policy can ask it while the network trains.

    Args:
        cka: CKA of every layer at every record.
        window: Number of records, this one included, that are looked at.
        tolerance: Largest difference between two of them.

    Returns:
        Shape ``(records, layers)``; false for the first ``window - 1`` records. It may become false again.

    Raises:
        ValueError: If ``cka`` is not a finite matrix, ``window`` is below 2 or ``tolerance`` below 0.
    """
    cka = _check(cka, window, tolerance)
    flat = np.zeros(cka.shape, bool)
    if len(cka) >= window:
        windows = np.lib.stride_tricks.sliding_window_view(cka, window, axis=0)
        flat[window - 1 :] = np.ptp(windows, axis=-1) <= tolerance
    return flat


def settled(
    cka: Float[np.ndarray, "records layers"], *, window: int = 5, tolerance: float = 0.02
) -> Bool[np.ndarray, "records layers"]:
    """Has the curve come to its end? With hindsight: for targets.

    A layer has settled at the first record at which its curve :func:`stabilised` and from which on, to the end of the
    run, it stays within ``tolerance`` of its final level, the mean of its last ``window`` records. A plateau that the
    curve leaves again does not count. It remains settled from there on, as a frozen layer remains frozen, even where
    the curve then wanders, within ``tolerance`` of the final level, by more than :func:`stabilised` allows.

    Args:
        cka: CKA of every layer at every record.
        window: Number of records over which the curve must be flat, and whose mean is its final level.
        tolerance: Largest distance from the final level, and largest difference within the window.

    Returns:
        Shape ``(records, layers)``; false for the first ``window - 1`` records.

    Raises:
        ValueError: If ``cka`` is not a finite matrix, ``window`` is below 2 or ``tolerance`` below 0.
    """
    cka = _check(cka, window, tolerance)
    near = np.abs(cka - cka[-window:].mean(axis=0)) <= tolerance
    stays = np.logical_and.accumulate(near[::-1], axis=0)[::-1]
    return np.logical_or.accumulate(stays & stabilised(cka, window=window, tolerance=tolerance), axis=0)


def _check(cka: np.ndarray, window: int, tolerance: float) -> np.ndarray:
    cka = np.asarray(cka, np.float64)
    if cka.ndim != 2 or not len(cka) or not np.isfinite(cka).all():
        raise ValueError(
            f"cka: got shape {cka.shape}, {int((~np.isfinite(cka)).sum())} values not finite; "
            "expected (records, layers), all finite"
        )
    if window < 2:
        raise ValueError(f"window: got {window}, expected at least 2 records; one alone is always flat")
    if not tolerance >= 0:
        raise ValueError(f"tolerance: got {tolerance}, expected a difference in CKA of 0 or more")
    return cka


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Training examples: the history of one layer up to a moment, and whether to freeze it at that moment.

    Histories overlap, so they are not stored but gathered from the recordings' weights, by :meth:`batch`.

    Attributes:
        weights: Tailored weights of each recording, shape ``(records, layers, size)``; the recordings' own arrays.
        layers: Layer names of each recording.
        window: Records in a history.
        run: Which recording, int32 of shape ``(n,)``.
        layer: Which of its layers, int32 of shape ``(n,)``.
        moment: Which of its records is the newest of the history, int32 of shape ``(n,)``.
        target: True for *freeze*, shape ``(n,)``.
        progress: Train steps done at that moment as a share of the whole run, float32 of shape ``(n,)``.
        depth: Place of the layer, 0 for the first, 1 for the last, float32 of shape ``(n,)``.
    """

    weights: tuple[Float[np.ndarray, "records layers size"], ...]
    layers: tuple[tuple[str, ...], ...]
    window: int
    run: Int[np.ndarray, " n"]
    layer: Int[np.ndarray, " n"]
    moment: Int[np.ndarray, " n"]
    target: Bool[np.ndarray, " n"]
    progress: Float[np.ndarray, " n"]
    depth: Float[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.target)

    @property
    def size(self) -> int:
        """Tailored weights per record."""
        return self.weights[0].shape[2]

    def batch(
        self, indices: Int[np.ndarray, " batch"]
    ) -> tuple[Float[np.ndarray, "batch window size"], Bool[np.ndarray, "batch window"], Bool[np.ndarray, " batch"]]:
        """Some of the examples, as ``History.chronological`` would give them while the network trains.

        Args:
            indices: Which examples.

        Returns:
            Records, float32, oldest first and newest last, zero where there are none; the mask that is true where there
            are; targets.
        """
        indices = np.asarray(indices)
        age = np.arange(self.window - 1, -1, -1)
        place = self.moment[indices, None] - age
        mask = place >= 0
        records = np.zeros((*place.shape, self.size), np.float32)
        for run in np.unique(self.run[indices]):
            here = np.flatnonzero(self.run[indices] == run)
            records[here] = self.weights[run][np.maximum(place[here], 0), self.layer[indices[here], None]]
        records[~mask] = 0
        return records, mask, self.target[indices]

    def select(self, chosen: np.ndarray) -> Examples:
        """The examples at some indices, or at which a boolean array of shape ``(n,)`` is true; shares the weights."""
        fields = ("run", "layer", "moment", "target", "progress", "depth")
        return dataclasses.replace(self, **{field: getattr(self, field)[chosen] for field in fields})


def make_examples(
    recordings: Sequence[Recording],
    *,
    window: int = 30,
    min_records: int = 1,
    criterion: Criterion = settled,
    stride: int = 1,
) -> Examples:
    """Training examples of every layer at every moment of some recordings.

    Args:
        recordings: The recordings, all tailored to the same size.
        window: Records in a history; 30 in the paper.
        min_records: Records that a layer must have before there is an example of it.
        criterion: From CKA curves of shape ``(records, layers)`` to freeze (true) or keep of the same shape.
        stride: Distance of moments in records.

    Returns:
        The examples, by recording, moment and layer.

    Raises:
        ValueError: If a number is below 1, there are no recordings or moments, sizes differ, or the criterion's result
            does not fit.

    Example:
        >>> recording = Recording(("a",), np.arange(6), np.ones((6, 1, 4)), np.ones((6, 1)), total_steps=10)
        >>> make_examples([recording], window=3).target.tolist()
        [False, False, False, False, True, True]
    """
    for argument, value in (("window", window), ("min_records", min_records), ("stride", stride)):
        if value < 1:
            raise ValueError(f"{argument}: got {value}, expected at least 1")
    sizes = sorted({recording.weights.shape[2] for recording in recordings})
    if len(sizes) != 1:
        raise ValueError(
            f"recordings: got {len(recordings)} of tailored sizes {sizes}, expected at least one, all of one size"
        )
    run, layer, moment, target, progress, depth = [], [], [], [], [], []
    for index, recording in enumerate(recordings):
        freeze = np.asarray(criterion(recording.cka))
        if freeze.shape != recording.cka.shape or freeze.dtype != bool:
            raise ValueError(
                f"criterion: gave {freeze.dtype} of shape {freeze.shape} for recording {index}, "
                f"expected bool of shape {recording.cka.shape}"
            )
        layers = len(recording.layers)
        moments, which = np.meshgrid(
            np.arange(min_records - 1, len(recording.steps), stride), np.arange(layers), indexing="ij"
        )
        moments, which = moments.ravel(), which.ravel()
        run.append(np.full(len(which), index))
        layer.append(which)
        moment.append(moments)
        target.append(freeze[moments, which])
        progress.append(recording.steps[moments] / max(recording.total_steps, 1))
        depth.append(which / max(layers - 1, 1))
    if not any(map(len, target)):
        longest = max(len(recording.steps) for recording in recordings)
        raise ValueError(f"min_records: got {min_records}, but no recording has more than {longest} records")
    return Examples(
        weights=tuple(recording.weights for recording in recordings),
        layers=tuple(recording.layers for recording in recordings),
        window=window,
        run=np.concatenate(run).astype(np.int32),
        layer=np.concatenate(layer).astype(np.int32),
        moment=np.concatenate(moment).astype(np.int32),
        target=np.concatenate(target),
        progress=np.concatenate(progress).astype(np.float32),
        depth=np.concatenate(depth).astype(np.float32),
    )
