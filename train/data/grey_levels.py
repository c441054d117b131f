"""Encoded images of a TFDS set as grey levels of 8 bits: those of 16 are rescaled, other types are refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np

_PNG = b"\x89PNG\r\n\x1a\n"
_DEPTH = 24  # place of the bits a channel in a PNG


def check_type(name: str, feature: Any) -> None:
    """Checks that the images of a set have grey levels whose range is known.

    Args:
        name: Of the set, for the error.
        feature: Its ``tfds.features.Image``.

    Raises:
        ValueError: If they are neither uint8 nor uint16.
    """
    if feature.np_dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"name: the images of {name} are {np.dtype(feature.np_dtype)}, of unknown range, expected uint8 or uint16, "
            "which is rescaled; prepare the set again with grey levels of 0 to 255: tfds.features.Image(dtype=np.uint8)"
        )


def decode(feature: Any, encoded: bytes) -> np.ndarray:
    """Decodes an image.

    Args:
        feature: The ``tfds.features.Image`` that tells its type and shape.
        encoded: PNG, JPEG or the like.

    Returns:
        uint8 of shape ``(height, width, channels)``; 16 bits are rescaled, 65535 to 255.

    Raises:
        ValueError: If it has not the type or the shape that the feature tells.
    """
    declared = np.dtype(feature.np_dtype)
    if encoded.startswith(_PNG) and (bits := max(8, encoded[_DEPTH])) != 8 * declared.itemsize:
        raise ValueError(f"it has {bits} bits a channel, expected {8 * declared.itemsize}, as the set says: {declared}")
    image = feature.decode_example_np(encoded)
    if image.ndim != 3 or any(side not in (None, got) for side, got in zip(feature.shape, image.shape, strict=True)):
        raise ValueError(f"it has the shape {image.shape}, expected {feature.shape}, as the set says")
    if declared == np.uint16:
        return ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return image
