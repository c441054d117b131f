"""The training loop with a freezing policy: it dispatches steps, and looks at them when they have arrived."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax.programs.train_step import Program, TrainStep
from train.log import Compiled, Log, Step, finite

_LOGGER = logging.getLogger(__name__)

LOG_EVERY = 20
AHEAD = 2


def batches(n: int, batch_size: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of every batch: each epoch a new order, the last partial batch left out."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(n)
        for start in range(0, n - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def make_step(loss_fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A plain step of ``(model, optimizer, *inputs)`` for a loss of ``(model, *inputs)``."""

    def train_step(model: nnx.Module, optimizer: sfj.nnx.Optimizer, *inputs: Any) -> jax.Array:
        loss, grads = optimizer.value_and_grad(loss_fn)(model, *inputs)
        optimizer.update(model, grads)
        return loss

    return train_step


class Loop:
    """Trains with a freezing policy, and never waits for the step that it has just dispatched.

    Losses are looked at some steps later, many at once, and so are times: what the log has as the seconds of a step is
    the mean of those that were looked at together, from the moment when the last of those before had arrived. A loss
    that is not finite is noticed then, a few steps late. :meth:`drain` looks at all at once: call it before anything
    that is to see no step but those in the log (a checkpoint, an evaluation), or that is not part of what is timed.

    Args:
        log: Log of the run; where the run goes on from a checkpoint, it has the steps until there.
        freezer: Decides what freezes; it has the model and its optimizer, which are changed in place.
        train_step: A step of ``(model, optimizer, *batch)`` that returns the loss.
        flops: From a frozen set to the FLOPs of the step just done, where they are not those of the compiled program:
            for networks with scanned blocks, of which XLA counts one, an account's.
        log_every: Steps that are looked at together.
        ahead: Steps that may be dispatched, or running, and not done. As long as two are, the device has the next one
            at hand; each takes memory for a batch, and for the parameters and the optimizer's state where these are
            not donated.
        may_skip: Steps in a row whose loss may be not finite: of such as the step leaves out.
        view_of: From a step, counted from 0, to the view of its examples, for a step that keeps their activations.
    """

    def __init__(
        self,
        log: Log,
        freezer: sfj.nnx.Freezer,
        train_step: TrainStep | sfj.nnx.CachedStep,
        *,
        flops: Callable[[sfj.Frozen], float] | None = None,
        log_every: int = LOG_EVERY,
        ahead: int = AHEAD,
        may_skip: int = 0,
        view_of: Callable[[int], int] | None = None,
    ):
        self._log, self._freezer, self._train_step, self._flops = log, freezer, train_step, flops
        self._view_of = view_of
        self._log_every, self._ahead = log_every, ahead
        self._may_skip, self._skipped = may_skip, 0
        self._used: set[sfj.Frozen] = set()
        self._said: set[str] = set()
        self._in_flight: deque[_Dispatched] = deque()
        self._arrived: list[_Dispatched] = []
        self._begun: float | None = None  # when the steps began that are looked at together next
        self._waited = 0.0  # for programs, since then

    def run(self, data: Iterable[tuple[Any, ...]]) -> Iterator[int]:
        """Trains on all of ``data``, a step each time that the next item is asked for.

        Args:
            data: Batches.

        Yields:
            The number of steps dispatched. At the end, all are in the log.

        Raises:
            FloatingPointError: If the loss of a step is not finite, or of too many in a row.
        """
        try:
            for batch in data:
                yield self._step(batch)
        except Exception:  # of the data, or of a policy; what was done until then is to be in the log
            self.drain()
            raise
        self.drain()

    def drain(self) -> None:
        """Waits for the steps in flight and logs them. Time until the next step is no part of any.

        Raises:
            FloatingPointError: If the loss of one is not finite.
        """
        self._wait(0)
        self._look()
        self._begun = None

    def _step(self, batch: tuple[Any, ...]) -> int:
        freezer, train_step = self._freezer, self._train_step
        if self._begun is None:
            self._begun = time.perf_counter()
        step, programs, before = freezer.steps + 1, len(train_step.programs), train_step.wait_seconds
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            options = {} if self._view_of is None else {"view": self._view_of(step - 1)}
            loss = train_step(freezer.model, freezer.optimizer, *batch, **options)
        program = train_step.last
        assert program is not None
        is_new = len(train_step.programs) > programs
        is_used = program.frozen in self._used
        if is_new or not is_used:
            self._used.add(program.frozen)
            self._log.add(self._compiled(step, program, program.waited if is_new else 0.0, batch))
            if is_new and is_used:
                self._warn(step, program.reason)
        dispatched, waited = time.perf_counter(), train_step.wait_seconds
        freezer.step(loss=loss)
        deciding = time.perf_counter() - dispatched - (train_step.wait_seconds - waited)
        self._waited += train_step.wait_seconds - before
        frozen, peak_bytes = len(program.frozen.names), program.cost.peak_bytes
        self._in_flight.append(_Dispatched(step, loss, deciding, frozen, self._flops_of(program), peak_bytes))
        if freezer.events and freezer.events[-1].step == step:
            self.drain()
            self._log.add(freezer.events[-1])
        self._wait(self._ahead)
        if len(self._arrived) >= self._log_every:
            self._look()
        return step

    def _compiled(self, step: int, program: Program, stood_still: float, batch: tuple[Any, ...]) -> Compiled:
        cost, freezer, train_step = program.cost, self._freezer, self._train_step
        cache = train_step.cache if isinstance(train_step, sfj.nnx.CachedStep) else None
        stored = () if cache is None or cache.store is None else cache.store.values
        held = nnx.state(freezer.model), nnx.state(freezer.optimizer), freezer.policy_state, batch, stored
        held_bytes = sum({id(array): array.nbytes for array in jax.tree.leaves(held)}.values())
        seconds = cost.trace_seconds + cost.compile_seconds
        frozen, reason = len(program.frozen.names), program.reason
        return Compiled(step, frozen, seconds, program.ahead, stood_still, held_bytes, reason)

    def _warn(self, step: int, reason: str | None) -> None:
        """Of a program that no freeze explains, once for each reason."""
        if reason is not None and reason not in self._said:
            self._said.add(reason)
            _LOGGER.warning("step %d was compiled anew, though the frozen set is the same: %s", step, reason)

    def _flops_of(self, program: Program) -> float:
        if isinstance(self._train_step, sfj.nnx.CachedStep):
            return self._train_step.flops
        return program.cost.flops * program.cost.devices if self._flops is None else self._flops(program.frozen)

    def _wait(self, most: int) -> None:
        """Until at most so many steps are in flight."""
        while len(self._in_flight) > most:
            step = self._in_flight.popleft()
            jax.block_until_ready(step.loss)
            self._arrived.append(step)

    def _look(self) -> None:
        """Logs the steps that have arrived, up to the first whose loss may not be as it is."""
        arrived, self._arrived = self._arrived, []
        if not arrived or self._begun is None:
            return
        now = time.perf_counter()
        seconds = max(0.0, now - self._begun - self._waited) / len(arrived)
        self._begun, self._waited = now, 0.0
        losses = [float(loss) for loss in jax.device_get([step.loss for step in arrived])]
        good = next((n for n, loss in enumerate(losses) if not self._may_be(loss)), len(losses))
        self._log.add(
            *(
                Step(one.step, finite(loss), seconds, one.policy_seconds, one.frozen, one.flops, one.peak_bytes)
                for one, loss in zip(arrived[: good + 1], losses, strict=False)
            )
        )
        if good < len(losses):
            self._in_flight.clear()
            raise FloatingPointError(
                f"the loss is {losses[good]} after step {arrived[good].step} of the run {self._log.run.name!r}"
                f"{f', as after the {self._may_skip} before' if self._may_skip else ''}; lower its rate"
            )

    def _may_be(self, loss: float) -> bool:
        self._skipped = 0 if math.isfinite(loss) else self._skipped + 1
        return self._skipped <= self._may_skip


class _Dispatched(NamedTuple):
    """A step that was dispatched, as :class:`train.log.Step` has it but for what is not known yet."""

    step: int
    loss: jax.Array
    policy_seconds: float
    frozen: int
    flops: float
    peak_bytes: int
