"""How far a run is, as its checkpoint notes it, and whether that is of the network and policy that read it."""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smartfrz_jax.callbacks.base import FreezeEvent
from smartfrz_jax.freezing.by_hand import ByHand
from smartfrz_jax.freezing.coming import Pending
from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.freezing.parts import fit
from smartfrz_jax.layers.layers import Layers
from smartfrz_jax.policies.base import Policy
from smartfrz_jax.pytrees import checkpoint, checks
from smartfrz_jax.pytrees.file_paths import PathLike
from smartfrz_jax.pytrees.types import PyTree

KIND = "training run"


class Progress(NamedTuple):
    """How far a run is, without its arrays.

    Attributes:
        steps: Train steps done.
        frozen: The frozen set.
        by_hand: About which layers the policy does not decide.
        pending: The decision that has not taken effect yet.
        events: What froze when.
        refused: Frozen sets whose programs could not be compiled.
    """

    steps: int
    frozen: Frozen
    by_hand: ByHand
    pending: Pending | None
    events: tuple[FreezeEvent, ...]
    refused: tuple[Frozen, ...]

    def metadata(self, policy: Policy) -> dict[str, Any]:
        """What :meth:`of` and :func:`read_metadata` read: what JSON can hold."""
        return {
            "layers": list(self.frozen.layers.names),
            "frozen": sorted(self.frozen.names),
            "from_start": sorted(self.by_hand.frozen),
            "unfrozen": sorted(self.by_hand.active),
            "policy": dict(policy.options),
            "steps": self.steps,
            "pending": self.pending and [self.pending.due, sorted(self.pending.frozen.names)],
            "events": [[event.step, list(event.names), list(event.returned)] for event in self.events],
            "refused": [sorted(frozen.names) for frozen in self.refused],
        }

    @classmethod
    def of(cls, metadata: Mapping[str, Any], layers: Layers) -> Progress:
        """From the metadata of a checkpoint of a network with these layers."""
        pending = metadata["pending"] and Pending(
            metadata["pending"][0], Frozen(layers, frozenset(metadata["pending"][1]))
        )
        return cls(
            metadata["steps"],
            Frozen(layers, frozenset(metadata["frozen"])),
            # Earlier versions could not unfreeze, nor go on without a program.
            ByHand(frozenset(metadata["from_start"]), frozenset(metadata.get("unfrozen", ()))),
            pending,
            tuple(FreezeEvent(step, tuple(names), tuple(back)) for step, names, back in metadata["events"]),
            tuple(Frozen(layers, frozenset(names)) for names in metadata.get("refused", ())),
        )


def read_metadata(path: PathLike, layers: Layers, policy: Policy) -> dict[str, Any]:
    """What a checkpoint notes of a run, beside its arrays.

    Args:
        path: Directory of the checkpoint.
        layers: Layers of the network that is to go on.
        policy: The policy that is to go on.

    Raises:
        FileNotFoundError: If there is no such directory.
        ValueError: If it is not a complete checkpoint, or of a network with other layers or another policy.
    """
    metadata = checkpoint.read_metadata(path, KIND)
    if metadata["layers"] != list(layers.names):
        differing = sorted(set(metadata["layers"]).symmetric_difference(layers.names))
        raise ValueError(
            f"path: {path} was saved with {len(metadata['layers'])} layers, this network has {len(layers)}; "
            f"in only one of them: {', '.join(differing[:5]) or 'none, but the order differs'}. "
            "Build the network and its layers as for the saved run"
        )
    _check_policy_of(path, metadata.get("policy", {}), json.loads(json.dumps(dict(policy.options))))
    return metadata


