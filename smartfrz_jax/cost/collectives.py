"""What a compiled program sends between devices, read off its text."""

from __future__ import annotations

import math
import re
from typing import NamedTuple


class Traffic(NamedTuple):
    """Collective operations of one kind.

    Attributes:
        operations: Number of them. XLA joins many small ones into one.
        bytes: Size of what they work on, on one device: of the summands of an all-reduce or a reduce-scatter, of the
            gathered arrays of an all-gather.
    """

    operations: int = 0
    bytes: int = 0


class Collectives(NamedTuple):
    """Collective operations of one program, in the order of their kinds' names.

    Attributes:
        all_gather: What is collected from all devices.
        all_reduce: What is summed over the devices, and then known to each.
        reduce_scatter: What is summed over the devices, of which each then knows a part.
    """

    all_gather: Traffic = Traffic()
    all_reduce: Traffic = Traffic()
    reduce_scatter: Traffic = Traffic()

    @property
    def reduced_bytes(self) -> int:
        """Size of all that is summed over the devices: gradients, where the batch is split."""
        return self.all_reduce.bytes + self.reduce_scatter.bytes


_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?(%\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$", re.MULTILINE)
_KINDS = re.compile(r"(all-gather|all-reduce|reduce-scatter)(-start)?")
# A type such as f32, bf16, s8 or f8e4m3fn begins with its size in bits; a boolean takes a byte.
_ARRAY = re.compile(r"\b(?:[a-z]+?([0-9]+)[a-z0-9]*|pred)\[([0-9,]*)\]")
_NAME = re.compile(r"%[^\s,)]+")


def collectives(text: str) -> Collectives:
    """The collective operations in the text of a compiled program.

    Args:
        text: HLO text after optimization, as ``jax.stages.Compiled.as_text`` gives it.

    Returns:
        The operations by kind. One inside a loop counts once.

    Example:
        >>> collectives("%sum.1 = f32[4,8]{1,0} all-reduce(%dot.2), channel_id=1, to_apply=%add").all_reduce
        Traffic(operations=1, bytes=128)
    """
    instructions = _INSTRUCTION.findall(text)
    sizes = {name: _bytes(shape) for name, shape, _, _ in instructions}
    found = Collectives()._asdict()
    for name, _, operation, rest in instructions:
        if match := _KINDS.fullmatch(operation):
            kind, is_start = match[1].replace("-", "_"), bool(match[2])
            operands = sum(sizes.get(operand, 0) for operand in _NAME.findall(rest.partition(")")[0]))
            size = sizes[name]
            if kind == "reduce_scatter":
                size = max(size, operands)
            elif kind == "all_gather" and is_start:  # its result holds the operands too
                size -= operands
            found[kind] = Traffic(found[kind].operations + 1, found[kind].bytes + size)
    return Collectives(**found)


def _bytes(shape: str) -> int:
    """Size of an array or of a tuple of arrays."""
    arrays = _ARRAY.findall(shape)
    return sum(math.prod(map(int, filter(None, dims.split(",")))) * int(bits or 8) // 8 for bits, dims in arrays)
