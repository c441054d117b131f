"""From recorded runs to a predictor: targets, examples, fitting, evaluation."""

from smartfrz_jax.learning.evaluation import Evaluation as Evaluation
from smartfrz_jax.learning.evaluation import evaluate as evaluate
from smartfrz_jax.learning.examples import Examples as Examples
from smartfrz_jax.learning.examples import Hiding as Hiding
from smartfrz_jax.learning.examples import make_examples as make_examples
from smartfrz_jax.learning.fitting import SGD as SGD
from smartfrz_jax.learning.fitting import Fit as Fit
from smartfrz_jax.learning.fitting import fit as fit
from smartfrz_jax.learning.fitting import predict as predict
from smartfrz_jax.learning.harm import branch_harm as branch_harm
from smartfrz_jax.learning.harm import swap_harm as swap_harm
from smartfrz_jax.learning.inputs import encode_examples as encode_examples
from smartfrz_jax.learning.recorder import Recorder as Recorder
from smartfrz_jax.learning.recording import Recording as Recording
from smartfrz_jax.learning.splits import by_layer as by_layer
from smartfrz_jax.learning.splits import by_metadata as by_metadata
from smartfrz_jax.learning.splits import by_run as by_run
from smartfrz_jax.learning.splits import moments as moments
from smartfrz_jax.learning.targets import Harmless as Harmless
from smartfrz_jax.learning.targets import Settled as Settled
from smartfrz_jax.learning.targets import settled as settled
