"""``train.finetune --task lm``: a small decoder learns texts, in full and frozen, and what does not fit is refused."""

import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from models import weights
from tests.models.decoders.gguf_writer import write_gguf
from tests.models.transformers import tiny_llama
from tests.support.boxes import unboxed
from train import finetune, log
from train.networks import NetworkConfig

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("jax_defaults")]
pytest.importorskip("gguf", reason="needs the package gguf: pip install 'smartfrz_jax[llm]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A decoder of two blocks, and texts that it can learn."""
    folder = tmp_path_factory.mktemp("language")
    model = tiny_llama(vocab_size=259, dim=32, hidden=48)
    write_gguf(folder / "tiny.gguf", weights.get_tensors(model), heads=4, kv_heads=2, tokens=("<unk>", "<|endoftext|>"))
    (folder / "texts.txt").write_text("\n".join(f"the {i % 3} of the {i % 5}." for i in range(120)))
    return folder


def arguments(folder, out, *more):
    return [
        "--task", "lm", "--model", "llama", "--weights", str(folder / "tiny.gguf"), "--data", "texts.txt",
        "--data-dir", str(folder), "--max-tokens", "32", "--batch-size", "8", "--epochs", "3", "--quiet",
        "--optimizer", "adamw", "--learning-rate", "0.01", "--lead", "0", "--mesh", "data=1", "--out", str(out), *more,
    ]  # fmt: skip


def test_a_decoder_learns_texts_in_full(folder, tmp_path, capsys):
    assert finetune.main(arguments(folder, tmp_path / "run", "--policy", "never")) == 0, capsys.readouterr().err
    run = log.read(tmp_path / "run/log.jsonl")
    assert list(run.metrics) == ["log-likelihood", "perplexity", "loss"]
    assert run.metrics["loss"] == -run.metrics["log-likelihood"]
    assert run.metrics["perplexity"] == pytest.approx(np.exp(-run.metrics["log-likelihood"]))
    assert 1 < run.metrics["perplexity"] < 0.1 * 259
    assert "| perplexity, evaluation split" in (tmp_path / "run/report.md").read_text()
    tensors = safetensors.numpy.load_file(tmp_path / "run/model.safetensors")
    assert "lm_head.weight" not in tensors
    assert tensors["model.embed_tokens.weight"].shape == (259, 32)


@pytest.mark.parametrize("tied", [True, False])
def test_the_lookup_and_the_front_freeze_apart_from_the_head(tied, folder, tmp_path, capsys):
    more = ("--scan", "--policy", "static_prefix", "--stages", "0.01:0.5", *([] if tied else ["--untied"]))
    assert finetune.main(arguments(folder, tmp_path / "run", *more)) == 0, capsys.readouterr().err
    run = log.read(tmp_path / "run/log.jsonl")
    lookup = "embed_tokens/lookup" if tied else "embed_tokens"
    assert run.layers[0] == lookup
    assert lookup in run.freezes[0].names
    assert run.steps[-1].flops < 0.75 * run.steps[0].flops
    losses = [step.loss for step in run.steps]
    assert losses[-1] < 0.8 * losses[0]
    tensors = safetensors.numpy.load_file(tmp_path / "run/model.safetensors")
    assert tied or not np.array_equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_a_policy_with_turns_freezes_before_the_first_step(folder, tmp_path, capsys):
    more = ("--policy", "badam", "--switch-every", "4", "--block-order", "ascending", "--lead", "0")
    assert finetune.main(arguments(folder, tmp_path / "run", *more)) == 0, capsys.readouterr().err
    run = log.read(tmp_path / "run/log.jsonl")
    assert [event.step for event in run.freezes[:3]] == [0, 4, 8]
    assert run.freezes[1].returned
    assert all(step.frozen > 0 for step in run.steps)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task", "classify"], "task: got classify with llama, expected lm with a decoder"),
        (["--batch-size", "100"], "batch_size: got 100, expected at most"),
        (["--train-split", "train[:5]"], "train_split: got 'train.:5.' of the file texts.txt, which is read whole"),
        (["--evaluation-split", "other.txt"], "evaluation_split: .*other.txt is not there"),
        (
            ["--evaluation-split", "texts.txt"],
            "evaluation_split: got texts.txt, which is trained on; name another file",
        ),
        (["--evaluation-split", "none/../texts.txt"], "evaluation_split: got .*texts.txt, which is trained on"),
        (["--data", "none.txt"], "data: .*none.txt is not there"),
    ],
)
def test_what_does_not_fit_is_refused(more, message, folder, tmp_path, capsys):
    assert finetune.main(arguments(folder, tmp_path / "run", *more)) == 2
    assert re.search(message, unboxed(capsys.readouterr().err))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": "minilm", "weights": "tiny.gguf"}, r"--weights: got a GGUF file for minilm"),
        ({"model": "llama", "weights": "tiny.safetensors"}, r"--weights: got .* for llama, expected a GGUF file"),
        ({"model": "llama"}, r"--weights: got None for llama, expected a GGUF file"),
        ({"model": "minilm", "untied": True}, r"--untied: minilm has no embedding for a head"),
    ],
)
def test_options_that_do_not_fit_are_refused(config, message):
    config = config | ({"weights": Path(config["weights"])} if "weights" in config else {})
    with pytest.raises(ValueError, match=message):
        NetworkConfig(**config)
