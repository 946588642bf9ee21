"""Whose checkpoint is it: data, weights, code and values that make a training another one, and what cannot be told apart."""

import functools
import importlib
import random
import subprocess
import sys
import textwrap
import types

import numpy as np
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


class With(TopKSAE):
    """An SAE with an attribute that its forward may use."""

    def __init__(self, *args, k, **attributes):
        super().__init__(*args, k=k)
        for name, value in attributes.items():
            setattr(self, name, value)


def changed(**attributes):
    return lambda: new(cls=functools.partial(With, **attributes))


def hooked(factor):
    sae = new()
    sae.register_forward_hook(lambda module, args, out: out.x_hat.mul_(factor) and None if factor == 0 else None)
    return sae


def frozen(yes):
    sae = new()
    sae.b_dec.requires_grad_(not yes)
    return sae


def with_forward(factor):
    sae = new()
    sae.forward = lambda x, grad=None: TopKSAE.forward(sae, factor * x, grad)
    return sae


class Listed(list):
    pass


def listed(factor):
    made = Listed([1])
    made.factor = factor
    return made


@pytest.mark.parametrize(
    "one, other",
    [
        *((changed(v=make(1.0)), changed(v=make(2.0))) for make in (
            lambda v: [v], lambda v: (v,), lambda v: {"a": v}, torch.tensor, np.array, listed,
            lambda v: types.SimpleNamespace(a=v), lambda v: lambda: v,
        )),
        (changed(_v=1.0), changed(_v=2.0)),
        (lambda: hooked(1), lambda: hooked(2)),
        (lambda: frozen(False), lambda: frozen(True)),
        (lambda: with_forward(1), lambda: with_forward(2)),
    ],
    ids=["list", "tuple", "dict", "tensor", "array", "list subclass", "namespace", "function", "private", "hook", "frozen", "forward"],
)  # fmt: skip
def test_every_attribute_of_an_sae_is_part_of_it(one, other, tmp_path):
    history = run(one(), data(), checkpoint=tmp_path / "training")
    assert history.equals(run(one(), data(), checkpoint=tmp_path / "training"))
    with pytest.raises(ValueError, match="another training. Different: the settings"):
        run(other(), data(), checkpoint=tmp_path / "training")


def test_what_an_objective_reads_elsewhere_is_part_of_it(tmp_path, monkeypatch):
    (tmp_path / "own_module.py").write_text("weight = 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    own_module = importlib.import_module("own_module")

    def with_attribute(sae, batch):
        return {"loss": with_attribute.weight * reconstruction_loss(sae, batch)["loss"]}

    def of_module(sae, batch):
        return {"loss": own_module.weight * reconstruction_loss(sae, batch)["loss"]}

    for objective, holder in ((with_attribute, with_attribute), (of_module, own_module)):
        path = tmp_path / objective.__name__
        holder.weight = 1.0
        run(new(), data(), objective, checkpoint=path)
        holder.weight = 2.0
        with pytest.raises(ValueError, match="another training. Different: the code of the objective"):
            run(new(), data(), objective, checkpoint=path)


class Counting(TopKSAE):
    seen = None

    def forward(self, x, grad=None):
        self.seen = (self.seen or 0) + 1
        return super().forward(x, grad)


class Unsaved(TopKSAE):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x, grad=None):
        self.seen += 1
        return super().forward(x, grad)


class Counted:
    n = 0

    def __repr__(self):
        return "Counted()"

    def __call__(self, sae, batch):
        self.n += 1
        return reconstruction_loss(sae, batch, alpha=1 / self.n)


class Averaged(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, sae, batch):
        terms = reconstruction_loss(sae, batch)
        self.mean.lerp_(terms["fvu"].detach(), 0.1)
        return terms


def counted_in_a_closure():
    n = [0]

    def objective(sae, batch):
        n[0] += 1
        return reconstruction_loss(sae, batch)

    return objective


@pytest.mark.parametrize("cls", [Counting, Unsaved])
def test_an_sae_that_keeps_state_outside_of_its_buffers_cannot_be_resumed_and_says_so(cls, tmp_path):
    with pytest.raises(ValueError, match="checkpoint: the settings changes while it trains.*persistent buffer"):
        run(new(cls=cls), data(), checkpoint=tmp_path / "training")
    assert len(run(new(cls=cls), data())) == 6 and not (tmp_path / "training").exists()


@pytest.mark.parametrize("make", [Counted, Averaged, counted_in_a_closure])
def test_an_objective_that_keeps_state_cannot_be_resumed_and_says_so(make, tmp_path):
    with pytest.raises(ValueError, match="checkpoint: the code of the objective of 'a' changes while it trains"):
        run({"a": (new(), make())}, data(), checkpoint=tmp_path / "training")


def test_an_objective_may_hold_a_language_model(tiny_gpt2, tmp_path):
    def objective(sae, batch):
        return reconstruction_loss(sae, batch) if tiny_gpt2.cfg.d_model else None

    for _ in range(2):
        assert len(run(new(), data(), objective, checkpoint=tmp_path / "training")) == 6


def test_an_objective_may_hold_the_sae_that_it_trains(tmp_path):
    def make():
        sae = new()
        sae.both = [sae.W_enc, sae.W_dec]
        return sae, lambda _, batch: reconstruction_loss(sae, batch)

    histories = [
        run(*((sae, data(), objective)), checkpoint=tmp_path / "training") for sae, objective in (make(), make())
    ]
    assert histories[0].equals(histories[1])


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


@pytest.mark.parametrize("noise", ["torch", "numpy", "python"])
@pytest.mark.parametrize("form", ["loader", "generator", "list"])
def test_resumed_equals_uninterrupted_with_an_objective_that_draws(noise, form, tmp_path):
    def objective(sae, batch):
        x = batch["x"]
        if noise == "torch":
            x = x + 0.1 * torch.randn_like(x)
        else:
            x = x * (1 + (np.random.rand() if noise == "numpy" else random.random()))
        return reconstruction_loss(sae, {"x": x})

    def batches():
        if form == "loader":
            return DataLoader(TensorDataset(torch.cat(data())), batch_size=32, shuffle=True)
        return (torch.randn(32, 8) for _ in range(100)) if form == "generator" else data()

    def train_it(sae, stop=None, **more):
        np.random.seed(0)
        random.seed(0)

        made, given = batches(), iter(range(100))

        class Stopping:
            def __iter__(self):
                for batch in made:
                    if next(given) == stop:
                        raise KeyboardInterrupt
                    yield batch

        return run(sae, Stopping(), objective, n_steps=30, **more)

    whole, resumed = new(), new()
    settings = {"checkpoint": tmp_path / "training", "checkpoint_every": 5}
    history = train_it(whole)
    with pytest.raises(KeyboardInterrupt):
        train_it(new(), stop=17, **settings)
    assert history.equals(train_it(resumed, **settings))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))


def test_what_the_training_draws_is_not_what_the_stream_draws():
    drawn = []

    def objective(sae, batch):
        drawn.append((batch["x"], torch.randn_like(batch["x"])))
        return reconstruction_loss(sae, batch)

    run(new(), (torch.randn(32, 8) for _ in range(8)), objective)
    x, noise = torch.cat([x for x, _ in drawn]), torch.cat([noise for _, noise in drawn])
    assert np.intersect1d(x.numpy(), noise.numpy()).size < 10  # by chance
