"""Figure 4: CKA of every layer with the network as it was after a whole run, while it trains again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import smartfrz_jax as sfj
from models import weights
from smartfrz_jax.learning.recording import Recording
from smartfrz_jax.learning.targets import settled
from smartfrz_jax.predictor.cka import layer_similarity
from train.data.open import open_data
from train.finetune import batches_of, make_model, make_training
from train.options import Options

MOMENTS = 100
_TOLERANCE = 0.02
_WITHOUT_RESIDUALS = ("vgg",)


class Curves(NamedTuple):
    """CKA of every layer over a run.

    Attributes:
        name: Of the run.
        layers: Their names, front to back.
        progress: Moments as shares of the run, shape ``(moments,)``.
        cka: Shape ``(moments, layers)``.
    """

    name: str
    layers: tuple[str, ...]
    progress: np.ndarray
    cka: np.ndarray

    @classmethod
    def of_recording(cls, recording: Recording) -> Curves:
        """Those of a recorded run with a reference."""
        if recording.cka is None:
            raise ValueError("recording: has no cka; record it with a reference")
        name = str(recording.metadata["name"])
        return cls(name, recording.layers, recording.steps / recording.total_steps, recording.cka)

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Curves:
        """Those that :func:`measure` has found."""
        name = f"{row['network']} on {row['data']}"
        return cls(name, tuple(row["layers"]), np.array(row["progress"]), np.array(row["cka"]))

    @property
    def moments(self) -> np.ndarray:
        """For every layer, the share of the run after which its curve has settled; NaN if only at the end."""
        found = settled(self.cka, tolerance=_TOLERANCE)
        return np.where(found.any(axis=0), self.progress[np.argmax(found, axis=0)], np.nan)


class Order(NamedTuple):
    """In which order the layers of a run settle.

    Attributes:
        residual: Whether the network has residual connections.
        correlation: Rank correlation of place and moment; NaN if no two moments differ.
        overtaken: Share of the pairs of layers with different moments of which the one further back settles first.
        unsettled: Share of the layers that settle only at the end.
    """

    residual: bool
    correlation: float
    overtaken: float
    unsettled: float


def order_of(curves: Curves) -> Order:
    """The order in which the layers of a run settle; those that do so only at the end count as last."""
    moments = curves.moments
    ranked = np.where(np.isnan(moments), 1.0, moments)
    front, back = np.triu_indices(len(ranked), 1)
    differs = ranked[front] != ranked[back]
    overtaken = (ranked[back] < ranked[front])[differs].mean() if differs.any() else np.nan
    residual = not any(word in curves.name.lower() for word in _WITHOUT_RESIDUALS)
    places = np.arange(len(ranked))
    return Order(residual, rank_correlation(places, ranked), float(overtaken), float(np.isnan(moments).mean()))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; NaN with fewer than two different values."""
    if len(np.unique(a)) < 2 or len(np.unique(b)) < 2:
        return float("nan")
    ranks = [(np.unique(x, return_inverse=True, return_counts=True)) for x in (a, b)]
    # Equal values share the mean of their ranks.
    means = [(np.cumsum(counts) - (counts - 1) / 2)[places] for _, places, counts in ranks]
    return float(np.corrcoef(means[0], means[1])[0, 1])


def measure(options: Options, reference: Path) -> dict[str, Any]:
    """Trains, and compares every layer's outputs with those of a finished run.

    Args:
        options: What is trained, as by ``train.finetune``.
        reference: Weights of the finished run.

    Returns:
        ``layers``, ``progress`` and ``cka``, as of :class:`Curves`, and ``losses`` at the moments.
    """
    run = options.run
    data, _ = open_data(options.data, options.network.reads, batch_size=run.batch_size, seed=run.seed)
    total = run.epochs * data.steps_per_epoch
    training = make_training(options, data)
    model, layers = training.model, training.freezer.layers
    probe = data.prepare(data.batch(0).inputs)
    outputs_of = sfj.nnx.features(model, layers, *probe)
    known = make_model(options.network, image_size=options.data.image_size, num_classes=data.num_classes, seed=run.seed)
    weights.load(known, reference)
    outputs = outputs_of(known, *probe)
    every = max(1, total // MOMENTS)
    steps, cka, losses = [], [], []
    for step, batch in enumerate(batches_of(data, 0, total, "no"), start=1):
        loss = training.step(model, training.optimizer, *batch)
        if step % every == 0:
            steps.append(step)
            cka.append(np.asarray(layer_similarity(outputs_of(model, *probe), outputs)).round(4).tolist())
            losses.append(float(loss))
    progress = (np.array(steps) / total).round(5).tolist()
    return {"layers": list(layers.names), "progress": progress, "cka": cka, "losses": losses}
