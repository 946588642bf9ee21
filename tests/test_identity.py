"""Whose checkpoint is it: data, weights, code and values that make a training another one, and what cannot be told apart."""

import functools
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sae_utils import TopKSAE, train
from sae_utils.code import source_hashes
from sae_utils.training import checkpoint
from sae_utils.training.losses import reconstruction_loss

SCALE = 1.0


def data(seed=0):
    return [torch.randn(16, 8, generator=torch.Generator().manual_seed(100 * seed + i)) for i in range(8)]


def new(seed=0, cls=TopKSAE):
    torch.manual_seed(seed)
    return cls(8, 32, k=4)


run = functools.partial(train, n_steps=6, lr=1e-2, progress=False)


def times(factor):
    def objective(sae, batch):
        terms = reconstruction_loss(sae, batch)
        return terms | {"loss": terms["loss"] * factor}

    return objective


def by_global(sae, batch):
    terms = reconstruction_loss(sae, batch)
    return terms | {"loss": terms["loss"] * SCALE}


def with_default(factor):
    return lambda sae, batch, by=factor: {"loss": by * reconstruction_loss(sae, batch)["loss"]}


def class_with(body):
    """A subclass of TopKSAE of the same name and place whose method `select` is this."""
    space = {"TopKSAE": TopKSAE}
    exec(
        f"class Mine(TopKSAE):\n  def select(self, rows, grad):\n    {body}\n    return super().select(rows, grad)",
        space,
    )
    return space["Mine"]


def weighted(sae, batch, weight):
    return {"loss": reconstruction_loss(sae, batch)["loss"] * weight.sum().item()}


lambdas = [lambda sae, batch: {"loss": reconstruction_loss(sae, batch)["loss"] * 2}, lambda sae, batch: {"loss": reconstruction_loss(sae, batch)["loss"] * 3}]  # fmt: skip
bind = functools.partial(functools.partial, weighted)

