"""A jitted train step, compiled ahead of time: one program per frozen set, the next one while training goes on."""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from smartfrz_jax import abstract
from smartfrz_jax.abstract import Arguments, Key, has_frozen
from smartfrz_jax.accounting import Account
from smartfrz_jax.bound import Bound, bind
from smartfrz_jax.checking import Measured, SavingCheck, jaxpr_of
from smartfrz_jax.cost import ProgramCost, check_jitted, measure
from smartfrz_jax.freezing import Frozen

PyTree = Any

# Calls that tell which batch is the usual one: the last of an epoch is often smaller.
_RECENT = 16


@dataclasses.dataclass(eq=False)
class Program:
    """One program of a train step.

    Attributes:
        frozen: The frozen set it is for.
        cost: What it costs.
        ahead: Whether it was compiled while training went on.
        waited: Seconds that the loop stood still for it: for tracing, and for what was left to compile.
    """

    frozen: Frozen
    cost: ProgramCost
    ahead: bool = False
    waited: float = 0.0


class TrainStep:
    """Calls a jitted train step, one compiled program for every frozen set.

    The step specialises on the frozen set and the optimizer, which are static in one of its arguments. This class
    notices when they change and compiles the program for them, if :meth:`prepare` has not had it compiled before.
    Programs that have not been used for longest are released, and with them what JAX keeps of the step.

    Args:
        step: A function made by ``jax.jit`` or ``nnx.jit``. One of its arguments is a ``TrainState`` of
            ``smartfrz_jax.linen`` or an ``Optimizer`` of ``smartfrz_jax.nnx``; the others are arrays, pytrees of them,
            or modules: what is static belongs into it (``functools.partial``). It must not be called by others too:
            they would compile the programs again.
        account: The account of the step, from :func:`smartfrz_jax.account`. With it, a program for a batch as that of
            the first that saves less than predicted is a ``SavingWarning``, once for each cause; see
            :class:`smartfrz_jax.SavingCheck`.
        max_programs: How many programs are kept. Two are needed to go from one to the next.

    Attributes:
        programs: What was compiled so far, in the order of first use.
        wait_seconds: Time that the loop stood still for tracing and compiling.
        last: The program of the last call, or the last that was asked for; ``None`` before.

    Raises:
        TypeError: If ``step`` is not jitted.
        ValueError: If ``max_programs`` is less than 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from flax import nnx
        >>> import smartfrz_jax as sfj
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
        >>> layers = sfj.nnx.find_layers(model, jnp.ones((1, 2)))
        >>> optimizer = sfj.nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param, layers=layers)
        >>> @nnx.jit
        ... def train_step(model, optimizer, x):
        ...     loss, grads = optimizer.value_and_grad(lambda model, x: (model(x) ** 2).mean())(model, x)
        ...     optimizer.update(model, grads)
        ...     return loss
        >>> step = TrainStep(train_step)
        >>> loss = step(model, optimizer, jnp.ones((1, 2)))
        >>> [len(program.frozen.names) for program in step.programs]
        [0]
    """

    def __init__(self, step: Any, *, account: Account | None = None, max_programs: int = 8):
        check_jitted(step)
        if max_programs < 1:
            raise ValueError(f"max_programs: got {max_programs}, expected at least 1, the program in use")
        self.account = account
        self.programs: list[Program] = []
        self.wait_seconds = 0.0
        self.last: Program | None = None
        self._step = step
        self._check = None if account is None else SavingCheck(account)
        self._checked_batch: Any = None
        self._max_programs = max_programs
        self._compiled: dict[Key, _Compiled] = {}
        self._coming: dict[Key, _Coming] = {}
        self._bound = _Bounds()
        self._calls = 0
        self._recent: deque[_Shapes] = deque(maxlen=_RECENT)
        self._nested = hasattr(step, "jitted_fn")  # of nnx.jit, which writes into modules wherever they are
        self._pool = ThreadPoolExecutor(1, "compile")

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
        parts = self._take_apart(args)
        bound = self._bound.get(parts.call)
        if bound is not None and bound.holds(parts):
            return bound.program.program
        return self._find(parts).program

    def prepare(self, owner: Any) -> None:
        """Begins to compile the program for another frozen set, in the background.

        Tracing is done here, under the caller's settings; XLA then works beside the training loop.

        Args:
            owner: What holds the frozen set, with shapes in place of arrays: a ``TrainState``, or an ``Optimizer``. The
                other arguments are as in the last call with a batch of the shapes that were the most frequent of late.

        Raises:
            ValueError: If the step was not called before.
        """
        if not self._recent:
            raise ValueError(
                "owner: the step was not called yet, so the shapes of its batch are unknown; call it first"
            )
        usual = Counter(shapes.batch for shapes in reversed(self._recent)).most_common(1)[0][0]  # the latest of equals
        last = next(shapes.args for shapes in reversed(self._recent) if shapes.batch == usual)
        self.compile_ahead(*(owner if has_frozen(arg) else arg for arg in last))

    def compile_ahead(self, *args: Any) -> None:
        """Begins to compile the program for some arguments, as :meth:`prepare` does.

        Args:
            *args: As of :meth:`program`.

        Raises:
            TypeError: If no argument has a frozen set.
        """
        parts = self._take_apart(args)
        if parts.key not in self._compiled and parts.key not in self._coming:
            self._begin(parts)
            self.wait_seconds += self._coming[parts.key].traced

    def __call__(self, *args: Any) -> Any:
        """Runs the step."""
        parts = self._take_apart(args)
        call = parts.call
        bound = self._bound.get(call)
        if bound is not None:
            try:
                if bound.holds(parts):
                    self._use(bound.program)
                    return bound(parts)
            except (TypeError, ValueError):  # perhaps arrays lie elsewhere now
                pass
            self._bound.pop(call, None)
        compiled = self._find(parts)
        try:
            out, bound = compiled.run(parts, self._bound.dropper(call))
        except (TypeError, ValueError):
            if compiled.placement == parts.placement:
                raise
            del self._compiled[parts.key]  # for arrays of another shape, or on other devices
            out, bound = self._find(parts).run(parts, self._bound.dropper(call))
        if bound is not None:
            self._bound[call] = bound
        return out

    def _find(self, parts: Arguments) -> _Compiled:
        key, frozen = parts.key, parts.owner.frozen
        compiled = self._compiled.get(key)
        if compiled is None:
            start = time.perf_counter()
            ahead = key in self._coming
            if not ahead:
                self._begin(parts)
            coming = self._coming.pop(key)
            cost, stage = coming.result.result()
            waited = time.perf_counter() - start
            self.wait_seconds += waited
            waited += coming.traced if ahead else 0.0
            program = Program(frozen, cost, ahead, waited)
            self.programs.append(program)
            compiled = _Compiled(program, stage, coming.placement, _Shapes(key.batch, abstract.of(parts.args)))
            self._compiled[key] = compiled
            self._release()
            if self._check is not None:
                self._checked_batch = self._checked_batch or key.batch
                if key.batch == self._checked_batch:
                    self._check(Measured(frozen, cost, coming.jaxpr))
        self._use(compiled)
        return compiled

    def _use(self, compiled: _Compiled) -> None:
        self._calls += 1
        compiled.last_use, self.last = self._calls, compiled.program
        self._recent.append(compiled.shapes)

    def _begin(self, parts: Arguments) -> None:
        start = time.perf_counter()
        traced = self._step.trace(*parts.args)
        lowered = traced.lower()
        seconds = time.perf_counter() - start
        result = self._pool.submit(measure, lowered, seconds)
        self._coming[parts.key] = _Coming(seconds, jaxpr_of(traced), parts.placement, result)

    def _release(self) -> None:
        while len(self._compiled) > self._max_programs:
            *others, _ = self._compiled  # not the one that is about to be used
            del self._compiled[min(others, key=lambda key: self._compiled[key].last_use)]
            self._bound.clear()  # one of them may be of that program
        # What is called are the programs above; what JAX keeps beside them are traces and programs of the past.
        getattr(self._step, "jitted_fn", self._step).clear_cache()

    def _take_apart(self, args: tuple[Any, ...]) -> Arguments:
        return Arguments(args, nested=self._nested)


