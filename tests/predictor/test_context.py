import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from smartfrz_jax.predictor import context as contexts
from smartfrz_jax.predictor.context import FLAGGED, context_names, encode_context
from smartfrz_jax.predictor.encoding import PAPER, REGIME, Encoding
from tests.support.observations import observation_of, walk

ALL = Encoding()
_jitted = jax.jit(encode_context, static_argnums=0)


def context(observation, encoding=ALL):
    """Name to number, and name to whether it is known."""
    values, known = map(np.asarray, _jitted(encoding, observation))
    names = context_names(encoding)
    assert values.shape == known.shape == (len(names),)
    assert (values.dtype, known.dtype) == (np.float32, bool)
    return dict(zip(names, values, strict=True)), dict(zip(names, known, strict=True))


def norm(x):
    return np.sqrt(np.mean(np.asarray(x) ** 2))


def cosine(a, b):
    return np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)


def kurtosis(x):
    return np.mean((x - x.mean()) ** 4) / x.var() ** 2


def by_hand(observation):
    """The table in the module's docstring in float64, where everything is known and nothing reaches a bound."""
    o = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), observation)
    mask = np.asarray(observation.mask)
    path, losses = o.records[mask], o.losses[mask]
    if o.elapsed <= len(path):
        path = np.concatenate([o.start[None], path])
    steps, newest, first = np.diff(path, axis=0), path[-1], path[0]
    k, net, away, before, step = len(steps), newest - first, newest - o.start, first - o.start, norm(steps)
    half, losing = k // 2, len(losses) // 2
    old, new = norm(steps[:half]), norm(steps[-half:])
    was, now = losses[:losing].mean(), losses[-losing:].mean()
    numbers = {
        "progress": o.progress,
        "depth": o.depth,
        "displacement": np.log(norm(away) / np.sqrt(norm(o.start) ** 2 + norm(away) ** 2)),
        "growth": np.log(norm(newest) / norm(o.start)),
        "step": np.log(step / norm(newest)),
        "drift": np.log(norm(net) / step / np.sqrt(k)),
        "wander": np.log(norm(away) / step / np.sqrt(o.elapsed)),
        "persistence": np.mean([cosine(a, b) for a, b in zip(steps[1:], steps[:-1], strict=True)]),
        "slowing": (new - old) / (new + old),
        "outward": cosine(net, before) if before.any() else 0,
        "spreading": (norm(away) - norm(before)) / (norm(away) + norm(before)),
        "recent": norm(net) / (norm(net) + norm(before)),
        "radial": cosine(net, newest),
        "tails_start": np.log(kurtosis(o.start)),
        "tails": np.log(kurtosis(newest)),
        "shape_start": np.mean(np.abs(o.start)) / norm(o.start),
        "shape": np.mean(np.abs(newest)) / norm(newest),
        "loss_level": np.log(now / o.first_loss),
        "loss_slope": (now - was) / (now + was),
        "loss_noise": np.log(norm(np.diff(losses)) / losses.mean()),
        "records": np.log(1 + len(losses)),
        "contribution": np.sign(o.contribution) * np.log(1 + 200 * abs(o.contribution) / o.first_loss),
    }
    return {name: float(number) for name, number in numbers.items()}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("records", "elapsed"), [(9, 9), (5, 5), (9, 60), (6, 25), (3, 8)])
@pytest.mark.slow
def test_agrees_with_the_definitions(seed, records, elapsed):
    observation = walk(seed).replace(mask=jnp.arange(9) >= 9 - records, elapsed=jnp.float32(elapsed))
    values, known = context(observation)
    expected = by_hand(observation)
    assert list(values) == list(expected)
    for name, number in expected.items():
        np.testing.assert_allclose(values[name], number, rtol=2e-5, atol=2e-6, err_msg=name)
        assert known[name] or (name == "outward" and elapsed == records), name


def test_names_are_those_of_the_docstring():
    table = contexts.__doc__.split("=\n")[1]
    assert tuple(line.split("``")[1] for line in table.splitlines() if line.startswith("``")) == context_names(ALL)
    assert set(FLAGGED) < set(context_names(ALL))


