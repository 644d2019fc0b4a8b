"""The runner: what it records, when it ends, what it leaves alone, what it says when the loss is NaN."""

import warnings
from typing import ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from toy import make_adata
from toy_models import Cells, Factors, Rates, TwoSources

import pyrosc
from pyrosc import Model, Plan
from pyrosc.data import Batch, Counts, DataError, Index
from pyrosc.data.inputs import load_batch
from pyrosc.infer.handlers import Anneal
from pyrosc.train import TrainingError
from pyrosc.train import loop as loop_module
from pyrosc.train.heldout import evaluate
from pyrosc.train.plan import kl_weight, learning_rate

# most runs here are too short to converge
pytestmark = pytest.mark.filterwarnings("ignore:the held-out ELBO was still rising")


@pytest.fixture
def model(toy_adata):
    return Factors.from_anndata(toy_adata, batch_key="batch")


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[k], other[k]) for k in one)


def quick(model, epochs=3, **options):
    return model.fit(epochs, progress=False, **{"early_stopping": False} | options)


# -- history --------------------------------------------------------------------------------------------


def test_history(model):
    assert model.history is None
    assert quick(model, 6) is model
    history = model.history
    assert history.index.name == "epoch"
    assert list(history.index) == list(range(6))
    assert list(history) == ["loss", "elbo_train", "elbo_validation", "kl_weight", "lr", "steps", "seconds"]
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    assert history["elbo_train"].iloc[-1] > history["elbo_train"].iloc[0]
    assert (history[["elbo_train", "elbo_validation"]] < 0).all(axis=None)
    assert history["seconds"].is_monotonic_increasing
    assert (history["steps"].diff().dropna() == history["steps"].iloc[0]).all()
    assert not model.training


def test_elbos_are_those_of_get_elbo(model):
    quick(model, 2, warmup=0)
    found = np.mean([model.get_elbo(indices=model.split["main"][1], seed=s) for s in range(20)])
    best = model.history["elbo_validation"].max()
    assert found == pytest.approx(best, abs=0.02 * abs(best))


def test_a_second_fit_goes_on(model):
    quick(model, 3)
    split, first, trained = model.split["main"], model.history.copy(), weights(model)
    quick(model, 2, seed=5)
    np.testing.assert_array_equal(model.split["main"][0], split[0])
    assert list(model.history.index) == list(range(5))
    assert model.history.iloc[:3].equals(first)
    assert not equal(weights(model), trained)


def test_no_held_out_cells(model):
    quick(model, 2, train_size=1)
    assert "elbo_validation" not in model.history
    assert model.n_train == {"main": 200}


@pytest.mark.parametrize("progress", [True, False])
def test_the_bar(model, capsys, progress):
    model.fit(2, progress=progress)
    shown = capsys.readouterr().err
    assert ("Factors" in shown and "held-out -" in shown) == progress


# -- seeds and globals ----------------------------------------------------------------------------------


def test_a_seed_decides_everything(toy_adata):
    def run(seed, fit_seed):
        made = Factors.from_anndata(toy_adata, batch_key="batch", seed=seed)
        torch.rand(3)  # global generators do not matter
        return quick(made, 2, seed=fit_seed)

    one, two = run(0, 0), run(0, 0)
    assert equal(weights(one), weights(two))
    columns = ["loss", "elbo_train", "elbo_validation"]
    assert one.history[columns].equals(two.history[columns])
    assert not equal(weights(one), weights(run(1, 0)))
    assert not equal(weights(one), weights(run(0, 1)))


def test_two_models_do_not_know_of_each_other(toy_adata):
    alone = quick(Factors.from_anndata(toy_adata, batch_key="batch"))
    one, other = (Factors.from_anndata(toy_adata, batch_key="batch", seed=s) for s in (0, 1))
    quick(other, 1)
    quick(one)
    assert equal(weights(one), weights(alone))


@pytest.mark.parametrize("cls", [Factors, Rates], ids=["guide", "auto"])
def test_global_state_is_left_alone(toy_adata, cls):
    keys = {"batch_key": "batch"} if cls is Factors else {}

    def state():
        return (
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
            dict(pyro.get_param_store().items()),
            pyro.settings.get(),
            torch.distributions.Distribution._validate_args,
            torch.is_grad_enabled(),
        )

    before = state()
    made = cls.from_anndata(toy_adata, **keys)
    assert state() == before
    quick(made, 2)
    assert state() == before
    made.posterior("z" if cls is Factors else "rate", n_samples=2)
    made.get_elbo()
    assert state() == before


