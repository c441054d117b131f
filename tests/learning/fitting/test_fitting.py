"""Predictors are fitted to examples: they learn, nothing leaks, and the same again gives the same bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smartfrz_jax import find_layers
from smartfrz_jax.layers.outputs import layer_outputs
from smartfrz_jax.learning import fitting
from smartfrz_jax.learning.evaluation import evaluate
from smartfrz_jax.learning.examples import Examples, Hiding, make_examples
from smartfrz_jax.learning.fitting import SGD, fit, predict
from smartfrz_jax.learning.recorder import Recorder
from smartfrz_jax.learning.splits import by_layer, by_run, moments
from smartfrz_jax.learning.targets import Settled
from smartfrz_jax.predictor import Tailoring
from smartfrz_jax.predictor.encoding import Encoding
from tests.learning.fitting.runs import OPTIONS, arrays, random_examples, small_predictor

EIGHT = dataclasses.replace(OPTIONS["sgd"], batch_size=8)

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
    return fit(small_predictor(16), examples, SGD(epochs=10, learning_rate=0.01), held_out=held_out, **options)


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
            small_predictor(16), trained, SGD(epochs=2, learning_rate=0.01), held_out=held_out, class_weights=weights
        )
        rate[weights] = predict(result.predictor, testing).mean()
    assert rate[10.0, 1.0] + 0.1 < rate[None] < rate["balanced"] - 0.02
    assert rate["balanced"] < rate[1.0, 10.0] - 0.1


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
    fit(small_predictor(3), examples, EIGHT, held_out=None)
    assert [len(chosen) for chosen in seen] == [8] * 12
    epochs = [np.concatenate(seen[start : start + 6])[:42] for start in (0, 6)]
    for order in epochs:
        assert sorted(order.tolist()) == list(range(42))
    assert epochs[0].tolist() != epochs[1].tolist()


@pytest.mark.slow
def test_compiles_one_step():
    examples, predictor = random_examples(), small_predictor(3)
    nine = dataclasses.replace(OPTIONS["sgd"], batch_size=9)
    before = fitting._step._cache_size()
    fit(predictor, examples, nine, held_out=None)  # 42 is no multiple of 9
    assert fitting._step._cache_size() == before + 1
    fit(predictor, examples, SGD(3, 0.01, batch_size=9), held_out=by_run(examples, [1]), seed=1)
    fit(small_predictor(3, seed=1), examples, nine, held_out=None)
    assert fitting._step._cache_size() == before + 1


@pytest.mark.slow
def test_same_seed_same_bits():
    examples = random_examples()
    first, again, other = (fit(small_predictor(3), examples, EIGHT, held_out=None, seed=s) for s in (3, 3, 4))
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


@pytest.mark.slow
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
