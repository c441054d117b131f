"""The front door for Flax Linen and for functional training loops: a ``TrainState`` that freezes.

The state works with any ``apply_fn`` on any parameter pytree; what is Linen's own here is that frozen BatchNorm and
Dropout modules run in evaluation mode.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from flax.training import train_state

from smartfrz_jax import freezer, freezing, paths
from smartfrz_jax.freezing import Frozen
from smartfrz_jax.layers import Granularity, Layers
from smartfrz_jax.layers import find_layers as find_layers_of_params
from smartfrz_jax.policies.base import Policy

PyTree = Any


def find_layers(
    module: nn.Module,
    variables: Mapping[str, Any],
    *inputs: Any,
    granularity: Granularity = "layer",
    **kwargs: Any,
) -> Layers:
    """Layers of a Linen module, in forward order; see :func:`smartfrz_jax.find_layers`.

    Args:
        module: The module.
        variables: Its variables, as ``module.init`` gives them; ``{"params": params}`` if it has no other.
        *inputs: An example batch; arrays or ``jax.ShapeDtypeStruct``.
        granularity: ``"layer"``, ``"block"`` or a function from a parameter's name to its layer's name.
        **kwargs: Further arguments of the module's ``__call__``, such as ``train=False``. The module is only traced.

    Returns:
        The layers of ``variables["params"]``, front to back.

    Raises:
        ValueError: If ``variables`` has no ``"params"``, these are empty, or ``granularity`` is unknown.

    Example:
        >>> module, x = nn.Dense(3), jnp.ones((1, 2))
        >>> find_layers(module, module.init(jax.random.key(0), x), x).names
        ('kernel',)
    """
    if "params" not in variables:
        raise ValueError(
            f"variables: got the keys {', '.join(map(repr, variables))}, expected 'params' among them; pass what "
            "module.init returned, or {'params': params}"
        )
    others = {name: collection for name, collection in variables.items() if name != "params"}

    def forward(params: PyTree, *inputs: Any) -> Any:
        rngs = {"dropout": jax.random.key(0)}
        return module.apply({"params": params, **others}, *inputs, rngs=rngs, mutable=list(others), **kwargs)

    return find_layers_of_params(variables["params"], forward, *inputs, granularity=granularity)


class TrainState(train_state.TrainState):
    """Flax's ``TrainState`` with a frozen set, which is static: ``jax.jit`` makes one program for each.

    Subclass it to hold more, for example ``batch_stats``.

    Attributes:
        frozen: The frozen set.
        unfrozen_tx: The optax transformation as it was given; ``tx`` is that one for the active layers.
        grads: Gradients of the active layers in the last step by parameter name, if ``keep_grads``.
        keep_grads: Whether ``grads`` is kept, for policies that look at gradients.

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

    @classmethod
    def create(
        cls,
        *,
        apply_fn: Callable[..., Any],
        params: PyTree,
        tx: optax.GradientTransformation,
        layers: Layers,
        keep_grads: bool = False,
        **kwargs: Any,
    ) -> TrainState:
        """A state at step 0 with nothing frozen.

        Args:
            apply_fn: Usually ``model.apply``.
            params: Parameter pytree.
            tx: Any optax transformation; clipping, weight decay and the like belong inside.
            layers: The layers of ``params``, from :func:`find_layers`, or :func:`smartfrz_jax.find_layers`.
            keep_grads: Whether to keep each step's gradients in ``grads``, which some policies need.
            **kwargs: Further fields, of a subclass.

        Raises:
            ValueError: If a parameter belongs to none of the layers.
        """
        frozen = Frozen(layers)
        grads = {name: jnp.zeros_like(leaf) for name, leaf in paths.flatten(params).items()} if keep_grads else {}
        return cls(
            step=jnp.zeros((), jnp.int32),
            apply_fn=apply_fn,
            params=params,
            tx=freezing.freeze(tx, frozen),
            opt_state=freezing.freeze(tx, frozen).init(params),
            frozen=frozen,
            unfrozen_tx=tx,
            keep_grads=keep_grads,
            grads=grads,
            **kwargs,
        )

    def value_and_grad(self, loss_fn: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., Any]:
        """``jax.value_and_grad`` with respect to the parameters, without the work for frozen layers.

        Linen modules of frozen layers run in evaluation mode: their BatchNorms use and keep their running statistics,
        and the dropouts that follow them are off.

        Args:
            loss_fn: A function of ``(params, *args, **kwargs)`` to a scalar, or to ``(scalar, aux)`` with ``has_aux``.
            has_aux: As in ``jax.value_and_grad``.

        Returns:
            A function of the same arguments to ``(value, grads)``; the gradients of frozen leaves are exact zeros.
        """

        def held(*args: Any, **kwargs: Any) -> Any:
            with hold(self.frozen):
                return loss_fn(*args, **kwargs)

        return freezing.value_and_grad(held, self.frozen, has_aux=has_aux)

    def apply_gradients(self, *, grads: PyTree, **kwargs: Any) -> TrainState:
        """Updates the active layers; frozen ones stay as they are, bit for bit.

        Args:
            grads: Gradients with the structure of ``params``.
            **kwargs: Fields to replace at the same time.

        Returns:
            The state after one more step.
        """
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params)
        return self.replace(
            step=self.step + 1,
            params=freezing.apply_updates(self.params, updates, self.frozen),
            opt_state=opt_state,
            grads=self.frozen.active_leaves(grads) if self.keep_grads else {},
            **kwargs,
        )

    def freeze(self, frozen: Frozen | Iterable[str]) -> TrainState:
        """The state for another frozen set; what the optimizer holds of layers that stay active is kept exactly.

        Args:
            frozen: The new frozen set, or names of layers to add to the present one.

        Raises:
            ValueError: If a layer is not one of the network's.
        """
        new = frozen if isinstance(frozen, Frozen) else self.frozen.add(frozen)
        if new == self.frozen:
            return self
        zeros = {name: jnp.zeros_like(leaf) for name, leaf in new.active_leaves(self.params).items()}
        return self.replace(
            frozen=new,
            tx=freezing.freeze(self.unfrozen_tx, new),
            opt_state=freezing.migrate(self.opt_state, self.unfrozen_tx, self.params, new),
            grads=zeros if self.keep_grads else {},
        )


