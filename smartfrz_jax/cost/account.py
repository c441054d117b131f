"""What a train step costs for any frozen set, predicted from one trace of the loss, without compiling it.

Every equation of the loss belongs to a layer and depends on the parameters of some. Its forward pass is always run; the
gradients of its weights are computed if its layer is active; those of its other inputs, if an active layer lies
anywhere before. So, once each equation has its price, any frozen set is a matter of adding up.
"""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax
import optax

from smartfrz_jax.cost import equations, kinds, operations, step_trace
from smartfrz_jax.cost.equations import Equation, Equations, Input, Trace
from smartfrz_jax.cost.step_flops import Parts, StepFlops
from smartfrz_jax.freezing.frozen import Frozen, check_frozen
from smartfrz_jax.jaxprs import example_axis, flops
from smartfrz_jax.jaxprs.flops import Flops
from smartfrz_jax.layers.layers import Layers, check_layers, check_params
from smartfrz_jax.layers.select import Selectors, select
from smartfrz_jax.pytrees import checks
from smartfrz_jax.pytrees.types import PyTree


class TracedStep(NamedTuple):
    """What an account is made of.

    Attributes:
        active: The loss, with nothing frozen.
        held: The same with every layer run as a frozen one.
        update: FLOPs of each layer's part in the update of the optimizer.
        step: From a frozen set to the jaxpr of the whole step.
    """

    active: Equations
    held: Equations
    update: list[float]
    step: Callable[[Frozen], Any]


