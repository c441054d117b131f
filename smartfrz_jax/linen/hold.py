"""Frozen layers of a Linen module as they are to run: in evaluation mode, with variables that nothing changes."""

from __future__ import annotations

import collections
import contextlib
import inspect
import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeAlias

import jax
from flax import linen as nn
from flax.core.scope import subtract_filters

from smartfrz_jax.freezing.frozen import Frozen, check_frozen
from smartfrz_jax.jaxprs import row_flags
from smartfrz_jax.pytrees import paths
from smartfrz_jax.pytrees.types import PyTree

_Layers: TypeAlias = tuple[str, ...]  # the layer of a parameter, or that of each of its rows
_Reading: TypeAlias = dict[str, _Layers]

# Part of the key of JAX's caches: a jitted function that was traced for another frozen set is traced again, so that its
# modules are met again.
_held_for = jax.make_user_context(None)

_FLAGS = {
    nn.BatchNorm: "use_running_average",
    nn.Dropout: "deterministic",
    nn.MultiHeadDotProductAttention: "deterministic",
}

# Collections that a call may write whatever is frozen: they say nothing of what a layer computes.
_PASSING = frozenset({"cache", "intermediates", "perturbations"})


def hold(frozen: Frozen, params: PyTree = None) -> contextlib.AbstractContextManager[None]:
    """Within it, Linen modules that belong to frozen layers run in evaluation mode.

    That is every BatchNorm whose parameters are in a frozen layer, attention in which all layers are frozen, and every
    Dropout, or BatchNorm without parameters, that is called next after a frozen layer. Variables of any other module
    that belongs to frozen layers in the same way, or calls nothing but these, end with the values that they began with,
    whatever it assigns to them; but for the collections ``"cache"``, ``"intermediates"`` and ``"perturbations"``.

    A module around several layers, of which some train, goes on to write its variables, and so may change what the
    frozen ones compute. Only those that are named by the path of a parameter, as ``nn.SpectralNorm`` names its own, are
    of the layer of this parameter.

    Modules may be applied to a part of the parameters, such as ``params["backbone"]``: a layer's parameter is one whose
    name ends in the path from the module that is applied.

    Args:
        frozen: The frozen set.
        params: The parameters that parts are taken of. They tell two networks apart whose parameters have the same
            names, as in ``{"actor": ..., "critic": ...}``, if ``apply`` gets the very same arrays.

    Returns:
        The context.

    Raises:
        TypeError: If ``frozen`` is no :class:`~smartfrz_jax.Frozen`.
        ValueError: If a module in training mode is in a network whose parameters are in no layer, and no other network
            is applied; or if it cannot be told whether the layer that it belongs to is frozen.
    """
    check_frozen(frozen)
    return _held(frozen, params)


@contextlib.contextmanager
def _held(frozen: Frozen, params: PyTree) -> Iterator[None]:
    if not frozen.names:
        yield
        return
    holder = _Holder(frozen, params)
    with _held_for(frozen), nn.intercept_methods(holder.intercept):
        yield
    holder.check()


