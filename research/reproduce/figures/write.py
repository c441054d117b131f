"""Writes the page of the figures, and the pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from research import json_lines
from research.reproduce.figures import pictures
from research.reproduce.figures.page import page
from research.reproduce.figures.similarity import Curves
from smartfrz_jax.learning import recording_files
from train.log import write_whole

ROWS = "figures.jsonl"
RECORDINGS = Path(__file__).parents[3] / "benchmarks" / "recordings"
# Of Figure 4: published weights, residual connections without and with attention, and none.
_SHOWN = (
    "efficientnet-lite0-cifar10-published-0",
    "bottleneck20-cifar10-cifar100-strong-0",
    "deit6-cifar10-cifar100-good-0",
    "vgg9-bn-cifar10-cifar100-strong-0",
)


def recorded_curves() -> dict[str, tuple[str, Curves]]:
    """By name of the recording, its network and its CKA curves."""
    found = {}
    for file in sorted(RECORDINGS.glob("*.npz")):
        recording = recording_files.read(file)
        found[file.stem] = recording.metadata["architecture"], Curves.of_recording(recording)
    return found


def write(out: Path, recorded: Mapping[str, tuple[str, Curves]]) -> None:
    """Writes ``figures.md`` from the rows beside it, and the pictures that it shows.

    Args:
        out: The folder.
        recorded: What :func:`recorded_curves` gives.
    """
    rows = json_lines.read(out / ROWS, dict)
    write_whole(out / "figures.md", page(rows, list(recorded.values())))
    if of := [row for row in rows if row["figure"] == "figure3"]:
        pictures.gradients(of, out / "figure3.png")
    pictures.similarity([recorded[name][1] for name in _SHOWN], out / "figure4.png")
    if of := [row for row in rows if row["figure"] == "figure5"]:
        pictures.memory(of, out / "figure5.png")
