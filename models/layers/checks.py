"""What the image networks refuse, with the way out."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def check_images(x: jax.Array, channels: int, *, least: int = 1) -> None:
    """Raises unless ``x`` is a batch of images that the network can take.

    Args:
        x: What the network was called with.
        channels: Channels of the images that it was made for.
        least: The smallest height and width of which something is left at the end of the network.

    Raises:
        ValueError: If the shape is not ``(examples, height, width, channels)``, or too small.
        TypeError: If the pixels are integers.
    """
    if x.ndim != 4 or x.shape[-1] != channels:
        raise ValueError(
            f"x: got images of shape {x.shape}, expected (examples, height, width, {channels}); move the channels "
            "last, or make the network with channels= of the images"
        )
    if min(x.shape[1:3]) < least:
        raise ValueError(
            f"x: got images of {x.shape[1]} x {x.shape[2]}, expected at least {least} x {least}, or the strides leave "
            "nothing of them; resize them first"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"x: got {x.dtype} pixels, expected floating point; normalize them as for the network's weights"
        )


def check_stem(stem: str) -> None:
    """Raises ``ValueError`` unless ``stem`` is one of those that the networks have."""
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f"stem: got {stem!r}, expected 'imagenet', or 'cifar' for small images such as 32 x 32")


def check_rate(rate: float, argument: str) -> None:
    """Raises ``ValueError`` unless ``rate`` is a share from 0 up to, but not including, 1."""
    if not 0 <= rate < 1:
        raise ValueError(f"{argument}: got {rate}, expected the share to drop, from 0 (none) to below 1")
