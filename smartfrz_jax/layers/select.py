"""Which layers of a network are meant, wherever some can be named: :func:`select`."""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from types import EllipsisType
from typing import Any, TypeAlias

import numpy as np
from flax import linen, nnx

from smartfrz_jax.layers.layers import Layer, Layers, check_layers
from smartfrz_jax.pytrees import checks, paths

Selector: TypeAlias = str | re.Pattern[str] | EllipsisType | Callable[[Layer], bool] | Callable[[Any, Any], bool]
Selectors: TypeAlias = Selector | Iterable[Selector]

_EXPECTED = (
    "names of layers, globs ('encoder/*'), regular expressions (re.compile(...)), predicates of a smartfrz_jax.Layer "
    "or NNX filters of paths (nnx.PathContains('encoder'))"
)


def select(layers: Layers, selectors: Selectors, argument: str = "names") -> tuple[str, ...]:
    r"""Names of the layers that are meant, front to back.

    Args:
        layers: The network's layers.
        selectors: One selector, or several, whose layers are put together. A *string* is the name of a layer or, if no
            layer is called so, a glob, of which ``*`` stands for any text, ``/`` too. A *regular expression* must match
            the whole name. A *predicate* is a function of a :class:`~smartfrz_jax.Layer`. An *NNX filter* is one of
            paths, such as ``nnx.PathContains("encoder")``, ``nnx.Not(...)``, or a function of ``(path, value)``: it is
            asked of every parameter, with numbers in its path as ``int``, and must take all of a layer's or none.
            ``...`` is all layers.
        argument: What to call ``selectors`` in the error.

    Raises:
        TypeError: If they are something else: no layer is of one type of module or variable, and it holds no values.
        ValueError: If one of them is no layer of this network, or takes some parameters of a layer and leaves others.

    Example:
        >>> import re
        >>> from smartfrz_jax import Layer
        >>> names = ("stem", "body/0", "body/1", "head")
        >>> layers = Layers(tuple(Layer(name, (f"{name}/kernel",), (f"{name}/kernel",)) for name in names))
        >>> select(layers, "body/*")
        ('body/0', 'body/1')
        >>> select(layers, ["stem", re.compile(r".*/\d")])
        ('stem', 'body/0', 'body/1')
        >>> select(layers, lambda layer: layer.name != layers.head)
        ('stem', 'body/0', 'body/1')
    """
    check_layers(layers)
    chosen = {name for each in as_selectors(selectors, argument) for name in _selected(layers, each, argument)}
    return tuple(name for name in layers.names if name in chosen)


def as_selectors(selectors: Any, argument: str) -> tuple[Selector, ...]:
    """Selectors as a tuple, so that they can be read more than once; one alone is a tuple of one.

    Raises:
        TypeError: If they are something else.
    """
    if isinstance(selectors, str | re.Pattern) or selectors is ... or callable(selectors):
        selectors = (selectors,)
    if isinstance(selectors, Mapping):  # iterating it would take its keys, whatever it says of them
        raise TypeError(
            f"{argument}: got {checks.got(selectors)}, expected {_EXPECTED}; of a mask pass the names that it is true "
            "for: [name for name, is_frozen in mask.items() if is_frozen]"
        )
    if not isinstance(selectors, Iterable):
        raise TypeError(f"{argument}: got {checks.got(selectors)}, expected {_EXPECTED}")
    several = tuple(selectors)
    for each in several:
        if isinstance(each, type):
            raise TypeError(
                f"{argument}: got the type {each.__name__}, expected {_EXPECTED}; a layer is known by names alone, "
                "and often of several types"
            )
        if isinstance(each, nnx.Module | linen.Module):  # it can be called, too
            raise TypeError(
                f"{argument}: got {checks.got(each)}, expected {_EXPECTED}; a module's layer has the name of its path, "
                "such as 'layers/0': print(layers.names)"
            )
        is_text = isinstance(each, str) or (isinstance(each, re.Pattern) and isinstance(each.pattern, str))
        if not (is_text or each is ... or (callable(each) and (_takes(each, 1) or _takes(each, 2)))):
            raise TypeError(f"{argument}: got {checks.got(each)} among them, expected {_EXPECTED}")
    return several


def described(selectors: tuple[Selector, ...] | None) -> tuple[str, ...] | None:
    """Selectors as text, the same in every process: names and globs as they are."""
    if selectors is None:
        return None
    return tuple(each if isinstance(each, str) else _text(each) for each in selectors)


def _text(selector: Any) -> str:
    return "..." if selector is ... else re.sub(r" at 0x[0-9a-fA-F]+", "", repr(selector))


def _selected(layers: Layers, selector: Any, argument: str) -> Iterable[str]:
    """Names of the layers that one selector means; raises ``ValueError`` if there are none."""
    names = layers.names
    if selector is ... or (isinstance(selector, str) and selector in names):
        return names if selector is ... else (selector,)
    if isinstance(selector, str):
        found = [name for name in names if fnmatch.fnmatchcase(name, selector)]
        missing = f"no layer is called {selector!r}"
    elif isinstance(selector, re.Pattern):
        found = [name for name in names if selector.fullmatch(name)]
        missing = f"no layer's whole name matches {selector.pattern!r}"
    else:
        taken = _is_selected if _takes(selector, 1) else _is_taken
        found = [layer.name for layer in layers if taken(selector, layer, argument)]
        missing = f"{_text(selector)} selects no layer"
    if found:
        return found
    text = selector if isinstance(selector, str) else getattr(selector, "pattern", "")
    inside = f"{text}{paths.SEPARATOR}"
    globs = [f"{inside}*"] if any(name.startswith(inside) for name in names) else []
    raise ValueError(f"{argument}: {missing}; {layers.hint(text, globs)}")


def _is_selected(predicate: Callable[[Layer], bool], layer: Layer, argument: str) -> bool:
    return _as_bool(predicate(layer), predicate, argument)


def _is_taken(taken_by: Callable[[Any, Any], bool], layer: Layer, argument: str) -> bool:
    """Whether an NNX filter takes the parameters of a layer: all of them, for the layer freezes as one."""
    parts = {name: tuple(int(p) if p.isdecimal() else p for p in name.split(paths.SEPARATOR)) for name in layer.params}
    try:
        taken = {name: _as_bool(taken_by(path, _Absent()), taken_by, argument) for name, path in parts.items()}
    except _AbsentError:
        raise TypeError(
            f"{argument}: got {_text(taken_by)}, which looks at variables, expected {_EXPECTED}; a layer holds the "
            "names of its variables alone"
        ) from None
    if any(taken.values()) and not all(taken.values()):
        inside, outside = (next(name for name, value in taken.items() if value == is_in) for is_in in (True, False))
        raise ValueError(
            f"{argument}: {_text(taken_by)} takes {inside!r} and leaves {outside!r}, expected all parameters of the "
            f"layer {layer.name!r} or none, for it freezes as one; select it by its name"
        )
    return any(taken.values())


def _as_bool(value: Any, selector: Any, argument: str) -> bool:
    checks.instance(value, bool | np.bool_, argument, f"True or False from {_text(selector)}")
    return bool(value)


def _takes(function: Callable[..., Any], positional: int) -> bool:
    """Whether a function can be called with so many arguments."""
    try:
        inspect.signature(function).bind(*[None] * positional)
    except TypeError:
        return False
    except ValueError:  # a builtin that does not say
        return positional == 1
    return True


class _AbsentError(Exception):
    """A filter has looked at a variable."""


class _Absent:
    """In place of a variable, of which a layer has but the name."""

    def __getattribute__(self, name: str) -> Any:
        raise _AbsentError