OTHERS = {  # what differs: (the message's name for it, one training, the other)
    "data": ("the first batch", (new, data, None), (new, lambda: data(1), None)),
    "weights": ("the initial weights", (new, data, None), (lambda: new(1), data, None)),
    "closure": ("the code of the objective", (new, data, times(1.0)), (new, data, times(2.0))),
    "lambda": ("the code of the objective", (new, data, lambdas[0]), (new, data, lambdas[1])),
    "default": ("the code of the objective", (new, data, with_default(1)), (new, data, with_default(2))),
    "tensor": (
        "weight of the objective",
        *((new, data, bind(weight=torch.arange(2000.0).index_fill(0, torch.tensor(1000), v))) for v in (1.0, 2.0)),
    ),
    "module": (
        "'first' in weight of the objective",
        *((new, data, functools.partial(lambda s, b, weight: reconstruction_loss(s, b), weight={"first": new(s)})) for s in (0, 1)),
    ),
    "class": (
        "the class",
        *((functools.partial(new, cls=class_with(body)), data, None) for body in ("rows = 1 * rows", "rows = 2 * rows")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_refuses_another_training_and_says_what_differs(what, tmp_path):
    named, one, other = OTHERS[what]
    named = named.split(" in ")[-1]
    histories = []
    for make, batches, objective in (one, one):
        args = [objective] if objective else []
        histories.append(run(make(), batches(), *args, checkpoint=tmp_path / "training"))
    assert histories[0].equals(histories[1]), "the same training goes on, here from its end"
    make, batches, objective = other
    with pytest.raises(ValueError, match=f"another training. Different: {named}"):
        run(make(), batches(), *([objective] if objective else []), checkpoint=tmp_path / "training")


def test_a_global_that_an_objective_reads_is_part_of_it(tmp_path, monkeypatch):
    run(new(), data(), by_global, checkpoint=tmp_path / "training")
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    with pytest.raises(ValueError, match="another training. Different: the code of the objective"):
        run(new(), data(), by_global, checkpoint=tmp_path / "training")


def test_an_sae_trained_in_the_meantime_is_another_one(tmp_path):
    sae = new()
    run(sae, data(), checkpoint=tmp_path / "training")
    with pytest.raises(ValueError, match="Different: the initial weights; make the SAE anew from the seed"):
        run(sae, data(), checkpoint=tmp_path / "training")


SCRIPT = """
import sys, torch
from sae_utils import TopKSAE, train
from sae_utils.training.losses import reconstruction_loss
{comment}
class Mine(TopKSAE):
    def select(self, rows, grad):
        {docstring}
        return super().select({factor} * rows, grad)
names = {{"relu", "gelu", "tanh", "sigmoid", "silu"}}  # a set of texts has another order in every process
def objective(sae, batch):
    return reconstruction_loss(sae, batch) if "relu" in names and "x" in {{"x", "y", "z"}} else None
torch.manual_seed(0)
x = [torch.randn(16, 8, generator=torch.Generator().manual_seed(i)) for i in range(8)]
history = train(Mine(8, 32, k=4), x[: int(sys.argv[2])], objective, n_steps=6, progress=False, checkpoint=sys.argv[1])
print(len(history))
"""


def test_code_without_source_is_known_again_by_its_meaning_in_another_process(tmp_path):
    def again(factor=1, comment="", docstring=""):
        code = textwrap.dedent(SCRIPT).format(factor=factor, comment=comment, docstring=docstring)
        return subprocess.run([sys.executable, "-c", code, tmp_path / "training", "8"], capture_output=True, text=True)

    assert again().stdout.strip() == "6"
    mended = again(comment="# a comment\n", docstring='"""What it does."""')
    assert mended.returncode == 0 and mended.stdout.strip() == "6", mended.stderr
    assert "another training. Different: the class." in again(factor=2).stderr


class Opaque:
    factor = 2


class Said(Opaque):
    def __init__(self, factor):
        self.factor = factor

    def __repr__(self):
        return f"Said({self.factor})"


def by_object(sae, batch, thing):
    return {"loss": reconstruction_loss(sae, batch)["loss"] * thing.factor}


def test_a_value_without_a_stable_hash_refuses_checkpoints_by_its_name(tmp_path):
    bound, thing = functools.partial(by_object, thing=Opaque()), Opaque()
    for objective, where in [
        (bound, "thing of the objective of 'a' is of type Opaque"),
        (lambda sae, batch: by_object(sae, batch, thing), "'thing' in .*lambda.* is of type Opaque"),
    ]:
        with pytest.raises(ValueError, match=f"checkpoint: {where}.*__repr__.*or train without checkpoint"):
            run({"a": (new(), objective)}, data(), checkpoint=tmp_path / "training")
        assert not (tmp_path / "training").exists() and len(run({"a": (new(), objective)}, data())) == 6
    for factor in (2, 2):
        run(new(), data(), functools.partial(by_object, thing=Said(factor)), checkpoint=tmp_path / "training")
    with pytest.raises(ValueError, match="another training. Different: thing of the objective"):
        run(new(), data(), functools.partial(by_object, thing=Said(3)), checkpoint=tmp_path / "training")


@pytest.mark.parametrize("file, anew", [("lab/claims.py", False), ("saes/base.py", True)])
def test_only_sources_that_train_make_a_checkpoint_stale(file, anew, tmp_path, monkeypatch, recwarn):
    run(new(), data(), checkpoint=tmp_path / "training")
    assert file in source_hashes()
    monkeypatch.setattr(checkpoint, "source_hashes", lambda: source_hashes() | {file: "edited"})
    run(new(), data(), checkpoint=tmp_path / "training")
    assert any("made by other sae_utils sources" in str(w.message) for w in recwarn) == anew


def test_a_shuffled_data_loader_goes_on_where_it_was(tmp_path):
    class Stops(DataLoader):
        left = 1000

        def __iter__(self):
            for batch in super().__iter__():
                if not self.left:
                    raise KeyboardInterrupt
                self.left -= 1
                yield batch

    def loader(left=1000):
        made = Stops(TensorDataset(torch.cat(data())), batch_size=16, shuffle=True)
        made.left = left
        return made

    settings = {"n_steps": 30, "checkpoint": tmp_path / "training", "checkpoint_every": 5}
    whole, resumed = new(), new()
    history = run(whole, loader(), n_steps=30)
    with pytest.raises(KeyboardInterrupt):
        run(new(), loader(18), **settings)
    assert history.equals(run(resumed, loader(), **settings))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))
