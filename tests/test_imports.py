"""What ``import smartfrz_jax`` imports: beside JAX, Flax and optax its own files alone."""

import subprocess
import sys

import pytest

CODE = """
import sys
import flax.linen, flax.nnx, optax
before = set(sys.modules)
import smartfrz_jax
new = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
print(*sorted(new))
print(*sorted(name for name in sys.modules if name.startswith("smartfrz_jax.learning")))
print(smartfrz_jax.learning.__name__)
"""


@pytest.mark.slow
def test_learning_checkpoints_and_pictures_are_imported_on_demand():
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["jax smartfrz_jax", "", "smartfrz_jax.learning"]