@pytest.mark.slow
def test_parts():
    observation = walk(2)
    everything = context(observation)[0]
    for encoding, names in (
        (PAPER, ()),
        (Encoding("none", depth=False, regime=False), ("progress",)),
        (Encoding(progress=False, regime=False), ("depth",)),
        (Encoding(progress=False, depth=False), REGIME),
        (Encoding(depth=False, regime=["loss_level", "displacement"]), ("progress", "displacement", "loss_level")),
    ):
        assert context_names(encoding) == names
        assert context(observation, encoding)[0] == {name: everything[name] for name in names}


@pytest.mark.slow
def test_order_of_the_positions_and_scale_do_not_matter():
    observation, order = walk(3), np.random.default_rng(4).permutation(12)
    expected, _ = context(observation)
    for factor in (1.0, 1e-10, -1e10):
        changed = observation.replace(
            records=factor * observation.records[:, order], start=factor * observation.start[order]
        )
        for name, number in context(changed)[0].items():
            np.testing.assert_allclose(number, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_scale_of_the_loss_does_not_matter():
    observation = walk(3)
    scaled = observation.replace(
        losses=1e3 * observation.losses,
        first_loss=1e3 * observation.first_loss,
        contribution=1e3 * observation.contribution,
    )
    for name, number in context(scaled)[0].items():
        np.testing.assert_allclose(number, context(observation)[0][name], rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_which_positions_are_drawn_hardly_matters():
    layer = walk(5, size=20_000).replace(elapsed=jnp.float32(40))
    drawn = np.random.default_rng(6).choice(20_000, (2, 1024), replace=False)
    one, other = (context(layer.replace(records=layer.records[:, i], start=layer.start[i]))[0] for i in drawn)
    for name in one:
        assert abs(one[name] - other[name]) < 0.15, name


@pytest.mark.slow
def test_tells_a_random_walk_from_a_drift_and_an_oscillation():
    rng = np.random.default_rng(7)
    noise, way = rng.standard_normal((30, 2000)), rng.standard_normal(2000)
    walks = {
        "random": np.cumsum(noise, axis=0),
        "straight": np.arange(30)[:, None] * way,
        "oscillating": np.arange(30)[:, None] % 2 * way,
    }
    values = {name: context(observation_of(records, start=9 * way))[0] for name, records in walks.items()}
    assert abs(values["random"]["drift"]) < 0.05
    assert abs(values["random"]["persistence"]) < 0.05
    assert values["straight"]["drift"] == pytest.approx(np.log(np.sqrt(29)), abs=1e-5)
    assert values["straight"]["persistence"] == pytest.approx(1, abs=1e-5)
    assert values["oscillating"]["persistence"] == pytest.approx(-1, abs=1e-5)
    assert values["oscillating"]["drift"] == pytest.approx(-np.log(np.sqrt(29)), abs=1e-5)


@pytest.mark.slow
def test_tells_trained_from_initialised_weights():
    """By their tails: uniform, normal, and a mixture of scales as trained layers are."""
    rng = np.random.default_rng(8)
    kinds = {
        "uniform": rng.uniform(-1, 1, 4096),
        "normal": rng.standard_normal(4096),
        "trained": rng.standard_normal(4096) * np.exp(rng.standard_normal(4096)),
    }
    got = {
        kind: context(observation_of(start[None] + np.zeros((3, 1)), start=start))[0] for kind, start in kinds.items()
    }
    assert got["uniform"]["tails_start"] == pytest.approx(np.log(1.8), abs=0.05)
    assert got["normal"]["tails_start"] == pytest.approx(np.log(3), abs=0.1)
    assert got["trained"]["tails_start"] > 1.6
    assert got["uniform"]["shape_start"] == pytest.approx(np.sqrt(3) / 2, abs=0.01)
    assert got["normal"]["shape_start"] == pytest.approx(np.sqrt(2 / np.pi), abs=0.01)


class TestUnknown:
    def unknown(self, observation):
        values, known = context(observation)
        assert all(values[name] == 0 for name in values if not known[name])
        return {name for name in known if not known[name]}

    @pytest.mark.slow
    def test_progress_and_losses(self):
        observation = walk(9).replace(elapsed=jnp.float32(20))
        assert self.unknown(observation) == set()
        assert self.unknown(observation.replace(progress=jnp.float32(jnp.nan))) == {"progress"}
        assert self.unknown(observation.replace(first_loss=jnp.float32(jnp.nan))) == {"loss_level", "contribution"}
        assert self.unknown(observation.replace(contribution=jnp.float32(jnp.nan))) == {"contribution"}
        losses = {"loss_level", "loss_slope", "loss_noise"}
        assert self.unknown(observation.replace(losses=jnp.full(9, jnp.nan))) == losses
        assert self.unknown(observation.replace(losses=observation.losses.at[::2].set(jnp.nan))) == {"loss_noise"}
        assert self.unknown(observation.replace(losses=-observation.losses)) == {"loss_level"}

    def test_unknown_losses_do_not_count(self):
        observation = walk(9)
        some = observation.replace(losses=observation.losses.at[4].set(jnp.nan), mask=jnp.arange(9) >= 1)
        losses = np.asarray(observation.losses, np.float64)
        values, _ = context(some)
        was, now = losses[[1, 2, 3]].mean(), losses[[6, 7, 8]].mean()
        assert values["loss_slope"] == pytest.approx((now - was) / (now + was), rel=1e-5)

    @pytest.mark.slow
    def test_a_layer_that_does_not_move(self):
        moving = {"drift", "wander", "persistence", "slowing", "outward", "spreading", "recent", "radial"}
        still = observation_of(np.ones((5, 4)) * [1, 2, 3, 4], start=[1, 2, 3, 4], losses=np.ones(5), first_loss=1)
        assert self.unknown(still) == {"progress", "contribution"} | moving
        values, _ = context(still)
        assert (values["displacement"], values["step"], values["growth"]) == (-14, -16, 0)

    def test_a_single_record(self):
        one = walk(9).replace(mask=jnp.arange(9) == 8, elapsed=jnp.float32(30))
        assert "step" in self.unknown(one)
        assert "displacement" not in self.unknown(one)

    def test_a_layer_that_starts_at_zero(self):
        values, known = context(walk(9).replace(start=jnp.zeros(12)))
        assert not known["tails_start"]
        assert values["displacement"] == 0
        assert values["growth"] == 4


numbers = st.floats(-(2.0**100), 2.0**100, width=32)
maybe = st.one_of(numbers, st.sampled_from([np.nan, np.inf, -np.inf, 0.0]))


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(
    hnp.arrays(np.float32, (4, 6), elements=numbers),
    hnp.arrays(bool, 4),
    hnp.arrays(np.float32, 6, elements=numbers),
    hnp.arrays(np.float32, 4, elements=maybe),
    st.tuples(maybe, maybe, st.floats(0, 1e6, width=32), st.floats(0, 1, width=32)),
)
def test_finite_and_bounded_whatever_comes(records, mask, start, losses, scalars):
    first_loss, progress, elapsed, depth = scalars
    observation = observation_of(
        records,
        mask,
        start=start,
        losses=losses,
        first_loss=first_loss,
        progress=progress,
        elapsed=elapsed,
        depth=depth,
    )
    values, known = context(observation)
    assert all(np.isfinite(list(values.values())))
    assert max(map(abs, values.values())) <= 16
    assert all(values[name] == 0 for name in values if not known[name])


def test_masked_records_have_no_influence():
    observation = walk(10).replace(mask=jnp.arange(9) >= 4, elapsed=jnp.float32(50))
    junk = observation.replace(
        records=observation.records.at[:4].set(jnp.nan), losses=observation.losses.at[:4].set(1e9)
    )
    assert context(junk) == context(observation)


@pytest.mark.slow
def test_layers_at_once():
    observation = walk(11, batch=(3,))
    together, _ = jax.jit(jax.vmap(lambda o: encode_context(ALL, o)))(observation)
    for layer in range(3):
        alone, _ = _jitted(ALL, jax.tree.map(lambda leaf, layer=layer: leaf[layer], observation))
        np.testing.assert_allclose(together[layer], alone, rtol=1e-5, atol=1e-6)
