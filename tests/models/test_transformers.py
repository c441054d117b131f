"""DeiT and BERT: published sizes, initialisation, heads, masks, dropout and precision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import smartfrz_jax as sfj
from models.bert import Bert, bert_base, minilm
from models.deit import DeiT, DropPath, deit_tiny
from models.layers.positions import resample_pos_embed
from smartfrz_jax.pytrees import paths
from tests.models.transformers import (
    IDS,
    IMAGES,
    MASK,
    QUICKLY,
    RNG,
    call,
    equations,
    evaluated,
    forward_jaxpr,
    lively,
    tiny_bert,
    tiny_deit,
)
from tests.support.rounding import assert_close

IMAGE = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 16), jnp.int32)


def parameters(model):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "published"),
    [
        (deit_tiny, 5_717_416),
        (lambda rngs: deit_tiny(distilled=True, rngs=rngs), 5_910_800),
        (bert_base, 109_483_778),
        (minilm, 22_713_216 + 2 * 384 + 2),
    ],
    ids=["deit_tiny", "deit_tiny_distilled", "bert_base", "minilm"],
)
def test_published_number_of_parameters(make, published):
    assert parameters(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))) == published


@pytest.mark.slow
def test_layers_of_deit_tiny():
    model = nnx.eval_shape(lambda: deit_tiny(rngs=nnx.Rngs(0)))
    layers = sfj.nnx.find_layers(model, IMAGE)
    assert len(layers) == 1 + 2 + 12 * 4 + 1
    assert "blocks/3/norm1/scale" in layers[3 + 3 * 4].params
    assert "blocks/3/drop_path1/rngs/count" in layers[3 + 3 * 4 + 1].state
    blocks = sfj.nnx.find_layers(model, IMAGE, granularity="block")
    assert blocks.names == ("patch_embed/proj", "cls_token", "pos_embed", *(f"blocks/{i}" for i in range(12)), "head")


@pytest.mark.slow
def test_layers_of_minilm():
    model = nnx.eval_shape(lambda: minilm(rngs=nnx.Rngs(0)))
    layers = sfj.nnx.find_layers(model, TOKENS, TOKENS)
    modules = [f"attention/{name}" for name in ("self/query", "self/key", "self/value", "output/dense")]
    blocks = [
        f"encoder/layer/{i}/{name}" for i in range(6) for name in (*modules, "intermediate/dense", "output/dense")
    ]
    embeddings = [f"embeddings/{name}_embeddings" for name in ("word", "token_type", "position")]
    assert layers.names == (*embeddings, *blocks, "pooler/dense", "classifier")
    assert "encoder/layer/0/output/LayerNorm/scale" in layers[3 + 5].params
    assert "encoder/layer/0/attention/self/dropout/rngs/count" in layers[3 + 2].state


@pytest.mark.slow
def test_weights_begin_as_in_the_originals():
    """A sample's standard deviation is within five of its own standard errors, and nothing is truncated."""
    deit = partial(tiny_deit, image_size=32, patch_size=8, dim=64, depth=1, num_classes=200, distilled=True)
    bert = partial(tiny_bert, vocab_size=200, max_positions=100, dim=64, depth=1, hidden=256)
    for make in (deit, bert):
        params = jax.jit(lambda make=make: nnx.as_pure(nnx.state(make(), nnx.Param)), compiler_options=QUICKLY)()
        for name, leaf in paths.flatten(params).items():
            values = np.asarray(leaf, np.float64)
            if name.endswith("bias"):
                assert not values.any(), name
            elif name.endswith("scale"):
                assert (values == 1).all(), name
            elif name == "patch_embed/proj/kernel":  # uniform within 1 / sqrt(fan_in)
                bound = (8 * 8 * 3) ** -0.5
                assert 0.99 * bound < np.abs(values).max() <= bound
                assert values.std() == pytest.approx(bound / 3**0.5, rel=5 * (0.2 / values.size) ** 0.5)
            else:
                assert values.std() == pytest.approx(0.02, rel=5 * (0.5 / values.size) ** 0.5), name
                assert abs(values.mean()) < 5 * 0.02 / values.size**0.5, name
                assert values.size < 4000 or np.abs(values).max() > 3 * 0.02, name


@pytest.mark.slow
def test_a_distilled_network_gives_the_mean_of_its_heads_or_both():
    model = evaluated(lively(lambda: tiny_deit(distilled=True, depth=1)))
    graphdef, state = nnx.split(model)

    def heads(state):
        model = nnx.merge(graphdef, state)
        return model(IMAGES), model.both_logits(IMAGES)

    mean, (logits, distilled_logits) = jax.jit(heads, compiler_options=QUICKLY)(state)
    np.testing.assert_allclose(mean, (logits + distilled_logits) / 2, rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(logits - distilled_logits)).max() > 0.1
    with pytest.raises(ValueError, match="distilled=True"):
        nnx.eval_shape(lambda: tiny_deit().both_logits(IMAGES))


