"""Ctrl-C between steps and in the midst of one, and how a script says what ended it."""

import argparse
import signal
import subprocess
import sys

import jax
import pytest

from train import command_line
from train.command_line import Interrupt, exit_code, resumable


@pytest.mark.parametrize("presses", [1, 2])
def test_a_run_is_saved_only_between_steps(presses):
    done, saved = [], []

    def train(interrupt):
        for step in interrupt.checked(range(5), on_interrupt=lambda: saved.append(len(done))):
            for _ in range(presses if step == 2 else 0):
                signal.raise_signal(signal.SIGINT)
            done.append(step)

    with Interrupt() as interrupt, pytest.raises(KeyboardInterrupt):
        train(interrupt)
    assert (done, saved) == (([0, 1, 2], [3]) if presses == 1 else ([0, 1], []))


def test_sigterm_in_a_step_is_taken_after_it_however_often_it_comes(tmp_path, capsys):
    done, saved = [], []

    def train(interrupt):
        for step in interrupt.checked(range(5), on_interrupt=lambda: saved.append(len(done))):
            for _ in range(2 if step == 2 else 0):
                signal.raise_signal(signal.SIGTERM)
            done.append(step)

    before = signal.getsignal(signal.SIGTERM)
    assert exit_code(train, tmp_path, go_on="call again") == command_line.RESUME_ME == 75
    assert (done, saved) == ([0, 1, 2], [3])
    assert capsys.readouterr().err == "\nSIGTERM: the run is saved; call again\n"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("number", "ended", "is_saved"),
    [(signal.SIGINT, "interrupted", False), (signal.SIGTERM, "SIGTERM: the run is saved", True)],
)
def test_of_several_processes_none_saves_alone(tmp_path, monkeypatch, capsys, number, ended, is_saved):
    """Ctrl-C reaches some, or each in another step; the SIGTERM of one reaches all in the same."""
    saved = []

    def train(interrupt):
        for _ in interrupt.checked(range(5), on_interrupt=lambda: saved.append(1)):
            signal.raise_signal(number)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert exit_code(train, tmp_path, go_on="call again") == {signal.SIGINT: 130, signal.SIGTERM: 75}[number]
    assert bool(saved) is is_saved
    assert capsys.readouterr().err == f"\n{ended}; call again\n"


_ENDLESS = """
import signal, sys, threading, time
from smartfrz_jax.pytrees import file_paths
from train import command_line
def work(interrupt):
    signal.raise_signal(signal.SIGTERM)
    if {in_a_step}:
        threading.Event().wait()
    threading.Thread(target=time.sleep, args=(1000,)).start()
    interrupt.check()
command_line.GRACE = 0.2
command_line.leave(command_line.exit_code(work, file_paths.as_path(sys.argv[1]), go_on="call again"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("in_a_step", "says"), [(True, "no step has ended"), (False, "SIGTERM; call again")])
def test_after_sigterm_no_step_and_no_thread_is_waited_for(tmp_path, in_a_step, says):
    command = [sys.executable, "-c", _ENDLESS.format(in_a_step=in_a_step), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 75, ended.stderr
    assert says in ended.stderr


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (None, 0, ""),
        (KeyboardInterrupt(), 130, "interrupted; call again"),
        (ValueError("epochs: got 0"), 2, "epochs: got 0"),
        (ModuleNotFoundError("text sets need the packages for training"), 2, "need the packages"),
    ],
)
def test_what_ended_a_script(tmp_path, capsys, error, code, message):
    def work(interrupt):
        if error is not None:
            raise error

    assert exit_code(work, tmp_path / "new/out", go_on="call again") == code
    assert message in capsys.readouterr().err
    assert (tmp_path / "new/out").is_dir()


def test_a_folder_that_cannot_be_made_names_the_option(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/out"):
        assert exit_code(pytest.fail, out, go_on="") == 2
        assert f"--out: cannot make the folder {out}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "code", "ended"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 75, "SIGTERM")]
)
def test_work_that_goes_on_says_where_its_results_are(tmp_path, capsys, number, code, ended):
    args = argparse.Namespace(out=tmp_path / "out")

    def work(given, interrupt):
        assert given is args
        signal.raise_signal(number)
        interrupt.check()

    assert resumable(work, args) == code
    assert capsys.readouterr().err == f"\n{ended}; call it again to go on, results are in {args.out}\n"