class Account:
    """Predicted costs of a train step; made by :func:`account`.

    FLOPs are counted as XLA counts them in a compiled program (see :mod:`smartfrz_jax.jaxprs.flops`), multiply-adds as
    they are published.

    Attributes:
        layers: The layers.
        examples: Number of examples in the batch.
        macs: Multiply-adds of one forward pass, by kind of operation: convolutions, linear maps and products of data.
        elements: Elements of one forward pass that other operations work on, by kind.
        params: Shapes of the parameters.
        tx: The optimizer, if any.
        backend: Platform that the step will run on.
    """

    def __init__(
        self,
        layers: Layers,
        examples: int,
        traced: TracedStep,
        params: PyTree,
        tx: optax.GradientTransformation | None,
        backend: str,
    ):
        self.layers, self.examples, self.tx, self.backend = layers, examples, tx, backend
        self.params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
        self.macs = collections.Counter[str]()
        every = [op for equation in traced.active.all for op in equation.operations]
        for op in every:
            self.macs[op.kind] += flops.macs(op.eqn) * op.times
        self.elements = kinds.elements((op.eqn, op.kind, op.times) for op in every)
        self._traced = traced
        self._gradients: dict[Any, tuple[Flops, Flops]] = {}
        self._steps: dict[tuple[frozenset[str], frozenset[str]], StepFlops] = {}

    def flops(self, frozen: Frozen | None = None, *, stopped: Selectors = ()) -> StepFlops:
        """Predicted FLOPs of one step.

        Args:
            frozen: The frozen set; none by default.
            stopped: Layers, as in ``Frozen(layers, names)``, that are used again behind others, such as an embedding
                that is the classifier too, of which the gradient by way of the first use is not computed: its output
                goes through ``jax.lax.stop_gradient``.

        Returns:
            The FLOPs, in all, by layer and by kind of operation.

        Raises:
            TypeError: If ``frozen`` is no frozen set.
            ValueError: If the frozen set is of another network, or a name of ``stopped`` is none of its layers.
        """
        frozen = self._checked(frozen)
        key = frozen.names, frozenset(select(self.layers, stopped, "stopped"))
        if key not in self._steps:
            self._steps[key] = self._count(frozen, key[1])
        return self._steps[key]

    def reached_through(self, frozen: Frozen) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Active layers whose gradients pass through frozen ones.

        Args:
            frozen: The frozen set.

        Returns:
            Their names, front to back; and those of them that gradients so reach by way of their first use alone: they
            are used again behind the frozen layers, as an embedding that is the classifier too.

        Raises:
            TypeError: If ``frozen`` is no frozen set.
            ValueError: If the frozen set is of another network.
        """
        mask, n = self._checked(frozen).mask, len(self.layers)
        held = (e for e in self._equations(frozen) if e.owner >= 0 and mask[e.owner])
        inputs = (i.ancestors for e in held for i in e.inputs if not i.is_weight)
        reached = functools.reduce(int.__or__, inputs, 0) & self._bits(frozen, ())
        whole, first = ({name for i, name in enumerate(self.layers.names, at) if reached >> i & 1} for at in (0, n))
        return self.layers.check(whole | first, "frozen"), self.layers.check(first - whole, "frozen")

    @property
    def scans(self) -> list[frozenset[str]]:
        """Layers that one ``jax.lax.scan`` runs together, their weights stacked in the step; rows are not."""
        names = [(i, layer.name) for i, layer in enumerate(self.layers) if not layer.rows]
        found = (frozenset(name for i, name in names if mask >> i & 1) for mask in self._traced.active.scans)
        return [layers for layers in found if layers]

    def trace(self, frozen: Frozen | None = None) -> Any:
        """The jaxpr of a step that does what a frozen set asks for and no more; it takes seconds.

        Args:
            frozen: The frozen set; none by default.

        Returns:
            A ``ClosedJaxpr`` of ``(variables, params, opt_state, inputs)``, flattened.

        Raises:
            TypeError: If ``frozen`` is no frozen set.
            ValueError: If the frozen set is of another network.
        """
        return self._traced.step(self._checked(frozen))

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
        each = {kinds.BIAS: 1, kinds.NORMALISATION: 2, kinds.ACTIVATION: 1, kinds.POOLING: 1}
        counts = {kind: self.macs[kind] for kind in (kinds.CONVOLUTION, kinds.LINEAR)}
        counts |= {kind: n * self.elements.get(kind, 0) for kind, n in each.items()}
        return {kind: count / self.examples for kind, count in counts.items()}

    def table(self, examples: int) -> str:
        """What training costs as papers have it, 3 forward passes of 2 FLOPs per multiply-add, a line for each kind.

        Args:
            examples: Number of examples trained on: size of the data set times epochs.

        Returns:
            The text; multiply-adds are those of :attr:`counted`. Below the sum stand the products that it leaves out.
        """
        products = self.macs[kinds.ATTENTION] / self.examples
        rows = [*self.counted.items(), ("sum", sum(self.counted.values())), ("attention", products)]
        lines = (f"{kind:14s}{macs:18,.0f}{6e-12 * macs * examples:12,.1f}" for kind, macs in rows)
        return "\n".join((f"{'':14s}{'MACs an example':>18s}{'TFLOPs':>12s}", *lines))

    def _checked(self, frozen: Frozen | None) -> Frozen:
        frozen = Frozen(self.layers) if frozen is None else frozen
        check_frozen(frozen, self.layers)
        return frozen

    def _bits(self, frozen: Frozen, stopped: Collection[str]) -> int:
        """The active layers, as in ``Input.ancestors``."""
        active = [i for i, is_frozen in enumerate(frozen.mask) if not is_frozen]
        first = [i for i in active if self.layers.names[i] not in stopped]
        return sum(1 << i for i in active) | sum(1 << i + len(self.layers) for i in first)

    def _equations(self, frozen: Frozen) -> Iterator[Equation]:
        """The equations, as those of frozen layers are when they are held."""
        mask = frozen.mask
        for is_held, trace in ((False, self._traced.active), (True, self._traced.held)):
            for equation in trace.all:
                if (equation.owner >= 0 and bool(mask[equation.owner])) == is_held:
                    yield equation

    def _count(self, frozen: Frozen, stopped: Collection[str]) -> StepFlops:
        active = self._bits(frozen, stopped)
        # One row for each (layer, kind), columns as in Parts.
        cells: dict[tuple[int, str], list[float]] = collections.defaultdict(lambda: [0.0] * 5)
        for equation in self._equations(frozen):
            weights, rest = self._gradient(equation, [i for i in equation.inputs if i.ancestors & active])
            for op, of_weights, of_rest in operations.shares(equation.operations, frozen.mask):
                cell = cells[op.owner, op.kind]
                cell[0] += op.forward.needed
                cell[1] += weights.needed * of_weights
                cell[2] += rest.needed * of_rest
                cell[4] += op.forward.added + weights.added * of_weights + rest.added * of_rest
        updated = {*frozen.active, *(self.layers.owner[table] for table in frozen.lookups)}
        for i, update in enumerate(self._traced.update):
            if self.layers.names[i] in updated:
                cells[i, kinds.UPDATE][3] += update
        names = ["", *self.layers.names]
        by_layer = {name: Parts() for name in names}
        by_kind = {kind: Parts() for kind in kinds.KINDS}
        for (owner, kind), cell in cells.items():
            by_layer[names[owner + 1]] = by_layer[names[owner + 1]].plus(cell)
            by_kind[kind] = by_kind[kind].plus(cell)
        return StepFlops(functools.reduce(Parts.plus, cells.values(), Parts()), by_layer, by_kind)

    def _gradient(self, equation: Equation, wanted: list[Input]) -> tuple[Flops, Flops]:
        """Price of the gradients of an equation's weights and of its other inputs, those that are wanted."""
        if not wanted:
            return flops.ZERO, flops.ZERO
        key = equation.signature, tuple(i.position for i in wanted), tuple(i.is_weight for i in wanted)
        if key not in self._gradients:
            weights = {i.position for i in wanted if i.is_weight}
            every = flops.of_gradient(equation.eqn, {i.position for i in wanted}, self.backend)
            only = every if len(weights) == len(wanted) else flops.of_gradient(equation.eqn, weights, self.backend)
            self._gradients[key] = only, every - only
        weights, rest = self._gradients[key]
        return (
            weights + Flops(sum(i.added for i in wanted if i.is_weight)),
            rest + Flops(sum(i.added for i in wanted if not i.is_weight)),
        )


