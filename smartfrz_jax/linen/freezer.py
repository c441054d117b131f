"""Lets a policy freeze the layers of a functional loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from smartfrz_jax.callbacks.base import Callback, check_callbacks
from smartfrz_jax.freezing import freezer
from smartfrz_jax.freezing.coming import wait_for_all
from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.freezing.saved_run import check_returning, kept_like
from smartfrz_jax.layers.select import Selectors
from smartfrz_jax.linen.train_state import TrainState
from smartfrz_jax.policies.base import Policy, check_features, check_policy
from smartfrz_jax.programs import arguments
from smartfrz_jax.programs.train_step import TrainStep
from smartfrz_jax.pytrees import checks
from smartfrz_jax.pytrees.checkpoint import Contents
from smartfrz_jax.pytrees.file_paths import PathLike


class Freezer(freezer.Freezer):
    """Lets a policy freeze the layers of a functional loop: call :meth:`step` after every train step.

    Args:
        state: The :class:`TrainState` at the start.
        policy: The policy.
        features: A function of the state to the layers' outputs on a probe batch (see
            :func:`smartfrz_jax.layer_outputs`), for policies that compare representations.
        train_step: The step, to have the program for what is decided compiled ahead.
        lead: Steps from a decision to its effect; see :class:`smartfrz_jax.Freezer`.
        min_saving: Share of a step's FLOPs that a change must save; the train step's account predicts it.
        callbacks: What is told of every step and of what freezes; see :mod:`smartfrz_jax.callbacks`.

    Raises:
        TypeError: If ``state`` is a plain Flax ``TrainState``, or ``policy`` not a policy.
        ValueError: If the policy needs gradients and the state does not keep them, or the state was created for a
            policy that has other layers frozen from the beginning.
    """

    def __init__(
        self,
        state: TrainState,
        policy: Policy,
        *,
        features: Callable[[Any], dict[str, jax.Array]] | None = None,
        train_step: TrainStep | None = None,
        lead: int = 0,
        min_saving: float = 0.0,
        callbacks: Iterable[Callback] = (),
    ):
        if not isinstance(state, TrainState):
            raise TypeError(
                f"state: got {type(state).__module__}.{type(state).__name__}, expected a smartfrz_jax.linen.TrainState"
                "; make it in place of Flax's, with layers=find_layers(...)"
            )
        check_policy(policy)
        check_features(policy, features)
        checks.instance(train_step, TrainStep | None, "train_step", "a TrainStep")
        account = None if train_step is None else train_step.account
        super().__init__(
            policy,
            state.frozen.layers,
            state.params,
            step=int(state.step),
            frozen=state.frozen,
            lead=lead,
            min_saving=min_saving,
            saving=None if account is None else account.saving,
        )
        self._begin(state.frozen_by_policy)
        self.callbacks = check_callbacks(callbacks)
        self._tx, self._account = state.unfrozen_tx, account
        if "grads" in policy.needs and not state.keep_grads:
            raise ValueError(
                "state: the policy looks at gradients and the state drops them; create it with keep_grads=True"
            )
        self._features = features
        self._train_step = train_step

    def start(self, state: TrainState) -> TrainState:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Freezes what the policy has frozen from the beginning; see :meth:`smartfrz_jax.Freezer.start`.

        Layers that were frozen by hand since the freezer was made stay so.

        Args:
            state: The state before the first step.

        Returns:
            The state to go on with.
        """
        checks.instance(state, TrainState, "state", "the smartfrz_jax.linen.TrainState before the first step")
        by_hand = state.frozen.names - self.frozen.names
        super().start()
        self._by_hand = self._by_hand.freeze(by_hand)  # also of what the policy has frozen from the beginning
        self.adopt(Frozen(self.layers, self.frozen.names | by_hand))
        return state.freeze(self.frozen)

    def compile_ahead(self, state: TrainState, steps: int) -> Callable[[], None]:
        """Begins to compile the programs for all frozen sets of the next steps.

        See :meth:`smartfrz_jax.nnx.Freezer.compile_ahead`, also for what it returns and raises.

        Args:
            state: The state as it is.
            steps: Train steps.
        """
        checks.instance(state, TrainState, "state", "the smartfrz_jax.linen.TrainState as it is")
        step: Any = self._train_step
        checks.instance(step, TrainStep, "train_step", "a TrainStep; give the freezer the loop's")
        new = [_abstract(state, each) for each in self.sets_to_come(steps)]
        return functools.partial(wait_for_all, [step.prepare(state, one) for one in new])

    def step(
        self, state: TrainState, *, loss: jax.Array | None = None, metrics: Mapping[str, Any] | None = None
    ) -> TrainState:
        """Shows the policy the train step just done, and freezes what it decides.

        Layers that were frozen by hand since the last call stay frozen, whatever the policy decides.

        Args:
            state: The state after the step.
            loss: Loss of the step, for policies that look at it; NaN for one that was skipped, which is left out.
            metrics: Further scalars by name, for the callbacks.

        Returns:
            The state to go on with.

        Raises:
            TypeError: If it is called in a compiled function, or ``loss`` is no number.
            ValueError: If layers train that the freezer has frozen: the state is not the one that it returned.
        """
        checks.instance(state, TrainState, "state", "the smartfrz_jax.linen.TrainState after the step")
        checks.outside_jit(state.step, "state")
        self.adopt(state.frozen)
        make_features, train_step = self._features, self._train_step
        return state.freeze(
            self.observe(
                lambda: state.params,
                prepare=None if train_step is None else lambda new: train_step.prepare(state, _abstract(state, new)),
                metrics=metrics,
                loss=loss,
                grads=state.grads if state.keep_grads else None,
                features=None if make_features is None else lambda: make_features(state),
            )
        )

    def unfreeze(self, state: TrainState, names: Selectors | None = None) -> TrainState:
        """Lets layers train again, at once; see :meth:`smartfrz_jax.Freezer.unfreeze_layers`.

        Args:
            state: The state as it is.
            names: The layers; ``None`` takes back the last freeze.

        Returns:
            The state to go on with.

        Raises:
            TypeError: If ``names`` selects no layers.
            ValueError: If one of ``names`` is not a layer of the network, ``None`` finds no freeze in this run, or as
                in :meth:`step`.
        """
        checks.instance(state, TrainState, "state", "the smartfrz_jax.linen.TrainState as it is")
        self.adopt(state.frozen)
        return state.freeze(self.unfreeze_layers(names))

    def save(self, path: PathLike, state: TrainState, *, overwrite: bool = False) -> None:
        """Writes the state, the policy's state and the frozen set as one Orbax checkpoint.

        Raises:
            FileExistsError: If ``path`` exists and ``overwrite`` is false.
            TypeError: If the policy's state holds what is neither an array nor a number.
            ValueError: As in :meth:`step`.
        """
        checks.instance(state, TrainState, "state", "the smartfrz_jax.linen.TrainState to save")
        self.adopt(state.frozen)
        self.save_run(path, _run(state), overwrite=overwrite)

    def contents(self, state: TrainState) -> Contents:
        """What :meth:`save` writes, for a manager of Orbax's checkpoints that saves beside the training loop.

        Args:
            state: The state to save.

        Returns:
            ``state``, arrays by name, and ``custom_metadata``: arguments of
            ``orbax.checkpoint.v1.training.Checkpointer.save_async``; :meth:`restore` reads what it writes.

        Raises:
            TypeError: As in :meth:`save`.
            ValueError: As in :meth:`save`.
        """
        checks.instance(state, TrainState, "state", "the smartfrz_jax.linen.TrainState to save")
        self.adopt(state.frozen)
        return self.run_contents(_run(state))

    def restore(self, path: PathLike, state: TrainState) -> TrainState:
        """Reads a checkpoint; the run goes on as if it had never stopped.

        Args:
            path: Directory of the checkpoint.
            state: A state of the same network and optimizer, for instance a new one.

        Raises:
            FileNotFoundError: If there is no such directory.
            ValueError: If the checkpoint is damaged, or of another network.
        """
        checks.instance(state, TrainState, "state", "a smartfrz_jax.linen.TrainState of the network and the optimizer")
        kept = state.kept
        check_returning(path, kept)
        if kept is None:
            return self.restore_run(path, state.freeze(self.saved_frozen(path)))
        with kept.unchanged_on_error():
            state = state.replace(kept_version=kept.current(state.kept_version))  # it need not be the last of its run
            like = {"state": state.freeze(self.saved_frozen(path)), "kept": kept_like(path)}
            saved = self.restore_run(path, like)
        kept.load(saved["state"].kept_version, saved["kept"])
        return saved["state"]


def _run(state: TrainState) -> Any:
    """What a checkpoint holds."""
    return state if state.kept is None else {"state": state, "kept": state.kept.arrays}


def _abstract(state: TrainState, frozen: Frozen) -> TrainState:
    """The state as it will be with another frozen set, with shapes, and where they lie, in place of arrays."""
    shapes = jax.eval_shape(lambda state: state.freeze(frozen), state)
    return arguments.placed(shapes, state, state.params)
