"""A classifier of categories, for models that are to hide them from it."""

from __future__ import annotations

from torch import Tensor, nn

from pyrosc.nn.covariates import CategoryTable
from pyrosc.nn.layers import MLP


class CategoryClassifier(nn.Module):
    """Logits of a category from a latent space: (..., k) to (..., n_categories).

    What belongs to a category, its weights and intercept, is a row of a `CategoryTable`.

    Parameters
    ----------
    field
        Argument of the model whose codes are the categories.
    n_categories
        Their number.
    n_latent
        Width of the latent space.
    n_hidden, n_layers
        Width and depth of the hidden layers.
    """

    def __init__(
        self, field: str, n_categories: int, n_latent: int, n_hidden: int = 32, n_layers: int = 2
    ) -> None:
        super().__init__()
        self.network = MLP(n_latent, n_hidden, n_layers, norm="layer")
        bound = n_hidden**-0.5
        self.rows = CategoryTable(
            field, n_categories, (n_hidden + 1,), None, lambda t: t.uniform_(-bound, bound)
        )

    @property
    def n_categories(self) -> int:
        """Number of categories."""
        return self.rows.n_categories

    def forward(self, z: Tensor) -> Tensor:
        """(..., n_categories)."""
        rows = self.rows.all_rows()
        return self.network(z) @ rows[:, :-1].T + rows[:, -1]
