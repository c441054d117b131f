"""What one of two processes does: ``python -m tests.train.devices.two_processes PROCESS DATA OUT ARGUMENTS``.

It fine-tunes, then decides something else than the other, and then one of them dies and the other waits for it.
"""

import contextlib
import io
import os
import signal
import sys
from pathlib import Path

import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils

import smartfrz_jax as sfj
from tests.train.devices import small_finetuning
from train.devices import mesh as meshes
from train.devices.agreement import check_decisions
from train.loop import make_step

X = np.random.default_rng(0).standard_normal((4, 8), np.float32)
TX = optax.sgd(0.1)
LEAD = 4


def freezers(process: int) -> list[str]:
    """What is said where only the first freezes, where each has frozen another layer by hand, and where both agree."""
    mesh = meshes.make_mesh("data=2,fsdp=2", batch_size=4)
    step = sfj.TrainStep(meshes.pinned(make_step(lambda model, x: (model(x) ** 2).mean()), mesh))
    batch = meshes.put(X, meshes.by_example(mesh))

    def train(policy: sfj.Policy, every: int, by_hand: str | None = None) -> str:
        model = nnx.Sequential(*[nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(3)])
        optimizer = sfj.nnx.Optimizer(model, TX, layers=sfj.nnx.find_layers(model, X))
        meshes.place_module(model, mesh)
        meshes.place_module(optimizer, mesh)
        freezer = sfj.nnx.Freezer(model, optimizer, policy, lead=LEAD)
        try:
            for _ in range(LEAD):
                loss = step(model, optimizer, batch)
                if by_hand is not None:
                    optimizer.freeze(model, [by_hand])
                freezer.step(loss=loss)
                check_decisions(freezer, every=every)
        except ValueError as error:
            return str(error)
        return f"the same, {len(freezer.pending.frozen.names)} to come"

    freezing, never = sfj.static_prefix([(0.25, 0.4)], total_steps=12), sfj.policies.never()
    return [
        train(freezing if process == 0 else never, LEAD),
        train(never, 1, f"layers/{process}"),
        train(freezing, LEAD),
    ]


def started_differently(process: int, arguments: list[str]) -> list[str]:
    """The exit code, and what is said, of a fine-tuning of which each process freezes other layers from the start."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = small_finetuning.run([*arguments, "--policy", "lisa", "--active-blocks", str(1 + process)])
    return [str(code), said.getvalue().strip()]


def main(process: int, data: Path, out: Path, changed: list[str]) -> None:
    code = small_finetuning.run(small_finetuning.arguments(data, out / "run", "--distributed", *changed))
    said = [str(code), *freezers(process)]
    said += started_differently(process, small_finetuning.arguments(data, out / "started", *changed))
    (out / f"said{process}").write_text("\n".join(said))
    if process == 1:
        (out / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    multihost_utils.process_allgather(np.zeros(1))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
