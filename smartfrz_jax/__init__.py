"""Layer freezing for JAX that really saves: attention-guided (SmartFRZ, arXiv 2401.16720) and by other policies."""

from smartfrz_jax.freezing import Frozen as Frozen
from smartfrz_jax.history import History as History
from smartfrz_jax.layers import Layer as Layer
from smartfrz_jax.layers import Layers as Layers
from smartfrz_jax.layers import find_layers as find_layers
from smartfrz_jax.policies.base import Policy as Policy
from smartfrz_jax.predictor import Predictor as Predictor
from smartfrz_jax.predictor import PredictorConfig as PredictorConfig
from smartfrz_jax.tailoring import Tailoring as Tailoring
