"""Whether keeping activations pays, counted by hand."""

import pytest

import smartfrz_jax as sfj
from smartfrz_jax.caching.break_even import break_even
from smartfrz_jax.caching.prefix_cache import PrefixCache
from tests.support.prefix_caches import PARAMS, N, X, Y, frozen_of, mlp

pytestmark = pytest.mark.usefixtures("jax_defaults")


def test_break_even():
    inputs = (X, Y)
    frozen = frozen_of(mlp, PARAMS, inputs, ["w0", "w1"])
    account = sfj.account(PARAMS, frozen.layers, mlp, *inputs)
    cache = PrefixCache(PARAMS, frozen, mlp, *inputs)
    examples = 100
    epoch = examples // N
    answer = break_even(account, cache, examples=examples, steps=2 * epoch)
    assert answer.pays
    assert answer.build_flops == examples * 90
    assert answer.saved_flops == N * 90
    assert answer.steps == epoch + 1
    assert answer.nbytes == examples * 12
    whole = account.flops(frozen).total
    assert answer.step_ratio == (whole - N * 90) / whole
    # In the first epoch everything is computed anyway.
    assert not break_even(account, cache, examples=examples, steps=epoch).pays
    assert break_even(account, cache, examples=examples, steps=epoch + 1).pays
    assert not break_even(account, cache, examples=examples, steps=10 * epoch, budget=1199).pays
    assert break_even(account, cache, examples=examples, steps=10 * epoch, budget=1200).pays
    # Moving 12 bytes costs a third of what it saves: 90 + 30 for the first, 60 saved from then on.
    slow = break_even(account, cache, examples=examples, steps=2 * epoch, flops_per_byte=2.5)
    assert (slow.steps, slow.pays) == (2 * epoch + 1, False)
    assert break_even(account, cache, examples=examples, steps=10**6, flops_per_byte=7.5).steps is None
    views = PrefixCache(PARAMS, frozen, mlp, *inputs, views=3)
    assert break_even(account, views, examples=examples, steps=4 * epoch).steps == 3 * epoch + 1
    smaller = PrefixCache(PARAMS, frozen_of(mlp, PARAMS, inputs, ["w0"]), mlp, *inputs)
    beyond = break_even(account, cache, examples=examples, steps=epoch + 1, old=smaller)
    assert (beyond.build_flops, beyond.saved_flops) == (examples * 30, N * 30)  # w1 alone
    assert (beyond.step_ratio, beyond.steps) == (answer.step_ratio, epoch + 1)
    with pytest.raises(ValueError, match="steps: got -1"):
        break_even(account, cache, examples=examples, steps=-1)
