"""A ``TrainState`` with a frozen set."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.training import train_state

from smartfrz_jax.freezing import migrate, overwritten, transform
from smartfrz_jax.freezing.by_hand import beginning
from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.freezing.returning import Kept, Returning, make_kept
from smartfrz_jax.layers.layers import Layers, check_layers, check_params
from smartfrz_jax.layers.select import Selectors
from smartfrz_jax.linen.hold import hold
from smartfrz_jax.policies.base import Policy
from smartfrz_jax.pytrees import checks
from smartfrz_jax.pytrees.types import PyTree


class TrainState(train_state.TrainState):
    """Flax's ``TrainState`` with a frozen set, which is static: ``jax.jit`` makes one program for each.

    Subclass it to hold more, for example ``batch_stats``.

    Attributes:
        frozen: The frozen set.
        unfrozen_tx: The optax transformation as it was given; ``tx`` is that one for the active layers.
        grads: Gradients of the active layers in the last step by parameter name, if ``keep_grads``.
        keep_grads: Whether ``grads`` is kept, for policies that look at gradients.
        kept: What the optimizer held of the frozen layers when they froze, for their return; ``None`` if they are to
            return with fresh optimizer state. It belongs to the run and is on the host: of the states of one run, only
            the last that froze something or let it return can do so again.
        kept_version: Which contents of ``kept`` go with this state.
        frozen_by_policy: Names of the layers that are frozen from the beginning, if it was created for a policy.

    Example:
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
        >>> apply_fn = lambda params, x: x @ params["a"]["kernel"] @ params["b"]["kernel"]
        >>> layers = find_layers(params, apply_fn, jnp.ones((1, 2)))
        >>> state = TrainState.create(apply_fn=apply_fn, params=params, tx=optax.adam(1e-3), layers=layers)
        >>> state = state.freeze(["a"])
        >>> @jax.jit
        ... def train_step(state, x):
        ...     loss, grads = state.value_and_grad(lambda params: (state.apply_fn(params, x) ** 2).mean())(state.params)
        ...     return state.apply_gradients(grads=grads), loss
        >>> state, loss = train_step(state, jnp.ones((1, 2)))
    """

    frozen: Frozen = struct.field(pytree_node=False, kw_only=True)
    unfrozen_tx: optax.GradientTransformation = struct.field(pytree_node=False, kw_only=True)
    keep_grads: bool = struct.field(pytree_node=False, kw_only=True, default=False)
    grads: dict[str, jax.Array] = struct.field(kw_only=True, default_factory=dict)
    kept: Kept | None = struct.field(pytree_node=False, kw_only=True, default=None)
    kept_version: jax.Array | None = struct.field(kw_only=True, default=None)
    frozen_by_policy: frozenset[str] = struct.field(pytree_node=False, kw_only=True, default=frozenset())

    @classmethod
    def create(
        cls,
        *,
        apply_fn: Callable[..., Any],
        params: PyTree,
        tx: optax.GradientTransformation,
        layers: Layers,
        keep_grads: bool = False,
        returning: Returning = "fresh",
        frozen: Frozen | Selectors | Policy = (),
        **kwargs: Any,
    ) -> TrainState:
        """A state at step 0.

        Args:
            apply_fn: Usually ``model.apply``.
            params: Parameter pytree.
            tx: Any optax transformation; clipping, weight decay and the like belong inside.
            layers: The layers of ``params``, from :func:`find_layers`, or :func:`smartfrz_jax.find_layers`.
            keep_grads: Whether to keep each step's gradients in ``grads``, which some policies need.
            returning: What the optimizer starts from for layers that train again: ``"fresh"`` state, or what it
                ``"kept"`` of them, on the host, from the moment at which they froze. See
                :class:`smartfrz_jax.freezing.returning.Kept`, above all for Adam.
            frozen: What is frozen before the first step, so that no optimizer state is made for it: layers, as of
                :meth:`freeze`; or the policy of the run, such as ``lisa``, for what it has frozen from the beginning.
            **kwargs: Further fields, of a subclass.

        Raises:
            TypeError: If ``frozen`` is neither layers nor a policy.
            ValueError: If a parameter belongs to none of the layers, one of ``frozen`` is not a layer of the network,
                or ``returning`` is unknown.
        """
        if apply_fn is not None:
            checks.function(apply_fn, "apply_fn", "a function, such as model.apply, or None")
        checks.transformation(tx)
        check_layers(layers)
        check_params(params)
        checks.flag(keep_grads, "keep_grads")
        kept = make_kept(returning)
        frozen, frozen_by_policy = beginning(frozen, layers, params)
        frozen_tx = transform.freeze(tx, overwritten.optimized_frozen(frozen))
        leaves = frozen.active_leaves(params) if keep_grads else {}
        grads = {name: jnp.zeros_like(leaf) for name, leaf in leaves.items()}
        return cls(
            step=jnp.zeros((), jnp.int32),
            apply_fn=apply_fn,
            params=params,
            tx=frozen_tx,
            opt_state=frozen_tx.init(overwritten.optimized(params)),
            frozen=frozen,
            frozen_by_policy=frozen_by_policy,
            unfrozen_tx=tx,
            keep_grads=keep_grads,
            grads=grads,
            kept=kept,
            kept_version=None if kept is None else jnp.zeros((), jnp.int32),
            **kwargs,
        )

    def with_frozen(self, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
        """``loss_fn`` with the frozen set in it, for any function that differentiates.

        ``stop_gradient`` is on the parameters of frozen layers, and their Linen modules run in evaluation mode: their
        BatchNorms use and keep their running statistics, and the dropouts that follow them are off. Whatever else they
        assign to variables is taken back; see :func:`hold`.

        Args:
            loss_fn: A function of ``(params, *args, **kwargs)`` to anything.

        Returns:
            A function of the same arguments. It raises what ``loss_fn`` and :func:`hold` raise.

        Example:
            >>> from flax.training.dynamic_scale import DynamicScale
            >>> from smartfrz_jax import find_layers
            >>> params, apply_fn = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}, lambda p, x: x @ p["a"] @ p["b"]
            >>> layers = find_layers(params, apply_fn, jnp.ones((1, 2)))
            >>> state = TrainState.create(apply_fn=apply_fn, params=params, tx=optax.sgd(0.1), layers=layers)
            >>> loss_fn = state.freeze(["a"]).with_frozen(lambda params: apply_fn(params, jnp.ones((1, 2))).sum())
            >>> _, is_finite, loss, grads = DynamicScale().value_and_grad(loss_fn)(params)
            >>> float(grads["a"].max()), float(grads["b"].max())
            (0.0, 2.0)
        """
        checks.function(loss_fn, "loss_fn", "a function of (params, *args)")

        def held(params: PyTree, *args: Any, **kwargs: Any) -> Any:
            with hold(self.frozen, params):
                return loss_fn(params, *args, **kwargs)

        return functools.wraps(loss_fn)(transform.stopped(held, self.frozen))

    def value_and_grad(self, loss_fn: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., Any]:
        """``jax.value_and_grad`` with respect to the parameters, without the work for frozen layers.

        It is that function, of :meth:`with_frozen`.

        Args:
            loss_fn: A function of ``(params, *args, **kwargs)`` to a scalar, or to ``(scalar, aux)`` with ``has_aux``.
            has_aux: As in ``jax.value_and_grad``.

        Returns:
            A function of the same arguments to ``(value, grads)``; the gradients of frozen leaves are exact zeros. It
            raises what :func:`hold` raises.
        """
        checks.function(loss_fn, "loss_fn", "a function of (params, *args) to a scalar loss")
        checks.flag(has_aux, "has_aux")
        return jax.value_and_grad(self.with_frozen(loss_fn), has_aux=has_aux)

    def apply_gradients(self, *, grads: PyTree, **kwargs: Any) -> TrainState:
        """Updates the active layers; frozen ones stay as they are, bit for bit.

        Args:
            grads: Gradients with the structure of ``params``.
            **kwargs: Fields to replace at the same time.

        Returns:
            The state after one more step.
        """
        checks.same_leaves(grads, self.params, "grads", per_example=True)
        params, frozen = overwritten.optimized(self.params), overwritten.optimized_frozen(self.frozen)
        updates, opt_state = self.tx.update(overwritten.optimized(grads), self.opt_state, params)
        updated = transform.apply_updates(params, updates, frozen)
        return self.replace(
            step=self.step + 1,
            params=overwritten.overwrite(self.params, updated, grads, self.frozen),
            opt_state=opt_state,
            grads=self.frozen.active_leaves(grads) if self.keep_grads else {},
            **kwargs,
        )

    @property
    def unfrozen_opt_state(self) -> Any:
        """The state of ``unfrozen_tx`` for all parameters, for code that reads it, such as optax's own functions.

        See :func:`smartfrz_jax.freezing.migrate.unfrozen_opt_state`, also for how to change it: frozen layers have what
        their optimizer would start with, so that ``optax.contrib.schedule_free_eval_params(state.unfrozen_opt_state,
        state.params)`` leaves their weights as they are.
        """
        params, frozen = overwritten.optimized(self.params), overwritten.optimized_frozen(self.frozen)
        return migrate.unfrozen_opt_state(self.opt_state, self.unfrozen_tx, params, frozen.layers)

    def freeze(self, frozen: Frozen | Selectors) -> TrainState:
        """The state for another frozen set; what the optimizer holds of layers that stay active is kept exactly.

        Args:
            frozen: The new frozen set, or layers to add to the present one: names, globs, regular expressions,
                predicates or NNX filters; see :func:`smartfrz_jax.layers.select.select`.

        Raises:
            ValueError: If a layer is not one of the network's, ``kept`` has gone on with another state, or ``tx`` was
                replaced.
        """
        new = self.frozen.changed(frozen)
        if new == self.frozen:
            return self
        if self.tx != transform.freeze(self.unfrozen_tx, overwritten.optimized_frozen(self.frozen)):
            raise ValueError(
                "tx: got another one than the state was created with, which the freeze would undo; make a state for it "
                "by TrainState.create(tx=..., frozen=state.frozen), or let the rate be a schedule or one of "
                "optax.inject_hyperparams, which optax.tree.set changes in opt_state"
            )
        params, optimized = overwritten.optimized(self.params), overwritten.optimized_frozen(new)
        if self.kept is None:
            opt_state, version = migrate.migrate_opt_state(self.opt_state, self.unfrozen_tx, params, optimized), None
        else:
            opt_state, version = self.kept.migrate(
                self.kept_version, self.opt_state, self.unfrozen_tx, params, optimized
            )
        zeros = {name: jnp.zeros_like(leaf) for name, leaf in new.active_leaves(self.params).items()}
        return self.replace(
            frozen=new,
            tx=transform.freeze(self.unfrozen_tx, optimized),
            opt_state=opt_state,
            grads=zeros if self.keep_grads else {},
            kept_version=version,
        )
