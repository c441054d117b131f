"""The optimizers and policies of the training scripts do what their options say."""

import json
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import smartfrz_jax as sfj
from tests.support.boxes import unboxed
from train.optimizers import directions, make_optimizer
from train.options import parse
from train.policies import PolicyName, layer_rates, make_policy

PARAMS = {
    "a": {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)},
    "b": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)},
}
STEPS = 40


def forward(params, x):
    return (x @ params["a"]["kernel"] + params["a"]["bias"]) @ params["b"]["kernel"] + params["b"]["bias"]


@pytest.fixture
def layers(jax_defaults):
    return sfj.find_layers(PARAMS, forward, jnp.ones((1, 3)))


def options(*changed):
    return parse(["--model", "resnet50", "--data", "x", "--data-dir", "y", "--out", "z", "--epochs", "4", *changed])


def optimizer_of(layers, *changed):
    """As ``train.finetune`` makes it."""
    chosen = options(*changed)
    rates = layer_rates(chosen.policy, layers, learning_rate=chosen.optimizer.learning_rate, total_steps=STEPS)
    return make_optimizer(chosen.optimizer, epochs=chosen.run.epochs, total_steps=STEPS, rates=rates)


def policy_of(*changed, steps_per_epoch=10, reference=None):
    costs, epochs = {"a": 3.0, "b": 1.0}, options().run.epochs
    config = options(*changed).policy
    return make_policy(
        config,
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        seed=0,
        costs=costs,
        reference=reference,
        pretrained=True,
    )


def trajectory(tx):
    params, state = PARAMS, tx.init(PARAMS)
    for step in range(STEPS):
        rng = np.random.default_rng(step)
        grads = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), params)  # noqa: B023
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def kernels(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


COSINE = optax.cosine_decay_schedule(0.1, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "reference"),
    [
        ((), optax.sgd(COSINE, momentum=0.9)),
        (("--momentum", "0.5", "--clip", "0.3"), optax.chain(optax.clip_by_global_norm(0.3), optax.sgd(COSINE, 0.5))),
        (("--optimizer", "adamw", "--weight-decay", "0.2"), optax.adamw(COSINE, weight_decay=0.2, mask=kernels)),
        (
            ("--warmup-epochs", "1"),
            optax.sgd(optax.warmup_cosine_decay_schedule(0.0, 0.1, STEPS // 4, STEPS), momentum=0.9),
        ),
    ],
)
def test_the_optimizer_is_that_of_optax(layers, changed, reference):
    ours = optimizer_of(layers, "--learning-rate", "0.1", *changed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), trajectory(ours), trajectory(reference))


@pytest.mark.slow
def test_weight_decay_shrinks_kernels_only(layers):
    tx = optimizer_of(layers, "--weight-decay", "0.5", "--learning-rate", "0.1")
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
    assert float(updates["a"]["kernel"][0, 0]) == pytest.approx(-0.05)
    assert float(updates["a"]["bias"][0]) == 0


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weight_decay_may_be_traced(jax_defaults, name):
    @jax.jit
    def step(decay):
        tx = optax.chain(*directions(name, decay))
        return tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)[0]["a"]

    assert float(step(0.5)["kernel"][0, 0]) == pytest.approx(0.5)
    assert float(step(0.5)["bias"][0]) == 0
    assert [len(directions(name, decay)) for decay in (None, 0.0)] == [1, 2]


