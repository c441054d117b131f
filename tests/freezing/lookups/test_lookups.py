"""Lookups that are frozen apart from the head whose table they read: gradients, FLOPs, state, and what follows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax.pytrees import paths
from tests.freezing.lookups.networks import DEPTH, IDS, ROWS, TABLE, bare, case, cross_entropy, linen, of_nnx
from tests.models.transformers import tiny_llama

pytestmark = pytest.mark.usefixtures("jax_defaults")


@functools.cache
def reference():
    """Gradients in float64 of the head's table and of the last rows, with the lookup and the first rows constants."""
    with jax.enable_x64(True):
        table, rows = jnp.asarray(TABLE), jnp.asarray(ROWS)

        def loss(table, rows):
            x = jax.lax.stop_gradient(table)[IDS]
            for i in range(DEPTH):
                x = x + jnp.tanh(x @ (jax.lax.stop_gradient(rows[i]) if i < DEPTH // 2 else rows[i]))
            return cross_entropy(x @ table.T)

        return [np.asarray(grad) for grad in jax.jit(jax.grad(loss, (0, 1)))(table, rows)]


MAKERS = pytest.mark.parametrize("make", [bare, linen, of_nnx])


@MAKERS
def test_lookups_are_the_first_layer_and_the_head_the_last(make):
    tied, untied = case(make, True), case(make, False)
    assert tied.layers.names == ("embed/lookup", *untied.layers.names[1:-1], "embed")
    assert untied.layers.names[0] == "embed"


@MAKERS
@pytest.mark.slow
def test_a_frozen_front_costs_what_it_costs_untied_and_the_head_trains_on(make):
    tied, untied = case(make, True), case(make, False)
    (frozen, program, (_, _, grads)), (_, other, _) = tied.step(*tied.front), untied.step(*untied.front)
    assert program.cost_analysis()["flops"] == pytest.approx(other.cost_analysis()["flops"], rel=0.02)
    assert tied.account.flops(frozen).total == pytest.approx(
        untied.account.flops(sfj.Frozen(untied.layers, untied.front)).total, rel=0.02
    )
    # Without lookups, gradients pass through all blocks.
    (whole,) = (tied.account.flops(sfj.Frozen(tied.layers, tied.front - {"embed/lookup"})).total,)
    assert tied.account.flops(frozen).total < 0.9 * whole
    got = {name: np.asarray(leaf) for name, leaf in paths.flatten(grads).items()}
    table, rows = reference()
    (name,) = (name for name in got if name.startswith("embed"))
    np.testing.assert_allclose(got[name], table, rtol=1e-4, atol=1e-7)
    stacked = [got[name] for name in sorted(got) if name.startswith("blocks")]
    np.testing.assert_allclose(np.reshape(stacked, rows.shape), rows, rtol=1e-4, atol=1e-7)
    assert not rows[: DEPTH // 2].any()
    assert np.abs(rows[DEPTH // 2 :]).max() > 1e-3


@MAKERS
def test_with_nothing_frozen_and_with_all_of_the_table_the_program_is_as_without_lookups(make):
    tied = case(make, True)
    whole = sfj.Layers(tuple(layer for layer in tied.layers if layer.name != "embed/lookup"))
    for names in ((), ("embed",)):
        with_lookups = sfj.Frozen(tied.layers, {*names, *["embed/lookup"] * bool(names)})
        programs = [
            jax.make_jaxpr(sfj.value_and_grad(tied.loss, frozen))(tied.params, IDS)
            for frozen in (with_lookups, sfj.Frozen(whole, names))
        ]
        assert str(programs[0]) == str(programs[1])


def test_where_lookups_alone_train_the_gradient_is_theirs():
    tied = case(bare, True)
    frozen = sfj.Frozen(tied.layers, set(tied.layers.names[1:]))
    assert frozen.active == ("embed/lookup",)
    _, grads = jax.jit(sfj.value_and_grad(tied.loss, frozen))(tied.params, IDS)
    untied = case(bare, False)
    _, expected = jax.jit(sfj.value_and_grad(untied.loss, sfj.Frozen(untied.layers, untied.layers.names[1:])))(
        untied.params, IDS
    )
    np.testing.assert_allclose(grads["embed"], expected["embed"], rtol=1e-5, atol=1e-8)
    assert not np.any(grads["blocks"])
    assert frozen.active_leaves(tied.params).keys() == {"embed[lookup]"}
    costs = tied.account.flops(frozen)
    assert costs.by_layer["embed"].update == tied.account.flops().by_layer["embed"].update > 0


def test_the_state_of_the_table_goes_when_lookups_and_head_are_frozen():
    tied, tx = case(bare, True), optax.adam(0.1)
    params, layers = {"embed": tied.params["embed"]}, tied.layers
    layers = sfj.Layers((layers[0], layers[-1]))
    old = sfj.freeze(tx, sfj.Frozen(layers)).init(params)
    old = jax.tree.map(lambda leaf: leaf + 1, old)
    moved = old
    sizes = []
    for names in (["embed/lookup"], ["embed"], [], ["embed", "embed/lookup"]):
        moved = sfj.migrate_opt_state(moved, tx, params, sfj.Frozen(layers, names))
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(moved)))
        if len(names) < 2:
            jax.tree.map(np.testing.assert_array_equal, moved, old)
    assert sizes == [2 * TABLE.size + 1] * 3 + [1]


def test_a_freezer_freezes_lookups_first_and_the_summary_counts_the_table_once():
    tied = case(bare, True)
    policy = sfj.static_prefix([(0.0, 0.6)], total_steps=10)
    freezer = sfj.Freezer(policy, tied.layers, tied.params)
    freezer.start()
    assert tied.front <= freezer.frozen.names
    summary = freezer.summary(tx=optax.adam(0.1), account=tied.account)
    by_name = {layer.name: layer for layer in summary.layers}
    assert summary.params == sum(leaf.size for leaf in jax.tree.leaves(tied.params))
    assert (by_name["embed/lookup"].params, by_name["embed/lookup"].optimizer_bytes) == (0, 0)
    assert (by_name["embed"].params, by_name["embed"].optimizer_bytes) == (TABLE.size, 8 * TABLE.size)


def test_activations_behind_lookups_in_a_table_that_trains_are_not_kept():
    tied, front = case(bare, True), case(bare, True).front
    message = r"frozen: got 'embed/lookup', lookups in a table that trains on in layer 'embed'"
    with pytest.raises(ValueError, match=message):
        sfj.PrefixCache(tied.params, sfj.Frozen(tied.layers, front), tied.loss, IDS)


@pytest.mark.slow
def test_a_cache_of_layers_with_lookups_follows_and_is_priced():
    tied = case(bare, True)
    first = sfj.Frozen(tied.layers, ("embed", *tied.layers.names[:2]))
    cache = sfj.PrefixCache(tied.params, first, tied.loss, IDS)
    assert cache.frozen == first
    assert cache.follow(tied.params, first) is cache
    new = cache.follow(tied.params, first.add(tied.layers.names[2:3]))
    loss = new.loss(tied.params, new.activations(tied.params, IDS))
    np.testing.assert_allclose(loss, tied.loss(tied.params, IDS), rtol=1e-6)
    assert sfj.caching.break_even(tied.account, new, examples=80, steps=99).steps == 11


def test_a_loss_without_the_lookups_of_its_layers_is_refused():
    tied = case(bare, True)
    frozen = sfj.Frozen(tied.layers, tied.front)
    with pytest.raises(ValueError, match=r"loss_fn: has no lookups in 'embed' that can be told from its other uses"):
        sfj.value_and_grad(lambda params, ids: (params["embed"] @ params["blocks"][0]).sum(), frozen)(tied.params, IDS)


@pytest.mark.slow
def test_scanned_blocks_of_a_tied_llama_cost_what_they_cost_untied():
    def flops(tied):
        model = tiny_llama(tied=tied, scan=True, depth=4)
        layers = sfj.nnx.find_layers(model, IDS % 20, granularity="block", lookups=True)
        optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param, layers=layers)
        optimizer.freeze(model, layers.names[:3])
        graphdef, params = nnx.split(model)

        @jax.jit
        def run(params, ids):
            model = nnx.merge(graphdef, params, copy=True)
            _, grads = optimizer.value_and_grad(lambda model: jnp.square(model(ids)).mean())(model)
            return optimizer.frozen.active_leaves(nnx.as_pure(grads))

        return sfj.program_cost(run, params, IDS % 20).flops

    assert flops(True) == pytest.approx(flops(False), rel=0.02)
