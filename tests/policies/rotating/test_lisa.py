"""LISA's rule: Algorithm 1 of arXiv 2403.17919."""

from collections import Counter

import pytest

from smartfrz_jax import policies
from tests.policies.rotating.networks import BLOCKS, trained

OTHERS = {"embed", "norm", "head"}


def test_embedding_and_head_train_with_the_blocks_that_were_drawn():
    for blocks, others in trained(policies.lisa(2, switch_every=3), range(60)):
        assert len(blocks) == 2
        assert others == OTHERS


def test_a_set_stays_for_a_period():
    sets = trained(policies.lisa(2, switch_every=4), range(40))
    assert all(sets[step] == sets[step // 4 * 4] for step in range(40))
    assert len({frozenset(blocks) for blocks, _ in sets}) > 1


def test_every_block_is_drawn_as_often_as_any_other():
    draws = 2000
    count = Counter(block for blocks, _ in trained(policies.lisa(2, switch_every=1), range(draws)) for block in blocks)
    expected = draws * 2 / BLOCKS
    spread = (draws * (2 / BLOCKS) * (1 - 2 / BLOCKS)) ** 0.5
    assert set(count) == set(range(BLOCKS))
    assert all(abs(number - expected) < 4 * spread for number in count.values())


@pytest.mark.parametrize("sets", [1, 3, 5])
def test_sets_are_no_more_than_asked_for_and_hold_every_block_alike(sets):
    found = {
        frozenset(blocks) for blocks, _ in trained(policies.lisa(2, switch_every=1, max_sets=sets), range(20 * sets))
    }
    assert len(found) == sets
    count = Counter(block for blocks in found for block in blocks)
    assert max(count.values()) - min(count.get(block, 0) for block in range(BLOCKS)) <= 1


def test_the_set_of_a_step_is_the_same_wherever_a_run_begins():
    policy = policies.lisa(2, switch_every=4)
    assert trained(policy, range(6, 30)) == trained(policy, range(30))[6:]


def test_seeds_differ_and_repeat():
    one, again, other = (trained(policies.lisa(2, switch_every=1, seed=seed), range(30)) for seed in (0, 0, 1))
    assert one == again
    assert one != other


@pytest.mark.parametrize(
    ("rest", "keep", "expected"),
    [("freeze", None, {"head"}), ("freeze", (), set()), ("freeze", ["norm"], {"norm"}), ("train", (), OTHERS)],
)
def test_what_is_in_no_block_is_an_option(rest, keep, expected):
    for blocks, others in trained(policies.lisa(2, rest=rest, keep=keep, switch_every=3), range(30)):
        assert (len(blocks), others) == (2, expected)


def test_layers_in_no_block_may_be_drawn_as_blocks_are():
    sets = trained(policies.lisa(2, rest="turn", keep=(), switch_every=1), range(200))
    assert all(len(blocks) + len(others) == 2 for blocks, others in sets)
    assert set().union(*(others for _, others in sets)) == OTHERS


def test_what_is_kept_of_a_block_trains_always():
    policy = policies.lisa(1, switch_every=1, keep="blocks/2/*")
    assert all(2 in blocks for blocks, _ in trained(policy, range(20)))


def test_more_blocks_than_there_are():
    with pytest.raises(ValueError, match="active: got 6, but only 5 blocks of the network take turns"):
        trained(policies.lisa(6), range(1))


def test_nothing_left_to_take_turns():
    with pytest.raises(ValueError, match="keep: leaves none of the 13 layers to take turns"):
        trained(policies.lisa(1, keep="*"), range(1))
