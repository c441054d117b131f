"""Data for the training scripts: any image or text classification set that TFDS prepared, without TensorFlow.

A script sees images and texts alike. ``open_images`` or ``Sentences`` give a :class:`Data`, and::

    for step, (inputs, labels, weights) in enumerate(data.batches(start_step), start_step):
        ...

where the jitted train step calls ``inputs, labels = data.augment(data.key(step), inputs, labels)`` and then
``model(*inputs)``. Labels are classes, int32 of shape ``(batch,)``, or, where the set mixes examples, probabilities of
shape ``(batch, classes)``. For evaluation the jitted step calls ``model(*data.prepare(inputs))`` on
``data.evaluation_batches()``: every example has weight 1 once; what fills the last batch up has weight 0.

All batches have one shape (texts: one for each of ``lengths``). The batch of a step and its key are pure functions of
the seed and the step.

Example:
    >>> split = open_split("cifar10", "train[:500]", data_dir)  # doctest: +SKIP
    >>> data = open_images(split, 32, ImageTransform(size=64, padding=4, flip=True), seed=0)  # doctest: +SKIP
    >>> split = open_split("glue/cola", "train", data_dir)  # doctest: +SKIP
    >>> data = Sentences(split, 32, WordPiece("vocab.txt"), seed=0)  # doctest: +SKIP
"""

from train.data import metrics
from train.data.augment.mix import Mix
from train.data.augment.rand_augment import RandAugment
from train.data.augment.transform import ImageTransform
from train.data.batch import Batch, Data
from train.data.host import HostImages
from train.data.images import DeviceImages, open_images
from train.data.source import Records, Split, evaluation_split, open_split
from train.data.text import Sentences
from train.data.wordpiece import Tokens, WordPiece

__all__ = [
    "Batch",
    "Data",
    "DeviceImages",
    "HostImages",
    "ImageTransform",
    "Mix",
    "RandAugment",
    "Records",
    "Sentences",
    "Split",
    "Tokens",
    "WordPiece",
    "evaluation_split",
    "metrics",
    "open_images",
    "open_split",
]
