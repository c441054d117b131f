import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from smartfrz_jax import Layer, Layers, find_layers
from smartfrz_jax.predictor import Tailoring, sampling

P = PartitionSpec


def made_of(**kernels: tuple[tuple[int, ...], ...]) -> tuple[Layers, dict[str, jax.Array]]:
    """Layers of kernels of the given shapes; every weight's value is its flat position in its layer."""
    entries, params = [], {}
    for name, shapes in kernels.items():
        start = 0
        names = [f"{name}/w{i}" for i in range(len(shapes))]
        for param, shape in zip(names, shapes, strict=True):
            n = int(np.prod(shape))
            params[param] = jnp.arange(start, start + n, dtype=jnp.float32).reshape(shape)
            start += n
        entries.append(Layer(name, (*names, f"{name}/bias"), tuple(names)))
        params[f"{name}/bias"] = jnp.full(3, -1.0)
    return Layers(tuple(entries)), params


def positions(sample: Tailoring, params) -> np.ndarray:
    return np.asarray(sample(params)).astype(int)


@pytest.mark.slow
def test_shape_and_dtype():
    layers, params = made_of(a=((40, 50),), b=((3, 3, 8, 16),))
    weights = Tailoring.create(layers, params)(params)
    assert weights.shape == (2, 1024)
    assert weights.dtype == jnp.float32


@pytest.mark.parametrize("shape", [(2000,), (40, 50), (3, 3, 20, 13), (300, 300), (70_000,)])
def test_samples_are_distinct_and_valid(shape):
    layers, params = made_of(a=(shape,))
    got = positions(Tailoring.create(layers, params), params)[0]
    assert len(set(got.tolist())) == 1024
    assert got.min() >= 0
    assert got.max() < np.prod(shape)


@pytest.mark.parametrize("n", [64, 65, 127, 128])
def test_layers_hardly_larger_than_the_sample(n):
    layers, params = made_of(a=((n,),))
    got = positions(Tailoring.create(layers, params, size=64), params)[0]
    assert len(set(got.tolist())) == 64
    assert got.max() < n


@pytest.mark.slow
def test_nearly_all_weights_of_a_large_layer():
    n = (1 << 16) + 10  # the draw has to be repeated
    layers, params = made_of(a=((n,),))
    got = positions(Tailoring.create(layers, params, size=1 << 16), params)[0]
    assert len(set(got.tolist())) == 1 << 16


@pytest.mark.parametrize("n", [1, 10, 63])
def test_smaller_layers_are_drawn_with_replacement(n):
    layers, params = made_of(a=((n, 1),))
    got = positions(Tailoring.create(layers, params, size=64), params)[0]
    assert got.shape == (64,)
    assert set(got.tolist()) <= set(range(n))
    assert len(set(got.tolist())) > 0.6 * n


def test_scalar_weight():
    layers = Layers((Layer("a", ("a",), ("a",)),))
    np.testing.assert_array_equal(
        Tailoring.create(layers, {"a": jnp.float32(3)}, size=4)({"a": jnp.float32(3)}), [[3.0] * 4]
    )


def test_seed_and_layer_decide_the_draw():
    layers, params = made_of(a=((40, 50),), b=((40, 50),), c=((300, 300),))
    first = positions(Tailoring.create(layers, params, size=128, seed=3), params)
    np.testing.assert_array_equal(first, positions(Tailoring.create(layers, params, size=128, seed=3), params))
    other = positions(Tailoring.create(layers, params, size=128, seed=4), params)
    for i in range(3):
        assert not np.array_equal(first[i], other[i])
    assert not np.array_equal(first[0], first[1])
    alone, alone_params = made_of(b=((2000,),))  # other layers, and the shape, do not matter
    np.testing.assert_array_equal(
        first[1], positions(Tailoring.create(alone, alone_params, size=128, seed=3), alone_params)[0]
    )


def test_known_draw():
    """A run, and what a predictor was fitted on, must be the same again with another version."""
    layers, params = made_of(a=((40, 50),), b=((300, 300),))
    got = positions(Tailoring.create(layers, params, size=4), params)
    np.testing.assert_array_equal(got, [[1964, 653, 930, 1590], [53159, 89248, 64231, 82428]])


