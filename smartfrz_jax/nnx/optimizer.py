"""An ``nnx.Optimizer`` with a frozen set."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from smartfrz_jax.freezing import migrate, transform
from smartfrz_jax.freezing.by_hand import beginning
from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.freezing.returning import Returning, make_kept
from smartfrz_jax.layers.layers import Layers, check_layers
from smartfrz_jax.layers.select import Selectors
from smartfrz_jax.nnx.hold import hold
from smartfrz_jax.nnx.layers import check_model
from smartfrz_jax.nnx.parts.stop_gradient import call_stopped
from smartfrz_jax.policies.base import Policy
from smartfrz_jax.programs.superseded import supersede
from smartfrz_jax.pytrees import checks, paths
from smartfrz_jax.pytrees.types import PyTree


class Optimizer(nnx.Optimizer):
    """``nnx.Optimizer`` with a frozen set, which is static: ``nnx.jit`` makes one program for each.

    Take the gradients from :meth:`value_and_grad`. With those of ``nnx.value_and_grad``, which :meth:`update` cannot
    tell from them, frozen weights hold still as well, but that is all: BatchNorms of frozen layers go on changing their
    statistics, dropouts behind them stay on, and whatever reads all gradients, such as a norm that is logged, brings
    back the work for them.

    Args:
        model: The model.
        tx: Any optax transformation; clipping, weight decay and the like belong inside.
        wrt: Filter of the variables that train.
        layers: The model's layers, from :func:`find_layers`.
        returning: What the optimizer starts from for layers that train again: ``"fresh"`` state, or what it ``"kept"``
            of them, on the host, from the moment at which they froze. See
            :class:`smartfrz_jax.freezing.returning.Kept`, above all for Adam.
        frozen: What is frozen before the first step, so that no state is made for it: layers, as of :meth:`freeze`; or
            the policy of the run, such as ``lisa``, for what it has frozen from the beginning.

    Attributes:
        frozen: The frozen set.
        frozen_by_policy: Names of the layers that are frozen from the beginning, if ``frozen`` was a policy.
        kept: What was put aside of the frozen layers; ``None`` if they return with fresh state. Clones of an optimizer
            share it, and only the one that froze something last can do so again.

    Raises:
        TypeError: If ``frozen`` is neither layers nor a policy.
        ValueError: If a parameter belongs to none of the layers, one of ``frozen`` is not a layer of the model, or
            ``returning`` is unknown.

    Example:
        >>> from smartfrz_jax.nnx import find_layers
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
        >>> layers = find_layers(model, jnp.ones((1, 2)))
        >>> optimizer = Optimizer(model, optax.adam(1e-3), wrt=nnx.Param, layers=layers)
        >>> optimizer.freeze(model, ["layers/0"])
        >>> @nnx.jit
        ... def train_step(model, optimizer, x):
        ...     loss, grads = optimizer.value_and_grad(lambda model, x: (model(x) ** 2).mean())(model, x)
        ...     optimizer.update(model, grads)
        ...     return loss
        >>> loss = train_step(model, optimizer, jnp.ones((1, 2)))
    """

    def __init__(
        self,
        model: nnx.Module,
        tx: optax.GradientTransformation,
        *,
        wrt: nnx.filterlib.Filter = nnx.Param,
        layers: Layers,
        returning: Returning = "fresh",
        frozen: Frozen | Selectors | Policy = (),
    ):
        check_model(model)
        checks.transformation(tx)
        check_layers(layers)
        params = paths.flatten(nnx.state(model, wrt))
        foreign = next((name for name in layers.arrays if name not in params), None)
        if foreign is not None:
            raise ValueError(
                f"layers: got {foreign!r} of layer {layers.arrays[foreign][0]!r}, which is not in the model, expected "
                "the layers of this model: sfj.nnx.find_layers(model, ...) with the same wrt"
            )
        self.frozen, self.frozen_by_policy = beginning(frozen, layers, nnx.as_pure(nnx.state(model, wrt)))
        self.unfrozen_tx = tx
        self.keep_grads = False
        self.grads = nnx.data({})
        self.kept = make_kept(returning)
        self.kept_version = None if self.kept is None else nnx.OptState(jnp.zeros((), jnp.int32))
        super().__init__(model, transform.freeze(tx, self.frozen), wrt=wrt)

    def with_frozen(self, loss_fn: Callable[..., Any], *, argnum: int = 0) -> Callable[..., Any]:
        """``loss_fn`` with the frozen set in it, for any function that differentiates.

        ``stop_gradient`` is on the variables of frozen layers, and these run in evaluation mode: their BatchNorms use
        and keep their running statistics, and the dropouts that follow them are off. A dropout that is called behind
        several layers is off once all of them are frozen; one without a random stream of its own, which is called with
        ``rngs``, stays as it is, for nothing tells which layer it follows. Whatever else the loss assigns to variables
        of frozen layers is taken back at its end; only random streams, ``nnx.Cache`` and ``nnx.Intermediate`` go on.

        Modules with an attribute ``frozen_params`` find in it, as a static ``frozenset[str]``, the names of their own
        frozen parameters, relative to the module: a model that scans over stacked weights can keep frozen and live
        ones apart by it.

        Args:
            loss_fn: A function of the model, and of whatever else, to anything.
            argnum: Which of its positional arguments is the model.

        Returns:
            A function of the same arguments. It raises what ``loss_fn`` raises, and a ``ValueError`` if a BatchNorm of
            a frozen layer is called with ``use_running_average=False``.

        Example:
            >>> import jax
            >>> from smartfrz_jax.nnx import find_layers
            >>> model, x = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0))), jnp.ones((1, 2))
            >>> optimizer = Optimizer(model, optax.sgd(0.1), layers=find_layers(model, x))
            >>> optimizer.freeze(model, ["layers/0"])
            >>> graphdef, params = nnx.split(model)
            >>> def loss_fn(params, x):  # of arrays, for jax.value_and_grad, DynamicScale, jax.vjp, ...
            ...     return optimizer.with_frozen(lambda model, x: model(x).sum())(nnx.merge(graphdef, params), x)
            >>> value, grads = jax.value_and_grad(loss_fn)(params, x)
            >>> float(jnp.abs(grads["layers"][0]["kernel"][...]).max())
            0.0
        """
        checks.function(loss_fn, "loss_fn", "a function of (model, *args)")
        checks.count(argnum, "argnum", least=0)

        @functools.wraps(loss_fn)
        def of_frozen(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = _positional(loss_fn, args, kwargs, argnum)
            model = args[argnum]
            if self.frozen.reads_rows or self.frozen.lookups:
                return call_stopped(loss_fn, self.frozen, self.wrt, argnum, (args, kwargs))
            with hold(model, self.frozen):
                nnx.update(model, self.frozen.stop_gradient(nnx.state(model, self.wrt)))
                return loss_fn(*args, **kwargs)

        return of_frozen

    def value_and_grad(
        self,
        loss_fn: Callable[..., Any],
        *,
        argnums: int | nnx.DiffState | Sequence[int | nnx.DiffState] = 0,
        has_aux: bool = False,
        **options: Any,
    ) -> Callable[..., Any]:
        """``nnx.value_and_grad`` with respect to the model, without the work for frozen layers.

        It is that function, of :meth:`with_frozen`. Modules among the arguments may be changed by the loss, and so may
        the model's variables, those that train among them.

        Args:
            loss_fn: A function of the model, and of whatever else, to a scalar, or to ``(scalar, aux)`` with
                ``has_aux``.
            argnums: As in ``nnx.value_and_grad``; of several, the first is the optimizer's model. An integer in its
                place stands for the variables of ``wrt``.
            has_aux: As in ``nnx.value_and_grad``.
            **options: As in ``nnx.value_and_grad``: ``holomorphic``, ``allow_int``.

        Returns:
            A function of the same arguments to ``(value, grads)``; the gradients of frozen variables are exact zeros.
        """
        checks.function(loss_fn, "loss_fn", "a function of (model, *args) to a scalar loss")
        checks.flag(has_aux, "has_aux")
        several = isinstance(argnums, list | tuple) and len(argnums) > 0
        given: Any = argnums if several else (argnums,)
        first, *others = given
        for each in (first, *others):
            checks.instance(each, int | nnx.DiffState, "argnums", "an integer, an nnx.DiffState, or several of these")
        model = first if isinstance(first, nnx.DiffState) else nnx.DiffState(first, self.wrt)
        held = self.with_frozen(loss_fn, argnum=model.argnum)

        def of_positional(*args: Any) -> Any:
            return held(*args[:-1], **args[-1])

        with_grads = nnx.value_and_grad(
            of_positional,
            argnums=(model, *others) if several else model,
            has_aux=has_aux,
            graph=True,
            graph_updates=True,
            **options,
        )

        @functools.wraps(loss_fn)
        def of_arguments(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = _positional(loss_fn, args, kwargs, model.argnum)
            return with_grads(*args, kwargs)

        return of_arguments

    def update(self, model: nnx.Module, grads: PyTree, **kwargs: Any) -> PyTree:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates the active layers of the model; frozen ones stay as they are, bit for bit.

        Args:
            model: The model.
            grads: Gradients, as from :meth:`value_and_grad`; those of frozen variables are not looked at.
            **kwargs: Extra arguments for the optax transformation.

        Returns:
            The updates; zeros for frozen variables.
        """
        check_model(model)
        params = nnx.as_pure(nnx.state(model, self.wrt))
        checks.instance(grads, nnx.State | Mapping, "grads", "gradients, as from value_and_grad")
        pure_grads = nnx.as_pure(nnx.state(grads, self.wrt))
        checks.same_leaves(pure_grads, params, "grads", per_example=True)
        updates, opt_state = self.tx.update(pure_grads, nnx.as_pure(self.opt_state), params, **nnx.as_pure(kwargs))
        nnx.update(model, transform.apply_updates(params, updates, self.frozen))
        nnx.update(self.opt_state, nnx.state(opt_state))
        self.step[...] += 1
        if self.keep_grads:
            nnx.update(self.grads, self.frozen.active_leaves(pure_grads))
        return updates

    def unfrozen_opt_state(self, model: nnx.Module) -> Any:
        """The state of ``unfrozen_tx`` for all parameters, as arrays, for code that reads it, such as optax's own.

        See :func:`smartfrz_jax.freezing.migrate.unfrozen_opt_state`: frozen layers have what their optimizer would
        start with, so that ``optax.contrib.schedule_free_eval_params(optimizer.unfrozen_opt_state(model), params)``,
        with ``params = nnx.as_pure(nnx.state(model, nnx.Param))``, leaves their weights as they are.

        Args:
            model: The model.
        """
        params, opt_state = nnx.as_pure(nnx.state(model, self.wrt)), nnx.as_pure(self.opt_state)
        return migrate.unfrozen_opt_state(opt_state, self.unfrozen_tx, params, self.frozen.layers)

    def freeze(self, model: nnx.Module, frozen: Frozen | Selectors) -> None:
        """Changes the frozen set; the state of layers that stay active is kept exactly.

        A step that was bound to the optimizer before, by ``nnx.cached_partial`` or ``nnx.jit_partial``, raises a
        ``ValueError`` from then on, and so does one that is called with what ``nnx.split`` gave. A loop that hands on
        states of its own from step to step must put the last one into model and optimizer first, by ``nnx.update``, and
        split them again afterwards.

        Args:
            model: The model.
            frozen: The new frozen set, or layers to add to the present one: names, globs, regular expressions,
                predicates or NNX filters; see :func:`smartfrz_jax.layers.select.select`.

        Raises:
            ValueError: If a layer is not one of the model's, or ``kept`` has gone on with a clone.
        """
        check_model(model)
        new = self.frozen.changed(frozen)
        if new == self.frozen:
            return
        params, old = nnx.as_pure(nnx.state(model, self.wrt)), nnx.as_pure(self.opt_state)
        if self.kept is None or self.kept_version is None:
            migrated = migrate.migrate_opt_state(old, self.unfrozen_tx, params, new)
        else:
            version = self.kept_version[...]
            migrated, version = self.kept.migrate(version, old, self.unfrozen_tx, params, new)
            self.kept_version = nnx.OptState(version)
        tx = transform.freeze(self.unfrozen_tx, new)
        opt_state = _variables(_without_arrays(tx, nnx.state(model, self.wrt)))
        nnx.update(opt_state, nnx.state(migrated))
        self.frozen, self.tx, self.opt_state = new, tx, nnx.data(opt_state)
        self.step = supersede(self.step)
        if self.keep_grads:
            self.record_grads(model)

    def record_grads(self, model: nnx.Module) -> None:
        """From now on keeps the gradients of the last step, in ``grads``, for policies that look at them."""
        check_model(model)
        self.keep_grads = True
        active = self.frozen.active_leaves(nnx.as_pure(nnx.state(model, self.wrt)))
        self.grads = nnx.data({name: nnx.Variable(jnp.zeros_like(leaf)) for name, leaf in active.items()})


