"""A train step, compiled ahead of time: one program per frozen set, the next one while training goes on."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from smartfrz_jax.cost.account import Account
from smartfrz_jax.cost.check import Measured, SavingCheck, jaxpr_of
from smartfrz_jax.cost.measured import ProgramCost, measure
from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.programs import arguments, flat_step
from smartfrz_jax.programs.arguments import Arguments, Key
from smartfrz_jax.programs.background import Background
from smartfrz_jax.programs.flat_step import Call
from smartfrz_jax.programs.nnx_call import Bounds, Watch
from smartfrz_jax.programs.owners import Owners
from smartfrz_jax.programs.recompilation import Recompilations
from smartfrz_jax.pytrees import checks

_NOT_COMPILED = (
    "train_step: the program for {frozen} could not be compiled; take a smaller batch, or keep layers active. With a "
    "lead, a Freezer goes on with the program that it has"
)

# Calls that tell which batch is the usual one: the last of an epoch is often smaller.
_RECENT = 16


@dataclasses.dataclass(eq=False)
class Program:
    """One program of a train step.

    Attributes:
        frozen_sets: The frozen sets it is for: one for each ``Optimizer`` or ``TrainState`` among the arguments.
        cost: What it costs.
        ahead: Whether it was compiled while training went on.
        waited: Seconds that the loop stood still for it: for tracing, and for what was left to compile.
        reason: Why it was compiled though there was one for its frozen sets; ``None`` if there was none.
    """

    frozen_sets: tuple[Frozen, ...]
    cost: ProgramCost
    ahead: bool = False
    waited: float = 0.0
    reason: str | None = None

    @property
    def frozen(self) -> Frozen:
        """The frozen set, where there is one; else that of the first ``Optimizer`` or ``TrainState``."""
        return self.frozen_sets[0]


class TrainStep:
    """Compiles a train step, one program for every frozen set, and calls the right one.

    The step specialises on the frozen set and the optimizer, which are static in one of its arguments. This class
    notices when they change and compiles the program for them, if :meth:`prepare` has not had it compiled before.
    Programs that have not been used for longest are released.

    As under ``nnx.jit``, modules among the arguments, and inside of dicts, lists and other pytrees of them, are changed
    in place. They are not taken apart at every call. Their static attributes need not be hashable: they are told apart
    by equality.

    Args:
        train_step: The plain function, not jitted. One or several of its arguments are a ``TrainState`` of
            ``smartfrz_jax.linen`` or an ``Optimizer`` of ``smartfrz_jax.nnx``; the others are arrays, pytrees of them,
            or modules: what is static belongs into it (``functools.partial``).
        account: The account of the step, or of one of the networks that it trains, from
            :func:`smartfrz_jax.account`. With it, a program for a batch as that of
            the first that saves less than predicted is a ``SavingWarning``, once for each cause; see
            :class:`smartfrz_jax.cost.SavingCheck`.
        donate: Which arguments a call may overwrite, so that old and new values do not lie in memory side by side:
            ``True`` for every module, optimizer and ``TrainState``, or names of arguments. Do not go on with what was
            donated: with arrays taken out of a module before the call, or with an old ``TrainState``.
        max_programs: How many programs are kept. Two are needed to go from one to the next. If more take turns, and
            are compiled again and again, a ``SavingWarning`` says so.

    Attributes:
        programs: What was compiled so far, in the order of first use.
        wait_seconds: Time that the loop stood still for tracing and compiling.
        last: The program of the last call, or the last that was asked for; ``None`` before.

    Raises:
        TypeError: If ``train_step`` is jitted, or no function.
        ValueError: If ``max_programs`` is less than 1, or ``donate`` names what is no argument.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from flax import nnx
        >>> import smartfrz_jax as sfj
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
        >>> layers = sfj.nnx.find_layers(model, jnp.ones((1, 2)))
        >>> optimizer = sfj.nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param, layers=layers)
        >>> def train_step(model, optimizer, x):
        ...     loss, grads = optimizer.value_and_grad(lambda model, x: (model(x) ** 2).mean())(model, x)
        ...     optimizer.update(model, grads)
        ...     return loss
        >>> step = TrainStep(train_step, donate=True)
        >>> loss = step(model, optimizer, jnp.ones((1, 2)))
        >>> [len(program.frozen.names) for program in step.programs]
        [0]
    """

    def __init__(
        self,
        train_step: Callable[..., Any],
        *,
        account: Account | None = None,
        donate: bool | str | Sequence[str] = False,
        max_programs: int = 8,
    ):
        flat_step.check_plain(train_step)
        if account is not None:
            checks.instance(account, Account, "account", "the account of the step, from smartfrz_jax.account")
        checks.count(max_programs, "max_programs")
        self.account = account
        self.programs: list[Program] = []
        self.wait_seconds = 0.0
        self.last: Program | None = None
        self._step, self._donate = train_step, flat_step.donated_numbers(train_step, donate)
        self._check = None if account is None else SavingCheck(account)
        self._checked: Any = None
        self._max_programs = max_programs
        self._recompilations = Recompilations(max_programs)
        self._compiled: dict[Key, _Compiled] = {}
        self._coming: dict[Key, _Coming] = {}
        self._bound = Bounds()
        self._calls = 0
        self._recent: deque[_Shapes] = deque(maxlen=_RECENT)
        self._owners = Owners()
        self._background = Background()

    @property
    def compile_seconds(self) -> float:
        """Time spent on tracing and compiling, all programs together."""
        return sum(program.cost.trace_seconds + program.cost.compile_seconds for program in self.programs)

    def program(self, *args: Any) -> Program:
        """The program for these arguments, compiled now if it is new, waited for if it is being compiled.

        Args:
            *args: Arguments of the step; arrays, modules, or ``jax.ShapeDtypeStruct``.

        Raises:
            TypeError: If no argument has a frozen set.
        """
        parts = Arguments(args)
        bound = self._bound.get(parts.call)
        if bound is not None and bound.holds(parts):
            return bound.program.program
        return self._find(parts).program

    def prepare(self, owner: Any, new: Any) -> Callable[[], None]:
        """Begins to compile the program for another frozen set, in the background.

        Tracing is done here, under the caller's settings; XLA then works beside the training loop.

        Args:
            owner: What is to have another frozen set: the ``Optimizer`` or ``TrainState``, as it is now.
            new: The same with that frozen set, and with shapes in place of arrays. The other arguments are as in the
                last call with a batch of the shapes that were the most frequent of late; of other owners that were
                announced here before, and have not changed yet, those with the new frozen sets.

        Returns:
            A function without arguments that waits for the program. It raises what kept it from being compiled, such
            as ``MemoryError`` or ``jax.errors.JaxRuntimeError``: then leave the frozen set as it is.

        Raises:
            ValueError: If the step was not called before, or ``owner`` is none of its arguments.
        """
        for argument, value in (("owner", owner), ("new", new)):
            if not arguments.has_frozen(value):
                expected = "a TrainState of smartfrz_jax.linen or an Optimizer of smartfrz_jax.nnx"
                raise TypeError(f"{argument}: got {checks.got(value)}, expected {expected}")
        if type(new) is not type(owner):
            raise TypeError(f"new: got {checks.got(new)}, expected a {type(owner).__name__}, as the owner is")
        if not self._recent:
            raise ValueError(
                "owner: the step was not called yet, so the shapes of its batch are unknown; call it first"
            )
        usual = Counter(shapes.batch for shapes in reversed(self._recent)).most_common(1)[0][0]  # the latest of equals
        last = next(shapes.args for shapes in reversed(self._recent) if shapes.batch == usual)
        return self.compile_ahead(*last.replace_owners(self._owners.announce(last, owner, new)))

    def compile_ahead(self, *args: Any) -> Callable[[], None]:
        """Begins to compile the program for some arguments, as :meth:`prepare` does.

        Args:
            *args: As of :meth:`program`.

        Returns:
            As :meth:`prepare`.

        Raises:
            TypeError: If no argument has a frozen set.
        """
        parts = Arguments(args)
        key, _ = parts.key, parts.frozen  # raises, if there are none
        if key not in self._compiled and key not in self._coming:
            self._begin(parts)
            self.wait_seconds += self._coming[key].traced
        return functools.partial(self._wait, key)

    def _wait(self, key: Key) -> None:
        """Waits for a program that is being compiled; one that cannot be is tried again when it is asked for."""
        coming = self._coming.get(key)
        if coming is None:
            return
        start = time.perf_counter()
        try:
            coming.result.result()
        except Exception:
            self._coming.pop(key, None)
            raise
        finally:
            waited = time.perf_counter() - start
            self.wait_seconds += waited
            coming.waited += waited

    def __call__(self, *args: Any) -> Any:
        """Runs the step."""
        parts = Arguments(args)
        bound = self._bound.get(parts.call)
        if bound is not None:
            try:
                if bound.holds(parts):
                    self._use(bound.program, parts)
                    out = bound.program.call(parts, bound.watch)
                    self._owners.returned(out)
                    return out
            except (TypeError, ValueError):  # perhaps arrays lie elsewhere now
                pass
            self._bound.pop(parts.call, None)
        watch, compiled = Watch(parts.nodes), self._find(parts)
        try:
            out = compiled.call(parts, watch)
        except (TypeError, ValueError):
            if compiled.placement == parts.placement:
                raise
            del self._compiled[parts.key]  # for arrays of another shape, or on other devices
            self._recompilations.forget(parts.key)
            compiled = self._find(parts)
            out = compiled.call(parts, watch)
        self._owners.returned(out)
        if compiled.call.targets is not None:
            self._bound.bind(parts, watch, compiled)
        return out

    def _find(self, parts: Arguments) -> _Compiled:
        key, frozen = parts.key, parts.frozen
        compiled = self._compiled.get(key)
        if compiled is None:
            start = time.perf_counter()
            ahead = key in self._coming
            if not ahead:
                self._begin(parts)
            coming = self._coming.pop(key)
            try:
                cost, stage = coming.result.result()
            except Exception as error:
                error.add_note(_NOT_COMPILED.format(frozen=", ".join(map(repr, frozen))))
                raise
            waited = time.perf_counter() - start
            self.wait_seconds += waited
            waited += coming.traced + coming.waited if ahead else 0.0
            program = Program(frozen, cost, ahead, waited)
            self.programs.append(program)
            shapes = _Shapes(key.batch, Arguments(arguments.of(parts.args)))
            compiled = _Compiled(program, Call(stage, coming.targets), coming.placement, shapes)
            self._compiled[key] = compiled
            program.reason = self._recompilations.compiled(key, frozen)
            self._release()
            self._check_saving(Measured(frozen[0], cost, coming.jaxpr), key, frozen)
        self._use(compiled, parts)
        return compiled

    def _check_saving(self, measured: Measured, key: Key, frozen: tuple[Frozen, ...]) -> None:
        if self._check is None or self.account is None:
            return
        places = [n for n, one in enumerate(frozen) if one.layers == self.account.layers or len(frozen) == 1]
        if len(places) != 1:  # nothing tells which of the networks it is the account of
            return
        (place,) = places
        like = key.batch, frozen[:place], frozen[place + 1 :]  # what changes beside the frozen set is not its doing
        self._checked = self._checked or like
        if like == self._checked:
            self._check(measured._replace(frozen=frozen[place]))

    def _use(self, compiled: _Compiled, parts: Arguments) -> None:
        self._calls += 1
        compiled.last_use, self.last = self._calls, compiled.program
        self._recent.append(compiled.shapes)
        self._owners.called(parts)

    def _begin(self, parts: Arguments) -> None:
        start = time.perf_counter()
        traced, targets = flat_step.trace(self._step, parts, self._donate)
        lowered = traced.lower()
        seconds = time.perf_counter() - start
        result = self._background.begin(measure, lowered, seconds)
        self._coming[parts.key] = _Coming(seconds, jaxpr_of(traced), parts.placement, targets, result)

    def _release(self) -> None:
        while len(self._compiled) > self._max_programs:
            *others, _ = self._compiled  # not the one that is about to be used
            del self._compiled[min(others, key=lambda key: self._compiled[key].last_use)]
            self._bound.clear()  # one of them may be of that program


class _Shapes(NamedTuple):
    """Arguments that a program was made for, with shapes in place of arrays.

    Attributes:
        batch: As of :class:`Key`.
        args: All of them.
    """

    batch: Any
    args: Arguments


@dataclasses.dataclass
class _Compiled:
    """A program and what it can be called with."""

    program: Program
    call: Call
    placement: Any
    shapes: _Shapes
    last_use: int = 0


@dataclasses.dataclass
class _Coming:
    """A program that is being compiled."""

    traced: float
    jaxpr: Any
    placement: Any
    targets: list[int] | None
    result: Future[tuple[ProgramCost, Callable[..., Any]]]
    waited: float = 0.0
