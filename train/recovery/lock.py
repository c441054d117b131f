"""One run in a folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator

import jax

from smartfrz_jax.pytrees.file_paths import Path, is_remote

LOCK = ".lock"


@contextlib.contextmanager
def only_run_in(out: Path) -> Iterator[None]:
    """While it is entered, no other run may write to a folder.

    The lock is ``flock``'s on a file of the folder: the kernel lets go of it when the process ends, however it ends.
    Of several processes of a run the first holds it. In an object store there are no locks, and on a file system that
    has none, nothing is held either.

    Args:
        out: The folder; it is there.

    Raises:
        FileExistsError: If another run holds it.
    """
    if is_remote(out) or jax.process_index() > 0:
        yield
        return
    with (out / LOCK).open("a+") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise FileExistsError(
                f"out: another run writes to {out} ({file.read().strip() or 'which has just begun'}); wait until it "
                "ends, or end it and go on with --resume, or choose another folder"
            ) from None
        except OSError:  # the file system has no locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
