"""Evaluation mode for frozen layers where it is not plain which module is whose."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.extend import core as jex

import smartfrz_jax as sfj
from smartfrz_jax.pytrees import paths

pytestmark = pytest.mark.usefixtures("jax_defaults")

X = jax.random.normal(jax.random.key(0), (8, 4))


class Shared(nnx.Module):
    """One dropout behind two layers, each time with another module behind it."""

    def __init__(self, rngs):
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.other = nnx.Dropout(0.5, rngs=rngs)
        self.first, self.second = nnx.Linear(4, 32, rngs=rngs), nnx.Linear(32, 32, rngs=rngs)
        self.norm, self.head = nnx.LayerNorm(32, rngs=rngs), nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, x):
        x = self.drop(self.first(x))
        return self.head(self.norm(self.other(self.drop(nnx.relu(self.second(x))))))


def draws(step, *args):
    """Random masks in a step, which is traced anew, as it does not show what else it depends on."""
    jaxpr = jax.make_jaxpr(lambda *args: step(*args))(*args).jaxpr
    return sum(eqn.primitive.name == "random_bits" for eqn in flat(jaxpr))


def flat(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from flat(inner)


@pytest.mark.slow
def test_what_follows_a_shared_dropout_belongs_to_the_layer_before_it():
    layers = sfj.nnx.find_layers(Shared(nnx.Rngs(0)), X)
    stream = {"drop/rngs/count", "drop/rngs/key"}
    assert layers.names == ("first", "second", "head")
    assert set(layers[0].state) == stream
    assert set(layers[1].state) == stream | {"other/rngs/count", "other/rngs/key"}
    assert {name for name in layers[1].params if name.startswith("norm")} == {"norm/scale", "norm/bias"}
    assert not layers[2].state


@pytest.mark.slow
def test_a_shared_dropout_is_off_when_all_layers_before_it_are_frozen():
    model = Shared(nnx.Rngs(0))
    optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), layers=sfj.nnx.find_layers(model, X))
    graphdef, state = nnx.split(model)

    def step(state):
        return optimizer.value_and_grad(lambda model: model(X).sum())(nnx.merge(graphdef, state, copy=True))[0]

    found = {}
    for frozen in ((), ("first",), ("second",), ("first", "second")):
        optimizer.freeze(model, sfj.Frozen(optimizer.frozen.layers, frozenset(frozen)))
        found[frozen] = draws(step, state)
    assert found == {(): 3, ("first",): 3, ("second",): 2, ("first", "second"): 0}


def test_a_dropout_without_a_stream_of_its_own_is_left_alone():
    class ByCall(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.drop = nnx.Linear(4, 32, rngs=rngs), nnx.Dropout(0.5)

        def __call__(self, x, rngs):
            return self.drop(self.linear(x), rngs=rngs)

    model = ByCall(nnx.Rngs(0))
    layers = sfj.nnx.find_layers(model, X, forward=lambda model, x: model(x, nnx.Rngs(1)))
    optimizer = sfj.nnx.Optimizer(model, optax.sgd(0.1), layers=layers)
    optimizer.freeze(model, layers.names)

    graphdef, state = nnx.split(model)

    def step(state, key):
        model = nnx.merge(graphdef, state, copy=True)
        return optimizer.value_and_grad(lambda model: model(X, nnx.Rngs(key)).sum())(model)[0]

    assert draws(step, state, jax.random.key(0)) == 1


class Norm(nn.Module):
    """A layer, its BatchNorm, and a dropout."""

    momentum: float = 0.5

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(nn.Dense(4)(x))
        return nn.Dropout(0.5, deterministic=not train)(x)


NET = Norm()
INIT = NET.init(jax.random.key(0), X, train=False)
STATISTICS = INIT["batch_stats"]
KEYS = {"dropout": jax.random.key(1)}


def apply(params, net=NET, x=X):
    variables = {"params": params, "batch_stats": STATISTICS}
    return net.apply(variables, x, mutable=["batch_stats"], rngs=KEYS)


def held(loss_fn, params, frozen, layers=None):
    """For each network that ``loss_fn`` applies, whether its statistics stay; so does, then, what the dropout gets."""
    layers = layers or sfj.find_layers(params, lambda params, x: sum(out for out, _ in loss_fn(params)), X)
    state = sfj.linen.TrainState.create(apply_fn=apply, params=params, tx=optax.sgd(0.1), layers=layers)
    state = state.freeze([name for name in layers.names if name.startswith(frozen)])
    found = []

    def loss(params):
        results = loss_fn(params)
        stays = [
            jax.tree.map(lambda new, old: new is old, updates["batch_stats"], STATISTICS) for _, updates in results
        ]
        found[:] = [all(jax.tree.leaves(each)) for each in stays]
        return sum(out.sum() for out, _ in results)

    assert draws(state.value_and_grad(loss), state.params) == found.count(False)
    return found


def test_a_part_of_the_parameters_may_be_applied():
    params = {"backbone": INIT["params"], "head": jnp.ones((4, 4))}

    def loss_fn(params):
        out, updates = apply(params["backbone"])
        return [(out @ params["head"], updates)]

    assert held(loss_fn, params, "head") == [False]
    assert held(loss_fn, params, "backbone") == [True]


def twins(params, net=NET):
    return [apply(params["actor"], net), apply(params["critic"], net)]


TWINS = {"actor": INIT["params"], "critic": INIT["params"]}


def test_networks_whose_parameters_have_the_same_names_are_told_apart():
    assert held(twins, TWINS, "actor") == [True, False]
    assert held(twins, TWINS, ("actor", "critic")) == [True, True]


def test_an_account_tells_networks_apart():
    layers = sfj.find_layers(TWINS, lambda params, x: sum(out for out, _ in twins(params)), X)
    account = sfj.account(
        TWINS, layers, lambda params, x: sum(out.sum() for out, _ in twins(params)), X, hold=sfj.linen.hold
    )
    frozen = [sfj.Frozen(layers, frozenset(names)) for names in ((), layers.names[:1], layers.names)]
    none, one, both = (account.flops(each).parts.forward for each in frozen)
    assert none > one > both  # the statistics of the frozen one are not computed
    assert one == (none + both) / 2


@pytest.mark.slow
def test_networks_are_told_apart_inside_a_checkpoint_too():
    class Checkpointed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(Norm)(name="inside")(x)

    def loss(params):
        variables = [{"params": {"inside": part}, "batch_stats": {"inside": STATISTICS}} for part in params.values()]
        return sum(Checkpointed().apply(each, X, mutable=["batch_stats"], rngs=KEYS)[0].sum() for each in variables)

    layers = sfj.find_layers(TWINS, lambda params, x: sum(out for out, _ in twins(params)), X)
    state = sfj.linen.TrainState.create(apply_fn=apply, params=TWINS, tx=optax.sgd(0.1), layers=layers)
    actor, critic = layers.names
    found = {}
    for frozen in ((), (actor,), (critic,), (actor, critic)):
        now = state.freeze(frozen)
        found[frozen] = draws(now.value_and_grad(loss), now.params)
    assert found == {(): 4, (actor,): 2, (critic,): 2, (actor, critic): 0}, "forward and backward"


def test_networks_that_cannot_be_told_apart_are_refused_where_it_matters():
    def cast(params):
        return twins(jax.tree.map(lambda leaf: leaf * 1.0, params))

    with pytest.raises(ValueError, match=r"BatchNorm 'BatchNorm_0' may be of the layers 'actor/Dense_0' or 'critic"):
        held(cast, TWINS, "actor")
    assert held(cast, TWINS, ("actor", "critic")) == [True, True]

    params = {name: {"kernel": jnp.ones((4, 4))} for name in TWINS}
    dense = nn.Dense(4, use_bias=False)
    layers = sfj.find_layers(params, lambda params, x: dense.apply({"params": params["actor"]}, x), X)
    with sfj.linen.hold(sfj.Frozen(layers, frozenset({"actor"}))):
        dense.apply({"params": params["critic"]}, X)


def test_a_jitted_network_does_what_the_frozen_set_says_whatever_was_traced_before():
    jitted = jax.jit(apply)
    state = sfj.linen.TrainState.create(
        apply_fn=jitted, params=INIT["params"], tx=optax.sgd(0.1), layers=sfj.linen.find_layers(NET, INIT, X)
    )
    for _ in range(2):
        for frozen in (False, True):
            now = state.freeze(state.frozen.layers.names if frozen else ())
            value_and_grad = now.value_and_grad(lambda params: jitted(params)[0].sum())
            assert draws(value_and_grad, now.params) == (not frozen)


def test_a_network_that_is_not_found_in_the_layers_is_refused():
    def renamed(params):
        return [apply(jax.tree.map(lambda leaf: leaf * 1.0, {name: params[new] for name, new in names.items()}))]

    names = {"Dense_0": "dense", "BatchNorm_0": "norm"}
    params = {new: INIT["params"][name] for name, new in names.items()}
    with pytest.raises(ValueError, match=r"training mode \(Dropout 'Dropout_0'\).*params\['backbone'\]"):
        held(renamed, params, "dense")

    def by_name_only(params):
        return [apply({name: params[new] for name, new in names.items()})]

    assert held(by_name_only, params, "dense") == [True]


def test_a_linen_network_beside_a_bare_pytree_is_no_error_in_evaluation_mode():
    params = {"w": jnp.ones((4, 4))}
    layers = sfj.find_layers(params, lambda params, x: x @ params["w"], X)
    with sfj.linen.hold(sfj.Frozen(layers, frozenset(layers.names))):
        out = NET.apply(INIT, X, train=False)
    np.testing.assert_array_equal(out, NET.apply(INIT, X, train=False))


def test_parameters_have_the_names_that_they_have_in_the_layers():
    """The reading of a network does not go by parameters that it does not have."""
    layers = sfj.linen.find_layers(NET, INIT, X)
    params = {"Dense_0": jnp.ones((4, 4)), "net": INIT["params"]}
    both = sfj.find_layers(params, lambda params, x: apply(params["net"], x=x)[0] @ params["Dense_0"], X)
    assert set(both.names) == {"Dense_0", "net/Dense_0"}
    assert paths.flatten(INIT["params"]).keys() == layers.owner.keys()

    def loss_fn(params):
        out, updates = apply(params["net"])
        return [(out @ params["Dense_0"], updates)]

    assert held(loss_fn, params, "Dense_0", both) == [False]
    assert held(loss_fn, params, "net", both) == [True]
