"""Learning rates of a whole run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float

Schedule = Literal["cosine", "linear", "step", "constant"]


def learning_rates(
    schedule: Schedule, peak: float, total_steps: int, *, warmup: int = 0
) -> Float[np.ndarray, " total_steps"]:
    """The learning rate of every step.

    Args:
        schedule: ``cosine`` and ``linear`` fall to 0; ``step`` falls to a tenth after half of the run and to a
            hundredth after three quarters; ``constant`` does not fall.
        peak: The highest rate.
        total_steps: Number of steps.
        warmup: Steps in which the rate rises linearly from 0; they are part of the run.

    Returns:
        float32 of shape ``(total_steps,)``.

    Raises:
        ValueError: If there is no such schedule, or the warm-up is not shorter than the run.

    Example:
        >>> learning_rates("step", 1.0, 8).round(2).tolist()
        [1.0, 1.0, 1.0, 1.0, 0.10000000149011612, 0.10000000149011612, 0.009999999776482582, 0.009999999776482582]
    """
    if not 0 <= warmup < total_steps:
        raise ValueError(f"warmup: got {warmup}, expected 0 or more, and less than total_steps ({total_steps})")
    done = np.arange(total_steps) / total_steps
    match schedule:
        case "cosine":
            factor = 0.5 * (1 + np.cos(np.pi * done))
        case "linear":
            factor = 1 - done
        case "step":
            factor = np.where(done < 0.5, 1.0, np.where(done < 0.75, 0.1, 0.01))
        case "constant":
            factor = np.ones(total_steps)
        case _:
            raise ValueError(f"schedule: got {schedule!r}, expected 'cosine', 'linear', 'step' or 'constant'")
    rising = np.minimum(np.arange(1, total_steps + 1) / (warmup + 1), 1.0)
    return (peak * factor * rising).astype(np.float32)
