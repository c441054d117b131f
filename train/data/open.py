"""The training and the evaluation split of a run."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

from jax.sharding import Mesh

from smartfrz_jax.pytrees.file_paths import Path
from train.command_line import check_least
from train.data import Data, ImageTransform, Sentences, Split, WordPiece, evaluation_split, open_images, open_split
from train.data.language import texts
from train.data.language.packing import PackedTexts
from train.data.language.tokens import open_tokenizer
from train.data.wordpiece import MIN_LENGTH

Augment: TypeAlias = Literal["none", "flip-crop", "resized-crop", "deit"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data, and how examples are prepared."""

    data: str
    """TFDS name: cifar10, cifar100, imagenet2012, glue/mrpc, glue/cola, or another; with --task lm also a file of
    texts in --data-dir: .txt (one a line) or .jsonl (text, or prompt and completion)"""
    data_dir: Path
    """folder of prepared TFDS data sets (array_record), or of the file"""
    task: Literal["classify", "lm"] = "classify"
    """lm: a decoder learns the texts, packed into sequences; labels are not read"""
    train_split: str = "train"
    """split to train on, such as train[:500]"""
    evaluation_split: str | None = None
    """split to evaluate on; without it, the usual one of the data set. Of a file of texts: another file in --data-dir;
    without it, the last tenth"""
    image_size: int = 224
    """height and width that images are resized to"""
    augment: Augment = "flip-crop"
    """of training images; deit: resized crop, flip, RandAugment, mixup, CutMix"""
    views: int = 0
    """fixed augmented views of each training image, an epoch one and the next epoch the next, of which
    --keep-activations keeps those of the front; without it, every epoch draws new ones"""
    vocab: Path | None = None
    """WordPiece vocabulary (vocab.txt), for text"""
    max_tokens: int = 128
    """longest text; the rest is cut off. With --task lm: length of the sequences"""
    tokenizer: Path | None = None
    """of a decoder: tokenizer.json, or a GGUF file; without it, that of --weights, if these are a GGUF file"""
    workers: int = 0
    """processes that decode images, where the set is not held in memory"""

    def __post_init__(self) -> None:
        check_least(self, image_size=1, views=0, max_tokens=MIN_LENGTH, workers=0)


