"""The training and the evaluation split that the command line asks for."""

from __future__ import annotations

from train.data import Data, ImageTransform, Sentences, Split, WordPiece, evaluation_split, open_images, open_split
from train.networks import VOCABULARY, is_text, normalisation
from train.options import Options


def open_data(options: Options) -> tuple[Data, Data]:
    """Opens both splits; training images are augmented, evaluation images only resized and normalised.

    Args:
        options: The command line.

    Returns:
        Training and evaluation data.

    Raises:
        FileNotFoundError: If the data directory, the set or the vocabulary is not there.
        ValueError: If a split does not exist, both have examples in common or the training split is smaller than a
            batch; or the set, or the vocabulary, does not hold what the network reads.
    """
    chosen = options.evaluation_split or evaluation_split(options.data, options.data_dir)
    train = open_split(options.data, options.train_split, options.data_dir)
    evaluation = open_split(options.data, chosen, options.data_dir)
    if (train.kind == "text") != is_text(options.model):
        raise ValueError(
            f"data: {options.data} holds {train.kind}s, which {options.model} does not read; "
            f"choose {'an image' if train.kind == 'image' else 'a text'} network or another set"
        )
    if common := train.overlap(evaluation):
        raise ValueError(
            f"train_split, evaluation_split: {options.train_split!r} and {chosen!r} of {options.data} have {common} "
            "examples in common, expected none; take other parts, such as --train-split 'train[:90%]' and "
            "--evaluation-split 'train[90%:]'"
        )
    # Examples that only fill a batch up would train too: training drops the last partial batch, evaluation does not.
    if len(train) < options.batch_size:
        raise ValueError(
            f"batch_size: got {options.batch_size}, expected at most {len(train)}, the examples of the training split "
            f"{options.train_split!r}; take a smaller --batch-size or a larger --train-split"
        )
    if train.kind == "image":
        return _images(train, options, options.augment), _images(evaluation, options, "none", drop_last=False)
    if options.vocab is None:
        raise ValueError(f"vocab: {options.model} reads tokens; pass its vocab.txt with --vocab")
    tokenizer = WordPiece(options.vocab, max_length=options.max_tokens)
    if tokenizer.vocab_size > VOCABULARY:  # of tokens that it does not know, embeddings are NaN
        raise ValueError(
            f"vocab: {options.vocab} holds {tokenizer.vocab_size} tokens, expected at most the {VOCABULARY} that "
            f"{options.model} knows; pass the vocab.txt that its weights came with, with --vocab"
        )
    return _sentences(train, options, tokenizer), _sentences(evaluation, options, tokenizer, drop_last=False)


def _images(split: Split, options: Options, augment: str, *, drop_last: bool = True) -> Data:
    size, (mean, std) = options.image_size, normalisation(options.model)
    match augment:
        case "flip-crop":
            transform = ImageTransform(size, mean, std, padding=4, flip=True)
        case "resized-crop":
            transform = ImageTransform(size, mean, std, area=(0.08, 1.0), flip=True)
        case "deit":
            transform = ImageTransform.deit(size, mean=mean, std=std)
        case _:
            transform = ImageTransform(size, mean, std)
    return open_images(
        split, options.batch_size, transform, seed=options.seed, drop_last=drop_last, workers=options.workers
    )


def _sentences(split: Split, options: Options, tokenizer: WordPiece, *, drop_last: bool = True) -> Data:
    return Sentences(split, options.batch_size, tokenizer, seed=options.seed, drop_last=drop_last)
