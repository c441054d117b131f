import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smartfrz_jax import Predictor, find_layers
from smartfrz_jax.layers.outputs import layer_outputs
from smartfrz_jax.learning import fitting
from smartfrz_jax.learning.evaluation import evaluate
from smartfrz_jax.learning.examples import Examples, make_examples
from smartfrz_jax.learning.fitting import fit, predict
from smartfrz_jax.learning.hiding import Hiding
from smartfrz_jax.learning.recorder import Recorder
from smartfrz_jax.learning.recording import Recording
from smartfrz_jax.learning.splits import by_layer, by_run, moments
from smartfrz_jax.learning.standardizing import contexts, standardized
from smartfrz_jax.learning.targets import Settled
from smartfrz_jax.predictor import PredictorConfig, Tailoring
from smartfrz_jax.predictor.context import context_names
from smartfrz_jax.predictor.encoding import PAPER, Encoding
from smartfrz_jax.predictor.predictor import Statistic


def small_predictor(size, seed=0, encoding=PAPER):
    config = PredictorConfig(size=size, hidden=16, features=8, head_hidden=8, encoding=encoding)
    return Predictor(config, rngs=nnx.Rngs(seed))


def arrays(predictor):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(predictor))]


def random_recording(seed, records=7, layers=("a", "b"), size=3):
    """Weights that grow, and a CKA above 0.7 (the target below) late in the run, for the first layer first."""
    rng = np.random.default_rng(seed)
    growth = np.linspace(0.2, 2, records)[:, None, None]
    return Recording(
        layers=layers,
        steps=np.arange(1, records + 1),
        record_every=1,
        total_steps=records,
        weights=(rng.standard_normal((records, len(layers), size)) * growth).astype(np.float32),
        start=rng.standard_normal((len(layers), size)).astype(np.float32),
        losses=rng.uniform(1, 2, records),
        first_loss=2.0,
        cka=np.linspace(0, 1, records)[:, None] * np.linspace(1, 0.8, len(layers)),
        contribution=np.where(np.arange(records)[:, None] % 2, rng.standard_normal((records, len(layers))), np.nan),
    )


def late(recording):
    return recording.cka > 0.7


def random_examples(runs=3, **kwargs) -> Examples:
    recordings = [random_recording(seed, **kwargs) for seed in range(runs)]
    return make_examples(recordings, window=4, min_records=1, criterion=late)


OPTIONS = {"epochs": 2, "learning_rate": 0.05, "held_out": None}


# Networks that really train: fine-tuned from the same weights, each run with noise of its own in weights and data.

SHAPES = {"first": (6, 12), "second": (12, 12), "third": (12, 12), "out": (12, 2)}
X = jnp.asarray(np.random.default_rng(9).standard_normal((64, 6)), jnp.float32)
Y = jnp.stack([jnp.sin(2 * X[:, 0]), X[:, 1] * X[:, 2]], axis=1)


def forward(params, x):
    for name in ("first", "second", "third"):
        x = jnp.tanh(x @ params[name]["kernel"])
    return x @ params["out"]["kernel"]


def initial(seed):
    common, own = np.random.default_rng(0), np.random.default_rng(seed)
    return {
        name: {
            "kernel": jnp.asarray(
                (common.standard_normal(shape) + 0.2 * own.standard_normal(shape)) * 0.5 / np.sqrt(shape[0]),
                jnp.float32,
            )
        }
        for name, shape in SHAPES.items()
    }


@jax.jit
def twenty_steps(params, key):
    def step(params, key):
        x, y = (a[jax.random.choice(key, 64, (32,))] for a in (X, Y))
        grads = jax.grad(lambda p: jnp.mean((forward(p, x) - y) ** 2))(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), None

    return jax.lax.scan(step, params, jax.random.split(key, 20))[0]


