"""An embedding that is the classifier too: what its two uses cost, apart and together."""

import functools

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax.cost.check import Measured, SavingCheck, SavingWarning, check_saving, jaxpr_of

pytestmark = pytest.mark.usefixtures("jax_defaults")

WORDS, WIDTH, DEPTH = 64, 32, 3
TOKENS = jax.random.randint(jax.random.key(0), (8, 16), 0, WORDS)
BLOCKS = tuple(f"blocks/{i}" for i in range(DEPTH))


class NNXNet(nnx.Module):
    def __init__(self, stop: bool = False):
        rngs = nnx.Rngs(0)
        self.embed, self.stop = nnx.Embed(WORDS, WIDTH, rngs=rngs), stop
        self.blocks = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(DEPTH)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = jax.lax.stop_gradient(x) if self.stop else x
        for block in self.blocks:
            x = nnx.relu(block(x))
        return self.embed.attend(x)


class LinenNet(nn.Module):
    stop: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(WORDS, WIDTH, name="embed")
        x = embed(tokens)
        x = jax.lax.stop_gradient(x) if self.stop else x
        for i in range(DEPTH):
            x = nn.relu(nn.Dense(WIDTH, name=f"blocks_{i}")(x))
        return embed.attend(x)


PARAMS = nnx.to_pure_dict(nnx.state(NNXNet(), nnx.Param))


def bare(params, tokens, stop=False):
    table = params["embed"]["embedding"]
    x = table[tokens]
    x = jax.lax.stop_gradient(x) if stop else x
    for i in range(DEPTH):
        x = jax.nn.relu(x @ params["blocks"][i]["kernel"] + params["blocks"][i]["bias"])
    return x @ table.T


def loss_of(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS).mean()


def of_nnx(stop):
    graphdef, _, rest = nnx.split(NNXNet(stop), nnx.Param, ...)
    return PARAMS, lambda params, tokens: loss_of(nnx.merge(graphdef, nnx.State(params), rest, copy=True)(tokens))


def of_linen(stop):
    net = LinenNet(stop)
    return net.init(jax.random.key(0), TOKENS)["params"], lambda p, tokens: loss_of(net.apply({"params": p}, tokens))


def of_bare(stop):
    return PARAMS, lambda params, tokens: loss_of(bare(params, tokens, stop))


def case(make, stop):
    """Layers, account, and the measured step for a frozen set."""
    params, loss = make(stop)
    layers = sfj.find_layers(params, loss, TOKENS)
    account = sfj.account(params, layers, loss, TOKENS)

    @functools.cache
    def measured(*names):
        frozen = sfj.Frozen(layers, frozenset(names))

        def step(params, tokens):
            value, grads = sfj.value_and_grad(loss, frozen)(params, tokens)
            return value, frozen.active_leaves(grads)

        jitted = jax.jit(step)
        args = params, TOKENS
        return Measured(frozen, sfj.program_cost(jitted, *args), jaxpr_of(jitted.trace(*args)))

    return layers, account, measured


@pytest.mark.parametrize("make", [of_nnx, of_linen, of_bare])
@pytest.mark.slow
def test_the_message_names_the_embedding_and_says_what_its_two_uses_cost(make):
    layers, account, measured = case(make, stop=False)
    blocks = layers.names[:-1]
    assert layers.head == "embed"
    finding = check_saving(account, measured(), measured(*blocks))
    assert finding is not None
    assert (finding.cause, finding.layers) == ("behind", blocks)
    frozen = measured(*blocks).frozen
    assert account.reached_through(frozen) == (("embed",), ("embed",))
    now, whole, stopped = (
        account.flops(frozen).total,
        account.flops(frozen.add(["embed"])).total,
        account.flops(frozen, stopped=["embed"]).total,
    )
    assert whole < stopped < now
    assert "Cause: 'embed', used before them and again behind them, go on training" in finding.message
    assert f"freezing 'embed' as well would make the step {1 - whole / now:.1%} cheaper" in finding.message
    assert f"find_layers(..., lookups=True) makes of it, {1 - stopped / now:.1%} cheaper" in finding.message
    # As XLA counts them: the head's gradient stays, what is between the uses goes.
    _, stopped_account, stopped_program = case(make, stop=True)
    for program, predicted in ((measured(*blocks), now), (stopped_program(*blocks), stopped)):
        assert program.cost.flops == pytest.approx(predicted, rel=0.05)
    assert stopped_account.flops(stopped_program(*blocks).frozen).total == pytest.approx(stopped, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("make", [of_nnx, of_linen, of_bare])
def test_with_the_gradient_stopped_nothing_is_missing(make):
    layers, account, measured = case(make, stop=True)
    assert layers.names == case(make, stop=False)[0].names
    check = SavingCheck(account, notable=0.01)
    for n in range(len(layers)):
        assert check(measured(*layers.names[:n])) is None, n
    assert account.reached_through(measured(*layers.names[:-1]).frozen) == ((), ())


@pytest.mark.slow
@pytest.mark.parametrize("make", [of_nnx, of_linen, of_bare])
def test_the_table_trains_on_as_the_head_alone(make):
    params, loss = make(True)
    layers = sfj.find_layers(params, loss, TOKENS)
    frozen = sfj.Frozen(layers, frozenset(layers.names[:-1]))
    grads = sfj.value_and_grad(loss, frozen)(params, TOKENS)[1]
    # The gradient of the head, by a table of its own.
    pure = (
        {"embed": params["embed"], "blocks": [params[f"blocks_{i}"] for i in range(DEPTH)]}
        if "blocks_0" in params
        else params
    )

    def of_head(head):
        x = pure["embed"]["embedding"][TOKENS]
        for i in range(DEPTH):
            x = jax.nn.relu(x @ pure["blocks"][i]["kernel"] + pure["blocks"][i]["bias"])
        return loss_of(x @ head.T)

    expected = jax.grad(of_head)(pure["embed"]["embedding"])
    np.testing.assert_allclose(grads["embed"]["embedding"], expected, rtol=1e-5, atol=1e-7)
    assert np.abs(expected).max() > 1e-3


@pytest.mark.slow
def test_a_warning_of_the_first_step_names_the_embedding():
    layers, account, measured = case(of_bare, stop=False)
    check = SavingCheck(account)
    check(measured())
    with pytest.warns(SavingWarning, match="'embed', used before them and again behind"):
        check(measured(*layers.names[:-1]))


def test_stopped_layers_must_be_of_the_network():
    layers, account, _ = case(of_bare, stop=False)
    with pytest.raises(ValueError, match="stopped: no layer is called 'embedding'; did you mean 'embed'"):
        account.flops(sfj.Frozen(layers), stopped=["embedding"])
