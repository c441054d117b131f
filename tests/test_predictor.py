import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smartfrz_jax import History, Predictor, PredictorConfig, checkpoint
from smartfrz_jax.predictor import freeze_probability

ROUNDING = {
    "rtol": 2e-5,
    "atol": 2e-6,
}  # of float32, through two MLPs and an attention; 2.5e-6 was the most seen in 800
SMALL = PredictorConfig(size=12, hidden=10, features=6, head_hidden=5)


def records_of(*shape: int) -> jax.Array:
    """The same for every call, so that no test depends on which ran before it."""
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape), jnp.float32)


def predictor_with_biases(config: PredictorConfig, seed: int = 0) -> Predictor:
    """As initialised the biases are zero, and an error in their use would not show."""
    predictor = Predictor(config, rngs=nnx.Rngs(seed))
    state = nnx.state(predictor)
    nnx.update(predictor, jax.tree.map(lambda w: w + 0.1 * records_of(*w.shape), state))
    return predictor


def mlp(weights: dict, name: str, x: np.ndarray) -> np.ndarray:
    for i in range(3):
        layer = weights[name]["layers"][i]
        x = x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)
        x = np.maximum(x, 0) if i < 2 else x
    return x


def equations(predictor: Predictor, records, mask) -> np.ndarray:
    """Eqs. 1 to 4 of the paper in float64: over the records that exist, with the newest one's query."""
    weights = nnx.to_pure_dict(nnx.state(predictor))
    existing = np.asarray(records, np.float64)[np.asarray(mask)]
    keys, values = mlp(weights, "key", existing), mlp(weights, "value", existing)
    query = mlp(weights, "query", existing[-1])
    scores = np.array([np.sum(query * key) for key in keys])
    attention = np.exp(scores - scores.max()) / np.sum(np.exp(scores - scores.max()))
    context = sum(a * v for a, v in zip(attention, values, strict=True))
    return mlp(weights, "classifier", context)


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()


@contextlib.contextmanager
def counted_compilations():
    count = []

    def listen(event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            count.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("window", [1, 2, 20, 30, 50])
@pytest.mark.parametrize("missing", [0, 0.5, 1.0], ids=["full", "half", "newest only"])
def test_agrees_with_the_equations(window, missing):
    predictor = predictor_with_biases(SMALL)
    records = records_of(window, 12)
    mask = np.arange(window) >= min(int(missing * window), window - 1)
    np.testing.assert_allclose(predictor(records, jnp.asarray(mask)), equations(predictor, records, mask), **ROUNDING)


@pytest.mark.slow
def test_agrees_with_the_equations_at_the_papers_size():
    predictor = predictor_with_biases(PredictorConfig())
    records = 0.1 * records_of(30, 1024)
    mask = np.arange(30) >= 7
    np.testing.assert_allclose(
        predictor(records, jnp.asarray(mask)), equations(predictor, records, mask), rtol=1e-4, atol=1e-5
    )


def test_mask_with_gaps():
    predictor = predictor_with_biases(SMALL)
    records = records_of(6, 12)
    mask = np.array([True, False, True, False, False, True])
    np.testing.assert_allclose(predictor(records, jnp.asarray(mask)), equations(predictor, records, mask), **ROUNDING)


def test_sharp_attention_stays_finite():
    predictor = predictor_with_biases(SMALL)
    records = 1e3 * records_of(6, 12)
    assert np.all(np.isfinite(predictor(records, jnp.ones(6, bool))))


def test_probability_is_the_softmax_for_freeze():
    predictor = predictor_with_biases(SMALL)
    records, mask = records_of(5, 7, 12), np.ones((5, 7), bool)
    mask[1, :3] = False
    expected = [softmax(equations(predictor, r, m))[1] for r, m in zip(records, mask, strict=True)]
    got = freeze_probability(predictor, records, jnp.asarray(mask))
    assert got.shape == (5,)
    np.testing.assert_allclose(got, expected, **ROUNDING)


def test_layers_do_not_influence_each_other():
    predictor = predictor_with_biases(SMALL)
    records, mask = records_of(4, 7, 12), jnp.ones((4, 7), bool)
    together = freeze_probability(predictor, records, mask)
    for layer in range(4):
        alone = jax.nn.softmax(predictor(records[layer], mask[layer]))[1]
        np.testing.assert_allclose(together[layer], alone, **ROUNDING)  # another program, so another order of sums
    changed = freeze_probability(predictor, records.at[2].set(9.0), mask)
    np.testing.assert_array_equal(np.delete(changed, 2), np.delete(together, 2))


@pytest.mark.parametrize("junk", [0.0, 1e30, np.inf, -np.inf, np.nan])
@pytest.mark.slow
def test_masked_records_have_no_influence_at_all(junk):
    predictor = predictor_with_biases(SMALL)
    records, mask = records_of(8, 12), jnp.arange(8) >= 5
    clean = predictor(records, mask)
    got = predictor(records.at[:5].set(junk), mask)
    assert np.asarray(got).tobytes() == np.asarray(clean).tobytes()

    def gradient(records):
        graphdef, state = nnx.split(predictor)
        return jax.grad(lambda state: nnx.merge(graphdef, state)(records, mask)[1])(state)

    jax.tree.map(np.testing.assert_array_equal, gradient(records.at[:5].set(junk)), gradient(records))


def test_window_does_not_matter_where_it_is_masked():
    predictor = predictor_with_biases(SMALL)
    records = records_of(4, 12)
    longer = jnp.concatenate([jnp.zeros((6, 12)), records])
    np.testing.assert_allclose(
        predictor(longer, jnp.arange(10) >= 6), predictor(records, jnp.ones(4, bool)), **ROUNDING
    )


def test_order_of_the_older_records_does_not_matter_but_the_newest_does():
    predictor = predictor_with_biases(SMALL)
    records, mask = records_of(5, 12), jnp.ones(5, bool)
    got = predictor(records, mask)
    np.testing.assert_allclose(predictor(records[np.array([2, 0, 3, 1, 4])], mask), got, **ROUNDING)
    assert not np.allclose(predictor(records[np.array([4, 1, 2, 3, 0])], mask), got, rtol=1e-3)


def test_layer_without_records_is_finite():
    predictor = predictor_with_biases(SMALL)
    history = History.create(layers=2, window=3, size=12)
    history = history.record(records_of(2, 12), jnp.array([True, False]))
    got = freeze_probability(predictor, *history.chronological())
    assert np.all(np.isfinite(got))


def test_size_of_the_papers_predictor():
    state = nnx.state(nnx.eval_shape(lambda: Predictor(rngs=nnx.Rngs(0))))
    leaves = jax.tree.leaves(state)
    encoder = (1024 * 256 + 256) + (256 * 256 + 256) + (256 * 64 + 64)
    classifier = (64 * 32 + 32) + (32 * 32 + 32) + (32 * 2 + 2)
    assert sum(leaf.size for leaf in leaves) == 3 * encoder + classifier == 1_037_122
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) == 4_148_488  # about 4 MB


