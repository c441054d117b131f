"""A loss in two parts: what frozen layers make of the batch before any active layer does, and the rest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np

from smartfrz_jax.caching import exchange, loss_jaxpr
from smartfrz_jax.caching.batch_sizes import difference
from smartfrz_jax.caching.loss_adapter import LossAdapter, PartsLoss, Static, TakenApart
from smartfrz_jax.caching.partial_eval import Split, partial_eval
from smartfrz_jax.freezing.frozen import Frozen, check_frozen
from smartfrz_jax.jaxprs import example_axis
from smartfrz_jax.layers.layers import check_leaves, check_of_layers
from smartfrz_jax.pytrees import checks, paths
from smartfrz_jax.pytrees.types import PyTree


class BatchSizeError(ValueError):
    """A batch of another size would give other activations for the same examples."""


def check_each(indices: int, examples: int) -> None:
    """Raises ``ValueError`` unless there are as many indices as examples in a batch."""
    if indices != examples:
        raise ValueError(
            f"indices: got {indices} for a batch of {examples} examples, expected one index for each; pass "
            "those of the whole batch, on every process"
        )


class SplitLoss:
    """A loss in two parts, for batches of any size; :class:`smartfrz_jax.PrefixCache` adds a store between them.

    Args:
        params: Parameters, as ``adapter`` takes them; arrays or ``jax.ShapeDtypeStruct``.
        frozen: The frozen set.
        loss_fn: A function of ``(params, *inputs)``.
        inputs: A batch of at least two examples, or ``jax.ShapeDtypeStruct`` of its shape.
        adapter: Takes the parameters apart.
        state_inputs: Positions of inputs that are variables of layers.

    Attributes:
        frozen: The frozen set.
        split: The two parts, for a batch as ``inputs``.

    Raises:
        ValueError: If the first part would not be the same in every epoch, or nothing is worth keeping.
    """

    def __init__(
        self,
        params: PyTree,
        frozen: Frozen,
        loss_fn: Callable[..., Any],
        inputs: tuple[Any, ...],
        adapter: LossAdapter,
        state_inputs: Collection[int] = (),
    ):
        if not inputs:
            raise ValueError("inputs: got none; what depends on the batch is traced, so pass one after the parameters")
        check_frozen(frozen)
        checks.function(loss_fn, "loss_fn", "a function of the parameters, or the model, and the batch")
        checks.instance(state_inputs, Collection, "state_inputs", "positions of inputs, such as (1,)")
        for table, is_lookup in frozen.lookups.items():
            if is_lookup:
                raise ValueError(
                    f"frozen: got {frozen.layers.lookups[table]!r}, lookups in a table that trains on in layer "
                    f"{frozen.layers.owner[table]!r}, so that what they give changes in every step; freeze that layer "
                    "too, or give the network a head of its own"
                )
        self.frozen = frozen
        if frozen.layers.array_of:  # what is traced has a leaf for every row and lookup
            adapter = adapter if isinstance(adapter, PartsLoss) else PartsLoss(adapter, frozen.layers)
            frozen = Frozen(frozen.layers.of_parts, frozen.names)
        self._frozen = frozen
        self._structure: Any = None
        self._static: Static | None = None
        self._loss_fn, self._adapter, self._state_inputs = loss_fn, adapter, frozenset(state_inputs)
        self._inputs = jax.tree.map(_shape_and_sharding, inputs)
        self._examples = example_axis.count(inputs, self._state_inputs)
        self._run = jax.jit(self._activations, static_argnums=0)
        static, variables = self.taken_apart(params)
        self._traced_for = static, jax.tree.map(_shape, variables)
        self.split = self._split_for(static, variables, inputs)

    def fits(self, params: PyTree) -> bool:
        """Whether the rest can go on from the same activations with these parameters, or this model, as it is now."""
        try:
            self._checked(self._split_for(*self.taken_apart(params), self._inputs))
        except ValueError:
            return False
        return True

    def with_frozen(self, params: PyTree, frozen: Frozen) -> SplitLoss:
        """The same loss for another frozen set."""
        return SplitLoss(params, frozen, self._loss_fn, self._inputs, self._adapter, self._state_inputs)

    def activations(self, params: PyTree | TakenApart, inputs: tuple[Any, ...]) -> tuple[jax.Array, ...]:
        """What the first part gives, the first axis counting the examples; jitted."""
        return self._run(*self.taken_apart(params), inputs)

    def rest(self, params: PyTree, activations: tuple[jax.Array, ...], inputs: tuple[Any, ...]) -> Any:
        """What the loss returns, from the activations; variables change as it changes them."""
        static, variables = self.taken_apart(params)
        out, updates = self._live(static, variables, activations, inputs)
        self._adapter.write(params, variables, updates)
        return out

    def taken_apart(self, params: PyTree | TakenApart) -> TakenApart:
        """What is static, and the arrays; checked by name where the structure is not that of the last call."""
        if isinstance(params, TakenApart):
            return params
        static, variables = self._adapter.split(params)
        if self._static is None or self._static.value != static:
            self._static = Static(static)
        structure = jax.tree.structure(variables)
        if self._structure is None or structure != self._structure:
            check_of_layers(check_leaves(variables, "params"), self._frozen.layers)
            self._structure = structure
        return TakenApart(self._static, variables)

    @functools.cached_property
    def part(self) -> int:
        """Examples of which activations are computed together, whenever some of a batch are missing.

        A quarter of a batch as ``inputs``, or a little more, to be divided among the same devices; all of it if frozen
        layers compute with the number of examples, or the loss takes no other.
        """
        batch = [part for i, part in enumerate(self._inputs) if i not in self._state_inputs]
        blocks = exchange.blocks(exchange.rows_sharding(batch))
        quarter = max(2, -(-self._examples // (4 * blocks)) * blocks)
        try:
            self._checked(self._split_for(*self._traced_for, self._completed((), quarter)[0]))
        except (TypeError, ValueError):  # of another size, or of none: the loss may spell its batch size out
            return self._examples
        return quarter

    def check_batch(self, inputs: tuple[Any, ...], n: int) -> None:
        """Raises ``ValueError`` if there are too many inputs, or not ``n`` examples in those of the first part."""
        if len(inputs) > len(self._inputs):
            raise ValueError(
                f"inputs: got {len(inputs)}, expected {len(self._inputs)}, as many as the cache was made with; leave "
                "out the others, or make a new PrefixCache"
            )
        for name, leaf in paths.flatten(inputs).items():
            counts = loss_jaxpr.INPUTS + name in self._read and not self._is_state(name)
            if leaf is not None and counts and np.shape(leaf):
                check_each(n, np.shape(leaf)[0])

    @property
    def variables(self) -> dict[str, bool]:
        """Names of the arrays that the first part reads beside inputs; whether it reads them whole, or parts of them.

        What it does not read whole may change, in the other parts.
        """
        parts = self.frozen.layers.array_of
        names = (name for name in self._read if not name.startswith(loss_jaxpr.INPUTS))
        return {parts.get(name, name): name not in parts for name in names}

    @functools.cached_property
    def _read(self) -> frozenset[str]:
        return self.split.read

    def rows_of(self, inputs: tuple[Any, ...], rows: np.ndarray, n: int) -> tuple[Any, ...]:
        """Some examples of a batch of ``n``."""
        if np.array_equal(rows, np.arange(n)):
            return inputs

        def some(name: str, leaf: Any) -> Any:
            if leaf is None or self._is_state(name) or shapes[name].shape[:1] != (self._examples,):
                return leaf
            return exchange.some_rows(leaf, rows)

        shapes = paths.flatten(self._inputs)
        return paths.tree_map(some, inputs)

    def grown_from(self, old: SplitLoss) -> Grown | None:
        """How to get the activations from those of another split, of a frozen set with fewer layers.

        Args:
            old: The other one.

        Returns:
            A jitted function of ``(params, activations, *inputs)`` that runs only the layers between the two frontiers,
            or None if there is no such: then the activations must be computed from the inputs.
        """
        growth = self.split.grown(old.split)
        if growth is None:
            return None

        @functools.partial(jax.jit, static_argnums=0)
        def grown(static: Static, variables: PyTree, activations: Any, inputs: Any) -> tuple[jax.Array, ...]:
            inputs = self._completed(inputs, activations[0].shape[0])
            split = self._checked(self._split_for(static, variables, inputs[0]))
            growth = split.grown(old._split_for(static, variables, inputs[0]))
            assert growth is not None
            return growth.run(variables, activations, inputs[1])

        def run(params: PyTree | TakenApart, activations: Any, *inputs: Any) -> tuple[jax.Array, ...]:
            return grown(*self.taken_apart(params), activations, inputs)

        return Grown(run, growth.needed)

    def _state(self, variables: PyTree, inputs: tuple[Any, ...]) -> Mapping[str, str | None]:
        """Layers of the variables and inputs that are no parameters."""
        state: dict[str, str | None] = {name: layer.name for layer in self._frozen.layers for name in layer.state}
        modules = {_module(param): layer for param, layer in self._frozen.layers.owner.items()}
        for name in paths.flatten(inputs):
            at, *rest = name.split(paths.SEPARATOR)
            if int(at) in self._state_inputs:
                ends = (_module(paths.SEPARATOR.join(rest[start:])) for start in range(len(rest)))
                state[loss_jaxpr.INPUTS + name] = next((modules[end] for end in ends if end in modules), None)
        return state

    def _is_state(self, name: str) -> bool:
        return int(name.split(paths.SEPARATOR)[0]) in self._state_inputs

    def _split_for(self, static: Static, variables: PyTree, inputs: tuple[Any, ...]) -> Split:
        variables, inputs = jax.tree.map(_shape, (variables, inputs))
        traced = loss_jaxpr.trace(self._adapter.traceable(self._loss_fn, self._frozen, static.value), variables, inputs)
        examples = example_axis.count(inputs, self._state_inputs)
        return partial_eval(traced, self._frozen, examples, self._state(variables, inputs))

    def _activations(self, static: Static, variables: PyTree, inputs: tuple[Any, ...]) -> tuple[jax.Array, ...]:
        split = self._checked(self._split_for(static, variables, inputs))
        return split.frozen_part(variables, inputs)

    def _live(self, static: Static, variables: PyTree, activations: Any, inputs: tuple[Any, ...]) -> Any:
        expected = [value.shape for value in self.split.frontier]
        checks.arrays(activations, "activations", f"what fetch returns, arrays of {expected} for each example")
        got = [tuple(value.shape[1:]) for value in activations]
        if got != expected:
            raise ValueError(
                f"activations: got {got} for an example, expected {expected}; they are of another frozen set: fetch "
                "them from this cache"
            )
        shapes, inputs = self._completed(inputs, activations[0].shape[0])
        split = self._checked(self._split_for(static, variables, shapes))
        return split.live_part(variables, activations, inputs)

    def _checked(self, split: Split) -> Split:
        same = split.digests == self.split.digests or split.examples != self.split.examples
        if split.frontier != self.split.frontier or not same:
            raise ValueError(
                f"params, inputs: a batch of {split.examples} with this model gives other activations than those that "
                f"are kept ({split.frontier} and {self.split.frontier} for an example); the model, its mode or the "
                "shape of the inputs has changed: make a new PrefixCache"
            )
        how = None if split.examples == self.split.examples else difference(split.program, self.split.program)
        if how is not None:
            raise BatchSizeError(
                f"inputs: frozen layers compute with the number of examples, so that a batch of {split.examples} gives "
                f"other activations than one of {self.split.examples} ({how}); take that number out of them, or pass "
                "as many examples each time"
            )
        return split

    def _completed(self, inputs: tuple[Any, ...], examples: int) -> tuple[Any, Any]:
        """Shapes of a whole batch of inputs, and the inputs with ``None`` for those that are not there."""
        inputs = (*inputs, *[None] * (len(self._inputs) - len(inputs)))
        given = {name: leaf for name, leaf in paths.flatten(inputs).items() if leaf is not None}

        def complete(name: str, shape: Any) -> Any:
            if name in given:
                return _shape(given[name])
            counts = not self._is_state(name) and shape.shape[:1] == (self._examples,)
            return jax.ShapeDtypeStruct((examples, *shape.shape[1:]) if counts else shape.shape, shape.dtype)

        return paths.tree_map(complete, self._inputs), inputs


class Grown:
    """From the activations of fewer frozen layers to those of more: a function of ``(params, activations, *inputs)``.

    Attributes:
        needed: Names of the inputs that it reads, as :attr:`smartfrz_jax.PrefixCache.needed`; the others may be
            ``None`` or left out.
    """

    def __init__(self, run: Callable[..., tuple[jax.Array, ...]], needed: frozenset[str]):
        self._run, self.needed = run, needed

    def __call__(self, params: PyTree, activations: Any, *inputs: Any) -> tuple[jax.Array, ...]:
        """The activations, of shape ``(examples, ...)``."""
        return self._run(params, activations, *inputs)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False))


def _shape_and_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    return _shape(leaf) if sharding is None else _shape(leaf).update(sharding=sharding)


def _module(name: str) -> str:
    return name.rpartition(paths.SEPARATOR)[0]
