"""Records runs with their weights, fits predictors on some, and judges them on the others."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import smartfrz_jax as sfj
from research import json_lines
from research.recordings.plan import Run
from research.recordings.record import record
from research.reproduce.predictors.settings import JUDGED, SETTINGS, SIZE, Setting, recorded_runs
from smartfrz_jax.learning import recording_files
from smartfrz_jax.learning.examples import Examples
from smartfrz_jax.learning.recording import Recording
from smartfrz_jax.predictor.encoding import PAPER, Encoding

ROWS = "predictors.jsonl"
_STRIDE = 8  # records between moments
_SGD = sfj.learning.SGD(epochs=3, learning_rate=0.01)


class AveragingPredictor(sfj.Predictor):
    """The paper's predictor, but that all records count alike."""

    def _pool(self, records: jax.Array, mask: jax.Array) -> jax.Array:
        shares = mask / jnp.maximum(mask.sum(), 1)
        return shares @ self.value(records)


def narrowed(recording: Recording, size: int) -> Recording:
    """A recording with fewer of the sampled weights."""
    return dataclasses.replace(recording, weights=recording.weights[..., :size], start=recording.start[..., :size])


def examples_of(recordings: Sequence[Recording], setting: Setting) -> Examples:
    """What a predictor sees of recordings; at the same moments with every window."""
    of_size = [narrowed(recording, setting.size) for recording in recordings]
    return sfj.learning.make_examples(of_size, window=setting.window, min_records=_STRIDE, stride=_STRIDE)


def fitted(setting: Setting, recordings: Sequence[Recording], *, seed: int = 0) -> sfj.Predictor:
    """A predictor that has learned from recordings when CKA with a trained network settles.

    Both classes have the same weight: from scratch few layers settle, and a probability that is to be read as such
    hardly ever reaches the 0.5 at which the paper's rule freezes.
    """
    encoding = (
        PAPER
        if setting.weights == "raw"
        else Encoding(weights=setting.weights, progress=False, depth=False, regime=False)
    )
    kind = AveragingPredictor if setting.averaged else sfj.Predictor
    predictor = kind(sfj.predictor.PredictorConfig(size=setting.size, encoding=encoding), rngs=nnx.Rngs(seed))
    examples = examples_of(recordings, setting)
    return sfj.learning.fit(predictor, examples, _SGD, held_out=None, seed=seed).predictor


def judged(setting: Setting, predictor: sfj.Predictor, recordings: Sequence[Recording]) -> dict[str, float]:
    """How well it tells what has settled from what has not: AUC, and AUC across the layers at one moment."""
    examples = examples_of(recordings, setting)
    probability = sfj.learning.predict(predictor, examples)
    found = sfj.learning.evaluate(probability, examples.target, groups=sfj.learning.moments(examples))
    return {"auc": round(found.auc, 4), "across": round(found.moment_auc, 4), "n": found.n}


class Workshop:
    """Recordings and predictors in a folder, each made when it is first asked for.

    Args:
        folder: The folder.
        data_dir: Data directory of TFDS.
        weights_dir: Folder of published weights.
        say: Prints.
    """

    def __init__(self, folder: Path, data_dir: Path, weights_dir: Path | None, say: Callable[[str], object]):
        self.folder, self._data_dir, self._weights_dir, self._say = folder, data_dir, weights_dir, say

    def recording(self, run: Run) -> Recording:
        """A run, with :data:`SIZE` weights of every layer."""
        file = self.folder / "recordings" / f"{run.name}.npz"
        if not file.exists():
            self._say(f"{run.name}: is recorded")
            made = record(run, self.folder, self._data_dir, self._weights_dir, self._say, size=SIZE, harm=False)
            recording_files.save(made, file.parent, run.name)
        return recording_files.read(file)

    def recordings(self, names: Sequence[str]) -> list[Recording]:
        """Several runs."""
        return [self.recording(run) for run in recorded_runs() if run.name in names]

    def predictor(self, setting: Setting, names: Sequence[str]) -> Path:
        """The checkpoint of a predictor that has learned from some runs."""
        path = self.folder / "predictors" / setting.name
        if not path.exists():
            self._say(f"predictor {setting.name}: learns")
            fitted(setting, self.recordings(names)).save(path)
        return path


def missing(rows: Sequence[Mapping[str, Any]]) -> Iterator[Setting]:
    """Settings that no row is of."""
    done = {row["setting"] for row in rows}
    return (setting for setting in SETTINGS if setting.name not in done)


def work(workshop: Workshop, learned: Sequence[str], *, results: Path, minutes: float) -> None:
    """Fits and judges what is missing until the time is up."""
    deadline = time.monotonic() + 60 * minutes
    while time.monotonic() < deadline:
        setting = next(missing(json_lines.read(results, dict)), None)
        if setting is None:
            return
        begin = time.perf_counter()
        if setting.averaged:  # no checkpoint knows of it
            predictor = fitted(setting, workshop.recordings(learned))
        else:
            predictor = sfj.Predictor.restore(workshop.predictor(setting, learned))
        scores = {group: judged(setting, predictor, workshop.recordings(names)) for group, names in JUDGED.items()}
        row = {"setting": setting.name, **setting._asdict(), "scores": scores}
        json_lines.append(results, row | {"seconds": round(time.perf_counter() - begin, 1)})
