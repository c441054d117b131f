"""One thread that compiles beside the training loop, and what becomes of it when something goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Background:
    """Does one thing after the other in a thread of its own.

    The interpreter waits at its exit for what has been begun, since XLA cannot be interrupted.

    Example:
        >>> Background().begin(pow, 2, 5).result()
        32
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "compile")

    def begin(self, function: Callable[..., T], *args: object) -> Future[T]:
        """Calls a function, in the thread if there can be one; its exceptions are in what is returned."""
        try:
            return self._pool.submit(_in_thread, function, args)
        except RuntimeError:  # the interpreter is exiting, or the system gives no more threads: done here and now
            result: Future[T] = Future()
            try:
                result.set_result(function(*args))
            except Exception as error:
                result.set_exception(error)
            return result


def _in_thread(function: Callable[..., T], args: tuple[object, ...]) -> T:
    try:
        return function(*args)
    except Exception:
        raise
    except BaseException as error:  # SystemExit would end the program where the loop asks for the result
        raise RuntimeError(f"the thread that compiles was ended by {error!r}") from error
