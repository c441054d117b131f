"""What a compiled train step costs: measured on the program that XLA made, not estimated from the model."""

from __future__ import annotations

import math
import re
import time
from typing import Any, NamedTuple

import jax

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?(%\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$", re.MULTILINE)
_KINDS = re.compile(r"(all-gather|all-reduce|reduce-scatter)(-start)?")
# A type such as f32, bf16, s8 or f8e4m3fn begins with its size in bits; a boolean takes a byte.
_ARRAY = re.compile(r"\b(?:[a-z]+?([0-9]+)[a-z0-9]*|pred)\[([0-9,]*)\]")
_NAME = re.compile(r"%[^\s,)]+")


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


class ProgramCost(NamedTuple):
    """Cost of one compiled program; of one that is spread over several devices, what one device does.

    Attributes:
        flops: Floating-point operations of one call, as XLA counts them in the optimised program; a multiply-add is 2.
        bytes_accessed: Bytes of memory read and written by one call, as estimated by XLA.
        temp_bytes: Peak bytes of temporary buffers: activations kept for the backward pass, above all.
        argument_bytes: Bytes of the arguments: parameters, optimizer state and the batch.
        peak_bytes: Bytes that the program holds at its peak: arguments, results (those that do not take the place of
            donated arguments) and temporary buffers.
        trace_seconds: Time to trace and lower.
        compile_seconds: Time of XLA.
        devices: Number of devices that the program is for.
        collectives: What these send to each other.
    """

    flops: float
    bytes_accessed: float
    temp_bytes: int
    argument_bytes: int
    peak_bytes: int
    trace_seconds: float
    compile_seconds: float
    devices: int = 1
    collectives: Collectives = Collectives()


def program_cost(step: Any, *args: Any, **kwargs: Any) -> ProgramCost:
    """Compiles a step for its arguments and reads off its cost; it is not run.

    ``jax.jit`` keeps the program: calling ``step`` with such arguments afterwards does not compile it again.

    Args:
        step: A function made by ``jax.jit`` or ``nnx.jit``.
        *args: Arguments for it; arrays, modules, or ``jax.ShapeDtypeStruct``.
        **kwargs: Keyword arguments for it.

    Returns:
        The cost. XLA counts the body of a loop (``jax.lax.scan``) once, however often it runs: to check what
        :func:`smartfrz_jax.account` says of scanned blocks, which it counts one by one, compile the same network
        without the scan.

    Raises:
        TypeError: If ``step`` is not a jitted function.

    Example:
        >>> import jax.numpy as jnp
        >>> program_cost(jax.jit(jnp.dot), jnp.ones((8, 8)), jnp.ones((8, 8))).flops
        1024.0
    """
    check_jitted(step)
    start = time.perf_counter()
    lowered = step.lower(*args, **kwargs)
    return measure(lowered, time.perf_counter() - start)[0]


def check_jitted(step: Any) -> None:
    """Raises a ``TypeError`` unless ``step`` was made by ``jax.jit`` or ``nnx.jit``."""
    if not hasattr(step, "lower"):
        raise TypeError(
            f"step: got {type(step).__name__}, expected a function made by jax.jit or nnx.jit; wrap it first"
        )


def measure(lowered: Any, trace_seconds: float) -> tuple[ProgramCost, Any]:
    """Compiles what was lowered.

    Args:
        lowered: From ``step.lower(...)``.
        trace_seconds: Time that this took.

    Returns:
        The cost, and the compiled program, to be called.
    """
    start = time.perf_counter()
    stage = lowered.compile()
    compile_seconds = time.perf_counter() - start
    # nnx.jit wraps the stage of jax.jit.
    inner: jax.stages.Compiled = getattr(stage, "compiled", stage)
    analysis = inner.cost_analysis()
    properties = (analysis[0] if isinstance(analysis, list) else analysis) or {}
    memory = inner.memory_analysis()
    held = 0
    if memory is not None:  # its own peak leaves out temporary buffers on some platforms
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        held -= memory.alias_size_in_bytes
    shardings = jax.tree.leaves((inner.input_shardings, inner.output_shardings))
    devices = max((sharding.num_devices for sharding in shardings), default=1)
    cost = ProgramCost(
        flops=float(properties.get("flops", 0.0)),
        bytes_accessed=float(properties.get("bytes accessed", 0.0)),
        temp_bytes=int(memory.temp_size_in_bytes) if memory is not None else 0,
        argument_bytes=int(memory.argument_size_in_bytes) if memory is not None else 0,
        peak_bytes=int(held),
        trace_seconds=trace_seconds,
        compile_seconds=compile_seconds,
        devices=devices,
        collectives=collectives(inner.as_text() or "") if devices > 1 else Collectives(),
    )
    return cost, stage


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
