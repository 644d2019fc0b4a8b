"""Differential expression between groups of cells, for any model with an expression site."""

from pyrosc.tools.de.core import differential_expression
from pyrosc.tools.de.scanpy_form import rank_genes_groups

__all__ = ["differential_expression", "rank_genes_groups"]