def test_cost_of_a_decision():
    """Two FLOP per weight for the keys and values of 30 records and one query; the paper counts 0.12 GFLOP."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Predictor(rngs=nnx.Rngs(0))))
    records, mask = jax.ShapeDtypeStruct((30, 1024), jnp.float32), jax.ShapeDtypeStruct((30,), bool)
    lowered = jax.jit(lambda state, *args: nnx.merge(graphdef, state)(*args)).lower(state, records, mask)
    expected = 2 * (2 * 30 + 1) * (1024 * 256 + 256 * 256 + 256 * 64)
    assert lowered.compile().cost_analysis()["flops"] == pytest.approx(expected, rel=0.01)
    assert expected < 0.12e9


def test_compiled_once_whatever_the_values_and_masks():
    predictor = predictor_with_biases(SMALL)
    records, mask = records_of(3, 9, 12), np.ones((3, 9), bool)
    freeze_probability(predictor, records, jnp.asarray(mask))
    other_records, other_mask = jnp.asarray(np.asarray(records) + 1), jnp.asarray(np.tril(mask))
    other = predictor_with_biases(SMALL, seed=1)
    with counted_compilations() as count:
        freeze_probability(predictor, records, other_mask)
        freeze_probability(predictor, other_records, other_mask)
        freeze_probability(other, records, other_mask)
    assert count == []
    with counted_compilations() as count:
        freeze_probability(predictor, other_records[:2], other_mask[:2]).block_until_ready()
    assert count


def test_one_predictor_serves_several_meshes():
    predictor = predictor_with_biases(SMALL)
    records, mask = records_of(3, 9, 12), np.ones((3, 9), bool)
    expected = freeze_probability(predictor, records, jnp.asarray(mask))
    for devices in (8, 2):
        mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
        with jax.set_mesh(mesh):
            whole = jax.NamedSharding(mesh, jax.P())
            got = freeze_probability(predictor, *jax.device_put((records, jnp.asarray(mask)), whole))
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_save_and_restore_are_bit_identical(tmp_path):
    predictor = predictor_with_biases(SMALL)
    predictor.save(tmp_path / "p")
    for restored in (Predictor.restore(tmp_path / "p"), Predictor.restore(str(tmp_path / "p"), config=SMALL)):
        assert restored.config == SMALL
        before, after = nnx.to_pure_dict(nnx.state(predictor)), nnx.to_pure_dict(nnx.state(restored))
        jax.tree.map(np.testing.assert_array_equal, before, after)
        records, mask = records_of(3, 9, 12), jnp.ones((3, 9), bool)
        np.testing.assert_array_equal(
            freeze_probability(restored, records, mask), freeze_probability(predictor, records, mask)
        )


@pytest.mark.slow
def test_restored_predictor_can_be_trained_and_saved_again(tmp_path):
    predictor_with_biases(SMALL).save(tmp_path / "p")
    restored = Predictor.restore(tmp_path / "p")
    grads = nnx.grad(lambda p: p(records_of(2, 12), jnp.ones(2, bool))[0])(restored)
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


@pytest.mark.parametrize("metadata", [{}, {"config": {"size": 3, "width": 5}}, {"config": {"size": 0}}])
def test_predictor_checkpoint_without_a_usable_configuration(tmp_path, metadata):
    checkpoint.write(tmp_path / "p", {"a": jnp.ones(1)}, "predictor", metadata)
    with pytest.raises(ValueError, match=r"path: the predictor in .* has no usable config .*Predictor.save"):
        Predictor.restore(tmp_path / "p")


@pytest.mark.parametrize("field", ["size", "hidden", "features", "head_hidden"])
def test_wrong_configuration(field):
    with pytest.raises(ValueError, match=rf"{field}: got 0, expected at least 1"):
        PredictorConfig(**{field: 0})
