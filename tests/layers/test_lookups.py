"""Lookups in a table apart from its other uses: which they are, and the layers that they are."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core as jex

import smartfrz_jax as sfj
from smartfrz_jax.layers.lookups import with_lookups

pytestmark = pytest.mark.usefixtures("jax_defaults")

WORDS, WIDTH, DEPTH = 7, 4, 3
RNG = np.random.default_rng(0)
PARAMS = {
    "embed": RNG.standard_normal((WORDS, WIDTH)),
    "positions": RNG.standard_normal((6, WIDTH)),
    "blocks": RNG.standard_normal((DEPTH, WIDTH, WIDTH)) / 2,
}
IDS = jnp.asarray(RNG.integers(0, WORDS, size=(4, 6)))


def body(params, x):
    return jax.lax.scan(lambda x, row: (x + jnp.tanh(x @ row), None), x, params["blocks"])[0]


def loss_of(logits, ids):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], axis=-1).mean()


def plain(of_lookup, of_head, params, ids):
    return loss_of(body(params, of_lookup[ids] + params["positions"]) @ of_head.T, ids)


def cast(of_lookup, of_head, params, ids):
    x = jnp.take((2 * of_lookup).astype(jnp.bfloat16), ids, axis=0).astype(of_head.dtype)
    return loss_of(jnp.einsum("ntd,vd->ntv", body(params, x), of_head), ids)


def labels_gathered(of_lookup, of_head, params, ids):
    """The embeddings of the labels are taken for the head's product: they are no lookup."""
    x = body(params, of_lookup[ids])
    return (jax.nn.logsumexp(x @ of_head.T, axis=-1) - (x * of_head[ids]).sum(-1)).mean()


def encoder_and_decoder(of_lookup, of_head, params, ids):
    x = body(params, of_lookup[ids])
    return loss_of(body(params, x + of_lookup[ids[:, ::-1]]) @ of_head.T, ids)


def checkpointed(of_lookup, of_head, params, ids):
    return jax.checkpoint(plain)(of_lookup, of_head, params, ids)


def in_parts(of_lookup, of_head, params, ids):
    def part(total, ids):
        return total + jax.checkpoint(labels_gathered)(of_lookup, of_head, params, ids), None

    return jax.lax.scan(part, 0.0, ids[:, None])[0]


def head_in_parts(of_lookup, of_head, params, ids):
    """A scan over parts of the batch for the head alone, which takes the embeddings of the labels, too."""
    x = body(params, of_lookup[ids])

    def part(total, xs):
        x, ids = xs
        return total + jax.nn.logsumexp(x @ of_head.T, axis=-1).sum() - (x * of_head[ids]).sum(), None

    return jax.lax.scan(part, 0.0, (x, ids))[0]


def on_condition(of_lookup, of_head, params, ids):
    x = jax.lax.cond(ids[0, 0] < 100, lambda: of_lookup[ids], lambda: jnp.zeros((*ids.shape, WIDTH), of_lookup.dtype))
    return loss_of(body(params, x) @ of_head.T, ids)


def head_with_a_rule(of_lookup, of_head, params, ids):
    @jax.custom_vjp
    def head(x, table):
        return loss_of(x @ table.T, ids)

    head.defvjp(lambda x, table: jax.vjp(lambda x, table: loss_of(x @ table.T, ids), x, table), lambda vjp, g: vjp(g))
    return head(body(params, of_lookup[ids]), of_head)


def penalised(of_lookup, of_head, params, ids):
    return plain(of_lookup, of_head, params, ids) + jnp.square(of_head).sum()


def carried(of_lookup, of_head, params, ids):
    """A scan changes the table that it carries: what it takes of it is no lookup."""

    def step(carry, _):
        table, x = carry
        return (0.5 * table + x.mean(), x + table[ids]), None

    (table, x), _ = jax.lax.scan(step, (of_head, body(params, of_lookup[ids])), None, length=2)
    return loss_of(x @ table.T, ids)


def head_by_row(of_lookup, of_head, params, ids):
    x = body(params, of_lookup[ids])
    return loss_of(jnp.moveaxis(jax.lax.scan(lambda _, row: (None, x @ row), None, of_head)[1], 0, -1), ids)


