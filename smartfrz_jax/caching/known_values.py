"""Which values of a loss depend on frozen layers and the batch alone, the same in every epoch; why others do not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jax.extend import core as jex

from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.jaxprs import example_axis, flops, inline
from smartfrz_jax.jaxprs.example_axis_rules import Axis, Mixed, Value
from smartfrz_jax.jaxprs.partial_inline import Roles
from smartfrz_jax.jaxprs.parts import Eqn, Var, variables

# Cheap enough to be computed again, beside what works element by element.
# fmt: off
_CHEAP = flops.ELEMENTWISE | flops.FREE | flops.REDUCTIONS | {
    "argmax", "argmin", "cumsum", "erfc", "gather", "integer_pow", "logistic", "reduce_window_max", "reduce_window_min",
    "reduce_window_sum", "top_k", "unstack",
}
# fmt: on
_LOOPS = frozenset({"scan", "while", "cond"})
_EVALUATION_MODE = (
    "run frozen layers in evaluation mode (BatchNorm with its running statistics, no dropout), as "
    "smartfrz_jax.nnx.Optimizer and smartfrz_jax.linen.hold do"
)


class KnownValues:
    """What is known about every value: whether it trains, which axis counts the examples, or why it cannot be kept."""

    def __init__(self, roles: Roles, why: Mapping[Any, str], layer: Mapping[Any, str | None], frozen: Frozen):
        self.values = {var: Value(Axis(0)) for var in roles.data} | dict.fromkeys(roles.frozen, Value())
        self.live = set(roles.live)
        self._blocked = {var: f"depends on {text}" for var, text in why.items()}
        self._weights, self._data, self._batch = set(roles.frozen), {*roles.data, *roles.varying}, set(roles.data)
        ranks = {name: rank for rank, name in enumerate(frozen.layers.names)}
        self._frozen = frozen
        self._rank = {var: ranks[name] for var, name in layer.items() if name is not None}

    def follow(self, eqn: Eqn) -> None:
        """Adds what is known about the results of an equation.

        Raises:
            ValueError: If a frozen layer works on values that cannot be kept.
        """
        ins = variables(eqn.invars)
        ranks = [self._rank[var] for var in ins if var in self._rank and var not in self._data]
        rank = max(ranks or [self._rank[var] for var in ins if var in self._rank], default=-1)
        self._rank.update(dict.fromkeys(eqn.outvars, rank) if rank >= 0 else {})
        for reached in (self._weights, self._data, self._batch):
            if any(var in reached for var in ins):
                reached.update(eqn.outvars)
        if any(var in self.live for var in ins):
            self.live.update(eqn.outvars)
            return
        reason = next((self._blocked[var] for var in ins if var in self._blocked), None)
        if reason is None:
            try:
                values = example_axis.outputs(eqn, example_axis.read(self.values, eqn.invars))
                self.values.update(zip(eqn.outvars, values, strict=True))
                return
            except Mixed as error:
                reason = f"{self._layer(rank)}{eqn.primitive.name}: {error}"
        elif self.is_expensive(eqn) and any(var in self._weights and var not in self._data for var in ins):
            raise ValueError(
                f"loss_fn: activations of the frozen layers cannot be kept, because {self._layer(rank)}works on what "
                f"is not the same for an example every time ({reason}); {_EVALUATION_MODE}, and leave augmentation to "
                "the loader"
            )
        self._blocked.update(dict.fromkeys(eqn.outvars, reason))

    def check_updates(self, updates: Iterable[tuple[str, Any]], owner: Mapping[str, str | None]) -> None:
        """Raises if a variable of a frozen layer is changed to something that depends on the batch."""
        for name, var in updates:
            layer = owner.get(name)
            if layer in self._frozen.names and not isinstance(var, jex.Literal) and var in self._batch:
                raise ValueError(
                    f"loss_fn: changes {name!r}, a variable of the frozen layer {layer!r}, in every step, which a "
                    f"step without that layer would not do; {_EVALUATION_MODE}"
                )

    def is_frozen(self, eqn: Eqn) -> bool:
        """Whether an equation can be run once for all epochs."""
        return all(var in self.values for var in eqn.outvars)

    def has_axis(self, var: Var) -> bool:
        """Whether a value is the same for an example every time, and can be kept for each."""
        return var in self.values and self.values[var].axis is not None

    def is_expensive(self, eqn: Eqn) -> bool:
        """Whether an equation must not be computed again."""
        if eqn.primitive.name in _CHEAP:
            return False
        body = inline.body_of(eqn)
        if eqn.primitive.name in _LOOPS or not hasattr(body, "eqns") or flops.macs(eqn) > 0:
            return True
        return any(self.is_expensive(inner) for inner in body.eqns)

    def _layer(self, rank: int) -> str:
        return f"layer {self._frozen.layers.names[rank]!r}, " if rank >= 0 else ""
