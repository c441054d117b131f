"""Reading ahead in a thread: how far, in order, with errors, and that the thread ends with the loop."""

import threading
import time
import traceback

import pytest

from train.prefetch import Prefetch


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


class Source:
    """Numbers, and a note of what was made of them and where."""

    def __init__(self, error_at=None):
        self.made, self.threads, self.closed = [], set(), False
        self.error_at = error_at

    def __iter__(self):
        try:
            for number in range(100):
                if number == self.error_at:
                    raise OSError("the disk is gone")
                self.made.append(number)
                self.threads.add(threading.current_thread())
                yield number
        finally:
            self.closed = True


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_items_are_made_ahead_in_another_thread_but_not_more_than_asked_for():
    source = Source()
    with Prefetch(source, ahead=3) as items:
        for number in range(5):
            assert next(items) == number
            wait_until(lambda: len(source.made) == number + 4)  # noqa: B023
            time.sleep(0.01)
            assert len(source.made) == number + 4
        assert source.threads == set(threads())
    assert source.closed
    assert not threads()


def test_all_come_in_order_and_then_it_is_over():
    with Prefetch(Source()) as items:
        assert list(items) == list(range(100))
        assert list(items) == []


def test_an_error_comes_in_its_place_with_its_traceback():
    source = Source(error_at=3)
    with Prefetch(source) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(OSError, match="the disk is gone") as raised:
            next(items)
        assert "__iter__" in [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert not threads()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_thread_ends_with_the_loop(error):
    source = Source()

    def loop():
        with Prefetch(source) as items:
            next(items)
            raise error

    with pytest.raises(error):
        loop()
    assert source.closed
    assert not threads()
    assert len(source.made) <= 4
