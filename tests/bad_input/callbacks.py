"""Bad input to the callbacks."""

from __future__ import annotations

import tempfile
from typing import Any

import jax.numpy as jnp

import smartfrz_jax as sfj
from tests.bad_input import scenes
from tests.bad_input.table import Case, Door


def folder() -> str:
    return tempfile.mkdtemp()


def writer() -> sfj.callbacks.JsonLines:
    return sfj.callbacks.JsonLines(f"{folder()}/metrics.jsonl")


def case(name: str, argument: str, error: type[Exception], words: tuple[str, ...], call: Any) -> Case:
    return Case(f"callbacks-{name}", argument, error, words, call)


DOORS = [
    Door("callbacks.JsonLines", lambda: {"path": f"{folder()}/metrics.jsonl"}),
    Door("callbacks.JsonLines.on_step", lambda: {"step": 1, "metrics": {"loss": 1.0}}, on=writer),
    Door("callbacks.JsonLines.on_freeze", lambda: {"event": sfj.FreezeEvent(1, ("a",))}, on=writer),
    Door("callbacks.TensorBoard", lambda: {"folder": folder()}),
    Door("callbacks.WandB", dict),
]

CASES = [
    case(
        "several losses",
        "metrics",
        ValueError,
        ("got shape (3,)", "expected a scalar", "mean"),
        lambda: writer().on_step(1, {"loss": jnp.ones(3)}),
    ),
    case(
        "a text as metric",
        "metrics",
        TypeError,
        ("got str 'low'", "expected a scalar"),
        lambda: writer().on_step(1, {"loss": "low"}),
    ),
    case(
        "file in a bucket",
        "path",
        ValueError,
        ("gs://bucket/a.jsonl", "expected a local path"),
        lambda: sfj.callbacks.JsonLines("gs://bucket/a.jsonl"),
    ),
    case(
        "a class in place of an object",
        "callbacks",
        TypeError,
        ("JsonLines", "on_step and on_freeze"),
        lambda: sfj.nnx.Freezer(
            scenes.module(),
            scenes.optimizer(),
            sfj.policies.never(),
            callbacks=[sfj.callbacks.JsonLines],  # pyright: ignore[reportArgumentType]
        ),
    ),
    case(
        "a function as callback",
        "callbacks",
        TypeError,
        ("got builtin_function_or_method print", "on_step and on_freeze"),
        lambda: sfj.linen.Freezer(
            scenes.train_state(),
            sfj.policies.never(),
            callbacks=[print],  # pyright: ignore[reportArgumentType]
        ),
    ),
    case(
        "a metric for the callbacks alone",
        "metrics",
        TypeError,
        ("float 0.5", "mapping"),
        lambda: scenes.nnx_freezer().step(metrics=0.5),  # pyright: ignore[reportArgumentType]
    ),
]
