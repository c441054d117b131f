"""The operations of one train step, by what they are for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Parts(NamedTuple):
    """Floating-point operations of one step, by what they are for.

    Attributes:
        forward: The forward pass.
        weight_gradients: Gradients of the weights of active layers.
        activation_gradients: Gradients of what is between the layers.
        update: The optimizer.
        added: What XLA adds on this platform, by replacing operations with more expensive ones.
    """

    forward: float = 0.0
    weight_gradients: float = 0.0
    activation_gradients: float = 0.0
    update: float = 0.0
    added: float = 0.0

    def plus(self, more: Iterable[float]) -> Parts:
        """The sum, part by part."""
        return Parts(*(a + b for a, b in zip(self, more, strict=True)))

    @property
    def total(self) -> float:
        """Their sum: what the compiled program counts."""
        return sum(self)

    @property
    def needed(self) -> float:
        """Their sum without what XLA adds."""
        return self.total - self.added


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of one train step.

    Attributes:
        parts: All together.
        by_layer: By layer name, front to back. What is in none, such as scaling the images, is under ``""``.
        by_kind: By kind of operation; see :mod:`smartfrz_jax.cost.kinds`.
    """

    parts: Parts
    by_layer: Mapping[str, Parts]
    by_kind: Mapping[str, Parts]

    @property
    def total(self) -> float:
        """All operations."""
        return self.parts.total

    @property
    def forward_by_layer(self) -> dict[str, float]:
        """Forward FLOPs of every layer by its name, such as for the ``costs`` of :func:`smartfrz_jax.static_prefix`."""
        return {layer: parts.forward for layer, parts in self.by_layer.items() if layer}

    def __str__(self) -> str:
        head = "GFLOP".ljust(16) + "".join(field.replace("_", " ").rjust(22) for field in Parts._fields)
        rows = [(kind, parts) for kind, parts in (*self.by_kind.items(), ("all", self.parts)) if parts.total]
        lines = (kind.ljust(16) + "".join(f"{part / 1e9:22,.6f}" for part in parts) for kind, parts in rows)
        return "\n".join((head, *lines))