@pytest.mark.parametrize("on", [True, False])
def test_validation_stays_as_it_was(model, on):
    with pyro.validation_enabled(on):
        quick(model, 1)
        assert pyro.settings.get("validate_distributions_pyro") == on


# -- how long -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (6, 1), (7, 2), (20, 4)])
def test_max_steps(model, steps, epochs):
    model.fit(max_steps=steps, early_stopping=False, progress=False)  # 6 steps per epoch
    assert model.history["steps"].iloc[-1] == steps
    assert len(model.history) == epochs
    assert model.history["kl_weight"].iloc[-1] == 1


def test_the_first_limit_ends_the_run(model):
    model.fit(2, max_steps=100, early_stopping=False, progress=False)
    assert len(model.history) == 2
    model.fit(5, max_steps=3, early_stopping=False, progress=False)
    assert len(model.history) == 3


def test_max_time(model):
    model.fit(max_time=0.5, progress=False, early_stopping=False)
    history = model.history
    assert 0.5 <= history["seconds"].iloc[-1] < 5
    assert history["kl_weight"].iloc[-1] == 1
    assert history["lr"].iloc[-1] < 0.2 * history["lr"].max()


def test_the_plan_counts_in_steps():
    plan = Plan(steps=3000, min_epochs=10, max_epochs=400)
    assert [plan.epochs(n) for n in (1, 10, 10_000)] == [400, 300, 10]


def test_a_plan_s_defaults_are_taken(toy_adata):
    made = type(
        "Short", (Factors,), {"plan": Plan(steps=9, min_epochs=1, batch_size=60, early_stopping=False)}
    )
    model = made.from_anndata(toy_adata, batch_key="batch").fit(progress=False)
    assert model.history["steps"].tolist() == [3, 6, 9]


# -- which cells ----------------------------------------------------------------------------------------


def test_given_rows(model):
    train = np.arange(0, 200, 2)
    quick(model, 1, train_indices=train)
    np.testing.assert_array_equal(model.split["main"][0], train)
    np.testing.assert_array_equal(model.split["main"][1], train + 1)
    quick(model, 1, train_indices=[5, 3, 3, 4] * 3, validation_indices=[8, 9])
    assert model.split["main"][0].tolist() == [3, 4, 5]
    assert model.n_train == {"main": 3}
    quick(model, 1, validation_indices=np.arange(200) < 10)
    assert model.split["main"][0].tolist() == list(range(10, 200))


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (
            {"train_indices": [1, 2], "validation_indices": [2, 3]},
            ValueError,
            "1 cells both train .* 'cell_2'",
        ),
        ({"train_indices": []}, ValueError, "no cell of 'main' trains"),
        ({"train_indices": [200]}, IndexError, "200 cells"),
        ({"train_indices": ["cell_1"]}, TypeError, "positions or a boolean mask"),
        ({"train_size": 2.0}, ValueError, "share in"),
    ],
)
def test_rows_that_cannot_be(model, rows, error, message):
    with pytest.raises(error, match=message):
        quick(model, 1, **rows)


def test_held_out_cells_do_not_train(toy_adata):
    changed = toy_adata.copy()
    held_out = np.arange(20)
    x = changed.X.toarray()
    x[held_out] = x[held_out][:, ::-1]
    changed.X = x
    first, second = (
        quick(Factors.from_anndata(a, batch_key="batch"), 2, validation_indices=held_out)
        for a in (toy_adata, changed)
    )
    assert first.history["loss"].tolist() == pytest.approx(second.history["loss"].tolist(), rel=1e-6)
    assert first.history["elbo_validation"].tolist() != second.history["elbo_validation"].tolist()


# -- schedules ------------------------------------------------------------------------------------------


