"""The one runner: every model trains here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from pyrosc.data.errors import warn
from pyrosc.data.loader import cut
from pyrosc.infer.handlers import Record
from pyrosc.train import checkpoint as files
from pyrosc.train.diagnose import TrainingError, culprit, diagnose
from pyrosc.train.heldout import few_of, finite_elbo
from pyrosc.train.history import extended, hint
from pyrosc.train.machine import choose_device, few_threads
from pyrosc.train.minibatches import minibatches
from pyrosc.train.optim import Optimizers
from pyrosc.train.plan import Plan, kl_weight, learning_rate
from pyrosc.train.restarts import fit_restarts
from pyrosc.train.rows import check_annealing, choose_rows

if TYPE_CHECKING:
    from pyrosc.models.base import Model

#: A function of the model and the epoch's record; a true return value ends training.
Callback = Callable[["Model", dict[str, Any]], Any]


def fit(
    model: Model,
    max_epochs: int | None = None,
    *,
    max_steps: int | None = None,
    max_time: float | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    schedule: str | None = None,
    rise: float | None = None,
    warmup: float | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    weight_decay: float | None = None,
    clip: float | None = None,
    train_size: float | None = None,
    train_indices: Sequence[int] | np.ndarray | None = None,
    validation_indices: Sequence[int] | np.ndarray | None = None,
    early_stopping: bool | None = None,
    patience: int | None = None,
    callbacks: Iterable[Callback] = (),
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 5,
    resume: bool = False,
    device: str = "auto",
    n_restarts: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Model:
    """Train a model by stochastic variational inference.

    Arguments left at None are those of the model's `Plan`.

    Parameters
    ----------
    model
        The model; it is changed and returned.
    max_epochs, max_steps, max_time
        Length of the run in epochs, steps or seconds; the first that is reached ends it, and the schedule
        is laid out to end there. Default: `Plan.steps` steps.
    batch_size, lr, schedule, rise, warmup, betas, eps, weight_decay, clip
        See `Plan`.
    train_size
        Share of the cells that train; the others give the held-out ELBO.
    train_indices, validation_indices
        Rows that train and are held out, in place of a random split. With only the first given, all
        other cells are held out.
    early_stopping, patience
        Stop once the held-out ELBO has not risen for `patience` epochs after the warm-up. The weights of
        the best epoch after the warm-up are those kept, in any case.
    callbacks
        Functions of the model and the epoch's record, called after each epoch; a true return ends training.
    checkpoint, checkpoint_every, resume
        Folder, and number of epochs between checkpoints. ``resume=True`` goes on from the one in the
        folder: the run ends with exactly the weights of one that was never interrupted.
    device
        ``"auto"`` (CUDA where there is one, else CPU) or a torch device.
    n_restarts
        Fits from different starting weights, on one split. Kept is the one with the highest marginal
        likelihood of the held-out cells; ``model.restarts`` lists them all. For models with several modes.
    seed
        Of the split, the order of cells and the noise. A second `fit` keeps the split of the first.
    progress
        Whether to show a bar.

    Returns
    -------
    Model
        The model itself. ``history`` has a row per epoch: ``elbo_train`` (on a fixed sample of training
        cells) and ``elbo_validation``, both per cell in nats, at weight 1 and without dropout; ``loss``,
        as minimised; ``kl_weight``, ``lr``, ``steps``, ``seconds``.

    Raises
    ------
    TrainingError
        If the loss is NaN or infinite. The weights of the last good epoch are kept.
    DataError
        If the data were changed since the model was made.
    """
    if n_restarts != 1:
        arguments = {k: v for k, v in locals().items() if k not in ("model", "n_restarts")}
        return fit_restarts(model, n_restarts, arguments)
    chosen: dict[str, Any] = {
        "batch_size": batch_size,
        "lr": lr,
        "schedule": schedule,
        "rise": rise,
        "warmup": warmup,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "clip": clip,
        "train_size": train_size,
        "early_stopping": early_stopping,
        "patience": patience,
    }
    plan = replace(model.plan, **{k: v for k, v in chosen.items() if v is not None})
    if not model.datasets:
        raise ValueError(
            f"{type(model).__name__} was loaded without data; pyrosc.load(path, adata) gives it some"
        )
    for dataset in model.datasets.values():
        dataset.verify()
    model.to(choose_device(device))
    choose_rows(model, plan, train_indices, validation_indices, seed, train_size is not None)
    check_annealing(model, plan)
    run = Run(model, plan, max_epochs, max_steps, max_time, seed)
    if resume and checkpoint is None:
        raise ValueError("resume=True needs checkpoint=, the folder to go on from")
    folder = Path(checkpoint) if checkpoint is not None else None
    if folder is not None and files.exists(folder):
        if not resume:
            raise FileExistsError(
                f"{folder} holds a checkpoint; pass resume=True to go on from it, or name another folder"
            )
        files.restore(run, folder)
    with torch.random.fork_rng(), few_threads(model, plan):
        run.train(list(callbacks), folder, checkpoint_every, progress)
        model.finish()
    return model


class Run:
    """One call of `fit`: what changes while it goes on."""

    def __init__(
        self,
        model: Model,
        plan: Plan,
        max_epochs: int | None,
        max_steps: int | None,
        max_time: float | None,
        seed: int,
    ) -> None:
        self.model, self.plan, self.seed = model, plan, seed
        self.train_rows = {s: rows for s, (rows, _) in model.split.items()}
        self.held_out = {s: rows for s, (_, rows) in model.split.items()}
        per_epoch = max(len(cut(rows, plan.batch_size)) for rows in self.train_rows.values())
        self.epochs = max_epochs if max_epochs is not None else plan.epochs(per_epoch)
        if max_epochs is None and max_steps is not None:
            self.epochs = -(-max_steps // per_epoch)
        if max_epochs is None and max_steps is None and max_time is not None:
            self.epochs = 10**9  # time alone decides
        self.max_steps = min(max_steps or 10**12, self.epochs * per_epoch)
        self.max_time = max_time
        self.optimizers = Optimizers(model, plan)
        self.before = 0 if model.history is None else len(model.history)
        self.records: list[dict[str, Any]] = []
        self.epoch = self.step = 0
        self.elapsed = 0.0
        self.best: float | None = None
        self.best_epoch = -1
        self.best_weights: dict[str, Tensor] | None = None
        self.ended = ""

    # -- the loop -------------------------------------------------------------------------------------

    def train(
        self, callbacks: list[Callback], folder: Path | None, checkpoint_every: int, progress: bool
    ) -> None:
        model = self.model
        good = _weights(model)
        shown = self.epochs if self.epochs < 10**9 else None
        bar = tqdm(
            total=shown, initial=self.epoch, disable=not progress, desc=type(model).__name__, unit="epoch"
        )
        try:
            while self.epoch < self.epochs and not self.ended:
                record = self._epoch()
                good = _weights(model)
                bar.set_postfix_str(_postfix(record), refresh=False)
                bar.update()
                if any([callback(model, record) for callback in callbacks]):
                    self.ended = self.ended or "callback"
                if folder is not None and (self.epoch % checkpoint_every == 0 or self.ended):
                    files.save(self, folder)
        except KeyboardInterrupt:
            self.ended = "interrupted"
            warn(
                f"training was interrupted in epoch {self.epoch + 1}; the model is usable as it stands",
                UserWarning,
            )
        except TrainingError:
            model.load_state_dict(good)
            self.best_weights = None  # the last good epoch stays, as the message says
            raise
        finally:
            bar.close()
            if self.best_weights is not None:
                model.load_state_dict(self.best_weights)
            model.eval()
            model.history = extended(model.history, self.records)
        if self.ended not in ("early", "interrupted", "callback"):
            hint(self.records)

    def _epoch(self) -> dict[str, Any]:
        model, plan = self.model, self.plan
        torch.manual_seed(_mix(self.seed, self.before + self.epoch))
        started, total, n_cells = time.perf_counter(), 0.0, 0
        weight = rate = 0.0
        extra: dict[str, float] = {}
        model.train()
        at = self.before + self.epoch
        for names, batch in minibatches(model, self.train_rows, plan.batch_size, self.seed, at):
            share = self._share(self.elapsed + time.perf_counter() - started)
            weight, rate = (
                kl_weight(plan.warmup, share),
                learning_rate(plan.schedule, plan.lr, plan.rise, share),
            )
            self.optimizers.set_lr(rate)
            n = sum(len(v) for v in names.values())
            total += self._step(batch, names, weight, extra) * n
            n_cells += n
            self.step += 1
            if self.step >= self.max_steps:
                self.ended = "steps"
                break
            if self.max_time is not None and self.elapsed + time.perf_counter() - started >= self.max_time:
                self.ended = "time"
                break
        steps = max(1, self.step - (self.records[-1]["steps"] if self.records else 0))
        record: dict[str, Any] = {"epoch": self.before + self.epoch, "loss": total / max(n_cells, 1)}
        sample, after = few_of(self.train_rows, self.held_out, self.seed), f"after epoch {self.epoch + 1}"
        record["elbo_train"] = finite_elbo(model, sample, self.seed, f"training cells, {after}")
        if all(len(rows) for rows in self.held_out.values()):
            record["elbo_validation"] = finite_elbo(
                model, self.held_out, self.seed, f"held-out cells, {after}"
            )
        record |= {k: v / steps for k, v in extra.items()}
        self.elapsed += time.perf_counter() - started
        record |= {"kl_weight": weight, "lr": rate, "steps": self.step, "seconds": self.elapsed}
        self.records.append(record)
        self.epoch += 1
        self._remember(record, weight)
        return record

    def _step(
        self, batch: dict[str, Tensor], names: dict[str, np.ndarray], weight: float, extra: dict[str, float]
    ) -> float:
        model = self.model
        hooked = type(model).auxiliary is not _base().auxiliary
        record = Record() if hooked else None
        try:
            with pyro.validation_enabled(self.step == 0):
                loss = model.loss(batch, weight, record) if hooked else model(batch, weight)
        except ValueError as error:  # validation refuses parameters that are NaN
            if blame := culprit(model, batch, names):
                raise self._error(batch, names, blame) from error
            raise
        if model.surgery is not None:
            loss = loss + model.surgery.penalty(model) / sum(model.n_train.values())
        owned: dict[str, Tensor] = {}
        if record is not None:
            with model.minibatch(batch):
                terms = model.auxiliary(model.inputs(batch), record.sites, self.step, weight)
            for name, term in terms.items():
                extra[name] = extra.get(name, 0.0) + float(term.detach())
                if name in model.owners:
                    owned[name] = term
                else:
                    loss = loss + term
        value = loss.item()
        if not np.isfinite(value):
            raise self._error(batch, names, culprit(model, batch, names))
        self.optimizers.step(loss, owned)
        return value

    def _error(
        self, batch: dict[str, Tensor], names: dict[str, np.ndarray], blame: str | None
    ) -> TrainingError:
        return diagnose(self.model, batch, names, f"epoch {self.epoch + 1}, step {self.step + 1}", blame)

    def _share(self, seconds: float) -> float:
        by_steps = (self.step + 1) / self.max_steps
        return max(by_steps, seconds / self.max_time) if self.max_time else by_steps

    def _remember(self, record: dict[str, Any], weight: float) -> None:
        value = record.get("elbo_validation")
        if value is None or weight < 1:
            return
        if self.best is None or value > self.best:
            self.best, self.best_epoch, self.best_weights = value, self.epoch, _weights(self.model)
        patience = self.plan.patience or max(5, self.epochs // 10)
        if self.plan.early_stopping and self.epoch - self.best_epoch >= patience:
            self.ended = "early"


def _weights(model: Model) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def _mix(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)


def _postfix(record: dict[str, Any]) -> str:
    parts = [f"train {record['elbo_train']:.1f}"]
    if "elbo_validation" in record:
        parts.append(f"held-out {record['elbo_validation']:.1f}")
    return "ELBO " + ", ".join(parts)


def _base() -> type[Model]:
    from pyrosc.models.base import Model

    return Model
