"""What is fitted to and predicted of, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from smartfrz_jax import Predictor
from smartfrz_jax.learning import fitting
from smartfrz_jax.learning.fitting import SGD, fit, predict
from smartfrz_jax.learning.splits import by_run
from smartfrz_jax.predictor import PredictorConfig
from smartfrz_jax.predictor.encoding import Encoding
from tests.learning.fitting.runs import OPTIONS, random_examples, small_predictor


class TestPredict:
    @pytest.mark.slow
    def test_is_the_predictor_on_each_example(self):
        examples, predictor = random_examples(), small_predictor(3)
        observation, _ = examples.batch(np.arange(42))
        one = jax.jit(predictor)
        expected = [
            np.asarray(jax.nn.softmax(one(jax.tree.map(lambda leaf, i=i: leaf[i], observation))))[1] for i in range(42)
        ]
        for batch_size in (10, 42):
            got = predict(predictor, examples, batch_size=batch_size)
            assert (got.shape, got.dtype) == ((42,), np.float32)
            np.testing.assert_allclose(got, expected, rtol=1e-5)
        assert np.ptp(expected) > 0.01

    @pytest.mark.slow
    def test_how_many_weights_there_are_is_all_one_to_a_predictor_that_reads_none(self):
        examples = random_examples()
        config = {"hidden": 4, "encoding": Encoding(weights="none", regime=("loss_level",))}
        got, expected = (
            predict(Predictor(PredictorConfig(size=size, **config), rngs=nnx.Rngs(0)), examples) for size in (5, 3)
        )
        np.testing.assert_array_equal(got, expected)

    def test_of_nothing(self):
        examples = random_examples()
        assert predict(small_predictor(3), examples.select(examples.run == 9)).shape == (0,)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="examples: have 3 tailored weights per record, but the predictor takes 5"):
            predict(small_predictor(5), random_examples())
        with pytest.raises(ValueError, match="batch_size: got 0"):
            predict(small_predictor(3), random_examples(), batch_size=0)


class TestFitRefuses:
    def refuses(self, message, examples=None, size=3, **changes):
        with pytest.raises(ValueError, match=message):
            fit(small_predictor(size), examples or random_examples(), **OPTIONS | changes)

    def test_another_size(self):
        self.refuses(r"examples: have 3 .* the predictor takes 4; use PredictorConfig\(size=3\)", size=4)

    @pytest.mark.parametrize(("value", "name"), [(True, "freeze"), (False, "keep")])
    def test_targets_of_one_class(self, value, name):
        examples = random_examples()
        flat = dataclasses.replace(examples, target=np.full(len(examples), value))
        self.refuses(f"the targets of all 42 training examples are {name}; .*criterion", flat)
        mixed = dataclasses.replace(examples, target=np.where(examples.run == 1, not value, value))
        self.refuses(f"all 28 training examples are {name}", mixed, held_out=by_run(mixed, [1]))

    def test_held_out_that_does_not_fit(self):
        self.refuses(r"held_out: got bool of shape \(3,\), expected bool of shape \(42,\)", held_out=np.ones(3, bool))
        self.refuses(r"held_out: got int64 of shape \(1,\)", held_out=[1])
        self.refuses("held_out: selects 0 of 42", held_out=np.zeros(42, bool))
        self.refuses("held_out: selects 42 of 42", held_out=np.ones(42, bool))
        self.refuses(r"held_out: got bool of shape \(3,\)", held_out=[True, False, True])

    def test_held_out_may_be_a_list(self):
        examples = random_examples()
        training, testing = fitting._split(examples, by_run(examples, [1]).tolist())
        assert (len(training), len(testing)) == (28, 14)

    def test_held_out_moments(self):
        examples = random_examples()
        self.refuses("held_out: divides the examples of layer", held_out=examples.moment == 3)
        self.refuses(
            "held_out: divides the examples of layer 'b' in recording 2",
            held_out=by_run(examples, [1]) | ((examples.run == 2) & (examples.layer == 1) & (examples.moment == 6)),
        )

    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            ("epochs", 0),
            ("batch_size", 0),
            ("learning_rate", 0.0),
            ("learning_rate", float("nan")),
            ("learning_rate", float("inf")),
            ("momentum", -0.1),
            ("momentum", 1.0),
            ("weight_decay", -1e-4),
            ("weight_decay", float("inf")),
        ],
    )
    def test_numbers_out_of_range(self, argument, value):
        with pytest.raises(ValueError, match=f"{argument}: got"):
            dataclasses.replace(OPTIONS["sgd"], **{argument: value})

    @pytest.mark.parametrize("value", [(1.0, 0.0), (1.0, float("inf")), (1.0, 2.0, 3.0)])
    def test_class_weights_out_of_range(self, value):
        self.refuses("class_weights: got", class_weights=value)

    def test_class_weights_by_an_unknown_name(self):
        self.refuses("class_weights: got 'equal', expected 'balanced'", class_weights="equal")

    @pytest.mark.slow
    def test_a_diverging_fit(self):
        self.refuses("learning_rate: the loss became .* choose a lower one", sgd=SGD(epochs=5, learning_rate=1e12))
