"""Bad input for freezing itself: the core and the Linen door."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
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
    other_layers,
    params,
)
from tests.bad_input.table import Case, Door


def zeros(shape: tuple[int, ...] = (2, 2)) -> Any:
    return {name: {"kernel": jnp.zeros(shape)} for name in "abc"}


def new_folder() -> str:
    return f"{tempfile.mkdtemp()}/checkpoint"


@functools.cache
def saved() -> str:
    path = new_folder()
    scenes.linen_freezer().save(path, scenes.train_state())
    return path


@functools.cache
def saved_run() -> str:
    path = new_folder()
    scenes.freezer().save_run(path, params())
    return path


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
    Door("linen.find_layers", lambda: {"module": scenes.dense(), "variables": scenes.variables(), "inputs": (X,)}),
    Door(
        "linen.TrainState.create",
        lambda: {"apply_fn": forward, "params": params(), "tx": TX, "layers": layers()},
        unchecked={"apply_fn=None": "a loop need not call it", "frozen=text": "the name of a layer"},
    ),
    Door("linen.TrainState.value_and_grad", lambda: {"loss_fn": loss}, on=scenes.train_state),
    Door("linen.TrainState.apply_gradients", lambda: {"grads": zeros()}, on=scenes.train_state),
    Door(
        "linen.TrainState.freeze",
        lambda: {"frozen": frozen("a")},
        on=scenes.train_state,
        unchecked={"frozen=text": "the name of a layer"},
    ),
    Door("linen.hold", lambda: {"frozen": frozen()}, unchecked={"params": "any tree of layers' leaves"}),
    Door("linen.Freezer", lambda: {"state": scenes.train_state(), "policy": sfj.policies.never()}),
    Door("linen.Freezer.save", lambda: {"path": new_folder(), "state": scenes.train_state()}, on=scenes.linen_freezer),
    Door("linen.Freezer.contents", lambda: {"state": scenes.train_state()}, on=scenes.linen_freezer),
    Door("linen.Freezer.restore", lambda: {"path": saved(), "state": scenes.train_state()}, on=scenes.linen_freezer),
    Door("Freezer.save_run", lambda: {"path": new_folder(), "run": params()}, on=scenes.freezer),
    Door("Freezer.run_contents", lambda: {"run": params()}, on=scenes.freezer),
    Door("Freezer.restore_run", lambda: {"path": saved_run(), "run": params()}, on=scenes.freezer),
    Door("Freezer.saved_frozen", lambda: {"path": saved_run()}, on=scenes.freezer),
    Door("linen.restore_params", lambda: {"path": saved_run(), "params": params()}),
    Door("linen.Freezer.step", lambda: {"state": scenes.train_state()}, on=scenes.linen_freezer),
    Door("linen.Freezer.unfreeze", lambda: {"state": scenes.train_state(), "names": "a"}, on=scenes.linen_freezer),
]


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
        "linen-guided-without",
        "features",
        ValueError,
        ("features",),
        lambda: sfj.linen.Freezer(scenes.train_state(), guided()),
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


def plain_state() -> Any:
    plain = flax_state.TrainState.create(apply_fn=forward, params=params(), tx=TX)
    return sfj.linen.Freezer(plain, sfj.policies.never())


def held() -> None:
    with sfj.linen.hold(["a"]):
        pass


def guided() -> sfj.Policy:
    return sfj.policies.similarity_guided(scenes.outputs(), evaluate_every=1)
