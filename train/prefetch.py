"""Reads ahead: a thread makes the next batches while the device works on this one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

AHEAD = 2
_PATIENCE = 10.0  # seconds until a thread that is stuck in reading is left behind


class Prefetch(Generic[T]):
    """The items of an iterable, made in a thread: an iterator, and a context manager at whose end the thread ends.

    Where making an item puts arrays on the device, that is done in the thread, too.

    Args:
        items: What is read; its ``close``, if it has one, is called in the end.
        ahead: Items that are made before they are asked for.

    Raises:
        Exception: When the next item is asked for, what making it raised, with its traceback.

    Example:
        >>> with Prefetch(range(3)) as items:
        ...     list(items)
        [0, 1, 2]
    """

    def __init__(self, items: Iterable[T], *, ahead: int = AHEAD):
        self._made: queue.SimpleQueue[_Made[T] | _End] = queue.SimpleQueue()
        self._room = threading.Semaphore(ahead)
        self._closed = False
        self._thread = threading.Thread(target=self._read, args=(iter(items),), name="prefetch", daemon=True)
        self._thread.start()

    def _read(self, items: Iterator[T]) -> None:
        error = None
        try:
            while self._has_room():
                self._made.put(_Made(next(items)))
        except StopIteration:
            pass
        except BaseException as raised:  # whatever it is, the loop must not wait for ever
            error = raised
        finally:
            self._made.put(_End(error))
            close = getattr(items, "close", None)
            if close is not None:
                close()

    def _has_room(self) -> bool:
        self._room.acquire()
        return not self._closed

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        made = self._made.get()
        if isinstance(made, _Made):
            self._room.release()
            return made.item
        self._made.put(_End(None))  # for whoever asks again
        if made.error is not None:
            raise made.error
        raise StopIteration

    def close(self) -> None:
        """Ends the thread, after the item that it is about to make."""
        self._closed = True
        self._room.release()
        self._thread.join(_PATIENCE)

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Made(NamedTuple, Generic[T]):
    item: T


class _End(NamedTuple):
    error: BaseException | None
