"""Freezing policies: when to stop updating which layer."""

from smartfrz_jax.policies.auto import auto as auto
from smartfrz_jax.policies.base import Policy as Policy
from smartfrz_jax.policies.freezeout import freezeout as freezeout
from smartfrz_jax.policies.freezeout import freezeout_schedules as freezeout_schedules
from smartfrz_jax.policies.freezeout import scale_by_layer_schedule as scale_by_layer_schedule
from smartfrz_jax.policies.gradients.autofreeze import autofreeze as autofreeze
from smartfrz_jax.policies.gradients.grades import grades as grades
from smartfrz_jax.policies.gradients.relative_norm import relative_gradient_norm as relative_gradient_norm
from smartfrz_jax.policies.never import never as never
from smartfrz_jax.policies.progress import progress as progress
from smartfrz_jax.policies.random_order import random as random
from smartfrz_jax.policies.rehearsal import Harm as Harm
from smartfrz_jax.policies.rehearsal import Rehearsal as Rehearsal
from smartfrz_jax.policies.rehearsal import rehearse as rehearse
from smartfrz_jax.policies.rotating.block_coordinate import badam as badam
from smartfrz_jax.policies.rotating.block_coordinate import hift as hift
from smartfrz_jax.policies.rotating.lisa import lisa as lisa
from smartfrz_jax.policies.rotating.slimfit import slimfit as slimfit
from smartfrz_jax.policies.similarity.simfreeze import simfreeze as simfreeze
from smartfrz_jax.policies.similarity.similarity_guided import similarity_guided as similarity_guided
from smartfrz_jax.policies.smartfrz import Probing as Probing
from smartfrz_jax.policies.smartfrz import Schedule as Schedule
from smartfrz_jax.policies.smartfrz import smartfrz as smartfrz
from smartfrz_jax.policies.static_prefix import static_prefix as static_prefix
