"""Checkpoints of runs with frozen layers, opened by Orbax and Flax where this library cannot be imported."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax.freezing import saved_run
from smartfrz_jax.pytrees import checkpoint

pytestmark = pytest.mark.usefixtures("jax_defaults")
X = np.ones((4, 2), np.float32)

PLAIN = """
import sys

sys.modules["smartfrz_jax"] = None  # importing it is an error
import jax
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.tree_util import keystr, tree_map_with_path
from orbax.checkpoint import v1 as ocp

X = np.ones((4, 2), np.float32)


def load(path, prefix, like):
    wanted = {name: ... for name in ocp.metadata(path).metadata}
    wanted |= {prefix + keystr(keys): leaf for keys, leaf in jax.tree.leaves_with_path(like)}
    arrays = ocp.load(path, wanted)
    return tree_map_with_path(lambda keys, _: arrays[prefix + keystr(keys)], like)


model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0)))
nnx.update(model, load(sys.argv[1] + "/nnx", "['run']['model']", nnx.as_pure(nnx.state(model))))
print(np.asarray(model(X)).tobytes().hex())

module = nn.Sequential([nn.Dense(3), nn.Dense(3)])
params = load(sys.argv[1] + "/linen", "['run'].params", module.init(jax.random.key(0), X)["params"])
state = TrainState.create(apply_fn=module.apply, params=params, tx=optax.adam(0.1))
print(np.asarray(state.apply_fn({"params": state.params}, X)).tobytes().hex())
"""


def of_nnx(frozen, path):
    model = nnx.Sequential(
        nnx.Linear(2, 3, rngs=nnx.Rngs(1)), nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(1))
    )
    layers = sfj.nnx.find_layers(model, X)
    optimizer = sfj.nnx.Optimizer(model, optax.adam(0.1), layers=layers)
    optimizer.freeze(model, frozen)
    model.layers[1].mean[...] = jnp.full(3, 0.5)
    sfj.nnx.Freezer(model, optimizer, sfj.policies.never()).save(path)
    return model(X)


def of_linen(frozen, path):
    module = nn.Sequential([nn.Dense(3), nn.Dense(3)])
    params = module.init(jax.random.key(1), X)["params"]
    layers = sfj.linen.find_layers(module, {"params": params}, X)
    state = sfj.linen.TrainState.create(apply_fn=module.apply, params=params, tx=optax.adam(0.1), layers=layers)
    state = state.freeze(frozen)
    sfj.linen.Freezer(state, sfj.policies.never()).save(path, state)
    return state.apply_fn({"params": state.params}, X)


@pytest.mark.slow
def test_plain_orbax_and_flax_open_it(tmp_path):
    outputs = of_nnx("*", tmp_path / "nnx"), of_linen("layers_0", tmp_path / "linen")
    command = [sys.executable, "-c", PLAIN, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [np.asarray(output).tobytes().hex() for output in outputs]


@pytest.mark.parametrize(
    ("save", "prefix", "frozen"),
    [(of_nnx, "['run']['model']", "*"), (of_linen, "['run'].params", "layers_0")],
    ids=["nnx", "linen"],
)
def test_parameters_are_called_and_shaped_as_those_of_an_unfrozen_run(tmp_path, save, prefix, frozen):
    def parameters(frozen, name):
        save(frozen, tmp_path / name)
        notes = checkpoint.notes(tmp_path / name, saved_run.KIND)
        return {name: (note["shape"], note["dtype"]) for name, note in notes.items() if name.startswith(prefix)}, notes

    (with_frozen, all_with), (without, all_without) = parameters(frozen, "frozen"), parameters((), "unfrozen")
    assert with_frozen == without != {}
    assert len(all_with) < len(all_without)  # only the optimizer's state is smaller
