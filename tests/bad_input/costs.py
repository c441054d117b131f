"""Bad input for the account of a step."""

from __future__ import annotations

from typing import Any

import smartfrz_jax as sfj
from tests.bad_input import scenes
from tests.bad_input.scenes import X, layers, loss, other_layers, params
from tests.bad_input.table import Case, Door

DOORS = [
    Door(
        "account",
        lambda: {"loss_fn": loss, "layers": layers(), "params": params(), "inputs": (X,)},
        unchecked={"hold": "called while it traces", "backend": "the name of a platform"},
    ),
    Door(
        "nnx.account",
        lambda: {
            "model": scenes.module(),
            "layers": scenes.nnx_layers(),
            "loss_fn": scenes.nnx_loss,
            "inputs": (X,),
        },
        unchecked={"wrt": "a filter", "backend": "the name of a platform"},
    ),
]


def account(**changed: Any) -> Any:
    given = {"loss_fn": loss, "layers": layers(), "params": params()} | changed
    return sfj.account(given["params"], given["layers"], given["loss_fn"], X, tx=given.get("tx"))


CASES = [
    Case("account-no-inputs", "inputs", ValueError, ("none",), lambda: sfj.account(params(), layers(), loss)),
    Case("account-names", "layers", TypeError, ("['a']", "find_layers"), lambda: account(layers=["a"])),
    Case("account-rate", "tx", TypeError, ("0.1", "optax"), lambda: account(tx=0.1)),
    Case("account-empty", "params", ValueError, ("without leaves",), lambda: account(params={})),
    Case(
        "account-other-set",
        "frozen",
        ValueError,
        ("3 layers", "this account"),
        lambda: scenes.account().flops(sfj.Frozen(other_layers())),
    ),
]
