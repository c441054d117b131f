"""The rules of BAdam (arXiv 2404.02827, Algorithm 1) and HiFT (arXiv 2401.15207, Algorithm 1)."""

import pytest

from smartfrz_jax import policies
from tests.policies.rotating.networks import BLOCKS, NAMES, trained


def blocks_of(policy, steps):
    return [sorted(blocks) for blocks, _ in trained(policy, steps)]


def test_badam_trains_each_block_for_its_steps_and_nothing_else():
    sets = trained(policies.badam(3, order="ascending", keep=()), range(3 * BLOCKS))
    assert [blocks for blocks, _ in sets] == [{step // 3} for step in range(3 * BLOCKS)]
    assert all(others == set() for _, others in sets)


def test_badam_goes_from_the_head_to_the_input():
    assert blocks_of(policies.badam(1, order="descending"), range(BLOCKS)) == [[4], [3], [2], [1], [0]]


def test_badam_shuffles_anew_in_every_cycle():
    order = [block for (block,) in blocks_of(policies.badam(1), range(20 * BLOCKS))]
    cycles = [tuple(order[start : start + BLOCKS]) for start in range(0, len(order), BLOCKS)]
    assert all(sorted(cycle) == list(range(BLOCKS)) for cycle in cycles)
    assert len(set(cycles)) > 10


def test_badam_keeps_the_head_training_by_default():
    assert all(others == {"head"} for _, others in trained(policies.badam(2), range(20)))


@pytest.mark.parametrize(("order", "sign"), [("ascending", 1), ("descending", -1)])
def test_hift_updates_one_group_in_a_step_with_embedding_and_head_among_them(order, sign):
    sets = trained(policies.hift(2, order=order), range(8))
    parts = ["embed", *range(BLOCKS), "norm", "head"][::sign]
    expected = [set(parts[start : start + 2]) for start in range(0, 8, 2)]
    assert [blocks | others for blocks, others in sets] == 2 * expected


def test_hift_keeps_its_random_order():
    sets = [blocks | others for blocks, others in trained(policies.hift(order="random"), range(24))]
    assert sets[:8] == sets[8:16] == sets[16:]
    assert len(set().union(*sets)) == len(sets[:8]) == BLOCKS + 3
    assert sets[:8] != [blocks | others for blocks, others in trained(policies.hift(), range(8))]


def test_the_last_group_has_what_is_left():
    sets = trained(policies.hift(3), range(3))
    assert [len(blocks) + len(others) for blocks, others in sets] == [3, 3, 2]
    assert len(NAMES) == 2 * BLOCKS + 3
