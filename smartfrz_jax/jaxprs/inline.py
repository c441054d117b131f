"""One flat jaxpr of a forward function: calls that only group equations are replaced by what they call.

So are loops over stacked weights. Transformer blocks that are all alike may be stacked and scanned over, for the sake
of compile time; to whoever asks which layer comes after which, they are still one block after another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from smartfrz_jax.jaxprs.parts import Atom, ClosedJaxpr, Eqn, Jaxpr, lookup, variables

# Calls that only group equations. Those with their own differentiation rule stay whole.
_REMAT = frozenset({"remat2", "checkpoint"})
_TRANSPARENT = frozenset({"jit", "pjit", "closed_call", "core_call"}) | _REMAT
_WITH_RULES = frozenset({"custom_jvp_call", "custom_vjp_call"})
_CALLS = _TRANSPARENT | _WITH_RULES | {"call", "composite", "compute_on", "shard_map", "xla_metadata_call"}


class Loop(NamedTuple):
    """A scan over weights that was unrolled.

    Attributes:
        equations: Its equations, of all iterations.
        carried: What goes into the first iteration, and what comes out of the last instead.
        is_stacked: Whether the weights that it runs over were stacked just before, one row of each parameter.
    """

    equations: list[Eqn]
    carried: list[tuple[Any, Any]]
    is_stacked: bool


def inline(closed: ClosedJaxpr, params: Collection[Any], data: Collection[Any], *, rules: bool = False) -> ClosedJaxpr:
    """The same jaxpr without calls and without loops over weights, every variable bound once.

    A scan is unrolled if something it runs over depends on parameters and not on data; scans over the data, such as a
    recurrence over time, stay whole. Where the weights were stacked just before, every iteration takes its own.
    The name stack of an equation names the calls it comes from, and the functions that made them.

    Args:
        closed: A ``ClosedJaxpr``.
        params: Those of its variables that are parameters.
        data: Those of its variables that are data.
        rules: Whether nothing will be differentiated any more. Then calls with their own differentiation rule are
            replaced too, and there are barriers around what ``jax.checkpoint`` computes a second time.

    Returns:
        A ``ClosedJaxpr`` with the same inputs and outputs.
    """
    return _Inliner(params, data, rules).inlined(closed)


def inline_with_loops(
    closed: ClosedJaxpr, params: Collection[Any], data: Collection[Any]
) -> tuple[ClosedJaxpr, list[Loop]]:
    """As :func:`inline`; and the loops that were unrolled, outer ones after those in them."""
    inliner = _Inliner(params, data, rules=False)
    return inliner.inlined(closed), inliner.loops


def body_of(eqn: Eqn) -> Any:
    """The jaxpr that a call runs, if its constants are all arguments, else None."""
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if getattr(inner, "consts", ()):
        return None
    return inner.jaxpr if isinstance(inner, jex.ClosedJaxpr) else inner


def called(eqn: Eqn) -> Any:
    """The jaxpr that an equation runs once, on its inputs, else None: a reduction has one too, of its elements."""
    return body_of(eqn) if eqn.primitive.name in _CALLS else None


def functions(eqn: Eqn) -> Iterator[str]:
    """Names of the functions, or of classes and methods, that an equation of an inlined jaxpr was made in.

    Innermost first; among them are functions of JAX's machinery.
    """
    if eqn.source_info.traceback is not None:  # it ends where the tracing of the call around it began
        for frame in eqn.source_info.traceback.frames:
            yield ".".join(frame.function_name.split(".")[-2:])
    yield from reversed(str(eqn.source_info.name_stack).split("/"))


def scan_sizes(eqn: Eqn) -> tuple[int, int]:
    """Numbers of inputs that a scan runs over, and of outputs that it stacks; they are the last of each."""
    body = eqn.params["jaxpr"].jaxpr
    return _count_sliced(eqn.invars, body.invars), _count_sliced(eqn.outvars, body.outvars)


def _count_sliced(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    return sum(len(o.aval.shape) > len(i.aval.shape) for o, i in zip(outer, inner, strict=True))


def needed(jaxpr: Jaxpr, outvars: Sequence[Atom]) -> list[Eqn]:
    """The equations of a jaxpr that some of its values depend on, in order."""
    wanted = set(variables(outvars))
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if wanted.intersection(eqn.outvars):
            kept.append(eqn)
            wanted.update(variables(eqn.invars))
    return kept[::-1]


class _Inliner:
    """The equations so far, what made each value, and what each value depends on."""

    def __init__(self, params: Collection[Any], data: Collection[Any], rules: bool):
        self.eqns: list[Eqn] = []
        self.loops: list[Loop] = []
        self._rules = rules
        self._transparent = _TRANSPARENT | _WITH_RULES if rules else _TRANSPARENT
        self._maker: dict[Any, Any] = {}
        self._on_params, self._on_data = set(params), set(data)

    def inlined(self, closed: ClosedJaxpr) -> ClosedJaxpr:
        """The inlined jaxpr."""
        env: dict[Any, Any] = {}
        self.run(closed.jaxpr, env)
        outvars = [lookup(env, var, var) for var in closed.jaxpr.outvars]
        return jex.ClosedJaxpr(closed.jaxpr.replace(eqns=self.eqns, outvars=outvars), closed.consts)

    def run(self, jaxpr: Jaxpr, env: dict[Any, Any], call: Eqn | None = None) -> None:
        """Appends the equations of ``jaxpr``, whose inputs are found in ``env``; adds its other values to ``env``."""
        for eqn in equations(jaxpr, call):
            invars = [lookup(env, var, var) for var in eqn.invars]
            name, body = eqn.primitive.name, body_of(eqn)
            if name in self._transparent and body is not None:
                if self._rules and name in _REMAT and eqn.params["differentiated"]:
                    invars = self._behind_barrier(eqn, invars)
                outs = self._call(body, invars, eqn)
            elif name == "scan" and body is not None and self._is_over_weights(eqn, invars):
                outs = self._unrolled(eqn, body, invars)
            else:
                outs = self._append(eqn, invars)
            env.update(zip(eqn.outvars, outs, strict=True))

    def _call(self, body: Jaxpr, invars: Iterable[Atom], call: Eqn) -> list[Any]:
        env = dict(zip(body.invars, invars, strict=True))
        self.run(body, env, call)
        return [lookup(env, var, var) for var in body.outvars]

    def _behind_barrier(self, call: Eqn, invars: list[Atom]) -> list[Any]:
        read = variables(invars)
        behind = iter(self._emit(call, lambda *values: jax.lax.optimization_barrier(values), read))
        return [var if isinstance(var, jex.Literal) else next(behind) for var in invars]

    def _append(self, eqn: Eqn, invars: list[Atom]) -> list[Any]:
        outvars = [jex.Var(var.aval) for var in eqn.outvars]
        eqn = eqn.replace(invars=invars, outvars=outvars)
        self.eqns.append(eqn)
        self._maker.update(dict.fromkeys(outvars, eqn))
        for reached in (self._on_params, self._on_data):
            if any(var in reached for var in variables(invars)):
                reached.update(outvars)
        return outvars

    def _is_over_weights(self, eqn: Eqn, invars: list[Atom]) -> bool:
        n_sliced, _ = scan_sizes(eqn)
        sliced = variables(invars[len(invars) - n_sliced :])
        return any(var in self._on_params and var not in self._on_data for var in sliced)

    def _unrolled(self, eqn: Eqn, body: Jaxpr, invars: list[Atom]) -> list[Any]:
        n_sliced, n_stacked = scan_sizes(eqn)
        n_carry = len(body.outvars) - n_stacked
        n_fixed = len(invars) - n_sliced - n_carry
        fixed, carry, sliced = invars[:n_fixed], invars[n_fixed : n_fixed + n_carry], invars[n_fixed + n_carry :]
        length = eqn.params["length"]
        rows: list[list[Any]] = [[]] * length
        first, start = carry, len(self.eqns)
        for i in reversed(range(length)) if eqn.params["reverse"] else range(length):
            outs = self._call(body, [*fixed, *carry, *(self._row(eqn, x, i) for x in sliced)], eqn)
            carry, rows[i] = outs[:n_carry], outs[n_carry:]
        weights = [var for var in variables(sliced) if var in self._on_params and var not in self._on_data]
        carried = [(a, b) for a, b in zip(first, carry, strict=True) if not isinstance(a, jex.Literal)]
        self.loops.append(Loop(self.eqns[start:], carried, any(map(self._is_stacked, weights))))
        return [*carry, *(self._emit(eqn, lambda *ys: jnp.stack(ys), list(ys))[0] for ys in zip(*rows, strict=True))]

    def _row(self, call: Eqn, stacked: Any, i: int) -> Any:
        """``stacked[i]``; the very value that was stacked there, where it is known."""
        maker = self._maker.get(stacked)
        if maker is not None and maker.primitive.name == "stack" and maker.params["axis"] == 0:
            return maker.invars[i]
        if maker is not None and maker.primitive.name == "transpose":
            axis, *others = maker.params["permutation"]
            stack = self._maker.get(maker.invars[0])
            if stack is not None and stack.primitive.name == "stack" and stack.params["axis"] == axis:
                order = [at - (at > axis) for at in others]
                return self._emit(call, lambda x: jax.lax.transpose(x, order), [stack.invars[i]])[0]
        if maker is not None and maker.primitive.name == "concatenate" and maker.params["dimension"] == 0:
            for part in maker.invars:
                if i < part.aval.shape[0]:
                    return self._row(call, part, i)
                i -= part.aval.shape[0]
        if maker is not None and maker.primitive.name in ("broadcast_in_dim", "reshape"):
            (whole,) = maker.invars
            if stacked.aval.shape == (1, *whole.aval.shape) and _keeps_order(maker):
                return whole
        if maker is not None and maker.primitive.name == "convert_element_type":
            row = self._row(call, maker.invars[0], i)
            (out,) = self._append(maker.replace(outvars=[_like_row(stacked)]), [row])
            return out
        return self._emit(call, lambda x: jax.lax.index_in_dim(x, i, keepdims=False), [stacked])[0]

    def _is_stacked(self, weights: Any) -> bool:
        maker = self._maker.get(weights)
        while maker is not None and maker.primitive.name == "convert_element_type":
            maker = self._maker.get(maker.invars[0])
        return maker is not None and maker.primitive.name in ("stack", "concatenate")

    def _emit(self, call: Eqn, function: Any, invars: list[Atom]) -> list[Any]:
        """Appends the equations of a function of these values."""
        shapes = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in invars]
        return self._call(jax.make_jaxpr(function)(*shapes).jaxpr, invars, call)


def equations(jaxpr: Jaxpr, call: Eqn | None) -> Iterator[Eqn]:
    """The equations of a jaxpr; the name stacks of those of a call begin with the call's."""
    if call is None:
        yield from jaxpr.eqns
        return
    outside = type(call.source_info.name_stack)()
    for name in reversed(list(functions(call))):
        outside = outside.extend(name)
    outside = outside.extend(str(call.params.get("name", call.primitive.name)))
    for eqn in jaxpr.eqns:
        stack = outside + eqn.source_info.name_stack
        yield eqn.replace(source_info=eqn.source_info.replace(name_stack=stack))


def _keeps_order(eqn: Eqn) -> bool:
    """Whether an equation that puts an axis of length 1 in front leaves the others as they are."""
    if eqn.primitive.name == "reshape":
        return eqn.params["dimensions"] is None
    return eqn.params["broadcast_dimensions"] == tuple(range(1, len(eqn.params["shape"])))


def _like_row(stacked: Any) -> Any:
    aval = stacked.aval
    return jex.Var(aval.update(shape=aval.shape[1:]))
