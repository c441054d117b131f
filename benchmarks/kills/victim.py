"""A small run of ``train.finetune`` that kills itself at a chosen moment, or ends."""

from __future__ import annotations

import functools
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

import smartfrz_jax as sfj
from models.layers.torch_names import torch_name
from train import fashion_mnist, finetune, networks
from train.fashion_mnist import MEAN, STD
from train.log import Log
from train.loop import Loop
from train.recovery.checkpoints import Checkpoints

Kind = Literal["start", "step", "save", "compile", "freeze", "evaluation", "end"]

EXAMPLES, BATCH, EPOCHS, EVERY = 64, 8, 3, 5
STEPS = EPOCHS * EXAMPLES // BATCH


class Network(nnx.Module):
    """What is trained: so small that a run is over in seconds, with statistics and dropout as larger ones have them."""

    def __init__(self, *, num_classes: int, rngs: nnx.Rngs, width: int = 16, **others: Any):
        self.stem = nnx.Conv(3, width, (8, 8), strides=8, padding="VALID", use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(3)])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images."""
        x = nnx.relu(self.norm(self.stem(x))).mean((1, 2))
        for block in self.blocks:
            x = self.dropout(nnx.relu(block(x)))
        return self.head(x)

    @staticmethod
    def tensor_name(name: str) -> str:
        """Name of a parameter in the file of weights."""
        return torch_name(name)


class Case(NamedTuple):
    """What is killed.

    Attributes:
        policy: What decides when layers freeze.
        returning: What the optimizer holds of layers that train again.
        keep_activations: Where those of frozen layers are kept.
    """

    policy: str
    returning: str = "fresh"
    keep_activations: str = "no"


class Moment(NamedTuple):
    """When a process is killed.

    Attributes:
        kind: In the midst of setting up, a step, writing a checkpoint, compiling the next program, freezing, evaluating
            or writing the end's files.
        number: In which of them, counted from 1 in that process.
        delay: Seconds after its begin; with 0 nothing of it is done.
        signal: ``SIGKILL``, or ``SIGTERM``, after which it is to save and to exit with 75.
    """

    kind: Kind
    number: int
    delay: float
    signal: str = "SIGKILL"


def write_data(folder: pathlib.Path) -> None:
    """A few images of Fashion-MNIST as a TFDS set."""
    import cv2
    import tensorflow_datasets as tfds

    from tests.support.tfds_writer import write_set

    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(shape=(28, 28, 1)), "label": tfds.features.ClassLabel(num_classes=10)}
    )

    def rows(split: fashion_mnist.Split, number: int) -> list[dict[str, Any]]:
        pixels = np.rint((split.images[:number] * STD + MEAN) * 255).astype(np.uint8)
        encoded = [cv2.imencode(".png", image)[1].tobytes() for image in pixels]
        return [{"image": one, "label": int(label)} for one, label in zip(encoded, split.labels, strict=False)]

    train, test = fashion_mnist.load()
    write_set(folder, "fashion", features, {"train": rows(train, EXAMPLES), "test": rows(test, 16)})


def arguments(folder: pathlib.Path, out: pathlib.Path, *changed: str) -> list[str]:
    """The command line of a run on what :func:`write_data` wrote to ``folder``."""
    return [
        "--model", "deit-tiny", "--data", "fashion", "--data-dir", str(folder), "--image-size", "32", "--quiet",
        "--batch-size", str(BATCH), "--epochs", str(EPOCHS), "--optimizer", "adamw", "--learning-rate", "0.003",
        "--lead", "1", "--min-saving", "0", "--checkpoint-every", str(EVERY), "--log-every", "2",
        "--keep-programs", str(folder / "programs"), "--out", str(out), *changed,
    ]  # fmt: skip


def run(argv: list[str], moment: Moment | None, *, width: int = 16) -> int:
    """``train.finetune`` with a small network; its exit code, if it comes to an end."""
    networks.deit_tiny = functools.partial(Network, width=width)
    if moment is not None:
        _arm(moment)
    finetune.report.picture = _no_picture  # which takes longer than all else
    return finetune.main(argv)


def _no_picture(runs: Any, path: pathlib.Path, title: str) -> None:
    path.write_text(title)


def _arm(moment: Moment) -> None:
    begun = 0

    def begin() -> None:
        nonlocal begun
        begun += 1
        if begun == moment.number and not moment.delay:
            kill()
        elif begun == moment.number:
            threading.Thread(target=kill, daemon=True).start()

    def kill() -> None:
        time.sleep(moment.delay)
        os.kill(os.getpid(), getattr(signal, moment.signal))

    match moment.kind:
        case "start":
            finetune.make_training = _before(finetune.make_training, begin)
        case "step":
            Loop._step = _before(Loop._step, begin)
        case "save":
            Checkpoints.save = _before(Checkpoints.save, begin)
        case "compile":
            sfj.TrainStep.prepare = _before(sfj.TrainStep.prepare, begin)
            sfj.nnx.CachedStep.prepare = _before(sfj.nnx.CachedStep.prepare, begin)
        case "freeze":
            sfj.nnx.Optimizer.freeze = _before(sfj.nnx.Optimizer.freeze, begin)
        case "evaluation":
            Log.add = _before(Log.add, begin, of="Evaluation")
        case "end":
            finetune.write_report = _before(finetune.write_report, begin)


def _before(function: Callable[..., Any], begin: Callable[[], None], of: str | None = None) -> Any:
    @functools.wraps(function)
    def with_begin(*args: Any, **kwargs: Any) -> Any:
        if of is None or type(args[1]).__name__ == of:
            begin()
        return function(*args, **kwargs)

    return with_begin