@pytest.mark.parametrize("shapes", [((50_000, 30_000),) * 2, ((50_000, 60_000),), ((3, 50_000, 30_000), (8, 8))])
def test_layers_of_more_weights_than_an_int32_counts(shapes):
    names = tuple(f"w{i}" for i in range(len(shapes)))
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in zip(names, shapes, strict=True)}
    sample = Tailoring.create(Layers((Layer("a", names, names),)), params)
    assert jax.eval_shape(sample, params).shape == (1, 1024)
    for index, shape in zip(sample.leaf_positions[0], shapes, strict=True):
        flat = np.ravel_multi_index(np.asarray(index), shape)
        assert len(set(flat.tolist())) == len(flat)
        # As many as a kernel has its share of, from its beginning to its end.
        assert len(flat) == pytest.approx(1024 * np.prod(shape) / sum(np.prod(s) for s in shapes), rel=0.2, abs=1)
        if len(flat) > 1:
            np.testing.assert_allclose(np.quantile(flat / np.prod(shape), [0.01, 0.5, 0.99]), [0, 0.5, 1], atol=0.08)


@pytest.mark.parametrize(
    ("size", "distinct", "first"), [(64, 64, [205, 454, 130, 360]), (600, 350, [489, 305, 108, 460])]
)
def test_large_layers_are_sampled_as_small_ones_are(monkeypatch, size, distinct, first):
    monkeypatch.setattr(sampling, "_MOST", 99)
    layers, params = made_of(a=((20, 5), (40, 10)))
    got = positions(Tailoring.create(layers, params, size=size), params)[0]
    assert len(set(got.tolist())) == pytest.approx(distinct, abs=0 if size < 500 else 25)
    assert 0 <= got.min() < 50
    assert 450 < got.max() < 500
    np.testing.assert_array_equal(got[:4], first)  # a run must be the same again with another version
    with pytest.raises(ValueError, match=r"params: 'b/w0' of layer 'b' has shape \(100,\), expected at most 99"):
        Tailoring.create(*made_of(b=((100,),)))


@pytest.mark.parametrize("shapes", [((3, 4), (5, 6, 2), (7,)), ((300, 200), (1, 1), (200, 100)), ((1,), (2,), (3,))])
def test_a_block_is_sampled_as_if_it_were_one_kernel(shapes):
    """The weights' values are positions in the whole block, so the block must give what one long kernel gives."""
    layers, params = made_of(a=shapes)
    long, long_params = made_of(a=((sum(int(np.prod(shape)) for shape in shapes),),))
    got = Tailoring.create(layers, params, size=64)(params)
    np.testing.assert_array_equal(got, Tailoring.create(long, long_params, size=64)(long_params))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=4), st.integers(1, 70))
@pytest.mark.slow
def test_every_sample_is_the_weight_at_its_position(shapes, size):
    layers, params = made_of(a=tuple(map(tuple, shapes)))
    sample = Tailoring.create(layers, params, size=size)
    flat = np.concatenate([np.ravel(params[name]) for name in layers[0].kernels])
    starts = np.cumsum([0, *[np.prod(shape) for shape in shapes]])
    claimed = [
        start + np.ravel_multi_index(tuple(np.asarray(index)), shape)
        for start, index, shape in zip(starts, sample.leaf_positions[0], shapes, strict=False)
    ]
    claimed = np.concatenate(claimed)
    got = np.asarray(sample(params))[0]
    np.testing.assert_array_equal(got, flat[claimed][np.asarray(sample.order[0])])
    assert len(set(got.tolist())) == size or size > len(flat)


@pytest.mark.slow
def test_new_values_at_the_same_positions():
    layers, params = made_of(a=((40, 50),), b=((9,), (40, 4)))
    sample = Tailoring.create(layers, params, size=32)
    np.testing.assert_array_equal(
        sample(jax.tree.map(lambda leaf: 2 * leaf + 1, params)), 2 * np.asarray(sample(params)) + 1
    )


def test_bfloat16_weights_give_float32_of_the_same_values():
    layers, params = made_of(a=((40, 50),))
    half = jax.tree.map(lambda leaf: (leaf / 7).astype(jnp.bfloat16), params)
    sample = Tailoring.create(layers, params, size=32)
    got = sample(half)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, sample(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P("y", "x"), P()], ids=str)
@pytest.mark.slow
def test_sharded_weights_give_the_same_values(kind, spec):
    layers, params = made_of(a=((64, 32),), b=((16, 8), (8, 16)))
    sample = Tailoring.create(layers, params, size=48)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"), axis_types=(kind, kind))
    sharded = {
        name: jax.device_put(leaf, NamedSharding(mesh, spec if leaf.ndim == 2 else P()))
        for name, leaf in params.items()
    }
    expected = sample(params)
    np.testing.assert_array_equal(sample(sharded), expected)
    np.testing.assert_array_equal(jax.jit(lambda sample, params: sample(params))(sample, sharded), expected)
    np.testing.assert_array_equal(Tailoring.create(layers, sharded, size=48)(sharded), expected)


