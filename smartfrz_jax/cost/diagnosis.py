"""Why a step costs more than its frozen set asks for, read off its jaxpr.

A gradient is computed if something reads it. So the question is what, and it is put to the jaxpr by cutting: how much
of the step would disappear if no number (a norm, a check) were made of whole arrays, or if the results that have the
shapes of frozen parameters were not returned?
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from smartfrz_jax.cost.account import Account
from smartfrz_jax.cost.step_program import StepProgram
from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.jaxprs.parts import ClosedJaxpr, Eqn, Jaxpr
from smartfrz_jax.pytrees import paths

Cause = Literal["norm", "mask", "apart", "scan", "optimizer", "behind", "unknown"]

_PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})
_LOOPS = frozenset({"scan", "while"})
# A cut explains what is missing if it brings at least this part of it, and more than rounding.
_PART, _NOTHING = 0.5, 1e-4


class Diagnosis(NamedTuple):
    """What keeps the saving from coming.

    Attributes:
        cause: Its name.
        reason: What the step does.
        cure: What to do about it.
    """

    cause: Cause
    reason: str
    cure: str


_FRONT_DOORS = (
    "take the gradients from the optimizer's (or the TrainState's) value_and_grad, or from smartfrz_jax.value_and_grad"
)
_LOGGED = Diagnosis(
    "norm",
    "the step computes a number, such as a norm that is logged, from the gradients of frozen layers too",
    f"{_FRONT_DOORS}: there the gradients of frozen layers are zeros that cost nothing, and norms are over active "
    "layers",
)
_CLIPPED = Diagnosis(
    "norm",
    "something that acts on all layers, such as a clip by the global norm or a check for finite values, reads the "
    "gradients of frozen layers too",
    f"{_FRONT_DOORS}, and put the clip inside the transformation that smartfrz_jax.freeze (or the optimizer) is given",
)
_MASKED = Diagnosis(
    "mask",
    "what is frozen is known only when the step runs: a mask is multiplied with, or selects from, gradients that are "
    "therefore computed for all layers",
    "make the frozen set static, as smartfrz_jax.Frozen is: an attribute of the optimizer or of the TrainState, or a "
    "static argument of jax.jit",
)
_RETURNED = Diagnosis(
    "apart",
    "the step returns the gradients of frozen layers, for an update that is compiled apart",
    "put gradients and update into one jitted step, so that what the update does not read is not computed",
)
UPDATE_ONLY = Diagnosis(
    "apart",
    "this program has no products of matrices and no convolutions: it is the update alone, and the gradients are "
    "compiled apart",
    "put gradients and update into one jitted step, and pass that one here",
)
STATE_KEPT = Diagnosis(
    "optimizer",
    "the optimizer's state of frozen layers is still an argument of the step, and goes on moving their weights",
    "use smartfrz_jax.freeze(tx, frozen) for the whole tree, and smartfrz_jax.migrate_opt_state for its state; the "
    "optimizers of smartfrz_jax.nnx and smartfrz_jax.linen do so",
)
_UPDATED = Diagnosis(
    "optimizer",
    "the optimizer reads the gradients of frozen layers, for their moments or their weights",
    f"{_FRONT_DOORS}, and use smartfrz_jax.freeze(tx, frozen), which shows the optimizer the active layers alone",
)
_SCANNED = Diagnosis(
    "scan",
    "frozen and active blocks are stacked and run in one scan, whose backward pass computes the gradients of all rows",
    "find the layers with rows=True if the weights are stacked before the step; else scan over the frozen blocks and "
    "over the active ones apart (in Flax NNX, smartfrz_jax.nnx.scan_blocks does so), or run the blocks one by one",
)
_SCAN_INPUT = Diagnosis(
    "scan",
    "blocks that train run in one scan, whose backward pass computes the gradient of what goes into it too, though no "
    "layer before it trains",
    "run the first of the blocks on its own, before the scan (in Flax NNX, smartfrz_jax.nnx.scan_blocks with "
    "live=False does so)",
)
_ELSEWHERE = Diagnosis(
    "unknown",
    "the cause could not be told from the step's jaxpr",
    "compare the step with the jaxpr of account.trace(frozen), which does what is asked for and no more; an account of "
    "another loss or batch gives wrong predictions too",
)
NOT_TRACED = Diagnosis(
    "unknown",
    "the cause cannot be told without the step's jaxpr",
    "pass the jaxpr, step.trace(*args).jaxpr",
)


def diagnose(account: Account, before: Frozen, after: Frozen, closed: ClosedJaxpr, missing: float) -> Diagnosis:
    """Why a step does not save what it should.

    Args:
        account: The account of the step.
        before: A frozen set.
        after: Another one, with more layers.
        closed: Jaxpr of the step for it.
        missing: What should have been saved and was not, as a share of the step.

    Returns:
        The first cause that explains at least half of it.
    """
    step = StepProgram(closed, account.backend)
    enough = max(_PART * missing, _NOTHING)
    least, most = (StepProgram(account.trace(frozen), account.backend).cost() for frozen in (after, before))
    if account.scans and account.saving(after, before) - (1 - least / most) > enough:
        together = any(scan & after.names and scan - after.names for scan in account.scans)
        return _SCANNED if together else _SCAN_INPUT
    total = step.cost()
    least = min(least, total * (1 - missing))  # the account may be for a larger batch
    arrays = [var for var in step.results if var.aval.shape]
    if (total - max(step.cost(arrays), least)) / total > enough:
        return _LOGGED
    without_numbers = step.cost(arrays, numbers=False)
    if (total - max(without_numbers, least)) / total > enough:
        return _CLIPPED
    leaves = paths.flatten(account.params)
    shapes = {leaf.shape for name, leaf in leaves.items() if name in after.params}
    others = [var for var in arrays if var.aval.shape not in shapes]
    if (without_numbers - max(step.cost(others, numbers=False), least)) / total <= enough:
        return _ELSEWHERE
    # Of kernels, if possible: statistics of batches have the shapes of vectors of weights.
    rank = max(map(len, shapes))
    results = [var for var in arrays if var.aval.shape in shapes and len(var.aval.shape) == rank and step.way(var).ends]
    if all(step.is_gradient(var) for var in results):
        trains = collections.Counter(leaf.shape for name, leaf in leaves.items() if name not in after.params)
        returned = collections.Counter(var.aval.shape for var in results)
        # If no more come back than train, one loop computes those of frozen layers with these, for something else.
        return _RETURNED if returned - trains else _ELSEWHERE
    return _MASKED if step.is_masked(arrays) else _UPDATED


def has_products(jaxpr: Jaxpr) -> bool:
    """Whether there are products of matrices or convolutions in a jaxpr, or in one inside it."""
    return any(
        eqn.primitive.name in _PRODUCTS or any(map(has_products, _jaxprs_in(eqn))) for eqn in getattr(jaxpr, "eqns", ())
    )


def has_loops(jaxpr: Jaxpr) -> bool:
    """Whether products or convolutions run in a loop, so that XLA, which counts its body once, counts too few."""
    return any(
        any(has_products(inner) if eqn.primitive.name in _LOOPS else has_loops(inner) for inner in _jaxprs_in(eqn))
        for eqn in jaxpr.eqns
    )


def _jaxprs_in(eqn: Eqn) -> Iterator[Any]:
    for value in eqn.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield inner
