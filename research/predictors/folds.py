"""What is held out together: architectures, data sets, schedules, or kinds of pre-training, never single moments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from smartfrz_jax.learning.recording import Recording

Split = Literal["architecture", "data", "schedule", "pretraining"]

# Nets of one family fall into one fold, as they are too alike for one to say much about its family's other.
_FAMILIES = {
    "resnet": ("resnet8", "resnet14", "bottleneck20"),
    "vgg": ("vgg9", "vgg9-bn"),
    "mobile": ("mobilenet14", "lite18"),
    "transformer": ("deit6", "bert4"),
    "published": ("efficientnet-lite0", "minilm"),
}


def folds(recordings: Sequence[Recording], split: Split) -> Iterator[tuple[str, list[int]]]:
    """Each fold's name and the recordings that are held out in it.

    Args:
        recordings: The recordings.
        split: What is held out: a family of architectures, a data set, a schedule of the learning rate, or how well
            networks were pre-trained, on whatever data.

    Raises:
        ValueError: If a recording does not say what it is split by, or there is only one fold.
    """
    names: dict[str, list[int]] = {}
    for index, recording in enumerate(recordings):
        if split not in recording.metadata:
            raise ValueError(
                f"recordings: {index} does not say its {split}; make them with python -m research.recordings.collect"
            )
        names.setdefault(_fold(recording.metadata[split], split), []).append(index)
    if len(names) < 2:
        raise ValueError(f"recordings: all are of one {split} ({', '.join(names)}), so nothing can be held out")
    yield from sorted(names.items())


def _fold(value: str, split: Split) -> str:
    if split == "pretraining":
        return value.rpartition(":")[2]
    if split != "architecture":
        return value
    return next((family for family, members in _FAMILIES.items() if value in members), value)
