"""The devices that tests run on."""

import jax
import pytest

from tests.freezing.devices.network import KINDS, mesh_of


@pytest.fixture(**KINDS)
def mesh(request):
    mesh = mesh_of(request.param)
    with jax.set_mesh(mesh):
        yield mesh
