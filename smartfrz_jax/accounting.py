"""What a train step costs for any frozen set, predicted from one trace of the loss and without compiling.

Every equation of the loss belongs to a layer and depends on the parameters of some. Its forward pass is always run; the
gradients of its weights are computed if its layer is active; those of its other inputs, if an active layer lies
anywhere before. So, once each equation has its price, any frozen set is a matter of adding up.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from smartfrz_jax import equations, flops, inlining, operations, paths
from smartfrz_jax.equations import Equation, Input, Trace
from smartfrz_jax.flops import Flops
from smartfrz_jax.freezing import Frozen
from smartfrz_jax.layers import Layers

PyTree = Any


class Parts(NamedTuple):
    """Floating-point operations of one step, by what they are for.

    Attributes:
        forward: The forward pass.
        weight_gradients: Gradients of the weights of active layers.
        activation_gradients: Gradients of what is between the layers.
        update: The optimizer.
        added: What XLA adds on this platform, by replacing operations with more expensive ones.
    """

    forward: float = 0.0
    weight_gradients: float = 0.0
    activation_gradients: float = 0.0
    update: float = 0.0
    added: float = 0.0

    @property
    def total(self) -> float:
        """Their sum: what the compiled program counts."""
        return sum(self)

    @property
    def needed(self) -> float:
        """Their sum without what XLA adds."""
        return self.total - self.added


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of one train step.

    Attributes:
        parts: All together.
        by_layer: By layer name, front to back. What is in none, such as scaling the images, is under ``""``.
        by_kind: By kind of operation; see :mod:`smartfrz_jax.operations`.
    """

    parts: Parts
    by_layer: Mapping[str, Parts]
    by_kind: Mapping[str, Parts]

    @property
    def total(self) -> float:
        """All operations."""
        return self.parts.total

    def __str__(self) -> str:
        head = "GFLOP".ljust(16) + "".join(field.replace("_", " ").rjust(22) for field in Parts._fields)
        rows = [(kind, parts) for kind, parts in (*self.by_kind.items(), ("all", self.parts)) if parts.total]
        lines = (kind.ljust(16) + "".join(f"{part / 1e9:22,.6f}" for part in parts) for kind, parts in rows)
        return "\n".join((head, *lines))


