"""Networks to fine-tune: pre-trained here, once for all runs that start from them, or published."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from models import weights as published_weights
from research.recordings.architectures import ARCHITECTURES, Architecture, minilm_folder
from research.recordings.network import Network
from research.recordings.plan import PUBLISHED, SCRATCH, Run
from research.recordings.schedules import learning_rates
from research.recordings.sets import Batches, open_pretraining_set
from smartfrz_jax.pytrees import paths

_STEPS: dict[str, int] = {"weak": 200, "good": 3000, "strong": 8000}
_BATCH_SIZE, _SEED, _DECAY = 64, 0, 5e-4


def starting_weights(
    run: Run, network: Network, out: Path, data_dir: Path, weights_dir: Path | None, say: Callable[[str], object]
) -> dict[str, Any] | None:
    """Parameters and statistics that a run starts from, by name; ``None`` from scratch.

    Args:
        run: The run.
        network: Its network.
        out: Folder of the training set; pre-trained weights are kept in ``pretrained`` in it.
        data_dir: Data directory of TFDS.
        weights_dir: Folder of published weights.
        say: Prints.

    Raises:
        FileNotFoundError: If published weights are not there.
    """
    if run.pretraining == SCRATCH:
        return None
    architecture = ARCHITECTURES[run.architecture]
    if run.pretraining == PUBLISHED:
        model = architecture.make(num_classes=2, rngs=nnx.Rngs(0))
        published_weights.load(model, published_file(architecture, weights_dir), new_head=True)
        return paths.flatten(nnx.as_pure(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    file = out / "pretrained" / f"{run.architecture}-{run.pretraining.replace(':', '-')}.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file.with_suffix(".lock")):
        if not file.exists():
            _write(file, _pretrain(run, data_dir, say))
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def published_file(architecture: Architecture, weights_dir: Path | None) -> Path:
    """Where the published weights of an architecture are.

    Raises:
        FileNotFoundError: If they are not there.
    """
    if architecture.published == "minilm":
        return minilm_folder() / "model.safetensors"
    file = None if weights_dir is None else weights_dir / str(architecture.published)
    if file is None or not file.is_file():
        raise FileNotFoundError(
            f"weights: {architecture.published} is not in {weights_dir or 'any folder'}; name the folder that it is in "
            "with --weights, or leave these runs out with --only"
        )
    return file


def _pretrain(run: Run, data_dir: Path, say: Callable[[str], object]) -> dict[str, Any]:
    source, _, level = run.pretraining.rpartition(":")
    architecture = ARCHITECTURES[run.architecture]
    examples, num_classes = open_pretraining_set(source, architecture, data_dir)
    held_out, examples = examples[:500], examples[500:]
    optimizer = "sgd" if architecture.batch_norm else "adamw"
    network = Network(architecture, num_classes, optimizer, example=held_out[:64])
    steps = _STEPS[level]
    rates = learning_rates("cosine", architecture.rates[optimizer][1], steps, warmup=steps // 20)
    batches = Batches(examples, _BATCH_SIZE, _SEED, augment=not architecture.text)
    say(f"{run.architecture}: pre-training on {source}, {steps} steps")
    state = network.train(network.start(_SEED), rates, batches, decay=_DECAY)
    figures = network.figures(state, held_out)
    say(f"{run.architecture}: pre-trained on {source}, held-out accuracy {figures.accuracy:.3f}")
    if not np.isfinite(figures.loss):
        raise FloatingPointError(f"the loss of {run.architecture} is {figures.loss} after pre-training on {source}")
    return state.weights


def _write(file: Path, arrays: dict[str, Any]) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as opened:
            np.savez(opened, **arrays)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Holds a lock that ends with the process, so that two do not pre-train the same network."""
    with file.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