class _Bounds(dict[Any, Bound]):
    """Bound programs by the batch's shapes and the modules; gone when the modules are."""

    def dropper(self, key: Any) -> Callable[[object], object]:
        """A function that drops an entry, and keeps nothing alive."""
        me = weakref.ref(self)

        def drop(_: object) -> None:
            bounds = me()
            if bounds is not None:
                bounds.pop(key, None)

        return drop


class _Shapes(NamedTuple):
    """Arguments that a program was made for, with shapes in place of arrays.

    Attributes:
        batch: As of :class:`Key`.
        args: All of them.
    """

    batch: Any
    args: tuple[Any, ...]


@dataclasses.dataclass
class _Compiled:
    """A program and what it can be called with."""

    program: Program
    stage: Any
    placement: Any
    shapes: _Shapes
    last_use: int = 0

    def run(self, parts: Arguments, on_end: Callable[[object], object]) -> tuple[Any, Bound | None]:
        """Runs the step; binds the program to the arguments' variables if it has any."""
        if not hasattr(self.stage, "compiled"):  # of jax.jit, which needs no binding
            return self.stage(*parts.args), None
        return bind(self.stage, parts, program=self, on_end=on_end)


@dataclasses.dataclass
class _Coming:
    """A program that is being compiled."""

    traced: float
    jaxpr: Any
    placement: Any
    result: Future[tuple[ProgramCost, Callable[..., Any]]]
