"""Bad input for the account of a step."""

from __future__ import annotations

import functools
from typing import Any

import jax

import smartfrz_jax as sfj
from tests.bad_input import scenes
from tests.bad_input.scenes import X, frozen, layers, loss, other_layers, params
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
    Door("cost.SavingCheck", lambda: {"account": scenes.account()}),
    Door(
        "cost.SavingCheck.__call__", lambda: {"program": measured()}, on=lambda: sfj.cost.SavingCheck(scenes.account())
    ),
    Door("cost.check_saving", lambda: {"account": scenes.account(), "before": measured(), "after": measured("a")}),
    Door("cost.jaxpr_of", lambda: {"traced": step().trace(params(), X)}),
]


def step(*names: str) -> Any:
    return jax.jit(sfj.value_and_grad(loss, frozen(*names)))


@functools.cache
def measured(*names: str) -> sfj.cost.Measured:
    return sfj.cost.Measured(frozen(*names), sfj.program_cost(step(*names), params(), X))


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
        ("3 layers", "this network"),
        lambda: scenes.account().flops(sfj.Frozen(other_layers())),
    ),
    Case("check-percent", "notable", ValueError, ("10", "up to 1"), lambda: check(notable=10)),
    Case("check-cost", "before", TypeError, ("ProgramCost", "Measured"), lambda: check(before=measured().cost)),
    Case("check-another-set", "frozen", ValueError, ("3 layers",), lambda: check(after=of_other_layers())),
    Case("check-called-with-cost", "program", TypeError, ("ProgramCost",), lambda: called(measured().cost)),
    Case("check-called-with-another", "frozen", ValueError, ("3 layers",), lambda: called(of_other_layers())),
    Case("jaxpr-lowered", "traced", TypeError, ("Lowered", "step.trace"), lambda: lowered()),
]


def check(**changed: Any) -> Any:
    given = {"account": scenes.account(), "before": measured(), "after": measured("a")} | changed
    return sfj.cost.check_saving(**given)


def of_other_layers() -> sfj.cost.Measured:
    return measured()._replace(frozen=sfj.Frozen(other_layers()))


def called(*programs: Any) -> None:
    checking = sfj.cost.SavingCheck(scenes.account())
    for program in (measured(), *programs):
        checking(program)


def lowered() -> Any:
    return sfj.cost.jaxpr_of(step().lower(params(), X))
