"""What XLA computes more than once: values that are cheap are computed again in every loop that reads them.

In the backward pass every normalised and activated value is read several times; where it is not kept, it is made again
from what is. This follows what XLA's CPU backend does, on the equations of a jaxpr and without compiling: the rules
are those of ``instruction_fusion.cc``, ``cpu_instruction_fusion.cc`` and ``fusion_node_indexing_evaluation.cc`` in
openxla/xla.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from smartfrz_jax.cost import program_graph
from smartfrz_jax.cost.program_graph import Operation, size
from smartfrz_jax.jaxprs import flops

# fmt: off
_EXPENSIVE = frozenset({
    "cbrt", "div", "erf", "erf_inv", "exp", "exp2", "expm1", "gather", "log", "log1p", "logistic", "pow", "rem",
    "rsqrt", "sqrt", "tanh",
}) | flops.REDUCTIONS
# fmt: on
_FUSIBLE = (flops.ELEMENTWISE | flops.FREE | _EXPENSIVE | {"integer_pow", program_graph.CLAMP}) - {
    program_graph.BARRIER
}
# Operations that are computed once for every element that is read, however often that is.
_NOT_REUSED = frozenset({"concatenate", "dynamic_update_slice", "pad"}) | flops.REDUCTIONS
_MAX_DUPLICATION = 15

# XLA gives these reductions to a library, from 4096 elements on, as compiled programs show; and with them what is
# computed for them alone.
_LIBRARY = frozenset({"reduce_sum", "reduce_max", "reduce_min"})
_LIBRARY_ELEMENTS = 4096
# fmt: off
_BEFORE_LIBRARY = frozenset({
    "abs", "add", "add_any", "broadcast_in_dim", "cbrt", "ceil", "div", "erf", "exp", "expm1", "floor", "integer_pow",
    "log", "log1p", "logistic", "max", "min", "mul", "neg", "round", "rsqrt", "sign", "sqrt", "square", "sub", "tanh",
})
# fmt: on

# Concatenations of many arrays, or along the last axis with at least so many bytes there and in all, are kept apart.
_MAX_CONCATENATED = 8
_MIN_BYTES_LAST, _MIN_BYTES = 64, 2048


def compiled_flops(closed: Any) -> float:
    """FLOPs of a program as XLA's CPU backend compiles it.

    Args:
        closed: The traced program, a ``ClosedJaxpr``.

    Returns:
        The FLOPs of all operations, each as often as it is computed.
    """
    fusion = _Fusion(program_graph.graph(closed, "cpu"))
    return sum(fusion.operations[i].flops for loop in fusion.loops() for i in loop)


class _Fusion:
    """Decides which operations become one loop."""

    def __init__(self, operations: list[Operation]):
        self.operations = operations
        self._in_library = _in_library(operations)
        self._fusible = [op.name in _FUSIBLE and i not in self._in_library for i, op in enumerate(operations)]
        self._expensive = [operation.name in _EXPENSIVE and not operation.is_multiple for operation in operations]
        self._apart = [_stays_apart(operation) for operation in operations]
        self._ancestors: list[int] = []  # as bit masks
        for operation in operations:
            above = (self._ancestors[at] | 1 << at for at in operation.operands)
            self._ancestors.append(_union(above))
        self._on_all_paths: dict[tuple[int, int], bool] = {}
        self._once: set[int] = set()
        for i in reversed(range(len(operations))):
            if not self._may_duplicate(i):
                self._once.add(i)

    def loops(self) -> list[set[int]]:
        """The operations of each loop; one that is computed in several is in several."""
        # Loops, by their last operation, and operations that are in none yet, that read a result.
        readers = [set(operation.users) for operation in self.operations]
        return [
            self._loop(last, readers)
            for last in reversed(range(len(self.operations)))
            if readers[last] or self.operations[last].is_output
        ]

    def _loop(self, last: int, readers: list[set[int]]) -> set[int]:
        """Fuses what it can into the loop that computes an operation, latest first."""
        members, rejected = {last}, set[int]()
        read_by: dict[int, set[int]] = {}
        reused = set[int]()  # members whose elements are each read several times
        # How often the elements of a member are indexed: by itself, or by a later member that passes its index on.
        indexed_by: dict[int, set[int]] = {last: {-1}}
        times = {-1: 1}

        def add(member: int) -> None:
            members.add(member)
            times[member] = sum(times[at] for at in indexed_by[member])
            operation = self.operations[member]
            for at in operation.operands:
                read_by.setdefault(at, set()).add(member)
                readers[at].add(last)
                keeps_index = operation.name == "transpose" or self.operations[at].shape == operation.shape
                indexed_by.setdefault(at, set()).update(indexed_by[member] if keeps_index else {member})

        add(last)
        while candidates := read_by.keys() - members - rejected:
            at = max(candidates)
            operation = self.operations[at]
            is_reused = any(self._reuses(user, at) or user in reused for user in read_by[at])
            if not self._can_fuse(at, last, read_by[at], len(readers[at]) + operation.is_output, is_reused) or (
                len(members) > 1 and _duplicates_too_much(operation, sum(times[user] for user in indexed_by[at]))
            ):
                rejected.add(at)
                continue
            if is_reused:
                reused.add(at)
            add(at)
            readers[at].discard(last)
            if not readers[at] and not operation.is_output:
                for operand in operation.operands:
                    readers[operand].discard(at)
        return members

    def _can_fuse(self, at: int, last: int, users: set[int], n_readers: int, is_reused: bool) -> bool:
        if last in self._in_library:
            return at in self._in_library and self.operations[at].name not in _LIBRARY
        if not (self._fusible[at] and self._fusible[last]) or at in self._once or self._apart[at]:
            return False
        if any(self._apart[user] for user in users):
            return False
        return not (self._expensive[at] and (n_readers > 1 or is_reused))

    def _may_duplicate(self, i: int) -> bool:
        """Whether an operation may be computed in several loops at all: if that reads no more memory."""
        operation = self.operations[i]
        if self._reads_one_array(operation):
            return True
        if sum(size(var) for var in set(operation.inputs)) <= sum(size(var) for var in operation.eqn.outvars):
            return True
        fusible = self._fusible[i] and not operation.is_output
        return fusible and all(self._fuses_on_all_paths(i, user) for user in operation.users)

    def _reads_one_array(self, operation: Operation) -> bool:
        """Whether at most one input is as large as the result and was not broadcast."""
        broadcast = {
            var
            for at in operation.operands
            if self.operations[at].name in ("broadcast_in_dim", "iota")
            for var in self.operations[at].eqn.outvars
        }
        rank = max(_true_rank(var) for var in operation.eqn.outvars)
        return sum(var not in broadcast and _true_rank(var) >= rank for var in operation.inputs) <= 1

    def _fuses_on_all_paths(self, producer: int, consumer: int) -> bool:
        if producer == consumer:
            return True
        if not self._fusible[consumer]:
            return False
        key = producer, consumer
        if key not in self._on_all_paths:
            self._on_all_paths[key] = all(
                at not in self._once and self._fuses(consumer, at) and self._fuses_on_all_paths(producer, at)
                for at in self.operations[consumer].operands
                if at == producer or self._ancestors[at] >> producer & 1
            )
        return self._on_all_paths[key]

    def _fuses(self, consumer: int, at: int) -> bool:
        if not self._fusible[at] or not self._fusible[consumer] or self._apart[at] or self._apart[consumer]:
            return False
        operation = self.operations[at]
        several = len(operation.users) + operation.is_output > 1
        return not (self._expensive[at] and (several or self._reuses(consumer, at)))

    def _reuses(self, consumer: int, at: int) -> bool:
        """Whether an operation reads elements of another several times."""
        operation = self.operations[consumer]
        return operation.name == "broadcast_in_dim" and size(operation.eqn.outvars[0]) > size(operation.eqn.invars[0])


def _in_library(operations: list[Operation]) -> set[int]:
    """Large reductions, and what is computed for one of them alone."""
    found = set[int]()
    for i in reversed(range(len(operations))):
        operation = operations[i]
        if operation.name in _LIBRARY:
            (operand,) = operation.eqn.invars
            if operand.aval.dtype == np.float32 and size(operand) >= _LIBRARY_ELEMENTS:
                found.add(i)
        elif operation.name in _BEFORE_LIBRARY and not operation.is_output and len(operation.users) == 1:
            found.update({i} if operation.users <= found else ())
    return found


def _stays_apart(operation: Operation) -> bool:
    if operation.name != "concatenate":
        return False
    if len(operation.eqn.invars) > _MAX_CONCATENATED:
        return True
    aval, axis = operation.eqn.outvars[0].aval, operation.eqn.params["dimension"]
    last, every = (n * aval.dtype.itemsize for n in (aval.shape[axis], aval.size))
    return len(aval.shape) > 1 and axis == len(aval.shape) - 1 and last >= _MIN_BYTES_LAST and every >= _MIN_BYTES


def _duplicates_too_much(operation: Operation, times: int) -> bool:
    """Whether too much code would be made if an operation were emitted so many times in one loop."""
    if operation.name == "broadcast_in_dim":
        return False
    several = times > 1 or len(operation.users) + operation.is_output > 1
    return times > _MAX_DUPLICATION or (operation.name in _NOT_REUSED and several)


def _true_rank(var: Any) -> int:
    return sum(n != 1 for n in var.aval.shape)


def _union(masks: Any) -> int:
    union = 0
    for mask in masks:
        union |= mask
    return union
