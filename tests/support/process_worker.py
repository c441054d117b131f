"""Short runs on a mesh that may span processes; as a script, the part of one process.

``python -m tests.support.process_worker PROCESS PORT DIRECTORY`` does every run as one of two processes and writes what
came of it to ``DIRECTORY/PROCESS.npz``.
"""

import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import smartfrz_jax as sfj
from smartfrz_jax.pytrees import checksums
from tests.support.train_steps import loss_fn, make_step

PROCESSES, DEVICES = 2, 4
STEPS, SAVED, EXAMPLES, BATCH = 24, 15, 32, 16
IMAGES = np.random.default_rng(0).standard_normal((EXAMPLES, 8), np.float32)
LABELS = np.random.default_rng(1).integers(0, 4, EXAMPLES).astype(np.int32)
ORDERS = [np.random.default_rng(epoch).permutation(EXAMPLES) for epoch in range(STEPS * BATCH // EXAMPLES)]


def batches(first=0):
    return np.concatenate(ORDERS).reshape(STEPS, BATCH)[first:]


def returning_layers():
    """Freezes the first two layers; later the second trains again."""

    def update(state, layers, *, step, params, **signals):
        front = layers.names[: 0 if step < 6 else 2 if step < 18 else 1]
        return frozenset(front), state

    return sfj.Policy(lambda layers, params: (), update)


def policy_of(name, layers, probe):
    match name:
        case "smartfrz":
            predictor = sfj.Predictor.pretrained()
            return sfj.smartfrz(
                predictor,
                total_steps=STEPS,
                schedule=sfj.policies.Schedule(record_every=1, evaluate_every=2, patience=1),
                caution=0.3,
                probe=probe,
            )
        case "paper":
            predictor = sfj.Predictor.pretrained("paper")
            return sfj.smartfrz(
                predictor,
                total_steps=STEPS,
                schedule=sfj.policies.Schedule(record_every=1, evaluate_every=4, patience=1, window=8),
                caution=0.01,
            )
        case "autofreeze":
            return sfj.autofreeze(evaluate_every=4)
        case "similarity_guided":
            reference = {
                layer: np.random.default_rng(2).standard_normal((BATCH, 8), np.float32) for layer in layers.names
            }
            return sfj.policies.similarity_guided(reference, evaluate_every=3, window=3, tolerance=0.1)
        case _:  # with kept moments, or kept activations
            return returning_layers()


# Parameters are sharded: decisions read them, or gradients and outputs that are sharded, too.
CASES = ("smartfrz", "paper", "autofreeze", "similarity_guided", "returning", "device", "host", "pytree")


def mesh_of(devices):
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def put(array, sharding):
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(array), sharding))
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def run(case, mesh, directory: Path):
    """Trains to the end, goes back to a checkpoint, and trains to the end again.

    Returns:
        The events of the first way there, the parameters at the end of both, and the losses of both.
    """

    def is_split(leaf):
        return leaf.ndim == 2 and len(leaf) % DEVICES == 0

    everywhere, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    rngs = nnx.Rngs(0)
    linear = [nnx.Linear(8, width, rngs=rngs) for width in (8, 8, 8, 8, 4)]
    model = nnx.Sequential(*[part for layer in linear[:-1] for part in (layer, nnx.tanh)], linear[-1])
    layers = sfj.nnx.find_layers(model, IMAGES[:1])
    returning = "kept" if case == "returning" else "fresh"
    optimizer = sfj.nnx.Optimizer(model, optax.adamw(0.01), layers=layers, returning=returning)
    for module in (model, optimizer):
        nnx.update(module, jax.tree.map(lambda x: put(x, split if is_split(x) else everywhere), nnx.state(module)))

    def batch_of(indices):
        return put(IMAGES[indices], split), put(LABELS[indices], split)

    if case in ("device", "host"):
        step = sfj.nnx.CachedStep(make_step, loss_fn, examples=EXAMPLES, storage=sfj.caching.Storage(case))
    else:
        step = sfj.TrainStep(make_step(loss_fn))
    probe_batch = batch_of(np.arange(BATCH))
    policy = policy_of(case, layers, sfj.nnx.probe(model, loss_fn, *probe_batch))
    features = None
    if "features" in policy.needs:
        outputs = sfj.nnx.features(model, layers, probe_batch[0])
        features = functools.partial(_outputs, outputs, probe_batch[0])
    freezer = sfj.nnx.Freezer(model, optimizer, policy, features=features, train_step=step, lead=1)
    checkpoint = directory / case

    def go_on(first, losses):
        for number, indices in enumerate(batches(first), start=first + 1):
            numbers = (indices,) if isinstance(step, sfj.nnx.CachedStep) else ()
            losses.append(float(step(model, optimizer, *numbers, *batch_of(indices))))
            freezer.step(loss=losses[-1])
            if number == SAVED and first == 0:
                freezer.save(checkpoint)
        whole = jax.jit(lambda params: params, out_shardings=everywhere)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(whole(nnx.as_pure(nnx.state(model, nnx.Param))))]

    losses, again = [], []
    params = go_on(0, losses)
    events = [[event.step, event.names, event.returned] for event in freezer.events]
    freezer.restore(checkpoint)
    params_again = go_on(SAVED, again)
    return packed(events, losses, again, params, params_again) | {"held": held(step)}


