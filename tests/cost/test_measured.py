import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import smartfrz_jax as sfj
from smartfrz_jax.cost.measured import Collectives, Traffic, collectives
from tests.support.programs import AS_FOR_USERS


def network(params, x):
    for w in params:
        x = jax.nn.relu(x @ w)
    return x.sum()


def test_peak_is_arguments_results_and_temporaries():
    params = [jnp.ones((64, 64)) for _ in range(5)]
    x = jnp.ones((512, 64))
    cost = sfj.program_cost(jax.jit(jax.grad(network), compiler_options=AS_FOR_USERS), params, x)
    results = 4 * 5 * 64 * 64
    assert cost.argument_bytes == 4 * (5 * 64 * 64 + 512 * 64)
    assert 0 <= cost.peak_bytes - (cost.argument_bytes + results + cost.temp_bytes) < 1024  # pointers of the tuple
    assert cost.temp_bytes >= 4 * 4 * 512 * 64  # an activation for each layer


def test_donated_arguments_count_once():
    def step(params, x):
        return [w - g for w, g in zip(params, jax.grad(network)(params, x), strict=True)]

    args = [jnp.ones((64, 64))] * 5, jnp.ones((2, 64))
    kept = sfj.program_cost(jax.jit(step, compiler_options=AS_FOR_USERS), *args)
    donated = sfj.program_cost(jax.jit(step, donate_argnums=0, compiler_options=AS_FOR_USERS), *args)
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


def split_and_whole():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    return NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())


def test_a_program_for_one_device_has_no_collectives():
    cost = sfj.program_cost(jax.jit(jnp.dot), jnp.ones((8, 8)), jnp.ones((8, 8)))
    assert cost.devices == 1
    assert cost.collectives == Collectives()


def test_gradients_of_a_split_batch_are_summed():
    split, whole = split_and_whole()
    params = [jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=whole)] * 3
    x = jax.ShapeDtypeStruct((512, 64), jnp.float32, sharding=split)
    cost = sfj.program_cost(jax.jit(jax.grad(network), compiler_options=AS_FOR_USERS), params, x)
    assert cost.devices == 8
    assert cost.collectives.reduced_bytes == cost.collectives.all_reduce.bytes == 4 * 3 * 64 * 64
    assert cost.collectives.all_reduce.operations >= 1
    assert cost.collectives.all_gather == cost.collectives.reduce_scatter == Traffic()


def test_collectives_that_are_asked_for():
    split, _ = split_and_whole()

    def exchange(x):
        summed = jax.lax.psum(x, "data")
        scattered = jax.lax.psum_scatter(jnp.sin(summed), "data", scatter_dimension=0, tiled=True)
        return summed, scattered, jax.lax.all_gather(jnp.cos(x), "data", tiled=True)

    specs = PartitionSpec(), PartitionSpec("data"), PartitionSpec()
    step = jax.shard_map(exchange, mesh=split.mesh, in_specs=split.spec, out_specs=specs, check_vma=False)
    x = jax.ShapeDtypeStruct((8 * 16, 4), jnp.float32, sharding=split)
    gathered, summed, scattered = sfj.program_cost(jax.jit(step), x).collectives
    assert summed == scattered == Traffic(1, 4 * 16 * 4)
    assert gathered == Traffic(1, 4 * 8 * 16 * 4)


def test_collectives_of_other_platforms():
    """Asynchronous ones are in two parts; only the first counts. Types of other sizes, layouts with tiles."""
    text = """
ENTRY %main (p: bf16[8,4]) -> bf16[64,4] {
  %p = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %half = f16[3]{0} constant({1, 2, 3})
  %sums = (bf16[8,4]{1,0:T(8,128)(2,1)}, f16[3]{0}) all-reduce-start(%p, %half), channel_id=1, to_apply=%add
  %done = (bf16[8,4]{1,0}, f16[3]{0}) all-reduce-done(%sums)
  %part = bf16[1,4]{1,0} reduce-scatter(%p), channel_id=2, dimensions={0}, to_apply=%add
  %fp8 = f8e4m3fn[16]{0} constant({...})
  %more = ((bf16[8,4]{1,0}, f8e4m3fn[16]{0}), (bf16[64,4]{1,0}, f8e4m3fn[128]{0})) all-gather-start(%p, %fp8)
  %gathered = (bf16[64,4]{1,0}, f8e4m3fn[128]{0}) all-gather-done(%more)
  ROOT %out = bf16[64,4]{1,0} get-tuple-element(%gathered), index=0
}
"""
    expected = Collectives(
        all_gather=Traffic(1, 2 * 64 * 4 + 128), all_reduce=Traffic(1, 2 * 8 * 4 + 6), reduce_scatter=Traffic(1, 64)
    )
    assert collectives(text) == expected