def check_run(run: PyTree) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless it is a pytree of what a checkpoint can hold."""
    if not checkpoint.leaves_by_name(run, "run"):
        raise ValueError(
            f"run: got {checks.got(run)}, expected a pytree with arrays: parameters, optimizer state and whatever else "
            "the run goes on with"
        )


def as_precise(path: PathLike, like: PyTree) -> PyTree:
    """What a run can be read in place of: optimizer state and gradients with the precision that was saved.

    Updates may have made that of optimizer state (``opt_state``) higher than an optimizer begins with, see
    :func:`smartfrz_jax.freezing.parts.fit.fits`. Gradients (``grads``, and a policy's ``copies`` of them) have the one
    that the loop gives them.

    Args:
        path: Directory of the checkpoint.
        like: Pytree of arrays or ``jax.ShapeDtypeStruct``, of the structure that was saved.
    """
    notes = checkpoint.notes(path, KIND)

    def precise(keys: Any, leaf: Any) -> Any:
        note = notes.get(jax.tree_util.keystr(keys))
        names = {getattr(key, "name", getattr(key, "key", None)) for key in keys}
        of_grads = not names.isdisjoint(("grads", "copies")) and names.isdisjoint(("params", "model", "opt_state"))
        may_differ = of_grads or "opt_state" in names
        if note is None or not may_differ or not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            return leaf
        if note["dtype"] == str(leaf.dtype) or "value" in note or "numpy" in note:
            return leaf
        saved = jax.ShapeDtypeStruct(tuple(note["shape"]), note["dtype"], sharding=_sharding(leaf))
        return saved if fit.fits(saved, leaf) or (of_grads and fit.fits(leaf, saved)) else leaf

    return jax.tree_util.tree_map_with_path(precise, like)


def _sharding(leaf: Any) -> Any:
    """Where an array is to come that comes in place of another; None if that is not committed."""
    return leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) or leaf.committed else None


def frozen_sets(frozen: Frozen, events: Sequence[FreezeEvent]) -> list[tuple[int, Frozen]]:
    """The frozen sets of a run, in order, each with the number of steps done before.

    Args:
        frozen: The last one.
        events: What froze, and what trained again, until then.

    Example:
        >>> from smartfrz_jax.layers.layers import Layer, Layers
        >>> layers = Layers((Layer("a", ("a",), ("a",)), Layer("b", ("b",), ("b",))))
        >>> events = [FreezeEvent(3, ("a", "b")), FreezeEvent(7, (), ("b",))]
        >>> for steps, frozen in frozen_sets(Frozen(layers, frozenset("a")), events):
        ...     print(steps, sorted(frozen.names))
        0 []
        3 ['a', 'b']
        7 ['a']
    """
    names, sets = frozen.names, dict[int, Frozen]()
    for event in reversed(events):  # of several after one step the last counts
        sets.setdefault(event.step, Frozen(frozen.layers, names))
        names = names - {*event.names} | {*event.returned}
    return sorted(({0: Frozen(frozen.layers, names)} | sets).items(), key=operator.itemgetter(0))


def _check_policy_of(path: PathLike, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` if a checkpoint is of a policy with other options, where both are known."""
    differing = [name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name)]
    if saved and own and differing:
        name = "name" if "name" in differing else min(differing)
        raise ValueError(
            f"path: {path} was saved with the policy {saved.get('name')!r} and {name}={checks.got(saved.get(name))}, "
            f"expected {name}={checks.got(own.get(name))}, as this run's policy {own.get('name')!r} has it "
            f"({len(differing)} options differ); make the policy as for the saved run, or begin a new run from its "
            "weights"
        )


def check_returning(path: PathLike, kept: object) -> None:
    """Raises ``ValueError`` unless a checkpoint is of an optimizer that keeps what it drops as the one at hand does.

    Args:
        path: Directory of the checkpoint.
        kept: What the one at hand keeps; ``None`` if nothing.
    """
    saved, own = (
        "kept" if keeps else "fresh"
        for keeps in (any("kept_version" in name for name in checkpoint.notes(path, KIND)), kept is not None)
    )
    if saved != own:
        raise ValueError(
            f"path: {path} was saved with returning={saved!r}, expected returning={own!r}, as the optimizer at hand "
            f"has it; make it with returning={saved!r}"
        )


def kept_like(path: PathLike) -> dict[str, np.ndarray]:
    """NumPy arrays in whose place :func:`checkpoint.read` reads the optimizer state of a checkpoint's frozen layers.

    Only layers that have trained before have any, which a new run cannot know.

    Args:
        path: Directory of the checkpoint.

    Returns:
        Zeros, by key path in the optimizer's state, of the saved shapes and dtypes; none is held in memory.

    Raises:
        FileNotFoundError: If there is no such directory.
        ValueError: If it is not a complete checkpoint of a training run.
    """
    prefix = "['run']['kept']["
    return {
        ast.literal_eval(name[len(prefix) : -1]): np.broadcast_to(np.zeros((), jnp.dtype(note["dtype"])), note["shape"])
        for name, note in checkpoint.notes(path, KIND).items()
        if name.startswith(prefix)
    }
