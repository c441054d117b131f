"""A plain step traced as a function of flat arrays, and called with the variables of the modules that it is given.

It is traced on copies of the modules and compiled for the values of their variables, one after the other. So a call
neither takes modules apart nor puts them together, which takes NNX 20 to 30 microseconds of Python per variable: it
reads the variables, and writes those that changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from smartfrz_jax.programs import arguments
from smartfrz_jax.programs.arguments import Arguments, has_frozen, is_node
from smartfrz_jax.programs.nnx_call import Watch
from smartfrz_jax.pytrees import checks

# Whatever the step changes, or nothing; or the numbers of arguments.
Donate = bool | frozenset[int]


def check_plain(train_step: Any) -> None:
    """Raises ``TypeError`` unless a step is a function, and not jitted."""
    if hasattr(train_step, "lower"):
        plain = getattr(train_step, "__wrapped__", train_step)
        by = "nnx.jit" if hasattr(train_step, "jitted_fn") else "jax.jit"
        raise TypeError(
            f"train_step: got {getattr(plain, '__name__', 'a function')} jitted by {by}, expected the plain function, "
            f"which TrainStep compiles itself; leave out {by}, and give what it donates as donate=True"
        )
    if not callable(train_step):
        raise TypeError(f"train_step: got {type(train_step).__name__}, expected a function")


def donated_numbers(train_step: Callable[..., Any], donate: Any) -> Donate:
    """The arguments to donate, by number.

    Args:
        train_step: The step.
        donate: A boolean, or names of arguments.

    Raises:
        TypeError: If it is neither.
        ValueError: If one is not an argument.
    """
    if isinstance(donate, bool):
        return donate
    names = checks.names(donate, "donate", of="arguments")
    parameters = list(inspect.signature(train_step).parameters)
    for name in names:
        if name not in parameters:
            raise ValueError(
                f"donate: got {name!r}, expected True or names of arguments of the step: {', '.join(parameters)}"
            )
    return frozenset(map(parameters.index, names))


class _NotFlatError(Exception):
    """A step does with modules what cannot be told from the new values of their variables."""


def trace(step: Callable[..., Any], args: Arguments, donate: Donate = False) -> tuple[Any, list[int] | None]:
    """Traces a plain step.

    Args:
        step: The step.
        args: Its arguments, with arrays or shapes.
        donate: What the program may overwrite.

    Returns:
        What was traced, to be lowered and compiled; and the places of the variables, in the order of :class:`Watch`,
        whose new values it returns. ``None`` in their place if the program is one of ``nnx.jit``, to be called with
        the step's arguments themselves: the step returns modules, changes what they are made of, or they hold lone
        arrays.
    """
    shapes, variables = Arguments(arguments.of(args.args)), Watch(args.nodes).variables
    donated = _donated(args, variables, donate)
    targets: list[int] = []

    def flat(*given: Any) -> Any:
        nodes = nnx.clone(shapes.nodes)
        copies = Watch(nodes).variables
        for variable, value in zip(copies, given, strict=False):
            variable.set_raw_value(value)
        before = Watch(nodes)
        out = step(*shapes.put(nodes, given[len(copies) :]))
        if not before.matches(Watch(nodes)) or any(map(is_node, jax.tree.leaves(out, is_leaf=is_node))):
            raise _NotFlatError
        after = [variable.get_raw_value() for variable in copies]
        # What is donated must come back, even if it is the same.
        targets[:] = [n for n, value in enumerate(after) if value is not given[n] or n in donated]
        return [after[place] for place in targets], out

    flat.__name__ = flat.__qualname__ = getattr(step, "__name__", "train_step")
    try:
        if nnx.graphdef(args.nodes).num_leaves != len(variables):  # arrays by themselves
            raise _NotFlatError
        given = (*(variable.get_raw_value() for variable in variables), *args.rest)
        return jax.jit(flat, donate_argnums=tuple(donated)).trace(*given), targets
    except _NotFlatError:
        jitted = nnx.jit(step, donate_argnums=tuple(_donated_arguments(args, donate)))
        return jitted.trace(*args.args), None  # pyright: ignore[reportAttributeAccessIssue]


def _donated(args: Arguments, variables: list[nnx.Variable[Any]], donate: Donate) -> list[int]:
    """Which of the variables, followed by ``args.rest``, the program may overwrite."""
    donated: set[int] = set()
    place = len(variables)
    for number, arg in enumerate(args.args):
        part = Arguments((arg,))
        named = not isinstance(donate, bool) and number in donate
        if named or donate is True:
            inside = set(map(id, Watch(part.nodes).variables))
            donated |= {n for n, variable in enumerate(variables) if id(variable) in inside}
        donated |= {n for n, leaf in enumerate(part.rest, place) if named or (donate is True and has_frozen(leaf))}
        place += len(part.rest)
    return sorted(donated)


def _donated_arguments(args: Arguments, donate: Donate) -> list[int]:
    if not isinstance(donate, bool):
        return sorted(donate)
    return [n for n, arg in enumerate(args.args) if donate and (is_node(arg) or has_frozen(arg))]


class Call(NamedTuple):
    """A compiled program of a step.

    Attributes:
        stage: What compiling gave for what :func:`trace` traced.
        targets: As :func:`trace` returned them.
    """

    stage: Any
    targets: list[int] | None

    def __call__(self, args: Arguments, watch: Watch) -> Any:
        """Runs the step: changes the modules and returns as the step itself would.

        Args:
            args: The arguments.
            watch: What their modules are made of.
        """
        if self.targets is None:
            return self.stage(*args.args)
        values, out = self.stage(*watch.raw_values(), *args.rest)
        watch.set_raw_values(self.targets, values)
        return out