class Freezer(freezer.Freezer):
    """Lets a policy freeze the layers of a functional loop: call :meth:`step` after every train step.

    Args:
        state: The :class:`TrainState` at the start.
        policy: The policy.
        features: A function of the state to the layers' outputs on a probe batch (see
            :func:`smartfrz_jax.dataflow.tapped`), for policies that compare representations.

    Raises:
        TypeError: If ``state`` is a plain Flax ``TrainState``, or ``policy`` not a policy.
        ValueError: If the policy needs gradients and the state does not keep them.
    """

    def __init__(
        self,
        state: TrainState,
        policy: Policy,
        *,
        features: Callable[[Any], dict[str, jax.Array]] | None = None,
    ):
        if not isinstance(state, TrainState):
            raise TypeError(
                f"state: got {type(state).__module__}.{type(state).__name__}, expected a smartfrz_jax.linen.TrainState"
                "; make it in place of Flax's, with layers=find_layers(...)"
            )
        super().__init__(policy, state.frozen.layers, state.params, step=int(state.step), frozen=state.frozen)
        if "grads" in policy.needs and not state.keep_grads:
            raise ValueError(
                "state: the policy looks at gradients and the state drops them; create it with keep_grads=True"
            )
        self._features = features

    def step(self, state: TrainState, *, loss: jax.Array | None = None) -> TrainState:
        """Shows the policy the train step just done, and freezes what it decides.

        Args:
            state: The state after the step.
            loss: Loss of the step, for policies that look at it.

        Returns:
            The state to go on with.
        """
        make_features = self._features
        return state.freeze(
            self.observe(
                lambda: state.params,
                loss=loss,
                grads=state.grads if state.keep_grads else None,
                features=None if make_features is None else lambda: make_features(state),
            )
        )

    def save(self, path: str | Path, state: TrainState, *, overwrite: bool = False) -> None:
        """Writes the state, the policy's state and the frozen set as one Orbax checkpoint.

        Raises:
            FileExistsError: If ``path`` exists and ``overwrite`` is false.
        """
        self.save_run(path, state, overwrite=overwrite)

    def restore(self, path: str | Path, state: TrainState) -> TrainState:
        """Reads a checkpoint; the run goes on as if it had never stopped.

        Args:
            path: Directory of the checkpoint.
            state: A state of the same network and optimizer, for instance a new one.

        Raises:
            FileNotFoundError: If there is no such directory.
            ValueError: If the checkpoint is damaged, or of another network.
        """
        return self.restore_run(path, state.freeze(self.saved_frozen(path)))


@contextlib.contextmanager
def hold(frozen: Frozen) -> Iterator[None]:
    """Within it, Linen modules that belong to frozen layers run in evaluation mode.

    That is every BatchNorm whose parameters are in a frozen layer, attention in which all layers are frozen, and every
    Dropout, or BatchNorm without parameters, that is called next after a frozen layer. Parameter names must be paths
    from the module that is applied.

    Args:
        frozen: The frozen set.
    """
    if not frozen.names:
        yield
        return
    owner = frozen.layers.owner
    last: str | None = None

    def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        nonlocal last
        module = context.module
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        prefix = paths.SEPARATOR.join((*module.path, ""))
        inside = {layer for param, layer in owner.items() if param.startswith(prefix)}
        held = (inside or {last}) <= frozen.names
        if held and isinstance(module, nn.BatchNorm):
            result = _call_with(module, "use_running_average", next_fun, args, kwargs)
        elif held and isinstance(module, nn.Dropout | nn.MultiHeadDotProductAttention):
            result = _call_with(module, "deterministic", next_fun, args, kwargs)
        else:
            result = next_fun(*args, **kwargs)
        own = [layer for param, layer in owner.items() if param.rpartition(paths.SEPARATOR)[0] == prefix[:-1]]
        last = own[-1] if own else last
        return result

    with nn.intercept_methods(intercept):
        yield


def _call_with(module: nn.Module, flag: str, next_fun: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Calls a module with ``flag`` true, whether the flag came with the call, with the constructor, or not at all."""
    bound = inspect.signature(type(module).__call__).bind(module, *args, **kwargs)
    bound.arguments[flag] = True
    configured = getattr(module, flag)
    object.__setattr__(module, flag, None)  # Linen refuses a flag that is given in both places
    try:
        return next_fun(*bound.args[1:], **bound.kwargs)
    finally:
        object.__setattr__(module, flag, configured)
