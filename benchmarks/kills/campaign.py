"""Kills runs at chosen moments, goes on with them, and compares them with runs that were left alone."""

from __future__ import annotations

import functools
import os
import pathlib
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, get_args

import numpy as np

from benchmarks.kills.victim import BATCH, EXAMPLES, STEPS, Case, Kind, Moment, arguments, run
from train import log
from train.policies import PolicyName

SECONDS = 1800.0  # after which a process hangs

# So that each policy freezes within the few steps of a run.
CHANGED: dict[str, tuple[str, ...]] = {
    "smartfrz": ("--caution", "0.3", "--patience", "1"),
    "progress": ("--caution", "0.1"),
    "freezeout": ("--t0", "0.3"),
    "similarity_guided": ("--tolerance", "0.5"),
    "static_prefix": ("--stages", "0.2:0.85,0.6:1"),
    "random": ("--budget", "0.9"),
    "lisa": ("--switch-every", "6", "--active-blocks", "1"),
    "badam": ("--switch-every", "6"),
    "hift": ("--switch-every", "6"),
    "slimfit": ("--switch-every", "6"),
    "grades": ("--threshold", "10", "--grace", "0.3"),
    "simfreeze": ("--tolerance", "0.5"),
    "relative_gradient_norm": ("--threshold", "0.9"),
}


def cases() -> list[Case]:
    """Every policy with one of the keep modes, kept activations, and every policy with the other mode."""
    modes, policies = ("fresh", "kept"), get_args(PolicyName)
    first = [Case(policy, modes[n % 2]) for n, policy in enumerate(policies)]
    second = [Case(policy, modes[1 - n % 2]) for n, policy in enumerate(policies)]
    stored = [Case("static_prefix", keep_activations="host"), Case("freezeout", keep_activations="device")]
    return [*first, *stored, *second]


def case_of(entry: dict[str, Any]) -> Case:
    """The case that an entry is of."""
    return Case(**{name: entry[name] for name in Case._fields})


