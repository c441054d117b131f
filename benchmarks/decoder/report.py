"""The page of the site, from the results and the memory on paper."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.decoder import memory, rates, strategies

_HEAD = """# Fine-tuning a decoder

`python -m benchmarks.decoder`, then `--report`, writes this page.

## SmolLM2-135M, measured
"""

_NOTHING = """
**Not run yet.** That it runs is tested with a decoder of two blocks. It will show, each as the mean
of three seeds, for full fine-tuning, the bottom half frozen, `lisa`, `badam` and LoRA: perplexity of
held-out sentences, bytes of the compiled programs and in use, FLOPs, total time and programs.
"""

_PAPER = """
## Llama-2 on 8 and 64 chips, on paper

Counted from shapes with `jax.eval_shape`, and from what `jax.vjp` keeps; nothing is allocated. AdamW,
weights, gradients and moments in float32 and sharded (FSDP), bfloat16 to compute in. Each chip has
one sequence of 2,048 tokens. Each block keeps its input alone; attention keeps its products.

*Gathered* is the largest layer on a chip, and the largest gradient. *If stacked* is for blocks that
are stacked and split: XLA on CPU copies up to so much (with jax 0.11 less). Of policies that
draw, the set with the most memory counts. A test compares with compiled steps of a small decoder:
arguments to the byte, temporary memory within a tenth.
"""


def page(rows: Sequence[Mapping[str, Any]], on_paper: Sequence[memory.Row]) -> str:
    """The page.

    Args:
        rows: The results, with their commits.
        on_paper: The memory of large decoders.
    """
    return _HEAD + measured(rows) + _PAPER + memory.table(list(on_paper))


def measured(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the results show.

    Args:
        rows: The results, with their commits.
    """
    rows = [row for row in rows if not row["tiny"]]
    ended = [row for row in rows if not row["tune"]]
    return _table(ended) + _tuning(rows) if ended else _NOTHING


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ("strategy", "rate", "seeds", "perplexity", "spread", "compiled, GiB", "in use, GiB", "TFLOP", "minutes",
            "of these compiling", "programs")  # fmt: skip
    text = f"\n| {' | '.join(head)} |\n|---|" + "---:|" * (len(head) - 1) + "\n"
    lengths = sorted({row["steps"] for row in rows})
    for steps, name in itertools.product(lengths, strategies.NAMES):
        own = [row for row in rows if (row["strategy"], row["steps"]) == (name, steps)]
        if not own:
            continue
        which = f"`{name}`, {steps} steps" if len(lengths) > 1 else f"`{name}`"
        perplexities = [row["perplexity"] for row in own]
        cells = (
            f"{statistics.fmean(perplexities):.2f}",
            f"{max(perplexities) - min(perplexities):.2f}",
            f"{_mean(own, 'compiled_bytes') / 2**30:.2f}",
            f"{_mean(own, 'resident_bytes') / 2**30:.2f}",
            f"{_mean(own, 'flops') / 1e12:.1f}",
            f"{_mean(own, 'seconds') / 60:.1f}",
            f"{_mean(own, 'compile_seconds') / 60:.1f}",
            f"{_mean(own, 'programs'):.0f}",
        )
        rate = ", ".join(f"{rate:g}" for rate in sorted({row["rate"] for row in own}))
        text += f"| {which} | {rate} | {len(own)} | {' | '.join(cells)} |\n"
    first = rows[0]
    commits = ", ".join(sorted({str(row["commit"]) for row in rows}))
    before = _mean(rows, "perplexity_before")
    text += (
        f"\nBefore, perplexity is {before:.2f}. {_either(lengths)} steps on {first['data']}, 2 sequences of 128\n"
        "tokens each. The network has a head of its own. `lisa` also trains embeddings, norm and head,\n"
        "`lisa_blocks` two blocks alone, `badam` one block and the head. With `_kept`, blocks return\n"
        "with the moments they had, else with fresh ones. *Spread* is the largest less the smallest.\n"
        "*In use* is the most that the process had, Python included. Optimizers are made with the first set\n"
        "frozen. *Minutes* are of one core, beside other work.\n"
    )
    return text + f"\n{first['versions']}; commits {commits}.\n"


def _tuning(rows: Sequence[Mapping[str, Any]]) -> str:
    """Perplexity at each rate that was tried."""
    tried = [row for row in rows if row["tune"]]
    text = f"\nLearning rates come from runs of {rates.STEPS} steps, seed 0, judged by other sentences\n"
    text += f"(`{rates.SPLIT}`):\n\n"
    text += "| strategy | perplexity at each rate |\n|---|---|\n"
    for name in dict.fromkeys(row["strategy"] for row in tried):
        own = sorted((row for row in tried if row["strategy"] == name), key=lambda row: row["rate"])
        cells = ", ".join(
            f"{row['rate']:g}: " + ("diverged" if row["perplexity"] is None else f"{row['perplexity']:.2f}")
            for row in own
        )
        text += f"| `{name}` | {cells} |\n"
    return text


def _either(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))


def _mean(rows: Sequence[Mapping[str, Any]], field: str) -> float:
    return statistics.fmean(row[field] for row in rows)
