"""What the command lines of all scripts share: types of paths, Ctrl-C and SIGTERM between train steps, exit codes."""

from __future__ import annotations

import argparse
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import NoReturn, TypeVar

import jax
from jax.experimental import multihost_utils

from smartfrz_jax.pytrees import file_paths
from smartfrz_jax.pytrees.file_paths import Path, try_to_write

T = TypeVar("T")

# EX_TEMPFAIL of sysexits.h: the run was ended from outside, and the same command with --resume goes on.
RESUME_ME = 75
# Preemptible machines are taken away 30 seconds after SIGTERM.
GRACE = 25.0


def local_path(text: str) -> pathlib.Path:
    """A type for ``argparse``: a local path, with ``~`` expanded."""
    try:
        return file_paths.local_path(text)
    except ValueError as error:  # argparse would not print its text
        raise argparse.ArgumentTypeError(str(error).removeprefix("path: ")) from error


def check_least(config: object, **least: float) -> None:
    """Checks options that are numbers.

    Args:
        config: What has them as attributes; None where they were left out.
        **least: The smallest value of each.

    Raises:
        ValueError: If one is smaller, infinite or not a number.
    """
    for name, smallest in least.items():
        got = getattr(config, name)
        if got is not None and not smallest <= got < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')}: got {got}, expected at least {smallest}")


class Preempted(KeyboardInterrupt):
    """The machine is about to be taken away: SIGTERM, as preemptible machines, SLURM and Kubernetes send it."""


class Interrupt:
    """While it is entered, Ctrl-C and SIGTERM are remembered until :meth:`check`; a second Ctrl-C acts at once.

    So they come between train steps: an exception in the midst of tracing or compiling can crash the process. If no
    check comes within :data:`GRACE` seconds of SIGTERM, the process ends without one. Where several processes train
    one network, JAX lets all notice the SIGTERM of one before the same step; Ctrl-C each notices alone.

    Attributes:
        saved: Whether what was to be saved then has been.
    """

    def __init__(self) -> None:
        self._requested = self._preempted = self.saved = False
        self._last_moment = threading.Timer(GRACE, _leave_in_a_step)
        self._last_moment.daemon = True

    def __enter__(self) -> Interrupt:
        self._previous = [
            (number, signal.signal(number, request))
            for number, request in ((signal.SIGINT, self._request), (signal.SIGTERM, self._preempt))
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._last_moment.cancel()
        for number, previous in self._previous:
            signal.signal(number, previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True

    def _preempt(self, number: int, frame: FrameType | None) -> None:
        if not self._preempted:
            self._preempted = True
            self._last_moment.start()

    def check(self, on_interrupt: Callable[[], object] | None = None) -> None:
        """Raises ``KeyboardInterrupt`` if Ctrl-C was pressed, or :class:`Preempted`, which is one, after SIGTERM.

        Args:
            on_interrupt: Saves the run; called before that, but not by a second Ctrl-C, which may come at a moment
                when nothing fits.
        """
        if self._requested or self._preempted:
            self._last_moment.cancel()
            if on_interrupt is not None:
                on_interrupt()
                self.saved = True
            raise Preempted if self._preempted else KeyboardInterrupt

    def checked(self, items: Iterable[T], *, on_interrupt: Callable[[], object] | None = None) -> Iterator[T]:
        """The items, with a check before each; see :meth:`check`.

        Where several processes train one network, nothing is saved after Ctrl-C: the others may be in another step, and
        would not take part.
        """
        alone = jax.process_count() == 1
        for number, item in enumerate(items):
            self._preempted |= multihost_utils.reached_preemption_sync_point(number)
            self.check(on_interrupt if alone or self._preempted else None)
            yield item


def _leave_in_a_step() -> None:
    print(
        f"SIGTERM: no step has ended for {GRACE:.0f} s; what was done since the last checkpoint is to be done again",
        file=sys.stderr,
        flush=True,
    )
    os._exit(RESUME_ME)


def leave(code: int) -> NoReturn:
    """Ends the process with an exit code; after SIGTERM at once, where Python would wait for what still compiles."""
    if code == RESUME_ME:
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def exit_code(work: Callable[[Interrupt], object], out: Path, *, go_on: str) -> int:
    """Runs a script's work and says on standard error what ended it.

    Args:
        work: The work.
        out: Folder that it writes to, as the option ``--out`` has it; it is made, and tried.
        go_on: What to do after an interruption.

    Returns:
        0, 2 if something that was asked for is wrong, 130 if it was interrupted, :data:`RESUME_ME` after SIGTERM.
    """
    try:
        try_to_write(out)
    except OSError as error:
        reason = error.strerror or error
        print(f"--out: cannot make the folder {out} and write in it ({reason}); choose another one", file=sys.stderr)
        return 2
    interrupt = Interrupt()
    try:
        with interrupt:
            work(interrupt)
    except KeyboardInterrupt as error:
        is_preempted, saved = isinstance(error, Preempted), ": the run is saved" if interrupt.saved else ""
        print(f"\n{'SIGTERM' if is_preempted else 'interrupted'}{saved}; {go_on}", file=sys.stderr)
        return RESUME_ME if is_preempted else 130
    except (OSError, ValueError, FloatingPointError, ImportError) as error:  # ImportError: of a package for training
        print(error, file=sys.stderr)
        return 2
    return 0


def resumable(work: Callable[[argparse.Namespace, Interrupt], object], args: argparse.Namespace) -> int:
    """:func:`exit_code` of work that goes on from what is in ``--out`` when the script is called again.

    Args:
        work: The work.
        args: The command line, with the folder ``out``.
    """
    go_on = f"call it again to go on, results are in {args.out}"
    return exit_code(lambda interrupt: work(args, interrupt), args.out, go_on=go_on)
