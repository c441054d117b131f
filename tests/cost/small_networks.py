"""Small networks on bare pytrees, of every way in which a parameter can be used."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

WIDTH = 16
X = jax.ShapeDtypeStruct((32, WIDTH), jnp.float32)


class Network(NamedTuple):
    """A forward pass, the shapes of its parameters, and its layers front to back."""

    forward: Callable[..., Any]
    params: dict[str, Any]
    layers: tuple[str, ...]


def square(names: str) -> dict[str, Any]:
    return {name: jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32) for name in names}


@jax.custom_vjp
def with_rule(x, w):
    return jnp.tanh(x @ w)


with_rule.defvjp(lambda x, w: (with_rule(x, w), (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


def chain(order, use=lambda x, w: jnp.tanh(x @ w)):
    def forward(p, x):
        for name in order:
            x = use(x, p[name])
        return x

    return forward


def siamese(p, x):
    def half(x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    return half(x) * half(-x) @ p["c"]


def branch(p, x):
    x = jnp.tanh(x @ p["a"])
    return jax.lax.cond(x.sum() > 0, lambda: x @ p["b"], lambda: jnp.tanh(x @ p["c"])) @ p["d"]


def concatenated(p, x):
    x = jnp.tanh(x @ p["a"])
    query, key = jnp.split(x @ jnp.concatenate([p["b"], p["c"]], axis=1), 2, axis=1)
    return (query * key) @ p["d"]


def parallel(p, x):
    return (jnp.tanh(x @ p["a"]) + jnp.tanh(x @ p["b"])) @ p["c"]


def skipping(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"] + x @ p["d"]


def penalised(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"] + 1e-3 * sum(jnp.square(leaf).sum() for leaf in p.values())


def weight_normed(p, x):
    def kernel(name):
        return p[name] / jnp.linalg.norm(p[name]) * p[f"scale_{name}"]

    return jnp.tanh(x @ kernel("a")) @ kernel("b")


def recurrent(p, x):
    def step(h, x):
        return jnp.tanh(x @ p["a"] + h @ p["b"]), None

    return jax.lax.scan(step, jnp.zeros((4, WIDTH)), x.reshape(8, 4, WIDTH))[0] @ p["c"]


def looped(p, x):
    return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]), x) @ p["c"]


def stacked(p, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w[0]) @ w[1], None), x @ p["a"], (p["up"], p["down"]))
    return x @ p["b"]


def stopped(p, x):
    return jax.lax.stop_gradient(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]


def adapted(p, x):
    return jnp.tanh(x @ p["w"] + x @ p["down"] @ p["up"]) @ p["head"]


ADAPTER = {"down": jax.ShapeDtypeStruct((WIDTH, 2), jnp.float32), "up": jax.ShapeDtypeStruct((2, WIDTH), jnp.float32)}
SCALES = {f"scale_{name}": jax.ShapeDtypeStruct((1,), jnp.float32) for name in "ab"}
ROWS = {name: jax.ShapeDtypeStruct((3, WIDTH, WIDTH), jnp.float32) for name in ("up", "down")}

NETWORKS = {
    "chain": Network(chain("abcd"), square("abcd"), ("a", "b", "c", "d")),
    "unused": Network(chain("bc"), square("abc"), ("a", "b", "c")),
    "shared": Network(chain("abacb"), square("abc"), ("a", "c", "b")),
    "remat": Network(chain("abc", jax.checkpoint(lambda x, w: jnp.tanh(x @ w))), square("abc"), ("a", "b", "c")),
    "custom_vjp": Network(chain("abc", with_rule), square("abc"), ("a", "b", "c")),
    "residual": Network(chain("abc", lambda x, w: x + jnp.tanh(x @ w)), square("abc"), ("a", "b", "c")),
    "siamese": Network(siamese, square("abc"), ("a", "b", "c")),
    "cond": Network(branch, square("abcd"), ("a", "b", "c", "d")),
    "concatenated": Network(concatenated, square("abcd"), ("a", "b", "c", "d")),
    "parallel": Network(parallel, square("abc"), ("a", "b", "c")),
    "skipping": Network(skipping, square("abcd"), ("a", "b", "c", "d")),
    "penalised": Network(penalised, square("ab"), ("a", "b")),
    "weight_normed": Network(weight_normed, square("ab") | SCALES, ("a", "b")),
    "recurrent": Network(recurrent, square("abc"), ("a", "b", "c")),
    "looped": Network(looped, square("abc"), ("a", "b", "c")),
    "stacked": Network(stacked, square("ab") | ROWS, ("a", "up+down", "b")),
    "hyper": Network(lambda p, x: jnp.tanh(x @ (p["a"] @ p["b"])) @ p["c"], square("abc"), ("a", "b", "c")),
    "stopped": Network(stopped, square("abc"), ("a", "b", "c")),
    "adapted": Network(adapted, square("w") | ADAPTER | {"head": square("h")["h"]}, ("w", "down", "up", "head")),
    "tied": Network(lambda p, x: chain("ab")(p, x) @ p["a"].T, square("ab"), ("b", "a")),
    "tied behind a stem": Network(lambda p, x: chain("sab")(p, x) @ p["a"].T, square("sab"), ("s", "b", "a")),
}
