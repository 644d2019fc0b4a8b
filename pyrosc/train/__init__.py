"""Training: the plan, the runner, checkpoints."""

from pyrosc.train.diagnose import TrainingError
from pyrosc.train.loop import fit
from pyrosc.train.plan import Plan

__all__ = ["Plan", "TrainingError", "fit"]
