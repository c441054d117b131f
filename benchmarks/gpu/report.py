"""The page of the site, from the results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.gpu.plan import TASKS, Row, is_figure

_HEAD = """# On a GPU

`make bench-gpu` (`python -m benchmarks.gpu`, then `--report`) writes this page. It takes at most
nine minutes on one GPU, and called again it goes on where it stopped.
"""

_NOTHING = """
**It has not yet been run on a GPU.** Until then nothing is known of times there.
That it runs is tested on CPU at tiny sizes, and every program is lowered for CUDA and TPU.

What it will show, for ResNet50, MobileNetV2, DeiT-T and BERT-base in bfloat16, 256 images of
224 x 224 or texts of 128 tokens a step:

- step time at 0, 25, 50, 75 and 100 % frozen, over the ideal (3 - 2f) / 3; at most 1.05 is the aim;
- the same networks in PyTorch with `requires_grad_(False)`;
- the most memory in use, against what the compiled program says;
- steps from kept activations;
- a whole fine-tuning of EfficientNet-Lite0, nothing frozen against `progress`: the aim is 0.95 of
  the FLOPs saved in time; waiting for compilation; decisions.
"""

_INPUTS = """
Networks compute in bfloat16. Inputs are synthetic where only times and sizes are measured. Times
are medians over rounds in which all programs take turns.
"""


def page(rows: Sequence[Row]) -> str:
    """The page.

    Args:
        rows: The results, with their commits.
    """
    rows = [row for row in rows if not row["tiny"]]
    figures = {row["task"]: row for row in rows if is_figure(row) and row["platform"] != "cpu"}
    if not figures:
        return _HEAD + _NOTHING
    sections = (_step_time, _pytorch, _memory, _cached, _whole_run, _decisions)
    text = _HEAD + _INPUTS + "".join(section(figures) for section in sections) + _missing(rows, figures)
    return text + _made_with(figures.values())


def _step_time(figures: dict[str, Row]) -> str:
    found = _of("step_time", figures)
    if not found:
        return ""
    lines = [
        _line(
            network,
            f"{one['share']:.0%} ({one['layers']} of {row['all_layers']})",
            f"{one['ms']:.1f}",
            f"{one['spread']:.0%}",
            f"{one['ratio']:.2f}",
            f"{one['ideal']:.2f}",
            f"**{one['over_ideal']:.2f}**",
            f"{one['account_flops'] / row['shares'][0]['account_flops']:.2f}",
            f"{one['compiled_flops'] / max(row['shares'][0]['compiled_flops'], 1):.2f}",
            f"{one['temp_bytes'] / row['shares'][0]['temp_bytes']:.2f}",
            f"{one['trace_seconds'] + one['compile_seconds']:.1f}",
        )
        for network, row in found
        for one in row["shares"]
    ]
    head = ("network", "frozen share (layers)", "step, ms", "spread", "time", "ideal", "over the ideal",
            "FLOPs by the account", "FLOPs, compiled", "temporary memory", "trace + compile, s")  # fmt: skip
    notes = "\n*Spread* is the interquartile range over the median. *Time*, *FLOPs* and *memory* are ratios to the\n"
    notes += "unfrozen step, *FLOPs, compiled* as XLA counts them. The programs of a network are compiled at once.\n"
    return f"\n## Step time against the frozen share\n\n{_table(head, lines)}{notes}"


def _pytorch(figures: dict[str, Row]) -> str:
    lines = []
    for network, row in _of("pytorch", figures):
        ours = figures.get(f"step_time/{network}")
        for one in row["shares"]:
            same = [] if ours is None else [share for share in ours["shares"] if share["layers"] == one["layers"]]
            here = (f"{same[0]['ratio']:.2f}", f"{one['ms'] / same[0]['ms']:.2f}") if same else ("-", "-")
            ratio = one["ms"] / row["shares"][0]["ms"]
            lines.append(_line(network, str(one["layers"]), f"{one['ms']:.1f}", f"{ratio:.2f}", *here))
    if not lines:
        return ""
    head = ("network", "layers frozen", "PyTorch, ms", "PyTorch, time", "here, time", "PyTorch / here, ms")
    versions = ", ".join(sorted({str(row["torch"]) for _, row in _of("pytorch", figures)}))
    notes = f"\ntorch {versions}, eager, autocast to bfloat16, channels last. *Time* is relative to nothing frozen.\n"
    return f"\n## PyTorch with `requires_grad_(False)`\n\n{_table(head, lines)}{notes}"


def _memory(figures: dict[str, Row]) -> str:
    lines = [
        _line(
            network,
            f"{one['share']:.0%}",
            f"{one['peak_bytes'] / 2**20:,.0f}",
            f"{one['predicted_bytes'] / 2**20:,.0f}",
            f"{one['peak_bytes'] / one['predicted_bytes']:.2f}",
        )
        for network, row in _of("memory", figures)
        for one in row["shares"]
    ]
    head = ("network", "frozen share", "most in use, MiB", "by the program, MiB", "ratio")
    return f"\n## Memory\n\n{_table(head, lines)}" if lines else ""


def _cached(figures: dict[str, Row]) -> str:
    lines = [
        _line(
            network,
            f"{one['share']:.0%}",
            f"{one['inputs_ms']:.1f}",
            f"{one['kept_ms']:.1f}",
            f"{one['ratio']:.2f}",
            "-" if one["flops_ratio"] is None else f"{one['flops_ratio']:.2f}",
            "-" if one["bytes_per_example"] is None else f"{one['bytes_per_example']:,}",
        )
        for network, row in _of("cached", figures)
        for one in row["shares"]
    ]
    head = ("network", "frozen share", "from the inputs, ms", "from what is kept, ms", "time", "FLOPs",
            "bytes an example")  # fmt: skip
    return f"\n## Kept activations\n\n{_table(head, lines)}" if lines else ""


def _whole_run(figures: dict[str, Row]) -> str:
    text = ""
    for network, row in _of("whole_run", figures):
        runs, full = row["runs"], row["runs"]["never"]
        lines = []
        for name, one in runs.items():
            saved, time = 1 - one["flops"] / full["flops"], 1 - one["seconds"] / full["seconds"]
            per_flop = f"{time / saved:.2f}" if saved else "-"
            lines.append(
                _line(
                    name,
                    f"{one['seconds']:.1f}",
                    f"{saved:.1%}",
                    f"{time:.1%}",
                    per_flop,
                    f"{one['waiting_seconds']:.1f}",
                    f"{one['compile_seconds']:.1f}",
                    f"{one['programs']} ({one['ahead']})",
                    f"{one['deciding_seconds']:.2f}",
                    f"{one['accuracy']:.1%}",
                )
            )
        head = ("policy", "run, s", "FLOPs saved", "time saved", "time / FLOPs", "waiting, s", "compiling, s",
                "programs (ahead)", "deciding, s", "accuracy")  # fmt: skip
        text += f"\n## A whole run: {network}, {row['steps']} steps on Fashion-MNIST\n\n{_table(head, lines)}\n"
        text += f"A decision takes effect {row['lead']} steps later. *Time saved* has all waiting in it.\n"
        text += "".join(f"\nWarning: {said.splitlines()[0]}\n" for said in dict.fromkeys(row["warnings"]))
    return text


def _decisions(figures: dict[str, Row]) -> str:
    lines = []
    for network, row in _of("decisions", figures):
        ours = figures.get(f"step_time/{network}")
        for name, one in row["predictors"].items():
            share = "-" if ours is None else f"{1e3 * one['seconds'] / row['steps'] / ours['shares'][0]['ms']:.2%}"
            lines.append(_line(network, name, f"{one['seconds']:.2f}", f"{one['longest_ms']:.1f}", share))
    head = ("network", "predictor", "decisions of 1,000 steps, s", "longest, ms", "of the time of the steps")
    return f"\n## Decisions of `smartfrz`\n\n{_table(head, lines)}" if lines else ""


def _missing(rows: Sequence[Row], figures: dict[str, Row]) -> str:
    reasons = {row["task"]: row.get("skipped") or row.get("failed") or "only on a CPU" for row in rows}
    absent = [task.name for task in TASKS if task.name not in figures]
    lines = [f"- `{name}`: {reasons.get(name, 'not yet run')}\n" for name in absent]
    return f"\n## Missing\n\n{''.join(lines)}" if lines else ""


def _made_with(rows: Iterable[Row]) -> str:
    made = sorted({(row["commit"], row["versions"], row["device"], row["date"]) for row in rows})
    lines = [f"- {device}; {versions}; commit {commit}; {date}\n" for commit, versions, device, date in made]
    return f"\n## Made with\n\n{''.join(lines)}"


def _of(kind: str, figures: dict[str, Row]) -> list[tuple[str, Any]]:
    """Networks and rows of a kind, in the order of the plan."""
    return [(task.network, figures[task.name]) for task in TASKS if task.kind == kind and task.name in figures]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def _table(head: Sequence[str], lines: Iterable[str]) -> str:
    rule = "|---" * 2 + "|--:" * (len(head) - 2) + "|\n"
    return _line(*head) + rule + "".join(lines)