@pytest.fixture(scope="module")
def trained() -> Examples:
    layers = find_layers(initial(0), forward, X)
    features = jax.jit(layer_outputs(initial(0), {layer.name: layer.params for layer in layers}, forward, X))
    tailoring = Tailoring.create(layers, initial(0), size=16)
    recordings = []
    for seed in range(16):
        keys = jax.random.split(jax.random.key(seed), (2, 40))
        reference = initial(100 + seed)
        for key in keys[0]:
            reference = twenty_steps(reference, key)
        params = initial(seed)
        recorder = Recorder(layers, tailoring, params, record_every=20, reference_features=features(reference, X))
        for record, key in enumerate(keys[1]):
            params = twenty_steps(params, key)
            recorder.record(20 * (record + 1), params, features(params, X))
        recordings.append(recorder.finish(800, seed=seed))
    return make_examples(recordings, window=8, min_records=1, criterion=Settled(tolerance=0.05))


def fit_trained(examples, **options):
    held_out = by_run(examples, range(10, 16))
    return fit(small_predictor(16), examples, held_out=held_out, epochs=10, learning_rate=0.01, **options)


@pytest.mark.slow
def test_learns_from_networks_that_train(trained):
    result = fit_trained(trained)
    assert 0.1 < trained.target.mean() < 0.9
    assert result.losses.shape == (10,)
    assert result.losses[-1] < result.losses[0] / 2
    assert len(result.evaluations) == 10
    assert result.evaluations[-1].n == 6 * 40 * 4
    assert result.evaluations[-1].auc > 0.8
    assert result.evaluations[-1].balanced_accuracy > 0.7


@pytest.mark.slow
def test_nothing_of_the_held_out_targets_leaks(trained):
    shuffled = np.random.default_rng(0).permutation(trained.target)
    result = fit_trained(dataclasses.replace(trained, target=shuffled))
    assert abs(result.evaluations[-1].auc - 0.5) < 0.06


@pytest.mark.slow
def test_class_weights_move_the_decision(trained):
    held_out = by_run(trained, range(10, 16))
    testing = trained.select(held_out)
    rate = {}
    for weights in ((10.0, 1.0), None, "balanced", (1.0, 10.0)):
        result = fit(
            small_predictor(16), trained, held_out=held_out, epochs=2, learning_rate=0.01, class_weights=weights
        )
        rate[weights] = predict(result.predictor, testing).mean()
    assert rate[10.0, 1.0] + 0.1 < rate[None] < rate["balanced"] - 0.02
    assert rate["balanced"] < rate[1.0, 10.0] - 0.1


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
            held_out=None,
            epochs=4,
            learning_rate=0.2,
            momentum=0.8,
            batch_size=batch_size,
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
        result = fit(predictor, examples, held_out=None, batch_size=42, class_weights=None, **options)
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
            held_out=None,
            epochs=1,
            learning_rate=1e-12,  # so that the second batch meets the same predictor
            batch_size=batch_size,
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


@pytest.mark.slow
def test_hiding_is_for_training_only():
    examples, predictor = random_examples(), small_predictor(3, encoding=Encoding(regime=False))
    held_out = by_run(examples, [1])
    options = OPTIONS | {"held_out": held_out}
    plain, same, hidden, again = (
        fit(predictor, examples, hiding=hiding, **options)
        for hiding in (None, Hiding(), Hiding(progress=1.0, records=0.5), Hiding(progress=1.0, records=0.5))
    )
    np.testing.assert_array_equal(plain.losses, same.losses)
    assert (plain.losses != hidden.losses).all()
    np.testing.assert_array_equal(hidden.losses, again.losses)
    testing = examples.select(held_out)
    assert hidden.evaluations[-1] == evaluate(
        predict(hidden.predictor, testing), testing.target, groups=moments(testing)
    )


@pytest.mark.slow
def test_every_example_once_an_epoch_in_a_new_order(monkeypatch):
    examples, seen = random_examples(), []
    original = Examples.batch
    monkeypatch.setattr(Examples, "batch", lambda self, chosen: seen.append(chosen) or original(self, chosen))
    fit(small_predictor(3), examples, batch_size=8, **OPTIONS)
    assert [len(chosen) for chosen in seen] == [8] * 12
    epochs = [np.concatenate(seen[start : start + 6])[:42] for start in (0, 6)]
    for order in epochs:
        assert sorted(order.tolist()) == list(range(42))
    assert epochs[0].tolist() != epochs[1].tolist()


