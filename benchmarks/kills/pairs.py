"""Runs of two processes of which one is killed, or both: how soon the other ends, and what both go on to."""

from __future__ import annotations

import functools
import os
import pathlib
import signal
import socket
import time
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.kills import campaign
from benchmarks.kills.victim import Case, Moment, arguments, run

PROCESSES = 2
WIDTH = 32  # enough for --mesh fsdp=2 to split the stem
SECONDS = 120.0  # after the end of one, in which the other must end


class Pair(NamedTuple):
    """A run of two processes with a device each.

    Attributes:
        case: What is killed.
        mesh: How the devices share the work.
    """

    case: Case
    mesh: str

    @property
    def policy(self) -> str:
        """That of the case."""
        return self.case.policy

    def fields(self) -> dict[str, Any]:
        """What every entry has."""
        return {**self.case._asdict(), "processes": PROCESSES, "mesh": self.mesh}


class Kill(NamedTuple):
    """Attributes: when a process is killed, and which are: 0, 1 or both."""

    moment: Moment
    of: tuple[int, ...]


def cases() -> list[Pair]:
    """Policies of every kind with both keep modes, both meshes, and kept activations."""
    split = "data=1,fsdp=2"
    return [
        Pair(Case("static_prefix", "kept"), "data=2"),
        Pair(Case("smartfrz", "fresh"), split),
        Pair(Case("lisa", "kept"), "data=2"),
        Pair(Case("progress", "kept"), split),
        Pair(Case("freezeout", "fresh", keep_activations="host"), "data=2"),
        Pair(Case("hift", "kept"), split),
        Pair(Case("autofreeze", "fresh"), "data=2"),
        Pair(Case("similarity_guided", "kept"), split),
        Pair(Case("grades", "fresh"), "data=2"),
        Pair(Case("slimfit", "fresh"), split),
        Pair(Case("badam", "kept"), "data=2"),
        Pair(Case("random", "fresh"), split),
        Pair(Case("never", "fresh"), "data=2"),
    ]


def case_of(entry: dict[str, Any]) -> Pair:
    """The case that an entry is of."""
    return Pair(Case(**{name: entry[name] for name in Case._fields}), entry["mesh"])


def moments(pair: Pair, seed: int, number: int) -> list[Kill]:
    """As many kills as asked for, in the moments of :func:`campaign.moments`; of the first, the second or both."""
    drawn = campaign.moments(pair.case, seed + PROCESSES, number)
    rng = np.random.default_rng([seed, *f"{pair}".encode()])
    turns = [((0,), (1,), (0, 1))[n] for n in rng.permutation(np.arange(len(drawn)) % 3)]
    # The report is written by the first alone.
    return [Kill(one, (0,) if one.kind == "end" and of == (1,) else of) for one, of in zip(drawn, turns, strict=True)]


def try_case(pair: Pair, kills: list[Kill], folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """One run left alone, one killed again and again and gone on with: an entry for each kill, and one for the end.

    Args:
        pair: Of both.
        kills: Of the second.
        folder: With the data; what the runs write is put there.
    """
    changed = [*campaign.options(pair.case, folder, width=WIDTH), "--distributed", "--mesh", pair.mesh]
    names = "-".join((*pair.case, pair.mesh.replace("=", "").replace(",", "-")))
    alone, killed = (campaign.fresh(folder / f"{names}-{way}") for way in ("alone", "killed"))
    codes, _ = _both(arguments(folder, alone, *changed), None)
    if any(codes):
        raise RuntimeError(f"the run that was left alone ended with {codes}; what it said is in {folder}")
    resume: tuple[str, ...] = ()
    for kill in kills:
        codes, seconds = _both(arguments(folder, killed, *changed, *resume), kill)
        done = {"of": kill.of, "codes": codes, "seconds": round(seconds, 1)}
        done["checkpoint"] = campaign.checkpoint_of(killed)
        yield {"event": "kill", **pair.fields(), **kill.moment._asdict(), **done}
        if not any(codes):  # it was over before that moment
            break
        if (killed / "log.jsonl").exists():
            resume = ("--resume",)
    codes, _ = _both(arguments(folder, killed, *changed, *resume), None)
    yield {"event": "end", **pair.fields(), "codes": codes, **campaign.end_of(alone, killed)}


def _both(argv: list[str], kill: Kill | None) -> tuple[list[int], float]:
    """Runs two processes: their exit codes, and the seconds that the one lived after the other.

    One that is there after :data:`SECONDS` is killed.
    """
    out = pathlib.Path(argv[argv.index("--out") + 1])
    port = _free_port()
    children = []
    for number in range(PROCESSES):
        moment = kill.moment if kill is not None and number in kill.of else None
        work = functools.partial(_one, number, port, argv, moment)
        children.append(campaign.start(work, out.with_name(f"{out.name}-{number}.txt")))
    codes: dict[int, int] = {}
    ends: list[float] = []
    begun = time.monotonic()
    while len(codes) < PROCESSES:
        for number, child in enumerate(children):
            if number not in codes and (code := campaign.exit_code(child)) is not None:
                codes[number] = code
                ends.append(time.monotonic())
        now = time.monotonic()
        if now - begun > campaign.SECONDS or (ends and now - ends[0] > SECONDS):
            for number, child in enumerate(children):
                if number not in codes:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    return [codes[number] for number in range(PROCESSES)], ends[-1] - ends[0]


def _one(number: int, port: int, argv: list[str], moment: Moment | None) -> int:
    """What a process does, as SLURM starts it."""
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": str(PROCESSES)}
    os.environ |= slurm | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
    os.environ["JAX_COORDINATOR_PORT"] = str(port)
    try:
        code = run(argv, moment, width=WIDTH)
    except BaseException:
        traceback.print_exc()
        code = 1
    jax.distributed.shutdown()  # as at the end of a process that is no fork; ends it if the other is dead
    return code


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
