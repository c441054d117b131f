"""Bad input for the predictor, what it reads, and CKA."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import numpy as np
from flax import nnx

import smartfrz_jax as sfj
from tests.bad_input.scenes import examples, layers, of_another_network, outputs, params, predictor, tailoring
from tests.bad_input.table import NAN, Case, Door

ONES = np.ones((3, 4), np.float32)


def history() -> sfj.predictor.History:
    return sfj.predictor.History.create(layers=3, window=2, size=4)


def observation(**changed: Any) -> sfj.predictor.Observation:
    return examples().batch(np.arange(2))[0].replace(**changed)


def small(**changed: Any) -> sfj.predictor.PredictorConfig:
    return sfj.predictor.PredictorConfig(**{"size": 4, "hidden": 2, "features": 2, "head_hidden": 2} | changed)


@functools.cache
def saved() -> str:
    path = f"{tempfile.mkdtemp()}/predictor"
    predictor().save(path)
    return path


DOORS = [
    Door("predictor.linear_cka", lambda: {"x": ONES, "y": ONES}),
    Door("predictor.layer_cka", lambda: {"features": outputs(), "reference": outputs()}),
    Door("predictor.History.create", lambda: {"layers": 3}, unchecked={"cls": "the class"}),
    Door("predictor.History.record", lambda: {"weights": ONES, "active": np.ones(3, bool)}, on=history),
    Door("predictor.Tailoring.create", lambda: {"layers": layers(), "params": params(), "size": 4}),
    Door("predictor.Tailoring.__call__", lambda: {"params": params()}, on=tailoring),
    Door("predictor.Encoding", dict),
    Door("predictor.Encoding.width", lambda: {"size": 4}, on=sfj.predictor.Encoding),
    Door("predictor.PredictorConfig", dict),
    Door("Predictor", lambda: {"rngs": nnx.Rngs(0)}),
    Door("Predictor.__call__", lambda: {"observation": one()}, on=predictor),
    Door("Predictor.pretrained", dict),
    Door("Predictor.save", lambda: {"path": f"{tempfile.mkdtemp()}/predictor"}, on=predictor),
    Door("Predictor.restore", lambda: {"path": saved()}),
    Door("predictor.freeze_probability", lambda: {"predictor": predictor(), "observation": observation()}),
    Door(
        "layer_outputs",
        lambda: {
            "forward": lambda params, x: x @ params["a"]["kernel"],
            "groups": {"a": ["a/kernel"]},
            "params": params(),
            "inputs": (np.ones((4, 2), np.float32),),
        },
    ),
]

CASES = [
    Case(
        "cka-one-example",
        "x",
        ValueError,
        ("(1, 4)", "at least 2"),
        lambda: sfj.predictor.linear_cka(ONES[:1], ONES[:1]),
    ),
    Case(
        "cka-scalar", "x", ValueError, ("()", "(examples, ...)"), lambda: sfj.predictor.linear_cka(np.float32(1), ONES)
    ),
    Case(
        "cka-no-features", "y", ValueError, ("(3, 0)", "1 feature"), lambda: sfj.predictor.linear_cka(ONES, ONES[:, :0])
    ),
    Case(
        "cka-other-batch",
        "x, y",
        ValueError,
        ("3 and 2", "same batch"),
        lambda: sfj.predictor.linear_cka(ONES, ONES[:2]),
    ),
    Case("cka-nan", "x", ValueError, ("not finite",), lambda: sfj.predictor.linear_cka(ONES * NAN, ONES)),
    Case(
        "cka-inf", "y", ValueError, ("not finite",), lambda: sfj.predictor.linear_cka(ONES, ONES * np.float32(np.inf))
    ),
    Case("cka-text", "x", TypeError, ("numbers",), lambda: sfj.predictor.linear_cka(np.array(["a", "b"]), ONES)),
    Case(
        "cka-complex",
        "x",
        TypeError,
        ("complex64", "real"),
        lambda: sfj.predictor.linear_cka(ONES.astype("complex64"), ONES),
    ),
    Case("layer-cka-nothing", "features", ValueError, ("no layers",), lambda: sfj.predictor.layer_cka({}, {})),
    Case(
        "layer-cka-lacks",
        "reference",
        ValueError,
        ("lacks", "'c'"),
        lambda: sfj.predictor.layer_cka(outputs(), without("c")),
    ),
    Case(
        "layer-cka-more",
        "features",
        ValueError,
        ("lacks", "'a'"),
        lambda: sfj.predictor.layer_cka(without("a"), outputs()),
    ),
    Case(
        "layer-cka-list", "features", TypeError, ("list", "a dict"), lambda: sfj.predictor.layer_cka([ONES], outputs())
    ),
    Case(
        "layer-cka-none",
        "features",
        TypeError,
        ("'b'", "None", "array"),
        lambda: sfj.predictor.layer_cka(none_at("b"), outputs()),
    ),
    Case(
        "layer-cka-nan",
        "features",
        ValueError,
        ("'b'", "finite"),
        lambda: sfj.predictor.layer_cka(nan_at("b"), outputs()),
    ),
    Case(
        "history-window", "window", ValueError, ("0", "at least 1"), lambda: sfj.predictor.History.create(3, window=0)
    ),
    Case("history-size", "weights, active", ValueError, ("(3, 5)", "(3, 4)"), lambda: record(np.ones((3, 5)))),
    Case("history-active", "weights, active", ValueError, ("(2,)", "(3,)"), lambda: record(ONES, np.ones(2, bool))),
    Case("history-flags", "active", TypeError, ("float", "bool"), lambda: record(ONES, np.ones(3))),
    Case("tailoring-another", "params", ValueError, ("'a/kernel'", "missing"), lambda: tailored(of_another_network())),
    Case("tailoring-empty", "params", ValueError, ("without leaves",), lambda: tailored({})),
    Case("tailoring-text", "params", TypeError, ("'a/kernel'", "array"), lambda: tailored({"a": {"kernel": "w"}})),
    Case("tailoring-size-0", "size", ValueError, ("0", "at least 1"), lambda: tailored(params(), size=0)),
    Case("tailoring-no-weights", "params", ValueError, ("no weights",), lambda: tailored(empty_kernel())),
    Case("tailor-another", "params", ValueError, ("'a/kernel'", "expected"), lambda: tailoring()(of_another_network())),
    Case("tailor-other-shape", "params", ValueError, ("'a/kernel'", "(2, 2)"), lambda: tailoring()(shaped(1))),
    Case(
        "encoding-form",
        "weights",
        ValueError,
        ("'sorted'", "scale_free"),
        lambda: sfj.predictor.Encoding(weights="sorted"),
    ),
    Case(
        "encoding-place",
        "context_in",
        ValueError,
        ("'head'", "both"),
        lambda: sfj.predictor.Encoding(context_in="head"),
    ),
    Case(
        "encoding-regime", "regime", ValueError, ("'speed'", "drift"), lambda: sfj.predictor.Encoding(regime=["speed"])
    ),
    Case(
        "encoding-regime-3", "regime", TypeError, ("int 3", "True or False"), lambda: sfj.predictor.Encoding(regime=3)
    ),
    Case("encoding-nothing", "weights", ValueError, ("'none'", "nothing would be seen"), lambda: sees_nothing()),
    Case("config-size", "size", ValueError, ("0", "at least 1"), lambda: small(size=0)),
    Case("config-hidden-text", "hidden", TypeError, ("'2'", "an integer"), lambda: small(hidden="2")),
    Case("config-encoding", "encoding", TypeError, ("'raw'", "Encoding"), lambda: small(encoding="raw")),
    Case("predictor-two", "config", ValueError, ("paper=True",), lambda: both_configs()),
    Case("predictor-seed", "rngs", TypeError, ("int 0", "nnx.Rngs"), lambda: sfj.Predictor(rngs=0)),
    Case("pretrained-name", "name", ValueError, ("'best'", "default"), lambda: sfj.Predictor.pretrained("best")),
    Case("observation-none", "observation", TypeError, ("None", "Observation"), lambda: ask(None)),
    Case(
        "observation-size", "observation", ValueError, ("5", "4"), lambda: ask(observation(records=np.ones((2, 2, 5))))
    ),
    Case("observation-one", "observation", ValueError, ("axis",), lambda: ask(one())),
    Case(
        "restore-nowhere",
        "path",
        FileNotFoundError,
        ("/dev/null/nowhere",),
        lambda: sfj.Predictor.restore("/dev/null/nowhere"),
    ),
    Case("tap-no-inputs", "inputs", ValueError, ("none",), lambda: tap({"a": ["a/kernel"]})),
    Case("tap-unused", "forward", ValueError, ("'b'",), lambda: tap({"b": ["b/kernel"]}, ONES[:, :2])),
    Case("tap-no-such", "groups", ValueError, ("'d/kernel'",), lambda: tap({"a": ["d/kernel"]}, ONES[:, :2])),
    Case("tap-a-name", "groups", TypeError, ("'a/kernel'", "names"), lambda: tap({"a": "a/kernel"}, ONES[:, :2])),
]


def without(name: str) -> dict[str, Any]:
    return {layer: output for layer, output in outputs().items() if layer != name}


def none_at(name: str) -> dict[str, Any]:
    return {**outputs(), name: None}


def nan_at(name: str) -> dict[str, Any]:
    return {**outputs(), name: np.full((4, 3), NAN, np.float32)}


def record(weights: Any, active: Any = None) -> Any:
    return history().record(weights, np.ones(3, bool) if active is None else active)


def tailored(tree: Any, size: int = 4) -> Any:
    return sfj.predictor.Tailoring.create(layers(), tree, size=size)


def empty_kernel() -> Any:
    return {**params(), "a": {"kernel": np.ones((0, 2), np.float32)}}


def shaped(n: int) -> Any:
    return {name: {"kernel": np.ones((n, n), np.float32)} for name in "abc"}


def sees_nothing() -> Any:
    return sfj.predictor.Encoding(weights="none", progress=False, depth=False, regime=False)


def both_configs() -> Any:
    return sfj.Predictor(small(), paper=True, rngs=nnx.Rngs(0))


def ask(seen: Any) -> Any:
    return sfj.predictor.freeze_probability(predictor(), seen)


def one() -> sfj.predictor.Observation:
    return sfj.predictor.Observation(
        **{name: getattr(observation(), name)[0] for name in sfj.predictor.Observation.__dataclass_fields__}
    )


def tap(groups: Any, *inputs: Any) -> Any:
    return sfj.layer_outputs(params(), groups, lambda params, x: x @ params["a"]["kernel"], *inputs)