def test_linear_anneals_every_layer_to_its_own_end(layers):
    tx = optimizer_of(layers, "--policy", "freezeout", "--t0", "0.5", "--learning-rate", "0.1")
    state = tx.init(PARAMS)
    sizes = []
    for _ in range(STEPS):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS)
        sizes.append((abs(float(updates["a"]["bias"][0])), abs(float(updates["b"]["bias"][0]))))
    assert sizes[STEPS // 2][0] < 1e-6 < sizes[STEPS // 2 - 2][0]
    assert sizes[-2][1] > 0


@pytest.mark.parametrize("changed", [("--warmup-epochs", "4"), ("--warmup-epochs", "1", "--policy", "freezeout")])
def test_a_warm_up_that_does_not_fit_is_refused(layers, changed):
    with pytest.raises(ValueError, match=r"warmup_epochs: got \d"):
        optimizer_of(layers, *changed)


@pytest.mark.parametrize("name", get_args(PolicyName))
def test_every_policy_can_be_chosen(layers, name):
    changed = ["--policy", name, "--budget", "0.75", "--stages", "0.2:0.75", "--active-blocks", "1"]
    reference = None
    if name in ("similarity_guided", "simfreeze"):
        changed += ["--reference", "model.safetensors"] if name == "similarity_guided" else []
        reference = {"a": jnp.eye(3), "b": jnp.eye(3)}
    policy = policy_of(*changed, reference=reference)
    state = policy.init(layers, PARAMS)
    if name in ("never", "auto", "static_prefix", "freezeout", "random", "progress"):
        frozen = frozenset()
        for step in range(1, STEPS + 1):
            frozen, state = policy.update(state, layers, step=step, params=lambda: PARAMS)
        assert frozen == (set() if name in ("never", "auto") else {"a"})
    assert policy.options["name"] == name


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (["auto"], {"pretrained": True, "caution": 1, "costs": {"a": 3, "b": 1}, "total_steps": STEPS}),
        (["auto", "--caution", "0.9"], {"caution": 0.9}),
        (["lisa"], {"active": 2, "switch_every": 20, "max_sets": None, "rest": "train"}),
        (["lisa", "--active-blocks", "3", "--max-sets", "4", "--switch-every", "7", "--rest", "freeze"],
         {"active": 3, "switch_every": 7, "max_sets": 4, "rest": "freeze"}),
        (["badam"], {"switch_every": 100, "order": "random", "rest": "freeze"}),
        (["hift", "--active-blocks", "2", "--block-order", "descending"], {"group": 2, "order": "descending"}),
        (["slimfit", "--freezing-rate", "0.9"], {"rate": 0.9, "switch_every": 50}),
        (["grades"], {"threshold": 0.01}),
        (["grades", "--threshold", "0.3", "--grace", "0.2"], {"threshold": 0.3, "grace": 0.2, "total_steps": STEPS}),
        (["autofreeze"], {"evaluate_every": 2}),
        (["simfreeze"], {"tolerance": 0.01, "evaluate_every": 2}),
        (["simfreeze", "--tolerance", "0", "--evaluations-per-epoch", "2"], {"tolerance": 0, "evaluate_every": 5}),
        (["similarity_guided", "--reference", "r"], {"tolerance": 0.02, "evaluate_every": 2}),
        (["relative_gradient_norm"], {"threshold": 0.1, "evaluate_every": 10, "batches": 5}),
        (["relative_gradient_norm", "--threshold", "0", "--evaluations-per-epoch", "4"],
         {"threshold": 0, "evaluate_every": 2, "batches": 2}),
    ],
)  # fmt: skip
def test_options_of_policies(changed, expected):
    options = policy_of("--policy", *changed, reference={"a": jnp.eye(3)}).options
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize(
    "name", ["default", *(pytest.param(name, marks=pytest.mark.slow) for name in ("paper", "a path"))]
)
def test_predictors_that_can_be_chosen(layers, tmp_path, name):
    if name == "a path":
        name = str(tmp_path / "predictor")
        sfj.Predictor(sfj.predictor.PredictorConfig(size=16), rngs=nnx.Rngs(0)).save(name)
    policy = policy_of("--policy", "smartfrz", "--predictor", name, steps_per_epoch=100)
    sampled = {"default": 1, "paper": 1024}.get(name, 16)  # the default reads no weights, so there is a zero
    assert policy.init(layers, PARAMS).history.values.shape[-1] == sampled


@pytest.mark.parametrize(
    ("changed", "lead"),
    [
        (["lisa"], 19),
        (["hift"], 0),
        (["badam"], 20),
        (["badam", "--switch-every", "4"], 3),
        (["lisa", "--lead", "5"], 5),
        (["progress"], 20),
    ],
)
def test_sets_take_effect_before_they_are_over(changed, lead):
    assert options("--policy", *changed).policy.lead == lead


def frozen_after_each_step(layers, *changed):
    policy = policy_of(*changed)
    state, frozen = policy.init(layers, PARAMS), []
    for step in range(1, STEPS + 1):
        names, state = policy.update(state, layers, step=step, params=lambda: PARAMS)
        frozen.append(bool(names))
    return frozen


def test_stages_of_static_prefix(layers):
    first = ["--policy", "static_prefix", "--stages", "0:0.7,0.5:0.8"]
    assert frozen_after_each_step(layers, *first).index(True) + 1 == STEPS // 2
    assert not any(frozen_after_each_step(layers, "--policy", "static_prefix"))  # by default half the cost; a has 3/4


def test_stages_can_be_compared_with_those_of_a_log():
    changed = options("--stages", "0:0.5,0.5:1").settings()
    assert json.loads(json.dumps(changed)) == changed
    assert changed["stages"] != options("--stages", "0:0.5").settings()["stages"]


@pytest.mark.parametrize("text", ["0.5", "a:b", "0:0.5:1", "0:0.5,", ""])
def test_refuses_stages_of_another_form(text, capsys):
    with pytest.raises(SystemExit):
        options("--stages", text)
    assert "expected pairs AT:SHARE of numbers" in unboxed(capsys.readouterr().err)


@pytest.mark.slow
def test_caution_and_patience(layers, tmp_path):
    predictor = sfj.Predictor(sfj.predictor.PredictorConfig(size=16), rngs=nnx.Rngs(0))
    predictor.classifier.layers[2].bias[...] = jnp.array([0.0, 100.0])  # always sure
    predictor.save(tmp_path / "predictor")
    smartfrz = ["--policy", "smartfrz", "--predictor", str(tmp_path / "predictor")]
    first = {n: frozen_after_each_step(layers, *smartfrz, "--patience", str(n)).index(True) + 1 for n in (1, 2, 4)}
    assert first == {1: 5, 2: 10, 4: 20}
    assert not any(frozen_after_each_step(layers, *smartfrz, "--caution", "1"))
    bold, careful = (
        frozen_after_each_step(layers, "--policy", "progress", "--caution", caution) for caution in ("0.1", "0.9")
    )
    assert bold.index(True) < careful.index(True)
