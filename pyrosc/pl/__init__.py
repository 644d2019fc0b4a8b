"""Pictures. Every function draws into the axes it is given, or into a new figure, and returns the axes.

matplotlib is imported when something is drawn, not before; ``show`` is never called, and no setting of
matplotlib is changed.
"""

from pyrosc.pl.criticism import intervals, khat, mean_variance, pit, ranks, statistic
from pyrosc.pl.differential import heatmap, volcano
from pyrosc.pl.doublets import doublets
from pyrosc.pl.embedding import expression, latent
from pyrosc.pl.factors import loadings
from pyrosc.pl.predictive import predictive_check
from pyrosc.pl.probabilities import probabilities
from pyrosc.pl.spatial import proportions
from pyrosc.pl.training import training_curve

__all__ = [
    "doublets",
    "expression",
    "heatmap",
    "intervals",
    "khat",
    "latent",
    "loadings",
    "mean_variance",
    "pit",
    "predictive_check",
    "probabilities",
    "proportions",
    "ranks",
    "statistic",
    "training_curve",
    "volcano",
]
