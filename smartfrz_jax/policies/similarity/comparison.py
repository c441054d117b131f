"""Policies that compare layers' outputs with others, at evaluations: all but the rule by which a layer freezes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np

from smartfrz_jax.layers.layers import Layers
from smartfrz_jax.layers.select import Selector, described
from smartfrz_jax.policies.base import Policy, check_finite, check_update, freezable, names_of, require
from smartfrz_jax.policies.two_phase import Readings, TwoPhase
from smartfrz_jax.predictor.cka import layer_similarity
from smartfrz_jax.pytrees import checks, hosts
from smartfrz_jax.pytrees.types import PyTree

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Shaped

    Outputs = Mapping[str, Shaped[Array, "examples ..."]]


class State(Protocol):
    """What the states of these policies have in common."""

    @property
    def cka(self) -> Float[np.ndarray, "window layers"]:
        """CKA of every layer at the last evaluations, oldest first, float32."""
        ...

    @property
    def frozen(self) -> Bool[np.ndarray, " layers"]:
        """Which layers are frozen."""
        ...


_State = TypeVar("_State", bound=State)


@dataclasses.dataclass(frozen=True)
class Comparison(Generic[_State]):
    """When layers' outputs are compared, and with what.

    Attributes:
        name: Name of the policy.
        kind: Type of its states.
        reference: The outputs to compare with, by layer name; or a function that gives them, called when they are.
        evaluate_every: Train steps between evaluations.
        window: Evaluations over which CKA must be flat.
        tolerance: How flat.
        keep: Layers never to freeze.
        judges_frozen: Whether frozen layers go on being judged.
    """

    name: str
    kind: type[_State]
    reference: Outputs | Callable[[], Outputs]
    evaluate_every: int
    window: int
    tolerance: float
    keep: tuple[Selector, ...] | None
    judges_frozen: bool

    def __post_init__(self) -> None:
        checks.count(self.evaluate_every, "evaluate_every")
        checks.count(self.window, "window", least=2)

    def policy(
        self,
        start: Callable[[Float[np.ndarray, "window layers"], Bool[np.ndarray, " layers"]], _State],
        decide: Callable[[_State, Float[np.ndarray, " layers"], Bool[np.ndarray, " layers"]], _State],
    ) -> Policy:
        """The policy.

        Args:
            start: From zeros in the shapes of a state's ``cka`` and ``frozen`` to the first state.
            decide: From a state, every layer's CKA, float32 and zero where it is not judged, and which layers are
                judged to the new state.
        """

        def init(layers: Layers, params: PyTree) -> _State:
            known = _of_layers(self._outputs(), names_of(layers, freezable(layers, self.keep)), "reference")
            checks.finite(hosts.fetch(known), "reference", "take the outputs of a network that has not diverged")
            return start(np.zeros((self.window, len(layers)), np.float32), np.zeros(len(layers), bool))

        def conclude(
            state: _State, layers: Layers, readings: Mapping[str, np.ndarray], *, step: int
        ) -> tuple[frozenset[str], _State]:
            cka, judged = np.zeros(len(layers), np.float32), self._judged(layers, state)
            cka[freezable(layers, self.keep)] = readings["cka"]
            check_finite(layers, judged & ~np.isfinite(cka), what="features", policy=self.name, step=step)
            state = decide(state, np.where(judged, cka, np.float32(0)), judged)
            return names_of(layers, state.frozen), state

        return TwoPhase(self._dispatch, conclude).policy(init, self._options, needs={"features"})

    def _dispatch(
        self, state: _State, layers: Layers, *, step: int, params: Callable[[], PyTree], **signals: Any
    ) -> tuple[frozenset[str], _State, Readings | None]:
        check_update(state, self.kind, layers, step)
        way_out = "pass a function that computes the layers' outputs on the probe batch"
        features = require(signals, "features", self.name, way_out)
        checks.function(features, "features", "a function without arguments that computes the layers' outputs")
        names, readings = names_of(layers, state.frozen), None  # raises, if it is of another network
        if step % self.evaluate_every == 0 and self._judged(layers, state).any():
            # Frozen or not: for each set of layers there would be a program to compile.
            may_freeze = names_of(layers, freezable(layers, self.keep))
            compared = [name for name in layers.names if name in may_freeze]
            now, reference = _of_layers(features(), compared, "features"), self._outputs()
            readings = {"cka": layer_similarity(now, _of_layers(reference, compared, "reference"))}
        return names, state, readings

    def _judged(self, layers: Layers, state: _State) -> Bool[np.ndarray, " layers"]:
        may_freeze = freezable(layers, self.keep)
        return may_freeze if self.judges_frozen else may_freeze & ~state.frozen

    def _outputs(self) -> Outputs:
        return self.reference() if callable(self.reference) else self.reference

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "evaluate_every": int(self.evaluate_every),
            "window": int(self.window),
            "tolerance": float(self.tolerance),
            "keep": described(self.keep),
        }


def _of_layers(outputs: Outputs, names: Iterable[str], argument: str) -> dict[str, Any]:
    """The outputs of some layers.

    Raises:
        TypeError: If they are no mapping.
        ValueError: If a layer's are missing.
    """
    checks.by_name(outputs, argument, "a dict from layer names to outputs")
    missing = sorted(name for name in names if name not in outputs)
    if missing:
        raise ValueError(
            f"{argument}: lacks the output of {len(missing)} layer(s), such as {missing[0]!r}; pass that of every "
            "layer which may freeze, by layer name"
        )
    return {name: outputs[name] for name in names}
