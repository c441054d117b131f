"""The predictor against its equations: masks, meshes, costs, and what it reads."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from smartfrz_jax import Predictor
from smartfrz_jax.predictor import History, PredictorConfig
from smartfrz_jax.predictor.context import FLAGGED, context_names, encode_context
from smartfrz_jax.predictor.encoding import PAPER, Encoding, encode_records
from smartfrz_jax.predictor.predictor import Statistic, freeze_probability
from tests.predictor.small_predictors import ENCODINGS, SMALL, predictor_with_biases, records_of
from tests.support.observations import observation_of, walk

ROUNDING = {
    "rtol": 2e-5,
    "atol": 2e-6,
}  # of float32, through two MLPs and an attention; 2.5e-6 was the most seen in 800


@nnx.jit
def logits(predictor: Predictor, observation) -> jax.Array:
    return predictor(observation)


@nnx.jit
def gradient(predictor: Predictor, observation) -> nnx.State:
    return nnx.grad(lambda predictor: predictor(observation)[1])(predictor)


def mlp(weights: dict, name: str, x: np.ndarray) -> np.ndarray:
    for i in range(3):
        layer = weights[name]["layers"][i]
        x = x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)
        x = np.maximum(x, 0) if i < 2 else x
    return x


def equations(predictor: Predictor, records, mask) -> np.ndarray:
    """Eqs. 1 to 4 of the paper in float64: over the records that exist, with the newest one's query."""
    return mlp(nnx.to_pure_dict(nnx.state(predictor)), "classifier", attention(predictor, records, mask))


def attention(predictor: Predictor, records, mask) -> np.ndarray:
    weights = nnx.to_pure_dict(nnx.state(predictor))
    existing = np.asarray(records, np.float64)[np.asarray(mask)]
    keys, values = mlp(weights, "key", existing), mlp(weights, "value", existing)
    query = mlp(weights, "query", existing[-1])
    scores = np.array([np.sum(query * key) for key in keys])
    shares = np.exp(scores - scores.max()) / np.sum(np.exp(scores - scores.max()))
    return sum(a * v for a, v in zip(shares, values, strict=True))


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


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 2, 20, 30, 50])
@pytest.mark.parametrize("missing", [0, 0.5, 1.0], ids=["full", "half", "newest only"])
def test_agrees_with_the_equations(window, missing):
    predictor = predictor_with_biases(SMALL)
    records = records_of(window, 12)
    mask = np.arange(window) >= min(int(missing * window), window - 1)
    np.testing.assert_allclose(
        logits(predictor, observation_of(records, mask)), equations(predictor, records, mask), **ROUNDING
    )


