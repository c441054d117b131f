import jax
import jax.numpy as jnp

import smartfrz_jax as sfj


def network(params, x):
    for w in params:
        x = jax.nn.relu(x @ w)
    return x.sum()


def test_peak_is_arguments_results_and_temporaries():
    params = [jnp.ones((64, 64)) for _ in range(5)]
    x = jnp.ones((512, 64))
    cost = sfj.program_cost(jax.jit(jax.grad(network)), params, x)
    results = 4 * 5 * 64 * 64
    assert cost.argument_bytes == 4 * (5 * 64 * 64 + 512 * 64)
    assert 0 <= cost.peak_bytes - (cost.argument_bytes + results + cost.temp_bytes) < 1024  # pointers of the tuple
    assert cost.temp_bytes >= 4 * 4 * 512 * 64  # an activation for each layer


def test_donated_arguments_count_once():
    def step(params, x):
        return [w - g for w, g in zip(params, jax.grad(network)(params, x), strict=True)]

    args = [jnp.ones((64, 64))] * 5, jnp.ones((2, 64))
    kept = sfj.program_cost(jax.jit(step), *args)
    donated = sfj.program_cost(jax.jit(step, donate_argnums=0), *args)
    assert kept.peak_bytes - donated.peak_bytes >= 4 * 5 * 64 * 64 - (donated.temp_bytes - kept.temp_bytes) - 1024


def test_peak_falls_with_freezing():
    params = {f"l{i}": jnp.eye(64) for i in range(6)}

    def loss(params, x):
        return network(params.values(), x)

    x = jnp.ones((512, 64))
    layers = sfj.find_layers(params, loss, x)
    peaks = [
        sfj.program_cost(jax.jit(sfj.value_and_grad(loss, sfj.Frozen(layers, frozenset(layers.names[:n])))), params, x)
        for n in (0, 3, 5)
    ]
    assert peaks[0].peak_bytes > peaks[1].peak_bytes > peaks[2].peak_bytes
