"""A jitted train step, compiled ahead of time: one program per frozen set, the next one while training goes on."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import nnx

from smartfrz_jax import abstract
from smartfrz_jax.accounting import Account
from smartfrz_jax.checking import Measured, SavingCheck, jaxpr_of
from smartfrz_jax.cost import ProgramCost, check_jitted, measure
from smartfrz_jax.freezing import Frozen

PyTree = Any


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

    Raises:
        TypeError: If ``step`` is not jitted.
        ValueError: If ``max_programs`` is less than 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
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
        self._step = step
        self._check = None if account is None else SavingCheck(account)
        self._checked_batch: Any = None
        self._max_programs = max_programs
        self._compiled: dict[Any, tuple[Program, Callable[..., Any]]] = {}  # least recently used first
        self._coming: dict[Any, _Coming] = {}
        self._last: tuple[Any, ...] | None = None
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
        return self._find(args)[0]

    def prepare(self, owner: Any) -> None:
        """Begins to compile the program for another frozen set, in the background.

        Tracing is done here, under the caller's settings; XLA then works beside the training loop.

        Args:
            owner: What holds the frozen set, with shapes in place of arrays: a ``TrainState``, or an ``Optimizer``. The
                other arguments are as in the last call.

        Raises:
            ValueError: If the step was not called before.
        """
        if self._last is None:
            raise ValueError(
                "owner: the step was not called yet, so the shapes of its batch are unknown; call it first"
            )
        args = tuple(owner if _has_frozen(arg) else arg for arg in self._last)
        key = _key(args)
        if key in self._compiled or key in self._coming:
            return
        self._begin(key, args)
        self.wait_seconds += self._coming[key].traced

    def __call__(self, *args: Any) -> Any:
        """Runs the step."""
        return self._find(args)[1](*args)

    def _find(self, args: tuple[Any, ...]) -> tuple[Program, Callable[..., Any]]:
        key = _key(args)
        if key not in self._compiled:
            frozen = _owner(args).frozen
            self._last = tuple(map(abstract.of, args))
            start = time.perf_counter()
            ahead = key in self._coming
            if not ahead:
                self._begin(key, args)
            coming = self._coming.pop(key)
            cost, compiled = coming.result.result()
            waited = time.perf_counter() - start
            self.wait_seconds += waited
            waited += coming.traced if ahead else 0.0
            program = Program(frozen, cost, ahead, waited)
            self.programs.append(program)
            self._compiled[key] = program, compiled
            self._release()
            if self._check is not None:
                self._checked_batch = self._checked_batch or key[1:]
                if key[1:] == self._checked_batch:
                    self._check(Measured(frozen, cost, coming.jaxpr))
        elif next(reversed(self._compiled)) != key:
            self._compiled[key] = self._compiled.pop(key)
            self._last = tuple(map(abstract.of, args))
        return self._compiled[key]

    def _begin(self, key: Any, args: tuple[Any, ...]) -> None:
        start = time.perf_counter()
        traced = self._step.trace(*args)
        lowered = traced.lower()
        seconds = time.perf_counter() - start
        self._coming[key] = _Coming(seconds, jaxpr_of(traced), self._pool.submit(measure, lowered, seconds))

    def _release(self) -> None:
        while len(self._compiled) > self._max_programs:
            del self._compiled[next(iter(self._compiled))]
        # What is called are the programs above; what JAX keeps beside them are traces and programs of the past.
        getattr(self._step, "jitted_fn", self._step).clear_cache()


@dataclasses.dataclass
class _Coming:
    """A program that is being compiled."""

    traced: float
    jaxpr: Any
    result: Future[tuple[ProgramCost, Callable[..., Any]]]


def _has_frozen(arg: Any) -> bool:
    return isinstance(getattr(arg, "frozen", None), Frozen)


def _owner(args: tuple[Any, ...]) -> Any:
    owner = next(filter(_has_frozen, args), None)
    if owner is None:
        raise TypeError(
            f"args: none of {', '.join(type(arg).__name__ for arg in args)} has a frozen set; pass the TrainState "
            "of smartfrz_jax.linen or the Optimizer of smartfrz_jax.nnx"
        )
    return owner


def _key(args: tuple[Any, ...]) -> Any:
    """What a program is for: the optimizer with its frozen set, and the shapes of the batch."""
    owner = _owner(args)
    batch = [arg for arg in args if arg is not owner and not isinstance(arg, nnx.Module)]
    leaves, structure = jax.tree.flatten(batch)
    # Transformations for equal optimizers and frozen sets are equal.
    return owner.tx, structure, tuple((np.shape(leaf), str(getattr(leaf, "dtype", type(leaf)))) for leaf in leaves)
