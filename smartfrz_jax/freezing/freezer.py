"""Runs a policy beside a training loop: shows it what every step did, and keeps what it decides."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from smartfrz_jax.callbacks.base import Callback, FreezeEvent, tell_step
from smartfrz_jax.freezing import by_hand, saved_run
from smartfrz_jax.freezing.coming import Coming, MinSaving, NotCompiledError, Pending, Prepare, not_known, warn_refused
from smartfrz_jax.freezing.frozen import Frozen, check_frozen
from smartfrz_jax.freezing.summary import Summary, summarise
from smartfrz_jax.layers.layers import Layers, check_layers, check_of_layers, check_params
from smartfrz_jax.layers.select import Selectors
from smartfrz_jax.policies.base import Policy, check_policy
from smartfrz_jax.policies.two_phase import Decisions, outline, restored
from smartfrz_jax.pytrees import checkpoint, checks
from smartfrz_jax.pytrees.file_paths import PathLike
from smartfrz_jax.pytrees.types import PyTree


class Freezer:
    """A policy at work on one network; ``nnx.Freezer`` and ``linen.Freezer`` drive it, other loops use it directly.

    Args:
        policy: The policy.
        layers: The network's layers.
        params: Its parameter pytree at the start of the run.
        step: Number of train steps already done.
        frozen: Layers that are frozen already; they stay so, whatever the policy decides. So do those that are frozen
            by hand later, see :meth:`adopt`; :meth:`unfreeze_layers` lets them train again.
        lead: Steps from a decision to its effect: time in which the program for it can be compiled. What is decided
            meanwhile waits for the next. So a run does not depend on how fast programs are compiled.
        min_saving: Share of a step's FLOPs that a change must save; what saves less is gathered until it does. Layers
            that are to train again do so at once.
        saving: The share that going from the second frozen set to the first saves: an account's ``saving``.

    Attributes:
        frozen: The frozen set from now on.
        events: What froze when, in order.
        refused: Frozen sets on which the policy decided, but whose programs could not be compiled; they are not tried
            again. Of several processes, one that cannot compile a program raises the error.
        policy_state: The policy's state.
        callbacks: What is told of every step and of what freezes; see :mod:`smartfrz_jax.callbacks`.
        delay: Steps, 0 unless set, after which the policy reads what it had the device compute for a decision; ``lead``
            counts from then. With 0 it waits for the step just dispatched, with 2 the device has the next one at hand.
            Policies without ``phases`` (``slimfit``, perhaps your own) wait all the same.

    Raises:
        TypeError: If ``policy`` is not a :class:`~smartfrz_jax.Policy`, ``layers`` no
            :class:`~smartfrz_jax.Layers`, ``frozen`` no :class:`~smartfrz_jax.Frozen` or ``saving`` no function.
        ValueError: If the policy names a layer that the network does not have, ``params`` or ``frozen`` is of another
            network, ``step`` or ``lead`` is no number of steps, or ``min_saving`` is no share or there is
            nothing to predict it with.
    """

    def __init__(
        self,
        policy: Policy,
        layers: Layers,
        params: PyTree,
        *,
        step: int = 0,
        frozen: Frozen | None = None,
        lead: int = 0,
        min_saving: float = 0.0,
        saving: Callable[[Frozen, Frozen], float] | None = None,
    ):
        check_policy(policy)
        check_layers(layers)
        checks.count(step, "step", least=0)
        checks.count(lead, "lead", least=0)
        self._lead, self._min_saving = int(lead), MinSaving(min_saving, saving)
        if frozen is not None:
            check_frozen(frozen, layers)
        check_of_layers(check_params(params), layers)
        self.policy, self.layers = policy, layers
        self._saving_of_names = self._min_saving.of_names(layers)
        self._coming: Coming | None = None
        self.frozen = Frozen(layers) if frozen is None else frozen
        self._by_hand = by_hand.ByHand(self.frozen.names)
        self.events: list[FreezeEvent] = []
        self.refused: tuple[Frozen, ...] = ()
        self.callbacks: tuple[Callback, ...] = ()
        self.policy_state = policy.init(layers, params)
        self.steps, self.delay, self._decisions = int(step), 0, Decisions(policy)
        self._tx: optax.GradientTransformation | None = None
        self._account: Any = None
        self._params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
        self._initial_state = checkpoint.outline(self.policy_state)  # later ones may lack what a checkpoint has

    def observe(
        self,
        params: Callable[[], PyTree],
        *,
        prepare: Prepare | None = None,
        metrics: Mapping[str, Any] | None = None,
        **signals: Any,
    ) -> Frozen:
        """Shows the policy the outcome of one train step.

        Args:
            params: A function without arguments that gives the parameter pytree after the step.
            prepare: Called with a frozen set that will take effect later, so that its program can be compiled. It may
                return a function without arguments that waits for it, as :meth:`smartfrz_jax.TrainStep.prepare` does.
                If that raises, or ``prepare`` itself for want of memory, the frozen set stays as it is, with a
                ``RuntimeWarning``, and the decision is among those ``refused``.
            metrics: Scalars by name, for the callbacks; they get the loss, and the number of layers that the step had
                frozen, without it.
            **signals: Further signals, see ``smartfrz_jax.policies.base.UpdateFn``.

        Returns:
            The frozen set from now on: the same object if nothing changed.

        Raises:
            TypeError: If ``params`` or ``prepare`` is no function, or the policy does not return names of layers and
                its state.
            ValueError: If it names a layer that the network does not have.
        """
        checks.function(params, "params", "a function without arguments that gives the parameters after the step")
        if prepare is not None:
            checks.function(prepare, "prepare", "a function of the frozen set that will take effect")
        checks.loss(signals.get("loss"))
        if metrics is not None:
            checks.by_name(metrics, "metrics", "a mapping from names to scalars")
        self.steps += 1
        tell_step(self.callbacks, self.steps, len(self.frozen.names), signals.get("loss"), metrics)
        shown = {"step": self.steps, "params": params, "frozen": self._by_hand.frozen}
        shown |= {"saving": self._saving_of_names} | signals
        names, self.policy_state = self._decisions(self.policy_state, self.layers, self.delay, **shown)
        names, self._by_hand = self._by_hand.decide(names)
        if self.pending is None and names != self.frozen.names:
            wanted = Frozen(self.layers, frozenset(self.layers.check(names, "policy's decision")))
            if wanted not in self.refused and self._min_saving.allows(wanted, self.frozen):
                self._coming = Coming(Pending(self.steps + self._lead, wanted), is_prepared=self._lead == 0)
        if self._coming is not None:
            coming = self._coming.pending.frozen
            try:
                if self._coming.is_due(self.steps, prepare):
                    self._take_effect(coming)
            except NotCompiledError as error:
                self._coming = None  # layers must not be frozen in name, and trained by the program that there is
                self.refused += (coming,)
                warn_refused(coming, self.frozen, self.steps, error.__cause__)
        return self.frozen

    def start(self) -> Frozen:
        """Freezes what the policy has frozen from the beginning, such as ``lisa`` most blocks: call it before a run.

        Else the first step trains all layers, unless the optimizer was made for the policy, with ``frozen=policy``.

        Returns:
            The frozen set from now on; unchanged in a run that has begun.
        """
        if self.policy.start is not None and not self.steps and not self.events:
            names, self._by_hand = self._by_hand.decide(by_hand.starting(self.policy, self.policy_state, self.layers))
            self.frozen = Frozen(self.layers, self._by_hand.frozen)  # what an optimizer began with is an event, too
            self._change_now(Frozen(self.layers, names), None)
        return self.frozen

    def sets_to_come(self, steps: int) -> list[Frozen]:
        """The frozen sets of the next steps, in order, each once: known of policies that do not look at the network.

        Raises:
            ValueError: If the policy does, or ``steps`` is no number of steps.
        """
        checks.count(steps, "steps")
        if self.policy.needs:
            not_known()
        other = copy.copy(self)  # its own of what changes in place
        other.events, other.callbacks, other._decisions = [], (), Decisions(self.policy)
        other._coming = self.pending and Coming(self.pending)
        return list(dict.fromkeys([self.frozen, *(other.observe(not_known) for _ in range(steps))]))

    def _begin(self, names: frozenset[str]) -> None:
        """Leaves layers to the policy for which an optimizer was made without state for them."""
        self._by_hand = by_hand.begun(self.policy, self.policy_state, self.frozen, names, self.steps)

    @property
    def pending(self) -> Pending | None:
        """What will take effect next, if anything."""
        return None if self._coming is None else self._coming.pending

    def adopt(self, frozen: Frozen) -> None:
        """Takes over what was frozen by hand since the last step: it stays so, as what was frozen at the start.

        Args:
            frozen: The frozen set with which the loop works.

        Raises:
            ValueError: If it is of another network, or layers train that the freezer has frozen.
        """
        by_hand.check_adopted(frozen, self.frozen)
        if frozen == self.frozen:
            return
        names = frozen.names - self.frozen.names
        self._by_hand = self._by_hand.freeze(names)
        self._change_now(frozen, None if self.pending is None else self.pending.frozen.names | names)

    def unfreeze_layers(self, names: Selectors | None = None) -> Frozen:
        """Lets layers train again, at once: the opposite of :meth:`adopt`.

        They train for as long as the policy goes on naming them. They freeze again if it lets go of them after some
        step and names them anew, or by hand. About other layers it decides as before.

        Args:
            names: The layers, as of :func:`smartfrz_jax.layers.select.select`; a pending freeze of some is taken
                back. ``None`` takes back the last freeze of which something is frozen still.

        Returns:
            The frozen set from now on.

        Raises:
            TypeError: If ``names`` selects no layers.
            ValueError: If one of ``names`` is not a layer of the network, or ``None`` finds no freeze in this run.

        Example:
            >>> import jax.numpy as jnp
            >>> import smartfrz_jax as sfj
            >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
            >>> forward = lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"]
            >>> layers = sfj.find_layers(params, forward, jnp.ones((1, 2)))
            >>> freezer = sfj.Freezer(sfj.static_prefix([(0.0, 0.5)], total_steps=10), layers, params)
            >>> freezer.observe(lambda: params)
            <Frozen: 1 of 2 layers: 'a'>
            >>> freezer.unfreeze_layers()
            <Frozen: 0 of 2 layers>
        """
        back = by_hand.to_unfreeze(names, self.frozen, self.events)
        self._by_hand = self._by_hand.unfreeze(back)
        pending = None if self.pending is None else self.pending.frozen.names - back
        self._change_now(Frozen(self.layers, self.frozen.names - back), pending)
        return self.frozen

    def _change_now(self, frozen: Frozen, pending: frozenset[str] | None) -> None:
        """Changes the frozen set by hand; ``pending`` is what of a pending decision remains."""
        due, self._coming = self.pending, None
        if frozen != self.frozen:
            self._take_effect(frozen)
        if due is not None and pending is not None and pending != self.frozen.names:
            self._coming = Coming(Pending(due.due, Frozen(self.layers, pending)))

    def summary(self, *, tx: optax.GradientTransformation | None = None, account: Any = None) -> Summary:
        """What is frozen, since when (by hand: since the next step), and what that saves, as a table.

        Args:
            tx: The optimizer, as it was given to ``freeze``, for the bytes of its state; by default that of the door.
            account: A :class:`~smartfrz_jax.Account`, for the share of a step's FLOPs; by default the train step's.

        Raises:
            TypeError: If ``tx`` is no transformation, or ``account`` no account.
            ValueError: If the account is of another network.
        """
        since = dict.fromkeys(self.frozen.names, 0)
        for event in self.events:
            since |= {name: event.step for name in event.names if name in since}
        return summarise(
            self.frozen,
            self._params,
            tx=self._tx if tx is None else tx,
            account=self._account if account is None else account,
            since=since,
            step=self.steps,
            pending=None if self.pending is None else (self.pending.due, len(self.pending.frozen.names)),
        )

    def _take_effect(self, frozen: Frozen) -> None:
        before, after = self.frozen.names, frozen.names
        names, returned = (
            tuple(n for n in self.layers.names if n in some) for some in (after - before, before - after)
        )
        self.events.append(FreezeEvent(self.steps, names, returned))
        self.frozen, self._coming = frozen, None
        for callback in self.callbacks:
            callback.on_freeze(self.events[-1])

    def save_run(self, path: PathLike, run: PyTree, *, overwrite: bool = False) -> None:
        """Writes a pytree of the run's arrays together with the policy's state and the frozen set.

        Args:
            path: Directory to make.
            run: Pytree of arrays: parameters, optimizer state, whatever else the run goes on with.
            overwrite: Whether to replace a checkpoint that is there.

        Raises:
            FileExistsError: If ``path`` exists and ``overwrite`` is false.
            TypeError: If ``run`` or the policy's state holds what is neither an array nor a number.
            ValueError: If ``run`` holds nothing.
        """
        checkpoint.write(path, *self._of_run(run), overwrite=overwrite)

    def run_contents(self, run: PyTree) -> checkpoint.Contents:
        """What :meth:`save_run` writes, and raises, for ``orbax.checkpoint.v1.training.Checkpointer.save_async``."""
        return checkpoint.contents(*self._of_run(run))

    def _of_run(self, run: PyTree) -> tuple[PyTree, str, dict[str, Any]]:
        """The tree, the kind and the metadata of a checkpoint."""
        saved_run.check_run(run)
        progress = saved_run.Progress(
            self.steps, self.frozen, self._by_hand, self.pending, tuple(self.events), self.refused
        )
        tree, metadata = {"run": run, "policy": self.policy_state}, progress.metadata(self.policy)
        if asked := self._decisions.metadata():
            tree, metadata = tree | {"readings": self._decisions.arrays()}, metadata | {"readings": asked}
        return tree, saved_run.KIND, metadata

    def saved_frozen(self, path: PathLike) -> Frozen:
        """The frozen set of a checkpoint, which the arrays given to :meth:`restore_run` must have the structure of.

        Raises:
            FileNotFoundError: If there is no such directory.
            ValueError: If it is not a complete checkpoint, or of a network with other layers or another policy.
        """
        metadata = saved_run.read_metadata(path, self.layers, self.policy)
        return Frozen(self.layers, frozenset(metadata["frozen"]))

    def restore_run(self, path: PathLike, run: PyTree) -> PyTree:
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
        saved_run.check_run(run)
        self.saved_frozen(path)  # raises, if it does not fit
        policy = checkpoint.with_dropped(path, self._initial_state, saved_run.KIND, prefix="['policy']")
        metadata = checkpoint.read_metadata(path, saved_run.KIND)
        asked = metadata.get("readings", [])
        like = saved_run.as_precise(path, {"run": run, "policy": policy}) | (
            {"readings": outline(asked)} if asked else {}
        )
        saved = checkpoint.read(path, like, saved_run.KIND)
        progress = saved_run.Progress.of(metadata, self.layers)
        self._decisions.readings = restored(asked, saved.get("readings", []))
        self.policy_state, self.steps, self.frozen = saved["policy"], progress.steps, progress.frozen
        self._by_hand, self.refused, self.events = progress.by_hand, progress.refused, list(progress.events)
        self._coming = None if progress.pending is None else Coming(progress.pending)
        return saved["run"]
