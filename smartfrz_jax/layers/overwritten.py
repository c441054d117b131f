"""Names of values among the parameters that their gradients overwrite, as Flax's operations in fp8 have them."""

from __future__ import annotations

from collections.abc import Collection

from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

from smartfrz_jax.pytrees import paths

PARAMS = "params"


def homes(params: Collection[str]) -> dict[str, str]:
    """The module of each parameter; of such values, the innermost around them that holds one of the others."""
    parents = {name: name.rpartition(paths.SEPARATOR)[0] for name in params}
    modules = {parent for name, parent in parents.items() if not is_overwritten(name)}
    for name in filter(is_overwritten, params):
        around = parents[name].replace(OVERWRITE_WITH_GRADIENT, PARAMS, 1)
        while around and around not in modules:
            around = around.rpartition(paths.SEPARATOR)[0]
        parents[name] = around or parents[name]
    return parents


def is_overwritten(name: str) -> bool:
    """Whether a parameter is such a value."""
    return name.startswith(OVERWRITE_WITH_GRADIENT + paths.SEPARATOR)
