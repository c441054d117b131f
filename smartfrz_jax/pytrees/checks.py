"""Checks of what a public function is given: where it is given, with an error that names the argument.

Every message has the same form: the argument, what was got, what was expected and, where there is one, the way out.
What is of another type is a ``TypeError``, what is out of range a ``ValueError``.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from smartfrz_jax.pytrees import paths

# Steps are int32, which every checkpoint gives back as they were.
LARGEST = int(np.iinfo(np.int32).max)


def got(value: Any) -> str:
    """A value in an error message: its type, and the value where that is short."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    kind = type(value)
    if _is_plain(value):
        return f"{kind.__name__} {value!r:.60}"
    if isinstance(value, list | tuple | dict | set | frozenset):
        return f"{kind.__name__} of {len(value)}"
    if hasattr(value, "__qualname__"):
        return f"{kind.__name__} {value.__qualname__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | complex | str | bytes)


def instance(value: Any, kind: type | types.UnionType, argument: str, expected: str) -> None:
    """Raises ``TypeError`` unless ``value`` is an instance of ``kind``, which the text ``expected`` describes."""
    if not isinstance(value, kind):
        raise TypeError(f"{argument}: got {got(value)}, expected {expected}")


def function(value: Any, argument: str, expected: str) -> None:
    """Raises ``TypeError`` unless ``value`` can be called; ``expected`` says as what."""
    if not callable(value):
        raise TypeError(f"{argument}: got {got(value)}, expected {expected}")


