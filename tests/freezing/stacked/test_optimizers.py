"""Every optimizer over stacked parameters: it moves the rows that train as optax does where there are no others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

import smartfrz_jax as sfj
from smartfrz_jax.freezing.parts import state_rows
from tests.optimizers.network import arrays
from tests.optimizers.table import CASES, Case

pytestmark = [pytest.mark.usefixtures("jax_defaults"), pytest.mark.slow]

ROWS, WIDTH, STACKED = 4, 8, ("w", "b")
_RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(_RNG.standard_normal(shape) / 2, jnp.float32)


def like_params(*axes):
    return {
        "w": normal(*axes, ROWS, WIDTH, WIDTH),
        "b": normal(*axes, ROWS, WIDTH),
        "head": normal(*axes, WIDTH, 3),
    }


def forward(params, x):
    rows = params["w"], params["b"]
    x, _ = jax.lax.scan(lambda x, row: (jnp.tanh(x @ row[0] + row[1][None]), None), x, rows)
    return x @ params["head"]


PARAMS, X = like_params(), normal(2, WIDTH)
LAYERS = sfj.find_layers(PARAMS, forward, X, rows=True)
# Some rows freeze, then one of them returns while another freezes.
TRAINING = [(0, 1, 2, 3), (1, 3), (2, 3)]
GRADS, PER_EXAMPLE = [like_params() for _ in TRAINING], [like_params(2) for _ in TRAINING]

# Their state is of all rows of an array together: a norm, a largest value, sums over the rows, a projection.
TOGETHER = [
    "contrib.galore",
    "contrib.scale_by_galore",
    "optax.adafactor",
    "optax.novograd",
    "optax.scale_by_distance_over_gradients",
    "optax.scale_by_factored_rms",
    "optax.scale_by_novograd",
    "optax.scale_by_sm3",
    "optax.sm3",
]
# All others, but for parts of optimizers, for those contributed, and for those with loops: these take long to compile.
BY_ROW = {
    name: case
    for name, case in CASES.items()
    if not name.startswith(("optax.scale_by_", "contrib.")) and not case.compiled and name not in TOGETHER
}
BY_ROW["adafactor, within rows"] = Case(optax.adafactor(0.1, min_dim_size_to_factor=WIDTH, momentum=0.9))


@jax.jit
def loss(params):
    return jnp.square(forward(params, X)).mean()


def frozen(training):
    return sfj.Frozen(LAYERS, [name for row, name in enumerate(LAYERS.names[:ROWS]) if row not in training])


def of_rows(tree, training, axis=0):
    return {name: jnp.take(leaf, jnp.array(training), axis) if name in STACKED else leaf for name, leaf in tree.items()}


def moved(case, state, params, before, after):
    """The state for other rows, by hand. An axis that is as long as rows train is theirs, for no other is so long."""
    old = {keystr(path): leaf for path, leaf in tree_leaves_with_path(state)}

    def leaf_of(path, fresh):
        leaf = old[keystr(path)]
        if len(before) not in leaf.shape:
            return leaf
        axis = leaf.shape.index(len(before))
        rows = dict(zip(before, np.moveaxis(np.asarray(leaf), axis, 0), strict=True))
        new = dict(zip(after, np.moveaxis(np.asarray(fresh), axis, 0), strict=True))
        return jnp.asarray(np.stack([rows.get(row, new[row]) for row in after], axis))

    return tree_map_with_path(leaf_of, case.tx.init(of_rows(params, after)))


@pytest.mark.parametrize("name", BY_ROW)
def test_rows_that_train_move_as_by_optax_alone(name):
    case = BY_ROW[name]
    got, expected, state = PARAMS, PARAMS, sfj.freeze(case.tx, frozen(TRAINING[0])).init(PARAMS)
    own, before = case.tx.init(PARAMS), TRAINING[0]
    for step, training in enumerate(TRAINING):
        now, grads = frozen(training), (PER_EXAMPLE if case.per_example else GRADS)[step]
        state = sfj.migrate_opt_state(state, case.tx, got, now)
        updates, state = sfj.freeze(case.tx, now).update(grads, state, got, **case.extra(loss, got))
        got = sfj.apply_updates(got, updates, now)

        own, some = moved(case, own, expected, before, training), of_rows(expected, training)

        def whole(some, expected=expected, training=training):
            put = {key: expected[key].at[jnp.array(training)].set(some[key]) for key in STACKED}
            return some | put

        extra = case.extra(lambda some, whole=whole: loss(whole(some)), some)
        updates, own = case.tx.update(of_rows(grads, training, int(case.per_example)), own, some, **extra)
        expected, before = whole(optax.apply_updates(some, updates)), training
        assert arrays(got) == arrays(expected), step


def test_what_is_held_of_all_rows_together_is_found():
    """As a new optimizer has it, too: it goes into the list above."""
    found = [name for name, case in CASES.items() if state_rows.together(case.tx, PARAMS, LAYERS)]
    assert sorted(found) == TOGETHER


@pytest.mark.parametrize("name", ["optax.adafactor", "optax.novograd", "optax.sm3"])
def test_it_is_refused_once_some_freeze(name):
    case = CASES[name]
    state = sfj.freeze(case.tx, frozen(TRAINING[0])).init(PARAMS)
    state = sfj.migrate_opt_state(state, case.tx, PARAMS, sfj.Frozen(LAYERS, LAYERS.names[:ROWS]))  # all rows: at once
    state = sfj.migrate_opt_state(state, case.tx, PARAMS, frozen(TRAINING[0]))
    with pytest.raises(ValueError, match=r"of all rows of '(w|b)' together"):
        sfj.migrate_opt_state(state, case.tx, PARAMS, frozen(TRAINING[1]))
