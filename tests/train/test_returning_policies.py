"""``train.finetune`` with policies that look at outputs or gradients, and whose layers return."""

import functools

import numpy as np
import pytest
import safetensors.numpy

from models.deit import deit_tiny
from smartfrz_jax.freezing.saved_run import kept_like
from tests.train.devices.small_finetuning import arguments, write_images
from tests.train.recovery.interrupts import interrupted_at
from train import command_line, finetune, log, networks
from train.options import parse

pytestmark = pytest.mark.usefixtures("jax_defaults")


@pytest.mark.parametrize(
    ("changed", "returning"),
    [
        (["never"], "fresh"),
        (["lisa"], "fresh"),
        (["hift"], "kept"),
        (["simfreeze"], "kept"),
        (["relative_gradient_norm"], "kept"),
        (["simfreeze", "--returning", "fresh"], "fresh"),
        (["lisa", "--returning", "kept"], "kept"),
    ],
)
def test_what_the_optimizer_holds_of_layers_that_return(changed, returning):
    options = parse(["--model", "vgg11", "--data", "x", "--data-dir", "y", "--out", "z", "--policy", *changed])
    assert options.returning == returning


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function from the name of a run and options to its exit code; it trains a network of one block."""
    small = functools.partial(deit_tiny, patch_size=8, dim=16, depth=1, heads=2)
    monkeypatch.setattr(networks, "deit_tiny", small)
    write_images(tmp_path)
    always = ("--mesh", "data=1", "--lead", "0", "--log-every", "1", "--epochs", "2")
    return lambda name, *changed: finetune.main(arguments(tmp_path, tmp_path / name, *always, *changed))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::smartfrz_jax.SavingWarning")  # layers freeze in any order
def test_relative_gradient_norm_freezes_layers_which_return(run, tmp_path):
    changed = ("--policy", "relative_gradient_norm", "--threshold", "0.3", "--evaluations-per-epoch", "2")
    assert run("run", *changed) == 0
    assert_freezes_and_returns(tmp_path / "run", first=4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::smartfrz_jax.SavingWarning")
def test_simfreeze_compares_with_the_network_before_the_run_when_it_is_resumed_too(run, tmp_path, monkeypatch):
    changed = ("--policy", "simfreeze", "--tolerance", "0.1", "--evaluations-per-epoch", "4")
    assert run("straight", *changed) == 0
    monkeypatch.setattr(command_line, "Interrupt", interrupted_at(6))  # when layers are frozen
    assert run("stopped", *changed) == 130
    assert run("stopped", *changed, "--resume") == 0
    straight, stopped = (log.read(tmp_path / name / "log.jsonl") for name in ("straight", "stopped"))
    assert_freezes_and_returns(tmp_path / "straight", first=5)
    assert stopped.freezes == straight.freezes
    assert [step.loss for step in stopped.steps] == [step.loss for step in straight.steps]
    tensors = [safetensors.numpy.load_file(tmp_path / name / "model.safetensors") for name in ("straight", "stopped")]
    for name, tensor in tensors[0].items():
        np.testing.assert_array_equal(tensor, tensors[1][name], err_msg=name)


def assert_freezes_and_returns(folder, first):
    run = log.read(folder / "log.jsonl")
    assert run.freezes[0].step == first
    assert run.freezes[0].names
    assert any(event.returned for event in run.freezes)
    assert kept_like(max((folder / "checkpoints").iterdir()))  # of layers that are frozen at the end
