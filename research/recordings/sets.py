"""The data of the training set's runs: few enough examples to be held in memory, in batches of any step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from research.recordings.architectures import Architecture, minilm_folder
from train import fashion_mnist
from train.data import WordPiece, evaluation_split, open_split
from train.data.augment import images as augment_images

FASHION = "fashion_mnist"
WORD_ORDER, BIGRAM_SHIFT = "word-order", "bigram-shift"
_OWN, _OTHER = 4000, 20000  # training examples to fine-tune on, and behind them those to pre-train on
_FASHION_OWN = 2000
_TOKENS = {"glue/cola": 32, "glue/mrpc": 64}  # that are kept of an example
_OWN_TEXTS = 2000
_SENTENCES = "glue/cola"  # whose words are put in another order


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """Examples.

    Attributes:
        inputs: Inputs of the network, each with a leading axis of examples.
        labels: Classes, int32 of shape ``(examples,)``.
    """

    inputs: tuple[np.ndarray, ...]
    labels: np.ndarray

    def __getitem__(self, index: slice | np.ndarray) -> Arrays:
        return Arrays(tuple(array[index] for array in self.inputs), self.labels[index])

    def __len__(self) -> int:
        return len(self.labels)


class DataSet(NamedTuple):
    """What a run trains on and is measured on.

    Attributes:
        train: Training examples.
        held_out: Others.
        num_classes: Number of classes.
    """

    train: Arrays
    held_out: Arrays
    num_classes: int


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Training batches, a pure function of the step; every epoch has an order of its own.

    Attributes:
        examples: The examples.
        batch_size: Examples in a batch.
        seed: Of the order and the augmentation.
        augment: Whether images are mirrored and shifted at random.
        shift: Pixels by which they are shifted at most.
    """

    examples: Arrays
    batch_size: int
    seed: int
    augment: bool = False
    shift: int = 2

    def __call__(self, step: int) -> Arrays:
        """The batch of a step, counted from 0."""
        batch = self.examples[self.indices(step)]
        if not self.augment:
            return batch
        rng = np.random.default_rng((self.seed, 1, step))
        flipped = rng.random(len(batch)) < 0.5
        down, right = rng.integers(0, 2 * self.shift + 1, (2, len(batch)))
        return Arrays((_augmented(batch.inputs[0], flipped, down, right, self.shift),), batch.labels)

    def view(self, step: int, view: int) -> Arrays:
        """The batch of a step, each example in one of its views: the same whenever that is asked for.

        Args:
            step: The step, counted from 0.
            view: Which view, from 0 up; without augmentation all are alike.
        """
        indices = self.indices(step)
        batch = self.examples[indices]
        if not self.augment:
            return batch
        flipped, down, right = _looks(self.seed, view, len(self.examples), self.shift)
        drawn = flipped[indices], down[indices], right[indices]
        return Arrays((_augmented(batch.inputs[0], *drawn, self.shift),), batch.labels)

    def indices(self, step: int) -> np.ndarray:
        """Which examples are in the batch of a step."""
        epoch, place = divmod(step, len(self.examples) // self.batch_size)
        order = _order(self.seed, epoch, len(self.examples))
        return order[place * self.batch_size : (place + 1) * self.batch_size]


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, examples: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(examples)


@functools.lru_cache(maxsize=4)
def _looks(seed: int, view: int, examples: int, shift: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every example in a view: whether it is mirrored, and where in the padded image it begins; whatever follows."""
    drawn = np.random.default_rng((seed, 2, view)).random((examples, 3))
    down, right = (drawn[:, 1:] * (2 * shift + 1)).astype(np.int64).T
    return drawn[:, 0] < 0.5, down, right


def _augmented(images: np.ndarray, flipped: np.ndarray, down: np.ndarray, right: np.ndarray, shift: int) -> np.ndarray:
    n, height, width, _ = images.shape
    mirrored = np.where(flipped[:, None, None, None], images[:, :, ::-1], images)
    padded = np.pad(mirrored, ((0, 0), (shift, shift), (shift, shift), (0, 0)), "edge")
    rows, columns = down[:, None] + np.arange(height), right[:, None] + np.arange(width)
    return padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def open_set(
    name: str,
    architecture: Architecture,
    data_dir: Path,
    examples: int,
    *,
    held_out: slice,
    tokens: int | None = None,
) -> DataSet:
    """Reads the examples that a run trains on, and those that it is measured on.

    Args:
        name: ``cifar10``, ``cifar100``, or another image set of TFDS; ``fashion_mnist``; ``glue/cola``, ``glue/mrpc``;
            and of CoLA's sentences, every other one changed, which is to be found out (both are tasks of SentEval,
            Conneau et al. 2018, arXiv 1805.01070, or close to one): ``word-order`` with its tokens in random order,
            ``bigram-shift`` with two neighbours exchanged.
        architecture: What it is for.
        data_dir: Data directory of TFDS.
        examples: Most training examples to take.
        held_out: Which to take of the examples that nothing trains on: ``slice(1000)`` is the first 1,000,
            ``slice(-1000, None)`` the last; fewer if there are no more.
        tokens: Tokens that are kept of an unchanged text; as in the recordings by default.

    Raises:
        FileNotFoundError: If the set is not there.
        ValueError: If it cannot be read.
    """
    if name == FASHION:
        train, test = fashion_mnist.load()
        others = range(len(test.labels))[held_out]
        return DataSet(_fashion(train, range(examples), architecture), _fashion(test, others, architecture), 10)
    if name in _CHANGES:
        sentences = range(len(open_split(_SENTENCES, "train", data_dir)))
        own, others = sentences[: min(examples, _OWN_TEXTS)], sentences[_OWN_TEXTS:][held_out]
        train, test = (_texts(_SENTENCES, "train", part, architecture, data_dir) for part in (own, others))
        return DataSet(_changed(name, train.inputs), _changed(name, test.inputs), 2)
    read = functools.partial(_texts, tokens=tokens) if architecture.text else _images
    evaluation = evaluation_split(name, data_dir)
    others = range(len(open_split(name, evaluation, data_dir)))[held_out]
    test = read(name, evaluation, others, architecture, data_dir)
    train = read(name, "train", range(examples), architecture, data_dir)
    return DataSet(train, test, open_split(name, "train", data_dir).num_classes)


def open_pretraining_set(name: str, architecture: Architecture, data_dir: Path) -> tuple[Arrays, int]:
    """Reads examples to pre-train on, none of which a run fine-tunes on; and the number of classes.

    Args:
        name: A name as in :func:`open_set` for images; ``word-order`` for texts.
        architecture: What it is for.
        data_dir: Data directory of TFDS.

    Raises:
        FileNotFoundError: If a set is not there.
        ValueError: If it cannot be read.
    """
    if name == FASHION:
        train = fashion_mnist.load()[0]
        return _fashion(train, range(_FASHION_OWN, len(train.labels)), architecture), 10
    if name == WORD_ORDER:
        texts = _texts(_SENTENCES, "train", range(_OWN_TEXTS, 10**6), architecture, data_dir)
        return _changed(WORD_ORDER, texts.inputs), 2
    arrays = _images(name, "train", range(_OWN, _OWN + _OTHER), architecture, data_dir)
    return arrays, open_split(name, "train", data_dir).num_classes


def _images(name: str, split_name: str, part: range, architecture: Architecture, data_dir: Path) -> Arrays:
    split = open_split(name, split_name, data_dir)
    records = split.fetch(range(len(split))[part.start : part.stop])
    mean, std = (
        (augment_images.LITE_MEAN, augment_images.LITE_STD)
        if architecture.published
        else (augment_images.IMAGENET_MEAN, augment_images.IMAGENET_STD)
    )
    images = _resized(np.stack(records.inputs[0]), architecture.size)
    return Arrays(
        ((images / np.float32(255) - np.asarray(mean, np.float32)) / np.asarray(std, np.float32),), records.labels
    )


def _fashion(split: fashion_mnist.Split, part: range, architecture: Architecture) -> Arrays:
    images = np.repeat(split.images[part.start : part.stop], 3, axis=-1)
    return Arrays((_resized(images, architecture.size),), split.labels[part.start : part.stop])


def _resized(images: np.ndarray, size: int) -> np.ndarray:
    resize = jax.jit(lambda images: augment_images.resize(images, size))
    return np.concatenate([resize(images[start : start + 1000]) for start in range(0, len(images), 1000)])


def _texts(
    name: str, split_name: str, part: range, architecture: Architecture, data_dir: Path, tokens: int | None = None
) -> Arrays:
    split = open_split(name, split_name, data_dir)
    records = split.fetch(range(len(split))[part.start : part.stop])
    length = tokens or _TOKENS[name]
    tokenizer = WordPiece(minilm_folder() / "vocab.txt", max_length=length)
    texts = tokenizer(*records.inputs)
    missing = ((0, 0), (0, length - texts.input_ids.shape[1]))
    ids = np.pad(texts.input_ids, missing, constant_values=tokenizer.pad)
    return Arrays((ids, np.pad(texts.attention_mask, missing), np.pad(texts.token_type_ids, missing)), records.labels)


def _changed(how: str, inputs: Sequence[np.ndarray]) -> Arrays:
    """Every other example with its tokens, but for the first and the last, in another order."""
    ids, mask, types = inputs
    ids, rng = ids.copy(), np.random.default_rng(0)
    labels = (np.arange(len(ids)) % 2).astype(np.int32)
    for row in np.flatnonzero(labels):
        inside = slice(1, mask[row].sum() - 1)
        ids[row, inside] = _CHANGES[how](ids[row, inside], rng)
    return Arrays((ids, mask, types), labels)


def _exchanged(tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    first = rng.integers(max(len(tokens) - 1, 1))
    return np.concatenate([tokens[:first], tokens[first : first + 2][::-1], tokens[first + 2 :]])


_CHANGES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    WORD_ORDER: lambda tokens, rng: rng.permutation(tokens),
    BIGRAM_SHIFT: _exchanged,
}
