"""Pictures. Every function draws into the axes it is given, or into a new figure, and returns the axes.

matplotlib is imported when something is drawn, not before; ``show`` is never called, and no setting of
matplotlib is changed.
"""

from pyrosc.pl.embedding import expression, latent
from pyrosc.pl.predictive import predictive_check
from pyrosc.pl.probabilities import probabilities
from pyrosc.pl.training import training_curve

__all__ = [
    "expression",
    "latent",
    "predictive_check",
    "probabilities",
    "training_curve",
]
