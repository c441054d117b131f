"""Whether keeping the activations of frozen layers pays."""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

from smartfrz_jax.caching.prefix_cache import PrefixCache
from smartfrz_jax.cost.account import Account
from smartfrz_jax.pytrees import checks


class BreakEven(NamedTuple):
    """What keeping activations costs and saves.

    Attributes:
        pays: Whether more is saved than spent, in the steps that remain, and what is kept fits.
        build_flops: Spent once: the forward pass of the frozen layers on every view of every example, and writing.
        saved_flops: Saved by each step, reading taken off.
        steps: The least number of steps for which it pays; None if none is enough.
        step_ratio: FLOPs of a step with the cache, as a share of those without.
        nbytes: Bytes that are kept.
    """

    pays: bool
    build_flops: float
    saved_flops: float
    steps: int | None
    step_ratio: float
    nbytes: int


def break_even(
    account: Account,
    cache: PrefixCache,
    *,
    examples: int,
    steps: int,
    flops_per_byte: float = 0.0,
    budget: int | None = None,
    old: PrefixCache | None = None,
) -> BreakEven:
    r"""Whether keeping the activations of frozen layers pays.

    With :math:`N` examples in :math:`V` views, :math:`f` FLOPs for an example's activations, :math:`r` of them computed
    again in each step, :math:`b` bytes an example and :math:`w` FLOPs that the device could do while a byte is moved,
    it pays in :math:`S` steps of :math:`n` examples if

    .. math:: S n (f - r - b w) > N V (f + b w).

    Steps in which activations are computed and stored on the way count among :math:`S`, so that with free storage it
    pays from the second epoch on.

    Args:
        account: The account of the train step, of the same batch size as the steps.
        cache: The cache.
        examples: Examples in the data set.
        steps: Steps that remain with this frozen set, at least.
        flops_per_byte: FLOPs of a step over its seconds, times the seconds that a byte takes to where it is kept or
            back; 0 if it is kept on the device.
        budget: Most bytes to use.
        old: A cache of fewer frozen layers that there is, and that would be gone on with otherwise: what is spent and
            saved beyond it counts.

    Returns:
        The answer, with the numbers.

    Raises:
        TypeError: If ``account`` is no :class:`~smartfrz_jax.Account`, or ``cache`` no :class:`PrefixCache`.
        ValueError: If the account is of another network, or a number is negative.
    """
    checks.instance(account, Account, "account", "the account of the train step, from smartfrz_jax.account")
    checks.instance(cache, PrefixCache, "cache", "a smartfrz_jax.PrefixCache")
    for argument, number in (("examples", examples), ("steps", steps), ("budget", budget)):
        if number is not None or argument != "budget":
            checks.count(number, argument, least=0, most=sys.maxsize)
    checks.between(flops_per_byte, "flops_per_byte", "a finite number from 0 up", 0.0, sys.float_info.max)
    moved = cache.bytes_per_example * flops_per_byte
    build, each = cache.build_flops + moved, cache.saved_flops - moved
    whole = account.flops(cache.frozen).total
    ratio = (whole - account.examples * each) / whole
    if old is not None:
        checks.instance(old, PrefixCache, "old", "the smartfrz_jax.PrefixCache that there is")
        read = old.bytes_per_example * flops_per_byte
        build += 0 if cache.grown_from(old) is None else read - old.build_flops
        each -= old.saved_flops - read
    build, saved = examples * cache.views * build, account.examples * each
    least = math.floor(build / saved) + 1 if saved > 0 else None
    nbytes = examples * cache.views * cache.bytes_per_example
    pays = least is not None and steps >= least and (budget is None or nbytes <= budget)
    return BreakEven(pays, build, saved, least, ratio, nbytes)