def choice(value: Any, argument: str, choices: Iterable[str]) -> None:
    """Raises ``ValueError`` unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        shown = repr(value) if isinstance(value, str) else got(value)
        raise ValueError(f"{argument}: got {shown}, expected {' or '.join(map(repr, choices))}")


def flag(value: Any, argument: str) -> None:
    """Raises ``TypeError`` unless ``value`` is a boolean."""
    instance(value, bool | np.bool_, argument, "True or False")


def scalar(value: Any, argument: str, expected: str) -> None:
    """Raises unless ``value`` is one real number; does not wait for a device.

    Raises:
        TypeError: If it is none: a text, a boolean, nothing.
        ValueError: If it is an array of some.
    """
    dtype = getattr(value, "dtype", type(value))
    is_real = dtype is not bool and any(jax.numpy.issubdtype(dtype, kind) for kind in (np.integer, np.floating))
    if not is_real or not isinstance(value, int | float | np.generic | np.ndarray | jax.Array):
        raise TypeError(f"{argument}: got {got(value)}, expected {expected}")
    if np.shape(value) != ():
        raise ValueError(f"{argument}: got shape {np.shape(value)}, expected {expected}")


def outside_jit(value: Any, argument: str) -> None:
    """Raises ``TypeError`` if ``value`` is traced: a freezer in a compiled step would be asked once, in the trace."""
    if isinstance(value, Tracer):
        raise TypeError(
            f"{argument}: got a tracer, expected arrays; call the freezer outside of jax.jit, after every train step"
        )


def loss(value: Any) -> None:
    """Raises unless ``value`` is the loss of a step: one number that is not traced, or ``None``."""
    if value is not None:
        outside_jit(value, "loss")
        scalar(value, "loss", "a scalar; pass the mean over the batch")


def number(value: Any, argument: str, expected: str) -> float:
    """``value`` as a Python number; raises as :func:`scalar` does."""
    scalar(value, argument, expected)
    return float(value)


def between(value: Any, argument: str, expected: str, least: float, most: float) -> None:
    """Raises ``ValueError`` unless a number is in ``[least, most]``, ``TypeError`` if it is none."""
    if not least <= number(value, argument, expected) <= most:
        raise ValueError(f"{argument}: got {value}, expected {expected}")


def positive(value: Any, argument: str) -> None:
    """Raises ``ValueError`` unless a number is above zero and finite."""
    expected = "a number above 0"
    if not 0 < number(value, argument, expected) < np.inf:
        raise ValueError(f"{argument}: got {value}, expected {expected}")


def count(value: Any, argument: str, *, least: int = 1, most: int = LARGEST - 1) -> None:
    """Raises ``ValueError`` unless ``value`` is an integer from ``least`` to ``most``."""
    expected = f"an integer of at least {least}"
    number(value, argument, expected)
    if not jax.numpy.issubdtype(getattr(value, "dtype", type(value)), np.integer):
        raise ValueError(f"{argument}: got {value!r}, expected {expected}; round it, if it is a quotient")
    if not least <= value <= most:
        upper = f", at most {most}" if value > most else ""
        raise ValueError(f"{argument}: got {value!r}, expected {expected}{upper}")


def fraction(value: Any, argument: str, *, zero: bool = True) -> None:
    """Raises ``ValueError`` unless a number is in [0, 1], or in (0, 1] without ``zero``."""
    expected = f"a share {'from' if zero else 'above'} 0 up to 1"
    if not 0 <= number(value, argument, expected) <= 1 or (value == 0 and not zero):
        raise ValueError(f"{argument}: got {value}, expected {expected}")


def seed(value: Any, argument: str = "seed") -> None:
    """Raises ``ValueError`` unless ``value`` is an integer of 32 bits from 0 up, which JAX and NumPy take as it is."""
    count(value, argument, least=0, most=2**32 - 1)


def names(value: Any, argument: str, *, of: str = "layers") -> tuple[str, ...]:
    """Names as a tuple, so that they can be read more than once; one name alone is a tuple of one.

    Raises:
        TypeError: If they are something else.
    """
    if isinstance(value, str):
        return (value,)
    expected = f"names of {of}, a sequence of strings"
    if not isinstance(value, Iterable):
        raise TypeError(f"{argument}: got {got(value)}, expected {expected}")
    found = tuple(value)
    for name in found:
        if not isinstance(name, str):
            raise TypeError(f"{argument}: got {got(name)} among them, expected {expected}")
    return found


def by_name(value: Any, argument: str, expected: str) -> None:
    """Raises ``TypeError`` unless ``value`` is a mapping, which ``expected`` describes."""
    instance(value, Mapping, argument, expected)


def transformation(value: Any, argument: str = "tx") -> None:
    """Raises ``TypeError`` unless ``value`` is an optax transformation."""
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        raise TypeError(
            f"{argument}: got {got(value)}, expected an optax.GradientTransformation, such as optax.adam(1e-3)"
        )


def numbers(value: Any, argument: str, expected: str) -> None:
    """Raises ``TypeError`` unless ``value`` is an array of real numbers, traced or not."""
    dtype = getattr(value, "dtype", object)
    real = (np.bool_, np.integer, np.floating)
    if not hasattr(value, "shape") or not any(jax.numpy.issubdtype(dtype, kind) for kind in real):
        raise TypeError(f"{argument}: got {got(value)}, expected {expected}")


def arrays(value: Any, argument: str, expected: str) -> None:
    """Raises ``TypeError`` unless ``value`` is a sequence of arrays, traced or not."""
    if not isinstance(value, Sequence) or not all(hasattr(one, "shape") and hasattr(one, "dtype") for one in value):
        raise TypeError(f"{argument}: got {got(value)}, expected {expected}")


def booleans(value: Any, argument: str, expected: str) -> None:
    """Raises ``TypeError`` unless ``value`` is an array of booleans, traced or not."""
    if not hasattr(value, "shape") or not jax.numpy.issubdtype(getattr(value, "dtype", object), np.bool_):
        raise TypeError(f"{argument}: got {got(value)}, expected {expected}")


def finite(arrays: Mapping[str, Any], argument: str, way_out: str) -> None:
    """Raises ``ValueError`` if an array has a value that is NaN or infinite; ``TypeError`` if it has none.

    Args:
        arrays: The arrays, by name.
        argument: What they belong to.
        way_out: What the reader of the error can do.
    """
    for name, value in arrays.items():
        if not np.isfinite(array(value, argument, f"an array of numbers for {name!r}")).all():
            raise ValueError(f"{argument}: {name!r} is not finite, expected finite numbers; {way_out}")


def same_leaves(tree: Any, like: Any, argument: str, *, but: Collection[str] = (), per_example: bool = False) -> None:
    """Raises ``ValueError`` unless a pytree has the leaves of the parameters, by name and shape; names only on error.

    Args:
        tree: The pytree.
        like: The parameters.
        argument: What it is called.
        but: Names of parameters of which the shape does not matter.
        per_example: Whether there may be an axis of examples in front, as ``optax.contrib`` has it for privacy.
    """

    def fits(leaf: Any, like: Any) -> bool:
        is_array = hasattr(leaf, "shape") or isinstance(leaf, int | float | complex)
        shape, expected = np.shape(leaf), np.shape(like)
        return is_array and (
            shape == expected or (per_example and shape[1:] == expected and len(shape) > len(expected))
        )

    leaves, structure = jax.tree.flatten(tree)
    expected, structure_expected = jax.tree.flatten(like)
    if structure == structure_expected and all(map(fits, leaves, expected)):
        return
    found, wanted = paths.flatten(tree), paths.flatten(like)
    for name, leaf in wanted.items():
        if name not in found or not (name in but or fits(found[name], leaf)):
            has = got(found[name]) if name in found else f"{len(found)} leaves without it"
            raise ValueError(
                f"{argument}: got {has} for {name!r}, expected shape {np.shape(leaf)}, as the parameter has it; pass "
                "those of this network"
            )
    for name in found:
        if name not in wanted:
            raise ValueError(f"{argument}: got {name!r}, which is no parameter, expected those of this network alone")


def array(value: Any, argument: str, expected: str) -> np.ndarray:
    """``value`` as a NumPy array of numbers or booleans.

    Raises:
        TypeError: If it is none: nothing, a text, lists of unequal length.
    """
    try:
        found = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{argument}: got {got(value)}, expected {expected}") from error
    if not (found.dtype == bool or jax.numpy.issubdtype(found.dtype, np.number)):
        raise TypeError(f"{argument}: got {got(value)}, expected {expected}")
    return found