def test_the_weight_of_the_kl_rises_to_one(model, monkeypatch):
    seen = []

    class Spy(Anneal):
        def __init__(self, weight, sites=None):
            seen.append((weight, sites))
            super().__init__(weight, sites)

    monkeypatch.setattr("pyrosc.models.objective.Anneal", Spy)
    quick(model, 5, warmup=0.5)  # 30 steps
    given = [w for w, _ in seen]
    assert given == pytest.approx([(i + 1) / 15 for i in range(14)])
    assert {s for _, s in seen} == {("z",)}
    assert model.history["kl_weight"].tolist() == pytest.approx([0.4, 0.8, 1, 1, 1])


@pytest.mark.parametrize("warmup", [0, 0.3, 1.0])
def test_the_weight_ends_at_one(warmup):
    given = [kl_weight(warmup, p) for p in np.linspace(0, 1, 50)]
    assert given == sorted(given)
    assert given[-1] == 1
    assert given[0] == (0 if warmup else 1)


def test_the_learning_rate_rises_and_falls():
    rates = np.array([learning_rate("one_cycle", 2.0, 0.3, p) for p in np.linspace(0, 1, 101)])
    assert rates.argmax() == 30
    assert rates[30] == pytest.approx(2)
    assert rates[0] == pytest.approx(2 / 25)
    assert rates[-1] == pytest.approx(2e-3)
    assert (np.diff(rates[:31]) > 0).all()
    assert (np.diff(rates[30:]) < 0).all()
    assert learning_rate("one_cycle", 2.0, 0.3, 1.5) == pytest.approx(2e-3)


@pytest.mark.parametrize("rise", [0.0, 1.0])
def test_a_cycle_may_only_rise_or_fall(rise):
    rates = [learning_rate("one_cycle", 1.0, rise, p) for p in np.linspace(0, 1, 11)]
    assert np.isfinite(rates).all()
    assert rates[0 if rise == 0 else -1] == pytest.approx(1)


def test_a_constant_learning_rate(model):
    quick(model, 3, schedule="constant", lr=0.003)
    assert model.history["lr"].tolist() == [0.003] * 3


def test_an_unknown_schedule(model):
    with pytest.raises(ValueError, match="'one_cycle' or 'constant', not 'linear'"):
        quick(model, 1, schedule="linear")


def test_clipping_bounds_a_step(toy_adata):
    def moved(clip):
        made = Factors.from_anndata(toy_adata, batch_key="batch")
        before = made.loadings.weight.clone()
        # with a large eps Adam's step grows with the gradient
        made.fit(max_steps=1, train_size=1, clip=clip, eps=1e6, lr=1.0, schedule="constant", progress=False)
        return (made.loadings.weight - before).norm()

    assert moved(1e-3) < 1e-2 * moved(None)


# -- early stopping, callbacks, interruptions -------------------------------------------------------------


def test_the_best_weights_after_the_warm_up_are_kept(model):
    model.fit(40, lr=0.3, schedule="constant", warmup=0.1, patience=3, progress=False)
    history = model.history
    assert len(history) < 40
    eligible = history.loc[history["kl_weight"] == 1, "elbo_validation"]
    assert eligible.idxmax() == history.index[-1] - 3
    rows = {"main": model.split["main"][1]}
    assert evaluate(model, rows, seed=0) == pytest.approx(eligible.max(), rel=1e-6)


def test_best_weights_are_kept_without_early_stopping(model):
    model.fit(12, lr=0.3, schedule="constant", warmup=0.1, early_stopping=False, progress=False)
    assert len(model.history) == 12
    best = model.history.loc[model.history["kl_weight"] == 1, "elbo_validation"].max()
    assert evaluate(model, {"main": model.split["main"][1]}, seed=0) == pytest.approx(best, rel=1e-6)


def test_evaluation_is_without_dropout_and_repeats(model):
    rows = {"main": np.arange(50)}
    model.train()
    assert evaluate(model, rows) == evaluate(model, rows)
    assert model.training
    assert evaluate(model, rows) == pytest.approx(evaluate(model, rows, batch_size=50))


def test_a_callback_sees_each_epoch_and_may_end_it(model):
    seen = []

    def stop(given, record):
        assert given is model
        seen.append(record["epoch"])
        return len(seen) == 2

    also = []
    model.fit(9, callbacks=[stop, lambda m, r: also.append(r["loss"])], progress=False)
    assert seen == [0, 1]
    assert len(also) == len(model.history) == 2