@pytest.mark.slow
def test_compiles_one_step():
    examples, predictor = random_examples(), small_predictor(3)
    before = fitting._step._cache_size()
    fit(predictor, examples, batch_size=9, **OPTIONS)  # 42 is no multiple of 9
    assert fitting._step._cache_size() == before + 1
    fit(predictor, examples, batch_size=9, epochs=3, learning_rate=0.01, held_out=by_run(examples, [1]), seed=1)
    fit(small_predictor(3, seed=1), examples, batch_size=9, **OPTIONS)
    assert fitting._step._cache_size() == before + 1


@pytest.mark.slow
def test_same_seed_same_bits():
    examples = random_examples()
    first, again, other = (fit(small_predictor(3), examples, seed=s, batch_size=8, **OPTIONS) for s in (3, 3, 4))
    for a, b in zip(arrays(first.predictor), arrays(again.predictor), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(first.losses, again.losses)
    assert any((a != b).any() for a, b in zip(arrays(first.predictor), arrays(other.predictor), strict=True))


@pytest.mark.slow
def test_the_predictor_passed_in_is_not_changed():
    predictor = small_predictor(3)
    before = [leaf.copy() for leaf in arrays(predictor)]
    result = fit(predictor, random_examples(), **OPTIONS)
    for a, b, c in zip(before, arrays(predictor), arrays(result.predictor), strict=True):
        np.testing.assert_array_equal(a, b)
        assert (b != c).any()
    assert result.predictor.config == predictor.config


@pytest.mark.slow
def test_held_out_examples_are_evaluated_on_and_nothing_else():
    examples, predictor = random_examples(), small_predictor(3)
    held_out = by_run(examples, [1])
    result = fit(predictor, examples, **OPTIONS | {"held_out": held_out})
    testing = examples.select(held_out)
    assert result.evaluations[-1] == evaluate(
        predict(result.predictor, testing), testing.target, groups=moments(testing)
    )
    assert len(result.evaluations) == 2
    first, second, third = examples.recordings
    changed = dataclasses.replace(second, weights=9 * second.weights)
    other = dataclasses.replace(examples, recordings=(first, changed, third))
    for a, b in zip(
        arrays(result.predictor),
        arrays(fit(predictor, other, **OPTIONS | {"held_out": held_out}).predictor),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert fit(predictor, examples, **OPTIONS).evaluations == ()


def test_held_out_runs_of_one_class_only():
    examples = random_examples()
    flat = dataclasses.replace(examples, target=examples.target & (examples.run != 1))
    result = fit(small_predictor(3), flat, **OPTIONS | {"held_out": by_run(flat, [1])})
    assert np.isnan(result.evaluations[-1].auc)


def test_progress_wraps_the_epochs():
    seen = []

    def progress(epochs):
        assert len(epochs) == 2  # tqdm shows a total
        for epoch in epochs:
            seen.append(epoch)
            yield epoch

    fit(small_predictor(3), random_examples(), progress=progress, **OPTIONS)
    assert seen == [0, 1]


def test_layers_can_be_held_out_of_a_single_run():
    examples = random_examples(runs=1)
    result = fit(small_predictor(3), examples, **OPTIONS | {"held_out": by_layer(examples, ["b"])})
    assert result.evaluations[-1].n == 7


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
            ("class_weights", (1.0, 0.0)),
            ("class_weights", (1.0, float("inf"))),
            ("class_weights", (1.0, 2.0, 3.0)),
        ],
    )
    def test_numbers_out_of_range(self, argument, value):
        self.refuses(f"{argument}: got", **{argument: value})

    def test_class_weights_by_an_unknown_name(self):
        self.refuses("class_weights: got 'equal', expected 'balanced'", class_weights="equal")

    @pytest.mark.slow
    def test_a_diverging_fit(self):
        self.refuses("learning_rate: the loss became .* choose a lower one", learning_rate=1e12, epochs=5)
