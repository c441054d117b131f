"""What the decisions of ``smartfrz`` take."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
from flax import nnx

import smartfrz_jax as sfj
from benchmarks.gpu.cases import Case


def decisions(case: Case) -> dict[str, Any]:
    """Seconds of all updates of the policy in a run: records of weights, and what the predictor makes of them.

    With the default predictor, which reads no weights, and with the paper's, which does. Nothing freezes, so that at
    every stage all layers are judged. The first run compiles, the second is timed.
    """
    steps = 60 if case.tiny else 1000
    model, _ = case.make(case.frozen(0))
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    found = {}
    for name in ("default", "paper"):
        policy = sfj.smartfrz(sfj.Predictor.pretrained(name), total_steps=steps, caution=1.0)
        _seconds(policy, case.layers, params, steps)
        each = _seconds(policy, case.layers, params, steps)
        found[name] = {"seconds": float(each.sum()), "longest_ms": 1e3 * float(each.max())}
    return {"steps": steps, "layers": len(case.layers), "predictors": found}


def _seconds(policy: sfj.Policy, layers: sfj.Layers, params: Any, steps: int) -> np.ndarray:
    state, each = policy.init(layers, params), []
    for step in range(1, steps + 1):
        begin = time.perf_counter()
        _, state = policy.update(state, layers, step=step, params=lambda: params, loss=1.0)
        jax.block_until_ready(state)
        each.append(time.perf_counter() - begin)
    return np.array(each)
