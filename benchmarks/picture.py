"""The picture of the README: step time and temporary memory against the frozen share, from the site's tables."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_DOCS = Path(__file__).parents[1] / "docs"
_LEFT_OUT = "DeiT-T, batch 4"  # its steps are short: at a larger batch the same network says more
_COLOURS = ("#3b5bdb", "#e8590c", "#2b8a3e", "#862e9c")


def measured(text: str) -> dict[str, dict[str, list[float]]]:
    """Rows of the tables by network: the frozen share, and what is left of a step.

    Args:
        text: The page against-pytorch.md.
    """
    found = {}
    for title, section in re.findall(r"^## ([^\n]* batch [^\n]*)\n(.*?)(?=^## )", text, flags=re.S | re.M):
        (head,) = re.findall(r"^\| \| (.*) \|$", section, flags=re.M)
        rows = {"share": [0.0, *(int(share) / 100 for share in re.findall(r"(\d+)% frozen", head))]}
        for name in ("step time", "temporary memory"):
            (row,) = re.findall(rf"^\| \**{name}\** \| (.*) \|$", section, flags=re.M)
            rows[name] = [1.0, *map(float, row.split(" | "))]
        found[title] = rows
    return found


def draw(found: dict[str, dict[str, list[float]]], file: Path) -> None:
    """Draws a line for each network into a PNG file."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True, layout="constrained")
    for axis, name in zip(axes, ("step time", "temporary memory"), strict=True):
        for (title, rows), colour in zip(found.items(), _COLOURS, strict=True):
            axis.plot(rows["share"], rows[name], "o-", color=colour, linewidth=2, label=title.replace(" x ", "x"))
        axis.set(title=name, xlabel="frozen share of the forward FLOPs", xlim=(-0.02, 1.02), ylim=(0, 1.05))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].plot([0, 1], [1, 1 / 3], "--", color="gray", label="by FLOPs")
    axes[0].set_ylabel("relative to nothing frozen")
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    """Reads the page and writes the picture."""
    found = measured((_DOCS / "benchmarks" / "against-pytorch.md").read_text())
    draw(
        {title: rows for title, rows in found.items() if not title.startswith(_LEFT_OUT)},
        _DOCS / "pictures/frozen_share.png",
    )


if __name__ == "__main__":
    main()
