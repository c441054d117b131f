"""Bad input for freezing itself: the core, the NNX door and the Linen door."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training import train_state as flax_state

import smartfrz_jax as sfj
from tests.bad_input import scenes
from tests.bad_input.scenes import (
    TX,
    X,
    forward,
    frozen,
    layers,
    loss,
    of_another_network,
    optimizer,
    other_layers,
    params,
)
from tests.bad_input.table import Case, Door


def zeros(shape: tuple[int, ...] = (2, 2)) -> Any:
    return {name: {"kernel": jnp.zeros(shape)} for name in "abc"}


def state() -> Any:
    return sfj.freeze(TX, frozen()).init(params())


DOORS = [
    Door("find_layers", lambda: {"params": params(), "forward": forward, "inputs": (X,)}),
    Door("Layers", lambda: {"entries": layers().entries}),
    Door("Layers.check", lambda: {"names": ["a"], "argument": "names"}, on=layers, unchecked={"argument": "a text"}),
    Door("Layers.holding", lambda: {"param": "a/kernel"}, on=layers),
    Door("Frozen", lambda: {"layers": layers(), "names": frozenset("a")}),
    Door("Frozen.of_mask", lambda: {"layers": layers(), "mask": np.ones(3, bool)}),
    Door("Frozen.add", lambda: {"names": ["a"]}, on=frozen),
    Door("Frozen.labels", lambda: {"params": params()}, on=frozen, unchecked={"params": "any tree of layers' leaves"}),
    Door("value_and_grad", lambda: {"loss_fn": loss, "frozen": frozen()}),
    Door("freeze", lambda: {"tx": TX, "frozen": frozen()}),
    Door(
        "apply_updates",
        lambda: {"params": params(), "updates": zeros(), "frozen": frozen()},
        unchecked={"params": "the updates do not fit"},
    ),
    Door("migrate_opt_state", lambda: {"opt_state": state(), "tx": TX, "params": params(), "frozen": frozen("a")}),
    Door("nnx.find_layers", lambda: {"model": scenes.module(), "inputs": (X,)}, unchecked={"wrt": "a filter"}),
    Door(
        "nnx.features",
        lambda: {"model": scenes.module(), "layers": scenes.nnx_layers(), "inputs": (X,)},
        unchecked={"wrt": "a filter"},
    ),
    Door(
        "nnx.probe",
        lambda: {"model": scenes.module(), "loss_fn": scenes.nnx_loss, "batch": (X,)},
        unchecked={"wrt": "a filter"},
    ),
    Door(
        "nnx.Optimizer",
        lambda: {"model": scenes.module(), "tx": TX, "layers": scenes.nnx_layers()},
        unchecked={"wrt": "a filter"},
    ),
    Door("nnx.Optimizer.value_and_grad", lambda: {"loss_fn": scenes.nnx_loss}, on=optimizer),
    Door("nnx.Optimizer.update", lambda: {"model": scenes.module(), "grads": grads()}, on=optimizer),
    Door(
        "nnx.Optimizer.freeze",
        lambda: {"model": scenes.module(), "frozen": nnx_frozen()},
        on=optimizer,
        unchecked={"frozen=text": "the name of a layer"},
    ),
    Door("nnx.Optimizer.record_grads", lambda: {"model": scenes.module()}, on=optimizer),
    Door("nnx.Freezer", lambda: {"model": scenes.module(), "optimizer": optimizer(), "policy": sfj.policies.never()}),
    Door("nnx.Freezer.step", dict, on=scenes.nnx_freezer),
    Door("nnx.scan_blocks", lambda: {"blocks": [scenes.block()], "x": X}, unchecked={"x": "any pytree"}),
    Door("linen.find_layers", lambda: {"module": scenes.dense(), "variables": scenes.variables(), "inputs": (X,)}),
    Door(
        "linen.TrainState.create",
        lambda: {"apply_fn": forward, "params": params(), "tx": TX, "layers": layers()},
        unchecked={"apply_fn=None": "a loop need not call it"},
    ),
    Door("linen.TrainState.value_and_grad", lambda: {"loss_fn": loss}, on=scenes.train_state),
    Door("linen.TrainState.apply_gradients", lambda: {"grads": zeros()}, on=scenes.train_state),
    Door(
        "linen.TrainState.freeze",
        lambda: {"frozen": frozen("a")},
        on=scenes.train_state,
        unchecked={"frozen=text": "the name of a layer"},
    ),
    Door("linen.Freezer", lambda: {"state": scenes.train_state(), "policy": sfj.policies.never()}),
    Door("linen.Freezer.step", lambda: {"state": scenes.train_state()}, on=scenes.linen_freezer),
]


def grads(model: Any = None) -> Any:
    return nnx.grad(scenes.nnx_loss)(scenes.module() if model is None else model, X)


def nnx_frozen() -> sfj.Frozen:
    return sfj.Frozen(scenes.nnx_layers(), frozenset(scenes.nnx_layers().names[:1]))


CASES = [
    Case("find-empty", "params", ValueError, ("without leaves", "expected"), lambda: sfj.find_layers({}, forward, X)),
    Case(
        "find-ints", "params", TypeError, ("int64", "floating"), lambda: sfj.find_layers({"a": np.ones(2, int)}, sum, X)
    ),
    Case("find-granularity", "granularity", ValueError, ("'stage'", "'block'"), lambda: find(granularity="stage")),
    Case("find-granularity-none", "granularity", TypeError, ("None", "'a/kernel'"), lambda: find(granularity=nothing)),
    Case("frozen-names", "layers", TypeError, ("['a']", "find_layers"), lambda: sfj.Frozen(["a"], frozenset("a"))),
    Case("frozen-none", "layers", TypeError, ("None", "find_layers"), lambda: sfj.Frozen(None, frozenset())),
    Case("frozen-unknown", "names", ValueError, ("'z'", "did you mean"), lambda: sfj.Frozen(layers(), frozenset("z"))),
    Case("frozen-indices", "names", TypeError, ("int 0", "names of layers"), lambda: sfj.Frozen(layers(), [0])),
    Case("mask-shape", "mask", ValueError, ("(2,)", "(3,)"), lambda: sfj.Frozen.of_mask(layers(), np.ones(2, bool))),
    Case("mask-floats", "mask", TypeError, ("float64", "boolean"), lambda: sfj.Frozen.of_mask(layers(), np.ones(3))),
    Case(
        "labels-another",
        "params",
        ValueError,
        ("'x/kernel'", "no layer"),
        lambda: frozen("a").labels(of_another_network()),
    ),
    Case("freeze-none", "tx", TypeError, ("None", "optax"), lambda: sfj.freeze(None, frozen())),
    Case("freeze-rate", "tx", TypeError, ("0.1", "optax"), lambda: sfj.freeze(0.1, frozen())),
    Case("freeze-function", "tx", TypeError, ("sgd", "optax"), lambda: sfj.freeze(optax.sgd, frozen())),
    Case("freeze-names", "frozen", TypeError, ("['a']", "Frozen(layers, names)"), lambda: sfj.freeze(TX, ["a"])),
    Case(
        "freeze-another",
        "params",
        ValueError,
        ("'x/kernel'",),
        lambda: sfj.freeze(TX, frozen()).init(of_another_network()),
    ),
    Case("grad-names", "frozen", TypeError, ("['a']", "Frozen"), lambda: sfj.value_and_grad(loss, ["a"])),
    Case(
        "grad-of-another",
        "params",
        ValueError,
        ("'x/kernel'",),
        lambda: sfj.value_and_grad(loss, frozen())(of_another_network(), X),
    ),
    Case("updates-broadcast", "updates", ValueError, ("[1, 2]", "(2, 2)"), lambda: apply(zeros((1, 2)))),
    Case("updates-larger", "updates", ValueError, ("[4, 2, 2]", "(2, 2)"), lambda: apply(zeros((4, 2, 2)))),
    Case("updates-another", "updates", ValueError, ("'a/kernel'",), lambda: apply(of_another_network())),
    Case("updates-none", "updates", ValueError, ("'a/kernel'",), lambda: apply(None)),
    Case("apply-other-set", "params", ValueError, ("'a/kernel'",), lambda: apply(zeros(), sfj.Frozen(other_layers()))),
    Case(
        "migrate-foreign",
        "opt_state",
        ValueError,
        ("missing",),
        lambda: sfj.migrate_opt_state((), TX, params(), frozen("a")),
    ),
    Case("migrate-adam", "opt_state", ValueError, ("tx",), lambda: migrate_opt_state(optax.adam(0.1).init(params()))),
    Case(
        "migrate-another",
        "params",
        ValueError,
        ("'x/kernel'",),
        lambda: migrate_opt_state(state(), of_another_network()),
    ),
    Case(
        "nnx-no-inputs", "inputs", ValueError, ("none", "example batch"), lambda: sfj.nnx.find_layers(scenes.module())
    ),
    Case(
        "nnx-wrt",
        "params",
        ValueError,
        ("without leaves",),
        lambda: sfj.nnx.find_layers(scenes.module(), X, wrt=nnx.Cache),
    ),
    Case(
        "nnx-tx-none",
        "tx",
        TypeError,
        ("None", "optax"),
        lambda: sfj.nnx.Optimizer(scenes.module(), None, layers=scenes.nnx_layers()),
    ),
    Case("nnx-layers-names", "layers", TypeError, ("['a']", "find_layers"), lambda: optimizer(layers=["a"])),
    Case("nnx-layers-bigger", "layers", ValueError, ("'a/kernel'",), lambda: optimizer(layers=layers())),
    Case(
        "nnx-layers-more",
        "layers",
        ValueError,
        ("'more/kernel'", "not in the model"),
        lambda: optimizer(layers=more_layers()),
    ),
    Case("nnx-returning", "returning", ValueError, ("'new'", "'kept'"), lambda: optimizer(returning="new")),
    Case(
        "nnx-update-another", "grads", ValueError, ("'layers/0/bias'",), lambda: update(grads(scenes.another_model()))
    ),
    Case("nnx-update-shape", "grads", ValueError, ("[1, 2]", "(2, 2)"), lambda: update(broadcast_grads())),
    Case(
        "nnx-update-model",
        "grads",
        ValueError,
        ("'bias'",),
        lambda: optimizer().update(scenes.another_model(), grads()),
    ),
    Case(
        "nnx-freeze-unknown",
        "frozen",
        ValueError,
        ("'z'", "did you mean"),
        lambda: optimizer().freeze(scenes.module(), ["z"]),
    ),
    Case(
        "nnx-freeze-another",
        "frozen",
        ValueError,
        ("3 layers", "2 layers"),
        lambda: optimizer().freeze(scenes.module(), frozen("a")),
    ),
    Case("nnx-freezer-plain", "optimizer", TypeError, ("nnx.Optimizer",), lambda: plain_optimizer()),
    Case(
        "nnx-freezer-swapped",
        "optimizer",
        TypeError,
        ("Sequential", "Optimizer"),
        lambda: sfj.nnx.Freezer(optimizer(), scenes.module(), sfj.policies.never()),
    ),
    Case(
        "nnx-freezer-policy",
        "policy",
        TypeError,
        ("function", "Policy"),
        lambda: scenes.nnx_freezer(sfj.policies.never),
    ),
    Case(
        "nnx-freezer-loss", "loss", ValueError, ("(4,)", "a scalar"), lambda: scenes.nnx_freezer().step(loss=np.ones(4))
    ),
    Case("nnx-guided-without", "features", ValueError, ("features",), lambda: scenes.nnx_freezer(guided())),
    Case(
        "linen-guided-without",
        "features",
        ValueError,
        ("features",),
        lambda: sfj.linen.Freezer(scenes.train_state(), guided()),
    ),
    Case(
        "blocks-unequal",
        "blocks",
        ValueError,
        ("(4, 3)", "(4, 2)"),
        lambda: sfj.nnx.scan_blocks([scenes.block(), nnx.Linear(2, 3, rngs=nnx.Rngs(0))], X),
    ),
    Case(
        "linen-params",
        "variables",
        ValueError,
        ("'kernel'", "'params'"),
        lambda: sfj.linen.find_layers(scenes.dense(), scenes.variables()["params"], X),
    ),
    Case(
        "linen-no-inputs",
        "inputs",
        ValueError,
        ("none",),
        lambda: sfj.linen.find_layers(scenes.dense(), scenes.variables()),
    ),
    Case("linen-tx-none", "tx", TypeError, ("None", "optax"), lambda: scenes.train_state(tx=None)),
    Case("linen-layers", "layers", TypeError, ("['a', 'b']",), lambda: scenes.train_state(layers=["a", "b"])),
    Case(
        "linen-layers-bigger", "params", ValueError, ("'a/kernel'",), lambda: scenes.train_state(layers=other_layers())
    ),
    Case(
        "linen-grads-another",
        "grads",
        ValueError,
        ("'a/kernel'",),
        lambda: scenes.train_state().apply_gradients(grads=of_another_network()),
    ),
    Case(
        "linen-grads-shape",
        "grads",
        ValueError,
        ("[1, 2]", "(2, 2)"),
        lambda: scenes.train_state().apply_gradients(grads=zeros((1, 2))),
    ),
    Case("linen-hold-names", "frozen", TypeError, ("['a']", "Frozen"), lambda: held()),
    Case("linen-freezer-plain", "state", TypeError, ("TrainState",), lambda: plain_state()),
    Case(
        "linen-freezer-grads",
        "state",
        ValueError,
        ("keep_grads=True",),
        lambda: sfj.linen.Freezer(scenes.train_state(), sfj.autofreeze(1)),
    ),
    Case(
        "linen-freeze-another",
        "frozen",
        ValueError,
        ("3 layers",),
        lambda: scenes.train_state().freeze(sfj.Frozen(other_layers())),
    ),
]


def nothing(name: str) -> None:
    return None


def find(**options: Any) -> Any:
    return sfj.find_layers(params(), forward, X, **options)


def apply(updates: Any, other: sfj.Frozen | None = None) -> Any:
    return sfj.apply_updates(params(), updates, other or frozen("a"))


def migrate_opt_state(opt_state: Any, tree: Any = None) -> Any:
    return sfj.migrate_opt_state(opt_state, TX, params() if tree is None else tree, frozen("a"))


def more_layers() -> sfj.Layers:
    more = sfj.Layer("more", ("more/kernel",), ("more/kernel",))
    return sfj.Layers((*scenes.nnx_layers().entries, more))


def update(gradients: Any) -> Any:
    return optimizer().update(scenes.module(), gradients)


def broadcast_grads() -> Any:
    found = grads()
    found["layers"][0]["kernel"] = nnx.Param(jnp.zeros((1, 2)))
    return found


def plain_optimizer() -> Any:
    return sfj.nnx.Freezer(scenes.module(), nnx.Optimizer(scenes.module(), TX, wrt=nnx.Param), sfj.policies.never())


def plain_state() -> Any:
    plain = flax_state.TrainState.create(apply_fn=forward, params=params(), tx=TX)
    return sfj.linen.Freezer(plain, sfj.policies.never())


def held() -> None:
    with sfj.linen.hold(["a"]):
        pass


def guided() -> sfj.Policy:
    return sfj.policies.similarity_guided(scenes.outputs(), evaluate_every=1)
