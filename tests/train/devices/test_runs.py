"""``train.finetune`` on several devices and in two processes: what one device does; processes that differ, or die."""

import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests.support.programs import FAST
from tests.train.devices.small_finetuning import arguments, run, write_images
from train import log

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("jax_defaults")]
SGD = ("--optimizer", "sgd", "--learning-rate", "0.1")  # Adam would enlarge what is rounding


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    write_images(folder)
    return folder


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The run on one device."""
    out = tmp_path_factory.mktemp("alone") / "run"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert run(arguments(data, out, *SGD, "--mesh", "data=1")) == 0
    return out


@pytest.fixture(scope="module")
def two_processes(data, tmp_path_factory):
    """The folder of the run, what each process said, and the seconds that the one lived after the other."""
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
    env = os.environ | slurm | {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_PORT": str(port)}
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=2 {FAST}"
    command = [sys.executable, "-m", "tests.train.devices.two_processes"]
    started = [
        subprocess.Popen(
            [*command, str(process), str(data), str(out), *SGD, "--mesh", "fsdp=4"],
            env=env | {"SLURM_PROCID": str(process), "SLURM_LOCALID": str(process)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    try:
        printed = [process.communicate(timeout=500)[0] for process in started]
        lived = time.time() - (out / "died").stat().st_mtime
    finally:
        for process in started:
            process.kill()
    said = [(out / f"said{process}").read_text().split("\n") for process in range(2)]
    return out / "run", said, printed, started[0].returncode, lived


def assert_same_run(out, expected):
    run, alone = (log.read(folder / "log.jsonl") for folder in (out, expected))
    assert run.freezes == alone.freezes != []
    assert [step.frozen for step in run.steps] == [step.frozen for step in alone.steps]
    found, expected_figures = ([(e.step, e.metrics["accuracy"]) for e in one.evaluations] for one in (run, alone))
    assert found == expected_figures  # every example once, whatever devices
    of_evaluations = ([e.metrics["loss"] for e in one.evaluations] for one in (run, alone))
    np.testing.assert_allclose(*of_evaluations, rtol=1e-5)
    np.testing.assert_allclose([s.loss for s in run.steps], [s.loss for s in alone.steps], rtol=1e-5)
    tensors, others = (safetensors.numpy.load_file(folder / "model.safetensors") for folder in (out, expected))
    for name, tensor in tensors.items():
        np.testing.assert_allclose(tensor, others[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_run_on_a_mesh_is_that_on_one_device(data, alone, tmp_path):
    changed = ["--mesh", "data=2,fsdp=4", "--accumulate", "1", "--remat"]
    assert run(arguments(data, tmp_path / "run", *SGD, *changed)) == 0
    assert_same_run(tmp_path / "run", alone)


def test_a_run_in_two_processes_is_that_in_one(two_processes, alone):
    out, said, printed, *_ = two_processes
    assert [lines[0] for lines in said] == ["0", "0"], printed
    assert_same_run(out, alone)
    assert "everything is in" in printed[0]
    assert "everything is in" not in printed[1]


def test_processes_that_decide_differently_all_stop_and_name_the_layers(two_processes):
    _, said, *_ = two_processes
    assert said[0][1:] == said[1][1:]
    coming, frozen, same, code, started = said[0][1:]
    assert "after step 4, process 0 freezes 'layers/0' after step 7, and process 1 freezes nothing" in coming
    assert "after step 1, process 0 has frozen 'layers/0', and process 1 has frozen 'layers/1'" in frozen
    assert same == "the same, 1 to come"
    assert code == "2"
    assert "after step 0, process 0 has frozen 'blocks/" in started


def test_a_process_that_dies_ends_the_other_within_a_minute(two_processes):
    *_, code, lived = two_processes
    assert code != 0
    assert lived < 60