FORMS = (
    plain, cast, labels_gathered, encoder_and_decoder, checkpointed, in_parts, head_in_parts, on_condition,
    head_with_a_rule, penalised, carried, head_by_row,
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_lookups_are_found_wherever_they_are_and_gradients_are_those_of_two_tables(form):
    params = jax.tree.map(functools.partial(jnp.asarray, dtype=jnp.float32), PARAMS)
    leaves, structure = jax.tree.flatten(params)

    def tied(*leaves):
        params = jax.tree.unflatten(structure, leaves)
        return form(params["embed"], params["embed"], params, IDS)

    closed = jax.make_jaxpr(jax.jit(tied))(*leaves)
    names = sorted(params)
    changed, looked_up = with_lookups(closed, closed.jaxpr.invars)
    assert [closed.jaxpr.invars.index(var) for var in looked_up] == [names.index("embed")]
    at = len(leaves), names.index("embed")

    @jax.jit
    def of_two(*leaves):
        value, grads = jax.value_and_grad(lambda *leaves: jex.jaxpr_as_fun(changed)(*leaves)[0], at)(*leaves)
        return value, grads, tied(*leaves[:-1])

    value, grads, of_one = of_two(*leaves, params["embed"])
    np.testing.assert_allclose(value, of_one, rtol=1e-6)
    with jax.enable_x64(True):
        tables = PARAMS["embed"], PARAMS["embed"]
        expected = jax.jit(jax.grad(form, (0, 1)))(*map(jnp.asarray, tables), jax.tree.map(jnp.asarray, PARAMS), IDS)
    for got, wanted in zip(grads, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-6 if form is not cast else 1e-2)
        assert np.abs(wanted).max() > 1e-2


def one_hot(p, ids):
    return jax.nn.one_hot(ids, WORDS) @ p["embed"] @ p["body"] @ p["embed"].T


def lookup_alone(p, ids):
    return p["embed"][ids] @ p["body"]


def labels_alone(p, ids):
    return ((p["body"][0] + p["body"].sum(0)) * p["embed"][ids]).sum() + (p["body"] @ p["embed"].T).sum()


def changed_by_a_scan(p, ids):
    def step(carry, _):
        table, x = carry
        return (0.5 * table + x.mean(), x + table[ids]), None

    (_, x), _ = jax.lax.scan(step, (p["embed"], jnp.zeros((*ids.shape, WIDTH))), None, length=3)
    return x @ p["body"] @ p["embed"].T


def rows_that_are_tables(p, ids):
    """As residual vector quantisation has them."""

    def step(x, book):
        return x - book[jnp.argmax(x @ book.T, axis=-1)], None

    return jax.lax.scan(step, p["body"], p["embed"][:6].reshape(2, 3, WIDTH))[0]


@pytest.mark.parametrize("forward", [one_hot, lookup_alone, labels_alone, changed_by_a_scan, rows_that_are_tables])
def test_what_is_no_lookup_of_a_tied_table_is_no_layer(forward):
    params = {"embed": jnp.ones((WORDS, WIDTH)), "body": jnp.ones((WIDTH, WIDTH))}
    apart = sfj.find_layers(params, forward, IDS, lookups=True)
    assert apart == sfj.find_layers(params, forward, IDS)
    assert not apart.lookups


class NNXNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed, self.norm = nnx.Embed(WORDS, WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.dropout, self.body = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, ids):
        return self.embed.attend(self.body(self.dropout(self.norm(self.embed(ids)))))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(WORDS, WIDTH, name="embed")
        return embed.attend(nn.Dense(WIDTH, name="body")(nn.LayerNorm(name="norm")(embed(ids))))


def of_nnx(**options):
    return sfj.nnx.find_layers(NNXNet(), IDS, **options)


def of_linen(**options):
    return sfj.linen.find_layers(LinenNet(), LinenNet().init(jax.random.key(0), IDS), IDS, **options)


@pytest.mark.parametrize("find", [of_nnx, of_linen])
def test_lookups_are_the_first_layer_with_what_works_on_them(find):
    whole, apart = find(), find(lookups=True)
    assert whole.names == ("body", "embed")
    assert apart.names == ("embed/lookup", "body", "embed")
    assert apart[0].params == ("embed/embedding[lookup]", "norm/bias", "norm/scale")
    assert apart[0].kernels == ("embed/embedding[lookup]",)
    assert apart[2].params == ("embed/embedding",)
    assert apart.arrays["embed/embedding"] == ("embed/lookup", "embed")
    if find is of_nnx:
        assert apart[0].state == ("dropout/rngs/count", "dropout/rngs/key")


def test_parts_are_rows_and_lookups_together():
    params = jax.tree.map(jnp.asarray, PARAMS)
    layers = sfj.find_layers(params, lambda p, ids: plain(p["embed"], p["embed"], p, ids), IDS, rows=True, lookups=True)
    assert layers.names == ("embed/lookup", "positions", "blocks/0", "blocks/1", "blocks/2", "embed")
    parts = layers.unstacked(params)
    assert sorted(parts) == [*(f"blocks[{i}]" for i in range(DEPTH)), "embed", "embed[lookup]", "positions"]
    assert parts["embed[lookup]"] is parts["embed"]
    assert layers.of_parts.owner.keys() == parts.keys()
    for name in layers.names:
        assert "embed" not in sfj.Frozen(layers, name).params
    both = sfj.Frozen(layers, ["embed", "embed/lookup"])
    assert both.params == {"embed", "embed[lookup]"}


def test_outputs_of_lookups_and_of_the_head_are_apart():
    params = jax.tree.map(functools.partial(jnp.asarray, dtype=jnp.float32), PARAMS)

    def forward(p, ids):
        return body(p, p["embed"][ids]) @ p["embed"].T

    del params["positions"]
    layers = sfj.find_layers(params, forward, IDS, lookups=True)
    outputs = sfj.layer_outputs(params, layers, forward, IDS)(params, IDS)
    np.testing.assert_array_equal(outputs["embed/lookup"], params["embed"][IDS])
    assert outputs["embed"].shape == (*IDS.shape, WORDS)
