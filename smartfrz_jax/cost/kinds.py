"""Kinds of operations, told from the equations of a jaxpr and from the names of the functions that made them."""

from __future__ import annotations

import collections
import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from smartfrz_jax.jaxprs import flops, inline
from smartfrz_jax.jaxprs.parts import Eqn

CONVOLUTION = "convolution"
LINEAR = "linear"
ATTENTION = "attention"
EMBEDDING = "embedding"
BIAS = "bias"
NORMALISATION = "normalisation"
ACTIVATION = "activation"
POOLING = "pooling"
RANDOM = "random"
OTHER = "other"
LOSS = "loss"
UPDATE = "update"

KINDS = (
    CONVOLUTION,
    LINEAR,
    ATTENTION,
    EMBEDDING,
    BIAS,
    NORMALISATION,
    ACTIVATION,
    POOLING,
    RANDOM,
    OTHER,
    LOSS,
    UPDATE,
)
"""The kinds, in the order of a table.

``attention`` is products of two values that depend on the data, and the softmax around them; ``random``, dropout and
the like; ``other``, what connects them all, above all the sums of residual branches; ``update``, the optimizer.
"""

# Names of functions, and of the classes whose methods they are, as tracebacks and jaxprs have them.
_BY_NAME = {
    NORMALISATION: r"\w*Norm\.__call__|\w*(batch|layer|group|instance|rms)_?norm\w*",
    ATTENTION: r"softmax|\w*dot_product_attention\w*",
    RANDOM: r"(Drop\w*|StochasticDepth)\.__call__|_?(bernoulli|uniform|(truncated_)?normal(_real)?|random_bits)",
    ACTIVATION: r"relu6?|\w?elu|leaky_relu|silu|swish|hard_\w+|(log_)?sigmoid|softplus|soft_sign|mish|glu|squareplus"
    r"|tanh|log_softmax",
    POOLING: r"\w*(avg|max|mean|average)_?pool\w*",
}
_NAMES = [(kind, re.compile(pattern)) for kind, pattern in _BY_NAME.items()]
_PRIMITIVES = {
    "conv_general_dilated": CONVOLUTION,
    "reduce_window": POOLING,
    "reduce_window_max": POOLING,
    "reduce_window_min": POOLING,
    "reduce_window_sum": POOLING,
    "random_bits": RANDOM,
    "threefry2x32": RANDOM,
}


def kind_of(eqn: Eqn, on_weights: list[bool], on_data: list[bool]) -> str:
    """Kind of operation of an equation.

    Args:
        eqn: An equation of an inlined jaxpr.
        on_weights: Whether an input depends on parameters alone, for each.
        on_data: Whether an input depends on data, for each.
    """
    name = eqn.primitive.name
    if name in _PRIMITIVES:
        return _PRIMITIVES[name]
    if name == "dot_general":
        return ATTENTION if all(on_data) else LINEAR
    if flops.written_out(eqn):
        return ATTENTION if all(on_data) else CONVOLUTION
    for function in _functions(eqn):
        if kind := _kind_of_name(function):
            return kind
    if name == "gather" and on_weights[0]:
        return EMBEDDING
    if name in ("add", "add_any") and any(on_weights) and any(on_data):
        return BIAS
    reduced = eqn.params["axes"] if name in flops.REDUCTIONS else eqn.params["dimensions"] if name == "reduce" else (0,)
    if 0 not in reduced and len(eqn.invars[0].aval.shape) >= 3:
        return POOLING
    return OTHER


@functools.cache
def _kind_of_name(function: str) -> str | None:
    return next((kind for kind, pattern in _NAMES if pattern.fullmatch(function)), None)


def _functions(eqn: Eqn) -> Iterator[str]:
    """Names of the functions that an equation was made in, innermost first; those that it calls come before."""
    body = inline.body_of(eqn)
    for inner in getattr(body, "eqns", ()):
        if "name" in inner.params:
            yield str(inner.params["name"])
    yield from inline.functions(eqn)


def elements(operations: Iterable[tuple[Any, str, int]]) -> dict[str, int]:
    """Elements that each kind of operation works on: those of its result, of its input for poolings.

    Args:
        operations: Equations with their kinds and how often each runs, in order. Neighbours of one kind are one
            operation.
    """
    counts: collections.Counter[str] = collections.Counter()
    for kind, group in itertools.groupby(operations, key=lambda operation: operation[1]):
        sizes = [
            math.prod(var.aval.shape) * times
            for eqn, _, times in group
            for var in (eqn.invars if kind == POOLING else eqn.outvars)
        ]
        counts[kind] += max(sizes, default=0)
    return dict(counts)
