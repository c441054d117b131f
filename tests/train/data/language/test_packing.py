"""Packed sequences hold every token once, in batches that are a function of the seed and the step."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.language.packing import IGNORED, PackedTexts, pack
from train.data.language.perplexity import log_likelihood, next_token_loss, perplexity, token_sums

SEPARATOR = 9


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 8), max_size=12), min_size=1, max_size=9), st.integers(1, 10))
def test_every_token_and_every_end_is_predicted_once_from_what_is_before_it(texts, length):
    packed = pack([np.array(text, np.int32) for text in texts], length, SEPARATOR)
    assert {array.dtype for array in packed} == {np.dtype(np.int32)}
    assert {array.shape[1] for array in packed} == {length}
    pairs = []
    for ids, segments, labels in zip(*packed, strict=True):
        assert ((segments == 0) == (labels == IGNORED)).all()
        assert (ids[segments == 0] == SEPARATOR).all()
        assert (np.diff(segments[segments > 0]) >= 0).all(), "texts lie one behind the other"
        assert (np.diff((segments > 0).astype(int)) <= 0).all(), "and padding behind them"
        inside = np.flatnonzero((segments[1:] == segments[:-1]) & (segments[1:] > 0))
        np.testing.assert_array_equal(labels[inside], ids[inside + 1])
        pairs += zip(ids[segments > 0], labels[segments > 0], strict=True)
    expected = [pair for text in texts for pair in zip([SEPARATOR, *text], [*text, SEPARATOR], strict=True)]
    assert sorted(pairs) == sorted(expected)


def test_texts_go_into_the_first_sequence_with_room_and_prompts_are_not_learned():
    texts = [np.full(size, size, np.int32) for size in (4, 3, 2, 1)]
    packed = pack(texts, 8, SEPARATOR, prompts=[0, 2, 0, 1])
    assert packed.segment_ids.tolist() == [[1] * 5 + [2] * 3, [1] * 4 + [2] * 2 + [0] * 2]
    assert packed.input_ids[1].tolist() == [SEPARATOR, 3, 3, 3, SEPARATOR, 1, SEPARATOR, SEPARATOR]
    assert packed.labels[1].tolist() == [IGNORED, IGNORED, 3, SEPARATOR, IGNORED, SEPARATOR, IGNORED, IGNORED]
    with pytest.raises(ValueError, match="packed: got no token to predict"):
        PackedTexts(pack([], 8, SEPARATOR), 1, vocab_size=10)


def test_batches_are_a_function_of_the_step_and_an_evaluation_sees_every_token_once():
    texts = [np.arange(size) % 7 for size in range(1, 23)]
    packed = pack(texts, 16, SEPARATOR)
    data = PackedTexts(packed, 4, vocab_size=10, seed=3)
    assert data.labelled == sum(len(text) + 1 for text in texts)
    assert data.num_classes == 10
    seen = np.concatenate([data.indices(step) for step in range(data.steps_per_epoch)])
    assert len(set(seen.tolist())) == 4 * data.steps_per_epoch == len(packed.labels) // 4 * 4
    later = list(data.batches(2, 4))[1]
    np.testing.assert_array_equal(later.inputs[0], packed.input_ids[data.indices(3)])
    np.testing.assert_array_equal(later.labels, packed.labels[data.indices(3)])
    logits = np.random.default_rng(0).normal(size=(10, 10)).astype(np.float32)  # of a token after each
    sums = sum(token_sums(jnp.asarray(logits)[b.inputs[0]], b.labels, b.weights) for b in data.evaluation_batches())
    losses = np.log(np.exp(logits.astype(np.float64)).sum(1))[:, None] - logits
    pairs = [pair for text in texts for pair in zip([SEPARATOR, *text], [*text, SEPARATOR], strict=True)]
    expected = np.mean([losses[pair] for pair in pairs])
    assert int(sums[1]) == len(pairs)
    assert log_likelihood(sums) == pytest.approx(-expected, rel=1e-5)
    assert perplexity(sums) == pytest.approx(np.exp(expected), rel=1e-5)


def test_a_loss_is_the_mean_over_what_is_not_ignored():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 5)), jnp.float32)
    labels = jnp.array([[1, IGNORED, 4], [IGNORED, IGNORED, 0]])
    log_probabilities = logits - jnp.log(jnp.exp(logits).sum(-1, keepdims=True))
    expected = -(log_probabilities[0, 0, 1] + log_probabilities[0, 2, 4] + log_probabilities[1, 2, 0]) / 3
    np.testing.assert_allclose(next_token_loss(logits, labels), expected, rtol=1e-5)
    assert next_token_loss(logits, jnp.full_like(labels, IGNORED)) == 0
    assert np.isnan(perplexity(np.zeros(2)))
    assert perplexity(np.array([1e4, 1.0])) == pytest.approx(1e300)
