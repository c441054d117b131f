"""Recorded runs that a predictor can learn from: those in which the network itself learned something."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from smartfrz_jax.learning import recording_files
from smartfrz_jax.learning.recording import Recording

_LEAST_GAIN = 0.05  # of the first training loss
_LAST = 5  # records over which the last loss is averaged


def load(directory: Path) -> tuple[list[Recording], list[Recording]]:
    """Reads recordings; what freezing costs a network that hardly learns is noise over next to nothing.

    Args:
        directory: Where they are.

    Returns:
        Those whose training loss fell by a twentieth or more, and the others.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If one is damaged.
    """
    kept: list[Recording] = []
    left_out: list[Recording] = []
    for recorded in recording_files.load(directory):
        gain = recorded.first_loss - float(np.nanmean(recorded.losses[-_LAST:]))
        (kept if gain >= _LEAST_GAIN * recorded.first_loss else left_out).append(recorded)
    return kept, left_out


def digest(directory: Path) -> str:
    """Twelve hexadecimal digits that tell data sets apart, by names and contents of the files.

    Args:
        directory: Where the recordings are.
    """
    found = hashlib.sha256()
    for file in sorted(directory.glob("*.npz")):
        found.update(f"{file.name} {file.stat().st_size} ".encode())
        found.update(file.read_bytes())
    return found.hexdigest()[:12]
