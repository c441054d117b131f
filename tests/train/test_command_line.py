"""Ctrl-C between steps and in the midst of one, and how a script says what ended it."""

import argparse
import signal

import pytest

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


def test_work_that_goes_on_says_where_its_results_are(tmp_path, capsys):
    args = argparse.Namespace(out=tmp_path / "out")

    def work(given, interrupt):
        assert given is args
        signal.raise_signal(signal.SIGINT)
        interrupt.check()

    assert resumable(work, args) == 130
    assert capsys.readouterr().err == f"\ninterrupted; call it again to go on, results are in {args.out}\n"
