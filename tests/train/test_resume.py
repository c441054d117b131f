"""What a run goes on from, and what it is compared with."""

from pathlib import Path

import pytest

from train import finetune, log, resume
from train.data.metrics import metrics_of
from train.options import parse


def options(*changed):
    return parse(["--model", "resnet50", "--data", "x", "--data-dir", "y", "--out", "z", *changed])


def write_log(folder, settings, steps=4, metrics=("accuracy",)):
    folder.mkdir()
    with log.Log(folder / "log.jsonl", log.Run("never", ("a",), settings)) as written:
        for step in range(1, steps + 1):
            written.add(log.Step(step, 1.0, 1.0, 0.0, 0, 1.0, 1))
        written.add(log.Evaluation(steps, dict.fromkeys(metrics, 0.5)))


def test_a_run_is_resumed_as_it_was_started_and_its_log_read_until_the_checkpoint(tmp_path, capsys):
    arguments = ["--epochs", "2", "--out", str(tmp_path / "run")]
    write_log(tmp_path / "run", options(*arguments).settings())
    assert resume.read_started(tmp_path / "run", options(*arguments).settings()) is None  # it starts again
    checkpoint = tmp_path / "run/checkpoints/00000003"
    checkpoint.mkdir(parents=True)
    found, run = resume.read_started(tmp_path / "run", options(*arguments).settings())
    assert (found, len(run.steps)) == (checkpoint, 3)
    assert finetune.main(["--model", "resnet50", "--data", "x", "--data-dir", "y", "--resume", *arguments,
                          "--optimizer", "adamw"]) == 2  # fmt: skip
    assert "optimizer (was sgd, is adamw)" in capsys.readouterr().err
    (tmp_path / "run/log.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"resume: .*log.jsonl is not there"):
        resume.read_started(tmp_path / "run", options(*arguments).settings())


def test_a_checkpoint_of_the_same_step_is_not_replaced(tmp_path):
    class Freezer:
        steps = 3

        def save(self, path):
            path.mkdir(parents=True)

    for steps in (2, 3, 3):
        Freezer.steps = steps
        resume.save_checkpoint(Freezer(), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000003"]


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
