"""A jitted train step and the account of its programs: one per frozen set."""

from __future__ import annotations

from typing import Any, NamedTuple

import optax

from smartfrz_jax.cost import ProgramCost, program_cost
from smartfrz_jax.freezing import Frozen


class Program(NamedTuple):
    """One program of a train step.

    Attributes:
        frozen: The frozen set it is for.
        cost: What it costs.
    """

    frozen: Frozen
    cost: ProgramCost


class TrainStep:
    """Calls a jitted train step, and keeps for every program of it what it costs to compile and to run.

    The step itself specialises on the frozen set and the optimizer, which are static in one of its arguments; this
    class only notices when they change, compiles the program at that moment, and measures. Other changes, such as a
    batch of another shape, are left to ``jax.jit``.

    Args:
        step: A function made by ``jax.jit`` or ``nnx.jit``. One of its arguments is a ``TrainState`` of
            ``smartfrz_jax.linen`` or an ``Optimizer`` of ``smartfrz_jax.nnx``.

    Attributes:
        programs: The programs so far, in the order of their first use.
    """

    def __init__(self, step: Any):
        self._step = step
        self.programs: list[Program] = []
        self._by_tx: dict[optax.GradientTransformation, Program] = {}

    @property
    def compile_seconds(self) -> float:
        """Time spent on tracing and compiling, all programs together."""
        return sum(program.cost.trace_seconds + program.cost.compile_seconds for program in self.programs)

    def program(self, *args: Any) -> Program:
        """The program for these arguments, compiled now if it is new.

        Raises:
            TypeError: If no argument has a frozen set.
        """
        owner = next((arg for arg in args if isinstance(getattr(arg, "frozen", None), Frozen)), None)
        if owner is None:
            raise TypeError(
                f"args: none of {', '.join(type(arg).__name__ for arg in args)} has a frozen set; pass the TrainState "
                "of smartfrz_jax.linen or the Optimizer of smartfrz_jax.nnx"
            )
        if owner.tx not in self._by_tx:  # transformations for equal optimizers and frozen sets are equal
            self._by_tx[owner.tx] = Program(owner.frozen, program_cost(self._step, *args))
            self.programs.append(self._by_tx[owner.tx])
        return self._by_tx[owner.tx]

    def __call__(self, *args: Any) -> Any:
        """Runs the step."""
        self.program(*args)
        return self._step(*args)
