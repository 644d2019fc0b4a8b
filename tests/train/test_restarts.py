"""Several starting points: the fit kept is the one under which held-out cells are likeliest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy import make_adata
from toy_models import Factors, TwoSources

from pyrosc.train import restarts


def test_the_best_fit_is_kept(monkeypatch):
    scores = iter([-5.0, -3.0, -4.0])
    kept = []

    def score(self, indices=None, **options):
        kept.append({k: v.clone() for k, v in self.state_dict().items()})
        assert np.array_equal(indices, kept_rows)
        return next(scores)

    model = Factors.from_anndata(make_adata(60, 10), batch_key="batch")
    kept_rows = np.setdiff1d(np.arange(60), np.arange(50))
    monkeypatch.setattr(Factors, "get_marginal_ll", score)
    out = model.fit(2, n_restarts=3, train_indices=np.arange(50), progress=False)
    assert out is model
    assert model.restarts == [-5.0, -3.0, -4.0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[1][name]), name
    assert any(not torch.equal(v, kept[0][k]) for k, v in kept[1].items())
    assert len(model.history) == 2


def test_restarts_differ_in_weights_and_share_the_split():
    model = Factors.from_anndata(make_adata(60, 10), batch_key="batch").fit(1, progress=False)
    again = restarts.fresh(model, 7)
    assert again.split is model.split
    assert again.history is None
    assert not torch.equal(again.loadings.weight, model.loadings.weight)


def test_they_do_not_move_the_global_generator_and_repeat():
    state = torch.get_rng_state()
    runs = [
        Factors.from_anndata(make_adata(60, 10), batch_key="batch").fit(
            2, n_restarts=2, train_size=0.8, progress=False
        )
        for _ in range(2)
    ]
    assert torch.equal(state, torch.get_rng_state())
    assert runs[0].restarts == runs[1].restarts
    assert all(torch.equal(v, runs[1].state_dict()[k]) for k, v in runs[0].state_dict().items())
    assert len(runs[0].train_indices) == 48


def test_impossible_restarts_are_refused(tmp_path):
    model = Factors.from_anndata(make_adata(60, 10), batch_key="batch")
    with pytest.raises(ValueError, match="n_restarts is 1 or more"):
        model.fit(1, n_restarts=0, progress=False)
    with pytest.raises(ValueError, match="not checkpointed"):
        model.fit(1, n_restarts=2, checkpoint=tmp_path, progress=False)
    with pytest.raises(ValueError, match="none is held out"):
        model.fit(1, n_restarts=2, train_size=1.0, progress=False)
    trained = Factors.from_anndata(make_adata(60, 10), batch_key="batch").fit(1, progress=False)
    with pytest.raises(ValueError, match="trained already"):
        trained.fit(1, n_restarts=2, progress=False)
    two = TwoSources.from_anndatas({"seq": make_adata(40, 10), "spatial": make_adata(40, 10)})
    with pytest.raises(ValueError, match="one data source"):
        two.fit(1, n_restarts=2, progress=False)
