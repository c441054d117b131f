"""What is said of small networks of every kind: layers by name, and figures that are the account's."""

import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import smartfrz_jax as sfj
from smartfrz_jax.cost.check import Measured, check_saving, jaxpr_of
from smartfrz_jax.cost.step_program import StepProgram
from tests.cost.small_networks import NETWORKS, X

pytestmark = pytest.mark.usefixtures("jax_defaults")

BACKEND = "gpu"  # where a step is judged by its jaxpr: nothing is compiled here


@functools.cache
def network(name):
    forward, params, _ = NETWORKS[name]

    def loss(params, x):
        return jnp.square(forward(params, x)).mean()

    layers = sfj.find_layers(params, loss, X)
    return loss, params, layers, sfj.account(params, layers, loss, X, backend=BACKEND)


def frozen_sets(layers):
    """Every run of layers that are next to each other."""
    ends = range(len(layers) + 1)
    return [sfj.Frozen(layers, frozenset(names)) for names in {layers.names[i:j] for i in ends for j in ends}]


@functools.cache
def measured(name, frozen, *, norm_of_all=False):
    loss, params, *_ = network(name)
    none = sfj.Frozen(frozen.layers)

    def step(params, x):
        value, grads = sfj.value_and_grad(loss, none if norm_of_all else frozen)(params, x)
        return value, frozen.active_leaves(grads), optax.tree.norm(grads) if norm_of_all else value

    jaxpr = jaxpr_of(jax.jit(step).trace(params, X))
    cost = sfj.cost.ProgramCost(StepProgram(jaxpr, BACKEND).cost(), 0.0, 0, 0, 0, 0.0, 0.0)
    return Measured(frozen, cost, jaxpr)


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_and_their_prices(name):
    _, _, layers, account = network(name)
    assert layers.names == NETWORKS[name].layers
    for frozen in frozen_sets(layers):
        planned = StepProgram(account.trace(frozen), BACKEND).cost()
        assert measured(name, frozen).cost.flops == pytest.approx(planned, rel=0.03), frozen
        if name != "remat":  # what is computed again is not counted
            assert account.flops(frozen).total == pytest.approx(planned, rel=0.03), frozen


def percentages(text):
    return re.findall(r"-?[\d.]+%", text)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_that_is_said_of_a_right_step_is_of_layers_that_gradients_pass(name):
    _, _, layers, account = network(name)
    nothing = sfj.Frozen(layers)
    for frozen in frozen_sets(layers):
        step = account.flops(frozen)
        through = tuple(n for n in layers.names if n in frozen.names and step.by_layer[n].activation_gradients)
        finding = check_saving(account, measured(name, nothing), measured(name, frozen), notable=1e-6)
        assert (finding is not None) == bool(through), frozen
        if finding is None:
            continue
        assert (finding.cause, finding.layers) == ("behind", through)
        active, first = account.reached_through(frozen)
        assert active
        assert set(first) <= set(active) <= set(layers.names) - frozen.names
        head, cause, cure = finding.message.split(".\n")
        assert all(any(repr(n) in line for n in layers.names) for line in (head, cause, cure)), finding.message
        assert "  " not in finding.message
        share = sum(step.by_layer[n].activation_gradients for n in through) / step.total
        assert percentages(cause) == [f"{share:.1%}"]
        again = account.flops(sfj.Frozen(layers, frozen.names.difference(through))).total
        figures = [1 - account.flops(frozen.add(active)).total / step.total, again / step.total - 1]
        if first:
            figures.append(1 - account.flops(frozen, stopped=first).total / step.total)
        assert percentages(cure) == [f"{figure:.1%}" for figure in figures]
        assert figures[0] > 0, "a cure that saves nothing is none"


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.slow
def test_all_that_is_said_of_a_wrong_step_is_of_the_layers_that_froze(name):
    _, _, layers, account = network(name)
    nothing = measured(name, sfj.Frozen(layers), norm_of_all=True)
    causes = set()
    for frozen in frozen_sets(layers):
        finding = check_saving(account, nothing, measured(name, frozen, norm_of_all=True), notable=1)
        if finding is None:
            assert account.saving(frozen) < 0.02, frozen
            continue
        causes.add(finding.cause)
        assert finding.layers == tuple(n for n in layers.names if n in frozen.names)
        head, predicted, cause, cure = finding.message.split(".\n")
        assert all(repr(n) in head for n in finding.layers[:3])
        assert "  " not in finding.message
        if name != "remat":
            assert float(percentages(predicted)[0][:-1]) == pytest.approx(100 * account.saving(frozen), abs=1)
        assert len(cause) > 30 < len(cure)
    # Gradients that one loop or branch computes for a norm and for an update are not told apart.
    assert causes <= {"norm", "unknown"} if name in ("cond", "recurrent", "looped", "stacked") else causes == {"norm"}
