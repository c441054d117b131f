"""``train.finetune`` of a small vision transformer on a few images; as a script, a process of its own."""

import functools
import io
import sys
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from models.deit import deit_tiny
from tests.support.tfds_writer import write_set
from train import finetune, networks

EXAMPLES, EVALUATED, BATCH, CLASSES = 36, 13, 8, 3


def write_images(folder: Path) -> None:
    """A set ``small`` of images of 16 x 16 pixels, brighter in one channel for each class."""
    spec = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(16, 16, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=CLASSES),
        }
    )
    splits = {
        "train": [_example(i) for i in range(EXAMPLES)],
        "test": [_example(i) for i in range(EXAMPLES, EXAMPLES + EVALUATED)],
    }
    write_set(folder, "small", spec, splits)


def _example(number: int) -> dict:
    pixels = np.random.default_rng(number).integers(0, 156, (16, 16, 3), dtype=np.uint8)
    pixels[..., number % CLASSES] += 100
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return {"image": stream.getvalue(), "label": number % CLASSES}


def arguments(folder: Path, out: Path, *changed: str) -> list[str]:
    """The command line of two epochs of four steps each, after which two layers are frozen in the second."""
    return [
        "--model", "deit-tiny", "--data", "small", "--data-dir", str(folder), "--image-size", "16", "--quiet",
        "--batch-size", str(BATCH), "--epochs", "2", "--augment", "flip-crop", "--optimizer", "adamw", "--policy",
        "autofreeze", "--evaluations-per-epoch", "2", "--lead", "1", "--min-saving", "0", "--out", str(out), *changed,
    ]  # fmt: skip


def run(arguments: list[str]) -> int:
    """The script on a network that compiles within seconds; returns its exit code."""
    networks.deit_tiny = functools.partial(deit_tiny, patch_size=8, dim=32, depth=2, heads=2)
    try:
        return finetune.main(arguments)
    finally:
        networks.deit_tiny = deit_tiny


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