@pytest.mark.parametrize("where", ["callback", "step"])
def test_an_interrupted_model_is_usable(model, where, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    options = {}
    if where == "callback":
        options["callbacks"] = [lambda m, r: interrupt() if r["epoch"] == 1 else None]
    else:
        step, taken = loop_module.Optimizers.step, []

        def late(self, *given):
            taken.append(1)
            if len(taken) == 9:
                interrupt()
            step(self, *given)

        monkeypatch.setattr(loop_module.Optimizers, "step", late)
    with pytest.warns(UserWarning, match="was interrupted in epoch .*; the model is usable") as found:
        model.fit(5, progress=False, **options)
    assert found[0].filename == __file__
    assert len(model.history) == (2 if where == "callback" else 1)
    assert not model.training
    z = model.get_latent_representation()
    model.save(tmp_path / "model")
    np.testing.assert_array_equal(
        Factors.load(tmp_path / "model", model.datasets["main"].data).get_latent_representation(),
        z,
    )
    monkeypatch.undo()
    quick(model, 1)


def test_the_user_is_told_when_the_elbo_still_rises(model):
    with pytest.warns(
        UserWarning, match=r"still rising at the end .*train longer: fit\(max_epochs=16\)"
    ) as found:
        model.fit(8, lr=1e-2, schedule="constant", warmup=0.1, progress=False)
    assert found[0].filename == __file__


def test_a_converged_run_is_not_warned_about(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(20, lr=1e-7, warmup=0.1, early_stopping=False, progress=False)


def test_a_device_that_is_not_there(model):
    with pytest.raises(RuntimeError):
        quick(model, 1, device="nonsense")


@pytest.mark.gpu
def test_training_on_a_gpu(toy_adata):
    model = quick(Factors.from_anndata(toy_adata, batch_key="batch"), device="cuda")
    assert model.device.type == "cuda"
    on_cpu = quick(Factors.from_anndata(toy_adata, batch_key="batch"), device="cpu")
    assert model.history["elbo_validation"].iloc[-1] == pytest.approx(
        on_cpu.history["elbo_validation"].iloc[-1], rel=0.05
    )


# -- a loss that is not a number --------------------------------------------------------------------------


class Breaks(Factors):
    """Factors whose rates turn NaN, for one gene or all, when told."""

    broken = False

    def model(self, x: Counts, batch: Batch):
        with self.cells(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.n_latent), 1.0).to_event(1))
            rate = self.loadings(z).exp()
            if self.broken:
                rate = (rate - 1e6).log()
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)


@pytest.mark.parametrize("validate", [True, False])
def test_a_loss_that_turns_nan(toy_adata, validate):
    model = Breaks.from_anndata(toy_adata)
    kept = {}

    def after(given, record):
        if record["epoch"] == 1:
            kept.update(weights(given))
            given.broken = True

    message = (
        r"not finite \(epoch 3, step 13\): .*site 'x' of the model .*in 32 cells .*last good epoch are kept"
    )
    with pyro.validation_enabled(validate), pytest.raises(TrainingError, match=message):
        quick(model, 5, callbacks=[after])
    assert equal(weights(model), kept)
    assert len(model.history) == 2
    model.broken = False
    assert np.isfinite(model.get_elbo())


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("cells", [["cell_4"], ["cell_4", "cell_77"]])
def test_the_cells_are_named(toy_adata, cells, validate):
    toy_adata.obs["age"] = toy_adata.obs["age"].abs()
    toy_adata.obs.loc[cells, "age"] = -1.0
    model = Rates.from_anndata(toy_adata, continuous_covariate_keys=["age"], standardize=False)
    before = weights(model)
    named = "|".join(cells)
    message = rf"log-density of site 'x' of the model is not finite in \d cells \(first: '({named})'"
    with pyro.validation_enabled(validate), pytest.raises(TrainingError, match=message):
        model.fit(3, batch_size=300, train_size=1, progress=False)
    assert equal(weights(model), before)


def test_a_held_out_cell_without_a_density_is_named(toy_adata):
    toy_adata.obs["age"] = toy_adata.obs["age"].abs()
    toy_adata.obs.loc["cell_4", "age"] = -1.0
    model = Rates.from_anndata(toy_adata, continuous_covariate_keys=["age"], standardize=False)
    with pytest.raises(TrainingError, match=r"held-out cells.*site 'x' .*in 1 cells \(first: 'cell_4'\)"):
        model.fit(3, validation_indices=np.arange(10), progress=False)