def account(
    params: PyTree,
    layers: Layers,
    loss_fn: Callable[..., Any],
    *inputs: Any,
    tx: optax.GradientTransformation | None = None,
    hold: Callable[[Frozen, PyTree], contextlib.AbstractContextManager[Any]] | None = None,
    backend: str | None = None,
) -> Account:
    """Predicts what a train step costs, for any frozen set.

    Every operation is counted once, scanned blocks one by one. XLA computes some cheap values again in every loop that
    reads them, and what ``jax.checkpoint`` asks for: :func:`smartfrz_jax.program_cost` measures that.

    Args:
        params: Parameter pytree; arrays or ``jax.ShapeDtypeStruct``.
        layers: The network's layers.
        loss_fn: A function of ``(params, *inputs)`` to a scalar, or to a tuple whose first leaf is one. It is only
            traced. Axes that it names (``jax.pmap``, ``jax.shard_map``) are there for the trace; the batch is then one
            device's.
        *inputs: The batch, or ``jax.ShapeDtypeStruct`` of its shape, and what else the loss depends on; the first axis
            of the first that has one counts the examples.
        tx: The optimizer; without it, updates are not counted.
        hold: From a frozen set and the parameters to a context in which its layers run as they do when frozen, where
            that is not as active ones do (BatchNorm, dropout): in Linen, ``smartfrz_jax.linen.hold``.
        backend: Platform that the step will run on; JAX's default.

    Returns:
        The account. It is traced here, once; for a frozen set it takes milliseconds, or as long as its cumulative sums
        and products take to compile, once.

    Raises:
        ValueError: If there are no inputs, or none counts examples, the loss is not a scalar or depends on no
            parameter, or with ``tx`` a parameter belongs to no layer or ``tx`` asks for more than gradients.

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
        >>> def loss(params, x):
        ...     return (x @ params["a"] @ params["b"]).sum()
        >>> layers = find_layers(params, loss, jnp.ones((32, 8)))
        >>> costs = account(params, layers, loss, jnp.ones((32, 8)))
        >>> step = costs.flops(Frozen(layers, frozenset({"a"}))).by_kind["linear"]
        >>> step.forward, step.weight_gradients, step.activation_gradients
        (8192.0, 4096.0, 0.0)
    """
    checks.function(loss_fn, "loss_fn", "a function of (params, *inputs) to a scalar loss")
    check_layers(layers)
    check_params(params)

    def loss_of(frozen: Frozen) -> Callable[..., Any]:
        def run(params: PyTree, *inputs: Any) -> Any:
            with contextlib.nullcontext() if hold is None else hold(frozen, params):
                return loss_fn(params, *inputs)

        return run

    return assemble(layers, loss_of, params, params, inputs, tx, backend or jax.default_backend())


def assemble(
    layers: Layers,
    loss_of: Callable[[Frozen], Callable[..., Any]],
    variables: PyTree,
    params: PyTree,
    inputs: tuple[Any, ...],
    tx: optax.GradientTransformation | None,
    backend: str,
) -> Account:
    """An :class:`Account` from the loss of ``(variables, *inputs)`` under every frozen set.

    Args:
        layers: The layers.
        loss_of: The loss for a frozen set.
        variables: The parameters, and maybe other variables.
        params: The parameters as the optimizer sees them.
        inputs: The batch.
        tx: The optimizer, if any.
        backend: Platform.
    """
    if tx is not None:
        checks.transformation(tx)
    if not inputs:
        raise ValueError("inputs: got none; what depends on the data is traced, so pass the batch after the parameters")
    variables, params = jax.eval_shape(lambda *trees: trees, variables, params)  # the account keeps no arrays alive
    active, held = (
        equations.equations(
            step_trace.of_parts(Trace(loss_of(frozen), variables, inputs), layers), layers.of_parts, backend
        )
        for frozen in (Frozen(layers), Frozen(layers, frozenset(layers.names)))
    )
    update = [0.0] * len(layers)
    if tx is not None:
        update = [step_trace.update_flops(tx, layers, name, params, backend) for name in layers.names]

    def trace_step(frozen: Frozen) -> Any:
        return step_trace.trace(loss_of(frozen), frozen, variables, params, inputs, tx)

    traced = TracedStep(active, held, update, trace_step)
    account = Account(layers, example_axis.count(inputs), traced, params, tx, backend)
    account.flops()  # prices almost all gradients there are, here and not in somebody's training loop
    return account