class Account:
    """Predicted costs of a train step; made by :func:`account`.

    FLOPs are counted as XLA counts them in a compiled program (see :mod:`smartfrz_jax.flops`), multiply-adds as they
    are published.

    Attributes:
        layers: The layers.
        examples: Number of examples in the batch.
        macs: Multiply-adds of one forward pass, by kind of operation: convolutions, linear maps and products of data.
        elements: Elements of one forward pass that other operations work on, by kind.
    """

    def __init__(
        self,
        layers: Layers,
        examples: int,
        active: list[Equation],
        held: list[Equation],
        update: list[float],
        backend: str,
    ):
        self.layers, self.examples = layers, examples
        self.macs = collections.Counter[str]()
        for equation in active:
            self.macs[equation.kind] += flops.macs(equation.eqn)
        self.elements = operations.elements((e.eqn, e.kind) for e in active)
        self._active, self._held, self._update, self._backend = active, held, update, backend
        self._gradients: dict[Any, tuple[Flops, Flops]] = {}
        self._steps: dict[frozenset[str], StepFlops] = {}

    def flops(self, frozen: Frozen | None = None) -> StepFlops:
        """Predicted FLOPs of one step.

        Args:
            frozen: The frozen set; none by default.

        Returns:
            The FLOPs, in all, by layer and by kind of operation.

        Raises:
            ValueError: If the frozen set is of another network.
        """
        frozen = Frozen(self.layers) if frozen is None else frozen
        if frozen.layers != self.layers:
            raise ValueError(
                f"frozen: got a frozen set of a network of {len(frozen.layers)} layers "
                f"({', '.join(frozen.layers.names[:2])}, ...), expected one of the {len(self.layers)} layers of this "
                f"account ({', '.join(self.layers.names[:2])}, ...); make it with Frozen(account.layers, names)"
            )
        if frozen.names not in self._steps:
            self._steps[frozen.names] = self._count(frozen)
        return self._steps[frozen.names]

    def saving(self, frozen: Frozen, before: Frozen | None = None) -> float:
        """Share of a step's FLOPs that freezing saves.

        Args:
            frozen: The frozen set.
            before: The one to compare with; none by default.

        Returns:
            1 where the step became free, 0 where nothing was saved.
        """
        return 1 - self.flops(frozen).total / self.flops(before).total

    @property
    def counted(self) -> dict[str, float]:
        """Multiply-adds per example of a forward pass as counters of modules (ptflops) give them, by kind.

        Beside those of convolutions and linear maps they count 2 for an element that is normalised, and 1 for an
        element of a bias, of an activation, or of the input of a pooling. Products of data with data, as in attention,
        they do not see.
        """
        each = {operations.BIAS: 1, operations.NORMALISATION: 2, operations.ACTIVATION: 1, operations.POOLING: 1}
        counts = {kind: self.macs[kind] for kind in (operations.CONVOLUTION, operations.LINEAR)}
        counts |= {kind: n * self.elements.get(kind, 0) for kind, n in each.items()}
        return {kind: count / self.examples for kind, count in counts.items()}

    def table(self, examples: int) -> str:
        """What training costs as papers have it, 3 forward passes of 2 FLOPs per multiply-add, a line for each kind.

        Args:
            examples: Number of examples trained on: size of the data set times epochs.

        Returns:
            The text; multiply-adds are those of :attr:`counted`. Below the sum stand the products that it leaves out.
        """
        products = self.macs[operations.ATTENTION] / self.examples
        rows = [*self.counted.items(), ("sum", sum(self.counted.values())), ("attention", products)]
        lines = (f"{kind:14s}{macs:18,.0f}{6e-12 * macs * examples:12,.1f}" for kind, macs in rows)
        return "\n".join((f"{'':14s}{'MACs an example':>18s}{'TFLOPs':>12s}", *lines))

    def _count(self, frozen: Frozen) -> StepFlops:
        mask = frozen.mask
        active = sum(1 << i for i, is_frozen in enumerate(mask) if not is_frozen)
        # One row for each (layer, kind), columns as in Parts.
        cells: dict[tuple[int, str], list[float]] = collections.defaultdict(lambda: [0.0] * 5)
        for is_held, trace in ((False, self._active), (True, self._held)):
            for equation in trace:
                owner = equation.owner
                if (owner >= 0 and bool(mask[owner])) != is_held:
                    continue
                cell = cells[owner, equation.kind]
                weights, rest = self._gradient(equation, [i for i in equation.inputs if i.ancestors & active])
                cell[0] += equation.forward.needed
                cell[1] += weights.needed
                cell[2] += rest.needed
                cell[4] += equation.forward.added + weights.added + rest.added
        for i, update in enumerate(self._update):
            if not mask[i]:
                cells[i, operations.UPDATE][3] += update
        names = ["", *self.layers.names]
        by_layer = {name: Parts() for name in names}
        by_kind = {kind: Parts() for kind in operations.KINDS}
        for (owner, kind), cell in cells.items():
            by_layer[names[owner + 1]] = _add(by_layer[names[owner + 1]], cell)
            by_kind[kind] = _add(by_kind[kind], cell)
        return StepFlops(functools.reduce(_add, cells.values(), Parts()), by_layer, by_kind)

    def _gradient(self, equation: Equation, wanted: list[Input]) -> tuple[Flops, Flops]:
        """Price of the gradients of an equation's weights and of its other inputs, those that are wanted."""
        if not wanted:
            return flops.ZERO, flops.ZERO
        key = equation.signature, tuple(i.position for i in wanted), tuple(i.is_weight for i in wanted)
        if key not in self._gradients:
            weights = {i.position for i in wanted if i.is_weight}
            every = flops.of_gradient(equation.eqn, {i.position for i in wanted}, self._backend)
            only = every if len(weights) == len(wanted) else flops.of_gradient(equation.eqn, weights, self._backend)
            self._gradients[key] = only, every - only
        weights, rest = self._gradients[key]
        return (
            weights + Flops(sum(i.added for i in wanted if i.is_weight)),
            rest + Flops(sum(i.added for i in wanted if not i.is_weight)),
        )