class SteepDensity(Model):
    """A finite loss whose gradient becomes NaN: the square root at zero."""

    steep = False

    def __init__(self, registry):
        super().__init__(registry)
        self.log_rate = torch.nn.Parameter(torch.zeros(registry.n_vars()))

    def model(self, x: Counts):
        extra = (self.log_rate * 0).sqrt() if self.steep else 0.0
        with self.cells(x):
            pyro.sample("x", dist.Poisson((self.log_rate + extra).exp()).to_event(1), obs=x)


@pytest.mark.parametrize("last", [True, False])
def test_weights_that_turn_nan_in_the_last_step_of_an_epoch(toy_adata, last):
    model = SteepDensity.from_anndata(toy_adata)
    kept = {}

    def after(given, record):
        kept.update(weights(given))
        given.steep = True

    message = r"the parameters 'log_rate' are no longer finite"
    with pytest.raises(TrainingError, match=message):
        model.fit(2 if last else 3, batch_size=300, callbacks=[after], progress=False)
    assert equal(weights(model), kept)
    assert torch.isfinite(model.log_rate).all()


# -- parameters of single cells ---------------------------------------------------------------------------


def test_only_the_cells_of_a_minibatch_move(toy_adata):
    model = Cells.from_anndata(toy_adata)
    for _ in range(2):  # the second step has momentum from the first
        before = model.table.rows.detach().clone()
        model.fit(max_steps=1, batch_size=10, schedule="constant", progress=False)
        moved = (model.table.rows != before).any(1)
        assert moved.sum() == 10


def test_only_the_cells_of_a_minibatch_move_in_each_source(two):
    def law(x: Counts(source="seq"), y: Counts(source="spatial")):
        for source, counts in {"seq": x, "spatial": y}.items():
            with pyrosc.cells(counts, source=source):
                size = pyro.sample(f"size_{source}", dist.Normal(0.0, 1.0))
                rate = size.exp().unsqueeze(-1).expand_as(counts)
                pyro.sample(source, dist.Poisson(rate).to_event(1), obs=counts)

    model = pyrosc.auto(law, AutoNormal).from_anndatas(two)
    before = weights(model)
    model.fit(max_steps=1, batch_size=10, progress=False)
    for source, n in (("seq", 150), ("spatial", 60)):
        names = [k for k, v in before.items() if v.shape == (n,) and f"size_{source}" in k]
        assert len(names) == 2
        assert all((weights(model)[k] != before[k]).sum() == 10 for k in names)


class Seen(Cells):
    """Keeps the cells of its last minibatch."""

    def model(self, x: Counts, cell: Index):
        self.seen = cell.clone()
        super().model(x, cell)


def test_rows_stay_while_others_move(toy_adata):
    model = Seen.from_anndata(toy_adata)
    snapshots = []
    step = loop_module.Optimizers.step

    def watch(self, *given):
        before = model.table.rows.detach().clone()
        step(self, *given)
        moved = (model.table.rows.detach() != before).any(1)
        snapshots.append((set(model.seen.tolist()), set(moved.nonzero()[:, 0].tolist())))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module.Optimizers, "step", watch)
        quick(model, 2)
    assert len(snapshots) == 14
    assert all(moved == rows for rows, moved in snapshots)


def test_cells_with_rows_of_their_own_all_train(toy_adata):
    model = quick(Cells.from_anndata(toy_adata), 4)
    assert "elbo_validation" not in model.history
    assert model.n_train == {"main": 200}
    assert model.history["loss"].iloc[-1] < model.history["loss"].iloc[0]
    chosen = np.array([7, 150, 3])
    found = model.posterior("u", adata=toy_adata[chosen].copy())["u"]
    np.testing.assert_array_equal(found, model.table.rows.detach().numpy()[chosen])


@pytest.mark.parametrize("option", [{"train_size": 0.5}, {"train_indices": [1]}, {"validation_indices": [1]}])
def test_such_cells_cannot_be_held_out(toy_adata, option):
    with pytest.raises(ValueError, match=r"parameters of its own for each cell.*leave out train_size"):
        quick(Cells.from_anndata(toy_adata), 1, **option)


