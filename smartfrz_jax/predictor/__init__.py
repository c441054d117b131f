"""The SmartFRZ network, and what it reads."""

from smartfrz_jax.predictor.cka import layer_cka as layer_cka
from smartfrz_jax.predictor.cka import linear_cka as linear_cka
from smartfrz_jax.predictor.cka import stabilised as stabilised
from smartfrz_jax.predictor.encoding import Encoding as Encoding
from smartfrz_jax.predictor.history import History as History
from smartfrz_jax.predictor.observation import Observation as Observation
from smartfrz_jax.predictor.predictor import Predictor as Predictor
from smartfrz_jax.predictor.predictor import PredictorConfig as PredictorConfig
from smartfrz_jax.predictor.predictor import freeze_probability as freeze_probability
from smartfrz_jax.predictor.sampling import Tailoring as Tailoring
