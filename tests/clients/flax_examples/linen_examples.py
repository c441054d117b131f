"""Patterns of Flax's other Linen examples, at toy size: one function makes one run."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from smartfrz_jax.linen import find_layers
from tests.clients.doors import StateRun, make_params

IMAGES = jax.random.uniform(jax.random.key(0), (8, 8, 8, 1))
LABELS = jnp.array([0, 2, 1, 2, 0, 0, 1, 1])


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, name="fc1")(x))
        return nn.Dense(4, name="fc2_mean")(x), nn.Dense(4, name="fc2_logvar")(x)


class Vae(nn.Module):
    def setup(self):
        self.encoder = Encoder()
        self.decoder = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(64)])

    def __call__(self, x, key):
        mean, logvar = self.encoder(x)
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, logvar.shape)
        return self.decoder(z), mean, logvar


def vae(door):
    """The random key is an argument of the model."""
    model, x, key = Vae(), (IMAGES > 0.5).astype(jnp.float32).reshape(8, 64), jax.random.key(1)
    params = make_params(model.init, jax.random.key(0), x, key)
    state = door.train_state(
        apply_fn=model.apply,
        params=params,
        tx=optax.adam(1e-3),
        layers=lambda: find_layers(model, {"params": params}, x, key),
    )

    def train_step(state, x, key):
        def loss_fn(params):
            logits, mean, logvar = state.apply_fn({"params": params}, x, jax.random.fold_in(key, state.step))
            divergence = -0.5 * (1 + logvar - mean**2 - jnp.exp(logvar)).sum(-1)
            return (optax.sigmoid_binary_cross_entropy(logits, x).sum(-1) + divergence).mean()

        loss, grads = door.grads_of_params(state, loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    return StateRun(door.jit(train_step), state, (x, key), ("encoder/fc1",))


class ActorCritic(nn.Module):
    """A trunk with two heads."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=(2, 2), name="conv1")(x.astype(jnp.float32)))
        x = nn.relu(nn.Conv(6, (3, 3), strides=(2, 2), name="conv2")(x))
        x = nn.relu(nn.Dense(16, name="hidden")(x.reshape(x.shape[0], -1)))
        return nn.log_softmax(nn.Dense(3, name="logits")(x)), nn.Dense(1, name="value")(x)


def ppo(door):
    """Several updates in one step, over minibatches; further arguments of the loss."""
    model = ActorCritic()
    params = make_params(model.init, jax.random.key(0), IMAGES)
    state = door.train_state(
        apply_fn=model.apply,
        params=params,
        tx=optax.adam(optax.linear_schedule(1e-2, 0.0, 20)),
        layers=lambda: find_layers(model, {"params": params}, IMAGES),
    )

    def loss_fn(params, apply_fn, minibatch, clip):
        states, actions, old, returns, advantages = minibatch
        log_probs, values = apply_fn({"params": params}, states)
        entropy = -(jnp.exp(log_probs) * log_probs).sum(-1).mean()
        ratios = jnp.exp(jax.vmap(lambda row, action: row[action])(log_probs, actions) - old)
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        clipped = advantages * jnp.clip(ratios, 1 - clip, 1 + clip)
        policy = -jnp.minimum(ratios * advantages, clipped).mean()
        return policy + 0.5 * jnp.square(returns - values[:, 0]).mean() - 0.01 * entropy

    def train_step(state, trajectories, clip):
        trajectories = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), trajectories)
        loss = 0.0
        for batch in zip(*trajectories, strict=True):
            grad_fn = door.grads_of_params(state, loss_fn)
            one, grads = grad_fn(state.params, state.apply_fn, batch, clip)
            state, loss = state.apply_gradients(grads=grads), loss + one
        return state, loss

    rewards = jax.random.normal(jax.random.key(2), (3, 8))
    trajectories = (IMAGES, LABELS, -jnp.abs(rewards[0]), rewards[1], rewards[2])
    return StateRun(door.jit(train_step), state, (trajectories, jnp.float32(0.1)), ("conv1", "conv2"))


class Graphs(NamedTuple):
    nodes: Any
    edges: Any
    senders: Any
    receivers: Any
    graph_of: Any


class GraphNet(nn.Module):
    """Messages along the edges, summed at the nodes, with skip connections and layer norms; mean over a graph."""

    @nn.compact
    def __call__(self, graphs, deterministic):
        dropout = partial(nn.Dropout, 0.2, deterministic=deterministic)
        nodes = nn.Dense(8, name="embed_nodes")(graphs.nodes)
        edges = nn.Dense(8, name="embed_edges")(graphs.edges)
        for i in range(2):
            inputs = jnp.concatenate([edges, nodes[graphs.senders], nodes[graphs.receivers]], axis=-1)
            messages = dropout()(nn.relu(nn.Dense(8, name=f"edges_{i}")(inputs)))
            received = jax.ops.segment_sum(messages, graphs.receivers, len(nodes))
            update = nn.Dense(8, name=f"nodes_{i}")(jnp.concatenate([nodes, received], axis=-1))
            nodes = nn.LayerNorm(name=f"norm_{i}")(nodes + dropout()(nn.relu(update)))
            edges = edges + messages
        pooled = jax.ops.segment_sum(nodes, graphs.graph_of, 2)
        return nn.Dense(2, name="decode")(pooled)


def graph_network(door):
    """Gathers, segment sums, and labels that are missing for some examples."""
    model = GraphNet()
    keys = jax.random.split(jax.random.key(0), 5)
    senders, receivers = (jax.random.randint(key, (9,), 0, 7) for key in keys[:2])
    graph_of = jnp.array([0, 0, 0, 1, 1, 1, 1])
    graphs = Graphs(
        jax.random.normal(keys[2], (7, 3)), jax.random.normal(keys[3], (9, 2)), senders, receivers, graph_of
    )
    labels = jnp.array([[1.0, jnp.nan], [0.0, 1.0]])
    params = make_params(model.init, keys[4], graphs, deterministic=True)
    state = door.train_state(
        apply_fn=model.apply,
        params=params,
        tx=optax.sgd(0.1, momentum=0.9),
        layers=lambda: find_layers(model, {"params": params}, graphs, deterministic=False),
    )

    def train_step(state, graphs, labels, key):
        streams = {"dropout": jax.random.fold_in(key, state.step)}
        mask = ~jnp.isnan(labels)

        def loss_fn(params):
            logits = state.apply_fn({"params": params}, graphs, rngs=streams, deterministic=False)
            losses = optax.sigmoid_binary_cross_entropy(logits, jnp.where(mask, labels, 0))
            return jnp.where(mask, losses, 0).sum() / mask.sum()

        loss, grads = door.grads_of_params(state, loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    frozen = ("embed_nodes", "embed_edges", "edges_0", "nodes_0")
    return StateRun(door.jit(train_step), state, (graphs, labels, jax.random.key(1)), frozen)


EXAMPLES = (vae, ppo, graph_network)
