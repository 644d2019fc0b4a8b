"""Objectives beside the ELBO: who moves whom, by how much, and under enumeration too."""

import numpy as np
import pytest
import torch
from toy_models import Adversary, Factors, Mixture

from pyrosc.data.inputs import load_batch
from pyrosc.infer.handlers import Record
from pyrosc.train import checkpoint as files
from pyrosc.train.optim import Optimizers

pytestmark = pytest.mark.filterwarnings("ignore:the held-out ELBO was still rising")

CASES = [Adversary, Mixture]


@pytest.fixture(params=CASES, ids=lambda c: c.__name__)
def model(request, toy_adata):
    return request.param.from_anndata(toy_adata, batch_key="batch")


def terms_of(model, seed=0):
    """Loss and auxiliary terms of one minibatch, all of one pass."""
    batch = load_batch(model.datasets, {"main": np.arange(32)}, model.device)
    record = Record()
    torch.manual_seed(seed)
    with torch.random.fork_rng():
        loss = model.loss(batch, record=record)
    return loss, model.auxiliary(model.inputs(batch), record.sites, 0, 1.0)


def gradients(value, model):
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)
    }


def is_own(name):
    return name.startswith("classifier.")


def test_gradients_of_both_steps_are_those_by_hand(model):
    optimizers = Optimizers(model, model.plan)
    optimizers.set_lr(0.0)  # Adam's steps are zero; the gradients stay to be looked at
    loss, terms = terms_of(model)
    main, own = gradients(loss + terms["fool"], model), gradients(terms["classify"], model)
    optimizers.step(loss + terms["fool"], {"classify": terms["classify"]})
    for name, parameter in model.named_parameters():
        expected = own[name] if is_own(name) else main[name]
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, expected, msg=name)
    assert any(g.abs().sum() > 0 for n, g in own.items() if is_own(n))


def test_the_adversary_has_an_optimiser_of_its_own(model):
    optimizers = Optimizers(model, model.plan)
    own = {id(p) for n, p in model.named_parameters() if is_own(n)}
    assert {id(p) for p in optimizers.owned["classify"]} == own
    assert not own & {id(p) for p in optimizers.dense}
    assert len(optimizers.all()) == 2


def one_step(model, change):
    """Parameters after one step in which `change` was made to the auxiliary terms."""
    optimizers = Optimizers(model, model.plan)
    loss, terms = terms_of(model)
    terms = change(dict(terms))
    owned = {"classify": terms["classify"]} if "classify" in terms else {}
    optimizers.step(loss + terms.get("fool", 0.0), owned)
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("cls", CASES)
def test_only_its_own_objective_moves_the_adversary(toy_adata, cls):
    def run(change):
        return one_step(cls.from_anndata(toy_adata, batch_key="batch"), change)

    start = {
        n: p.detach().clone() for n, p in cls.from_anndata(toy_adata, batch_key="batch").named_parameters()
    }
    both = run(lambda t: t)
    without_fool = run(lambda t: {"classify": t["classify"]})
    without_own = run(lambda t: {"fool": t["fool"]})
    for name in both:
        if is_own(name):
            assert not torch.equal(both[name], start[name])
            assert torch.equal(both[name], without_fool[name])
            assert torch.equal(without_own[name], start[name])
        else:
            assert torch.equal(both[name], without_own[name])
    moved = [n for n in both if not torch.equal(both[n], without_fool[n])]
    assert moved
    assert all("encoder" in n for n in moved)


def test_terms_are_in_the_history(model):
    model.fit(3, progress=False)
    history = model.history
    assert (history["classify"] > 0).all()
    assert (history["fool"] < 0).all()
    assert history["classify"].iloc[0] == pytest.approx(-history["fool"].iloc[0], rel=1e-4)
    assert np.isfinite(history["elbo_validation"]).all()


def test_the_step_counts_up(toy_adata):
    seen = []

    class Counting(Adversary):
        def auxiliary(self, batch, sites, step, kl_weight):
            seen.append((step, sorted(sites)))
            assert set(batch) == {"x", "batch"}
            return {}

    Counting.from_anndata(toy_adata, batch_key="batch").fit(2, progress=False)
    assert [s for s, _ in seen] == list(range(12))
    assert seen[0][1] == ["library", "rho", "x", "z"]


class Watched(Factors):
    """A classifier that only watches: it learns, and nobody fools it."""

    owners = Adversary.owners

    def __init__(self, registry):
        super().__init__(registry)
        self.classifier = torch.nn.Linear(3, 2)

    def auxiliary(self, batch, sites, step, kl_weight):
        own = torch.nn.functional.cross_entropy(self.classifier(sites["z"]), batch["batch"])
        return {"classify": own}


def test_a_watcher_learns_and_changes_nothing_else(toy_adata):
    """It does not detach z: its gradient must not reach the encoder all the same."""
    watched = Watched.from_anndata(toy_adata, batch_key="batch").fit(6, lr=0.05, progress=False)
    assert watched.history["classify"].iloc[-1] < watched.history["classify"].iloc[0]

    class Blind(Watched):
        def auxiliary(self, batch, sites, step, kl_weight):
            return {"classify": super().auxiliary(batch, sites, step, kl_weight)["classify"] * 0}

    blind = Blind.from_anndata(toy_adata, batch_key="batch").fit(6, lr=0.05, progress=False)
    for name, value in watched.state_dict().items():
        assert torch.equal(value, blind.state_dict()[name]) != is_own(name), name


def test_an_unowned_objective_moves_what_it_depends_on(toy_adata):
    class Classified(Factors):
        def __init__(self, registry):
            super().__init__(registry)
            self.classifier = torch.nn.Linear(3, 2)

        def auxiliary(self, batch, sites, step, kl_weight):
            return {"entropy": torch.nn.functional.cross_entropy(self.classifier(sites["z"]), batch["batch"])}

    model = Classified.from_anndata(toy_adata, batch_key="batch")
    start = model.classifier.weight.detach().clone()
    model.fit(6, lr=0.05, progress=False)
    assert not torch.equal(model.classifier.weight, start)
    assert model.history["entropy"].iloc[-1] < model.history["entropy"].iloc[0]


def test_the_mixture_is_enumerated(toy_adata):
    model = Mixture.from_anndata(toy_adata, batch_key="batch").fit(3, progress=False)
    kinds = model.posterior("kind")["kind"]
    assert kinds.shape == (200, 2)
    np.testing.assert_allclose(kinds.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("cls", CASES)
def test_checkpoints_hold_the_adversary_s_optimiser(toy_adata, tmp_path, cls):
    def make():
        return cls.from_anndata(toy_adata, batch_key="batch")

    def stop(model, record):
        raise RuntimeError("power cut")

    options = {"checkpoint": tmp_path, "checkpoint_every": 1, "progress": False}
    whole = make().fit(4, progress=False)
    cut = []
    with pytest.raises(RuntimeError, match="power cut"):
        make().fit(4, callbacks=[lambda m, r: cut.append(r) or (len(cut) == 3 and stop(m, r))], **options)
    tensors, record = files.read(tmp_path)
    assert record["epoch"] == 2
    assert {n.split("/")[0] for n in tensors} >= {"model", "optimizer0", "optimizer1"}
    resumed = make().fit(4, resume=True, **options)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    columns = ["loss", "elbo_train", "classify", "fool", "lr"]
    assert whole.history[columns].equals(resumed.history[columns])
