import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartfrz_jax.predictor.cka import layer_cka, layer_gram, layer_similarity, linear_cka

# More examples than features, fewer, and one side of each; feature maps; a single feature; the fewest examples.
SHAPES = [
    ((64, 3), (64, 5)),
    ((8, 40), (8, 70)),
    ((16, 4), (16, 100)),
    ((12, 4, 4, 3), (12, 7)),
    ((10, 2, 3, 2), (10, 50)),
    ((9,), (9, 4)),
    ((2, 3), (2, 5)),
]


def reference(x, y) -> float:
    """Eq. 5 as it stands, over centred features, in float64."""
    x, y = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    return np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


def related(shape_x, shape_y, seed=0, mean=0.0, scale=1.0, share=0.7):
    """Two float32 feature sets with a part in common."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((shape_x[0], 2))

    def features(shape):
        d = int(np.prod(shape[1:]))
        part = common @ rng.standard_normal((2, d)) * share + rng.standard_normal((shape[0], d)) * (1 - share)
        return ((part + mean) * scale).reshape(shape).astype(np.float32)

    return features(shape_x), features(shape_y)


@pytest.mark.parametrize(("shape_x", "shape_y"), SHAPES)
@pytest.mark.slow
def test_matches_float64_reference(shape_x, shape_y):
    x, y = related(shape_x, shape_y)
    got = linear_cka(jnp.asarray(x), jnp.asarray(y))
    assert got.dtype == jnp.float32
    assert got.shape == ()
    np.testing.assert_allclose(got, reference(x, y), rtol=2e-6)
    np.testing.assert_allclose(linear_cka(jnp.asarray(y), jnp.asarray(x)), got, rtol=2e-6)


@pytest.mark.parametrize(("shape_x", "shape_y"), SHAPES[:4])
@pytest.mark.parametrize("mean", [1e4, -1e4])
def test_is_stable_for_a_large_mean(shape_x, shape_y, mean):
    x, y = related(shape_x, shape_y, mean=mean)
    np.testing.assert_allclose(linear_cka(jnp.asarray(x), jnp.asarray(y)), reference(x, y), rtol=5e-6)


@pytest.mark.parametrize(("shape_x", "shape_y"), SHAPES[:4])
@pytest.mark.parametrize("scale", [1e-12, 1e12, 1e-25, 1e25])
def test_is_stable_for_extreme_scales(shape_x, shape_y, scale):
    x, y = related(shape_x, shape_y, scale=scale)
    _, unit = related(shape_x, shape_y)
    np.testing.assert_allclose(linear_cka(jnp.asarray(x), jnp.asarray(y)), reference(x, y), rtol=5e-6)
    np.testing.assert_allclose(linear_cka(jnp.asarray(x), jnp.asarray(unit)), reference(x, unit), rtol=5e-6)


def test_one_example_far_from_the_others():
    x, y = related((32, 6), (32, 4))
    x[0], y[0] = 1e4, -1e4  # the first is the one relative to which the others are taken
    np.testing.assert_allclose(linear_cka(jnp.asarray(x), jnp.asarray(y)), reference(x, y), rtol=5e-6)


@pytest.mark.parametrize("shape", [(32, 6), (6, 32)])
def test_invariances(shape):
    x, y = related(shape, shape)
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((shape[1], shape[1])))[0]
    base = linear_cka(jnp.asarray(x), jnp.asarray(y))
    for changed in (x @ rotation, 3.5 * x, -x, x + 10.0, x[:, ::-1]):
        np.testing.assert_allclose(linear_cka(jnp.asarray(changed, jnp.float32), jnp.asarray(y)), base, rtol=2e-5)
    stretched = x * np.where(np.arange(shape[1]) == 0, 30.0, 1.0)  # not by the same factor everywhere: not invariant
    assert abs(float(linear_cka(jnp.asarray(stretched, jnp.float32), jnp.asarray(y))) - float(base)) > 0.05
    np.testing.assert_allclose(linear_cka(jnp.asarray(x), jnp.asarray(x)), 1.0, rtol=1e-6)


def test_is_centred():
    x, y = related((50, 3), (50, 3), share=0.0)
    assert reference(x, y) < 0.1
    assert linear_cka(jnp.asarray(x + 5), jnp.asarray(y + 5)) < 0.1  # 0.99 without centring


def test_orthogonal_features_have_none_in_common():
    x = jnp.array([1.0, -1.0, 1.0, -1.0])
    y = jnp.array([1.0, 1.0, -1.0, -1.0])
    np.testing.assert_allclose(linear_cka(x, y), 0.0, atol=1e-7)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    n=st.sampled_from([2, 3, 9]),
    dims=st.sampled_from([(1, 1), (2, 5), (20, 3), (20, 30)]),
    share=st.floats(0, 1),
    scale=st.sampled_from([1e-20, 1.0, 1e20]),
)
def test_lies_between_0_and_1(seed, n, dims, share, scale):
    x, y = related((n, dims[0]), (n, dims[1]), seed, scale=scale, share=share)
    got = float(linear_cka(jnp.asarray(x), jnp.asarray(y)))
    assert 0.0 <= got <= 1.0
    np.testing.assert_allclose(got, reference(x, y), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, 12345.678, 1e-30])
def test_without_variance_it_is_zero(constant):
    x, _ = related((7, 3), (7, 3))
    flat = jnp.full((7, 5), constant)  # 7 and 0.1: a mean of equal numbers is not exactly the number
    for a, b in ((jnp.asarray(x), flat), (flat, jnp.asarray(x)), (flat, flat)):
        assert float(linear_cka(a, b)) == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.slow
def test_non_finite_features_are_not_hidden(bad):
    x, y = related((8, 3), (8, 3))
    x[2, 1] = bad
    pairs = [(jnp.asarray(x), jnp.asarray(y)), (jnp.asarray(y), jnp.asarray(x)), (jnp.ones((8, 2)), jnp.asarray(x))]
    for a, b in pairs:
        assert np.isnan(jax.jit(linear_cka)(a, b))
        assert np.isnan(layer_similarity({"x": a}, {"x": b}))
        with pytest.raises(ValueError, match=r"[xy]: not finite, expected"):
            linear_cka(a, b)
        with pytest.raises(ValueError, match=r"(features|reference)\['x'\]: not finite, expected"):
            layer_cka({"x": a}, {"x": b})


def test_bfloat16_is_computed_in_float32():
    x, y = (jnp.asarray(a, jnp.bfloat16) for a in related((32, 20), (32, 6)))
    expected = reference(np.asarray(x, np.float32), np.asarray(y, np.float32))
    np.testing.assert_allclose(linear_cka(x, y), expected, rtol=2e-6)


def test_jit_and_vmap():
    pairs = [related((8, 3, 2), (8, 20), seed) for seed in range(4)]
    x, y = (jnp.stack([jnp.asarray(pair[i]) for pair in pairs]) for i in range(2))
    expected = [reference(*pair) for pair in pairs]
    np.testing.assert_allclose(jax.jit(jax.vmap(linear_cka))(x, y), expected, rtol=5e-6)


@pytest.mark.parametrize(("p", "q", "largest"), [(4, 4, 16), (500, 600, 100)])
def test_takes_the_smaller_products(p, q, largest):
    jaxpr = str(jax.make_jaxpr(linear_cka)(jnp.ones((10, p)), jnp.ones((10, q))))
    products = [line for line in jaxpr.splitlines() if "dot_general" in line]
    side = int(largest**0.5)
    assert len(products) == 3 if largest == 16 else 2
    assert all(f"f32[{side},{side}]" in line for line in products)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ((5, 3), (6, 3), r"x, y: got 5 and 6 examples"),
        ((1, 3), (1, 3), r"x: got shape \(1, 3\).*at least 2 examples"),
        ((), (2, 3), r"x: got shape \(\)"),
        ((4, 2), (4, 0), r"y: got shape \(4, 0\).*1 feature"),
    ],
)
def test_bad_shapes(x, y, message):
    with pytest.raises(ValueError, match=message):
        linear_cka(jnp.ones(x), jnp.ones(y))


class TestLayerCka:
    def layers(self):
        pairs = {name: related((6, 4), (6, d), seed) for seed, (name, d) in enumerate([("b", 3), ("a", 4), ("c", 30)])}
        return tuple({name: jnp.asarray(pair[i]) for name, pair in pairs.items()} for i in range(2))

    def test_is_in_the_order_of_features(self):
        features, other = self.layers()
        shuffled = {name: other[name] for name in ("c", "a", "b")}
        got = layer_cka(features, shuffled)
        chex.assert_shape(got, (3,))
        np.testing.assert_allclose(got, [reference(features[name], other[name]) for name in "bac"], rtol=5e-6)

    def test_is_one_program_for_all_calls(self):
        from smartfrz_jax.predictor.cka import _layer_cka

        features, other = self.layers()
        layer_cka(features, other)
        before = _layer_cka._cache_size()
        layer_cka({name: 2 * x for name, x in features.items()}, other)
        assert _layer_cka._cache_size() == before

    def test_layers_missing(self):
        features, other = self.layers()
        with pytest.raises(ValueError, match=r"reference: lacks the output of 2 layer\(s\): 'b', 'c'"):
            layer_cka(features, {"a": other["a"]})
        with pytest.raises(ValueError, match=r"features: lacks the output of 1 layer\(s\): 'a'"):
            layer_cka({name: features[name] for name in "bc"}, other)
        with pytest.raises(ValueError, match="features: got no layers"):
            layer_cka({}, {})

    def test_error_names_the_layer(self):
        features, other = self.layers()
        with pytest.raises(ValueError, match=r"features\['a'\], reference\['a'\]: got 6 and 5 examples"):
            layer_cka(features, other | {"a": other["a"][:5]})


class TestLayerGram:
    @pytest.mark.parametrize("mean", [0.0, 1e4])
    @pytest.mark.parametrize(("shape_x", "shape_y"), SHAPES)
    def test_scalar_products_are_cka(self, shape_x, shape_y, mean):
        x, y = (jnp.asarray(a) for a in related(shape_x, shape_y, mean=mean))
        grams = layer_gram({"x": x, "y": y})
        n = shape_x[0]
        chex.assert_shape(grams, (2, n * (n + 1) // 2))
        assert grams.dtype == jnp.float32
        np.testing.assert_allclose(grams[0] @ grams[1], linear_cka(x, y), rtol=1e-5)
        np.testing.assert_allclose(grams[0] @ grams[1], reference(x, y), rtol=1e-5)
        np.testing.assert_allclose(jnp.sum(grams**2, axis=1), 1.0, rtol=1e-6)

    @pytest.mark.parametrize("scale", [1e-25, 1e25])
    def test_is_stable_for_extreme_scales(self, scale):
        x, y = (jnp.asarray(a) for a in related((12, 5), (12, 40), scale=scale))
        grams = layer_gram({"x": x, "y": y})
        np.testing.assert_allclose(grams[0] @ grams[1], reference(x, y), rtol=1e-5)

    def test_without_variance_it_is_zero(self):
        assert not layer_gram({"x": jnp.full((5, 3), 0.1)}).any()

    @pytest.mark.slow
    def test_non_finite_features_are_not_hidden(self):
        x = jnp.asarray(related((5, 3), (5, 3))[0]).at[1, 1].set(jnp.inf)
        assert jnp.isnan(layer_gram({"x": x})).any()

    def test_bad_shapes(self):
        with pytest.raises(ValueError, match="features: got no layers"):
            layer_gram({})
        with pytest.raises(ValueError, match=r"features\['b'\], features\['a'\]: got 5 and 6 examples"):
            layer_gram({"a": jnp.ones((6, 3)), "b": jnp.ones((5, 3))})