class Reads(NamedTuple):
    """What a network reads.

    Attributes:
        network: Its name, for errors.
        kind: Images, texts that are classified, or texts that are modelled.
        mean: Of the channels of images, on a scale from 0 to 1.
        std: Their standard deviation.
        vocabulary: Number of tokens that it knows.
        tokenizer: The file of a decoder's tokenizer, if its weights came with one.
    """

    network: str
    kind: Literal["image", "text", "language"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    vocabulary: int
    tokenizer: Path | None = None


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
    if (config.task == "lm") != (reads.kind == "language"):
        raise ValueError(
            f"task: got {config.task} with {reads.network}, expected lm with a decoder (--model smollm2-135m) and "
            "classify with all others"
        )
    if config.task == "lm":
        return open_language(config, reads, batch_size=batch_size, seed=seed, mesh=mesh)
    chosen = config.evaluation_split or evaluation_split(config.data, config.data_dir)
    train = open_split(config.data, config.train_split, config.data_dir)
    evaluation = open_split(config.data, chosen, config.data_dir)
    if train.kind != reads.kind:
        raise ValueError(
            f"data: {config.data} holds {train.kind}s, which {reads.network} does not read; "
            f"choose {'an image' if train.kind == 'image' else 'a text'} network or another set"
        )
    _check_apart(config.data, train, evaluation)
    # Examples that only fill a batch up would train too: training drops the last partial batch, evaluation does not.
    if len(train) < batch_size:
        raise ValueError(
            f"batch_size: got {batch_size}, expected at most {len(train)}, the examples of the training split "
            f"{config.train_split!r}; take a smaller --batch-size or a larger --train-split"
        )
    if train.kind == "image":
        of_both = partial(open_images, batch_size=batch_size, seed=seed, workers=config.workers, mesh=mesh)
        return (
            of_both(train, transform=_transform(config.augment, config.image_size, reads, config.views)),
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


def open_language(
    config: DataConfig, reads: Reads, *, batch_size: int, seed: int, mesh: Mesh | None = None
) -> tuple[PackedTexts, PackedTexts]:
    """As :func:`open_data`, of texts that a decoder learns."""
    file = config.tokenizer or reads.tokenizer
    if file is None:
        raise ValueError(
            f"tokenizer: {reads.network} reads tokens; pass the tokenizer.json that its weights came with, or a GGUF "
            "file, with --tokenizer"
        )
    tokenizer = open_tokenizer(file)
    if tokenizer.vocab_size > reads.vocabulary:
        raise ValueError(
            f"tokenizer: {file} has {tokenizer.vocab_size} tokens, expected at most the {reads.vocabulary} that "
            f"{reads.network} knows; pass the tokenizer.json that its weights came with"
        )
    if texts.is_file(config.data):
        train, evaluation = _files(config)
    else:
        chosen = config.evaluation_split or evaluation_split(config.data, config.data_dir)
        splits = [texts.open_texts(config.data, split, config.data_dir) for split in (config.train_split, chosen)]
        _check_apart(config.data, *splits)
        train, evaluation = (texts.read_split(split) for split in splits)
    of_both = partial(PackedTexts, batch_size=batch_size, vocab_size=reads.vocabulary, seed=seed, mesh=mesh)
    packed = tokenizer.packed(train, config.max_tokens)
    if len(packed.labels) < batch_size:
        raise ValueError(
            f"batch_size: got {batch_size}, expected at most {len(packed.labels)}, the sequences of {config.max_tokens}"
            " tokens that the training texts fill; take a smaller --batch-size or --max-tokens, or more texts"
        )
    return of_both(packed), of_both(tokenizer.packed(evaluation, config.max_tokens), drop_last=False)


def _files(config: DataConfig) -> tuple[texts.Texts, texts.Texts]:
    if config.train_split != "train":
        raise ValueError(
            f"train_split: got {config.train_split!r} of the file {config.data}, which is read whole; leave it out"
        )
    file = config.data_dir / config.data
    found = texts.read_file(file)
    if config.evaluation_split is not None:
        other = config.data_dir / config.evaluation_split
        if other.resolve() == file.resolve():
            raise ValueError(
                f"evaluation_split: got {config.evaluation_split}, which is trained on; name another file, or leave it "
                "out for the last tenth"
            )
        return found, texts.read_file(other, "evaluation_split")
    held_out = -(-len(found.texts) // 10)
    if held_out == len(found.texts):
        raise ValueError(
            f"data: {config.data} holds one text, expected several, of which the last tenth is evaluated on; name "
            "another file for that with --evaluation-split"
        )
    return (
        texts.Texts(found.prompts[:-held_out], found.texts[:-held_out]),
        texts.Texts(found.prompts[-held_out:], found.texts[-held_out:]),
    )


def _check_apart(data: str, train: Split, evaluation: Split) -> None:
    if common := train.overlap(evaluation):
        raise ValueError(
            f"train_split, evaluation_split: {train.split!r} and {evaluation.split!r} of {data} have {common} "
            "examples in common, expected none; take other parts, such as --train-split 'train[:90%]' and "
            "--evaluation-split 'train[90%:]'"
        )


def _transform(augment: Augment, size: int, reads: Reads, views: int = 0) -> ImageTransform:
    mean, std = reads.mean, reads.std
    match augment:
        case "none":
            return ImageTransform(size, mean, std)
        case "flip-crop":
            return ImageTransform(size, mean, std, padding=4, flip=True, views=views)
        case "resized-crop":
            return ImageTransform(size, mean, std, area=(0.08, 1.0), flip=True, views=views)
        case "deit":
            return ImageTransform.deit(size, mean=mean, std=std)
