"""The front door for Flax NNX: an ``nnx.Optimizer`` that freezes, and the object that decides when.

A stock NNX loop changes in four places: the optimizer's class, ``nnx.value_and_grad``, one line before the loop and one
in it. See :class:`Optimizer`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from smartfrz_jax import accounting, dataflow, freezer, freezing, paths
from smartfrz_jax.accounting import Account
from smartfrz_jax.freezing import Frozen
from smartfrz_jax.layers import Granularity, Layers, check_params, group
from smartfrz_jax.policies.base import Policy

PyTree = Any


def find_layers(
    model: nnx.Module,
    *inputs: Any,
    forward: Callable[..., Any] | None = None,
    granularity: Granularity = "layer",
    wrt: nnx.filterlib.Filter = nnx.Param,
) -> Layers:
    """Layers of an NNX model, in forward order; see :func:`smartfrz_jax.find_layers`.

    The statistics of BatchNorms and the random streams of dropouts are assigned too, to the layer whose output they
    work on.

    Args:
        model: The model. It is only traced, in training mode.
        *inputs: An example batch; arrays or ``jax.ShapeDtypeStruct``.
        forward: A function of ``(model, *inputs)``; ``model(*inputs)`` by default.
        granularity: ``"layer"``, ``"block"`` or a function from a parameter's name to its layer's name.
        wrt: Filter of the variables that train.

    Returns:
        The layers, front to back.

    Raises:
        ValueError: If there are no inputs, the model has no such variables, or ``granularity`` is unknown.

    Example:
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
        >>> find_layers(model, jnp.ones((1, 2))).names
        ('layers/0', 'layers/1')
    """
    if not inputs:
        raise ValueError("inputs: got none; the forward order is traced, so pass an example batch after the model")
    leaves = check_params(_params(model, wrt))
    graphdef, variables = nnx.split(model)

    def run(variables: PyTree, *inputs: Any) -> Any:
        module = nnx.merge(graphdef, variables, copy=True)
        module.train()
        return _call(module, forward, inputs)

    used = dataflow.consumption(run, nnx.as_pure(variables), *inputs)
    state = [name for name in paths.flatten(variables) if name not in leaves]
    return group(leaves, used, granularity, state)


def features(
    model: nnx.Module, layers: Layers, *inputs: Any, forward: Callable[..., Any] | None = None
) -> Callable[..., dict[str, jax.Array]]:
    """A jitted function of ``(model, *inputs)`` that returns every layer's output on a batch, in evaluation mode.

    Args:
        model: The model; its structure and that of the inputs are fixed by this call.
        layers: Its layers.
        *inputs: An example batch; the first axis of the first input counts the examples.
        forward: A function of ``(model, *inputs)``; ``model(*inputs)`` by default.

    Returns:
        A function that gives, by layer name, an array of shape ``(examples, ...)``.
    """
    evaluated = nnx.merge(*nnx.split(model), copy=True)
    evaluated.eval()
    wrt = nnx.Param
    graphdef = nnx.graphdef(evaluated)

    def outputs(params: PyTree, rest: PyTree, *inputs: Any) -> dict[str, jax.Array]:
        def run(params: PyTree, *inputs: Any) -> Any:
            module = nnx.merge(graphdef, params, rest, copy=True)
            return _call(module, forward, inputs)

        groups = {layer.name: layer.params for layer in layers}
        return dataflow.tapped(run, groups, params, *inputs)(params, *inputs)

    jitted = jax.jit(outputs)

    def of_model(model: nnx.Module, *inputs: Any) -> dict[str, jax.Array]:
        _, params, rest = nnx.split(model, wrt, ...)
        by_name = jitted(params, rest, *inputs)
        return {name: by_name[name] for name in layers.names}

    return of_model


def account(
    model: nnx.Module,
    layers: Layers,
    loss_fn: Callable[..., Any],
    *inputs: Any,
    tx: optax.GradientTransformation | None = None,
    wrt: nnx.filterlib.Filter = nnx.Param,
    backend: str | None = None,
) -> Account:
    """Predicts what a train step of an NNX model costs, for any frozen set; see :func:`smartfrz_jax.account`.

    Args:
        model: The model, in the mode in which it trains; arrays or ``jax.ShapeDtypeStruct``.
        layers: Its layers.
        loss_fn: A function of ``(model, *inputs)`` to a scalar, or to ``(scalar, aux)``. It is only traced.
        *inputs: An example batch; arrays or ``jax.ShapeDtypeStruct``.
        tx: The optimizer; without it, updates are not counted.
        wrt: Filter of the variables that train.
        backend: Platform that the step will run on; JAX's default.

    Returns:
        The account.

    Raises:
        ValueError: If there are no inputs, or the loss is not a scalar or depends on no parameter.

    Example:
        >>> model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
        >>> x = jnp.ones((32, 8))
        >>> costs = account(model, find_layers(model, x), lambda model, x: model(x).sum(), x)
        >>> costs.macs["linear"] == 32 * (8 * 8 + 8 * 4)
        True
    """
    graphdef, variables = nnx.split(model)

    def run(frozen: Frozen, variables: PyTree, *inputs: Any) -> Any:
        module = nnx.merge(graphdef, variables, copy=True)
        for _ in _hold(module, frozen):
            pass
        return loss_fn(module, *inputs), nnx.as_pure(nnx.state(module))

    def trace(frozen: Frozen) -> accounting.Trace:
        return accounting.Trace(functools.partial(run, frozen), nnx.as_pure(variables), inputs)

    active, held = trace(Frozen(layers)), trace(Frozen(layers, frozenset(layers.names)))
    return accounting.assemble(layers, active, held, _params(model, wrt), tx, backend or jax.default_backend())


class Optimizer(nnx.Optimizer):
    """``nnx.Optimizer`` with a frozen set, which is static: ``nnx.jit`` makes one program for each.

    Args:
        model: The model.
        tx: Any optax transformation; clipping, weight decay and the like belong inside.
        wrt: Filter of the variables that train.
        layers: The model's layers, from :func:`find_layers`.

    Attributes:
        frozen: The frozen set.

    Example:
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
    ):
        self.frozen = Frozen(layers)
        self.unfrozen_tx = tx
        self.keep_grads = False
        self.grads = nnx.data({})
        super().__init__(model, freezing.freeze(tx, self.frozen), wrt=wrt)

    def value_and_grad(self, loss_fn: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., Any]:
        """``nnx.value_and_grad`` with respect to the model, without the work for frozen layers.

        Frozen layers run in evaluation mode: their BatchNorms use and keep their running statistics, and the dropouts
        that follow them are off. Modules with an attribute ``frozen_params`` find in it, as a static
        ``frozenset[str]``, the names of their own frozen parameters, relative to the module: a model that scans over
        stacked weights can keep frozen and live ones apart by it.

        Args:
            loss_fn: A function of ``(model, *args, **kwargs)`` to a scalar, or to ``(scalar, aux)`` with ``has_aux``.
                Modules among the further arguments must not be changed by it.
            has_aux: As in ``nnx.value_and_grad``.

        Returns:
            A function of the same arguments to ``(value, grads)``; the gradients of frozen variables are exact zeros.
        """

        def with_grads(model: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            graphdef, params, rest = nnx.split(model, self.wrt, ...)

            def pure_loss(params: PyTree, rest: PyTree) -> Any:
                # A copy, so that the modes set here end with the trace.
                module = nnx.merge(graphdef, self.frozen.stop_gradient(params), rest, copy=True)
                statistics = list(_hold(module, self.frozen))
                out = loss_fn(module, *args, **kwargs)
                _check_held(statistics)
                loss, aux = out if has_aux else (out, None)
                return loss, (aux, nnx.split(module, self.wrt, ...)[2])

            (loss, (aux, rest)), grads = jax.value_and_grad(pure_loss, has_aux=True)(params, rest)
            nnx.update(model, rest)
            return ((loss, aux) if has_aux else loss), grads

        return with_grads

    def update(self, model: nnx.Module, grads: PyTree, /, **kwargs: Any) -> PyTree:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates the active layers of the model; frozen ones stay as they are, bit for bit.

        Args:
            model: The model.
            grads: Gradients, as from :meth:`value_and_grad`.
            **kwargs: Extra arguments for the optax transformation.

        Returns:
            The updates; zeros for frozen variables.
        """
        params = nnx.as_pure(nnx.state(model, self.wrt))
        pure_grads = nnx.as_pure(nnx.state(grads, self.wrt))
        updates, opt_state = self.tx.update(pure_grads, nnx.as_pure(self.opt_state), params, **nnx.as_pure(kwargs))
        nnx.update(model, freezing.apply_updates(params, updates, self.frozen))
        nnx.update(self.opt_state, nnx.state(opt_state))
        self.step[...] += 1
        if self.keep_grads:
            nnx.update(self.grads, self.frozen.active_leaves(pure_grads))
        return updates

    def freeze(self, model: nnx.Module, frozen: Frozen | list[str]) -> None:
        """Changes the frozen set; the state of layers that stay active is kept exactly.

        Args:
            model: The model.
            frozen: The new frozen set, or names of layers to add to the present one.

        Raises:
            ValueError: If a layer is not one of the model's.
        """
        new = frozen if isinstance(frozen, Frozen) else self.frozen.add(frozen)
        if new == self.frozen:
            return
        params = nnx.as_pure(nnx.state(model, self.wrt))
        migrated = freezing.migrate(nnx.as_pure(self.opt_state), self.unfrozen_tx, params, new)
        tx = freezing.freeze(self.unfrozen_tx, new)
        opt_state = nnx.Optimizer(model, tx, wrt=self.wrt).opt_state  # for its Variables
        nnx.update(opt_state, nnx.state(migrated))
        self.frozen, self.tx, self.opt_state = new, tx, nnx.data(opt_state)
        if self.keep_grads:
            self.record_grads(model)

    def record_grads(self, model: nnx.Module) -> None:
        """From now on keeps the gradients of the last step, in ``grads``, for policies that look at them."""
        self.keep_grads = True
        active = self.frozen.active_leaves(nnx.as_pure(nnx.state(model, self.wrt)))
        self.grads = nnx.data({name: nnx.Variable(jnp.zeros_like(leaf)) for name, leaf in active.items()})


class Freezer(freezer.Freezer):
    """Lets a policy freeze the layers of an NNX model: call :meth:`step` after every train step.

    Args:
        model: The model.
        optimizer: Its :class:`Optimizer`.
        policy: The policy.
        features: A function of the model to its layers' outputs on a probe batch (see :func:`features`), for policies
            that compare representations.

    Raises:
        TypeError: If ``optimizer`` is a plain ``nnx.Optimizer``, or ``policy`` not a policy.
    """

    def __init__(
        self,
        model: nnx.Module,
        optimizer: Optimizer,
        policy: Policy,
        *,
        features: Callable[[nnx.Module], dict[str, jax.Array]] | None = None,
    ):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer: got {type(optimizer).__module__}.{type(optimizer).__name__}, expected a smartfrz_jax.nnx."
                "Optimizer; make it in place of nnx.Optimizer, with the same arguments"
            )
        frozen, params = optimizer.frozen, _params(model, optimizer.wrt)
        super().__init__(policy, frozen.layers, params, step=int(optimizer.step[...]), frozen=frozen)
        self.model, self.optimizer = model, optimizer
        self._features = features
        if "grads" in policy.needs:
            optimizer.record_grads(model)

    def step(self, *, loss: jax.Array | None = None) -> Frozen:
        """Shows the policy the train step just done, and freezes what it decides.

        Args:
            loss: Loss of the step, for policies that look at it.

        Returns:
            The frozen set from now on.
        """
        model, optimizer, make_features = self.model, self.optimizer, self._features
        frozen = self.observe(
            lambda: _params(model, optimizer.wrt),
            loss=loss,
            grads={name: grad[...] for name, grad in optimizer.grads.items()} if optimizer.keep_grads else None,
            features=None if make_features is None else lambda: make_features(model),
        )
        optimizer.freeze(model, frozen)
        return frozen

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Writes model, optimizer, policy state and frozen set as one Orbax checkpoint.

        Raises:
            FileExistsError: If ``path`` exists and ``overwrite`` is false.
        """
        self.save_run(path, self._arrays(), overwrite=overwrite)

    def restore(self, path: str | Path) -> None:
        """Reads a checkpoint into the model and the optimizer; the run goes on as if it had never stopped.

        Raises:
            FileNotFoundError: If there is no such directory.
            ValueError: If the checkpoint is damaged, or of another network; nothing has changed then.
        """
        optimizer = self.optimizer
        before = optimizer.frozen, optimizer.tx, optimizer.opt_state, optimizer.grads
        optimizer.freeze(self.model, self.saved_frozen(path))
        try:
            arrays = self.restore_run(path, self._arrays())
        except Exception:  # not by freezing back, which would initialise returning layers afresh
            optimizer.frozen, optimizer.tx = before[:2]
            optimizer.opt_state, optimizer.grads = nnx.data(before[2]), nnx.data(before[3])
            raise
        nnx.update(self.model, arrays["model"])
        nnx.update(self.optimizer, arrays["optimizer"])

    def _arrays(self) -> dict[str, Any]:
        return {"model": nnx.as_pure(nnx.state(self.model)), "optimizer": nnx.as_pure(nnx.state(self.optimizer))}


def _params(model: nnx.Module, wrt: nnx.filterlib.Filter) -> PyTree:
    return nnx.as_pure(nnx.state(model, wrt))


def _call(module: nnx.Module, forward: Callable[..., Any] | None, inputs: tuple[Any, ...]) -> Any:
    return forward(module, *inputs) if forward else module(*inputs)  # pyright: ignore[reportCallIssue]


def _hold(model: nnx.Module, frozen: Frozen) -> Iterator[tuple[str, nnx.Variable, Any]]:
    """Puts what belongs to frozen layers into evaluation mode; yields their BatchNorm statistics as they are now.

    Tells modules that want to know (by an attribute ``frozen_params``) which of their parameters are frozen.
    """
    layer_of = {name: layer.name for layer in frozen.layers for name in (*layer.params, *layer.state)}
    for path, module in nnx.iter_modules(model):
        prefix = paths.SEPARATOR.join((*map(str, path), ""))
        inside = {layer for name, layer in layer_of.items() if name.startswith(prefix)}
        if hasattr(module, "frozen_params"):
            own = frozenset(name.removeprefix(prefix) for name in frozen.params if name.startswith(prefix))
            module.frozen_params = own  # pyright: ignore[reportAttributeAccessIssue]
        if not inside or not inside <= frozen.names:
            continue
        if isinstance(module, nnx.BatchNorm):
            module.use_running_average = True
            for key, value in vars(module).items():
                if isinstance(value, nnx.BatchStat):
                    yield prefix + key, value, value.get_value()
        elif isinstance(module, nnx.Dropout):
            module.deterministic, module.rate = True, 0.0  # the rate, because a call's argument beats the attribute
        elif isinstance(module, nnx.MultiHeadAttention):
            module.deterministic, module.dropout_rate = True, 0.0


def _check_held(statistics: list[tuple[str, nnx.Variable, Any]]) -> None:
    for name, variable, value in statistics:
        if variable.get_value() is not value:
            raise ValueError(
                f"loss_fn: calls the BatchNorm of {name!r} with use_running_average=False, so its statistics would go "
                "on changing although its layer is frozen; set the mode with model.train() and model.eval() instead"
            )