class _Holder:
    """Meets the calls of modules in their order.

    A reading of a network gives the layers of its parameters, by their paths from the module that is applied: one, or
    that of each row of a stacked one. There is one reading, unless the same names are in several parts of the
    parameters.
    """

    def __init__(self, frozen: Frozen, params: PyTree):
        self._frozen_set = frozen
        self._name_of = {id(leaf): name for name, leaf in paths.flatten(params).items()}
        self._networks: list[tuple[Any, list[_Reading]]] = []  # by the scope of what is applied
        self._around: list[_Reading] = []  # readings of the network that is running
        self._last: set[_Layers] = set()  # layers that the last call may have been of
        self._called: set[_Layers] = set()  # layers of what has been called inside the call that is running
        self._strange = ""

    def intercept(
        self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        """Calls a module, in evaluation mode if its layer is frozen."""
        module, is_call = context.module, context.method_name == "__call__"
        if context.method_name == "setup" or module.scope is None:
            return next_fun(*args, **kwargs)
        root = module.scope.root
        around, readings = self._around, self._readings(root)
        flag = next((flag for kind, flag in _FLAGS.items() if is_call and isinstance(module, kind)), None)
        if flag is not None and not readings and _params(root) and _trains(module, flag, args, kwargs):
            self._strange = f"{type(module).__name__} {paths.SEPARATOR.join(module.path)!r}"
        before, last = _changeable(module), [{layer} for layer in self._last]
        outside, self._called = self._called, set[_Layers]()
        self._around = readings
        try:
            held = flag is not None and self._frozen(module, _layers_of(module, readings) or last)
            if flag is None or not held:
                result = next_fun(*args, **kwargs)
            elif held is True:
                result = _call_with(module, flag, next_fun, args, kwargs)
            else:  # in some rows of a stack
                with _undone(module):
                    frozen = _call_with(module, flag, next_fun, args, kwargs)
                result = row_flags.selected(held, next_fun(*args, **kwargs), frozen)
        finally:
            self._around = around
        after = _changeable(module)
        changed = [key for key, value in before.items() if not _is_same(value, after[key])]
        otherwise = [self._called] if self._called else last
        for key in changed:
            named = [{layer} for reading in readings if (layer := _named_by(key[1], module.path, reading))]
            held = self._frozen(module, named or _layers_of(module, readings) or otherwise)
            if held:
                old = row_flags.selected(held, after[key], before[key]) if isinstance(held, tuple) else before[key]
                module.scope.put_variable(*key, old)
        path = paths.SEPARATOR.join(module.path)
        own = [
            [layer for param, layer in reading.items() if param.rpartition(paths.SEPARATOR)[0] == path]
            for reading in readings
        ]
        self._called = outside.union(self._called, *own)
        if is_call:
            self._last = {layers[-1] for layers in own if layers} or self._last
        return result

    def check(self) -> None:
        """Raises if there were modules to hold, perhaps, but no network of the layers."""
        if self._strange and not any(readings for _, readings in self._networks):
            raise ValueError(
                f"loss_fn: applies a Linen network in training mode ({self._strange}), but none whose parameters are "
                f"in layers ({', '.join(map(repr, list(self._frozen_set.layers.arrays)[:3]))}, ...), so the BatchNorms "
                "and dropouts of frozen layers would go on as in training; pass apply the parameters under the names "
                "that they have in params, or a part of them such as params['backbone']; what does not train, in "
                "evaluation mode or outside of loss_fn"
            )

    def _frozen(self, module: nn.Module, possible: list[set[_Layers]]) -> bool | tuple[bool, ...]:
        """Whether all of some layers are frozen, of which one reading each may be the right one; or in which rows."""
        path = paths.SEPARATOR.join(module.path)
        answers = {self._frozen_set.held(layers) for layers in possible}
        if len(answers) > 1:
            several = [sorted(set().union(*layers)) for layers in possible]
            named = " or ".join(sorted({repr(", ".join(layers)) for layers in several}))
            raise ValueError(
                f"loss_fn: {type(module).__name__} {path!r} may be of the layers {named}, of which not all are frozen; "
                "apply the networks to the parameters as loss_fn gets them, neither cast nor inside a jax.jit of their "
                "own, or put them into one Linen module"
            )
        return next(iter(answers), False)

    def _readings(self, root: Any) -> list[_Reading]:
        for known, readings in self._networks:
            if known is root:
                return readings
        leaves, owner = _params(root), self._frozen_set.layers.arrays
        names = {param: self._name_of[id(leaf)] for param, leaf in leaves.items() if id(leaf) in self._name_of}
        if leaves and not names and any(leaves.keys() <= reading.keys() for reading in self._around):
            readings = self._around  # a piece of the network that runs, in a jit or checkpoint of Linen
        else:
            parts = _parts(leaves, owner)
            if names:
                parts = [part for part in parts if all(part + param == name for param, name in names.items())]
            readings = [
                {name[len(part) :]: layer for name, layer in owner.items() if name.startswith(part)} for part in parts
            ]
            if names and not readings:  # put together from several parts, or under other names
                readings = [{param: owner[name] for param, name in names.items()}]
        self._networks.append((root, readings))
        return readings


def _layers_of(module: nn.Module, readings: list[_Reading]) -> list[set[_Layers]]:
    """Layers with parameters inside a module, by the readings that have such."""
    path = paths.SEPARATOR.join(module.path)
    before = path and path + paths.SEPARATOR
    inside = [{layer for param, layer in reading.items() if param.startswith(before)} for reading in readings]
    return [layers for layers in inside if layers]


def _named_by(variable: str, path: tuple[str, ...], reading: _Reading) -> _Layers | None:
    """The layer of the parameter by whose path a variable is named, as ``Dense_0/kernel/sigma`` of a SpectralNorm.

    Args:
        variable: Its name.
        path: Of its module, in which the parameter is, or beside it.
        reading: Layers by parameter.
    """
    param = variable.rpartition(paths.SEPARATOR)[0]
    inside = reading.get(paths.SEPARATOR.join((*path, param)))
    return inside or reading.get(paths.SEPARATOR.join((*path[:-1], param)))


def _parts(leaves: Iterable[str], owner: Iterable[str]) -> list[str]:
    """What comes before the names of most leaves, in names of the layers' parameters."""
    before = collections.Counter(
        name[: -len(leaf)] for leaf in leaves for name in owner if ("/" + name).endswith("/" + leaf)
    )
    return [part for part in before if before[part] == max(before.values())]


def _params(root: Any) -> dict[str, Any]:
    """Parameters that a module is applied to, by their paths from it, also if this scope is of a part of it."""
    leaves = paths.flatten(root.variables().get("params", {}))
    return {paths.SEPARATOR.join((*root.path, name)): leaf for name, leaf in leaves.items()}


def _changeable(module: nn.Module, but: Collection[str] = _PASSING) -> dict[tuple[str, str], Any]:
    """Variables of a module and of those in it that its call may write, by collection and name."""
    assert module.scope is not None
    collections = module.scope.mutable_variables().items()
    return {
        (collection, name): jax.tree.map(lambda leaf: leaf, value)
        for collection, values in collections
        if collection not in but
        for name, value in values.items()
    }


def _is_same(old: PyTree, new: PyTree) -> bool:
    """Whether two pytrees have the very same leaves."""
    old_leaves, new_leaves = jax.tree.leaves(old), jax.tree.leaves(new)
    return len(old_leaves) == len(new_leaves) and all(map(operator.is_, old_leaves, new_leaves))


def _bind(module: nn.Module, args: Any, kwargs: Any) -> inspect.BoundArguments:
    return inspect.signature(type(module).__call__).bind(module, *args, **kwargs)


def _trains(module: nn.Module, flag: str, args: Any, kwargs: Any) -> bool:
    """Whether it makes a difference that a flag is not true; it comes with the call or with the constructor."""
    given = _bind(module, args, kwargs).arguments.get(flag)
    rate = getattr(module, "rate", getattr(module, "dropout_rate", None))
    return rate != 0 and not (getattr(module, flag) if given is None else given)


@contextlib.contextmanager
def _undone(module: nn.Module) -> Iterator[None]:
    """Within it, a call of a module sows nothing; afterwards variables and names are as if there had been none."""
    scope, before = module.scope, _changeable(module, but=())
    assert scope is not None
    own = scope.rewound()
    own.mutable = subtract_filters(scope.mutable, ["intermediates", "perturbations"])
    object.__setattr__(module, "scope", own)
    try:
        yield
    finally:
        object.__setattr__(module, "scope", scope)
        for key, value in before.items():
            scope.put_variable(*key, value)


def _call_with(module: nn.Module, flag: str, next_fun: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Calls a module with ``flag`` true, whether the flag came with the call, with the constructor, or not at all."""
    bound = _bind(module, args, kwargs)
    bound.arguments[flag] = True
    configured = getattr(module, flag)
    object.__setattr__(module, flag, None)  # Linen refuses a flag that is given in both places
    try:
        return next_fun(*bound.args[1:], **bound.kwargs)
    finally:
        object.__setattr__(module, flag, configured)
