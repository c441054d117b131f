"""What freezing costs a model of 70 B parameters on 4,096 chips, on paper: ``python -m benchmarks.seventy_billion``.

Shapes are those of Llama 3 70B, FSDP over all chips. Sizes of records come from the library's own defaults. Nothing is
measured.
"""

from __future__ import annotations

from train.devices.agreement import DIGEST_BYTES

CHIPS, PROCESSES = 4096, 1024
BLOCKS, WIDTH, HIDDEN, KEYS, VOCABULARY = 80, 8192, 28672, 1024, 128256
TOKENS = 4096 * 1024  # of a step
SAMPLE, WINDOW = 1024, 30  # defaults of Tailoring.create and Schedule
FLOAT = 4

KERNELS = (WIDTH * WIDTH, WIDTH * KEYS, WIDTH * KEYS, WIDTH * WIDTH, *(3 * (WIDTH * HIDDEN,)))


def counts() -> tuple[int, int]:
    """Numbers of parameters, those of norms left out, and of layers: a kernel each, the embedding and the head."""
    return BLOCKS * sum(KERNELS) + 2 * VOCABULARY * WIDTH, BLOCKS * len(KERNELS) + 2


def rows() -> list[tuple[str, str]]:
    """The quantities, and how each comes about."""
    block, (params, layers) = sum(KERNELS), counts()
    flops, record = 6 * params * TOKENS, layers * SAMPLE * FLOAT
    half = BLOCKS // 2 * block
    return [
        ("parameters", f"{BLOCKS} blocks x {block / 1e6:.0f} M + embedding and head = {params / 1e9:.1f} B"),
        ("FLOPs of a step", f"6 x parameters x {TOKENS} tokens = {flops:.2e}; {flops / CHIPS:.2e} a chip"),
        ("a record", f"{layers} layers x {SAMPLE} weights x {FLOAT} bytes = {record / 1e6:.2f} MB, summed over chips"),
        ("the history", f"{WINDOW} records = {WINDOW * record / 1e6:.0f} MB, on every chip"),
        (
            "a comparison of decisions",
            f"{PROCESSES} processes x {DIGEST_BYTES} bytes = {PROCESSES * DIGEST_BYTES} bytes",
        ),
        (
            "half of the blocks frozen: optimizer state",
            f"{half / 1e9:.1f} B x 8 bytes of Adam / {CHIPS} = {half * 8 / CHIPS / 1e6:.0f} MB less a chip",
        ),
        (
            "... sums of gradients",
            f"{half / 1e9:.1f} B x {FLOAT} bytes = {half * FLOAT / 1e9:.0f} GB less a step",
        ),
        ("... front half: FLOPs", f"4 of 6 parts of {half / params:.0%} = {half / params * 4 / 6:.0%} less"),
    ]


def table() -> str:
    """The rows in Markdown, as docs/guides/launching.md has them."""
    return "\n".join(f"| {name} | {text} |" for name, text in rows())


if __name__ == "__main__":
    print(table())
