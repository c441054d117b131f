"""Did a freeze save what was predicted? If not: why, and what to do about it.

The account of a step (:func:`smartfrz_jax.account`) says what it should cost for any frozen set; ``program_cost`` says
what the program that XLA made for it does cost. This compares the two: floating-point operations, bytes of the
optimizer's state, and, where a step runs on several devices, bytes of the gradients that these sum.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import jax

from smartfrz_jax.cost import diagnosis
from smartfrz_jax.cost.account import Account
from smartfrz_jax.cost.diagnosis import Cause, Diagnosis
from smartfrz_jax.cost.measured import ProgramCost
from smartfrz_jax.cost.step_program import StepProgram
from smartfrz_jax.freezing import transform
from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.pytrees import checks, paths

# Nine tenths of what was predicted count as all of it, and what is below 1 % of the step is not looked for; where there
# are only XLA's counts of FLOPs, which the account is within 5 % of, nor what is below that.
_ENOUGH = 0.9
_LEAST = 0.01
_EXACT_TO = 0.05


class SavingWarning(UserWarning):
    """A freeze did not save what it should, or could save more."""


class Measured(NamedTuple):
    """A compiled train step.

    Attributes:
        frozen: The frozen set it is for.
        cost: What it costs.
        jaxpr: Its jaxpr, from :func:`jaxpr_of`; without it no cause can be told, and loops (``jax.lax.scan``), whose
            body XLA counts once, cannot be allowed for.
    """

    frozen: Frozen
    cost: ProgramCost
    jaxpr: Any = None


class Finding(NamedTuple):
    """A saving that did not come.

    Attributes:
        cause: Why: ``"norm"``, ``"mask"``, ``"apart"``, ``"scan"``, ``"optimizer"``, ``"behind"`` or ``"unknown"``.
        layers: Names of the layers that it should have come from, front to back.
        message: What was predicted, what was measured, the cause and the cure.
    """

    cause: Cause
    layers: tuple[str, ...]
    message: str


def jaxpr_of(traced: Any) -> Any:
    """The jaxpr of a step that ``jax.jit`` or ``nnx.jit`` has traced: of ``step.trace(*args)``.

    Raises:
        TypeError: If it is something else.
    """
    traced_by_jax = getattr(traced, "traced", traced)  # nnx.jit wraps what jax.jit returns
    if not hasattr(traced_by_jax, "jaxpr"):
        raise TypeError(f"traced: got {checks.got(traced)}, expected what step.trace(*args) returns for a jitted step")
    return traced_by_jax.jaxpr


def check_saving(account: Account, before: Measured, after: Measured, *, notable: float = 0.1) -> Finding | None:
    """Compares what a freeze saved with what was predicted.

    Args:
        account: The account of the step; its loss, batch and optimizer are those of the step.
        before: The step with fewer layers frozen.
        after: The same step with more, for a batch of the same shape.
        notable: Share of the step from which on it is worth saying that gradients must pass through frozen layers, on
            their way to active ones.

    Returns:
        None if at least nine tenths of what was predicted came: of the FLOPs (a fall of less than 1 % of the step is
        not looked at; without jaxprs, of less than 5 %, as XLA computes some values several times), of the bytes of the
        optimizer's state, and of the gradients that several devices sum. Else what is missing, and why.

    Raises:
        TypeError: If ``account``, ``before`` or ``after`` is something else.
        ValueError: If a frozen set is of another network than the account, or ``notable`` is no share.

    Example:
        >>> import jax.numpy as jnp
        >>> import smartfrz_jax as sfj
        >>> params, x = {name: jnp.ones((64, 64)) for name in "abc"}, jnp.ones((256, 64))
        >>> def loss(params, x):
        ...     return (x @ params["a"] @ params["b"] @ params["c"]).sum()
        >>> layers = sfj.find_layers(params, loss, x)
        >>> def measured(*names):
        ...     frozen = sfj.Frozen(layers, frozenset(names))
        ...     step = jax.jit(sfj.value_and_grad(loss, frozen))
        ...     return Measured(frozen, sfj.program_cost(step, params, x), jaxpr_of(step.trace(params, x)))
        >>> account = sfj.account(params, layers, loss, x)
        >>> check_saving(account, measured(), measured("a"))
        >>> check_saving(account, measured(), measured("b", "c")).cause
        'behind'
    """
    _check_account(account, notable)
    _check_measured(before, "before")
    _check_measured(after, "after")
    layers = tuple(name for name in account.layers.names if name in after.frozen.names - before.frozen.names)
    total = account.flops(after.frozen).total
    if after.jaxpr is not None and sum(account.macs.values()) and not diagnosis.has_products(after.jaxpr.jaxpr):
        done = after.cost.flops * after.cost.devices / total
        return _finding(layers, diagnosis.UPDATE_ONLY, [f"Predicted: {total:.4g} FLOPs; measured: {done:.1%} of them"])
    flops, state, sums = (compare(account, before, after) for compare in (_flops, _state, _sums))
    missing = [found.text for found in (flops, state, sums) if found.is_missing]
    if not missing:
        return _behind(account, after.frozen, notable)
    if not (flops.is_missing or sums.is_missing):
        return _finding(layers, diagnosis.STATE_KEPT, missing)
    if after.jaxpr is None:
        return _finding(layers, diagnosis.NOT_TRACED, missing)
    share = flops.predicted - flops.measured
    cause = diagnosis.diagnose(account, before.frozen, after.frozen, after.jaxpr, share if flops.is_missing else 0.0)
    return _finding(layers, cause, missing)


class SavingCheck:
    """Checks one compiled step after the other, and warns of what keeps a saving from coming: once of each cause.

    Every program is compared with the one of them that should be the most expensive, usually the first.

    Args:
        account: The account of the step.
        notable: As in :func:`check_saving`.

    Attributes:
        findings: The findings so far, one for each cause.

    Raises:
        TypeError: If ``account`` is no :class:`~smartfrz_jax.Account`.
        ValueError: If ``notable`` is no share.
    """

    def __init__(self, account: Account, *, notable: float = 0.1):
        _check_account(account, notable)
        self.findings: list[Finding] = []
        self._account, self._notable = account, notable
        self._first: Measured | None = None

    def __call__(self, program: Measured) -> Finding | None:
        """Checks a new program, for a batch of the shape that the account is for.

        Args:
            program: The program.

        Returns:
            What was found, also if there was a warning of that cause before.

        Raises:
            TypeError: If it is something else.
            ValueError: If its frozen set is of another network than the account.
        """
        _check_measured(program, "program")
        account, first = self._account, self._first
        if first is None or account.saving(program.frozen, first.frozen) <= 0:
            self._first = program
            return None
        finding = check_saving(account, first, program, notable=self._notable)
        if finding is not None and all(finding.cause != known.cause for known in self.findings):
            self.findings.append(finding)
            warnings.warn(finding.message, SavingWarning, stacklevel=2)
        return finding


def _check_account(account: Any, notable: Any) -> None:
    checks.instance(account, Account, "account", "the account of the step, from smartfrz_jax.account")
    checks.fraction(notable, "notable")


def _check_measured(program: Any, argument: str) -> None:
    checks.instance(program, Measured, argument, "a smartfrz_jax.cost.Measured")


class _Comparison(NamedTuple):
    """What was predicted to disappear, and what did."""

    predicted: float
    measured: float
    least: float
    text: str

    @property
    def is_missing(self) -> bool:
        return self.predicted - self.measured > max((1 - _ENOUGH) * self.predicted, self.least)


_NOT_COMPARED = _Comparison(0.0, 0.0, 0.0, "")


def _flops(account: Account, before: Measured, after: Measured) -> _Comparison:
    if account.saving(after.frozen, before.frozen) <= 0:
        return _NOT_COMPARED
    programs, jaxprs = (before, after), [program.jaxpr for program in (before, after)]
    predicted = [account.flops(program.frozen).total for program in programs]
    if _any_loops(jaxprs):
        return _NOT_COMPARED if None in jaxprs else _fall(predicted, _traced(account, jaxprs), _LEAST)
    measured = [program.cost.flops * program.cost.devices for program in programs]
    if None in jaxprs:
        return _fall(predicted, measured, _EXACT_TO)
    comparison = _fall(predicted, measured, _LEAST)
    # Before anything is said: what XLA is asked to compute, whatever it computes several times.
    return _fall(predicted, _traced(account, jaxprs), _LEAST) if comparison.is_missing else comparison


def _any_loops(jaxprs: list[Any]) -> bool:
    return any(jaxpr is not None and diagnosis.has_loops(jaxpr.jaxpr) for jaxpr in jaxprs)


def _traced(account: Account, jaxprs: list[Any]) -> list[float]:
    return [StepProgram(jaxpr, account.backend).cost() for jaxpr in jaxprs]


def _fall(predicted: list[float], measured: list[float], least: float) -> _Comparison:
    (more, less), (was, now) = predicted, measured
    # Relative, as the step may be for a batch of another size; absolute, as it may do more than the account knows.
    saved = max(1 - now / was, (was - now) / more) if was else 0.0
    text = (
        f"Predicted: {more:.4g} FLOPs before and {less:.4g} after, {1 - less / more:.1%} less; "
        f"measured: {was:.4g} and {now:.4g}, {saved:.1%} less"
    )
    return _Comparison(1 - less / more, saved, least, text)


def _state(account: Account, before: Measured, after: Measured) -> _Comparison:
    """Bytes of the optimizer's state, which go from the step's arguments."""
    now, devices = _state_bytes(account, after.frozen), after.cost.devices
    fall = _state_bytes(account, before.frozen) - now
    measured = before.cost.argument_bytes - after.cost.argument_bytes
    text = f"Predicted: {fall:,} bytes less of optimizer state; measured: {measured:,} bytes less of arguments"
    # Where other layers train, what came is not what stayed. Each device may have a part only of what went.
    came = now - _state_bytes(account, after.frozen.add(before.frozen.names))
    return _Comparison(fall + came, (measured + came) * devices, 0.0, text)


def _state_bytes(account: Account, frozen: Frozen) -> int:
    if account.tx is None:
        return 0
    return _bytes(jax.eval_shape(transform.freeze(account.tx, frozen).init, account.params))


def _sums(account: Account, before: Measured, after: Measured) -> _Comparison:
    """Bytes of gradients that are summed over the devices.

    Not compared where these have parts of the parameters, nor where there are loops: sums in them count once, however
    many turns there are.
    """
    params = paths.flatten(account.params)
    jaxprs = [program.jaxpr for program in (before, after)]
    if after.cost.devices == 1 or before.cost.argument_bytes < _bytes(params) or _any_loops(jaxprs):
        return _NOT_COMPARED
    was, now = (program.cost.collectives.reduced_bytes for program in (before, after))
    active = _bytes(before.frozen.active_leaves(params))
    frozen = active - _bytes(after.frozen.active_leaves(params))
    fall = frozen * min(1.0, was / max(active, 1))  # gradients may have a smaller dtype
    text = f"Predicted: {fall:,.0f} bytes less in sums over the {after.cost.devices} devices; measured: {was - now:,}"
    return _Comparison(fall, was - now, _LEAST * active, text)


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _behind(account: Account, frozen: Frozen, notable: float) -> Finding | None:
    """Frozen layers that gradients must pass through, if that is a notable part of the step."""
    step = account.flops(frozen)
    through = {
        name: step.by_layer[name].activation_gradients
        for name in account.layers.names
        if name in frozen.names and step.by_layer[name].activation_gradients
    }
    share = sum(through.values()) / step.total
    if share < notable:
        return None
    active, by_first_use = account.reached_through(frozen)
    saved = account.saving(frozen.add(active), frozen)
    added = account.flops(Frozen(frozen.layers, frozen.names.difference(through))).total / step.total - 1
    passing = f"so gradients must pass through these frozen layers, which is {share:.1%} of the step"
    cure = (
        f"freezing {_some(active)} as well would make the step {saved:.1%} cheaper; training these again, {added:.1%} "
        "more expensive"
    )
    if active != by_first_use:
        reason = f"{_some(tuple(name for name in active if name not in by_first_use))} before them train, {passing}"
    else:
        reason = f"{_some(active)}, used before them and again behind them, go on training, {passing}"
    if by_first_use:
        stopped = 1 - account.flops(frozen, stopped=by_first_use).total / step.total
        cure += (
            f"; stopping the gradient at the first use of {_some(by_first_use)}, which for a lookup is to freeze the "
            f"layer that find_layers(..., lookups=True) makes of it, {stopped:.1%} cheaper, and the last use goes on "
            "training"
        )
    return _finding(tuple(through), Diagnosis("behind", reason, cure), [])


def _finding(layers: tuple[str, ...], found: Diagnosis, missing: list[str]) -> Finding:
    head = "Freezing {} did not save what it should" if missing else "The frozen layers {} save less than they could"
    head = head.format(_some(layers))
    lines = [head, *missing, f"Cause: {found.reason}", f"Cure: {found.cure}"]
    return Finding(found.cause, layers, ".\n".join(lines) + ".")


def _some(names: tuple[str, ...]) -> str:
    """The first few names."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + rest
