"""What an earlier run of ``train.finetune`` left behind: to go on from, or to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import smartfrz_jax as sfj
from smartfrz_jax.pytrees.file_paths import Path
from train.log import Run, read
from train.recovery.lock import LOCK

# Options of which a run that goes on may have others than it was started with: what is computed is the same.
FREE = frozenset(
    {"resume", "baseline", "quiet", "workers", "out", "data_dir", "keep_programs", "log", "log_every", "profile",
     "checkpoint_every", "keep_last", "keep_best", "on_nan", "max_skipped", "mesh", "distributed"}
)  # fmt: skip


def check_begun(out: Path) -> None:
    """Checks that a run was begun in ``--out``; called before the folder is locked, too, which begins one.

    Raises:
        FileNotFoundError: If there is none.
    """
    if not (_checkpoints(out) or any((out / name).exists() for name in ("log.jsonl", LOCK))):
        raise FileNotFoundError(
            f"resume: {out} holds no run; start it without --resume, or name the folder of one with --out"
        )


def _checkpoints(out: Path) -> list[Path]:
    found = [path for path in (out / "checkpoints").glob("*") if path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def read_started(out: Path, settings: dict[str, Any], say: Callable[[str], None]) -> list[Path]:
    """The checkpoints of the run in ``--out``, the newest first.

    Args:
        out: The folder.
        settings: The options by name.
        say: Prints.

    Returns:
        None of a run that ended before its first checkpoint, and is to start again.

    Raises:
        FileNotFoundError: If there is no run.
        ValueError: If the log is damaged, or the run was started with other options.
    """
    check_begun(out)
    found, file = _checkpoints(out), out / "log.jsonl"
    if found or file.exists():
        check_same(read(file, argument="resume").settings, settings, say)
    if not found:
        say(f"{out} holds no checkpoint yet: the run starts again from its first step")
    return found


def restore_newest(freezer: sfj.nnx.Freezer, out: Path, checkpoints: Sequence[Path], say: Callable[[str], None]) -> Run:
    """Goes on from the newest checkpoint that is sound, and puts those aside that are not.

    Args:
        freezer: What the run trains with; all of it is restored.
        out: The folder of the run.
        checkpoints: From :func:`read_started`.
        say: Prints, what is wrong with which checkpoint, too.

    Returns:
        The log of the run until then.

    Raises:
        ValueError: If none is sound: what is wrong with the newest. All are where they were then.
    """
    wrong: list[Exception] = []
    for number, checkpoint in enumerate(checkpoints):
        history = _try(freezer, out, checkpoint)
        if isinstance(history, Run):
            for one, reason in zip(checkpoints[:number], wrong, strict=True):
                say(f"warning: {reason}; it is put aside into {_put_aside(one, out)}, an earlier one is gone on from")
            say(f"resumed from {checkpoint}, {freezer.steps} steps done")
            return history
        wrong.append(history)
    raise wrong[0]


def _try(freezer: sfj.nnx.Freezer, out: Path, checkpoint: Path) -> Run | Exception:
    """The log until a checkpoint once it is restored, or what is wrong with it; the same on every process."""
    try:
        history = read(out / "log.jsonl", until=int(checkpoint.name), argument="resume")
        freezer.restore(checkpoint)
        done = {"optimizer": int(freezer.optimizer.step[...]), "policy": freezer.steps, "log.jsonl": len(history.steps)}
        check_agree(checkpoint, done)
    except (ValueError, OSError) as error:
        history = error
    if jax.process_count() > 1:
        are_sound = np.all(multihost_utils.process_allgather(np.array(isinstance(history, Run))))
        if isinstance(history, Run) and not are_sound:
            return ValueError(f"resume: another process cannot restore {checkpoint}")
    return history


def _put_aside(checkpoint: Path, out: Path) -> Path:
    """Moves a checkpoint that is not sound, so that one of its step can be written; returns where it is then."""
    folder = out / "damaged"
    there = len(list(folder.iterdir())) if folder.exists() else 0
    target = folder / f"{checkpoint.name}-{there}"
    if jax.process_index() == 0:
        folder.mkdir(exist_ok=True)
        checkpoint.rename(target)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"put {checkpoint.name} aside")
    return target


def check_same(before: dict[str, Any], now: dict[str, Any], say: Callable[[str], None]) -> None:
    """Checks that a run goes on as it was started, and says which options differ that may.

    Raises:
        ValueError: If an option that changes what is computed differs.
    """
    differing = [name for name in now if name != "resume" and before.get(name) != now[name]]
    texts = {name: f"{name} (was {before.get(name)}, is {now[name]})" for name in differing}
    changed = [text for name, text in texts.items() if name not in FREE]
    if changed:
        raise ValueError(f"resume: the run was started with other options: {', '.join(changed)}; repeat those it had")
    if texts:
        say(f"other options than at the start, which change nothing of what is computed: {', '.join(texts.values())}")


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
