"""Which layers take turns, which always train, and which never do."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np

from smartfrz_jax.layers.blocks import blocks
from smartfrz_jax.layers.layers import Layers, check_layers
from smartfrz_jax.layers.select import Selectors
from smartfrz_jax.policies.base import Policy, check_update, freezable, names_of
from smartfrz_jax.pytrees import checks
from smartfrz_jax.pytrees.types import PyTree

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

# What becomes of the layers in no block: embeddings, last norm, head.
Rest: TypeAlias = Literal["train", "freeze", "turn"]
RESTS = ("train", "freeze", "turn")


class Turns(NamedTuple):
    """The parts of a network that take turns.

    Attributes:
        names: Names of the parts, front to back.
        members: Which layers each holds, bool of shape ``(parts, layers)``; no layer is in two of them.
        always: Layers that always train, bool of shape ``(layers,)``.
    """

    names: tuple[str, ...]
    members: Bool[np.ndarray, "parts layers"]
    always: Bool[np.ndarray, " layers"]

    def frozen(self, trained: Int[np.ndarray, " trained"]) -> Bool[np.ndarray, " layers"]:
        """The layers that are frozen while the parts of these numbers train."""
        return ~(np.logical_or.reduce(self.members[trained], axis=0) | self.always)


class RotatingState(NamedTuple):
    """State of a policy whose sets are known beforehand.

    Attributes:
        frozen: Which layers are frozen now, bool of shape ``(layers,)``.
    """

    frozen: Bool[np.ndarray, " layers"]


def turns_of(layers: Layers, rest: Rest, keep: Selectors | None) -> Turns:
    """The blocks of a network, which take turns, and what becomes of the other layers.

    A block is a numbered module beside others of its name, such as ``blocks/3``. In a network without blocks every
    layer is one.

    Args:
        layers: The network's layers.
        rest: Layers in no block: ``train`` always, ``freeze`` for the whole run, or ``turn``: each is one more block.
        keep: Layers that always train, as of all policies; ``None`` is the head.

    Raises:
        ValueError: If ``keep`` names no layer of the network, or nothing is left to take turns.
    """
    may_freeze = freezable(layers, keep)
    block_of = blocks(layers.names)
    numbered = [name for name in dict.fromkeys(block_of.values()) if re.search(r"\d$", name)]
    stems = [re.sub(r"\d+$", "", name) for name in numbered]
    names = [name for name, stem in zip(numbered, stems, strict=True) if stems.count(stem) > 1]
    if rest == "turn" or not names:
        names = list(dict.fromkeys(block_of.values()))
    members = np.array([[block_of[layer] == name for layer in layers.names] for name in names], bool) & may_freeze
    some = np.logical_or.reduce(members, axis=1)
    if not some.any():
        raise ValueError(
            f"keep: leaves none of the {len(layers)} layers to take turns; keep fewer, or train without a policy"
        )
    others = ~np.logical_or.reduce(members, axis=0)
    always = others if rest == "train" else others & ~may_freeze
    return Turns(tuple(name for name, is_some in zip(names, some, strict=True) if is_some), members[some], always)


def rotating(
    trained: Callable[[int, int], Int[np.ndarray, " trained"]],
    *,
    switch_every: int,
    rest: Rest,
    keep: Selectors | None,
    options: Mapping[str, Any],
) -> Policy:
    """A policy of which the sets are known beforehand.

    Args:
        trained: From the number of a period, from 0, and of the parts to the numbers of the parts that train in it.
        switch_every: Train steps of a period.
        rest: As of :func:`turns_of`.
        keep: As of :func:`turns_of`.
        options: The policy's.
    """

    @functools.lru_cache(maxsize=1)  # a switch may come after every step
    def turns(layers: Layers) -> Turns:
        return turns_of(layers, rest, keep)

    def frozen_at(layers: Layers, step: int) -> np.ndarray:
        parts = turns(layers)
        return parts.frozen(trained(step // switch_every, len(parts.names)))

    def init(layers: Layers, params: PyTree) -> RotatingState:
        check_layers(layers)
        return RotatingState(frozen_at(layers, 0))

    def update(
        state: RotatingState, layers: Layers, *, step: int, params: Callable[[], PyTree], **signals: Any
    ) -> tuple[frozenset[str], RotatingState]:
        check_update(state, RotatingState, layers, step)
        names_of(layers, state.frozen)  # raises, if it is of another network
        state = RotatingState(frozen_at(layers, step))  # the run may have begun between two switches
        return names_of(layers, state.frozen), state

    def start(state: RotatingState, layers: Layers) -> frozenset[str]:
        return names_of(layers, state.frozen)

    return Policy(init, update, options=options, start=start)


def check_turns(switch_every: Any, seed: Any, rest: Any) -> None:
    """Checks the options that these policies share.

    Raises:
        TypeError: If one is of another type.
        ValueError: If one is out of range.
    """
    checks.count(switch_every, "switch_every")
    checks.seed(seed)
    checks.choice(rest, "rest", RESTS)