@pytest.mark.slow
@pytest.mark.parametrize(("pool", "scan"), [("cls", True), ("mean", False)])
def test_padding_does_not_influence_results(pool, scan):
    model = evaluated(lively(lambda: tiny_bert(pool=pool, scan=scan)))
    kind = jnp.ones_like(IDS)
    logits = call(model, IDS, MASK, kind)
    changed = jnp.where(MASK == 1, IDS, (IDS + 7) % 20)
    np.testing.assert_array_equal(call(model, changed, MASK, kind * MASK), logits)
    longer = [
        jnp.pad(array, ((0, 0), (0, 2)), constant_values=fill) for array, fill in ((IDS, 5), (MASK, 0), (kind, 0))
    ]
    np.testing.assert_allclose(call(model, *longer), logits, rtol=1e-5, atol=1e-6)
    alone = call(model, IDS[1:2, :4], None, kind[1:2, :4])
    np.testing.assert_allclose(alone, logits[1:2], rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(call(model, IDS, None, kind) - logits)).max() > 1e-2
    assert np.isfinite(np.asarray(call(model, IDS, jnp.zeros_like(MASK), kind))).all()


@pytest.mark.slow
def test_stochastic_depth_drops_whole_examples_at_a_rate_that_rises_with_depth():
    n, rate = 4000, 0.4
    for depth in (0.0, 0.5, 1.0):
        drop = DropPath(rate, depth, rngs=nnx.Rngs(1))
        out = np.asarray(drop(jnp.ones((n, 2, 3))))
        kept = out[:, 0, 0] != 0
        keep = 1 - rate * depth
        assert (out == np.where(kept, np.float32(1) / np.float32(keep), np.float32(0))[:, None, None]).all()
        assert kept.mean() == pytest.approx(keep, abs=5 * (keep * (1 - keep) / n) ** 0.5)
        drop.eval()
        assert (drop(jnp.ones((2, 2, 3))) == 1).all()
    model = nnx.eval_shape(lambda: tiny_deit(depth=3, drop_path=rate))
    assert [block.drop_path2.rate for block in model.blocks] == [rate] * 3
    depths = jax.jit(lambda: [block.drop_path1.depth[...] for block in tiny_deit(depth=3, drop_path=rate).blocks])()
    assert depths == [0.0, 0.5, 1.0]
    without = nnx.eval_shape(tiny_deit)
    assert not jax.tree.leaves(nnx.state(without, nnx.Not(nnx.Param))), "streams that are never drawn from"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "inputs", "rate", "times"),
    [
        (tiny_deit, (IMAGES,), "dropout", 1 + 2 * 3),
        (tiny_deit, (IMAGES,), "attention_dropout", 2),
        (tiny_deit, (IMAGES,), "drop_path", 2 * 2),
        (tiny_bert, (IDS,), "dropout", 1 + 2 * 2 + 1),
        (tiny_bert, (IDS,), "attention_dropout", 2),
    ],
)
def test_each_dropout_is_where_it_belongs_in_training_alone(make, inputs, rate, times):
    def draws(make):
        jaxpr = forward_jaxpr(make, inputs)
        return sum(eqn.primitive.name == "random_bits" for eqn in equations(jaxpr))

    rates = {"dropout": 0.0, "attention_dropout": 0.0, rate: 0.5}
    assert draws(lambda: make(**rates)) == times
    assert draws(lambda: evaluated(make(**rates))) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(("make", "inputs"), [(tiny_deit, (IMAGES,)), (tiny_bert, (IDS, MASK))])
def test_bfloat16_computes_in_bfloat16_where_it_is_safe(make, inputs, scan):
    jaxpr = forward_jaxpr(lambda: evaluated(make(dtype=jnp.bfloat16, scan=scan)), inputs)
    assert jaxpr.outvars[0].aval.dtype == jnp.float32
    dots = [eqn for eqn in equations(jaxpr) if eqn.primitive.name in ("dot_general", "conv_general_dilated")]
    assert sum(eqn.invars[0].aval.dtype == jnp.bfloat16 for eqn in dots) == len(dots) - 1, "all but the head"
    softmax = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "exp"]
    assert {eqn.outvars[0].aval.dtype for eqn in softmax} == {jnp.dtype("float32")}
    half = nnx.eval_shape(lambda: make(param_dtype=jnp.bfloat16, scan=scan))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half, nnx.Param))} == {jnp.dtype("bfloat16")}
    assert nnx.eval_shape(lambda: make(param_dtype=jnp.bfloat16, scan=scan)(*inputs)).dtype == jnp.float32
    if scan:  # the results are the same without
        model, exact = (evaluated(lively(partial(make, dtype=dtype, scan=scan))) for dtype in (jnp.bfloat16, None))
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
        logits, expected = call(model, *inputs), call(exact, *inputs)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=0.03 * float(jnp.abs(expected).max()))


