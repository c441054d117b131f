"""What one run of a strategy came to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from research import json_lines


class Result(NamedTuple):
    """What a run came to.

    Attributes:
        case: Name of the case.
        strategy: Name of the strategy.
        seed: Seed of the head, the order of examples and the policy.
        accuracy: Share of the held-out examples classified right.
        loss: Mean cross entropy on them.
        compute: FLOPs of all steps by the account, as a share of those of the full run. Forward passes on the probe
            batch are part of it, whether for the policy's ``probe`` or ``features``; the training of the reference
            network that ``similarity_guided`` knows is not.
        compute_cached: The same if the activations at the end of the frozen front are kept: an example's forward pass
            through a frozen front layer is then computed once. Where examples are augmented nothing can be kept
            (``PrefixCache`` refuses to), and it is ``compute``.
        seconds: Of all steps, decisions and waiting for programs that could not be compiled ahead.
        step_seconds: Of the steps alone.
        frozen: What froze when: steps done, and names.
    """

    case: str
    strategy: str
    seed: int
    accuracy: float
    loss: float
    compute: float
    compute_cached: float
    seconds: float
    step_seconds: float
    frozen: list[tuple[int, list[str]]]

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Result:
        """From a JSON object."""
        frozen = [(step, names) for step, names in fields["frozen"]]
        parsed: dict[str, Any] = json_lines.with_nan(fields) | {"frozen": frozen}
        return cls(**parsed)


def beside_never(results: Sequence[Result]) -> dict[tuple[str, str], list[tuple[Result, Result]]]:
    """Runs of strategies, each behind that of ``never`` with the same seed, by case and strategy."""
    never = {(result.case, result.seed): result for result in results if result.strategy == "never"}
    pairs: dict[tuple[str, str], list[tuple[Result, Result]]] = {}
    for result in results:
        if result.strategy != "never" and (result.case, result.seed) in never:
            pairs.setdefault((result.case, result.strategy), []).append((never[result.case, result.seed], result))
    return pairs


def mean_and_error(values: Sequence[float], digits: int, unit: str = "") -> str:
    """The mean with its standard error if there are two values or more, as text; a dash for none."""
    if not values:
        return "-"
    mean = f"{np.mean(values):+.{digits}f}"
    error = f" +- {np.std(values, ddof=1) / np.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{mean}{error}{unit}"
