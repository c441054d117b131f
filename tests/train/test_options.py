"""The command line of ``train.finetune``: what it refuses, and every option on it once."""

import dataclasses
import re
import sys
import types

import pytest

import smartfrz_jax as sfj
from tests.support.boxes import unboxed
from train import finetune
from train.networks import make_network
from train.options import parse


def options(*changed):
    return parse(["--model", "resnet50", "--data", "x", "--data-dir", "y", "--out", "z", *changed])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--epochs", "0"], "--epochs: got 0, expected at least 1"),
        (["--learning-rate", "-1"], "--learning-rate: got -1.0"),
        (["--policy", "similarity_guided"], "--policy: got similarity_guided, expected --reference, too"),
        (["--reference", "r"], "--reference: got r for never, which reads none, expected --policy similarity_guided"),
        (["--policy", "simfreeze", "--reference", "r"], "--reference: got r for simfreeze, which reads none"),
        (["--model", "resnet51"], "invalid choice 'resnet51' for argument '--model'. Expected one of ('resnet50',"),
        (["--epoch", "3"], "Unrecognized options: --epoch"),
        (["--log", "paper"], "invalid choice 'paper' for argument '--log'"),
        (["--learning-rate", "fast"], "--learning-rate: could not convert string to float: 'fast'"),
        (["--workers", "-1"], "--workers: got -1, expected at least 0"),
        (["--evaluations-per-epoch", "0"], "--evaluations-per-epoch: got 0, expected at least 1"),
        (["--lead", "-1"], "--lead: got -1, expected at least 0"),
        (["--clip", "0"], "--clip: got 0.0, expected a norm above 0"),
        (["--clip", "-1"], "--clip: got -1.0"),
        (["--clip", "inf"], "--clip: got inf"),
        (["--clip", "nan"], "--clip: got nan"),
        (["--image-size", "0"], "--image-size: got 0, expected at least 1"),
        (["--image-size", "-8"], "--image-size: got -8"),
        (["--max-tokens", "3"], "--max-tokens: got 3, expected at least 4"),
        (
            ["--keep-activations", "host"],
            "--keep-activations: got host, expected --views, too",
        ),
        (
            ["--keep-activations", "host", "--augment", "none", "--views", "2"],
            "--views: got 2, expected it with --keep-activations and images that are augmented",
        ),
        (["--views", "2"], "--views: got 2, expected it with --keep-activations"),
        (
            ["--keep-activations", "host", "--views", "2", "--augment", "deit"],
            "--views: got 2 with --augment deit, which mixes the images of a batch",
        ),
        (["--views", "-1"], "--views: got -1, expected at least 0"),
        (
            ["--keep-activations", "host", "--augment", "none", "--scan"],
            "--keep-activations: got host, expected no --scan",
        ),
        (["--weights-prefix", "module."], "--weights-prefix: got module., expected --weights of safetensors, too"),
        (
            ["--model", "llama", "--weights", "w.gguf", "--weights-prefix", "module."],
            "--weights-prefix: got module., expected --weights of safetensors, too",
        ),
        (["--batch-norm", "fixed"], "--batch-norm: got fixed, which keeps the statistics of --weights, expected these"),
        (["--mesh", "model=2"], "--mesh: got 'model=2', expected numbers of devices for the axes data and fsdp"),
        (["--help"], "--evaluations-per-epoch"),
        (["--help"], "keep only the inputs of blocks for the backward pass, and compute all else again"),
    ],
)
def test_the_command_line_is_checked(changed, message, capsys):
    with pytest.raises(SystemExit):
        finetune.main(["--model", "resnet50", "--data", "x", "--data-dir", "y", "--out", "z", *changed])
    output = capsys.readouterr()
    assert message in unboxed(output.out + output.err)


@pytest.mark.parametrize("changed", [["--model", "minilm"], ["--model", "smollm2-135m", "--task", "lm"]])
def test_activations_of_texts_are_kept_without_further_options(changed):
    """The default of ``--augment`` is for images."""
    assert options(*changed, "--keep-activations", "host").run.keep_activations == "host"


@pytest.mark.parametrize("model", ["vgg11", "deit-tiny", "deit-tiny-distilled", "bert-base", "minilm"])
def test_statistics_are_not_kept_where_there_are_none(model):
    config = options("--model", model, "--weights", "w.safetensors", "--batch-norm", "fixed").network
    with pytest.raises(ValueError, match=f"batch_norm: {model} has no BatchNorm; leave --batch-norm out"):
        make_network(config, image_size=32, num_classes=2, seed=0)


def test_every_option_is_in_the_settings_and_on_the_command_line_once(capsys):
    now = options()
    names = [field.name for config in vars(now).values() for field in dataclasses.fields(config)]
    assert len(names) == len(set(names))
    assert now.settings().keys() == set(names)
    assert now.settings()["batch_size"] == 32
    assert now.settings()["out"] == "z"
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = re.findall(r"^[│ ] (--[a-z][\w-]*)", capsys.readouterr().out, flags=re.MULTILINE)
    assert sorted(shown) == sorted(f"--{name.replace('_', '-')}" for name in names)


def test_metrics_go_where_they_are_asked_for(tmp_path, monkeypatch):
    class Run:
        def __init__(self, **options):
            self.options = options

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Run))
    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=str))
    config = options("--out", str(tmp_path), "--log", "tensorboard", "wandb").run
    tensorboard, wandb = finetune.make_callbacks(config, {"seed": 0})
    assert isinstance(tensorboard, sfj.callbacks.TensorBoard)
    assert isinstance(wandb, sfj.callbacks.WandB)
    assert wandb._run.options == {"project": "smartfrz_jax", "config": {"seed": 0}, "dir": tmp_path}
    assert finetune.make_callbacks(options().run, {}) == []


@pytest.mark.parametrize(("steps", "purged"), [(None, None), (0, 1), (7, 8)])
def test_tensorboard_hides_what_a_run_that_goes_on_does_again(tmp_path, monkeypatch, steps, purged):
    told = []
    monkeypatch.setattr(sfj.callbacks, "TensorBoard", lambda folder, *, purge_step: told.append(purge_step))
    finetune.make_callbacks(options("--out", str(tmp_path), "--log", "tensorboard").run, {}, steps)
    assert told == [purged]
