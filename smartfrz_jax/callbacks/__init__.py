"""Callbacks of a freezer: metrics of every step and what froze, for TensorBoard, Weights & Biases or JSON lines."""

from smartfrz_jax.callbacks.base import Callback as Callback
from smartfrz_jax.callbacks.writers import JsonLines as JsonLines
from smartfrz_jax.callbacks.writers import TensorBoard as TensorBoard
from smartfrz_jax.callbacks.writers import WandB as WandB
from smartfrz_jax.callbacks.writers import Writer as Writer
