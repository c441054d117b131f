"""Evaluation mode for the modules of frozen layers alone."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from flax import linen as nn

from smartfrz_jax import paths
from smartfrz_jax.freezing import Frozen


@contextlib.contextmanager
def hold(frozen: Frozen) -> Iterator[None]:
    """Within it, Linen modules that belong to frozen layers run in evaluation mode.

    That is every BatchNorm whose parameters are in a frozen layer, attention in which all layers are frozen, and every
    Dropout, or BatchNorm without parameters, that is called next after a frozen layer. Parameter names must be paths
    from the module that is applied.

    Args:
        frozen: The frozen set.
    """
    if not frozen.names:
        yield
        return
    owner = frozen.layers.owner
    last: str | None = None

    def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        nonlocal last
        module = context.module
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        prefix = paths.SEPARATOR.join((*module.path, ""))
        inside = {layer for param, layer in owner.items() if param.startswith(prefix)}
        held = (inside or {last}) <= frozen.names
        if held and isinstance(module, nn.BatchNorm):
            result = _call_with(module, "use_running_average", next_fun, args, kwargs)
        elif held and isinstance(module, nn.Dropout | nn.MultiHeadDotProductAttention):
            result = _call_with(module, "deterministic", next_fun, args, kwargs)
        else:
            result = next_fun(*args, **kwargs)
        own = [layer for param, layer in owner.items() if param.rpartition(paths.SEPARATOR)[0] == prefix[:-1]]
        last = own[-1] if own else last
        return result

    with nn.intercept_methods(intercept):
        yield


def _call_with(module: nn.Module, flag: str, next_fun: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Calls a module with ``flag`` true, whether the flag came with the call, with the constructor, or not at all."""
    bound = inspect.signature(type(module).__call__).bind(module, *args, **kwargs)
    bound.arguments[flag] = True
    configured = getattr(module, flag)
    object.__setattr__(module, flag, None)  # Linen refuses a flag that is given in both places
    try:
        return next_fun(*bound.args[1:], **bound.kwargs)
    finally:
        object.__setattr__(module, flag, configured)
