"""The blocks of a network, residual or transformer, from the names of its layers."""

from __future__ import annotations

import collections
import re
from collections.abc import Collection, Mapping, Sequence

from smartfrz_jax.pytrees import paths


def blocks(layers: Collection[str]) -> dict[str, str]:
    """Name of the block that each layer is in; its own if it is in none.

    A block is a module of a list, ``blocks/3``, or else one numbered by name that has others of its name beside it:
    ``encoderblock_3``, but not ``resnet18``. A list in a list, ``stages/0/3``, is one of blocks in a stage; so are
    numbered modules that are all there is in a numbered one, ``stage1/block2``, if they hold several layers.

    Args:
        layers: Names of all layers: paths of modules.

    Example:
        >>> blocks(["resnet18/block1/conv", "resnet18/block1/down", "resnet18/block2/conv", "head"]).values()
        dict_values(['resnet18/block1', 'resnet18/block1', 'resnet18/block2', 'head'])
    """
    sizes = collections.Counter[str]()  # layers in each module
    for layer in layers:
        sizes.update(_modules(layer))
    like: dict[str, list[str]] = collections.defaultdict(list)  # modules that differ in the number alone
    for module in sizes:
        like[_stem(module)].append(module)
    return {layer: _block(layer, sizes, like) for layer in layers}


def _block(layer: str, sizes: Mapping[str, int], like: Mapping[str, Sequence[str]]) -> str:
    numbered = [module for module in _modules(layer)[:-1] if _stem(module) != module]
    listed = [module for module in numbered if _is_listed(module)]
    named = [module for module in numbered if len(like[_stem(module)]) > 1]
    block = next(iter(listed or named), layer)
    for module in numbered[numbered.index(block) + 1 :] if block in numbered else ():
        others = like[_stem(module)]
        in_list = _is_listed(block) and _stem(module) == block + paths.SEPARATOR
        several = 2 * sum(sizes[other] > 1 for other in others) >= len(others) > 1
        if in_list or (several and sum(sizes[other] for other in others) == sizes[block]):
            block = module
    return block


def _modules(layer: str) -> list[str]:
    """The modules that a layer is in, outermost first, and itself."""
    parts = layer.split(paths.SEPARATOR)
    return [paths.SEPARATOR.join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _stem(module: str) -> str:
    return re.sub(r"\d+$", "", module)


def _is_listed(module: str) -> bool:
    return module.rpartition(paths.SEPARATOR)[2].isdigit()
