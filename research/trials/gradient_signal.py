"""How much of the gradients is signal in a run's first steps: whether that tells which fronts are ready.

It is what a policy could know at no cost: the gradients of the steps that are made anyway.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import smartfrz_jax as sfj
from research import json_lines
from research.trials.classification import loss_fn
from research.trials.result import Result, beside_never, mean_and_error
from research.trials.strategies import strategies
from research.trials.trial import Bench
from smartfrz_jax.pytrees import paths

FRONT = "static:half"


class Signal(NamedTuple):
    """The signal in the gradients of a fine-tuning.

    Attributes:
        case: Name of the fine-tuning.
        seed: Its seed.
        steps: How many first steps it was measured in.
        by_layer: Share of the signal in each layer's gradients, as :func:`signal_share`.
    """

    case: str
    seed: int
    steps: int
    by_layer: dict[str, float]

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Signal:
        """From a JSON object."""
        parsed: dict[str, Any] = fields | {"by_layer": json_lines.with_nan(fields["by_layer"])}
        return cls(**parsed)


def signal_share(square_of_sum: float, sum_of_squares: float, steps: int) -> float:
    """Share of the signal in gradients: their mean inner product with each other, relative to their mean square.

    Of gradients ``signal + noise``, each with another noise, it is about ``|signal|^2 / (|signal|^2 + |noise|^2)``: 0
    if there is no signal, 1 if there is no noise. The gradient noise scale of arXiv 1812.06162 is ``1 / share - 1``
    times the batch size.

    Args:
        square_of_sum: ``|g_1 + ... + g_n|^2``.
        sum_of_squares: ``|g_1|^2 + ... + |g_n|^2``.
        steps: ``n``, at least 2.

    Returns:
        The share, NaN if all gradients are zero.

    Example:
        >>> signal_share(16.0, 4.0, 4)  # four times the same
        1.0
        >>> signal_share(4.0, 4.0, 4)  # at right angles
        0.0
    """
    if not sum_of_squares:
        return np.nan
    return (square_of_sum / sum_of_squares - 1) / (steps - 1)


def measure(bench: Bench, steps: int, seed: int) -> Signal:
    """Measures a run that freezes nothing in its first steps.

    Args:
        bench: The fine-tuning.
        steps: How many, at least 2; they are the first of the full run's schedule.
        seed: Seed of the head and the order of examples.

    Raises:
        FloatingPointError: If a gradient is not finite.
    """
    model, strategy = bench.model(seed), strategies()["never"]
    optimizer = bench.optimizer(model, strategy)
    sums: dict[str, jax.Array] = {}
    squares: dict[str, jax.Array] = {}
    for inputs, labels in itertools.islice(bench.batches(bench.data.train, seed, strategy), steps):
        grads = _step(model, optimizer, inputs, labels)
        sums = {name: sums[name] + grad if sums else grad for name, grad in grads.items()}
        squares = {name: squares.get(name, 0.0) + jnp.sum(grad**2) for name, grad in grads.items()}
    squares_of_sums, sums_of_squares = jax.device_get(({name: jnp.sum(of**2) for name, of in sums.items()}, squares))
    if not np.isfinite(list(sums_of_squares.values())).all():
        raise FloatingPointError(
            f"{bench.name}, seed {seed}: a gradient of the first {steps} steps is not finite; lower the learning rate"
        )
    by_layer = {}
    for layer in bench.layers:
        square, total = (float(sum(of[name] for name in layer.params)) for of in (squares_of_sums, sums_of_squares))
        by_layer[layer.name] = signal_share(square, total, steps)
    return Signal(bench.name, seed, steps, by_layer)


@nnx.jit
def _step(
    model: nnx.Module, optimizer: sfj.nnx.Optimizer, inputs: tuple[jax.Array, ...], labels: jax.Array
) -> dict[str, jax.Array]:
    _, grads = optimizer.value_and_grad(loss_fn)(model, inputs, labels)
    optimizer.update(model, grads)
    return paths.flatten(nnx.as_pure(grads))


class _Row(NamedTuple):
    case: str
    front: list[float]
    rest: list[float]
    points: list[float]
    loss: list[float]


def report(signals: Sequence[Signal], results: Sequence[Result]) -> str:
    """A Markdown table of the fine-tunings, beginning with what a frozen front costs most, and rank correlations.

    Columns: seeds; the share of the signal, a mean over the layers of the front, which are those that ``static:half``
    froze, and over those behind it; full runs of ``static:half``, and the mean over them of accuracy, less that of
    ``never`` with the same seed, in points, and of loss, relative to that of ``never``. Everywhere ``+-`` is the
    standard error over seeds.

    Args:
        signals: What was measured.
        results: Full runs, ``static:half`` and ``never`` of each fine-tuning among them.

    Raises:
        ValueError: If there are no full runs of a fine-tuning, or they are of a network with other layers.
    """
    pairs = beside_never(results)
    rows = []
    for case in dict.fromkeys(signal.case for signal in signals):
        runs = pairs.get((case, FRONT))
        if runs is None:
            raise ValueError(
                f"full_runs: got none of {FRONT} and never for {case}; run them with research.trials.rehearsals"
            )
        shares = [signal.by_layer for signal in signals if signal.case == case]
        front = {name for _, names in runs[0][1].frozen for name in names}
        if not front or not front < shares[0].keys():
            raise ValueError(
                f"full_runs: in {case} {FRONT} froze {sorted(front)}, expected some of the layers that were measured, "
                f"{list(shares[0])}; were they of another network?"
            )
        rows.append(
            _Row(
                case,
                [_mean(share for name, share in of.items() if name in front) for of in shares],
                [_mean(share for name, share in of.items() if name not in front) for of in shares],
                [100 * (run.accuracy - never.accuracy) for never, run in runs],
                [100 * (run.loss / never.loss - 1) for never, run in runs],
            )
        )
    rows.sort(key=lambda row: float(np.mean(row.points)))
    lines = ["| fine-tuning | seeds | front | rest | full runs | points | loss |", "|---|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        measured = f"{len(row.front)} | {mean_and_error(row.front, 3)} | {mean_and_error(row.rest, 3)}"
        cost = f"{len(row.points)} | {mean_and_error(row.points, 2)} | {mean_and_error(row.loss, 1, ' %')}"
        lines.append(f"| {row.case} | {measured} | {cost} |")
    if len(rows) > 2:  # of two there is no telling
        lines += ["", _correlations(rows)]
    return "\n".join(lines)


def _mean(shares: Iterable[float]) -> float:
    """Of layers that have gradients."""
    return float(np.nanmean(list(shares)))


def _correlations(rows: Sequence[_Row]) -> str:
    front, rest, points, loss = (
        np.array([np.mean(of) for of in column])
        for column in zip(*((row.front, row.rest, row.points, row.loss) for row in rows), strict=True)
    )
    lines = ["| rank correlation | with points | with loss |", "|---|--:|--:|"]
    for name, of in {"front": front, "rest": rest, "front less rest": front - rest}.items():
        lines.append(f"| {name} | {_rank_correlation(of, points):+.2f} | {_rank_correlation(of, loss):+.2f} |")
    return "\n".join(lines)


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; numbers as measured are never the same."""
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])
