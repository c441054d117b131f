"""The options that keep a run from being lost."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal, NamedTuple

from train.command_line import check_least

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


class Every(NamedTuple):
    """How often something is done: after so many steps, or after so many seconds.

    Attributes:
        steps: Number of steps; 0 if it goes by time.
        seconds: Number of seconds; 0 if it goes by steps.
    """

    steps: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.seconds:g}s" if self.seconds else str(self.steps)


def read_every(text: str) -> Every:
    """Reads ``500`` (steps), ``30s``, ``10m`` or ``2h``.

    Raises:
        ValueError: If it is something else.

    Example:
        >>> read_every("500"), read_every("10m")
        (Every(steps=500, seconds=0.0), Every(steps=0, seconds=600.0))
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    every = Every()
    if found is not None:
        number, unit = found.groups()
        if unit:
            every = Every(seconds=float(number) * _SECONDS[unit])
        elif number.isdigit():
            every = Every(steps=int(number))
    if not any(every):
        raise ValueError(
            f"got {text!r}, expected a number of steps, such as 500, or of seconds, minutes or hours, such as 30s, 10m "
            "or 2h"
        )
    return every


@dataclasses.dataclass(frozen=True)
class RecoveryConfig:
    """When it is saved, and what it goes on from."""

    resume: bool = False
    """go on from the last checkpoint in --out, or, before the first, from the start"""
    checkpoint_every: Every | None = None
    """also between the ends of epochs: after so many steps (500), or so long (30s, 10m, 2h)"""
    keep_last: int = 2
    """checkpoints that stay: the newest"""
    keep_best: int = 0
    """checkpoints that stay, too: those with the best figures on the evaluation split"""
    on_nan: Literal["stop", "skip"] = "stop"
    """where a loss or an update is not finite: stop with the last checkpoint, or leave the step out"""
    max_skipped: int = 10
    """on-nan skip: steps in a row that may be left out"""
    regression: float = 0.1
    """rise of the evaluation's loss, as a share of that before, that counts as the harm of a freeze between them"""
    unfreeze_on_regression: bool = False
    """let layers train again after whose freeze the loss rose so far"""

    def __post_init__(self) -> None:
        check_least(self, keep_last=1, keep_best=0, max_skipped=1, regression=0)

    @property
    def may_skip(self) -> int:
        """Steps in a row that may be left out."""
        return self.max_skipped if self.on_nan == "skip" else 0
