"""WordPiece tokens of BERT, from a vocabulary file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from smartfrz_jax.pytrees.file_paths import as_path

if TYPE_CHECKING:
    from jaxtyping import Int

MIN_LENGTH = 4  # two tokens beside [CLS] and [SEP]
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


class Tokens(NamedTuple):
    """Encoded texts, int32 of shape ``(examples, length)`` each.

    Attributes:
        input_ids: Numbers of the tokens, filled up with that of ``[PAD]``.
        attention_mask: 1 at tokens, 0 at padding.
        token_type_ids: 1 at the second sentence and its ``[SEP]``, else 0.
    """

    input_ids: Int[np.ndarray, "n length"]
    attention_mask: Int[np.ndarray, "n length"]
    token_type_ids: Int[np.ndarray, "n length"]


class WordPiece:
    """Makes ``[CLS] a [SEP]`` or ``[CLS] a [SEP] b [SEP]`` of texts, as BERT was trained.

    Attributes:
        vocab_size: Number of lines of the vocabulary; the numbers of all tokens are below.
        max_length: Tokens that are kept of an example.
        pad: Number of ``[PAD]``.

    Args:
        vocab_file: One token a line (BERT's ``vocab.txt``).
        lowercase: Whether the vocabulary is one of lower-case letters without accents (uncased BERT, MiniLM).
        max_length: Tokens that are kept of an example; of two sentences the longer one is cut first.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a special token is missing in it, or ``max_length`` is too small.
        ModuleNotFoundError: If the package tokenizers is not installed.

    Example:
        >>> tokenizer = WordPiece("vocab.txt")  # doctest: +SKIP
        >>> tokenizer(["I noticed the."]).input_ids  # doctest: +SKIP
        array([[ 101, 1045, 4384, 1996, 1012,  102]], dtype=int32)
    """

    def __init__(self, vocab_file: str | os.PathLike[str], *, lowercase: bool = True, max_length: int = 128):
        try:
            import tokenizers
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{error}; text sets need the packages for training: pip install 'smartfrz_jax[train]'"
            ) from error

        path = as_path(vocab_file, "vocab_file")
        if not path.is_file():
            raise FileNotFoundError(
                f"vocab_file: {path} is not a file, expected the vocabulary that the model was trained with, one token "
                "a line (vocab.txt beside its weights)"
            )
        if max_length < MIN_LENGTH:
            raise ValueError(
                f"max_length: got {max_length}, expected at least {MIN_LENGTH}: two tokens beside [CLS] and [SEP]"
            )
        lines = path.read_text("utf-8").removesuffix("\n").split("\n")  # splitlines() also splits at U+2028 and others
        vocabulary = {token: number for number, token in enumerate(lines)}
        missing = [token for token in _SPECIAL if token not in vocabulary]
        if missing:
            raise ValueError(
                f"vocab_file: {path} has {len(vocabulary)} tokens without {missing}, expected a vocabulary of BERT, "
                "one token a line"
            )
        self.vocab_size = len(lines)
        self.max_length = max_length
        self.pad = vocabulary["[PAD]"]
        self._tokenizer = tokenizers.Tokenizer(
            tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100)
        )
        self._tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
        self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        self._tokenizer.post_processor = tokenizers.processors.BertProcessing(
            ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
        )
        self._tokenizer.enable_truncation(max_length, strategy="longest_first")

    def __call__(self, first: Sequence[str], second: Sequence[str] | None = None) -> Tokens:
        """Encodes texts, or pairs of texts, to the length of the longest.

        Raises:
            ValueError: If there are not as many second sentences as first ones.
        """
        if second is not None and len(second) != len(first):
            raise ValueError(f"second: got {len(second)} texts, expected as many as the first ones, {len(first)}")
        rows = list(first) if second is None else list(zip(first, second, strict=True))
        encoded = self._tokenizer.encode_batch(rows)
        length = max((len(one.ids) for one in encoded), default=0)
        tokens = Tokens(
            np.full((len(rows), length), self.pad, np.int32),
            np.zeros((len(rows), length), np.int32),
            np.zeros((len(rows), length), np.int32),
        )
        for row, one in enumerate(encoded):
            tokens.input_ids[row, : len(one.ids)] = one.ids
            tokens.token_type_ids[row, : len(one.ids)] = one.type_ids
            tokens.attention_mask[row, : len(one.ids)] = 1
        return tokens
