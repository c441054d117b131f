"""Bad input for policies, and for what drives them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import smartfrz_jax as sfj
from smartfrz_jax.pytrees import paths
from tests.bad_input import scenes
from tests.bad_input.scenes import frozen, layers, of_another_network, outputs, params, predictor, update
from tests.bad_input.table import INF, NAN, Case, Door

Probing, Schedule = sfj.policies.Probing, sfj.policies.Schedule

DOORS = [
    Door("auto", lambda: {"total_steps": 10}),
    Door("freezeout", lambda: {"total_steps": 10}),
    Door("progress", lambda: {"total_steps": 10}),
    Door("policies.random", lambda: {"budget": 0.2, "total_steps": 10}),
    Door("static_prefix", lambda: {"total_steps": 10, "stages": [(0.0, 0.5)]}),
    Door("autofreeze", lambda: {"evaluate_every": 1}),
    Door("policies.grades", lambda: {"threshold": 0.1, "total_steps": 10}),
    Door("policies.relative_gradient_norm", lambda: {"threshold": 0.1, "evaluate_every": 10}),
    Door("policies.lisa", lambda: {"active": 1}),
    Door("policies.badam", lambda: {}),
    Door("policies.hift", lambda: {}),
    Door("policies.slimfit", lambda: {"rate": 0.5}),
    Door("policies.similarity_guided", lambda: {"reference": outputs(), "evaluate_every": 1}),
    Door("policies.simfreeze", lambda: {"reference": outputs(), "evaluate_every": 1}),
    Door("smartfrz", lambda: {"predictor": predictor(), "total_steps": 1000}),
    Door(
        "policies.freezeout_schedules",
        lambda: {"layers": layers(), "learning_rate": 0.1, "total_steps": 10},
    ),
    Door("policies.Schedule", lambda: {}),
    Door("policies.Probing", lambda: {"probe": len}),
    Door("policies.scale_by_layer_schedule", lambda: {"layers": layers(), "schedules": dict.fromkeys("abc", float)}),
    Door(
        "rehearse",
        lambda: {"train": lambda policy, steps: 1.0, "policies": {"n": lambda steps: sfj.policies.never()}, "steps": 1},
        unchecked={"tolerance=-7": "a policy may have to be better than never"},
    ),
    Door(
        "Freezer",
        lambda: {"policy": sfj.policies.never(), "layers": layers(), "params": params(), "saving": lambda *_: 1.0},
    ),
    Door("Freezer.observe", lambda: {"params": params}, on=scenes.freezer),
    Door("Freezer.adopt", lambda: {"frozen": frozen()}, on=scenes.freezer),
    Door("Freezer.unfreeze_layers", lambda: {"names": "a"}, on=scenes.freezer),
]

CASES = [
    Case("no-steps", "total_steps", ValueError, ("0", "at least 1"), lambda: sfj.freezeout(total_steps=0)),
    Case("steps-as-text", "total_steps", TypeError, ("'100'", "an integer"), lambda: sfj.freezeout(total_steps="100")),
    Case("steps-a-quotient", "total_steps", ValueError, ("12.5", "round it"), lambda: sfj.freezeout(total_steps=12.5)),
    Case("steps-true", "total_steps", TypeError, ("True", "an integer"), lambda: sfj.freezeout(total_steps=True)),
    Case("steps-beyond-int32", "total_steps", ValueError, ("an integer",), lambda: sfj.freezeout(total_steps=2**31)),
    Case("t0-above-1", "t0", ValueError, ("80", "up to 1"), lambda: sfj.freezeout(total_steps=10, t0=80)),
    Case(
        "spacing-unknown",
        "spacing",
        ValueError,
        ("'square'", "'cubic'"),
        lambda: sfj.freezeout(total_steps=10, spacing="square"),
    ),
    Case(
        "keep-numbers", "keep", TypeError, ("int 3", "names of layers"), lambda: sfj.freezeout(total_steps=10, keep=[3])
    ),
    Case(
        "keep-unknown",
        "keep",
        ValueError,
        ("'d'", "did you mean"),
        lambda: start(sfj.freezeout(total_steps=10, keep="d")),
    ),
    Case(
        "layers-names",
        "layers",
        TypeError,
        ("['a', 'b']", "find_layers"),
        lambda: start(sfj.freezeout(total_steps=10), ["a", "b"]),
    ),
    Case(
        "layers-none",
        "layers",
        TypeError,
        ("None", "find_layers"),
        lambda: sfj.freezeout(total_steps=10).init(None, params()),
    ),
    Case(
        "step-negative",
        "step",
        ValueError,
        ("-1", "at least 0"),
        lambda: update(sfj.freezeout(total_steps=10), step=-1),
    ),
    Case(
        "step-as-text",
        "step",
        TypeError,
        ("'1'", "an integer"),
        lambda: update(sfj.freezeout(total_steps=10), step="1"),
    ),
    Case("state-of-another", "state", TypeError, ("tuple ()", "AutoFreezeState"), lambda: foreign_state()),
    Case("state-of-other-layers", "layers", ValueError, ("got 2", "for 3"), lambda: state_of_three()),
    Case(
        "coefficients-two",
        "coefficients",
        ValueError,
        ("three finite",),
        lambda: sfj.progress(total_steps=9, coefficients=(1, 2)),
    ),
    Case(
        "coefficients-nan",
        "coefficients",
        ValueError,
        ("nan",),
        lambda: sfj.progress(total_steps=9, coefficients=(NAN, 1, 1)),
    ),
    Case(
        "coefficients-text",
        "coefficients",
        TypeError,
        ("'1'",),
        lambda: sfj.progress(total_steps=9, coefficients=(1, "1", 1)),
    ),
    Case(
        "coefficients-fall",
        "coefficients",
        ValueError,
        ("above 0",),
        lambda: sfj.progress(total_steps=9, coefficients=(1, -1, 1)),
    ),
    Case("caution-percent", "caution", ValueError, ("95", "up to 1"), lambda: sfj.progress(total_steps=9, caution=95)),
    Case("budget-above-1", "budget", ValueError, ("2", "up to 1"), lambda: sfj.policies.random(2, total_steps=9)),
    Case("budget-of-the-head", "budget", ValueError, ("0.9",), lambda: start(sfj.policies.random(0.9, total_steps=9))),
    Case(
        "cost-as-text",
        "costs",
        TypeError,
        ("'1'", "a number"),
        lambda: sfj.policies.random(0, total_steps=9, costs={"a": "1"}),
    ),
    Case("cost-missing", "costs", ValueError, ("nothing", "'b'"), lambda: start_prefix({"a": 1})),
    Case("cost-negative", "costs", ValueError, ("-1", "from 0 up"), lambda: start_prefix({"a": -1, "b": 1, "c": 1})),
    Case("cost-infinite", "costs", ValueError, ("inf", "finite"), lambda: start_prefix({"a": INF, "b": 1, "c": 1})),
    Case("costs-zero", "costs", ValueError, ("only zeros",), lambda: start_prefix(dict.fromkeys("abc", 0))),
    Case(
        "cost-of-another", "costs", ValueError, ("'x'", "did you mean"), lambda: start_prefix(dict.fromkeys("xbc", 1))
    ),
    Case(
        "stages-empty", "stages", ValueError, ("[]", "at least one pair"), lambda: sfj.static_prefix([], total_steps=9)
    ),
    Case("stages-flat", "stages", ValueError, ("pair",), lambda: sfj.static_prefix((0.0, 0.5), total_steps=9)),
    Case(
        "stages-fall",
        "stages",
        ValueError,
        ("do not fall",),
        lambda: sfj.static_prefix([(0.5, 0.5), (0, 1)], total_steps=9),
    ),
    Case(
        "percentile-101", "percentile", ValueError, ("101", "from 0 to 100"), lambda: sfj.autofreeze(1, percentile=101)
    ),
    Case("no-grads", "grads", ValueError, ("got none", "'autofreeze'"), lambda: update(sfj.autofreeze(1))),
    Case("grads-of-another", "grads", ValueError, ("none of the 3",), lambda: with_grads(of_another_network())),
    Case("grads-of-another-shape", "grads", ValueError, ("(3,)", "(2, 2)"), lambda: with_grads(shaped(3))),
    Case("grads-a-list", "grads", TypeError, ("list", "a dict"), lambda: update(sfj.autofreeze(1), grads=[1.0])),
    Case("no-features", "features", ValueError, ("got none",), lambda: update(guided())),
    Case(
        "features-a-dict", "features", TypeError, ("dict", "a function"), lambda: update(guided(), features=outputs())
    ),
    Case("features-lack", "features", ValueError, ("lacks", "'a'"), lambda: update(guided(), features=dict)),
    Case(
        "features-of-fewer", "features", ValueError, ("3 and 4",), lambda: update(guided(), features=lambda: outputs(3))
    ),
    Case(
        "features-nan", "features", FloatingPointError, ("not finite",), lambda: update(guided(), features=nan_outputs)
    ),
    Case("reference-lacks", "reference", ValueError, ("lacks", "'b'"), lambda: start(guided({"a": outputs()["a"]}))),
    Case("reference-nan", "reference", ValueError, ("not finite", "'a'"), lambda: start(guided(nan_outputs()))),
    Case(
        "reference-text", "reference", TypeError, ("'a'", "an array"), lambda: start(guided(dict.fromkeys("abc", "x")))
    ),
    Case(
        "window-of-1",
        "window",
        ValueError,
        ("1", "at least 2"),
        lambda: sfj.policies.similarity_guided(outputs(), 1, window=1),
    ),
    Case("run-too-short", "min_records, patience", ValueError, ("do not fit",), lambda: smart(total_steps=5)),
    Case("no-length", "record_every", ValueError, ("got none", "total_steps"), lambda: smart(total_steps=None)),
    Case("more-than-window", "min_records", ValueError, ("9", "window, 3"), lambda: Schedule(window=3, min_records=9)),
    Case("rarer-records", "evaluate_every", ValueError, ("2", "5"), lambda: smart(schedule=Schedule(5, 2))),
    Case("order-unknown", "order", ValueError, ("'back'", "front_to_back"), lambda: smart(order="back")),
    Case("first-probe", "first_probe", ValueError, ("7", "multiple"), lambda: smart(probe=Probing(len, 7))),
    Case("probe-vector", "probe", ValueError, ("(3,)", "a finite scalar"), lambda: probed(lambda params: np.ones(3))),
    Case("probe-pair", "probe", TypeError, ("tuple of 2", "scalar"), lambda: probed(lambda params: (1.0, {}))),
    Case("probe-nothing", "probe", TypeError, ("None", "scalar"), lambda: probed(lambda params: None)),
    Case("probe-nan", "probe", ValueError, ("nan", "finite"), lambda: probed(lambda params: NAN)),
    Case("loss-a-vector", "loss", ValueError, ("(4,)", "a scalar"), lambda: update(smart(), loss=np.ones(4))),
    Case("loss-as-text", "loss", TypeError, ("'1.0'", "a scalar"), lambda: update(smart(), loss="1.0")),
    Case("predictor-infinite", "predictor", ValueError, ("not finite", "classifier"), lambda: infinite_statistics()),
    Case("schedules-lack", "schedules", ValueError, ("'b'",), lambda: scaled({"a": float})),
    Case("schedules-rates", "schedules", TypeError, ("0.1", "a function"), lambda: scaled(dict.fromkeys("abc", 0.1))),
    Case("rate-zero", "learning_rate", ValueError, ("0", "above 0"), lambda: rates(learning_rate=0)),
    Case("rate-infinite", "learning_rate", ValueError, ("inf", "above 0"), lambda: rates(learning_rate=INF)),
    Case("rehearse-nothing", "policies", ValueError, ("none", "at least one"), lambda: rehearse(policies={})),
    Case(
        "rehearse-policies",
        "policies",
        TypeError,
        ("Policy", "a function"),
        lambda: rehearse(policies={"n": sfj.policies.never()}),
    ),
    Case("rehearse-made", "policies", TypeError, ("None", "'n'"), lambda: rehearse(policies={"n": lambda steps: None})),
    Case("rehearse-nan", "train", ValueError, ("NaN", "finite"), lambda: rehearse(train=lambda policy, steps: NAN)),
    Case("rehearse-none", "train", TypeError, ("None", "losses"), lambda: rehearse(train=lambda policy, steps: None)),
    Case(
        "rehearse-matrix",
        "train",
        ValueError,
        ("(2, 2)",),
        lambda: rehearse(train=lambda policy, steps: np.ones((2, 2))),
    ),
]


def start(policy: sfj.Policy, given: Any = None) -> Any:
    return policy.init(layers() if given is None else given, params())


def foreign_state() -> Any:
    return sfj.autofreeze(1).update((), layers(), step=1, params=params, grads={})


def state_of_three() -> Any:
    policy = sfj.freezeout(total_steps=10)
    fewer = sfj.Layers(layers().entries[:2])
    return policy.update(policy.init(layers(), params()), fewer, step=1, params=params)


def start_prefix(costs: Any) -> Any:
    return start(sfj.static_prefix([(0, 0.5)], total_steps=9, costs=costs))


def with_grads(tree: Any) -> Any:
    return update(sfj.autofreeze(1), grads=paths.flatten(tree))


def shaped(n: int) -> Any:
    return {name: {"kernel": np.ones(n, np.float32)} for name in "abc"}


def guided(reference: Any = None) -> sfj.Policy:
    return sfj.policies.similarity_guided(outputs() if reference is None else reference, evaluate_every=1)


def nan_outputs() -> dict[str, Any]:
    return {name: np.full((4, 3), NAN, np.float32) for name in "abc"}


def smart(**options: Any) -> sfj.Policy:
    return sfj.smartfrz(predictor(), **{"total_steps": 1000} | options)


def probed(probe: Any) -> Any:
    encoding = sfj.predictor.Encoding(regime=("contribution",))
    config = sfj.predictor.PredictorConfig(size=4, hidden=2, features=2, head_hidden=2, encoding=encoding)
    schedule, reading = Schedule(1, 1, min_records=1), sfj.Predictor(config, rngs=nnx.Rngs(0))
    policy = sfj.smartfrz(reading, total_steps=1000, schedule=schedule, probe=Probing(probe, 1))
    return update(policy, loss=np.float32(1))


def infinite_statistics() -> Any:
    broken = nnx.clone(predictor())
    broken.classifier.layers[0].bias[...] = jnp.full_like(broken.classifier.layers[0].bias[...], INF)
    return sfj.smartfrz(broken, total_steps=1000)


def scaled(schedules: Any) -> Any:
    return sfj.policies.scale_by_layer_schedule(layers(), schedules)


def rates(**options: Any) -> Any:
    return sfj.policies.freezeout_schedules(layers(), **{"learning_rate": 0.1, "total_steps": 10} | options)


def rehearse(**options: Any) -> Any:
    given = {"train": lambda policy, steps: 1.0, "policies": {"n": lambda steps: sfj.policies.never()}, "steps": 1}
    return sfj.rehearse(**given | options)