@pytest.mark.slow
def test_agrees_with_the_equations_at_the_papers_size():
    predictor = predictor_with_biases(PredictorConfig(encoding=PAPER))
    records = 0.1 * records_of(30, 1024)
    mask = np.arange(30) >= 7
    np.testing.assert_allclose(
        logits(predictor, observation_of(records, mask)), equations(predictor, records, mask), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_mask_with_gaps():
    predictor = predictor_with_biases(SMALL)
    records = records_of(6, 12)
    mask = np.array([True, False, True, False, False, True])
    np.testing.assert_allclose(
        logits(predictor, observation_of(records, mask)), equations(predictor, records, mask), **ROUNDING
    )


@pytest.mark.slow
def test_sharp_attention_stays_finite():
    predictor = predictor_with_biases(SMALL)
    records = 1e3 * records_of(6, 12)
    assert np.all(np.isfinite(logits(predictor, observation_of(records))))


@pytest.mark.slow
def test_probability_is_the_softmax_for_freeze():
    predictor = predictor_with_biases(SMALL)
    records, mask = records_of(5, 7, 12), np.ones((5, 7), bool)
    mask[1, :3] = False
    expected = [softmax(equations(predictor, r, m))[1] for r, m in zip(records, mask, strict=True)]
    got = freeze_probability(predictor, observation_of(records, mask))
    assert got.shape == (5,)
    np.testing.assert_allclose(got, expected, **ROUNDING)


@pytest.mark.slow
def test_layers_do_not_influence_each_other():
    predictor = predictor_with_biases(SMALL)
    records = records_of(4, 7, 12)
    together = freeze_probability(predictor, observation_of(records))
    for layer in range(4):
        alone = jax.nn.softmax(logits(predictor, observation_of(records[layer])))[1]
        np.testing.assert_allclose(together[layer], alone, **ROUNDING)  # another program, so another order of sums
    changed = freeze_probability(predictor, observation_of(records.at[2].set(9.0)))
    np.testing.assert_array_equal(np.delete(changed, 2), np.delete(together, 2))


@pytest.mark.parametrize("junk", [0.0, 1e30, np.inf, -np.inf, np.nan])
@pytest.mark.slow
def test_masked_records_have_no_influence_at_all(junk):
    predictor = predictor_with_biases(SMALL)
    records, mask = records_of(8, 12), jnp.arange(8) >= 5
    clean = logits(predictor, observation_of(records, mask))
    got = logits(predictor, observation_of(records.at[:5].set(junk), mask))
    assert np.asarray(got).tobytes() == np.asarray(clean).tobytes()

    expected = gradient(predictor, observation_of(records, mask))
    got = gradient(predictor, observation_of(records.at[:5].set(junk), mask))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.slow
def test_window_does_not_matter_where_it_is_masked():
    predictor = predictor_with_biases(SMALL)
    records = records_of(4, 12)
    longer = jnp.concatenate([jnp.zeros((6, 12)), records])
    np.testing.assert_allclose(
        logits(predictor, observation_of(longer, np.arange(10) >= 6)),
        logits(predictor, observation_of(records)),
        **ROUNDING,
    )


@pytest.mark.slow
def test_order_of_the_older_records_does_not_matter_but_the_newest_does():
    predictor = predictor_with_biases(SMALL)
    records = records_of(5, 12)
    got = logits(predictor, observation_of(records))
    np.testing.assert_allclose(logits(predictor, observation_of(records[np.array([2, 0, 3, 1, 4])])), got, **ROUNDING)
    assert not np.allclose(logits(predictor, observation_of(records[np.array([4, 1, 2, 3, 0])])), got, rtol=1e-3)


@pytest.mark.slow
def test_layer_without_records_is_finite():
    predictor = predictor_with_biases(SMALL)
    history = History.create(layers=2, window=3, size=12)
    history = history.record(records_of(2, 12), jnp.array([True, False]))
    got = freeze_probability(predictor, observation_of(*history.chronological()))
    assert np.all(np.isfinite(got))


def test_size_of_the_papers_predictor():
    state = nnx.state(nnx.eval_shape(lambda: Predictor(paper=True, rngs=nnx.Rngs(0))))
    leaves = jax.tree.leaves(state)
    encoder = (1024 * 256 + 256) + (256 * 256 + 256) + (256 * 64 + 64)
    classifier = (64 * 32 + 32) + (32 * 32 + 32) + (32 * 2 + 2)
    assert sum(leaf.size for leaf in leaves) == 3 * encoder + classifier == 1_037_122
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) == 4_148_488  # about 4 MB


def flops_of_a_decision(config: PredictorConfig) -> float:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Predictor(config, rngs=nnx.Rngs(0))))
    observation = observation_of(np.ones((30, 1024)))
    lowered = jax.jit(lambda state, o: nnx.merge(graphdef, state)(o)).lower(state, observation)
    return lowered.compile().cost_analysis()["flops"]


def test_cost_of_a_decision():
    """Two FLOP per weight for the keys and values of 30 records and one query; the paper counts 0.12 GFLOP."""
    expected = 2 * (2 * 30 + 1) * (1024 * 256 + 256 * 256 + 256 * 64)
    assert flops_of_a_decision(PredictorConfig(encoding=PAPER)) == pytest.approx(expected, rel=0.01)
    assert expected < 0.12e9


@pytest.mark.slow
def test_cost_of_reading_more():
    """The paper's cost, but for 26 numbers beside 1024 and what sorting and the context take."""
    paper = flops_of_a_decision(PredictorConfig(encoding=PAPER))
    assert paper < flops_of_a_decision(PredictorConfig()) < 1.12 * paper


@pytest.mark.slow
@pytest.mark.parametrize("encoding", [PAPER, Encoding()], ids=["paper", "scale-free"])
def test_compiled_once_whatever_the_values_and_masks(encoding):
    config = dataclasses.replace(SMALL, encoding=encoding)
    predictor, observation = predictor_with_biases(config), walk(0, batch=(3,))
    freeze_probability(predictor, observation)
    other = observation.replace(
        records=observation.records * 2 - 1, mask=jnp.tril(observation.mask), progress=jnp.full(3, jnp.nan, jnp.float32)
    )
    two = jax.tree.map(lambda leaf: leaf[:2], other)
    other_predictor = predictor_with_biases(config, seed=1)
    with counted_compilations() as count:
        freeze_probability(predictor, other)
        freeze_probability(other_predictor, observation)
    assert count == []
    with counted_compilations() as count:
        freeze_probability(predictor, two).block_until_ready()
    assert count


