"""The same networks in PyTorch, with the same layers frozen in its usual way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.frozen_share import freeze_torch
from benchmarks.gpu.cases import Case, Skipped
from benchmarks.gpu.timing import in_turns


def pytorch(case: Case, counts: list[int]) -> dict[str, Any]:
    """Times the step of the original network, eager, under autocast to bfloat16.

    Args:
        case: The network.
        counts: Numbers of layers to freeze, from the front.

    Raises:
        Skipped: If PyTorch is not there, or sees no GPU.
    """
    case.in_torch()  # raises before torch is imported
    import torch  # pyright: ignore[reportMissingImports]

    if not (case.tiny or torch.cuda.is_available()):
        raise Skipped("torch sees no GPU")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    inputs, labels = _batch(torch, case, kind)

    def wait(loss: Any) -> float:
        return float(loss.detach())

    def run_of(count: int) -> Callable[[], Any]:
        model = case.in_torch().to(kind)
        model.train()
        if not case.reads_text:
            model = model.to(memory_format=torch.channels_last)
        optimizer = freeze_torch(model, case.frozen(count), case.abstract.tensor_name)  # pyright: ignore[reportAttributeAccessIssue]

        def step() -> Any:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(kind, torch.bfloat16):
                result = model(inputs)
                loss = torch.nn.functional.cross_entropy(getattr(result, "logits", result).float(), labels)
            loss.backward()
            optimizer.step()
            return loss

        return step

    times = in_turns({count: run_of(count) for count in dict.fromkeys(counts)}, case.sizes, wait)
    rows = [{"layers": n, "ms": times[n].median, "spread": times[n].spread} for n in counts]
    on_gpu = {"platform": "gpu", "device": torch.cuda.get_device_name()} if kind == "cuda" else {}
    return {"torch": torch.__version__, "shares": rows, **on_gpu}


def _batch(torch: Any, case: Case, kind: str) -> tuple[Any, Any]:
    """Inputs and labels on the device, images with their channels first, but last in memory."""
    ((inputs,), labels) = case.arrays
    x = torch.from_numpy(inputs)
    x = x.long() if case.reads_text else x.permute(0, 3, 1, 2)
    return x.to(kind), torch.from_numpy(labels).long().to(kind)
