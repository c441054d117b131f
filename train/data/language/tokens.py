"""Byte-level BPE tokens of language models, from the file that the model's tokenizer came in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from models import gguf
from smartfrz_jax.pytrees.file_paths import PathLike, as_path
from train.data.language.packing import Packed, pack
from train.data.language.texts import Texts

if TYPE_CHECKING:
    import tokenizers
    from jaxtyping import Int

# What stands between two texts, by the names that vocabularies have for it; what a chat model ends a message with comes
# last.
_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_CONTROL = 3


class TextTokenizer:
    """Makes tokens of texts.

    Attributes:
        vocab_size: Number of tokens; the numbers of all are below.
        separator: Number of the token that stands between two texts.

    Args:
        tokenizer: A tokenizer of the package ``tokenizers``.
        separator: Number of the token that stands between two texts.

    Example:
        >>> tokenizer = open_tokenizer("SmolLM2-135M-Instruct.Q4_1.gguf")  # doctest: +SKIP
        >>> tokenizer(["It was 1984."])  # doctest: +SKIP
        [array([ 1589,   436,   216,    33,    41,    40,    36,    30], dtype=int32)]
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, separator: int):
        self.vocab_size = tokenizer.get_vocab_size()
        self.separator = separator
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> list[Int[np.ndarray, " tokens"]]:
        """Tokens of each text, int32, without a separator."""
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(one.ids, np.int32) for one in encoded]

    def packed(self, texts: Texts, length: int) -> Packed:
        """Texts packed into sequences of ``length`` tokens, their prompts ignored; see :func:`pack`."""
        prompts, rows = self(texts.prompts), self(texts.texts)
        whole = [np.concatenate([prompt, row]) for prompt, row in zip(prompts, rows, strict=True)]
        return pack(whole, length, self.separator, prompts=[len(prompt) for prompt in prompts])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of tokens, with those of control tokens."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def open_tokenizer(path: PathLike) -> TextTokenizer:
    """Reads the tokenizer of a model.

    Args:
        path: The model's GGUF file, or Hugging Face's ``tokenizer.json``.

    Raises:
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If the package tokenizers, or for GGUF files gguf, is not installed.
        ValueError: If it is no file of that kind, another kind of vocabulary, or one without an end of text.
    """
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; texts need the packages for training: pip install 'smartfrz_jax[train]'"
        ) from error
    path = as_path(path, "tokenizer")
    if path.suffix == ".gguf":
        return _of_metadata(path, gguf.metadata(path))
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer: {path} is not there; expected a tokenizer.json, or a GGUF file")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(path.read_text("utf-8"))
    except Exception as error:
        raise ValueError(
            f"tokenizer: {path} is not a tokenizer.json ({error}); expected one as Hugging Face has beside a model's "
            "weights, or a GGUF file"
        ) from error
    return TextTokenizer(tokenizer, _separator(path, tokenizer.get_vocab(), None))


def _of_metadata(path: PathLike, found: Mapping[str, Any]) -> TextTokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    kind, splits = found.get("tokenizer.ggml.model"), found.get("tokenizer.ggml.pre", "gpt-2")
    words = pre_tokenizers.ByteLevel(add_prefix_space=bool(found.get("tokenizer.ggml.add_space_prefix", False)))
    known = {
        "gpt-2": words,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]),
    }
    if kind != "gpt2" or splits not in known:
        raise ValueError(
            f"tokenizer: {path} has a vocabulary of kind {kind!r} whose words are split as {splits!r}, expected 'gpt2' "
            f"with one of {list(known)}; pass the tokenizer.json of the model"
        )
    tokens = found["tokenizer.ggml.tokens"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in found["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = known[splits]
    tokenizer.decoder = decoders.ByteLevel()
    kinds = found["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    end = found.get("tokenizer.ggml.eos_token_id")
    return TextTokenizer(tokenizer, _separator(path, vocabulary, None if end is None else int(end)))


def _separator(path: PathLike, vocabulary: Mapping[str, int], end: int | None) -> int:
    """Number of the token that ends a text, rather than ``end``, which in chat models ends a message."""
    separator = next((vocabulary[token] for token in _SEPARATORS if token in vocabulary), end)
    if separator is None:
        raise ValueError(
            f"tokenizer: {path} has none of the tokens {list(_SEPARATORS)}, expected one to end texts with"
        )
    return separator