def account(
    loss_fn: Callable[..., Any],
    layers: Layers,
    params: PyTree,
    *inputs: Any,
    tx: optax.GradientTransformation | None = None,
    held_loss_fn: Callable[..., Any] | None = None,
    backend: str | None = None,
) -> Account:
    """Predicts what a train step costs, for any frozen set.

    Scanned blocks are counted one by one. What ``jax.checkpoint`` computes a second time is not counted.

    Args:
        loss_fn: A function of ``(params, *inputs)`` to a scalar, or to a tuple whose first leaf is one. It is only
            traced.
        layers: The network's layers.
        params: Parameter pytree; arrays or ``jax.ShapeDtypeStruct``.
        *inputs: The batch, or ``jax.ShapeDtypeStruct`` of its shape, and what else the loss depends on; the first axis
            of the first counts the examples.
        tx: The optimizer; without it, updates are not counted.
        held_loss_fn: The same as ``loss_fn``, all layers in the mode that they have when frozen; for networks whose
            frozen layers do something else than active ones (BatchNorm). In Linen, ``loss_fn`` inside
            ``smartfrz_jax.linen.hold`` of all layers.
        backend: Platform that the step will run on; JAX's default.

    Returns:
        The account. It is traced here, once; for a frozen set it takes milliseconds.

    Raises:
        ValueError: If there are no inputs, or the loss is not a scalar or depends on no parameter.

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
        >>> def loss(params, x):
        ...     return (x @ params["a"] @ params["b"]).sum()
        >>> layers = find_layers(params, loss, jnp.ones((32, 8)))
        >>> costs = account(loss, layers, params, jnp.ones((32, 8)))
        >>> step = costs.flops(Frozen(layers, frozenset({"a"}))).by_kind["linear"]
        >>> step.forward, step.weight_gradients, step.activation_gradients
        (8192.0, 4096.0, 0.0)
    """
    backend = backend or jax.default_backend()
    return assemble(
        layers,
        Trace(loss_fn, params, inputs),
        None if held_loss_fn is None else Trace(held_loss_fn, params, inputs),
        params,
        tx,
        backend,
    )


def assemble(layers: Layers, active: Trace, held: Trace | None, params: PyTree, tx: Any, backend: str) -> Account:
    """An :class:`Account` from the loss with all layers active, and with all of them frozen."""
    if not active.inputs:
        raise ValueError("inputs: got none; what depends on the data is traced, so pass the batch after the parameters")
    trained = list(equations.equations(active, layers, backend))
    frozen = trained if held is None else list(equations.equations(held, layers, backend))
    update = (
        [0.0] * len(layers) if tx is None else [_update(tx, layers, name, params, backend) for name in layers.names]
    )
    return Account(layers, jax.tree.leaves(active.inputs)[0].shape[0], trained, frozen, update, backend)


def _update(tx: optax.GradientTransformation, layers: Layers, layer: str, params: PyTree, backend: str) -> float:
    """FLOPs of the optimizer for one layer."""
    # As a partition of optax's shows the optimizer the layers that it is for.
    shown = paths.tree_map(lambda name, leaf: leaf if layers.owner[name] == layer else optax.MaskedNode(), params)

    def update(params: PyTree, grads: PyTree, opt_state: PyTree) -> tuple[PyTree, PyTree]:
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    closed = jax.make_jaxpr(update)(shown, shown, jax.eval_shape(tx.init, shown))
    flat = inlining.inline(closed, (), ()).jaxpr
    return sum(flops.of_equation(eqn, backend).needed for eqn in inlining.needed(flat, flat.outvars))


def _add(parts: Parts, more: Iterable[float]) -> Parts:
    return Parts(*(a + b for a, b in zip(parts, more, strict=True)))
