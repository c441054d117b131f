"""How much it hurts to freeze the front of a network at a moment of its training.

That a layer has stopped changing does not mean that freezing it is free, nor the reverse; so here the cost itself is
measured, as an increase of the held-out loss, for the layers up to each of some depths at each of some moments:

- :func:`swap_harm`, after the run: the finished network gets the weights that its front had at the moment back. It
  takes only forward passes. The rest of the network could not adapt to them, so it says more than the true cost; what
  it is good for is the order.
- :func:`branch_harm`, a counterfactual: from the moment on the network is trained for a while twice, with the front
  frozen and with nothing frozen. It takes training, and says less than the true cost if the branch is much shorter than
  what was left of the run.

Both give matrices with NaN where nothing was measured, for a :class:`~smartfrz_jax.learning.Recording`; :func:`fill`
fills them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from smartfrz_jax.freezing.frozen import Frozen
from smartfrz_jax.layers.layers import Layers, check_layers, check_leaves
from smartfrz_jax.pytrees import checks, paths
from smartfrz_jax.pytrees.types import PyTree

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Cell = tuple[int, int]
"""Train steps done, and how many layers from the front are frozen or swapped."""

_SCALAR = "a scalar, the mean held-out loss"
_ROUNDS, _CONVERGED = 1000, 1e-8  # of the projection in fill; the second is a share of the largest harm


def swap_harm(
    layers: Layers,
    steps: Int[np.ndarray, " records"],
    snapshots: Mapping[int, PyTree],
    final: PyTree,
    loss: Callable[[PyTree], Any],
    *,
    depths: Iterable[str] | None = None,
    owner: Callable[[str], str] | None = None,
    progress: Callable[[Sequence[Cell]], Iterable[Cell]] | None = None,
) -> Float[np.ndarray, "records layers"]:
    """Held-out loss of the finished network with the front it had at a moment, less that of the finished network.

    Args:
        layers: The network's layers.
        steps: Train steps done at each record of the run.
        snapshots: Variables of the network at some of these steps, by step: parameters, and what does not train but
            belongs to layers, such as BatchNorm statistics, in one pytree (of a Flax NNX model
            ``nnx.state(model, (nnx.Param, nnx.BatchStat))``). Arrays on the host will do, and so will a mapping that
            reads them from files.
        final: The same at the end of the run.
        loss: From such a pytree to the held-out loss.
        depths: Names of layers: each is the last one of a front to be measured. ``None`` is all but the head.
        owner: From the name of a leaf (see :mod:`smartfrz_jax.pytrees.paths`) to that of the layer that it belongs to.
            ``None`` goes by ``layers``, which know all of an NNX model, and the parameters of others.
        progress: Wraps the sequence of measurements, such as ``tqdm.tqdm``.

    Returns:
        float32 of shape ``(records, layers)``, NaN where not measured.

    Raises:
        ValueError: If there are no snapshots, one is of a step that was not recorded or has other leaves than
            ``final``, a leaf belongs to no layer, a depth is no layer, or a loss is NaN or infinite.

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax import find_layers
        >>> final = {"a": jnp.ones((1, 1)), "b": jnp.ones((1, 1))}
        >>> layers = find_layers(final, lambda p, x: x @ p["a"] @ p["b"], jnp.ones((1, 1)))
        >>> snapshots = {10: {"a": jnp.full((1, 1), 3.0), "b": jnp.zeros((1, 1))}}
        >>> def loss(p):
        ...     return (p["a"] * p["b"] - 1).item() ** 2
        >>> swap_harm(layers, np.array([10, 20]), snapshots, final, loss).tolist()
        [[4.0, nan], [nan, nan]]
    """
    _check(layers, steps, snapshots, progress)
    checks.function(loss, "loss", "a function from such a pytree to the held-out loss")
    if owner is not None:
        checks.function(owner, "owner", "a function from the name of a leaf to that of its layer")
    check_leaves(final, "final")
    owner = owner or _owner(layers)
    layer_of = {name: owner(name) for name in paths.flatten(final)}
    layers.check(layer_of.values(), "owner")
    cells = [(step, front) for step, front in _cells(layers, steps, snapshots, depths) if front]
    base, losses, read = _finite(loss(final), "loss", "of final"), {}, _ReadOnce(snapshots)
    for step, front in (progress or iter)(cells):
        swapped = set(layers.names[:front])
        then = paths.flatten(read[step])
        if then.keys() != layer_of.keys():
            odd = sorted(then.keys() ^ layer_of.keys())[0]
            raise ValueError(
                f"snapshots: {odd!r} is only in {'that of step ' + str(step) if odd in then else 'final'}; take the "
                "same variables at every moment"
            )
        changed = paths.tree_map(lambda name, end, s=swapped, t=then: t[name] if layer_of[name] in s else end, final)
        losses[step, front] = _finite(loss(changed), "loss", f"with the first {front} layers of step {step}")
    return _matrix(layers, steps, losses, dict.fromkeys(snapshots, base))


def branch_harm(
    layers: Layers,
    steps: Int[np.ndarray, " records"],
    snapshots: Mapping[int, Any],
    train_branch: Callable[[Any, Frozen], Any],
    *,
    depths: Iterable[str] | None = None,
    known: MutableMapping[Cell, float] | None = None,
    progress: Callable[[Sequence[Cell]], Iterable[Cell]] | None = None,
) -> Float[np.ndarray, "records layers"]:
    """Held-out loss after a short branch of the run with the front frozen, less that with nothing frozen.

    The two are comparable if ``train_branch`` gives them the same batches, the same random numbers and the same
    schedule. The schedule should take the learning rate to zero by the end of the branch: what the front would still
    have gained shows in the loss only then.

    Args:
        layers: The network's layers.
        steps: Train steps done at each record of the run.
        snapshots: By step, for some of these steps, whatever ``train_branch`` needs to go on from there: parameters,
            optimizer state, the step. A mapping that reads it from files will do.
        train_branch: From a snapshot and a frozen set to the held-out loss at the end of a branch. It is called once
            for each depth and moment, and once more for each moment, with nothing frozen.
        depths: Names of layers: each is the last one of a front to be measured. ``None`` is all but the head.
        known: Losses that were measured before, by step and number of frozen layers. These are not measured again, and
            new ones are put there as soon as they are known: a mapping that keeps them in a file makes the measurement
            resumable.
        progress: Wraps the sequence of branches, such as ``tqdm.tqdm``.

    Returns:
        float32 of shape ``(records, layers)``, NaN where not measured.

    Raises:
        ValueError: If there are no snapshots, one is of a step that was not recorded, a depth is no layer, or a loss is
            NaN or infinite (such a loss is not put into ``known``).

    Example:
        >>> import jax.numpy as jnp
        >>> from smartfrz_jax import find_layers
        >>> params = {"a": jnp.ones((1, 1)), "b": jnp.ones((1, 1)), "c": jnp.ones((1, 1))}
        >>> layers = find_layers(params, lambda p, x: x @ p["a"] @ p["b"] @ p["c"], jnp.ones((1, 1)))
        >>> def train_branch(snapshot, frozen):
        ...     return 1.0 + 0.5 * len(frozen.names)
        >>> branch_harm(layers, np.array([10, 20]), {20: params}, train_branch).tolist()
        [[nan, nan, nan], [0.5, 1.0, nan]]
    """
    _check(layers, steps, snapshots, progress)
    checks.function(train_branch, "train_branch", "a function from a snapshot and a frozen set to the held-out loss")
    known = {} if known is None else known
    checks.instance(known, MutableMapping, "known", "a dict from (step, frozen layers) to losses")
    cells, losses, read = _cells(layers, steps, snapshots, depths), {}, _ReadOnce(snapshots)
    for cell in cells:
        if cell in known:
            losses[cell] = _finite(known[cell], "known", f"for {cell}", "take it out to measure it again")
    for step, front in (progress or iter)(cells):
        if (step, front) not in losses:
            loss = train_branch(read[step], Frozen(layers, frozenset(layers.names[:front])))
            known[step, front] = losses[step, front] = _finite(
                loss, "train_branch", f"with the first {front} layers frozen from step {step}"
            )
    base = {step: losses.pop((step, 0)) for step in snapshots}
    return _matrix(layers, steps, losses, base)


def fill(
    harm: Float[np.ndarray, "records layers"], steps: Int[np.ndarray, " records"], total_steps: int
) -> Float[np.ndarray, "records layers"]:
    """Harm at every record and layer, from that at some of them.

    What freezing truly costs is no less for more layers and no less for an earlier moment, as whoever freezes early has
    frozen for all that follows. The measurements are noisy, so they are replaced by those closest to them (least
    squares) of which this is true. Taking running maxima instead would add up the noise of the whole matrix in one
    direction. Costs below zero count as zero.

    Between measured moments and depths harm is linear, from zero for no layers and to zero at the end of the run. There
    is nothing to go by, hence NaN, deeper than the deepest measured layer and before the first measured moment.

    Args:
        harm: As :func:`swap_harm` and :func:`branch_harm` give it: measured, at each moment at which anything was, for
            the same layers.
        steps: Train steps done at each record.
        total_steps: Train steps of the whole run.

    Returns:
        Shape ``(records, layers)``, rising along the layers and falling along the records.

    Raises:
        ValueError: If nothing was measured, or other layers at some moments than at others.

    Example:
        >>> harm = np.full((3, 3), np.nan)
        >>> harm[0, 1] = 4.0
        >>> fill(harm, np.array([1, 2, 3]), total_steps=3)
        array([[ 2.,  4., nan],
               [ 1.,  2., nan],
               [ 0.,  0., nan]])
    """
    harm, steps = np.asarray(harm, np.float64), np.asarray(steps)
    measured = ~np.isnan(harm)
    moments, depths = np.flatnonzero(measured.any(axis=1)), np.flatnonzero(measured.any(axis=0))
    if not len(moments) or not measured[np.ix_(moments, depths)].all():
        raise ValueError(
            f"harm: measured at {len(moments)} moments and {len(depths)} depths, {int(measured.sum())} values; "
            "expected at least one, and every depth at every moment"
        )
    grid = np.maximum(_monotone(harm[np.ix_(moments, depths)]), 0.0)
    filled = np.full(harm.shape, np.nan)
    every_depth = np.arange(depths[-1] + 1)
    rows = [np.interp(every_depth, np.array([-1, *depths]), np.array([0.0, *row])) for row in grid]
    known_steps, later = steps[moments], steps[moments[0] :]
    if known_steps[-1] < total_steps:
        known_steps, rows = np.append(known_steps, total_steps), [*rows, np.zeros(len(every_depth))]
    for depth, column in enumerate(np.stack(rows, axis=1)):
        filled[moments[0] :, depth] = np.interp(later, known_steps, column)
    return filled


def _check(layers: Any, steps: Any, snapshots: Any, progress: Any) -> None:
    """Checks what both measurements are given."""
    check_layers(layers)
    expected = "a vector of integers, the train steps done at each record"
    if checks.array(steps, "steps", expected).dtype.kind not in "iu" or np.ndim(steps) != 1 or not np.size(steps):
        raise ValueError(f"steps: got {checks.got(steps)}, expected {expected}")
    checks.by_name(snapshots, "snapshots", "a mapping from train steps to what the network was then")
    if progress is not None:
        checks.function(progress, "progress", "a function of a sequence to an iterable, such as tqdm.tqdm")


class _ReadOnce:
    """Keeps the last value that was read from a mapping: cells come by moment."""

    def __init__(self, snapshots: Mapping[int, Any]):
        self._snapshots = snapshots
        self._last: tuple[int, Any] | None = None

    def __getitem__(self, step: int) -> Any:
        if self._last is None or self._last[0] != step:
            self._last = None  # before the next is read: two may not fit into memory
            self._last = step, self._snapshots[step]
        return self._last[1]


def _owner(layers: Layers) -> Callable[[str], str]:
    layer_of = {name: layer.name for layer in layers for name in (*layer.params, *layer.state)}

    def owner(name: str) -> str:
        if name not in layer_of:
            raise ValueError(
                f"final: {name!r} belongs to no layer (they have {', '.join(map(repr, list(layer_of)[:3]))}, ...); "
                "leave it out, or pass owner, a function from the name of a leaf to that of its layer"
            )
        return layer_of[name]

    return owner


def _cells(layers: Layers, steps: np.ndarray, snapshots: Mapping[int, Any], depths: Iterable[str] | None) -> list[Cell]:
    """Moment by moment: nothing, then the layers up to each depth."""
    recorded = np.asarray(steps).tolist()
    unknown = sorted(set(snapshots) - set(recorded))
    if unknown or not snapshots:
        raise ValueError(
            f"snapshots: got {f'one of step {unknown[0]}' if unknown else 'none'}, expected some of the "
            f"{len(recorded)} recorded steps, from {recorded[0]} to {recorded[-1]}"
        )
    names = layers.check(layers.names[:-1] if depths is None else depths, "depths")
    if not names:
        raise ValueError("depths: got no layers, expected the names of layers up to which to freeze")
    fronts = [0, *(layers.names.index(name) + 1 for name in names)]
    return [(step, front) for step in sorted(snapshots) for front in fronts]


def _finite(
    loss: Any, argument: str, where: str, way_out: str = "if the training diverged, lower its learning rate"
) -> float:
    value = checks.number(loss, argument, _SCALAR)
    if not np.isfinite(value):
        raise ValueError(f"{argument}: got {value} {where}, expected a finite number; {way_out}")
    return value


def _matrix(
    layers: Layers, steps: np.ndarray, losses: Mapping[Cell, float], base: Mapping[int, float]
) -> Float[np.ndarray, "records layers"]:
    harm = np.full((len(steps), len(layers)), np.nan, np.float32)
    row = {step: index for index, step in enumerate(np.asarray(steps).tolist())}
    for (step, front), loss in losses.items():
        harm[row[step], front - 1] = loss - base[step]
    return harm


def _monotone(grid: np.ndarray) -> np.ndarray:
    """Least-squares projection on matrices that fall along the rows' axis and rise along the columns' (Dykstra)."""
    along_time, along_depth = np.zeros_like(grid), np.zeros_like(grid)
    for _ in range(_ROUNDS):
        falling = -np.apply_along_axis(_rising, 0, -(grid + along_time))
        along_time += grid - falling
        rising = np.apply_along_axis(_rising, 1, falling + along_depth)
        along_depth += falling - rising
        grid = rising
        if np.abs(rising - falling).max() <= _CONVERGED * np.abs(grid).max():
            break
    return np.minimum.accumulate(grid, axis=0)  # exactly falling too


def _rising(values: np.ndarray) -> np.ndarray:
    """The nondecreasing sequence closest to ``values``: neighbours that fall are replaced by their mean."""
    means: list[float] = []
    counts: list[int] = []
    for value in values.tolist():
        mean, count = value, 1
        while means and means[-1] > mean:
            other, n = means.pop(), counts.pop()
            mean, count = (mean * count + other * n) / (count + n), count + n
        means.append(mean)
        counts.append(count)
    return np.repeat(means, counts)
