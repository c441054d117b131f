"""Makes ``efficientnet_lite0.safetensors`` from the published weights: all of them, in float16.

Usage: python train/efficientnet_lite0/make_float16.py FILE, the published weights as safetensors in float32; how a
``.pth`` becomes such a file is said in ``models.weights``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

if __name__ == "__main__":
    tensors = {name: value.astype(np.float16) for name, value in load_file(sys.argv[1]).items()}
    save_file(tensors, Path(__file__).with_name("efficientnet_lite0.safetensors"), metadata={"format": "pt"})
