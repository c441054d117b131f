"""What an earlier run of ``train.finetune`` left behind: to go on from, or to compare with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from etils import epath

import smartfrz_jax as sfj
from smartfrz_jax.pytrees.file_paths import Path
from train.log import Run, read


def save_checkpoint(freezer: sfj.nnx.Freezer, out: Path) -> None:
    """Writes a checkpoint, unless that of this step is there, and only then removes the earlier ones."""
    target = out / "checkpoints" / f"{freezer.steps:08d}"
    if not target.exists():  # replaced, it would be missing for a moment
        freezer.save(target)
    for earlier in target.parent.iterdir():
        if earlier.name.isdigit() and earlier != target:
            epath.Path(earlier).rmtree()


def last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint of a run; None if there is none."""
    return max((path for path in (out / "checkpoints").glob("*") if path.name.isdigit()), default=None)


def read_started(out: Path, settings: dict[str, Any]) -> tuple[Path, Run] | None:
    """The newest checkpoint of the run in ``--out``, and its log until there.

    Args:
        out: The folder.
        settings: The options by name.

    Returns:
        None of a run that ended before its first checkpoint, and is to start again.

    Raises:
        FileNotFoundError: If there is no run.
        ValueError: If the log is damaged, or the run was started with other options.
    """
    checkpoint, file = last_checkpoint(out), out / "log.jsonl"
    if checkpoint is None and not file.exists():
        raise FileNotFoundError(
            f"resume: {out} holds no run; start it without --resume, or name the folder of one with --out"
        )
    started = read(file, until=None if checkpoint is None else int(checkpoint.name), argument="resume")
    check_same(started.settings, settings)
    return None if checkpoint is None else (checkpoint, started)


def check_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Checks that a run goes on as it was started.

    Raises:
        ValueError: If an option that changes what is computed differs.
    """
    free = {"resume", "baseline", "quiet", "workers", "out", "data_dir", "keep_programs", "log", "log_every"}
    changed = [f"{name} (was {before.get(name)}, is {now[name]})" for name in now if before.get(name) != now[name]]
    changed = [text for text in changed if text.split(" ")[0] not in free]
    if changed:
        raise ValueError(f"resume: the run was started with other options: {', '.join(changed)}; repeat those it had")


def check_agree(checkpoint: Path, steps: dict[str, int]) -> None:
    """Checks that all that a run goes on from is of one moment.

    Args:
        checkpoint: The checkpoint.
        steps: Train steps done, as its parts and the log have them.

    Raises:
        ValueError: If it is not: the checkpoint was written in the midst of a step, or lines of the log were lost.
    """
    if len(set(steps.values())) > 1:
        raise ValueError(
            f"resume: steps done before {checkpoint} are {steps}, expected one number for all; train anew in another "
            "folder"
        )


def read_baseline(folder: Path, settings: dict[str, Any], total_steps: int, metrics: Iterable[str]) -> Run:
    """The run to compare with.

    Args:
        folder: The folder of that run.
        settings: The options of this run by name.
        total_steps: Its steps.
        metrics: Names of its figures.

    Raises:
        FileNotFoundError: If its log is not there.
        ValueError: If it cannot be compared with: it is of another model, of other data, or of another length.
    """
    run = read(folder / "log.jsonl", argument="baseline")
    names = ("model", "data", "evaluation_split", "batch_size", "epochs")
    there = {name: run.settings.get(name) for name in names}
    there |= {"steps": len(run.steps), "metrics": sorted(run.metrics)}
    here = {name: settings[name] for name in names}
    here |= {"steps": total_steps, "metrics": sorted(metrics)}
    wrong = [f"{name} {there[name]!r}, not {here[name]!r}" for name in here if there[name] != here[name]]
    if wrong:
        raise ValueError(
            f"baseline: the run in {folder} has {'; '.join(wrong)}; name a finished run on the same with --baseline, "
            "or leave it out"
        )
    return run