def test_a_sharded_weight_is_not_gathered_whole():
    layers, params = made_of(a=((512, 64),))
    sample = Tailoring.create(layers, params, size=16)
    mesh = Mesh(np.array(jax.devices()), ("x",))
    sharded = jax.device_put(params["a/w0"], NamedSharding(mesh, P("x")))
    compiled = jax.jit(lambda w: sample(params | {"a/w0": w})).lower(sharded).compile()
    assert "all-gather" not in compiled.as_text()


@pytest.mark.slow
def test_one_compiled_call_for_all_layers():
    layers, params = made_of(**{f"layer{i}": ((5 + i, 7),) for i in range(20)})
    sample = Tailoring.create(layers, params, size=16)
    before = sampling._sample._cache_size()
    for step in range(3):
        sample(jax.tree.map(lambda leaf: leaf + step, params))  # noqa: B023
    again = Tailoring.create(Layers(layers.entries), params, size=16)
    again(params)
    assert sampling._sample._cache_size() == before + 1


def test_as_an_argument_of_jit_and_through_a_flatten():
    layers, params = made_of(a=((40, 50),), b=((9,), (40, 4)))
    sample = Tailoring.create(layers, params, size=32)
    leaves, treedef = jax.tree.flatten(sample)
    np.testing.assert_array_equal(jax.tree.unflatten(treedef, leaves)(params), sample(params))
    np.testing.assert_array_equal(jax.jit(lambda t, p: t(p))(sample, params), sample(params))


def test_abstract_parameters_give_the_same_draw():
    layers, params = made_of(a=((40, 50),), b=((300, 300),))
    abstract = jax.eval_shape(lambda: params)
    np.testing.assert_array_equal(Tailoring.create(layers, abstract)(params), Tailoring.create(layers, params)(params))


@pytest.mark.slow
def test_nnx_state():
    model = nnx.Sequential(nnx.Linear(20, 30, rngs=nnx.Rngs(0)), nnx.Linear(30, 5, rngs=nnx.Rngs(1)))
    graphdef, params = nnx.split(model)
    layers = find_layers(params, lambda params, x: nnx.merge(graphdef, params)(x), jnp.ones((1, 20)))
    sample = Tailoring.create(layers, params, size=16)
    got = np.asarray(sample(params))
    np.testing.assert_array_equal(got, sample(nnx.as_pure(params)))
    assert set(got[1].tolist()) <= set(np.ravel(model.layers[1].kernel[...]).tolist())


@pytest.mark.parametrize("n", [1000, 70_000])
def test_positions_are_uniform(n):
    """Counts of 20 buckets over many draws: chi-square with 19 degrees of freedom is below 43.8 in 99.9 % of cases."""
    layers, params = made_of(a=((n,),))
    got = np.concatenate([positions(Tailoring.create(layers, params, size=100, seed=s), params)[0] for s in range(40)])
    counts = np.bincount(got * 20 // n, minlength=20)
    expected = len(got) / 20
    assert np.sum((counts - expected) ** 2) / expected < 43.8


def test_order_within_a_sample_is_random():
    """A predictor sees the weights in the order of the draw; sorted by kernel, blocks would look unlike layers."""
    layers, params = made_of(a=((1000,), (1000,)))
    got = positions(Tailoring.create(layers, params, size=200), params)[0]
    switches = np.count_nonzero(np.diff(got >= 1000))
    assert 70 < switches < 130


@pytest.mark.parametrize("size", [0, -1])
def test_wrong_size(size):
    layers, params = made_of(a=((4, 5),))
    with pytest.raises(ValueError, match=rf"size: got {size}, expected an integer of at least 1"):
        Tailoring.create(layers, params, size=size)


def test_wrong_parameters():
    layers, params = made_of(a=((4, 5),), b=((4, 5),))
    with pytest.raises(ValueError, match=r"params: 'b/w0' of layer 'b' is missing"):
        Tailoring.create(layers, {"a/w0": params["a/w0"]})
    with pytest.raises(ValueError, match="params: got a pytree without leaves"):
        Tailoring.create(layers, {})
    with pytest.raises(ValueError, match=r"params: layer 'a' has no weights to sample \(a/w0 of size 0\)"):
        Tailoring.create(layers, params | {"a/w0": jnp.ones((0, 5))})
