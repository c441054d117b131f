"""The state of an optimizer when the frozen set changes: what is dropped, what goes on, what starts afresh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr, tree_leaves_with_path

from smartfrz_jax.freezing.accumulation import WindowState, averages, clock_of, partial_sums, start_windows
from smartfrz_jax.freezing.frozen import ACTIVE, FROZEN, Frozen, check_frozen
from smartfrz_jax.freezing.parts import fit, rows, state_rows
from smartfrz_jax.freezing.transform import freeze, unshared
from smartfrz_jax.layers.layers import Layers, check_params
from smartfrz_jax.pytrees import checks, paths
from smartfrz_jax.pytrees.types import PyTree


def migrate_opt_state(
    opt_state: Any,
    tx: optax.GradientTransformation,
    params: PyTree,
    frozen: Frozen,
    *,
    kept: Mapping[str, Any] | None = None,
    may_lack: bool = False,
) -> Any:
    """Optimizer state for a new frozen set, every value kept that the new state has a place for.

    State of layers that freeze is dropped (its memory is free once the old state is), that of layers that stay active
    is carried over unchanged, as the same arrays, that of layers that return is initialised afresh, or taken from
    ``kept``. Shared state such as step counts goes on in either case;
    :class:`~smartfrz_jax.freezing.returning.Kept` says what this means for Adam. Gradients that were accumulated for an
    update to come, as ``optax.MultiSteps`` does, are of no use later: they start afresh even with ``kept``, and a layer
    that returns amid a window of ``MultiSteps`` takes the average over what is left of it.

    No two arrays of the new state share their memory, nor with ``params``, so that both can be donated.

    Args:
        opt_state: State of ``freeze(tx, other)`` for any other set, or of ``tx`` itself.
        tx: The optax transformation.
        params: Parameter pytree.
        frozen: The new frozen set.
        kept: What :func:`dropped` gave when the layers that return froze. It is placed as fresh state would be: with
            the sharding of the parameter, as far as ``tx`` gives it that.
        may_lack: Whether ``kept`` may lack state: of layers that were frozen from the beginning, which return afresh.

    Returns:
        State of ``freeze(tx, frozen)``.

    Raises:
        ValueError: If a value is missing, left over, or does not fit what ``tx`` gives for ``params``
            (:func:`~smartfrz_jax.freezing.parts.fit.fits`), or ``tx`` keeps state that cannot be split by layer, as
            ``optax.flatten`` does, or, where rows of stacked parameters change, by row, as ``optax.novograd`` does.
    """
    checks.transformation(tx)
    check_frozen(frozen)
    check_params(params)
    if kept is not None:
        checks.by_name(kept, "kept", "what was dropped when the layers froze, by key path, or None")
    checks.flag(may_lack, "may_lack")
    for leaf in jax.tree.leaves(opt_state):
        if not hasattr(leaf, "shape") and not isinstance(leaf, bool | int | float):
            raise TypeError(f"opt_state: got {checks.got(leaf)} in it, expected the state of tx, a pytree of arrays")
    opt_state = _with_groups(opt_state, tx, params, frozen.layers)
    moves = _moves(opt_state, tx, params, frozen)
    old = by_path(opt_state)
    if frozen.layers.stacks:
        _check_by_row(opt_state, tx, params, frozen)
    abstract = _abstract(opt_state, tx, params, frozen)
    wanted = by_path(abstract)
    as_moved = old | {path: moves[path].shape(leaf) for path, leaf in old.items() if path in moves}
    differs = fit.mismatch(as_moved, wanted, dropped=fit.masked(opt_state), absent=fit.masked(abstract))
    if differs is not None:
        got = f"{differs} is {fit.text(old.get(differs))}, but tx makes it {fit.text(wanted.get(differs))}"
        if _is_of_all_layers(differs, tx, params, frozen.layers):
            raise ValueError(
                f"opt_state: {got} with this frozen set; state that is not shaped like the parameters cannot be split "
                "by layer. Leave out of tx what joins them: optax.flatten(optax.adam(0.1)) is optax.adam(0.1)"
            )
        raise ValueError(
            f"opt_state: {got} for these params; pass the tx that made opt_state, and the params it was made for"
        )
    returning = {path for path in wanted if path not in old or (path in moves and moves[path].returning)}
    fresh: dict[str, Any] = {}
    if returning:  # a layer returns
        fresh = _fresh(returning, tx, params, frozen)
        if kept is not None:
            worth = _worth_keeping(abstract)
            put_back = {
                path: _put_back(kept, path, leaf, moves, may_lack) for path, leaf in fresh.items() if path in worth
            }
            fresh |= put_back
        clocks = {path: old[clock] for path in fresh if (clock := clock_of(path)) in old}
        fresh |= {path: jnp.broadcast_to(clock, fresh[path].shape) for path, clock in clocks.items()}
    source = old | {path: leaf for path, leaf in fresh.items() if path not in old}
    source |= {path: move(old[path], fresh.get(path)) for path, move in moves.items() if path in old and path in wanted}
    return unshared(jax.tree_util.tree_map_with_path(lambda path, _: source[keystr(path)], abstract), params)


def unfrozen_opt_state(opt_state: Any, tx: optax.GradientTransformation, params: PyTree, layers: Layers) -> Any:
    """The optimizer's own state, as ``tx`` makes it for all parameters, for code that reads or changes that.

    Frozen layers have what ``tx`` would start with from their present weights. So
    ``optax.contrib.schedule_free_eval_params`` gives their weights as they are, and the gradient that
    ``optax.value_and_grad_from_state`` finds for them is zero.

    Args:
        opt_state: State of ``freeze(tx, frozen)`` for any frozen set.
        tx: The optax transformation.
        params: Parameter pytree.
        layers: The network's layers.

    Returns:
        State of ``tx``; :func:`migrate_opt_state` takes it back.

    Raises:
        ValueError: As :func:`migrate_opt_state` does.

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax import find_layers
        >>> from smartfrz_jax.pytrees import checks, paths
        >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
        >>> layers = find_layers(params, lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"], jnp.ones((1, 2)))
        >>> tx = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
        >>> frozen = Frozen(layers, frozenset({"a"}))
        >>> opt_state = freeze(tx, frozen).init(params)
        >>> own = unfrozen_opt_state(opt_state, tx, params, layers)
        >>> own.hyperparams["learning_rate"] = jnp.float32(0.01)
        >>> opt_state = migrate_opt_state(own, tx, params, frozen)
    """
    own = migrate_opt_state(opt_state, tx, params, Frozen(layers)).inner_states[ACTIVE].inner_state
    return own.inner_state if isinstance(own, WindowState) else own


def dropped(opt_state: Any, tx: optax.GradientTransformation, params: PyTree, frozen: Frozen) -> dict[str, Any]:
    """What :func:`migrate_opt_state` drops and can take back: state of layers that freeze, by key path.

    Args:
        opt_state: State of ``freeze(tx, other)`` for any other set, or of ``tx`` itself.
        tx: The optax transformation.
        params: Parameter pytree.
        frozen: The new frozen set.
    """
    opt_state = _with_groups(opt_state, tx, params, frozen.layers)
    wanted, moves = by_path(_abstract(opt_state, tx, params, frozen)), _moves(opt_state, tx, params, frozen)
    worth, found = _worth_keeping(opt_state), dict[str, Any]()
    for path, leaf in by_path(opt_state).items():
        if path in worth and path in moves:
            found |= moves[path].leaving(path, leaf)
        elif path in worth and path not in wanted:
            found[path] = leaf
    return found


def held(opt_state: Any, tx: optax.GradientTransformation, params: PyTree, frozen: Frozen) -> set[str]:
    """The paths under which :func:`dropped` would give what a state holds.

    Args:
        opt_state: State of ``freeze(tx, frozen)``.
        tx: The optax transformation.
        params: Parameter pytree.
        frozen: The frozen set.
    """
    moves = _moves(opt_state, tx, params, frozen)
    return {
        each
        for path in by_path(opt_state)
        for each in ([f"{path}[{row}]" for row in moves[path].after] if path in moves else [path])
    }


def by_path(tree: Any) -> dict[str, Any]:
    """Leaves of a pytree by key path, as ``jax.tree_util.keystr`` writes it."""
    return {keystr(path): leaf for path, leaf in tree_leaves_with_path(tree)}


def _abstract(opt_state: Any, tx: optax.GradientTransformation, params: PyTree, frozen: Frozen) -> Any:
    """The state for another frozen set, with shapes in place of arrays."""

    def is_monitor(node: Any) -> bool:
        return isinstance(node, optax.MonitorState)

    # What is measured is in the state from the first update on, not as it is made.
    states = tree_leaves_with_path(opt_state, is_leaf=is_monitor)
    measured = {keystr(path): node.measurements for path, node in states if is_monitor(node)}

    def with_measurements(path: Any, node: Any) -> Any:
        return node._replace(measurements=measured.get(keystr(path), {})) if is_monitor(node) else node

    made = jax.eval_shape(freeze(tx, frozen).init, params)
    return jax.tree_util.tree_map_with_path(with_measurements, made, is_leaf=is_monitor)


def _moves(opt_state: Any, tx: optax.GradientTransformation, params: PyTree, frozen: Frozen) -> dict[str, rows.Move]:
    """How state of stacked parameters comes to be of other rows, by path."""
    if not frozen.layers.stacks:
        return {}
    of_state, there, found = rows.of_state(opt_state), by_path(opt_state).keys(), {}
    for path, (axis, array) in state_rows.axes(tx, params, frozen.layers).items():
        every = _every_row(frozen, array)
        before = of_state.get(array, every) if path in there else ()
        found[path] = rows.Move(axis, before, () if frozen.is_frozen(array) else frozen.rows.get(array, every))
    return found


def _check_by_row(opt_state: Any, tx: optax.GradientTransformation, params: PyTree, frozen: Frozen) -> None:
    """Raises unless all state of stacked parameters whose rows change can be divided among them."""
    of_state, leaves = rows.of_state(opt_state), by_path(opt_state)
    for path, array in state_rows.together(tx, params, frozen.layers).items():
        every = _every_row(frozen, array)
        changes = of_state.get(array, every) != frozen.rows.get(array, every)
        if path in leaves and changes and not frozen.is_frozen(array):
            raise ValueError(
                f"tx: keeps {path}, {fit.text(leaves[path])}, of all rows of {array!r} together, expected state of "
                "each row, for some of them freeze or return; take an optimizer that has such, as optax.adamw, or find "
                "the layers without rows=True"
            )


def _every_row(frozen: Frozen, array: str) -> tuple[int, ...]:
    return tuple(range(len(frozen.layers.stacks[array].layers)))


def _with_groups(opt_state: Any, tx: optax.GradientTransformation, params: PyTree, layers: Layers) -> Any:
    """A state of ``tx`` itself as one of ``freeze(tx, nothing)``; one of ``freeze(tx, other)`` as it is."""
    # Where tx itself is a multi_transform, the type alone does not tell its own state from that of freeze(tx, other).
    if not isinstance(opt_state, optax.MultiTransformState) or (
        by_path(opt_state).keys() == by_path(jax.eval_shape(tx.init, params)).keys()
    ):
        if averages(tx) and isinstance(opt_state, optax.MultiStepsState):
            opt_state = start_windows(opt_state, params, layers.stacks)
        return optax.MultiTransformState(
            {ACTIVE: optax.MaskedState(opt_state), FROZEN: optax.MaskedState(optax.EmptyState())}
        )
    return opt_state


def _fresh(
    returning: set[str], tx: optax.GradientTransformation, params: PyTree, frozen: Frozen
) -> dict[str, jax.Array]:
    """State of layers that return, by path, made without that of those that stay: this is in memory already."""
    arrays = frozen.layers.arrays
    # A path ends with the name of its parameter: the longest, as this may itself end with that of another.
    names = (paths.of_keystr(path).split(paths.SEPARATOR) for path in returning)
    endings = ((paths.SEPARATOR.join(name[start:]) for start in range(len(name))) for name in names)
    found = [next((ending for ending in each if ending in arrays), None) for each in endings]
    back = {layer for name in found if name is not None for layer in arrays[name]}
    made: dict[str, Any] = {}
    if None not in found:
        made = by_path(freeze(tx, frozen.add([name for name in frozen.active if name not in back])).init(params))
    if not returning <= made.keys():
        made = by_path(freeze(tx, frozen).init(params))
    return {path: leaf for path, leaf in made.items() if path in returning}


def _worth_keeping(opt_state: Any) -> set[str]:
    """Paths of a state without those of gradients that wait for an update, and of the clock that they go by."""
    waiting, there = tuple(partial_sums(opt_state)), by_path(opt_state).keys()
    return {path for path in there if not path.startswith(waiting) and clock_of(path) not in there}


def _put_back(
    kept: Mapping[str, Any], path: str, fresh: Any, moves: Mapping[str, rows.Move], may_lack: bool
) -> jax.Array:
    """A value that was put aside, on the devices of a fresh one; of a stacked one, the rows that return."""
    if path in moves:
        move = moves[path]
        for row in move.returning:
            at = move.after.index(row)
            part = _put_back(kept, f"{path}[{row}]", move.part(fresh, at), {}, may_lack)
            fresh = move.with_row(fresh.astype(part.dtype), at, part)
        return fresh
    if may_lack and path not in kept:
        return fresh
    if not fit.fits(kept.get(path), fresh):
        raise ValueError(
            f"kept: {path} is {fit.text(kept.get(path))}, but tx makes it {fit.text(fresh)}; pass all that was dropped "
            "when the layers that return froze, or None to let them start afresh"
        )
    # A copy: on a CPU the array could share its memory with NumPy's, which a step that donates it would write over.
    value = jnp.array(kept[path])
    return jax.device_put(value, fresh.sharding) if fresh.committed else value


def _is_of_all_layers(path: str, tx: optax.GradientTransformation, params: PyTree, layers: Layers) -> bool:
    """Whether ``tx`` makes the value at a path for all active layers together: it has another shape for fewer."""
    if len(layers) < 2:
        return False
    some = (Frozen(layers), Frozen(layers, frozenset(layers.names[:1])))
    values = [by_path(jax.eval_shape(freeze(tx, frozen).init, params)).get(path) for frozen in some]
    return None not in values and not fit.fits(*values)