def test_other_cells_have_no_rows(toy_adata):
    model = Cells.from_anndata(toy_adata)
    other = make_adata(20, seed=3)
    other.obs_names = [f"new_{i}" for i in range(20)]
    with pytest.raises(DataError, match=r"knows nothing of 'new_0', 'new_1', .* and 15 more"):
        model.posterior("u", adata=other)


def test_an_autoguide_with_rows_per_cell(toy_adata):
    def law(x: Counts):
        with pyrosc.cells(x):
            size = pyro.sample("size", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(size.exp().unsqueeze(-1)).expand([len(x), 40]).to_event(1), obs=x)

    model = pyrosc.auto(law, AutoNormal).from_anndata(toy_adata)
    assert model.per_cell_guide
    names = [n for n, p in model.named_parameters() if p.shape == (200,)]
    assert len(names) == 2
    before = weights(model)
    model.fit(max_steps=1, batch_size=10, progress=False)
    for name in names:
        assert (weights(model)[name] != before[name]).sum() == 10
    assert "elbo_validation" not in model.history


# -- several sources --------------------------------------------------------------------------------------


@pytest.fixture
def two():
    seq, spatial = make_adata(150, 30), make_adata(60, 12, seed=1)
    return {"seq": seq, "spatial": spatial}


def test_two_sources(two):
    model = quick(TwoSources.from_anndatas(two), 6)
    assert model.n_train == {"seq": 135, "spatial": 54}
    history = model.history
    assert history["elbo_validation"].iloc[-1] > history["elbo_validation"].iloc[0]
    assert history["steps"].iloc[0] == 5  # the longer source decides: ceil(135 / 32)
    for source, n in (("seq", 150), ("spatial", 60)):
        site = f"z_{source}"
        found = model.posterior(site, source=source, indices=[5, 1])[site]
        np.testing.assert_allclose(found, model.posterior(site, source=source)[site][[5, 1]], atol=1e-6)
        assert model.posterior(site, source=source)[site].shape == (n, 3)
        other = model.posterior(site, adata=two[source][:4].copy(), source=source)[site]
        np.testing.assert_allclose(other, model.posterior(site, source=source)[site][:4], atol=1e-6)


def test_the_loss_of_two_sources_is_per_cell(two):
    model = TwoSources.from_anndatas(two)
    rows = {s: np.arange(a.n_obs) for s, a in two.items()}
    batch = load_batch(model.datasets, rows, model.device)
    with model.minibatch(batch), torch.no_grad():
        torch.manual_seed(0)
        total = model.elbo.differentiable_loss(model.model, model.guide, **model.inputs(batch))
        torch.manual_seed(0)
        assert model(batch) == pytest.approx(float(total) / 210)


def test_sources_must_be_named(two):
    with pytest.raises(TypeError, match=r"reads the sources \['seq', 'spatial'\]; got \['seq'\]"):
        TwoSources.from_anndatas({"seq": two["seq"]})
    with pytest.raises(ValueError, match="one data source"):
        quick(TwoSources.from_anndatas(two), 1, train_indices=[1])


def test_a_source_with_too_few_cells_to_hold_out(two):
    two["spatial"] = two["spatial"][:4].copy()
    model = quick(TwoSources.from_anndatas(two), 1)
    assert "elbo_validation" not in model.history
    assert np.isfinite(model.history["elbo_train"]).all()


# -- options ----------------------------------------------------------------------------------------------


def test_a_model_without_parameters(toy_adata):
    def law(x: Counts):
        with pyrosc.cells(x):
            pyro.sample("x", dist.Poisson(1.0).expand([len(x), 40]).to_event(1), obs=x)

    with pytest.raises(ValueError, match="law has no parameter to train"):
        pyrosc.auto(law).from_anndata(toy_adata).fit(1, progress=False)


def test_a_model_without_data(model, tmp_path):
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="was loaded without data"):
        Factors.load(tmp_path / "model").fit(1)


def test_learning_rates_by_submodule(toy_adata):
    """A factor of 0 leaves a submodule where it is; others move as without it."""

    class Held(Factors):
        rates: ClassVar = {"loadings": 0.0}

    model = Held.from_anndata(toy_adata, batch_key="batch")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    quick(model, 2)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert any(k.startswith("encoder") for k in moved)
    assert not any(k.startswith("loadings") for k in moved)
