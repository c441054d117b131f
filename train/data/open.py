"""The training and the evaluation split of a run."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

from jax.sharding import Mesh

from smartfrz_jax.pytrees.file_paths import Path
from train.command_line import check_least
from train.data import Data, ImageTransform, Sentences, WordPiece, evaluation_split, open_images, open_split
from train.data.wordpiece import MIN_LENGTH

Augment: TypeAlias = Literal["none", "flip-crop", "resized-crop", "deit"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data, and how examples are prepared."""

    data: str
    """TFDS name: cifar10, cifar100, imagenet2012, glue/mrpc, glue/cola, or another"""
    data_dir: Path
    """folder of prepared TFDS data sets (array_record)"""
    train_split: str = "train"
    """split to train on, such as train[:500]"""
    evaluation_split: str | None = None
    """split to evaluate on; without it, the usual one of the data set"""
    image_size: int = 224
    """height and width that images are resized to"""
    augment: Augment = "flip-crop"
    """of training images; deit: resized crop, flip, RandAugment, mixup, CutMix"""
    vocab: Path | None = None
    """WordPiece vocabulary (vocab.txt), for text"""
    max_tokens: int = 128
    """longest text; the rest is cut off"""
    workers: int = 0
    """processes that decode images, where the set is not held in memory"""

    def __post_init__(self) -> None:
        check_least(self, image_size=1, max_tokens=MIN_LENGTH, workers=0)


class Reads(NamedTuple):
    """What a network reads.

    Attributes:
        network: Its name, for errors.
        kind: Images or texts.
        mean: Of the channels of images, on a scale from 0 to 1.
        std: Their standard deviation.
        vocabulary: Number of tokens that it knows.
    """

    network: str
    kind: Literal["image", "text"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    vocabulary: int


def open_data(
    config: DataConfig, reads: Reads, *, batch_size: int, seed: int, mesh: Mesh | None = None
) -> tuple[Data, Data]:
    """Opens both splits; training images are augmented, evaluation images only resized and normalised.

    Args:
        config: The data.
        reads: What the network reads.
        batch_size: Examples of a step.
        seed: Of the order and of augmentation.
        mesh: The devices that share a batch; see :class:`train.data.Data`.

    Returns:
        Training and evaluation data.

    Raises:
        FileNotFoundError: If the data directory, the set or the vocabulary is not there.
        ValueError: If a split does not exist, both have examples in common or the training split is smaller than a
            batch; or the set, or the vocabulary, does not hold what the network reads.
    """
    chosen = config.evaluation_split or evaluation_split(config.data, config.data_dir)
    train = open_split(config.data, config.train_split, config.data_dir)
    evaluation = open_split(config.data, chosen, config.data_dir)
    if train.kind != reads.kind:
        raise ValueError(
            f"data: {config.data} holds {train.kind}s, which {reads.network} does not read; "
            f"choose {'an image' if train.kind == 'image' else 'a text'} network or another set"
        )
    if common := train.overlap(evaluation):
        raise ValueError(
            f"train_split, evaluation_split: {config.train_split!r} and {chosen!r} of {config.data} have {common} "
            "examples in common, expected none; take other parts, such as --train-split 'train[:90%]' and "
            "--evaluation-split 'train[90%:]'"
        )
    # Examples that only fill a batch up would train too: training drops the last partial batch, evaluation does not.
    if len(train) < batch_size:
        raise ValueError(
            f"batch_size: got {batch_size}, expected at most {len(train)}, the examples of the training split "
            f"{config.train_split!r}; take a smaller --batch-size or a larger --train-split"
        )
    if train.kind == "image":
        of_both = partial(open_images, batch_size=batch_size, seed=seed, workers=config.workers, mesh=mesh)
        return (
            of_both(train, transform=_transform(config.augment, config.image_size, reads)),
            of_both(evaluation, transform=_transform("none", config.image_size, reads), drop_last=False),
        )
    if config.vocab is None:
        raise ValueError(f"vocab: {reads.network} reads tokens; pass its vocab.txt with --vocab")
    tokenizer = WordPiece(config.vocab, max_length=config.max_tokens)
    if tokenizer.vocab_size > reads.vocabulary:  # of tokens that it does not know, embeddings are NaN
        raise ValueError(
            f"vocab: {config.vocab} holds {tokenizer.vocab_size} tokens, expected at most the {reads.vocabulary} that "
            f"{reads.network} knows; pass the vocab.txt that its weights came with, with --vocab"
        )
    return (
        Sentences(train, batch_size, tokenizer, seed=seed, mesh=mesh),
        Sentences(evaluation, batch_size, tokenizer, seed=seed, drop_last=False, mesh=mesh),
    )


def _transform(augment: Augment, size: int, reads: Reads) -> ImageTransform:
    mean, std = reads.mean, reads.std
    match augment:
        case "none":
            return ImageTransform(size, mean, std)
        case "flip-crop":
            return ImageTransform(size, mean, std, padding=4, flip=True)
        case "resized-crop":
            return ImageTransform(size, mean, std, area=(0.08, 1.0), flip=True)
        case "deit":
            return ImageTransform.deit(size, mean=mean, std=std)
