"""What the front of a network has contributed, against losses worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax import Layer, Layers
from smartfrz_jax.predictor.probe import PROBE_DEPTHS, by_policy, contributions, depths_of, latest, spread

NAMES = ("a", "b", "c", "d")
LAYERS = Layers(tuple(Layer(name, (name,), (name,)) for name in NAMES))
START = {name: jnp.float32(0) for name in NAMES}
NOW = {"a": jnp.float32(1), "b": jnp.float32(2), "c": jnp.float32(4), "d": jnp.float32(8)}
NAN = float("nan")


def probe(params):
    return 20 - sum(params.values())


def test_reverts_everything_up_to_each_depth():
    got = contributions(LAYERS, probe, NOW, START, depths=[0, 2])
    np.testing.assert_array_equal(got, np.array([1, NAN, 7, NAN], np.float32))


@pytest.mark.parametrize("loss", [NAN, np.inf, np.ones(2)])
def test_a_loss_that_is_no_finite_scalar_is_refused(loss):
    with pytest.raises(ValueError, match=r"probe: got .*, expected a finite scalar; return the mean loss"):
        contributions(LAYERS, lambda params: loss, NOW, START, depths=[0])


@pytest.mark.parametrize(
    ("active", "n", "expected"),
    [
        ([1] * 9, 4, [1, 3, 5, 7]),
        ([1] * 9, 100, list(range(8))),
        ([0, 0, 1, 1, 1, 0, 1, 1], 2, [3, 6]),
        ([0] * 6 + [1] * 4, 3, [5, 8]),  # nothing up to the second depth is left to be judged by the first
        ([0] * 7 + [1] * 3, 3, [5, 8]),
        ([0] * 9 + [1], 3, []),
        ([0, 0, 0, 1], 4, []),
        ([1], 4, []),
    ],
)
def test_depths_are_even_but_for_the_head_and_where_all_is_frozen(active, n, expected):
    assert depths_of(np.array(active, bool), n) == expected


def test_between_depths_it_is_linear_from_zero():
    measured = np.array([NAN, 4, NAN, 10, NAN, NAN], np.float32)
    np.testing.assert_array_equal(spread(measured), np.array([2, 4, 7, 10, NAN, NAN], np.float32))
    assert np.isnan(spread(np.full(3, np.nan))).all()


def test_what_was_measured_last_is_known_until_the_next_time():
    measured = np.full((5, 2), np.nan)
    measured[1, 1], measured[3] = 4, (1, 3)
    expected = np.array([[NAN, NAN], [2, 4], [2, 4], [1, 3], [1, 3]], np.float32)
    np.testing.assert_array_equal(latest(measured), expected)


@pytest.mark.parametrize(
    ("measured", "kept"),
    [
        (range(1, 37), [3, 6, 12, 24]),
        ([2, 4, 5, 9, 18, 19], [4, 9, 18]),  # at moments of its own: each after twice as many records, or more
        ([1, 2], []),
    ],
)
def test_keeps_what_a_policy_would_have_measured(measured, kept):
    array = np.full((36, 3), NAN)
    array[np.array(measured) - 1, 1] = np.array(measured)
    got = by_policy(array)
    assert np.isnan(got[:, [0, 2]]).all()
    assert got[~np.isnan(got[:, 1]), 1].tolist() == kept


@pytest.mark.parametrize(
    ("at", "kept"), [(range(18), [5, 11, 17]), ([1, 4, 8, 10, 17], [4, 10, 17]), ([16], [16]), ([3, 5], [5])]
)
def test_keeps_the_depths_nearest_to_those_of_a_policy(at, kept):
    array = np.full((1, 19), NAN)
    array[0, list(at)] = 1.0
    assert depths_of(np.ones(19, bool), PROBE_DEPTHS) == [5, 11, 17]
    assert np.flatnonzero(~np.isnan(by_policy(array)[0])).tolist() == kept


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.a = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.b = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.b(self.dropout(nnx.relu(self.norm(self.a(x)))))


def loss_fn(model, x, labels):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()


def everything(model):
    leaves = jax.tree.leaves(nnx.as_pure(nnx.state(model)))
    keys = (jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves)
    return [np.array(jax.random.key_data(leaf) if key else leaf) for leaf, key in zip(leaves, keys, strict=True)]


@pytest.mark.usefixtures("jax_defaults")
class TestProbeOfAModel:
    X = jnp.asarray(np.random.default_rng(0).standard_normal((16, 4)), jnp.float32)
    LABELS = jnp.arange(16) % 3

    @pytest.mark.slow
    def test_is_the_training_loss_and_leaves_no_trace(self):
        model = Net()
        before = everything(model)
        params = nnx.as_pure(nnx.state(model, nnx.Param))
        loss = sfj.nnx.probe(model, loss_fn, self.X, self.LABELS)
        first = float(loss(params))
        assert float(loss(params)) == first
        for a, b in zip(before, everything(model), strict=True):
            np.testing.assert_array_equal(a, b)
        assert first == pytest.approx(float(loss_fn(nnx.clone(model), self.X, self.LABELS)), rel=1e-6)

    @pytest.mark.slow
    def test_takes_the_parameters_it_is_given(self):
        model, other = Net(), Net()
        other.a.kernel[...] = other.a.kernel[...] * 3
        loss = sfj.nnx.probe(model, loss_fn, self.X, self.LABELS)
        got = float(loss(nnx.as_pure(nnx.state(other, nnx.Param))))
        assert got == pytest.approx(float(loss_fn(other, self.X, self.LABELS)), rel=1e-6)

    @pytest.mark.slow
    def test_is_compiled_once_whatever_freezes(self):
        model, traces = Net(), []

        def counted(model, x, labels):
            traces.append(1)
            return loss_fn(model, x, labels)

        loss = sfj.nnx.probe(model, counted, self.X, self.LABELS)
        params = nnx.as_pure(nnx.state(model, nnx.Param))
        before = float(loss(params))
        optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), layers=sfj.nnx.find_layers(model, self.X))
        optimizer.freeze(model, ["a"])
        assert float(loss(params)) == before
        assert len(traces) == 1

    @pytest.mark.slow
    def test_a_run_that_measures_goes_on_bit_for_bit(self, tmp_path):
        """Also: the run is that of a policy that does not measure, as long as nothing freezes."""

        def run(steps, probing, restore=None, save_at=None):
            model = Net()
            layers = sfj.nnx.find_layers(model, self.X)
            optimizer = sfj.nnx.Optimizer(model, optax.adam(0.05), layers=layers)
            config = sfj.predictor.PredictorConfig(
                size=8, encoding=sfj.predictor.Encoding("none", regime=("contribution",))
            )
            policy = sfj.smartfrz(
                sfj.Predictor(config, rngs=nnx.Rngs(1)),
                schedule=sfj.policies.Schedule(record_every=1, evaluate_every=2),
                caution=1.0,
                probe=sfj.nnx.probe(model, loss_fn, self.X, self.LABELS) if probing else None,
            )
            freezer = sfj.nnx.Freezer(model, optimizer, policy)
            if restore:
                freezer.restore(restore)
            for step in range(int(optimizer.step[...]) + 1, steps + 1):
                loss, grads = optimizer.value_and_grad(loss_fn)(model, self.X, self.LABELS)
                optimizer.update(model, grads)
                freezer.step(loss=loss)
                if step == save_at:
                    freezer.save(tmp_path / "run")
            return model, freezer.policy_state

        model, state = run(16, True, save_at=10)
        assert np.isfinite(state.contribution[0])
        assert np.isnan(state.contribution[1])
        resumed, again = run(16, True, restore=tmp_path / "run")
        unmeasured, plain = run(16, False)
        for other in (resumed, unmeasured):
            for a, b in zip(everything(model), everything(other), strict=True):
                np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(state.contribution, again.contribution)
        assert plain.start_params is None
        assert np.isnan(plain.contribution).all()
