"""Two runs in one folder: the second is refused, unless the first is dead."""

import contextlib
import signal
import subprocess
import sys

import pytest

from smartfrz_jax.pytrees.file_paths import as_path
from train.recovery.lock import only_run_in

_HOLDER = """
import sys, time, pathlib
from train.recovery.lock import only_run_in
with only_run_in(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(1000)
"""


@pytest.mark.slow
def test_a_folder_is_held_until_its_run_ends_however_it_ends(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(FileExistsError, match=rf"out: another run .*process {holder.pid} on .*--resume"):
            only_run_in(tmp_path).__enter__()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with only_run_in(tmp_path), pytest.raises(FileExistsError, match="out: another run"):
            only_run_in(tmp_path).__enter__()
        with only_run_in(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()


def test_in_an_object_store_nothing_is_held():
    runs = [only_run_in(as_path("gs://bucket/run")) for _ in range(2)]
    with contextlib.ExitStack() as stack:
        assert [stack.enter_context(run) for run in runs] == [None, None]