@pytest.mark.slow
def test_layer_norm_takes_its_statistics_in_float32():
    x = jnp.asarray(1000 + RNG.normal(size=(3, 8)) * 8, jnp.bfloat16)
    values = np.asarray(x, np.float64)
    centred = values - values.mean(1, keepdims=True)
    for norm, epsilon in (
        (lively(partial(tiny_deit, dtype=jnp.bfloat16)).norm, 1e-6),
        (lively(partial(tiny_bert, dtype=jnp.bfloat16)).embeddings.LayerNorm, 1e-12),
    ):
        assert norm.epsilon == epsilon
        expected = centred / np.sqrt(np.square(centred).mean(1, keepdims=True) + epsilon)
        expected = expected * np.asarray(norm.scale) + np.asarray(norm.bias)
        np.testing.assert_allclose(norm(x), expected, rtol=1e-4, atol=1e-5)


def bicubic(old, new):
    """Weights (new, old) of bicubic interpolation with antialiasing, as Pillow defines it, in float64."""
    scale = max(old / new, 1.0)
    distance = np.abs((np.arange(new)[:, None] + 0.5) * old / new - 0.5 - np.arange(old)[None]) / scale
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(2, 2), (8, 8), (4, 9), (5, 3)])
@pytest.mark.parametrize("prefix_tokens", [1, 2])
def test_position_embeddings_are_resampled_bicubically(grid, prefix_tokens):
    embeddings = RNG.normal(size=(1, prefix_tokens + 5 * 5, 3))
    found = resample_pos_embed(jnp.asarray(embeddings, jnp.float32), grid, prefix_tokens=prefix_tokens)
    image = embeddings[0, prefix_tokens:].reshape(5, 5, 3)
    expected = np.einsum("hi,wj,ijd->hwd", bicubic(5, grid[0]), bicubic(5, grid[1]), image).reshape(-1, 3)
    assert_close(found[0, prefix_tokens:], expected)
    np.testing.assert_array_equal(found[:, :prefix_tokens], np.float32(embeddings[:, :prefix_tokens]))


def test_position_embeddings_of_the_same_size_are_kept_and_a_wrong_size_is_refused():
    embeddings = jnp.ones((1, 1 + 2 * 3, 4), jnp.bfloat16)
    assert resample_pos_embed(embeddings, (2, 3), old_grid=(2, 3)) is embeddings
    assert resample_pos_embed(embeddings, (3, 3), old_grid=(2, 3)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="got 7 embeddings, None and 1"):
        resample_pos_embed(embeddings, (3, 3))


def test_images_need_not_be_square():
    def logits(x):
        model = tiny_deit(image_size=(8, 16), channels=1)
        assert model.pos_embed.shape == (1, 1 + 2 * 4, 8)
        return model(x)

    assert nnx.eval_shape(logits, jnp.ones((2, 8, 16, 1))).shape == (2, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_deit(patch_size=3), r"patch_size, heads: got 3 and 2"),
        (lambda: tiny_deit(heads=3), r"patch_size, heads: got 4 and 3"),
        (lambda: tiny_deit(drop_path=1.0), r"drop_path: got 1.0"),
        (lambda: tiny_deit()(jnp.ones((1, 12, 8, 3))), r"x: got images of 12 x 8, expected 8 x 8"),
        (lambda: tiny_deit()(jnp.ones((1, 8, 8, 1))), r"x: got images of shape"),
        (lambda: tiny_bert(heads=3), r"heads: got 3, expected a divisor of dim \(8\)"),
        (lambda: tiny_bert(pool="max"), r"pool: got 'max', expected 'cls'"),
        (lambda: tiny_bert(dropout=-0.1), r"dropout: got -0.1"),
        (lambda: tiny_bert()(jnp.ones((1, 9), jnp.int32)), r"input_ids: got 9 tokens, expected at most max_positions"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(make)


def test_names_of_tensors():
    deit = nnx.eval_shape(lambda: deit_tiny(distilled=True, depth=1, rngs=nnx.Rngs(0)))
    block = [
        f"blocks.0.{module}.{leaf}"
        for module in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for leaf in ("weight", "bias")
    ]
    rest = [
        f"{module}.{leaf}"
        for module in ("patch_embed.proj", "norm", "head", "head_dist")
        for leaf in ("weight", "bias")
    ]
    names = {DeiT.tensor_name(name) for name in paths.flatten(nnx.state(deit, nnx.Param))}
    assert names == {"cls_token", "dist_token", "pos_embed", *block, *rest}
    bert = nnx.eval_shape(lambda: minilm(depth=1, rngs=nnx.Rngs(0)))
    modules = [f"attention.self.{name}" for name in ("query", "key", "value")]
    modules += ["attention.output.dense", "attention.output.LayerNorm", "intermediate.dense"]
    modules = [f"bert.encoder.layer.0.{name}" for name in (*modules, "output.dense", "output.LayerNorm")]
    modules += ["bert.embeddings.LayerNorm", "bert.pooler.dense", "classifier"]
    tensors = {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}
    tensors |= {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
    assert {Bert.tensor_name(name) for name in paths.flatten(nnx.state(bert, nnx.Param))} == tensors
