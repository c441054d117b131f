"""What the command lines of all scripts share: types of paths, Ctrl-C between train steps, exit codes."""

from __future__ import annotations

import argparse
import pathlib
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import TypeVar

from smartfrz_jax.pytrees import file_paths
from smartfrz_jax.pytrees.file_paths import Path, try_to_write

T = TypeVar("T")


def file_path(text: str) -> file_paths.Path:
    """A type for ``argparse``: a local path, with ``~`` expanded, or one of an object store, such as gs://bucket/run."""
    return _checked(file_paths.as_path, text)


def local_path(text: str) -> pathlib.Path:
    """A type for ``argparse``: a local path, with ``~`` expanded."""
    return _checked(file_paths.local_path, text)


def _checked(make: Callable[[str], T], text: str) -> T:
    try:
        return make(text)
    except ValueError as error:  # argparse would not print its text
        raise argparse.ArgumentTypeError(str(error).removeprefix("path: ")) from error


def check_least(config: object, **least: float) -> None:
    """Checks options that are numbers.

    Args:
        config: What has them as attributes.
        **least: The smallest value of each.

    Raises:
        ValueError: If one is smaller, infinite or not a number.
    """
    for name, smallest in least.items():
        got = getattr(config, name)
        if not smallest <= got < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')}: got {got}, expected at least {smallest}")


class Interrupt:
    """While it is entered, the first Ctrl-C is remembered until :meth:`check`; a second one acts at once.

    So it comes between train steps: an exception in the midst of tracing or compiling can crash the process.
    """

    def __init__(self) -> None:
        self._requested = False

    def __enter__(self) -> Interrupt:
        self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True

    def check(self, on_interrupt: Callable[[], object] | None = None) -> None:
        """Raises ``KeyboardInterrupt`` if Ctrl-C was pressed.

        Args:
            on_interrupt: Called before that; not by a second Ctrl-C, which may come at a moment when nothing fits.
        """
        if self._requested:
            if on_interrupt is not None:
                on_interrupt()
            raise KeyboardInterrupt

    def checked(self, items: Iterable[T], *, on_interrupt: Callable[[], object] | None = None) -> Iterator[T]:
        """The items, with a check before each; see :meth:`check`."""
        for item in items:
            self.check(on_interrupt)
            yield item


def exit_code(work: Callable[[Interrupt], object], out: Path, *, go_on: str) -> int:
    """Runs a script's work and says on standard error what ended it.

    Args:
        work: The work.
        out: Folder that it writes to, as the option ``--out`` has it; it is made, and tried.
        go_on: What to do after an interruption.

    Returns:
        0, 2 if something that was asked for is wrong, 130 if it was interrupted.
    """
    try:
        try_to_write(out)
    except OSError as error:
        reason = error.strerror or error
        print(f"--out: cannot make the folder {out} and write in it ({reason}); choose another one", file=sys.stderr)
        return 2
    try:
        with Interrupt() as interrupt:
            work(interrupt)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {go_on}", file=sys.stderr)
        return 130
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
