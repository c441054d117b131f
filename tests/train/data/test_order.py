import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.order import Order, in_order, steps_in_order

sizes = st.integers(1, 20)


def epoch_of(order: Order, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    first = epoch * order.steps_per_epoch
    batches = [order(step) for step in range(first, first + order.steps_per_epoch)]
    return np.concatenate([indices for indices, _ in batches]), np.concatenate([weights for _, weights in batches])


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(examples=sizes, batch_size=sizes, seed=st.integers(0, 2**32 - 1))
def test_an_epoch_kept_whole_has_every_example_once(examples, batch_size, seed):
    order = Order(examples, batch_size, seed, drop_last=False)
    assert order.steps_per_epoch == int(np.ceil(examples / batch_size))
    for epoch in range(3):
        indices, weights = epoch_of(order, epoch)
        assert set(np.unique(weights)) <= {0.0, 1.0}
        assert sorted(indices[weights == 1]) == list(range(examples))
        assert len(indices) == order.steps_per_epoch * batch_size


@settings(max_examples=15, deadline=None)
@given(examples=sizes, batch_size=sizes)
def test_an_epoch_without_its_last_batch_has_no_example_twice(examples, batch_size):
    if batch_size > examples:
        with pytest.raises(ValueError, match=f"batch_size: got {batch_size}, expected at most {examples}"):
            Order(examples, batch_size)
        return
    order = Order(examples, batch_size, seed=1)
    assert order.steps_per_epoch == examples // batch_size
    for epoch in range(2):
        indices, weights = epoch_of(order, epoch)
        assert len(set(indices)) == len(indices) == order.steps_per_epoch * batch_size
        assert (weights == 1).all()


def test_epochs_and_seeds_have_orders_of_their_own():
    first, second = (epoch_of(Order(1000, 100), epoch)[0] for epoch in (0, 1))
    other = epoch_of(Order(1000, 100, seed=1), 0)[0]
    for order in (first, second, other):
        assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1
    assert (first == second).mean() < 0.02
    assert (first == other).mean() < 0.02


def test_a_step_does_not_depend_on_what_was_asked_before():
    forwards = [Order(23, 5, 3)(step)[0].tolist() for step in range(20)]
    order = Order(23, 5, 3)
    assert [order(step)[0].tolist() for step in reversed(range(20))] == forwards[::-1]


def test_the_order_is_not_changed_by_a_new_version():
    assert Order(10, 5, seed=7)(3)[0].tolist() == [9, 1, 5, 8, 3]  # else runs could not be resumed


@settings(max_examples=15, deadline=None)
@given(examples=sizes, batch_size=sizes)
def test_in_order(examples, batch_size):
    batches = [in_order(examples, batch_size, step) for step in range(steps_in_order(examples, batch_size))]
    assert all(len(indices) == batch_size for indices, _ in batches)
    used = np.concatenate([indices[weights == 1] for indices, weights in batches])
    assert used.tolist() == list(range(examples))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"examples": 0}, "examples: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": 2**32}, "expected 0 to"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Order(**{"examples": 10, "batch_size": 2, **arguments})


def test_negative_step():
    with pytest.raises(ValueError, match="step: got -1, expected at least 0"):
        Order(10, 2)(-1)
