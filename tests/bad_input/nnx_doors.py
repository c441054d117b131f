"""Bad input for the NNX door."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import smartfrz_jax as sfj
from tests.bad_input import scenes
from tests.bad_input.scenes import TX, X, frozen, layers, optimizer
from tests.bad_input.table import Case, Door


def grads(model: Any = None) -> Any:
    return nnx.grad(scenes.nnx_loss)(scenes.module() if model is None else model, X)


def nnx_frozen() -> sfj.Frozen:
    return sfj.Frozen(scenes.nnx_layers(), frozenset(scenes.nnx_layers().names[:1]))


def new_folder() -> str:
    return f"{tempfile.mkdtemp()}/checkpoint"


@functools.cache
def saved() -> str:
    path = new_folder()
    scenes.nnx_freezer().save(path)
    return path


DOORS = [
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
        unchecked={"wrt": "a filter", "frozen=text": "the name of a layer"},
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
    Door("nnx.Freezer.save", lambda: {"path": new_folder()}, on=scenes.nnx_freezer),
    Door("nnx.Freezer.contents", dict, on=scenes.nnx_freezer),
    Door("nnx.Freezer.restore", lambda: {"path": saved()}, on=scenes.nnx_freezer),
    Door("nnx.restore_params", lambda: {"path": saved(), "model": scenes.module()}),
    Door("nnx.Freezer.step", dict, on=scenes.nnx_freezer),
    Door("nnx.Freezer.unfreeze", lambda: {"names": "*"}, on=scenes.nnx_freezer),
    Door("nnx.scan_blocks", lambda: {"blocks": [scenes.block()], "x": X}, unchecked={"x": "any pytree"}),
]

CASES = [
    Case(
        "nnx-probe-of-another-network",
        "params",
        ValueError,
        ("'layers/0/bias'", "of this network"),
        lambda: sfj.nnx.probe(scenes.module(), scenes.nnx_loss, X)({"kernel": X}),
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
    *(
        Case(
            f"nnx-frozen-uncalled-{make.__name__}",
            "frozen",
            TypeError,
            ("a function that makes a policy", f"{make.__name__}(...)"),
            lambda make=make: sfj.nnx.Optimizer(scenes.module(), TX, layers=scenes.nnx_layers(), frozen=make),
        )
        for make in (sfj.policies.lisa, sfj.auto)
    ),
    Case("nnx-guided-without", "features", ValueError, ("features",), lambda: scenes.nnx_freezer(guided())),
    Case(
        "blocks-unequal",
        "blocks",
        ValueError,
        ("(4, 3)", "(4, 2)"),
        lambda: sfj.nnx.scan_blocks([scenes.block(), nnx.Linear(2, 3, rngs=nnx.Rngs(0))], X),
    ),
]


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


def guided() -> sfj.Policy:
    return sfj.policies.similarity_guided(scenes.outputs(), evaluate_every=1)
