"""What a run goes on from, and what it is compared with."""

import re
from pathlib import Path

import pytest

from train import finetune, log
from train.data.metrics import metrics_of
from train.options import parse
from train.recovery import resume


def options(*changed):
    return parse(["--model", "resnet50", "--data", "x", "--data-dir", "y", "--out", "z", *changed])


def write_log(folder, settings, steps=4, metrics=("accuracy",)):
    folder.mkdir()
    with log.Log(folder / "log.jsonl", log.Run("never", ("a",), settings)) as written:
        for step in range(1, steps + 1):
            written.add(log.Step(step, 1.0, 1.0, 0.0, 0, 1.0, 1))
        written.add(log.Evaluation(steps, dict.fromkeys(metrics, 0.5)))


def test_a_run_is_resumed_as_it_was_started(tmp_path, capsys):
    run, said = tmp_path / "run", []
    arguments = ["--epochs", "2", "--out", str(run)]
    write_log(run, options(*arguments).settings())
    assert resume.read_started(run, options(*arguments).settings(), said.append) == []  # it starts again
    for step in (3, 20):
        (run / f"checkpoints/{step:08d}").mkdir(parents=True)
    (run / "checkpoints/00000021.orbax-checkpoint-tmp").mkdir()
    there = [run / "checkpoints/00000020", run / "checkpoints/00000003"]
    assert resume.read_started(run, options(*arguments).settings(), said.append) == there
    assert finetune.main(["--model", "resnet50", "--data", "x", "--data-dir", "y", "--resume", *arguments,
                          "--optimizer", "adamw", "--quiet"]) == 2  # fmt: skip
    assert "other options: optimizer (was sgd, is adamw); repeat" in capsys.readouterr().err
    (run / "log.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"resume: .*log.jsonl is not there"):
        resume.read_started(run, options(*arguments).settings(), said.append)


def test_a_run_that_ended_before_its_log_starts_from_its_first_step(tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["--model", "resnet50", "--data", "x", "--data-dir", "y", "--out", str(run), "--resume"]
    for others in ((), ("notes.txt", "checkpoints")) * 2:  # the first attempt makes the folder, none begins a run
        for name in others:
            (run / name).mkdir(exist_ok=True)
        assert finetune.main(arguments) == 2
        assert f"resume: {run} holds no run; start it without --resume" in capsys.readouterr().err
    assert finetune.main(arguments[:-1]) == 2  # ends before its log
    assert "y is not a directory" in capsys.readouterr().err
    assert finetune.main(arguments) == 2
    said = capsys.readouterr()
    assert f"{run} holds no checkpoint yet: the run starts again from its first step" in said.out
    assert "y is not a directory" in said.err


def test_options_that_do_not_change_the_run_may_differ_and_are_said(tmp_path):
    said = []
    write_log(tmp_path / "run", options().settings())
    changed = options("--resume", "--checkpoint-every", "10m", "--keep-best", "3", "--workers", "4")
    resume.read_started(tmp_path / "run", changed.settings(), said.append)
    (text,) = [text for text in said if "other options" in text]
    for part in ("workers (was 0, is 4)", "checkpoint_every (was None, is 600s)", "keep_best (was 0, is 3)"):
        assert part in text
    assert "resume" not in text


def test_the_page_has_every_option_that_may_differ():
    text = (Path(__file__).parents[3] / "docs/guides/checkpoints.md").read_text()
    rows = re.findall(r"^\| (`--.*) \|", text.partition("### Other options with `--resume`")[2], flags=re.MULTILINE)
    named = re.findall(r"`--([\w-]+)`", " ".join(rows))
    assert sorted(named) == sorted(name.replace("_", "-") for name in resume.FREE - {"resume"})


@pytest.mark.parametrize(("optimizer_steps", "log_steps"), [(7, 6), (6, 5)])
def test_a_checkpoint_from_the_midst_of_a_step_or_a_log_that_lost_steps_is_refused(optimizer_steps, log_steps):
    checkpoint = Path("run/checkpoints/00000006")
    resume.check_agree(checkpoint, {"optimizer": 6, "policy": 6, "log.jsonl": 6})
    with pytest.raises(ValueError, match=r"resume: steps done before .*00000006 are .*expected one number for all"):
        resume.check_agree(checkpoint, {"optimizer": optimizer_steps, "policy": 6, "log.jsonl": log_steps})


@pytest.mark.parametrize(
    ("there", "changed", "message"),
    [
        ({}, ["--model", "vgg11"], "model 'resnet50', not 'vgg11'"),
        ({}, ["--data", "cifar10"], "data 'x', not 'cifar10'"),
        ({}, ["--evaluation-split", "test[:9]"], r"evaluation_split None, not 'test\[:9\]'"),
        ({}, ["--batch-size", "8"], "batch_size 32, not 8"),
        ({}, ["--epochs", "3"], "epochs 10, not 3"),
        ({"steps": 3}, [], "steps 3, not 4"),
        ({}, ["--data", "glue/mrpc"], r"metrics \['accuracy'\], not \['accuracy', 'f1'\]"),
        ({"metrics": ()}, [], r"metrics \[\], not \['accuracy'\]"),
        ({"settings": {}}, [], "model None, not 'resnet50'"),
    ],
)
def test_a_baseline_that_cannot_be_compared_with_is_refused(tmp_path, there, changed, message):
    write_log(tmp_path / "run", **({"settings": options().settings()} | there))
    now = options(*changed)
    with pytest.raises(ValueError, match=rf"baseline: the run in .* has .*{message}.*--baseline"):
        resume.read_baseline(tmp_path / "run", now.settings(), 4, metrics_of(now.data.data))


def test_a_baseline_may_differ_in_how_it_was_trained(tmp_path):
    write_log(tmp_path / "run", options("--policy", "never", "--seed", "3").settings())
    settings = options("--policy", "freezeout").settings()
    assert len(resume.read_baseline(tmp_path / "run", settings, 4, ["accuracy"]).steps) == 4
