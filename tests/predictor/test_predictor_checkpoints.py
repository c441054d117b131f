"""Predictors are saved and restored bit for bit; what is no predictor is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smartfrz_jax import Predictor
from smartfrz_jax.predictor.encoding import Encoding
from smartfrz_jax.predictor.predictor import freeze_probability
from smartfrz_jax.pytrees import checkpoint
from tests.predictor.small_predictors import ENCODINGS, SMALL, predictor_with_biases, records_of
from tests.support.observations import observation_of, walk


def test_a_checkpoint_of_the_default_is_at_most_five_megabytes():
    state = nnx.state(nnx.eval_shape(lambda: Predictor(rngs=nnx.Rngs(0))))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) < 5e6


@pytest.mark.parametrize("encoding", ["raw, no context", "scale-free, records", "scale-free, classifier", "context"])
@pytest.mark.slow
def test_save_and_restore_are_bit_identical(tmp_path, encoding):
    config = dataclasses.replace(SMALL, encoding=ENCODINGS[encoding])
    predictor = predictor_with_biases(config)
    predictor.save(tmp_path / "p")
    observation = walk(5, batch=(3,))
    for restored in (Predictor.restore(tmp_path / "p"), Predictor.restore(str(tmp_path / "p"), config=config)):
        assert restored.config == config
        before, after = nnx.to_pure_dict(nnx.state(predictor)), nnx.to_pure_dict(nnx.state(restored))
        jax.tree.map(np.testing.assert_array_equal, before, after)
        np.testing.assert_array_equal(
            freeze_probability(restored, observation), freeze_probability(predictor, observation)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoding": Encoding(context_in="records")}, r"context_in='records'.* for encoding.* context_in='both'"),
        ({"encoding": Encoding("raw")}, "weights='raw'.*weights='scale_free'"),
    ],
)
def test_a_checkpoint_of_another_encoding(tmp_path, change, message):
    config = dataclasses.replace(SMALL, encoding=Encoding())
    predictor_with_biases(config).save(tmp_path / "p")
    with pytest.raises(ValueError, match=message):
        Predictor.restore(tmp_path / "p", config=dataclasses.replace(config, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "has version 1, expected 2, .*fit it again"),
        ({"version": 3}, "has version 3, expected 2"),
        (
            {"context": ["progress", "depth"]},
            r"trained on the context \('progress', 'depth'\), expected \('progress', ",
        ),
    ],
)
def test_a_checkpoint_of_another_version(tmp_path, change, message, monkeypatch):
    written = checkpoint.write
    monkeypatch.setattr(
        checkpoint,
        "write",
        lambda path, tree, kind, metadata, **rest: written(path, tree, kind, metadata | change, **rest),
    )
    predictor_with_biases(dataclasses.replace(SMALL, encoding=Encoding())).save(tmp_path / "p")
    with pytest.raises(ValueError, match=message):
        Predictor.restore(tmp_path / "p")


@pytest.mark.slow
def test_restored_predictor_can_be_trained_and_saved_again(tmp_path):
    predictor_with_biases(SMALL).save(tmp_path / "p")
    restored = Predictor.restore(tmp_path / "p")
    grads = nnx.grad(lambda p: p(observation_of(records_of(2, 12)))[0])(restored)
    assert np.any(np.asarray(grads["key"]["layers"][0]["kernel"][...]) != 0)
    restored.save(tmp_path / "q")
    assert Predictor.restore(tmp_path / "q").config == SMALL


@pytest.mark.parametrize(
    ("change", "shapes"), [({"size": 16}, ("12, 10", "16, 10")), ({"head_hidden": 7}, ("float32[5]", "float32[7]"))]
)
def test_misfit_names_both_shapes(tmp_path, change, shapes):
    predictor_with_biases(SMALL).save(tmp_path / "p")
    with pytest.raises(ValueError, match=r"path: the predictor in .* does not fit: .* there, expected ") as error:
        Predictor.restore(tmp_path / "p", config=dataclasses.replace(SMALL, **change))
    assert all(shape in str(error.value) for shape in shapes)


@pytest.mark.slow
def test_existing_path_is_not_overwritten(tmp_path):
    first, second = predictor_with_biases(SMALL), predictor_with_biases(SMALL, seed=1)
    first.save(tmp_path / "p")
    with pytest.raises(FileExistsError, match=r"path: .* exists; .*overwrite=True"):
        second.save(tmp_path / "p")
    for predictor in (first, second):
        kernel = predictor.key.layers[0].kernel[...]
        np.testing.assert_array_equal(Predictor.restore(tmp_path / "p").key.layers[0].kernel[...], kernel)
        second.save(tmp_path / "p", overwrite=True)


def test_checkpoints_that_are_not_predictors(tmp_path):
    with pytest.raises(FileNotFoundError, match="path: there is no directory"):
        Predictor.restore(tmp_path / "nowhere")
    checkpoint.write(tmp_path / "run", {"a": jnp.ones(1)}, "run", {})
    with pytest.raises(ValueError, match="is not the checkpoint of a predictor"):
        Predictor.restore(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is not a complete checkpoint of a predictor"):
        Predictor.restore(tmp_path / "empty")


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"config": {"size": 3}},
        {"config": {"encoding": {"form": "raw"}}},
        {"config": {"encoding": {}, "size": 0}},
        {"config": {"encoding": {}, "pooling": "mean"}},  # older versions had these
        {"config": {"encoding": {"weights": "scale_free", "quantiles": 64}}},
    ],
)
def test_predictor_checkpoint_without_a_usable_configuration(tmp_path, metadata):
    checkpoint.write(tmp_path / "p", {"a": jnp.ones(1)}, "predictor", {"version": 2, "context": []} | metadata)
    with pytest.raises(ValueError, match=r"path: the predictor in .* has no usable config .*Predictor.save"):
        Predictor.restore(tmp_path / "p")
