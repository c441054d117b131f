"""What the command line asks to train and to evaluate on."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.support.tfds_writer import write_set
from train.data.open import open_data
from train.networks import VOCABULARY
from train.options import parse


def opened(arguments):
    """As ``train.finetune`` opens them."""
    options = parse(arguments)
    return open_data(options.data, options.network.reads, batch_size=options.run.batch_size, seed=options.run.seed)


@pytest.fixture
def arguments(tmp_path):
    """Of a run on 40 sentences; label = number % 2."""
    rows = [{"text": f"cat {i}", "label": i % 2} for i in range(40)]
    spec = {"label": tfds.features.ClassLabel(num_classes=2), "text": tfds.features.Text()}
    write_set(tmp_path, "cats", tfds.features.FeaturesDict(spec), {"train": rows, "test": rows[:5]})
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\ncat\n")
    return ["--model", "minilm", "--data", "cats", "--data-dir", str(tmp_path), "--out", str(tmp_path / "run"),
            "--vocab", str(tmp_path / "vocab.txt"), "--batch-size", "8"]  # fmt: skip


def test_no_training_example_only_fills_a_batch_up_and_evaluation_leaves_none_out(arguments):
    train, evaluation = opened([*arguments, "--train-split", "train[:20]"])
    assert train.steps_per_epoch == 2
    assert all(np.all(batch.weights == 1) for batch in train.batches(0, 4))
    assert [batch.weights.sum() for batch in evaluation.evaluation_batches()] == [5]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            ["--evaluation-split", "train[90%:]"],
            r"train_split, evaluation_split: 'train' and 'train\[90%:\]' of cats have 4 examples in common.*"
            r"--train-split 'train\[:90%\]'",
        ),
        (
            ["--train-split", "train[:7]"],
            r"batch_size: got 8, expected at most 7, .*'train\[:7\]'.*--batch-size.*--train-split",
        ),
    ],
)
def test_splits_that_cannot_be_trained_and_evaluated_on(arguments, changed, message):
    with pytest.raises(ValueError, match=message):
        opened([*arguments, *changed])


def test_parts_of_the_training_set_that_have_nothing_in_common(arguments):
    train, evaluation = opened([*arguments, "--train-split", "train[:90%]", "--evaluation-split", "train[90%:]"])
    assert (train.steps_per_epoch, evaluation.evaluation_steps) == (4, 1)


def test_a_vocabulary_that_the_network_does_not_know(arguments, tmp_path):
    known = [*(tmp_path / "vocab.txt").read_text().split(), *map(str, range(VOCABULARY - 5))]
    (tmp_path / "vocab.txt").write_text("\n".join(known))
    opened(arguments)
    (tmp_path / "vocab.txt").write_text("\n".join([*known, "dog"]))
    with pytest.raises(ValueError, match=rf"vocab: .* holds {VOCABULARY + 1} tokens, expected at most .*--vocab"):
        opened(arguments)
