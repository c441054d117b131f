"""What one of two processes does: ``python -m tests.train.devices.two_processes PROCESS DATA OUT ARGUMENTS``.

It fine-tunes, then decides something else than the other, and then one of them dies and the other waits for it.
"""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from jax.experimental import multihost_utils

from tests.train.devices import small_finetuning
from train.devices.agreement import check_decisions


def freezer(frozen, coming=(), due=0):
    """As far as decisions are looked at."""
    pending = SimpleNamespace(due=due, frozen=SimpleNamespace(names=frozenset(coming))) if due else None
    return SimpleNamespace(steps=20, frozen=SimpleNamespace(names=frozenset(frozen)), pending=pending)


def differ(process: int) -> list[str]:
    """What is said where only the first freezes, where both freeze something else, and where both do the same."""
    said = []
    for frozen, coming, due in (
        (["a"], ["a", "b"] if process == 0 else [], 24 if process == 0 else 0),
        (["a", "b"] if process == 0 else ["a", "c"], [], 0),
        (["a"], ["a", "b"], 24),
    ):
        try:
            check_decisions(freezer(frozen, coming, due), every=4)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def main(process: int, data: Path, out: Path, arguments: list[str]) -> None:
    code = small_finetuning.run(small_finetuning.arguments(data, out / "run", "--distributed", *arguments))
    (out / f"said{process}").write_text("\n".join([str(code), *differ(process)]))
    if process == 1:
        (out / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    multihost_utils.process_allgather(np.zeros(1))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
