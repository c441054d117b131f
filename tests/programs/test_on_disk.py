"""The persistent compilation cache: a second process loads what the first compiled."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import smartfrz_jax as sfj

SCRIPT = textwrap.dedent(
    """
    import json, sys
    import jax, jax.numpy as jnp, optax
    import smartfrz_jax as sfj

    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
    sfj.enable_compilation_cache(sys.argv[1])
    params = {name: jnp.eye(8) for name in "ab"}
    apply_fn = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
    layers = sfj.find_layers(params, apply_fn, jnp.ones((2, 8)))
    state = sfj.linen.TrainState.create(apply_fn=apply_fn, params=params, tx=optax.adam(0.1), layers=layers)

    def train_step(state, x):
        loss, grads = state.value_and_grad(lambda params: (state.apply_fn(params, x) ** 2).mean())(state.params)
        return state.apply_gradients(grads=grads), loss

    step = sfj.TrainStep(train_step)
    losses = []
    for names in ([], [], ["a"], []):
        state, loss = step(state.freeze(names), jnp.ones((2, 8)))
        losses.append(float(loss))
    print(json.dumps([losses, len(step.programs), hits.count("/jax/compilation_cache/cache_hits")]))
    """
)


def run(directory: Path) -> tuple[list[float], int, int]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(directory)], capture_output=True, text=True, check=True, timeout=120
    )
    return tuple(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path):
    losses, programs, hits = run(tmp_path / "programs")
    assert programs == 2
    kept = {path.name for path in (tmp_path / "programs").iterdir() if path.name.endswith("-cache")}
    assert sum(name.startswith("jit_train_step") for name in kept) == 2
    again, _, more_hits = run(tmp_path / "programs")
    assert again == losses
    assert more_hits >= hits + 2
    assert {path.name for path in (tmp_path / "programs").iterdir() if path.name.endswith("-cache")} == kept


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"directory: programs cannot be kept in .*file"):
        sfj.enable_compilation_cache(tmp_path / "file")
