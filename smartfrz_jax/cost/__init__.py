"""What a train step costs for any frozen set, predicted and measured, and why a saving did not come."""

from smartfrz_jax.cost.account import Account as Account
from smartfrz_jax.cost.account import account as account
from smartfrz_jax.cost.check import Finding as Finding
from smartfrz_jax.cost.check import Measured as Measured
from smartfrz_jax.cost.check import SavingCheck as SavingCheck
from smartfrz_jax.cost.check import SavingWarning as SavingWarning
from smartfrz_jax.cost.check import check_saving as check_saving
from smartfrz_jax.cost.check import jaxpr_of as jaxpr_of
from smartfrz_jax.cost.measured import ProgramCost as ProgramCost
from smartfrz_jax.cost.measured import program_cost as program_cost
from smartfrz_jax.cost.step_flops import Parts as Parts
from smartfrz_jax.cost.step_flops import StepFlops as StepFlops
