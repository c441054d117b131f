"""Bad input for what keeps activations of frozen layers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import smartfrz_jax as sfj
from tests.bad_input import scenes
from tests.bad_input.scenes import X, frozen, loss, of_another_network, other_layers, params
from tests.bad_input.table import NAN, Case, Door

FRONTIER = [jax.ShapeDtypeStruct((3,), jnp.float32)]
INDICES = np.arange(4)


def store(**options: Any) -> sfj.caching.ActivationCache:
    return sfj.caching.ActivationCache(**{"frontier": FRONTIER, "examples": 4} | options)


def full() -> sfj.caching.ActivationCache:
    found = store()
    found.put(INDICES, rows())
    return found


def rows(examples: int = 4, width: int = 3) -> list[Any]:
    return [jnp.ones((examples, width))]


@functools.cache
def cache() -> sfj.PrefixCache:
    """Nothing is changed in it."""
    return sfj.PrefixCache(params(), frozen("a"), loss, X)


def kept() -> sfj.PrefixCache:
    found = sfj.PrefixCache(params(), frozen("a"), loss, X)
    found.keep(4)
    return found


def nnx_frozen() -> sfj.Frozen:
    return sfj.Frozen(scenes.nnx_layers(), frozenset(scenes.nnx_layers().names[:1]))


@functools.cache
def nnx_cache() -> sfj.nnx.PrefixCache:
    return sfj.nnx.PrefixCache(scenes.module(), nnx_frozen(), scenes.nnx_loss, X)


def make_step(loss_fn: Any) -> Any:
    def train_step(model: Any, optimizer: Any, *inputs: Any) -> Any:
        value, grads = optimizer.value_and_grad(loss_fn)(model, *inputs)
        optimizer.update(model, grads)
        return value

    return train_step


@functools.cache
def step() -> sfj.nnx.CachedStep:
    return sfj.nnx.CachedStep(make_step, scenes.nnx_loss, examples=4)


@functools.cache
def used() -> sfj.nnx.CachedStep:
    called(INDICES)
    return step()


def loop() -> dict[str, Any]:
    return {"model": scenes.module(), "optimizer": scenes.optimizer(), "indices": INDICES, "inputs": (X,)}


DOORS = [
    Door("caching.ActivationCache", lambda: {"frontier": FRONTIER, "examples": 4}),
    Door("caching.ActivationCache.put", lambda: {"indices": INDICES, "activations": rows()}, on=store),
    Door("caching.ActivationCache.take", lambda: {"indices": INDICES}, on=full),
    Door("caching.ActivationCache.has", lambda: {"indices": INDICES}, on=store),
    Door("caching.ActivationCache.stored", lambda: {"indices": INDICES}, on=store),
    Door("caching.Storage", lambda: {"place": "host"}),
    Door("PrefixCache", lambda: {"params": params(), "frozen": frozen("a"), "loss_fn": loss, "inputs": (X,)}),
    Door("PrefixCache.keep", lambda: {"examples": 4}, on=lambda: prefix()),
    Door("PrefixCache.activations", lambda: {"params": params(), "inputs": (X,)}, on=cache),
    Door("PrefixCache.loss", lambda: {"params": params(), "activations": rows(4, 2), "inputs": (X,)}, on=cache),
    Door("PrefixCache.fetch", lambda: {"params": params(), "indices": INDICES, "inputs": (X,)}, on=kept),
    Door("PrefixCache.fetch_flops", lambda: {"indices": INDICES}, on=kept),
    Door("PrefixCache.follow", lambda: {"params": params(), "frozen": frozen("a", "b")}, on=cache),
    Door("PrefixCache.take_over", lambda: {"old": kept()}, on=cache),
    Door("PrefixCache.build_on", lambda: {"old": kept()}, on=lambda: prefix()),
    Door("PrefixCache.grown_from", lambda: {"old": kept()}, on=cache),
    Door(
        "nnx.PrefixCache",
        lambda: {"model": scenes.module(), "frozen": nnx_frozen(), "loss_fn": scenes.nnx_loss, "inputs": (X,)},
    ),
    Door("nnx.PrefixCache.activations", lambda: {"params": scenes.module(), "inputs": (X,)}, on=nnx_cache),
    Door(
        "nnx.PrefixCache.loss",
        lambda: {"params": scenes.module(), "activations": rows(4, 2), "inputs": (X,)},
        on=nnx_cache,
    ),
    Door(
        "nnx.CachedStep",
        lambda: {"make_step": make_step, "loss_fn": scenes.nnx_loss, "examples": 4},
    ),
    Door("nnx.CachedStep.program", loop, on=step, unchecked={"indices": "not looked at"}),
    Door("nnx.CachedStep.prepare", lambda: {"owner": scenes.optimizer(), "new": scenes.optimizer()}, on=used),
    Door("nnx.CachedStep.restored", lambda: {"history": [(0, nnx_frozen())]}, on=lambda: cached()),
    Door("nnx.CachedStep.__call__", loop, on=step),
    Door(
        "caching.break_even",
        lambda: {"account": scenes.account(), "cache": cache(), "examples": 4, "steps": 9},
    ),
]

CASES = [
    Case("store-no-examples", "examples", ValueError, ("0", "at least 1"), lambda: store(examples=0)),
    Case("store-quotient", "examples", ValueError, ("2.5", "round it"), lambda: store(examples=2.5)),
    Case("store-frontier-shape", "frontier", TypeError, ("(3,)", "ShapeDtypeStruct"), lambda: store(frontier=(3,))),
    Case("store-int8", "dtype", ValueError, ("int8", "bfloat16"), lambda: store(dtype="int8")),
    Case("store-no-dtype", "dtype", TypeError, ("'text'", "float16"), lambda: store(dtype="text")),
    Case("store-budget", "examples", ValueError, ("48 bytes", "budget", "47"), lambda: store(budget=47)),
    Case("store-a-file", "place", NotADirectoryError, ("/dev/null", "'host'"), lambda: store(place="/dev/null")),
    Case("store-bucket", "place", ValueError, ("gs://b", "local"), lambda: store(place="gs://b/activations")),
    Case("put-width", "activations", ValueError, ("(4, 2)", "(4, 3)"), lambda: store().put(INDICES, rows(4, 2))),
    Case("put-fewer", "activations", ValueError, ("(2, 3)", "(4, 3)"), lambda: store().put(INDICES, rows(2))),
    Case("put-none-of-one", "activations", TypeError, ("[None]",), lambda: store().put(INDICES, [None])),
    Case("take-beyond", "indices", ValueError, ("4", "0 to 3"), lambda: full().take(np.array([4]))),
    Case("take-negative", "indices", ValueError, ("-1", "0 to 3"), lambda: full().take(np.array([-1]))),
    Case("take-mask", "indices", ValueError, ("bool[4]", "integers"), lambda: full().take(np.ones(4, bool))),
    Case("take-floats", "indices", ValueError, ("float64[4]",), lambda: full().take(np.ones(4))),
    Case("take-one", "indices", ValueError, ("[]", "a vector"), lambda: full().take(np.int32(1))),
    Case("take-view", "view", ValueError, ("1", "(views)"), lambda: full().take(INDICES, 1)),
    Case("take-missing", "indices", ValueError, ("nothing is stored",), lambda: store().take(INDICES)),
    Case("prefix-no-inputs", "inputs", ValueError, ("none",), lambda: prefix(inputs=())),
    Case("prefix-scalar", "inputs", ValueError, ("first axis",), lambda: prefix(inputs=(np.float32(1),))),
    Case("prefix-names", "frozen", TypeError, ("['a']", "Frozen"), lambda: prefix(frozen=["a"])),
    Case("prefix-params", "params", ValueError, ("'a/kernel'",), lambda: prefix(params=of_another_network())),
    Case("prefix-layers", "params", ValueError, ("'x/kernel'",), lambda: prefix(frozen=sfj.Frozen(other_layers()))),
    Case("prefix-text", "params", TypeError, ("'a/kernel'", "array"), lambda: prefix(params={"a": {"kernel": "w"}})),
    Case("prefix-views", "views", ValueError, ("0", "at least 1"), lambda: prefix(views=0)),
    Case("prefix-augmented", "augmented", ValueError, ("views",), lambda: prefix(augmented=True)),
    Case("prefix-not-kept", "store", ValueError, ("keep",), lambda: prefix().fetch(params(), INDICES, X)),
    Case("activations-of-another", "params", ValueError, ("'a/kernel'",), lambda: computed(of_another_network())),
    Case("loss-of-another-set", "activations", ValueError, ("(3,)", "(2,)"), lambda: cache().loss(params(), rows(), X)),
    Case("fetch-beyond", "indices", ValueError, ("5", "0 to 3"), lambda: kept().fetch(params(), INDICES + 2, X)),
    Case("fetch-fewer", "indices", ValueError, ("4", "2 examples"), lambda: kept().fetch(params(), INDICES, X[:2])),
    Case("fetch-more", "indices", ValueError, ("2", "4 examples"), lambda: kept().fetch(params(), INDICES[:2], X)),
    Case("fetch-inputs", "inputs", ValueError, ("2", "1", "as many"), lambda: kept().fetch(params(), INDICES, X, X)),
    Case("follow-another", "frozen", ValueError, ("3 layers",), lambda: followed(sfj.Frozen(other_layers()))),
    Case("follow-names", "frozen", TypeError, ("['a', 'b']",), lambda: followed(["a", "b"])),
    Case("nnx-prefix-params", "model", TypeError, ("dict", "nnx.Module"), lambda: of_model(params())),
    Case("nnx-prefix-another", "params", ValueError, ("without",), lambda: of_model(scenes.another_model())),
    Case("nnx-activations-another", "params", ValueError, ("without",), lambda: model_computed(scenes.another_model())),
    Case("cached-jitted", "train_step", TypeError, ("jax.jit", "plain"), lambda: cached(lambda loss: jax.jit(loss))),
    Case("cached-not-made", "train_step", TypeError, ("NoneType",), lambda: cached(lambda loss: None)),
    Case(
        "cached-disk",
        "place",
        ValueError,
        ("'kept/activations'", "PrefixCache"),
        lambda: cached(storage=sfj.caching.Storage("kept/activations")),
    ),
    Case("cached-beyond", "indices", ValueError, ("5", "0 to 3"), lambda: called(INDICES + 2)),
    Case("cached-fewer", "indices", ValueError, ("2", "4 examples"), lambda: called(INDICES[:2])),
    Case(
        "cached-plain-optimizer",
        "optimizer",
        TypeError,
        ("nnx.Optimizer",),
        lambda: step()(scenes.module(), nnx.Optimizer(scenes.module(), scenes.TX, wrt=nnx.Param), INDICES, X),
    ),
    Case("cached-early", "owner", ValueError, ("call it first",), lambda: cached().prepare(*2 * [scenes.optimizer()])),
    Case("pays-another-network", "frozen", ValueError, ("3 layers",), lambda: pays(account=another_account())),
    Case("pays-steps", "steps", ValueError, ("-1", "at least 0"), lambda: pays(steps=-1)),
    Case("pays-speed", "flops_per_byte", ValueError, ("nan", "finite"), lambda: pays(flops_per_byte=NAN)),
    Case("pays-store", "cache", TypeError, ("ActivationCache", "PrefixCache"), lambda: pays(cache=store())),
]


def prefix(**changed: Any) -> sfj.PrefixCache:
    given = {"params": params(), "frozen": frozen("a"), "loss_fn": loss, "inputs": (X,)} | changed
    options = {name: value for name, value in given.items() if name in ("views", "augmented")}
    return sfj.PrefixCache(given["params"], given["frozen"], given["loss_fn"], *given["inputs"], **options)


def computed(tree: Any) -> Any:
    return cache().activations(tree, X)


def followed(new: Any) -> Any:
    return cache().follow(params(), new)


def of_model(model: Any) -> Any:
    return sfj.nnx.PrefixCache(model, nnx_frozen(), scenes.nnx_loss, X)


def model_computed(model: Any) -> Any:
    return nnx_cache().activations(model, X)


def cached(make: Any = make_step, **options: Any) -> sfj.nnx.CachedStep:
    return sfj.nnx.CachedStep(make, scenes.nnx_loss, examples=4, **options)


def called(indices: Any) -> Any:
    return step()(scenes.module(), scenes.optimizer(), indices, X)


def another_account() -> sfj.Account:
    tree = {name: np.ones((2, 2), np.float32) for name in "xy"}
    other = sfj.find_layers(tree, lambda params, x: x @ params["x"] @ params["y"], X)
    return sfj.account(tree, other, lambda params, x: (x @ params["x"] @ params["y"]).sum(), X)


def pays(**changed: Any) -> Any:
    given = {"account": scenes.account(), "cache": cache(), "examples": 4, "steps": 9} | changed
    return sfj.caching.break_even(given.pop("account"), given.pop("cache"), **given)
