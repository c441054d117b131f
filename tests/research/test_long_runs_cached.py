"""Long runs that keep the activations of their frozen front: the results of runs that do not, for fewer FLOPs."""

import jax
import numpy as np
import pytest
from flax import nnx

import smartfrz_jax as sfj
from research.long_runs import bench as benches
from research.long_runs.run import LEAD, Job, Runner
from research.long_runs.strategies import CACHED, FIRST, STRATEGIES, Strategy
from tests.research.tiny_bench import BATCH, EPOCHS, EXAMPLES, tiny_bench

pytestmark = pytest.mark.usefixtures("jax_defaults")

_NAME = f"static{CACHED}"
_VIEWS = 3
_STEPS = EPOCHS * EXAMPLES // BATCH
_STOPPED = 37  # when some activations are kept, others not yet
_STRATEGY = Strategy(
    lambda s: sfj.static_prefix([(0.0, 0.4), (0.4, 0.7)], total_steps=s.total_steps, costs=s.costs), views=_VIEWS
)
_NEVER = STRATEGIES["never"]


class Stopping(Runner):
    """A run that is stopped after some step."""

    def _train(self, args, options):
        super()._train(args, options)
        if self.tally.steps == _STOPPED:
            self._deadline = 0.0


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return tiny_bench(tmp_path_factory.mktemp("state"))


def _runner(bench, name, strategy, folder, make=Runner):
    return make(bench, Job("tiny", name, 1, 0.05), strategy, state=folder)


def _finished(runner):
    flops, train = [], runner._train

    def watched(*args):
        before = runner.tally.flops
        train(*args)
        flops.append(runner.tally.flops - before)

    runner._train = watched
    assert runner.run()
    state = nnx.to_pure_dict(nnx.state((runner.model, runner.optimizer)))
    return jax.tree.map(np.asarray, state), runner.result(), flops


@pytest.fixture(scope="module")
def alone(bench, tmp_path_factory):
    """Arrays, row and FLOPs of every step of a run that was never interrupted."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return _finished(_runner(bench, _NAME, _STRATEGY, tmp_path_factory.mktemp("alone")))


@pytest.mark.slow
def test_losses_are_those_of_the_same_batches_without_activations(bench, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(benches, "_ROOM", 0)
    with pytest.warns(sfj.SavingWarning, match="the budget is 0"):
        _, plain, plain_flops = _finished(_runner(bench, _NAME, _STRATEGY, tmp_path))
    _, row, flops = alone
    assert row["frozen"] == plain["frozen"]
    first, second = (event[0] for event in row["frozen"])
    assert (first, second) == (LEAD + 1, LEAD + round(0.4 * _STEPS))
    np.testing.assert_allclose(row["curve"], plain["curve"], rtol=1e-4)
    assert flops[:first] == plain_flops[:first]
    assert row["stored_bytes"] > 0 == plain["stored_bytes"]
    # Three epochs compute what the later ones look up, also of the next set.
    per_view = EXAMPLES // BATCH
    known = first + (_VIEWS + 1) * per_view
    assert known < second
    for step in (*range(first + per_view, first + _VIEWS * per_view), second):
        assert flops[step] > max(flops[known:second])
    assert max(flops[known:second]) < 0.95 * plain_flops[first]


@pytest.mark.slow
def test_a_branch_that_is_interrupted_is_the_run_from_the_start(bench, alone, tmp_path):
    never = _runner(bench, "never", _NEVER, tmp_path)
    never.watch({_NAME.removesuffix(CACHED): _STRATEGY._replace(views=0), _NAME: _STRATEGY})
    assert len(never.shadows) == 1  # one policy, looked at once
    assert never.run()
    assert not _runner(bench, _NAME, _STRATEGY, tmp_path, Stopping).run()
    arrays, row, flops = _finished(_runner(bench, _NAME, _STRATEGY, tmp_path))
    expected, whole, whole_flops = alone
    jax.tree.map(np.testing.assert_array_equal, arrays, expected)
    assert row["branched_at"] == LEAD + 1
    same = ("frozen", "flops", "loss", "accuracy", "curve", "flops_share", "stored_bytes")
    assert {key: row[key] for key in same} == {key: whole[key] for key in same}
    assert flops == whole_flops[_STOPPED:]


def test_an_epoch_has_one_view_of_every_example_once_something_is_frozen(bench):
    feed, plain = (bench.feed(_STRATEGY._replace(views=views), 1, tuning=False) for views in (_VIEWS, 0))
    per_epoch = EXAMPLES // BATCH
    assert [feed.view(step) for step in range(0, 5 * per_epoch, per_epoch)] == [0, 1, 2, 0, 1]
    for step in (0, 4):
        (_, *fresh), options = feed(step, frozen=False)
        np.testing.assert_array_equal(fresh[0], plain(step, frozen=False)[0][0])
        assert options == {"view": step // per_epoch}
    looks = {}
    for step in range(2 * _VIEWS * per_epoch):
        (indices, (images,), _), options = feed(step, frozen=True)
        for index, image in zip(indices, images, strict=True):
            looks.setdefault((index, options["view"]), set()).add(image.tobytes())
    assert len(looks) == EXAMPLES * _VIEWS
    assert all(len(images) == 1 for images in looks.values())


def test_short_runs_and_those_without_augmentation_have_one_view(bench, monkeypatch):
    for case in (bench.case._replace(augment=False), bench.case._replace(epochs=3)):
        monkeypatch.setattr(bench, "case", case)
        feed = bench.feed(_STRATEGY, 1, tuning=False)
        assert [feed(step, frozen=True)[1] for step in (0, 30)] == [{"view": 0}] * 2


def test_strategies_with_activations_are_the_others_behind_the_first():
    names = [name for name in STRATEGIES if CACHED in name]
    assert list(STRATEGIES)[FIRST : FIRST + len(names)] == names
    for name in names:
        other, _, views = name.partition(CACHED)
        assert STRATEGIES[name] == STRATEGIES[other]._replace(views={"": 3, ":2": 2}[views])
