"""The fit against a loop written by hand, and how inputs are standardized."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smartfrz_jax.learning.fitting import SGD, fit, predict
from smartfrz_jax.learning.inputs import contexts, standardized
from smartfrz_jax.learning.splits import by_run
from smartfrz_jax.predictor.context import context_names
from smartfrz_jax.predictor.encoding import PAPER, Encoding
from smartfrz_jax.predictor.predictor import Statistic
from tests.learning.fitting.runs import OPTIONS, arrays, random_examples, small_predictor


@partial(jax.jit, static_argnums=0)
def loss_and_grads(graphdef, params, statistics, observation, target, weights, weight_decay):
    def regularised(params):
        logits = jax.vmap(nnx.merge(graphdef, params, statistics))(observation)
        log_p = jax.nn.log_softmax(logits)[jnp.arange(len(target)), target]
        kernels = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params) if leaf.ndim == 2)
        loss = -jnp.mean(log_p * weights[target])
        return loss + weight_decay / 2 * kernels, loss

    return jax.value_and_grad(regularised, has_aux=True)(params)


class TestAgainstAnIndependentLoop:
    """All examples in one batch, so that their order does not matter."""

    def by_hand(self, predictor, examples, weights, epochs, learning_rate, momentum, weight_decay=0.0):
        observation, target = examples.batch(np.arange(len(examples)))
        graphdef, params, statistics = nnx.split(standardized(predictor, examples), nnx.Param, ...)
        target, weights = target.astype(np.int32), np.array(weights, np.float32)
        velocity = jax.tree.map(jnp.zeros_like, params)
        losses = []
        for t in range(epochs):
            (_, loss), grads = loss_and_grads(
                graphdef, params, statistics, observation, target, weights, np.float32(weight_decay)
            )
            rate = learning_rate * 0.5 * (1 + np.cos(np.pi * t / epochs))
            velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, grads)
            params = jax.tree.map(lambda p, v, rate=rate: p - float(rate) * v, params, velocity)
            losses.append(float(loss))
        return losses, arrays(nnx.merge(graphdef, params, statistics))

    @pytest.mark.parametrize("class_weights", [None, "balanced", (1.0, 3.0)])
    @pytest.mark.parametrize("batch_size", [42, 50])  # as many as there are examples; with padding
    @pytest.mark.slow
    def test_sgd_with_momentum_and_cosine_annealing(self, class_weights, batch_size):
        examples, predictor = random_examples(), small_predictor(3)
        n, positives = len(examples), int(examples.target.sum())
        assert n == 42
        factors = {None: (1, 1), "balanced": (n / 2 / (n - positives), n / 2 / positives)}
        result = fit(
            predictor,
            examples,
            SGD(epochs=4, learning_rate=0.2, momentum=0.8, batch_size=batch_size),
            held_out=None,
            class_weights=class_weights,
        )
        losses, expected = self.by_hand(predictor, examples, factors.get(class_weights, class_weights), 4, 0.2, 0.8)
        np.testing.assert_allclose(result.losses, losses, rtol=1e-5)
        moved = 0.0
        for got, leaf, start in zip(arrays(result.predictor), expected, arrays(predictor), strict=True):
            np.testing.assert_allclose(got, leaf, rtol=1e-4, atol=1e-6)
            moved = max(moved, np.abs(got - start).max())
        assert moved > 0.05

    @pytest.mark.parametrize("encoding", [PAPER, Encoding(regime=False)], ids=["paper", "scale-free"])
    @pytest.mark.slow
    def test_weight_decay(self, encoding):
        examples, predictor = random_examples(), small_predictor(3, encoding=encoding)
        options = {"epochs": 3, "learning_rate": 0.05, "momentum": 0.8, "weight_decay": 0.3}
        result = fit(predictor, examples, SGD(batch_size=42, **options), held_out=None, class_weights=None)
        losses, expected = self.by_hand(predictor, examples, (1, 1), **options)
        np.testing.assert_allclose(result.losses, losses, rtol=1e-4)
        for got, leaf in zip(arrays(result.predictor), expected, strict=True):
            np.testing.assert_allclose(got, leaf, rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize("batch_size", [64, 32])  # one batch; one and a part
    def test_first_loss_from_probabilities(self, batch_size):
        examples, predictor = random_examples(), small_predictor(3)
        result = fit(
            predictor,
            examples,
            SGD(epochs=1, learning_rate=1e-12, batch_size=batch_size),  # the second batch meets the same predictor
            held_out=None,
            class_weights=(2, 5),
        )
        p = predict(predictor, examples).astype(np.float64)
        expected = np.mean(np.where(examples.target, -5 * np.log(p), -2 * np.log(1 - p)))
        np.testing.assert_allclose(result.losses, [expected], rtol=1e-5)


class TestStandardizing:
    @pytest.mark.slow
    def test_context_has_mean_zero_and_variance_one(self):
        examples, predictor = random_examples(size=12), small_predictor(12, encoding=Encoding())
        values, known = contexts(Encoding(), examples)
        got = standardized(predictor, examples)
        standard = (values - np.asarray(got.context_mean)) / np.asarray(got.context_std)
        for name, column, there in zip(context_names(Encoding()), standard.T, known.T, strict=True):
            assert column[there].mean() == pytest.approx(0, abs=1e-5), name
            assert column[there].std() == pytest.approx(1, rel=1e-4), name
        assert not known.all()
        np.testing.assert_array_equal(predictor.context_std[...], 1)

    @pytest.mark.slow
    def test_a_number_that_is_always_the_same_is_centred(self):
        examples = random_examples(layers=("a",))
        got = standardized(small_predictor(3, encoding=Encoding(weights="none", regime=False)), examples)
        assert np.asarray(got.context_mean).tolist() == pytest.approx([4 / 7, 0])
        assert got.context_std[...].tolist() == pytest.approx([examples.progress.std(), 1])

    @pytest.mark.slow
    def test_fit_takes_the_training_examples_and_leaves_the_scale(self):
        examples, predictor = random_examples(), small_predictor(3, encoding=Encoding(regime=("loss_level",)))
        held_out = by_run(examples, [1])
        result = fit(predictor, examples, **OPTIONS | {"held_out": held_out})
        expected = standardized(predictor, examples.select(~held_out))
        for name in ("context_mean", "context_std"):
            np.testing.assert_array_equal(getattr(result.predictor, name)[...], getattr(expected, name)[...])
        other = standardized(predictor, examples)
        assert not np.array_equal(other.context_mean[...], expected.context_mean[...])

    def test_the_papers_predictor_stays_as_it_is(self):
        predictor = small_predictor(3)
        got = standardized(predictor, random_examples())
        for a, b in zip(arrays(predictor), arrays(got), strict=True):
            np.testing.assert_array_equal(a, b)
        assert not jax.tree.leaves(nnx.state(got, Statistic))
