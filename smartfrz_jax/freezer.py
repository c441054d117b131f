"""Runs a policy beside a training loop: shows it what every step did, and keeps what it decides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from smartfrz_jax import checkpoint
from smartfrz_jax.freezing import Frozen
from smartfrz_jax.layers import Layers
from smartfrz_jax.policies.base import Policy

PyTree = Any

_KIND = "training run"


class FreezeEvent(NamedTuple):
    """Layers that froze at the same moment.

    Attributes:
        step: Number of train steps done before.
        names: Names of the layers, front to back.
    """

    step: int
    names: tuple[str, ...]


class Freezer:
    """A policy at work on one network.

    The front doors ``smartfrz_jax.nnx.Freezer`` and ``smartfrz_jax.linen.Freezer`` drive it from a training loop; use
    it directly in a loop of another form.

    Args:
        policy: The policy.
        layers: The network's layers.
        params: Its parameter pytree at the start of the run.
        step: Number of train steps already done.
        frozen: Layers that are frozen already; they stay so, whatever the policy decides.

    Attributes:
        frozen: The frozen set from now on.
        events: What froze when, in order.
        policy_state: The policy's state.

    Raises:
        TypeError: If ``policy`` is not a :class:`~smartfrz_jax.Policy`.
        ValueError: If the policy names a layer that the network does not have.
    """

    def __init__(self, policy: Policy, layers: Layers, params: PyTree, *, step: int = 0, frozen: Frozen | None = None):
        if not isinstance(policy, Policy):
            raise TypeError(
                f"policy: got {type(policy).__name__}, expected a smartfrz_jax.Policy such as smartfrz(...)"
            )
        self.policy = policy
        self.layers = layers
        self.steps = step
        self.frozen = Frozen(layers) if frozen is None else frozen
        self._from_start = self.frozen.names
        self.events: list[FreezeEvent] = []
        self.policy_state = policy.init(layers, params)

    def observe(self, params: Callable[[], PyTree], **signals: Any) -> Frozen:
        """Shows the policy the outcome of one train step.

        Args:
            params: A function without arguments that gives the parameter pytree after the step.
            **signals: Further signals, see ``smartfrz_jax.policies.base.UpdateFn``.

        Returns:
            The frozen set from now on: the same object if nothing changed.
        """
        self.steps += 1
        names, self.policy_state = self.policy.update(
            self.policy_state, self.layers, step=self.steps, params=params, **signals
        )
        names = names | self._from_start
        if names != self.frozen.names:
            new = self.layers.check(names, "policy's decision")
            self.events.append(FreezeEvent(self.steps, tuple(name for name in new if name not in self.frozen.names)))
            self.frozen = Frozen(self.layers, frozenset(names))
        return self.frozen

    def save_run(self, path: str | Path, run: PyTree, *, overwrite: bool = False) -> None:
        """Writes a pytree of the run's arrays together with the policy's state and the frozen set.

        Args:
            path: Directory to make.
            run: Pytree of arrays: parameters, optimizer state, whatever else the run goes on with.
            overwrite: Whether to replace a checkpoint that is there.

        Raises:
            FileExistsError: If ``path`` exists and ``overwrite`` is false.
        """
        metadata = {
            "layers": list(self.layers.names),
            "frozen": sorted(self.frozen.names),
            "from_start": sorted(self._from_start),
            "steps": self.steps,
            "events": [[event.step, list(event.names)] for event in self.events],
        }
        checkpoint.write(path, {"run": run, "policy": self.policy_state}, _KIND, metadata, overwrite=overwrite)

    def saved_frozen(self, path: str | Path) -> Frozen:
        """The frozen set of a checkpoint, which the arrays given to :meth:`restore_run` must have the structure of.

        Raises:
            FileNotFoundError: If there is no such directory.
            ValueError: If it is not a complete checkpoint, or of a network with other layers.
        """
        metadata = checkpoint.read_metadata(path, _KIND)
        if metadata["layers"] != list(self.layers.names):
            differing = sorted(set(metadata["layers"]).symmetric_difference(self.layers.names))
            raise ValueError(
                f"path: {path} was saved with {len(metadata['layers'])} layers, this network has {len(self.layers)}; "
                f"in only one of them: {', '.join(differing[:5]) or 'none, but the order differs'}. "
                "Build the network and its layers as for the saved run"
            )
        return Frozen(self.layers, frozenset(metadata["frozen"]))

    def restore_run(self, path: str | Path, run: PyTree) -> PyTree:
        """Reads what :meth:`save_run` wrote; the policy goes on from where it was.

        Args:
            path: Directory of the checkpoint.
            run: Pytree of arrays or ``jax.ShapeDtypeStruct``, of the structure that was saved.

        Returns:
            The saved arrays.

        Raises:
            FileNotFoundError: If there is no such directory.
            ValueError: If the checkpoint is damaged or does not fit; nothing has changed then.
        """
        frozen = self.saved_frozen(path)
        policy = checkpoint.with_dropped(path, self.policy_state, _KIND, prefix="['policy']")
        saved = checkpoint.read(path, {"run": run, "policy": policy}, _KIND)
        metadata = checkpoint.read_metadata(path, _KIND)
        self.frozen, self.policy_state, self.steps = frozen, saved["policy"], metadata["steps"]
        self._from_start = frozenset(metadata["from_start"])
        self.events = [FreezeEvent(step, tuple(names)) for step, names in metadata["events"]]
        return saved["run"]
