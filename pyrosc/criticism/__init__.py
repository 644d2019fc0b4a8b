"""Model criticism: what a model gets right, what it gets wrong, and how far its posterior can be trusted."""

from pyrosc.criticism.de_genes import de_genes_kept
from pyrosc.criticism.guide import GuideDiagnostics, guide_diagnostics
from pyrosc.criticism.integration import integration_metrics
from pyrosc.criticism.predictive import PredictiveChecks, predictive_checks
from pyrosc.criticism.report import report
from pyrosc.criticism.sbc import Calibration, calibration_of_draws, simulation_based_calibration

__all__ = [
    "Calibration",
    "GuideDiagnostics",
    "PredictiveChecks",
    "calibration_of_draws",
    "de_genes_kept",
    "guide_diagnostics",
    "integration_metrics",
    "predictive_checks",
    "report",
    "simulation_based_calibration",
]
