"""One run: from the start, or from where its path leaves that of ``never``; interrupted and resumed bit for bit."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

import smartfrz_jax as sfj
from models import weights
from research.long_runs.bench import Bench
from research.long_runs.strategies import STRATEGIES, Strategy
from research.long_runs.tally import Clock, Tally

LEAD = 20  # steps from a decision to its effect, as of train.finetune
MIN_SAVING = 0.05
REHEARSAL = "rehearsal"


class Job(NamedTuple):
    """A run to do.

    Attributes:
        case: Name of the case.
        name: Name of the strategy; ``tune`` where a learning rate is tried, ``rehearsal`` where a strategy is.
        seed: Of the head, the order of examples, augmentation and the policy.
        rate: Learning rate.
    """

    case: str
    name: str
    seed: int
    rate: float

    @property
    def key(self) -> str:
        """A name for files."""
        return f"{self.case}-{self.name}-{self.seed}" + (f"-{self.rate:g}" if self.name == "tune" else "")

    @property
    def tuning(self) -> bool:
        """Whether it holds training examples out, and is judged by them."""
        return self.name in ("tune", REHEARSAL)


class Shadow:
    """A policy that watches a run of ``never``, and notes the moment at which it would leave it.

    Args:
        names: Names of the strategies that have it.
        freezer: The policy at work.
    """

    def __init__(self, names: list[str], freezer: sfj.Freezer):
        self.names, self.freezer, self.seconds, self.left = names, freezer, 0.0, False

    def look(self, params: Callable[[], Any], **signals: Any) -> bool:
        """Shows it a step; whether it leaves now."""
        if self.left:
            return False
        with Clock() as clock:
            frozen = self.freezer.observe(params, **signals)
            jax.block_until_ready(self.freezer.policy_state)
        self.seconds += clock.wall
        self.left = bool(frozen.names)
        return self.left


class Runner:
    """Runs a job.

    Args:
        bench: Its case.
        job: The job.
        strategy: Its strategy.
        state: Folder for what it needs to go on after an interruption.
        save_every: Seconds between checkpoints.
        deadline: Time, as of ``time.monotonic``, at which to stop.
        say: Prints.
        lead: Steps from a decision to its effect.
    """

    def __init__(
        self,
        bench: Bench,
        job: Job,
        strategy: Strategy,
        *,
        state: Path,
        save_every: float = 300.0,
        deadline: float = float("inf"),
        say: Callable[[str], object] = print,
        lead: int = LEAD,
    ):
        self.bench, self.job, self.strategy = bench, job, strategy
        self._state, self._save_every, self._deadline, self._say = state, save_every, deadline, say
        self._folder = state / job.key
        self.tuning = job.tuning
        self.total_steps, self._epoch = bench.epochs_to_steps(strategy.length * bench.case.epochs, tuning=self.tuning)
        self.model = bench.model(job.seed)
        tx, self._step = bench.step(strategy, self.total_steps, job.rate)
        policy = strategy.policy(self._situation(strategy))
        self.optimizer = sfj.nnx.Optimizer(
            self.model,
            tx,
            layers=bench.layers,
            returning=strategy.returning,
            frozen=policy if strategy.begins_frozen else (),
        )
        self.freezer = sfj.nnx.Freezer(
            self.model,
            self.optimizer,
            policy,
            features=bench.features,
            train_step=self._step,
            lead=lead,
            min_saving=MIN_SAVING,
        )
        self._feed = bench.feed(strategy, job.seed, tuning=self.tuning)
        self.tally, self.shadows = Tally(), []
        self.branched_at: int | None = None

    def reference(self) -> Path | None:
        """Weights of a finished run of ``never`` with another seed."""
        files = sorted(self._state.glob(f"{self.job.case}-never-*.safetensors"))
        own = f"{self.job.case}-never-{self.job.seed}.safetensors"
        return next((file for file in files if file.name != own), None)

    def _situation(self, strategy: Strategy) -> Any:
        reference = self.reference() if strategy.reference else None
        return self.bench.situation(self.job.seed, self.total_steps, self._epoch, reference)

    def watch(self, strategies: Mapping[str, Strategy]) -> None:
        """Lets the policies that follow ``never`` at first watch this run of it."""
        by_policy: dict[Any, Shadow] = {}
        for name, strategy in strategies.items():
            if name == "never" or not strategy.follows_never or (strategy.reference and self.reference() is None):
                continue
            if strategy.policy in by_policy:  # the same with activations kept, which begin to be where it leaves
                by_policy[strategy.policy].names.append(name)
                continue
            policy = strategy.policy(self._situation(strategy))
            if "grads" in policy.needs:  # keeping gradients is another program
                continue
            params = nnx.as_pure(nnx.state(self.model, nnx.Param))
            saving = self.bench.account.saving
            freezer = sfj.Freezer(policy, self.bench.layers, params, lead=LEAD, min_saving=MIN_SAVING, saving=saving)
            by_policy[strategy.policy] = Shadow([name], freezer)
        self.shadows = list(by_policy.values())

    def run(self) -> bool:
        """Trains to the end or the deadline; whether it is done."""
        self._resume()
        saved = time.monotonic()
        for step in range(self.freezer.steps, self.total_steps):
            self._train(*self._feed(step, frozen=bool(self.freezer.frozen.names)))
            now = time.monotonic()
            if now > self._deadline or now - saved > self._save_every:
                self._save()
                saved = time.monotonic()
                self._say(f"{self.job.key}: step {self.tally.steps} of {self.total_steps}")
            if now > self._deadline:
                return False
        return True

    def _train(self, args: tuple[Any, ...], options: Mapping[str, int]) -> None:
        waited, tally = self._step.wait_seconds, self.tally
        with Clock() as training:
            loss = jax.block_until_ready(self._step(self.model, self.optimizer, *args, **options))
        program = self._step.last
        assert program is not None
        stood_still = self._step.wait_seconds - waited
        tally.add_program(program, stood_still)
        # Before an interruption the run had this program, and did not wait for it; its processor time is left out too.
        tally.train_seconds += training.wall - stood_still
        tally.train_cpu_seconds += training.cpu - min(stood_still, training.cpu)
        tally.steps += 1
        if isinstance(self._step, sfj.nnx.CachedStep):
            cache = self._step.cache
            tally.flops += self._step.flops
            tally.add_kept(0 if cache is None or cache.store is None else cache.store.nbytes)
        else:
            tally.flops += program.cost.flops
        value = float(loss)
        if not np.isfinite(value):
            raise FloatingPointError(f"the loss of {self.job.key} is {value} after step {tally.steps}")
        tally.add_loss(value, self.total_steps)
        waited = self._step.wait_seconds
        with Clock() as deciding:
            self.freezer.step(loss=loss)
            jax.block_until_ready(self.freezer.policy_state)
        traced = self._step.wait_seconds - waited
        tally.wait_seconds += traced
        tally.decide_seconds += deciding.wall - traced
        for shadow in self.shadows:
            left = shadow.look(
                lambda: nnx.as_pure(nnx.state(self.model, nnx.Param)),
                loss=loss,
                features=lambda: self.bench.features(self.model),
            )
            if left:
                self._branch(shadow)

    def _branch(self, shadow: Shadow) -> None:
        for name in shadow.names:
            folder = self._state / self.job._replace(name=name).key
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            shadow.freezer.save_run(folder / "branch", self._arrays())
            dataclasses.replace(self.tally, decide_seconds=shadow.seconds).write(folder / "branch.json")
            self._say(f"{self.job.key}: {name} leaves after step {self.tally.steps}")

    def _arrays(self) -> dict[str, Any]:
        """What a branch takes along: nothing is frozen, so nothing was put aside for layers that return."""
        optimizer = nnx.as_pure(nnx.state(self.optimizer))
        return {
            "model": nnx.as_pure(nnx.state(self.model)),
            "optimizer": {name: part for name, part in optimizer.items() if name != "kept_version"},
        }

    def _save(self) -> None:
        checkpoint = self._folder / f"step-{self.tally.steps}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self.freezer.save(checkpoint / "run", overwrite=True)
        for shadow in self.shadows:
            shadow.freezer.save_run(
                checkpoint / shadow.names[0], {"seconds": np.float64(shadow.seconds)}, overwrite=True
            )
        self.tally.write(checkpoint / "tally.json")  # last: without it, the checkpoint does not count
        for other in self._folder.glob("step-*"):
            if other != checkpoint:
                shutil.rmtree(other)

    def _resume(self) -> None:
        whole = sorted(self._folder.glob("step-*/tally.json"), key=lambda file: file.stat().st_mtime)
        if whole:
            checkpoint = whole[-1].parent
            self.freezer.restore(checkpoint / "run")
            # One that did not watch from the start cannot begin now: its strategies run from the start instead.
            self.shadows = [shadow for shadow in self.shadows if (checkpoint / shadow.names[0]).exists()]
            for shadow in self.shadows:
                run = shadow.freezer.restore_run(checkpoint / shadow.names[0], {"seconds": np.float64(0)})
                shadow.seconds, shadow.left = float(run["seconds"]), bool(shadow.freezer.frozen.names)
            self.tally = Tally.read(whole[-1])
            self._keep_again()
        elif (self._folder / "branch.json").exists():
            arrays = self.freezer.restore_run(self._folder / "branch", self._arrays())
            nnx.update(self.model, arrays["model"])
            nnx.update(self.optimizer, arrays["optimizer"])
            self.optimizer.freeze(self.model, self.freezer.frozen)
            self.tally = Tally.read(self._folder / "branch.json")
        elif self.strategy.begins_frozen:
            self.freezer.start()
        if (self._folder / "branch.json").exists():
            self.branched_at = Tally.read(self._folder / "branch.json").steps

    def _keep_again(self) -> None:
        """Computes the activations anew that the run had kept.

        Not where the frozen set has just changed: then the next step has them computed, and they are counted again.
        """
        step, begin, events = self._step, self.tally.kept_from, self.freezer.events
        if isinstance(step, sfj.nnx.CachedStep) and begin is not None and events[-1].step < self.tally.steps:
            begin = max([begin, *(event.step for event in events if event.returned)])  # what went back kept less
            self._feed.keep_again(step, self.model, self.optimizer, begin, self.tally.steps)

    def result(self) -> dict[str, Any]:
        """The finished run as a row of results; keeps the weights of ``never``, drops what was needed to go on."""
        with Clock() as clock:
            figures = self.bench.evaluate(self.model, self.bench.held_out(tuning=self.tuning))
        if self.job.name == "never":
            weights.save(self.model, self._state / f"{self.job.key}.safetensors", overwrite=True)
        row = self._row(self.tally, figures, self.freezer.events, self.branched_at)
        self._say(f"{self.job.key}: {figures}, evaluated in {clock.wall:.0f} s")
        return row

    def rows_of_followers(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Rows of the policies that followed ``never`` to its end."""
        followed = [shadow for shadow in self.shadows if not shadow.left]
        return [
            {**row, "strategy": name, "decide_seconds": shadow.seconds, "branched_at": self.total_steps}
            for shadow in followed
            for name in shadow.names
        ]

    def clean_up(self) -> None:
        """Removes what was needed to go on."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _row(
        self, tally: Tally, figures: Mapping[str, float], events: list[sfj.FreezeEvent], branched_at: int | None
    ) -> dict[str, Any]:
        full = (
            self.bench.account.flops().total * self.bench.epochs_to_steps(self.bench.case.epochs, tuning=self.tuning)[0]
        )
        fields = dataclasses.asdict(tally)
        del fields["losses"], fields["kept_from"]
        return {
            "case": self.job.case,
            "strategy": self.job.name,
            "seed": self.job.seed,
            "rate": self.job.rate,
            "config": self.bench.config(),
            "epochs": self.total_steps / self._epoch,
            **figures,
            **fields,
            "flops_share": tally.flops / full,
            "programs": list(tally.programs.values()),
            "curve": tally.curve,
            "frozen": [[event.step, list(event.names), list(event.returned)] for event in events],
            "branched_at": branched_at,
            "layers": len(self.bench.layers),
        }


def strategy_of(bench: Bench, job: Job) -> Strategy:
    """The strategy of a job: of its name, or ``never`` for as long as learning rates are tried."""
    if job.name == "tune":
        return Strategy(STRATEGIES["never"].policy, length=bench.case.tuning_epochs / bench.case.epochs)
    return STRATEGIES[job.name]