def held(step):
    """How many examples' activations lie on each device of this process, or in its memory."""
    if not isinstance(step, sfj.nnx.CachedStep):
        return np.zeros(0)
    (rows,) = step.cache.store.values
    on_device = isinstance(rows, jax.Array)
    return np.array([len(shard.data) for shard in rows.addressable_shards] if on_device else len(rows))


def run_pytree(case, mesh, directory: Path):
    """The same with a pytree of parameters and ``smartfrz_jax.linen``, under ``autofreeze``."""
    everywhere, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    params = {f"layer{i}": np.random.default_rng(i).standard_normal((8, 8), np.float32) / 3 for i in range(4)}

    def forward(params, images):
        for name in sorted(params):
            images = jnp.tanh(images @ params[name])
        return images

    layers = sfj.find_layers(params, forward, IMAGES[:1])

    def start():
        arrays = {name: put(array, split) for name, array in params.items()}
        state = sfj.linen.TrainState.create(
            apply_fn=forward, params=arrays, tx=optax.adamw(0.01), layers=layers, keep_grads=True
        )
        return jax.tree.map(lambda x: x if x.ndim else put(x, everywhere), state)

    def train_step(state, images, labels):
        def loss_fn(params):
            return optax.softmax_cross_entropy_with_integer_labels(forward(params, images), labels).mean()

        loss, grads = state.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    state = start()
    step = sfj.TrainStep(train_step)
    freezer = sfj.linen.Freezer(state, sfj.autofreeze(evaluate_every=4), train_step=step, lead=1)

    def go_on(state, first, losses):
        for number, indices in enumerate(batches(first), start=first + 1):
            state, loss = step(state, put(IMAGES[indices], split), put(LABELS[indices], split))
            state = freezer.step(state)
            losses.append(float(loss))
            if number == SAVED and first == 0:
                freezer.save(directory / case, state)
        whole = jax.jit(lambda params: params, out_shardings=everywhere)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(whole(state.params))]

    losses, again = [], []
    ends = go_on(state, 0, losses)
    events = [[event.step, event.names, event.returned] for event in freezer.events]
    ends_again = go_on(freezer.restore(directory / case, start()), SAVED, again)
    compared = np.array(json.dumps(checksums_of(put(params["layer0"], split), mesh)))
    return packed(events, losses, again, ends, ends_again) | {"checksums": compared}


def checksums_of(array, mesh):
    """What is found to differ from an array: itself, as it lies and split otherwise, and with one number changed."""
    saved = checksums.of({"w": array})
    columns = jax.jit(lambda array: array, out_shardings=NamedSharding(mesh, PartitionSpec(None, "data")))(array)
    return [checksums.differing(saved, {"w": other}) for other in (array, columns, columns + 1)]


def packed(events, losses, again, params, params_again):
    """What came of a run, as arrays."""
    return {
        "events": np.array(json.dumps(events)),
        "losses": np.array(losses),
        "again": np.array(again),
        **{f"params{i}": leaf for i, leaf in enumerate(params)},
        **{f"again{i}": leaf for i, leaf in enumerate(params_again)},
    }


def _outputs(outputs, images, model):
    return outputs(model, images)


def runs(mesh, directory: Path, cases=CASES):
    """Some cases."""
    return {
        f"{case} {name}": value
        for case in cases
        for name, value in (run_pytree if case == "pytree" else run)(case, mesh, directory).items()
    }


def main(process: int, port: str, directory: Path) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=PROCESSES, process_id=process)
    np.savez(directory / f"{process}.npz", **runs(mesh_of(jax.devices()), directory))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
