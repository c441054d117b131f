"""Llama: against NumPy in float64, causality, packed texts, precision, scan, and what a tied embedding freezes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.interpreters import partial_eval

import smartfrz_jax as sfj
from models import weights
from models.llama import Llama, smollm2_135m
from smartfrz_jax.pytrees import paths
from tests.models.transformers import RNG, call, equations, forward_jaxpr, lively, tiny_llama
from tests.support.rounding import assert_close

IDS = jnp.asarray(RNG.integers(0, 20, size=(2, 6)), jnp.int32)
SEGMENTS = jnp.asarray([[0, 0, 0, 0, 1, 1], [5, 3, 3, 3, 3, 3]], jnp.int32)


def norm(x, scale):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * scale


def reference(tensors, ids, segments):
    """Logits of one sequence by the papers' formulas: a head at a time, rotations as products of complex numbers."""
    d, group = 4, 2
    x = tensors["model.embed_tokens.weight"][ids]
    turns = np.exp(1j * np.arange(len(ids))[:, None] * 50.0 ** (-np.arange(0, d, 2) / d))

    def turned(part):
        complexes = (part[:, : d // 2] + 1j * part[:, d // 2 :]) * turns
        return np.concatenate([complexes.real, complexes.imag], axis=1)

    for i in range(2):
        block = {name.split(".", 3)[3]: value for name, value in tensors.items() if f"layers.{i}." in name}
        h = norm(x, block["input_layernorm.weight"])
        q, k, v = (h @ block[f"self_attn.{name}_proj.weight"].T for name in "qkv")
        heads = []
        for head in range(4):
            mine, shared = slice(d * head, d * head + d), slice(d * (head // group), d * (head // group) + d)
            scores = turned(q[:, mine]) @ turned(k[:, shared]).T / np.sqrt(d)
            seen = np.tril(np.ones_like(scores)) * (segments[:, None] == segments[None])
            exps = np.exp(scores) * seen
            heads.append(exps / exps.sum(1, keepdims=True) @ v[:, shared])
        x = x + np.concatenate(heads, axis=1) @ block["self_attn.o_proj.weight"].T
        h = norm(x, block["post_attention_layernorm.weight"])
        gate, up = (h @ block[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ block["mlp.down_proj.weight"].T
    return norm(x, tensors["model.norm.weight"]) @ tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).T


@pytest.mark.slow
@pytest.mark.parametrize(("tied", "scan"), [(False, True), (True, False)])
def test_logits_are_those_of_the_papers_formulas(tied, scan):
    model = lively(partial(tiny_llama, tied=tied, scan=scan))
    tensors = {name: value.astype(np.float64) for name, value in weights.get_tensors(model).items()}
    got = call(model, IDS, SEGMENTS)
    for ids, segments, logits in zip(np.asarray(IDS), np.asarray(SEGMENTS), got, strict=True):
        assert_close(logits, reference(tensors, ids, segments))
    alone = call(model, IDS)
    assert_close(alone[0], reference(tensors, np.asarray(IDS[0]), np.zeros(6)))
    assert np.abs(np.asarray(alone - got)).max() > 0.1, "texts in a sequence do not see each other"


@pytest.mark.slow
def test_a_token_sees_none_behind_it_and_packed_texts_are_as_if_alone():
    model = lively(tiny_llama)
    logits = call(model, IDS)
    changed = call(model, IDS.at[:, 4].set((IDS[:, 4] + 3) % 20))
    np.testing.assert_array_equal(changed[:, :4], logits[:, :4])
    assert np.abs(np.asarray(changed - logits))[:, 4:].max(axis=(1, 2)).min() > 0.1
    packed = call(model, IDS, SEGMENTS)
    assert_close(packed[0, 4:], call(model, IDS[:1, 4:])[0])
    assert_close(packed[1, 1:], call(model, IDS[1:, 1:])[0])


@pytest.mark.slow
def test_published_number_of_parameters_and_names_of_layers_and_tensors():
    model = nnx.eval_shape(lambda: smollm2_135m(rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == 134_515_008
    projections = [f"self_attn/{name}_proj" for name in "qkvo"] + [
        f"mlp/{name}_proj" for name in ("gate", "up", "down")
    ]
    one = nnx.eval_shape(lambda: tiny_llama(depth=1, tied=False))
    layers = sfj.nnx.find_layers(one, IDS)
    assert layers.names == ("embed_tokens", *(f"layers/0/{name}" for name in projections), "lm_head")
    blocks = [
        f"layers.0.{name.replace('/', '.')}" for name in (*projections, "input_layernorm", "post_attention_layernorm")
    ]
    names = {f"model.{name}.weight" for name in (*blocks, "embed_tokens", "norm")} | {"lm_head.weight"}
    assert {Llama.tensor_name(name) for name in paths.flatten(nnx.state(one, nnx.Param))} == names


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (partial(tiny_llama, dim=64, tied=False), 0.02),
        (partial(tiny_llama, dim=64, tied=False, init_std=0.1), 0.1),
        (partial(smollm2_135m, dim=72, depth=1, hidden=64, vocab_size=128, rngs=nnx.Rngs(0)), 1 / 24),  # as published
    ],
)
def test_weights_are_drawn_with_one_standard_deviation(make, expected):
    drawn = {name: leaf for name, leaf in paths.flatten(nnx.state(make(), nnx.Param)).items() if leaf.ndim > 1}
    assert {name: float(jnp.std(leaf)) for name, leaf in drawn.items()} == dict.fromkeys(
        drawn, pytest.approx(expected, rel=0.15)
    )


def matrix_products(tied, frozen):
    """Matrix products of loss and gradients with some front layers frozen, without those that nothing depends on."""
    model = nnx.eval_shape(partial(tiny_llama, tied=tied))
    layers = sfj.nnx.find_layers(model, IDS, granularity="block")
    blocks = ("layers/0", "layers/1")
    assert layers.names == ((*blocks, "embed_tokens") if tied else ("embed_tokens", *blocks, "lm_head"))
    graphdef, params = nnx.split(model)
    optimizer = nnx.eval_shape(lambda: sfj.nnx.Optimizer(nnx.merge(graphdef, params), optax.sgd(0.1), layers=layers))
    optimizer.frozen = sfj.Frozen(layers, frozenset(frozen))

    def run(params):
        model = nnx.merge(graphdef, params, copy=True)
        loss, grads = optimizer.value_and_grad(lambda model: jnp.square(model(IDS)).mean())(model)
        return loss, nnx.as_pure(grads)

    jaxpr = jax.make_jaxpr(run)(params).jaxpr
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return sum(eqn.primitive.name == "dot_general" for eqn in equations(needed))


@pytest.mark.slow
def test_the_backward_pass_ends_behind_frozen_blocks_where_the_lookup_freezes_apart_from_the_head():
    """A block has 7 projections and 2 products of attention; each has two gradients, one of them of a weight."""
    forward = 2 * (7 + 2) + 1
    for tied in (False, True):
        assert matrix_products(tied, ()) == 3 * forward
    behind = forward + 2 * (7 + 2) + 2
    assert matrix_products(False, ("embed_tokens", "layers/0")) == behind
    assert matrix_products(True, ("layers/0",)) == behind + 7 + 2 * 2


@pytest.mark.slow
@pytest.mark.parametrize(("tied", "scan"), [(False, True), (True, False)])
def test_bfloat16_computes_in_bfloat16_where_it_is_safe(tied, scan):
    make = partial(tiny_llama, tied=tied, scan=scan)
    jaxpr = forward_jaxpr(partial(make, dtype=jnp.bfloat16), (IDS,))
    assert jaxpr.outvars[0].aval.dtype == jnp.float32
    dots = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general"]
    assert {eqn.invars[0].aval.dtype for eqn in dots} == {jnp.dtype("bfloat16")}
    assert {eqn.outvars[0].aval.dtype for eqn in dots[-1:]} == {jnp.dtype("float32")}
    for name in ("exp", "rsqrt", "cos"):
        kinds = {eqn.outvars[0].aval.dtype for eqn in equations(jaxpr) if eqn.primitive.name == name}
        assert kinds == {jnp.dtype("float32")}, name
    half = nnx.eval_shape(partial(make, param_dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half, nnx.Param))} == {jnp.dtype("bfloat16")}
    model, exact = (lively(partial(make, dtype=dtype)) for dtype in (jnp.bfloat16, None))
    logits, expected = call(model, IDS), call(exact, IDS)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=0.03 * float(jnp.abs(expected).max()))


def test_files_of_hugging_face_are_read_with_their_frequencies_and_without_a_head(tmp_path):
    model = lively(tiny_llama)
    tensors = weights.get_tensors(model)
    assert tensors["model.layers.0.mlp.down_proj.weight"].shape == (16, 12)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    other = tiny_llama()
    weights.set_tensors(other, tensors)
    weights.save(other, tmp_path / "model.safetensors")
    weights.load(model, tmp_path / "model.safetensors")
    assert_close(call(model, IDS), call(lively(tiny_llama), IDS))
    untied = tiny_llama(tied=False)
    weights.load(untied, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(untied.lm_head.kernel[...], model.embed_tokens.embedding[...].T)
    assert_close(call(untied, IDS), call(model, IDS))
    weights.set_tensors(model, weights.get_tensors(untied))
    untied.lm_head.kernel[...] += 1
    with pytest.raises(ValueError, match=r"left over: lm_head.weight \[20, 16\]"):
        weights.set_tensors(model, weights.get_tensors(untied))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"heads": 3}, r"heads: got 3, expected a divisor of dim \(16\)"),
        ({"heads": 16}, r"heads: got 16, expected a divisor of dim \(16\) into heads of even width"),
        ({"kv_heads": 3}, r"kv_heads: got 3, expected a divisor of heads \(4\)"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_llama(**kwargs)
