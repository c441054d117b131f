"""Arrays drawn from a name: the same on both sides, on every machine and with every version of NumPy."""

import hashlib
import re

import numpy as np

_BEFORE_RELU = re.compile(r"(bn\d|downsample\.1|^features\..*)\.bias$")
_PARTLY_SHUT = re.compile(
    r"^(bn\d|layer|features\.\d+\.bias)"
)  # not before depthwise convolutions, which need variance
_BRANCH_END = re.compile(r"^layer.*bn3\.")
_EMBEDDING = re.compile(r"(embeddings\.weight|pos_embed|_token)$")


def uniform(name, shape):
    """Float32 numbers from -1 to 1, from the raw bits of a generator seeded with the name."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    size = int(np.prod(shape))
    bits = np.random.PCG64(seed).random_raw((size + 1) // 2).view(np.uint32)[:size]
    numbers = (bits >> 8).astype(np.float32)  # in place from here on: there are a hundred millions of them
    numbers *= np.float32(2**-23)
    numbers -= np.float32(1)
    return numbers.reshape(shape)


def integers(name, shape, below):
    """Int32 numbers from 0 to ``below``, exclusively."""
    return np.minimum((uniform(name, shape) + 1) / 2 * below, below - 1).astype(np.int32)


def tensor(name, shape):
    """Weights or statistics for a tensor of that name, in torch's layout, on a scale that keeps activations sane.

    Where ReLUs follow a BatchNorm, gradients jump when rounding carries an activation across zero. There are millions
    of activations, so that with biases about zero float32 differs from float64 by up to a third in some gradient, in
    torch as here. Therefore biases are three standard deviations: channels are open almost everywhere, but for every
    fourth of ResNet and VGG, which is shut. The last BatchNorm of ResNet's blocks is so small that the shortcut's
    channels stay as they are. Likewise attention adds little in BERT: or else the tokens come so close to each other in
    twelve blocks that the gradients of queries and keys are small differences.
    """
    draw = uniform(name, shape)
    if name.endswith("running_var"):
        return 1 + draw / 2
    if _EMBEDDING.search(name):
        return draw / 2
    if len(shape) > 1:
        gain = 2 if len(shape) == 4 else 1  # He et al.'s for convolutions
        if name.endswith("attention.output.dense.weight"):
            gain = 0.1
        draw *= np.float32(np.sqrt(3 * gain / np.prod(shape[1:])))
        return draw
    if name.endswith("weight"):
        vector = 1 + draw / 4
    elif _BEFORE_RELU.search(name):
        shut = (np.arange(*shape) % 4 == 3) & bool(_PARTLY_SHUT.search(name))
        vector = np.where(shut, -1, 1).astype(np.float32) * (3 + draw / 4)
    else:
        vector = draw / 10
    return vector / 4 if _BRANCH_END.search(name) else vector