@pytest.mark.slow
def test_one_predictor_serves_several_meshes():
    predictor = predictor_with_biases(dataclasses.replace(SMALL, encoding=Encoding()))
    observation = walk(0, batch=(3,))
    expected = freeze_probability(predictor, observation)
    for devices in (8, 2):
        mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
        with jax.set_mesh(mesh):
            whole = jax.NamedSharding(mesh, jax.P())
            got = freeze_probability(predictor, jax.device_put(observation, whole))
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def inputs_by_hand(predictor: Predictor, observation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Records, mask and context of one layer; the encodings themselves are tested elsewhere."""
    encoding, state = predictor.config.encoding, nnx.to_pure_dict(nnx.state(predictor))
    records, mask = (np.asarray(part, np.float64) for part in encode_records(encoding, observation))
    names = context_names(encoding)
    if not names:
        return records, mask.astype(bool), np.zeros(0)
    values, known = (np.asarray(part) for part in encode_context(encoding, observation))
    context = np.clip((values - np.float64(state["context_mean"])) / np.float64(state["context_std"]), -5, 5) * known
    flags = [float(not known[names.index(name)]) for name in FLAGGED if name in names]
    context = np.concatenate([context, flags])
    if encoding.context_in != "classifier":
        records = np.concatenate([records, np.tile(context, (len(records), 1))], axis=1)
    return records, mask.astype(bool), context


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_agrees_with_the_equations_on_every_encoding(encoding):
    config = dataclasses.replace(SMALL, encoding=ENCODINGS[encoding])
    predictor = predictor_with_biases(config)
    weights = nnx.to_pure_dict(nnx.state(predictor))
    observation = walk(3).replace(mask=jnp.arange(9) >= 2, elapsed=jnp.float32(40), progress=jnp.float32(jnp.nan))
    records, mask, context = inputs_by_hand(predictor, observation)
    read = context if config.encoding.weights == "none" else attention(predictor, records, mask)
    if config.encoding.context_in != "records" and config.encoding.weights != "none":
        read = np.concatenate([read, context])
    np.testing.assert_allclose(jax.jit(predictor)(observation), mlp(weights, "classifier", read), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_finite_whatever_is_unknown(encoding):
    predictor = predictor_with_biases(dataclasses.replace(SMALL, encoding=ENCODINGS[encoding]))
    still = observation_of(np.zeros((3, 9, 12)), np.arange(9) >= np.array([[8], [4], [9]]))
    assert np.isfinite(freeze_probability(predictor, still)).all()


@pytest.mark.slow
def test_a_context_far_from_the_training_examples_is_bounded():
    predictor = predictor_with_biases(dataclasses.replace(SMALL, encoding=Encoding("none", regime=False)))
    at = jax.jit(predictor)
    predictor.context_std[...] = jnp.full(2, 1e-4)
    near, far = (at(walk(1).replace(depth=jnp.float32(depth))) for depth in (0.5, 1.0))
    np.testing.assert_array_equal(near, far)


@pytest.mark.slow
def test_the_papers_predictor_reads_raw_weights_and_nothing_else():
    predictor = predictor_with_biases(SMALL)
    observation = walk(4)
    moved = observation.replace(
        start=observation.start + 1,
        elapsed=jnp.float32(99),
        losses=jnp.zeros(9),
        progress=jnp.float32(0),
        depth=jnp.float32(0),
    )
    np.testing.assert_array_equal(logits(predictor, moved), logits(predictor, observation))
    paper = nnx.eval_shape(lambda: Predictor(paper=True, rngs=nnx.Rngs(0)))
    assert paper.config == PredictorConfig(encoding=PAPER)
    assert not jax.tree.leaves(nnx.state(paper, Statistic))
    with pytest.raises(ValueError, match="config: got one and paper=True"):
        Predictor(SMALL, paper=True, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("field", ["size", "hidden", "features", "head_hidden"])
def test_wrong_configuration(field):
    with pytest.raises(ValueError, match=rf"{field}: got 0, expected an integer of at least 1"):
        PredictorConfig(**{field: 0})
