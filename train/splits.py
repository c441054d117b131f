"""The training and the evaluation split that the command line asks for."""

from __future__ import annotations

from train.data import Data, ImageTransform, Sentences, Split, WordPiece, evaluation_split, open_images, open_split
from train.networks import is_text, normalisation
from train.options import Options


def open_data(options: Options) -> tuple[Data, Data]:
    """Opens both splits; training images are augmented, evaluation images only resized and normalised.

    Args:
        options: The command line.

    Returns:
        Training and evaluation data.

    Raises:
        FileNotFoundError: If the data directory, the set or the vocabulary is not there.
        ValueError: If a split does not exist, or the set does not hold what the network reads.
    """
    chosen = options.evaluation_split or evaluation_split(options.data, options.data_dir)
    train = open_split(options.data, options.train_split, options.data_dir)
    evaluation = open_split(options.data, chosen, options.data_dir)
    if (train.kind == "text") != is_text(options.model):
        raise ValueError(
            f"data: {options.data} holds {train.kind}s, which {options.model} does not read; "
            f"choose {'an image' if train.kind == 'image' else 'a text'} network or another set"
        )
    if train.kind == "image":
        return _images(train, options, options.augment), _images(evaluation, options, "none")
    if options.vocab is None:
        raise ValueError(f"vocab: {options.model} reads tokens; pass its vocab.txt with --vocab")
    tokenizer = WordPiece(options.vocab, max_length=options.max_tokens)
    return _sentences(train, options, tokenizer), _sentences(evaluation, options, tokenizer)


def _images(split: Split, options: Options, augment: str) -> Data:
    size = options.image_size or 224
    mean, std = normalisation(options.model)
    match augment:
        case "flip-crop":
            transform = ImageTransform(size, mean, std, padding=4, flip=True)
        case "resized-crop":
            transform = ImageTransform(size, mean, std, area=(0.08, 1.0), flip=True)
        case "deit":
            transform = ImageTransform.deit(size, mean=mean, std=std)
        case _:
            transform = ImageTransform(size, mean, std)
    drop_last = len(split) >= options.batch_size
    return open_images(
        split, options.batch_size, transform, seed=options.seed, drop_last=drop_last, workers=options.workers
    )


def _sentences(split: Split, options: Options, tokenizer: WordPiece) -> Data:
    drop_last = len(split) >= options.batch_size
    return Sentences(split, options.batch_size, tokenizer, seed=options.seed, drop_last=drop_last)
