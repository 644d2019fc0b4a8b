"""A run that was killed and resumed ends with exactly the weights of one that was not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import make_adata
from toy_models import Cells, Factors

from pyrosc.train import checkpoint as files

pytestmark = pytest.mark.filterwarnings("ignore:the held-out ELBO was still rising")

EPOCHS = 5

# Trains in a process of its own and kills itself without warning: in the middle of an epoch, half-way
# through writing a checkpoint, or between writing it and putting it in its place.
SCRIPT = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from toy import make_adata
from toy_models import Factors
from pyrosc.train import checkpoint, loop

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

taken = []
def after(count, function, act):
    def counted(*args, **kwargs):
        taken.append(1)
        return act(*args) if len(taken) == count else function(*args, **kwargs)
    return counted

def half(tensors, path, **_):
    path.write_bytes(b"half a checkpoint")
    die()

def run(folder, moment, epochs):
    if moment == "step":
        loop.Optimizers.step = after(21, loop.Optimizers.step, die)  # 6 steps per epoch
    elif moment == "write":
        checkpoint.save_file = after(4, checkpoint.save_file, half)
    elif moment == "replace":
        os.replace = after(4, os.replace, die)
    model = Factors.from_anndata(make_adata(), batch_key="batch")
    model.fit(epochs, checkpoint=folder, checkpoint_every=1, progress=False)

folder, epochs, *moments = sys.argv[1:]
Factors.from_anndata(make_adata(), batch_key="batch").fit(1, progress=False)  # lazy imports, once for all
for moment in moments:
    child = os.fork()
    if not child:
        run(os.path.join(folder, moment), moment, int(epochs))
        os._exit(0)
    print(moment, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
MOMENTS = ("step", "write", "replace")


def make():
    return Factors.from_anndata(make_adata(), batch_key="batch")


def same(one, other):
    return all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())


@pytest.fixture(scope="module")
def whole():
    return make().fit(EPOCHS, progress=False)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folder of what each killed process left behind."""
    folder = tmp_path_factory.mktemp("killed")
    roots = [Path(__file__).resolve().parents[1], Path(__file__).resolve().parents[2]]
    path = os.pathsep.join([*map(str, roots), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(EPOCHS), *MOMENTS],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.split() == [w for m in MOMENTS for w in (m, str(-signal.SIGKILL))], done.stderr
    return folder


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed(killed, whole, moment):
    folder = killed / moment
    left = sorted(p.name for p in folder.iterdir())
    assert len(left) == (1 if moment == "step" else 2), left
    assert files.read(folder)[1]["epoch"] == 3
    resumed = make().fit(EPOCHS, checkpoint=folder, checkpoint_every=1, resume=True, progress=False)
    assert same(whole, resumed)
    assert list(resumed.history.index) == list(range(EPOCHS))
    columns = ["loss", "elbo_train", "elbo_validation", "kl_weight", "lr", "steps"]
    assert whole.history[columns].equals(resumed.history[columns])


class PowerCut(Exception):
    pass


def cut_at(epoch):
    def callback(model, record):
        if record["epoch"] == epoch:
            raise PowerCut

    return callback


def interrupted(model, folder, epoch=2, epochs=EPOCHS, **options):
    with pytest.raises(PowerCut):
        model.fit(
            epochs,
            checkpoint=folder,
            checkpoint_every=1,
            progress=False,
            callbacks=[cut_at(epoch)],
            **options,
        )


def test_the_best_weights_are_resumed_too(tmp_path):
    options = {"lr": 0.3, "schedule": "constant", "warmup": 0.05, "patience": 4}
    whole = make().fit(30, progress=False, **options)
    n = len(whole.history)
    assert n < 30
    interrupted(make(), tmp_path, epoch=n - 2, epochs=30, **options)
    resumed = make().fit(30, checkpoint=tmp_path, resume=True, progress=False, **options)
    assert len(resumed.history) == n
    assert same(whole, resumed)


def test_parameters_of_single_cells_resume(tmp_path):
    def cells():
        return Cells.from_anndata(make_adata())

    whole = cells().fit(EPOCHS, progress=False)
    interrupted(cells(), tmp_path)
    assert same(whole, cells().fit(EPOCHS, checkpoint=tmp_path, resume=True, progress=False))


def test_a_second_fit_resumes(tmp_path):
    def trained():
        return make().fit(2, progress=False)

    whole = trained().fit(EPOCHS, progress=False)
    interrupted(trained(), tmp_path, epoch=4)
    resumed = trained().fit(EPOCHS, checkpoint=tmp_path, resume=True, progress=False)
    assert same(whole, resumed)
    assert list(resumed.history.index) == list(range(2 + EPOCHS))


def test_a_finished_run_stays_finished(tmp_path, whole):
    options = {"checkpoint": tmp_path, "checkpoint_every": 1, "progress": False}
    make().fit(EPOCHS, **options)
    again = make().fit(EPOCHS, resume=True, **options)
    assert same(whole, again)
    assert len(again.history) == EPOCHS


def test_resuming_where_nothing_is_starts(tmp_path, whole):
    started = make().fit(EPOCHS, checkpoint=tmp_path / "new", resume=True, progress=False)
    assert same(whole, started)


def test_options_that_are_tuples_resume(tmp_path):
    def wide():
        return Factors.from_anndata(make_adata(), batch_key="batch", widths=(8, 8))

    interrupted(wide(), tmp_path)
    wide().fit(EPOCHS, checkpoint=tmp_path, resume=True, progress=False)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"seed": 1}, "seed"),
        ({"max_epochs": 9}, "epochs"),
        ({"lr": 0.5}, "lr"),
        ({"batch_size": 64}, "batch_size"),
        ({"warmup": 0.9}, "warmup"),
        ({"betas": (0.5, 0.9)}, "betas"),
        ({"max_steps": 20}, "max_steps"),
        ({"train_size": 0.5}, "n_train|train_size"),
        ({"train_indices": list(range(180))}, "split"),
    ],
)
def test_other_arguments_are_refused(tmp_path, change, what):
    interrupted(make(), tmp_path)
    options = {"max_epochs": EPOCHS, "checkpoint": tmp_path, "resume": True, "progress": False} | change
    with pytest.raises(
        ValueError, match=f"of another run: its '?({what})'? is .*the arguments it was started with"
    ):
        make().fit(**options)