def _without_arrays(tx: optax.GradientTransformation, params: PyTree) -> Any:
    """The first state as shapes: arrays would be in memory beside the old state and the new one."""
    leaves, structure = jax.tree.flatten(params)  # whose metadata may be nothing that JAX can compare
    return jax.eval_shape(lambda *leaves: tx.init(jax.tree.unflatten(structure, leaves)), *leaves)


def _variables(opt_state: Any) -> Any:
    """The Variables that ``nnx.Optimizer`` makes of a state; it would place their values, and shapes have no place."""

    def variable(leaf: Any) -> nnx.Variable[Any]:
        if not isinstance(leaf, nnx.Variable):
            return nnx.OptArray(leaf)
        metadata = leaf.get_metadata()
        if "optimizer_sharding" in metadata:
            metadata["out_sharding"] = metadata.pop("optimizer_sharding")
        return nnx.OptVariable.from_metadata(leaf.get_value(), metadata)

    return jax.tree.map(variable, opt_state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _positional(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], argnum: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, as many by position as can be, the model's among them."""
    if kwargs:
        bound = inspect.signature(function).bind(*args, **kwargs)
        args, kwargs = bound.args, bound.kwargs
    if argnum >= len(args):
        raise ValueError(
            f"loss_fn: was called with {len(args)} arguments by position, expected the model as number {argnum}, "
            "counted from 0; let it be an argument that can be given by position"
        )
    check_model(args[argnum], f"loss_fn: argument {argnum}")
    return args, kwargs
