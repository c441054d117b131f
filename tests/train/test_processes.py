"""Two processes that train one network, as on several hosts: the same decisions in both, and as in one process."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.support import process_worker
from tests.support.process_worker import CASES, DEVICES, EXAMPLES, PROCESSES
from tests.support.programs import FAST

ALONE = ("paper", "autofreeze", "host")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("jax_defaults")]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each process found."""
    directory = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={DEVICES // PROCESSES} {FAST}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-W", "error", "-m", "tests.support.process_worker"]
    started = [
        subprocess.Popen(
            [*command, str(process), str(port), str(directory)], env=env, stderr=subprocess.PIPE, text=True
        )
        for process in range(PROCESSES)
    ]
    try:
        errors = [process.communicate(timeout=400)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, error in zip(started, errors, strict=True):
        assert process.returncode == 0, error[-3000:]
    return [dict(np.load(directory / f"{process}.npz")) for process in range(PROCESSES)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Some of the same on as many devices of one process."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        mesh = process_worker.mesh_of(jax.devices()[:DEVICES])
        return process_worker.runs(mesh, tmp_path_factory.mktemp("process"), ALONE)


def part(found, case):
    return {name.removeprefix(f"{case} "): value for name, value in found.items() if name.startswith(f"{case} ")}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_decide_alike_and_go_on_from_a_checkpoint(two_processes, case):
    first, second = (part(found, case) for found in two_processes)
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)
        if name.startswith("params"):
            np.testing.assert_array_equal(value, first[name.replace("params", "again")], err_msg=name)
    assert json.loads(str(first["events"]))


def test_activations_are_divided_among_devices_and_processes(two_processes):
    for found in two_processes:
        assert part(found, "device")["held"].tolist() == [EXAMPLES // DEVICES] * (DEVICES // PROCESSES)
        assert part(found, "host")["held"] == EXAMPLES // PROCESSES


def test_checksums_of_arrays_that_no_process_holds_as_a_whole(two_processes):
    for found in two_processes:
        assert json.loads(str(found["pytree checksums"])) == [None, None, "w"]


@pytest.mark.parametrize("case", ALONE)
def test_two_processes_do_what_one_does(two_processes, one_process, case):
    first, alone = part(two_processes[0], case), part(one_process, case)
    assert first.keys() == alone.keys()
    assert json.loads(str(first["events"])) == json.loads(str(alone["events"]))
    for name in first.keys() - {"events", "held"}:
        np.testing.assert_allclose(first[name], alone[name], rtol=1e-4, atol=1e-5, err_msg=name)