def test_another_model_is_refused(tmp_path):
    interrupted(make(), tmp_path)
    options = {"checkpoint": tmp_path, "resume": True, "progress": False}
    with pytest.raises(ValueError, match="another run: its config"):
        Factors.from_anndata(make_adata(), batch_key="batch", n_latent=2).fit(EPOCHS, **options)
    with pytest.raises(ValueError, match="another run: its class is 'Factors', here it is 'Cells'"):
        Cells.from_anndata(make_adata()).fit(EPOCHS, **options)


def test_other_data_are_refused(tmp_path):
    interrupted(make(), tmp_path)
    other = Factors.from_anndata(make_adata(seed=1), batch_key="batch")
    with pytest.raises(ValueError, match="another run: its data"):
        other.fit(EPOCHS, checkpoint=tmp_path, resume=True, progress=False)


def test_a_checkpoint_is_not_overwritten_by_accident(tmp_path):
    interrupted(make(), tmp_path)
    with pytest.raises(FileExistsError, match="holds a checkpoint; pass resume=True"):
        make().fit(EPOCHS, checkpoint=tmp_path, progress=False)


def test_resuming_needs_a_folder():
    with pytest.raises(ValueError, match="resume=True needs checkpoint="):
        make().fit(1, resume=True, progress=False)


def test_checkpoints_come_every_few_epochs(tmp_path):
    seen = []

    def look(model, record):
        seen.append(files.read(tmp_path)[1]["epoch"] if files.exists(tmp_path) else 0)

    make().fit(
        6, checkpoint=tmp_path, checkpoint_every=2, early_stopping=False, callbacks=[look], progress=False
    )
    assert seen == [0, 0, 2, 2, 4, 4]
    assert files.read(tmp_path)[1]["epoch"] == 6


def test_a_checkpoint_holds_no_pickle(tmp_path):
    interrupted(make(), tmp_path)
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"]
