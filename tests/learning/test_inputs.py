import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from smartfrz_jax import Predictor
from smartfrz_jax.learning.controls import CONTROLS
from smartfrz_jax.learning.examples import Hiding
from smartfrz_jax.learning.fitting import fit, predict
from smartfrz_jax.learning.inputs import encode_examples
from smartfrz_jax.learning.splits import by_run
from smartfrz_jax.predictor import PredictorConfig, freeze_probability
from smartfrz_jax.predictor.encoded import Encoded, encode
from smartfrz_jax.predictor.encoding import PAPER, Encoding
from tests.learning.fitting.runs import OPTIONS, arrays, random_examples, small_predictor
from tests.support.observations import walk

ENCODINGS = {
    "raw": PAPER,
    "scale-free": Encoding("scale_free", regime=False),
    "context": Encoding("none"),
}
each = pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)


@pytest.mark.slow
@each
def test_a_predictor_says_the_same_of_what_is_encoded(encoding):
    predictor = small_predictor(12, encoding=encoding)
    observation = walk(0, batch=(5,))
    encoded = jax.jit(jax.vmap(lambda one: encode(encoding, one)))(observation)
    assert isinstance(encoded, Encoded)
    np.testing.assert_allclose(
        freeze_probability(predictor, encoded), freeze_probability(predictor, observation), rtol=1e-5
    )


@pytest.mark.slow
@each
def test_training_on_encoded_examples_is_the_same(encoding):
    examples = random_examples(size=4)
    held_out = by_run(examples, [1])
    predictor = small_predictor(4, encoding=encoding)
    plain = fit(predictor, examples, **OPTIONS | {"held_out": held_out})
    encoded = fit(predictor, encode_examples(examples, encoding), **OPTIONS | {"held_out": held_out})
    np.testing.assert_allclose(encoded.losses, plain.losses, rtol=1e-4)
    for a, b in zip(arrays(encoded.predictor), arrays(plain.predictor), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4)
    assert encoded.evaluations[-1].n == plain.evaluations[-1].n == int(held_out.sum())
    assert encoded.evaluations[-1].auc == plain.evaluations[-1].auc


@pytest.mark.slow
def test_copies_lose_what_is_hidden_each_at_random():
    examples, encoding = random_examples(runs=6), Encoding("none")
    encoded = encode_examples(examples, encoding, hiding=Hiding(progress=0.5), copies=3, seed=1)
    assert len(encoded) == 3 * len(examples)
    assert (encoded.target.reshape(3, -1) == examples.target).all()
    known = encoded.encoded.known[:, 0].reshape(3, -1)
    assert 0.3 < known.mean() < 0.7
    assert (known[0] != known[1]).any()
    rest = encoded.encoded.context[:, 1:].reshape(3, len(examples), -1)
    np.testing.assert_array_equal(rest[0], rest[2])
    again = encode_examples(examples, encoding, hiding=Hiding(progress=0.5), copies=3, seed=1)
    np.testing.assert_array_equal(encoded.encoded.known, again.encoded.known)


@pytest.mark.slow
def test_selected_examples_keep_their_rows():
    examples, encoding = random_examples(), ENCODINGS["scale-free"]
    chosen = np.array([5, 2, 7])
    some = encode_examples(examples, encoding).select(chosen).select(np.array([True, False, True]))
    batch, target = some.batch(np.array([1, 0]))
    expected, _ = examples.batch(np.array([7, 5]))
    np.testing.assert_array_equal(batch.mask, expected.mask)
    np.testing.assert_array_equal(target, examples.target[[7, 5]])
    predictor = small_predictor(3, encoding=encoding)
    np.testing.assert_allclose(predict(predictor, some), predict(predictor, examples)[[5, 7]], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTROLS)
def test_controls_take_encoded_examples(name):
    train, test = random_examples(), random_examples(runs=1)
    both = (encode_examples(examples, Encoding("none")) for examples in (train, test))
    np.testing.assert_allclose(CONTROLS[name](*both), CONTROLS[name](train, test), rtol=1e-5)


@pytest.mark.slow
def test_what_reads_no_weights_needs_none():
    whole = random_examples()
    small = dataclasses.replace(whole, recordings=tuple(run.without_weights() for run in whole.recordings))
    encoding = Encoding("none", regime=("loss_level", "loss_noise"))
    a, b = (
        fit(small_predictor(examples.size, encoding=encoding), examples, **OPTIONS).predictor
        for examples in (whole, small)
    )
    np.testing.assert_array_equal(predict(a, whole), predict(b, small))
    np.testing.assert_array_equal(predict(a, whole), predict(b, encode_examples(small, encoding)))
    message = r"examples: come from recordings without weights, .*Encoding\('none'\) with a regime that needs none"
    reading = Encoding("none", regime=("step",))
    for refuse in (
        lambda: encode_examples(small, reading),
        lambda: fit(small_predictor(1, encoding=reading), small, **OPTIONS),
        lambda: predict(small_predictor(1, encoding=PAPER), small),
    ):
        with pytest.raises(ValueError, match=message):
            refuse()


@pytest.mark.slow
def test_errors_name_the_way_out():
    examples = random_examples()
    encoded = encode_examples(examples, Encoding("none"))
    with pytest.raises(ValueError, match=r"examples: are encoded as .*weights='none'.* expected .*weights='raw'"):
        fit(small_predictor(3), encoded, **OPTIONS)
    with pytest.raises(ValueError, match="encode_examples"):
        predict(Predictor(PredictorConfig(size=3), rngs=nnx.Rngs(0)), encoded)
    with pytest.raises(ValueError, match=r"hiding: .*encode_examples\(\.\.\., hiding"):
        fit(small_predictor(3, encoding=Encoding("none")), encoded, hiding=Hiding(progress=0.5), **OPTIONS)
    with pytest.raises(ValueError, match="copies: got 0"):
        encode_examples(examples, Encoding("none"), copies=0)
    with pytest.raises(ValueError, match="encoded already"):
        encode_examples(encoded, Encoding("none"))
