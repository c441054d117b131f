"""Layer freezing for JAX that saves in the compiled step, by rules or predictors (SmartFRZ, arXiv 2401.16720)."""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

from smartfrz_jax import caching as caching
from smartfrz_jax import callbacks as callbacks
from smartfrz_jax import cost as cost
from smartfrz_jax import linen as linen
from smartfrz_jax import nnx as nnx
from smartfrz_jax import policies as policies
from smartfrz_jax import predictor as predictor
from smartfrz_jax.caching.prefix_cache import PrefixCache as PrefixCache
from smartfrz_jax.callbacks.base import FreezeEvent as FreezeEvent
from smartfrz_jax.cost.account import Account as Account
from smartfrz_jax.cost.account import account as account
from smartfrz_jax.cost.check import SavingWarning as SavingWarning
from smartfrz_jax.cost.measured import program_cost as program_cost
from smartfrz_jax.freezing.freezer import Freezer as Freezer
from smartfrz_jax.freezing.frozen import Frozen as Frozen
from smartfrz_jax.freezing.migrate import migrate_opt_state as migrate_opt_state
from smartfrz_jax.freezing.transform import apply_updates as apply_updates
from smartfrz_jax.freezing.transform import freeze as freeze
from smartfrz_jax.freezing.transform import value_and_grad as value_and_grad
from smartfrz_jax.layers.find import find_layers as find_layers
from smartfrz_jax.layers.layers import Layer as Layer
from smartfrz_jax.layers.layers import Layers as Layers
from smartfrz_jax.layers.outputs import layer_outputs as layer_outputs
from smartfrz_jax.policies.auto import auto as auto
from smartfrz_jax.policies.base import Policy as Policy
from smartfrz_jax.policies.freezeout import freezeout as freezeout
from smartfrz_jax.policies.gradients.autofreeze import autofreeze as autofreeze
from smartfrz_jax.policies.progress import progress as progress
from smartfrz_jax.policies.rehearsal import rehearse as rehearse
from smartfrz_jax.policies.smartfrz import smartfrz as smartfrz
from smartfrz_jax.policies.static_prefix import static_prefix as static_prefix
from smartfrz_jax.predictor.predictor import Predictor as Predictor
from smartfrz_jax.programs.on_disk import enable_compilation_cache as enable_compilation_cache
from smartfrz_jax.programs.train_step import Program as Program
from smartfrz_jax.programs.train_step import TrainStep as TrainStep

if _TYPE_CHECKING:
    from smartfrz_jax import learning as learning

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """``smartfrz_jax.learning`` is imported when it is asked for, as training does not need it."""
    if name == "learning":
        return _importlib.import_module("smartfrz_jax.learning")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
