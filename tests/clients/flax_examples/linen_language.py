"""Patterns of Flax's Linen examples on text, at toy size: one function makes one run."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from smartfrz_jax.linen import find_layers
from tests.clients.doors import StateRun, make_params

VOCABULARY = 13
TOKENS = jax.random.randint(jax.random.key(0), (2, 6), 1, VOCABULARY)
TARGETS = jax.random.randint(jax.random.key(1), (2, 5), 1, VOCABULARY)


def cross_entropy(logits, targets):
    weights = (targets > 0).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return (losses * weights).sum() / weights.sum()


class DecoderBlock(nn.Module):
    """Causal attention with a cache for decoding, and an MLP; dropout after both."""

    decode: bool
    train: bool

    @nn.compact
    def __call__(self, x, mask):
        y = nn.LayerNorm()(x)
        attention = partial(nn.MultiHeadDotProductAttention, 2, dropout_rate=0.1, deterministic=not self.train)
        y = attention(decode=self.decode, name="attention")(y, mask=mask)
        x = x + nn.Dropout(0.1, deterministic=not self.train)(y)
        y = nn.Dense(16)(nn.LayerNorm()(x))
        return x + nn.Dropout(0.1)(nn.Dense(8)(nn.gelu(y)), deterministic=not self.train)


class LanguageModel(nn.Module):
    decode: bool = False
    train: bool = True

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, 8, name="embed")(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, 8, 8))[:, : tokens.shape[1]]
        mask = None if self.decode else nn.make_causal_mask(tokens)
        x = DecoderBlock(self.decode, self.train, name="block_0")(x, mask)
        return nn.Dense(VOCABULARY, name="logits")(nn.LayerNorm(name="norm")(x))


def lm1b(door):
    """A dropout key folded with the step; a learning rate schedule; the cache is made by decoding alone."""
    model = LanguageModel()
    params = make_params(LanguageModel(decode=True, train=False).init, jax.random.key(0), TOKENS)
    state = door.train_state(
        apply_fn=model.apply,
        params=params,
        tx=optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10), b2=0.98, weight_decay=0.1),
        layers=lambda: find_layers(model, {"params": params}, TOKENS),
    )

    def train_step(state, tokens, dropout_key):
        dropout_key = jax.random.fold_in(dropout_key, state.step)

        def loss_fn(params):
            logits = state.apply_fn({"params": params}, tokens[:, :-1], rngs={"dropout": dropout_key})
            return cross_entropy(logits, tokens[:, 1:]), logits

        (loss, _), grads = door.grads_of_params(state, loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads), loss

    frozen = ("embed", "block_0/attention/query", "block_0/attention/key", "block_0/attention/value")
    return StateRun(door.jit(train_step), state, (TOKENS, jax.random.key(2)), frozen)


class DecoderCell(nn.RNNCellBase):
    """Feeds the token that it draws to its next step."""

    features: int

    @nn.compact
    def __call__(self, carry, x):
        lstm_state, prediction = carry
        lstm_state, y = nn.LSTMCell(self.features, name="lstm")(lstm_state, 0.5 * (x + prediction))
        logits = nn.Dense(VOCABULARY, name="logits")(y)
        drawn = jax.random.categorical(self.make_rng("lstm"), logits)
        prediction = jax.nn.one_hot(drawn, VOCABULARY, dtype=jnp.float32)
        return (lstm_state, prediction), (logits, prediction)

    @property
    def num_feature_axes(self):
        return 1


class Seq2Seq(nn.Module):
    @nn.compact
    def __call__(self, encoder_inputs, decoder_inputs):
        encoder = nn.RNN(nn.LSTMCell(8), return_carry=True)
        decoder = nn.RNN(DecoderCell(8), split_rngs={"params": False, "lstm": True})
        lengths = jnp.argmax(encoder_inputs.argmax(-1) == 1, axis=-1)
        encoded, _ = encoder(encoder_inputs, seq_lengths=lengths)
        return decoder(decoder_inputs[:, :-1], initial_carry=(encoded, decoder_inputs[:, 0]))


def seq2seq(door):
    """Recurrent networks run by lifted scans, with a random stream of their own."""
    model = Seq2Seq()
    inputs = tuple(jax.nn.one_hot(tokens, VOCABULARY) for tokens in (TOKENS, TARGETS))
    streams = {"params": jax.random.key(0), "lstm": jax.random.key(1)}
    params = make_params(model.init, streams, *inputs)
    state = door.train_state(
        apply_fn=model.apply,
        params=params,
        tx=optax.adam(3e-3),
        layers=lambda: find_layers(model, {"params": params}, *inputs, rngs={"lstm": streams["lstm"]}),
    )

    def train_step(state, encoder_inputs, decoder_inputs, key):
        key = jax.random.fold_in(key, state.step)

        def loss_fn(params):
            logits, _ = state.apply_fn({"params": params}, encoder_inputs, decoder_inputs, rngs={"lstm": key})
            return cross_entropy(logits, decoder_inputs[:, 1:].argmax(-1))

        loss, grads = door.grads_of_params(state, loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    batch = (*inputs, jax.random.key(3))
    frozen = tuple(f"LSTMCell_0/{name}" for name in params["LSTMCell_0"])
    return StateRun(door.jit(train_step), state, batch, frozen)


class EncoderBlock(nn.Module):
    """A block of a scan: carries the residual stream."""

    train: bool

    @nn.compact
    def __call__(self, x, _):
        y = nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm()(x))
        x = x + nn.Dropout(0.1, deterministic=not self.train)(y)
        return x + nn.Dense(8)(nn.gelu(x)), None


class CrossBlock(nn.Module):
    """A decoder's block: looks at the encoder's output."""

    @nn.compact
    def __call__(self, x, encoded):
        return x + nn.MultiHeadDotProductAttention(2, name="cross_attention")(x, encoded)


class Translator(nn.Module):
    """One embedding for both sides; the encoder is a scan of rematerialised blocks."""

    train: bool = True

    @nn.compact
    def __call__(self, inputs, targets):
        embed = nn.Embed(VOCABULARY, 8, name="embed")
        block = nn.remat(EncoderBlock, prevent_cse=False)
        encoder: Any = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=2
        )
        encoded, _ = encoder(self.train, name="encoder")(embed(inputs), None)
        encoded = nn.LayerNorm(name="encoder_norm")(encoded)
        x = nn.remat(CrossBlock)(name="decoder_0")(embed(targets), encoded)
        return nn.Dense(VOCABULARY, name="logits")(nn.LayerNorm(name="decoder_norm")(x))


def wmt(door):
    """An encoder whose parameters are stacked, all of it frozen."""
    model = Translator()
    streams = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = make_params(model.init, streams, TOKENS, TARGETS)
    layers = find_layers(model, {"params": params}, TOKENS, TARGETS)
    state = door.train_state(
        apply_fn=model.apply,
        params=params,
        tx=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
        layers=lambda: layers,
    )

    def train_step(state, inputs, targets, key):
        streams = {"dropout": jax.random.fold_in(key, state.step)}

        def loss_fn(params):
            logits = state.apply_fn({"params": params}, inputs, targets[:, :-1], rngs=streams)
            return cross_entropy(logits, targets[:, 1:])

        loss, grads = door.grads_of_params(state, loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    frozen = tuple(name for name in layers.names if name.startswith(("embed", "encoder")))
    return StateRun(door.jit(train_step), state, (TOKENS, TARGETS, jax.random.key(4)), frozen)


EXAMPLES = (lm1b, seq2seq, wmt)