def moments(case: Case, seed: int, number: int) -> list[Moment]:
    """As many kills of one run as asked for, each of the process that goes on after the one before.

    The first comes in the first epoch, before or after the first checkpoint. The later ones fall into writing
    checkpoints, compiling, freezing, steps, setting up and evaluating in turn, and begin with another for every case.
    The second is by SIGTERM, all others by SIGKILL.
    """
    rng = np.random.default_rng([seed, *f"{case}".encode()])
    kinds: list[Kind] = ["save", "compile", "freeze", "step", "start", "evaluation"]
    if case.policy == "never":
        kinds = ["save", "step", "start", "evaluation"]
    first = Moment("step", int(rng.integers(1, EXAMPLES // BATCH)), float(rng.uniform(0, 0.05)))
    turn = int(rng.integers(len(kinds)))
    most = {"start": 2.0, "save": 0.3, "compile": 0.3}
    later: list[Kind] = [kinds[(turn + n) % len(kinds)] for n in range(number - 2)]
    drawn = [
        Moment(kind, 1 if kind == "start" else int(rng.integers(1, 3)), float(rng.uniform(0, most.get(kind, 0.05))))
        for kind in later
    ]
    drawn[:1] = [moment._replace(signal="SIGTERM") for moment in drawn[:1]]
    return [first, *drawn, Moment("end", 1, float(rng.uniform(0, 0.05)))][:number]


def start(work: Callable[[], int], output: pathlib.Path) -> int:
    """Begins something in a fork of this process, which must not have used a device; returns its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(child: int) -> int | None:
    """What a process ended with, or minus the signal that ended it; None of one that runs."""
    ended, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def in_process(work: Callable[[], int], output: pathlib.Path) -> int:
    """Runs something in a fork of this process; its exit code, or minus the signal that ended it.

    Raises:
        TimeoutError: If it does not end.
    """
    child, until = start(work, output), time.monotonic() + SECONDS
    while time.monotonic() < until:
        if (code := exit_code(child)) is not None:
            return code
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise TimeoutError(f"a run does not end; what it said is in {output}")


def try_case(case: Case, kills: list[Moment], folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """One run left alone, one killed again and again and gone on with: an entry for each kill, and one for the end.

    Args:
        case: Of both.
        kills: Of the second.
        folder: With the data; what the runs write is put there.
    """
    changed, names = options(case, folder), "-".join(case)
    alone, killed = (fresh(folder / f"{names}-{way}") for way in ("alone", "killed"))
    code = in_process(lambda: run(arguments(folder, alone, *changed), None), folder / f"{names}-alone.txt")
    if code:
        raise RuntimeError(f"the run that was left alone ended with {code}; what it said is in {folder}")
    resume: tuple[str, ...] = ()
    output = folder / f"{names}-killed.txt"
    for moment in kills:
        code = in_process(functools.partial(run, arguments(folder, killed, *changed, *resume), moment), output)
        done = {"code": code, "checkpoint": checkpoint_of(killed)}
        yield {"event": "kill", **case._asdict(), **moment._asdict(), **done}
        if code == 0:  # it was over before that moment
            break
        if (killed / "log.jsonl").exists():
            resume = ("--resume",)
    code = in_process(lambda: run(arguments(folder, killed, *changed, *resume), None), output)
    yield {"event": "end", **case._asdict(), "code": code, **end_of(alone, killed)}


def options(case: Case, folder: pathlib.Path, *, width: int = 16) -> list[str]:
    """What the command line of a case has more than that of others."""
    changed = [*CHANGED.get(case.policy, ()), "--policy", case.policy, "--returning", case.returning]
    if case.policy == "similarity_guided":
        changed += ["--reference", str(_reference(folder, width))]
    if case.keep_activations != "no":
        changed += ["--keep-activations", case.keep_activations, "--augment", "none"]
    return changed


def fresh(out: pathlib.Path) -> pathlib.Path:
    """The folder of a run, without what was left there by a campaign that was stopped."""
    shutil.rmtree(out, ignore_errors=True)
    return out


def end_of(alone: pathlib.Path, killed: pathlib.Path) -> dict[str, Any]:
    """How a run that was killed compares with one that was not: number of freezes, and what differs."""
    compared = killed.with_name(f"{killed.name}-compared.txt")
    in_process(lambda: _print(compared_with(alone, killed)), compared)
    return {"freezes": len(log.read(alone / "log.jsonl").freezes), "differs": compared.read_text().strip()}


def checkpoint_of(killed: pathlib.Path) -> int:
    """Steps done by the newest checkpoint; 0 without one."""
    return max((int(path.name) for path in killed.glob("checkpoints/*") if path.name.isdigit()), default=0)


def _reference(folder: pathlib.Path, width: int) -> pathlib.Path:
    """The weights of a finished run."""
    weights = folder / f"reference-{width}/model.safetensors"
    if not weights.exists():
        argv = arguments(folder, fresh(weights.parent), "--policy", "never")
        if code := in_process(lambda: run(argv, None, width=width), folder / "reference.txt"):
            raise RuntimeError(f"the run of the reference ended with {code}; what it said is in {folder}")
    return weights


def _print(text: str) -> int:
    print(text, flush=True)
    return 0


def compared_with(alone: pathlib.Path, killed: pathlib.Path) -> str:
    """What of a run's end differs from that of another, by name, but for times; empty if nothing does."""
    logs = [log.read(folder / "log.jsonl") for folder in (alone, killed)]
    whole = [
        {
            "losses": [step.loss for step in one.steps],
            "frozen": [(step.step, step.frozen, step.flops) for step in one.steps],
            "freezes": one.freezes,
            "evaluations": one.evaluations,
            **saved(folder / f"checkpoints/{STEPS:08d}"),
            "weights": (folder / "model.safetensors").read_bytes(),
        }
        for one, folder in zip(logs, (alone, killed), strict=True)
    ]
    first, second = whole
    names = [name for name in first.keys() | second.keys() if not _same(first.get(name), second.get(name))]
    return ", ".join(sorted(names))


def saved(checkpoint: pathlib.Path) -> dict[str, Any]:
    """The arrays and the frozen sets of a checkpoint."""
    from orbax.checkpoint import v1

    metadata: Any = v1.metadata(str(checkpoint))
    arrays = v1.load(str(checkpoint), {name: np.empty(a.shape, a.dtype) for name, a in metadata.metadata.items()})
    notes = {name: metadata.custom_metadata[name] for name in ("frozen", "pending", "events", "checksums")}
    return {**arrays, **notes}


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, np.ndarray):
        return isinstance(second, np.ndarray) and first.tobytes() == second.tobytes() and first.dtype == second.dtype
    return first == second
