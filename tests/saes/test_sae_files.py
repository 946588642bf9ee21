import gc
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import kill_me, killed, start_child
from safetensors.torch import load_file, save_file

from sae_utils import FeatureChoiceSAE, TopKSAE, files, load_sae, save_sae
from sae_utils.saes import files as store


@pytest.fixture
def sae():
    """A TopK SAE that has seen training: nothing in it is at its starting value."""
    torch.manual_seed(0)
    sae = TopKSAE(6, 20, k=3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        sae.initialised.fill_(True)
    sae.train()
    sae.dead_after = 12
    for _ in range(3):
        sae(torch.randn(5, 6))
    assert len(set(sae.tokens_since_fired.tolist())) > 2
    return sae


def same(a, b) -> bool:
    """Equal class, arguments and state, bit for bit."""
    a_state, b_state = a.state_dict(), b.state_dict()
    return (
        type(a) is type(b)
        and a.arguments == b.arguments
        and a.dead_after == b.dead_after
        and a_state.keys() == b_state.keys()
        and all(a_state[key].dtype == b_state[key].dtype for key in a_state)
        and all(torch.equal(a_state[key], b_state[key]) for key in a_state)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Our own
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_round_trip(sae, tmp_path, dtype):
    sae.to(dtype)
    assert save_sae(sae, tmp_path / "deep" / "topk") == tmp_path / "deep" / "topk"
    loaded = load_sae(tmp_path / "deep" / "topk")
    assert same(loaded, sae) and loaded.W_dec.dtype == dtype
    assert not loaded.training and loaded.initialised and loaded.tokens_since_fired.max() > 0
    assert loaded.W_enc.stride() == sae.W_enc.stride()  # the layout is part of its speed
    assert loaded.W_enc.requires_grad and sae.training
    x = torch.randn(4, 6, dtype=dtype)
    if dtype != torch.bfloat16:
        assert torch.equal(loaded(x).x_hat, sae.eval()(x).x_hat)


def test_saving_again_gives_the_same_bytes(sae, tmp_path):
    for name in ("a", "b"):
        save_sae(load_sae(save_sae(sae, tmp_path / name, {"hook_name": "h"})), tmp_path / name, {"hook_name": "h"})
    for file in ("cfg.json", "sae_weights.safetensors", "sae_utils_state.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_no_pickle_is_read_or_written(sae, tmp_path, monkeypatch):
    import pickle

    for module, name in ((torch, "load"), (torch, "save"), (pickle, "loads"), (pickle, "load"), (pickle, "dump")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a pickle"))
    load_sae(save_sae(sae, tmp_path / "sae"))
    assert sorted(p.name for p in (tmp_path / "sae").iterdir()) == [
        "cfg.json", "sae_utils_state.safetensors", "sae_weights.safetensors",
    ]  # fmt: skip


def test_saelens_finds_what_it_wants(sae, tmp_path):
    save_sae(sae, tmp_path / "sae", {"model_name": "m", "hook_name": "blocks.1.hook_resid_pre", "context_size": 8})
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    metadata = cfg.pop("metadata")
    assert cfg == {
        "architecture": "topk", "d_in": 6, "d_sae": 20, "dtype": "float32", "device": "cpu", "k": 3,
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
    }  # fmt: skip
    assert int(metadata["sae_lens_version"].split(".")[0]) >= 6
    assert (metadata["model_name"], metadata["hook_name"]) == ("m", "blocks.1.hook_resid_pre")
    assert metadata["context_size"] == 8 and metadata["prepend_bos"] is False
    assert set(metadata["sae_utils"].pop("sha256")) == {p.name for p in (tmp_path / "sae").iterdir()}
    assert metadata["sae_utils"] == {
        "class": "TopKSAE",
        "arguments": {"d_in": 6, "d_sae": 20, "k": 3},
        "dead_after": 12,
    }
    weights = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
    assert shapes == {"W_enc": [6, 20], "b_enc": [20], "W_dec": [20, 6], "b_dec": [6]}
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    x = torch.randn(5, 6)
    expected = saelens_topk(weights, cfg, x)
    torch.testing.assert_close(load_sae(tmp_path / "sae")(x).x_hat, expected)


def test_metadata_cannot_replace_ours(sae, tmp_path):
    save_sae(sae, tmp_path / "sae", {"sae_utils": None, "prepend_bos": True})
    assert same(load_sae(tmp_path / "sae"), sae)
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]["prepend_bos"] is True


# ---------------------------------------------------------------------------------------------------------------------
# SAELens'
# ---------------------------------------------------------------------------------------------------------------------


def saelens_topk(weights, cfg, x):
    """The forward of SAELens' TopKSAE, written from its source (6.54)."""
    W_enc, b_enc, W_dec, b_dec = (weights[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    pre = (x - b_dec * cfg.get("apply_b_dec_to_input", True)) @ W_enc + b_enc
    if rescale := cfg.get("rescale_acts_by_decoder_norm", False):
        pre = pre * W_dec.norm(dim=-1)
    top = pre.topk(cfg.get("k", 100), dim=-1)
    latents = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
    if rescale:
        latents = latents * (1 / W_dec.norm(dim=-1))
    return latents @ W_dec + b_dec


@pytest.fixture
def foreign(tmp_path):
    """Writes a directory as SAELens does, from raw tensors; returns its path and the tensors."""

    def write(architecture="topk", drop=(), weights=None, **cfg):
        generator = torch.Generator().manual_seed(0)
        shapes = {"W_enc": (6, 20), "b_enc": (20,), "W_dec": (20, 6), "b_dec": (6,)}
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | (weights or {})
        cfg = {"d_in": 6, "d_sae": 20, "dtype": "float32", "device": "cuda", "k": 3, "architecture": architecture} | cfg
        cfg |= {"metadata": {"sae_lens_version": "6.54.0", "hook_name": "h"}}
        cfg = {key: value for key, value in cfg.items() if key not in drop}
        path = tmp_path / "saelens"
        path.mkdir(exist_ok=True)
        save_file(
            {name: tensor for name, tensor in tensors.items() if name not in drop}, path / "sae_weights.safetensors"
        )
        (path / "cfg.json").write_text(json.dumps(cfg))
        return path, tensors, cfg

    return write


@pytest.mark.parametrize("centred", [True, False, None])
@pytest.mark.parametrize("rescaled", [True, False, None])
def test_a_directory_of_saelens_is_folded_exactly(foreign, centred, rescaled):
    """Rows of W_dec of any norm; a key left out has SAELens' default."""
    options = {"apply_b_dec_to_input": centred, "rescale_acts_by_decoder_norm": rescaled}
    path, weights, cfg = foreign(**{key: value for key, value in options.items() if value is not None})
    sae = load_sae(path)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    out = sae(x)
    torch.testing.assert_close(out.x_hat, saelens_topk(weights, cfg, x), atol=2e-5, rtol=1e-5)
    assert type(sae) is TopKSAE and sae.k == 3 and not sae.training
    assert sae.initialised and sae.tokens_since_fired.sum() == 0  # train keeps its b_dec
    if centred is not False and not rescaled:
        assert all(torch.equal(sae.get_parameter(name), weights[name]) for name in weights)
    if rescaled:
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(20))


def test_folding_by_hand(foreign):
    """x = (1, 0), b_dec = (2, 0): W_enc = I, b_enc = 0 gives latents (1, 0) where the input is not centred."""
    weights = {"W_enc": torch.eye(2), "W_dec": torch.eye(2), "b_enc": torch.zeros(2), "b_dec": torch.tensor([2.0, 0])}
    path, *_ = foreign(d_in=2, d_sae=2, k=1, apply_b_dec_to_input=False, weights=weights)
    sae = load_sae(path)
    assert sae.b_enc.tolist() == [2, 0]
    assert sae.encode(torch.tensor([[1.0, 0]])).tolist() == [[1, 0]]
    assert sae(torch.tensor([[1.0, 0]])).x_hat.tolist() == [[3, 0]]


def test_k_left_out_is_100_as_in_saelens(foreign):
    weights = {
        "W_enc": torch.ones(2, 120),
        "W_dec": torch.ones(120, 2),
        "b_enc": torch.zeros(120),
        "b_dec": torch.zeros(2),
    }
    path, *_ = foreign(drop=["k"], d_in=2, d_sae=120, weights=weights)
    assert load_sae(path).k == 100


def test_a_gated_one_that_does_not_centre_by_hand(foreign):
    """b_gate moves by b_dec W, b_mag by exp(r_mag) b_dec W: x = 3, b_dec = 2, W = 1, r_mag = ln 2."""
    weights = {"W_enc": [[1.0]], "W_dec": [[1.0]], "b_dec": [2.0], "b_gate": [-1.0], "b_mag": [0.5]}
    weights = {name: torch.tensor(value) for name, value in weights.items()} | {"r_mag": torch.tensor([2.0]).log()}
    path, *_ = foreign("gated", drop=["b_enc"], d_in=1, d_sae=1, apply_b_dec_to_input=False, weights=weights)
    sae = load_sae(path)
    assert (sae.b_gate.item(), sae.b_mag.item()) == pytest.approx((1, 4.5))
    assert sae.encode(torch.tensor([[3.0], [0.5]])).flatten().tolist() == pytest.approx([6.5, 0])


def test_a_threshold_below_zero_does_what_zero_does(foreign):
    weights = {"W_enc": torch.eye(2), "W_dec": torch.eye(2), "b_enc": torch.zeros(2), "b_dec": torch.zeros(2)}
    path, *_ = foreign("jumprelu", d_in=2, d_sae=2, weights=weights | {"threshold": torch.tensor([-1.0, 0.5])})
    assert load_sae(path).encode(torch.tensor([[-0.5, 0.25], [0.25, 0.75]])).tolist() == [[0, 0], [0.25, 0.75]]


def test_saved_again_by_saelens_it_is_read_as_theirs(sae, tmp_path):
    """SAELens keeps our metadata and adds a key of its own; the state it does not know is gone."""
    path = save_sae(sae, tmp_path / "sae", {"hook_name": "blocks.0.attn.hook_z"})
    cfg = json.loads((path / "cfg.json").read_text())
    assert cfg["reshape_activations"] == "hook_z"
    cfg["metadata"]["sae_lens_training_version"] = "6.54.0"
    (path / "cfg.json").write_text(json.dumps(cfg))
    (path / "sae_utils_state.safetensors").unlink()
    x = torch.randn(5, 6)
    assert torch.equal(load_sae(path)(x).x_hat, sae.eval()(x).x_hat)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"architecture": "batchtopk"}, "architecture='batchtopk'"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'"),
        ({"normalize_activations": "expected_average_only_in"}, "fold it into the weights in SAELens"),
        ({"activation_fn_str": "topk"}, "activation_fn_str='topk', an option of SAELens before 6"),
        ({"drop": ["d_sae"]}, "'d_sae' is missing"),
        ({"drop": ["architecture"]}, "'architecture' is missing"),
        ({"drop": ["dtype"]}, "'dtype' is missing"),
        ({"drop": ["W_enc"]}, "tensors W_dec, b_dec, b_enc, not W_enc, b_enc, W_dec, b_dec"),
        ({"dtype": "float31"}, "float31"),
        ({"dtype": "int64"}, "whole SAE"),
        ({"k": 21}, "k=21"),
        ({"k": "3"}, "k='3'"),
        ({"d_in": -6}, "d_in=-6"),
        ({"d_sae": 19}, "size mismatch"),
        ({"weights": {"W_dec": torch.zeros(6, 20)}}, "size mismatch"),
        ({"weights": {"threshold": torch.zeros(20)}}, "tensors .*threshold"),
    ],
)
def test_a_directory_that_does_not_fit(foreign, cfg, message):
    path, *_ = foreign(**cfg)
    with pytest.raises(ValueError, match=message) as error:
        load_sae(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("file", ["sae_weights.safetensors", "sae_utils_state.safetensors", "cfg.json"])
@pytest.mark.parametrize("damage", ["truncated", "half", "empty", "foreign", "list"])
def test_a_damaged_file(sae, tmp_path, file, damage):
    path = save_sae(sae, tmp_path / "sae")
    content = (path / file).read_bytes()
    (path / file).write_bytes(
        {
            "truncated": content[:-3], "half": content[: len(content) // 2], "empty": b"", "foreign": b"\x80\x04K\x2a." * 50,
            "list": b"[1, 2]",
        }[damage]
    )  # fmt: skip
    with pytest.raises(ValueError) as error:
        load_sae(path)
    assert str(path / ("" if damage == "list" and file == "cfg.json" else file)) in str(error.value)


def damages(content: bytes):
    """A bit flipped in each of 40 places, and a tail of zeros."""
    for at in range(0, len(content), max(1, len(content) // 40)):
        yield content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
    yield content[:-16] + bytes(16)


@pytest.mark.parametrize("file", ["sae_weights.safetensors", "sae_utils_state.safetensors", "cfg.json"])
def test_a_flipped_bit_gives_an_error_or_the_very_sae(sae, tmp_path, file):
    path = save_sae(sae, tmp_path / "sae")
    content, refused = (path / file).read_bytes(), 0
    for damaged in damages(content):
        (path / file).write_bytes(damaged)
        try:  # a name or a space in cfg.json may differ
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                assert same(load_sae(path), sae) and file == "cfg.json"
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("key", ["k", "dtype", "architecture", "arguments", "dead_after", "class"])
def test_a_changed_configuration_is_refused(sae, tmp_path, key):
    path = save_sae(sae, tmp_path / "sae")
    cfg = json.loads((path / "cfg.json").read_text())
    cfg["metadata"]["note"] = "what a user adds"
    (path / "cfg.json").write_text(json.dumps(cfg))
    assert same(load_sae(path), sae)
    change = {"k": 4, "dtype": "float64", "architecture": "standard"}
    ours = {"arguments": {"d_in": 6, "d_sae": 20, "k": 4}, "dead_after": 13, "class": "MutualChoiceSAE"}
    cfg |= {key: change[key]} if key in change else {}
    cfg["metadata"]["sae_utils"] |= {key: ours[key]} if key in ours else {}
    (path / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(ValueError, match=f"{path / 'cfg.json'} was damaged or edited"):
        load_sae(path)


def test_a_configuration_that_lost_our_entry_is_not_taken_for_one_of_saelens(sae, tmp_path):
    path = save_sae(sae, tmp_path / "sae")
    (path / "cfg.json").write_text((path / "cfg.json").read_text().replace("sae_utils", "sae_utilr"))
    with pytest.raises(ValueError, match=f"{path} .*cfg.json names no class, .*delete sae_utils_state.safetensors"):
        load_sae(path)


def test_a_directory_of_an_earlier_version_loads_with_a_warning(sae, tmp_path):
    path = save_sae(sae, tmp_path / "sae")
    cfg = json.loads((path / "cfg.json").read_text())
    del cfg["metadata"]["sae_utils"]["sha256"]
    (path / "cfg.json").write_text(json.dumps(cfg))
    with pytest.warns(UserWarning, match=f"{path} was saved without checksums"):
        assert same(load_sae(path), sae)


def test_a_device_that_is_not_there(sae, tmp_path):
    device = next(
        name for name, there in {"cuda": torch.cuda, "mps": torch.backends.mps}.items() if not there.is_available()
    )
    with pytest.raises(ValueError, match=f"device='{device}': this torch sees no"):
        load_sae(save_sae(sae, tmp_path / "sae"), device=device)


@pytest.mark.parametrize(
    "ours", [{"class": "NoSAE", "arguments": {}}, {"class": "TopKSAE", "arguments": {"k": 3}}, "TopKSAE", {}]
)
def test_metadata_that_names_no_class(sae, tmp_path, ours):
    path = save_sae(sae, tmp_path / "sae")
    cfg = json.loads((path / "cfg.json").read_text())
    cfg["metadata"]["sae_utils"] = ours
    cfg["architecture"] = "other"
    (path / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(ValueError) as error:
        load_sae(path)
    assert str(path) in str(error.value)


class Gain(TopKSAE):
    """A subclass that scales its input, and says it or not."""

    said = ("gain",)

    def __init__(self, d_in, d_sae, k, gain=1.0):
        super().__init__(d_in, d_sae, k)
        self.factor = gain

    @property
    def arguments(self):
        return super().arguments | {name: self.factor for name in self.said}


@pytest.mark.parametrize(
    "said, gain, match",
    [
        ((), 3.0, "Gain.arguments .*: 'gain' is missing"),
        (("gain", "other"), 3.0, "Gain.arguments .*unexpected keyword argument 'other'"),
        (("gain",), (3.0,), r"gain=\(3.0,\) does not come back from JSON"),
        (("gain",), torch.tensor(3.0), "gain=tensor.* does not come back from JSON"),
    ],
)
def test_arguments_that_would_make_another_sae_are_refused_before_anything_is_written(
    said, gain, match, tmp_path, monkeypatch
):
    monkeypatch.setattr(Gain, "said", said)
    with pytest.raises(ValueError, match=match):
        save_sae(Gain(6, 20, 3, gain), tmp_path / "sae")
    assert not (tmp_path / "sae").exists()
    monkeypatch.setattr(Gain, "said", ("gain",))
    assert load_sae(save_sae(Gain(6, 20, 3, 3.0), tmp_path / "sae")).factor == 3.0


class ByName(TopKSAE):
    """A subclass that hands on what it is called with, and keeps its own under the name of the argument."""

    def __init__(self, *args, gain=1.0, **settings):
        super().__init__(*args, **settings)
        self.gain = gain


def test_a_subclass_that_keeps_its_arguments_under_their_names_needs_no_more(tmp_path):
    loaded = load_sae(save_sae(ByName(6, 20, k=3, gain=2.0), tmp_path / "sae"))
    assert loaded.arguments == {"d_in": 6, "d_sae": 20, "k": 3, "gain": 2.0} and loaded.k == 3


def test_what_cannot_be_saved_is_named(sae, tmp_path):
    for wrong, metadata, match in [
        (None, None, "sae is a NoneType: it has to be an SAE"),
        ({"a": sae}, None, "sae is a dict: it has to be an SAE"),
        (torch.nn.Sequential(sae), None, "sae is a Sequential: it has to be an SAE"),
        (sae, "text", "metadata='text': it has to be a dictionary of JSON values"),
    ]:
        with pytest.raises(ValueError, match=match):
            save_sae(wrong, tmp_path / "sae", metadata)
    with pytest.raises(TypeError, match="metadata={'when': .*: it has to be a dictionary of JSON values"):
        save_sae(sae, tmp_path / "sae", {"when": object()})
    sae.W_dec.data[3, 1] = float("inf")
    with pytest.raises(ValueError, match="W_dec holds NaN or infinite values"):
        save_sae(sae, tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def test_every_tensor_keeps_its_dtype(sae, tmp_path):
    sae.b_dec.data = sae.b_dec.data.double()
    assert same(load_sae(save_sae(sae, tmp_path / "sae")), sae)
    choice = FeatureChoiceSAE(6, 20, k=3)
    choice.law.fill_(1 / 3)
    assert same(load_sae(save_sae(choice, tmp_path / "choice")), choice)


def test_a_class_of_the_same_name_does_not_take_the_place_of_ours(sae, tmp_path):
    ours, own = save_sae(sae, tmp_path / "ours"), type("TopKSAE", (TopKSAE,), {"__module__": __name__})
    theirs = save_sae(own(6, 20, 3), tmp_path / "theirs")
    assert type(load_sae(ours)) is TopKSAE and type(load_sae(theirs)) is own
    del own
    gc.collect()


def test_missing_files(sae, tmp_path):
    path = save_sae(sae, tmp_path / "sae")
    (path / "sae_utils_state.safetensors").unlink()
    with pytest.raises(ValueError, match="sae_utils_state.safetensors is missing"):
        load_sae(path)
    for file in ("sae_weights.safetensors", "cfg.json"):
        (path / file).unlink()
        with pytest.raises(FileNotFoundError, match=f"{path} holds no SAE"):
            load_sae(path)
    with pytest.raises(FileNotFoundError, match="holds no SAE"):
        load_sae(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------------------------
# Overwriting
# ---------------------------------------------------------------------------------------------------------------------


def test_what_is_no_sae_is_not_overwritten(sae, tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.tex").write_text("years of work")
    other = tmp_path / "other"
    other.mkdir()
    (other / "cfg.json").write_text("{}")  # many tools call their configuration so
    for path in (notes, other, notes / "thesis.tex"):
        with pytest.raises(ValueError, match=f"{path} exists and is no SAE directory"):
            save_sae(sae, path)
    assert (notes / "thesis.tex").read_text() == "years of work" and (other / "cfg.json").read_text() == "{}"
    (tmp_path / "empty").mkdir()
    assert same(load_sae(save_sae(sae, tmp_path / "empty")), sae)


def test_an_sae_is_replaced(sae, tmp_path):
    path = save_sae(sae, tmp_path / "sae")
    other = TopKSAE(4, 8, k=2)
    save_sae(other, path)
    assert same(load_sae(path), other)
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]


def test_an_error_while_saving_leaves_the_old_sae(sae, tmp_path):
    path = save_sae(sae, tmp_path / "sae")
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_sae(TopKSAE(4, 8, k=2), path, {"when": object()})
    assert same(load_sae(path), sae) and [p.name for p in tmp_path.iterdir()] == ["sae"]
    save_sae(other := TopKSAE(4, 8, k=2), path)
    assert same(load_sae(path), other) and [p.name for p in tmp_path.iterdir()] == ["sae"]


def test_other_files_and_symlinks_survive_a_save(sae, tmp_path):
    home = save_sae(sae, tmp_path / "elsewhere" / "sae")
    (home / "notes").mkdir()
    for file in (home / "thesis.tex", home / "notes" / "a.txt", home / ".hidden"):
        file.write_text("years of work")
    (tmp_path / "link").symlink_to(home)
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    other = TopKSAE(4, 8, k=2)
    for name in ("link", "dangling"):
        save_sae(other, tmp_path / name)
        assert (tmp_path / name).is_symlink() and same(load_sae(tmp_path / name), other)
    assert same(load_sae(home), other)
    assert {p.read_text() for p in (home / "thesis.tex", home / "notes" / "a.txt", home / ".hidden")} == {
        "years of work"
    }
    assert len(list(home.iterdir())) == 6 and len(list(tmp_path.iterdir())) == 4


def test_home_is_expanded(sae, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert save_sae(sae, "~/sae") == tmp_path / "sae"
    assert same(load_sae("~/sae"), sae) and [p.name for p in tmp_path.iterdir()] == ["sae"]


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_path_without_a_name_is_refused(sae, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no name of a directory"):
        save_sae(sae, path)


def truncate_and_die(tensors, path):
    save_file(tensors, path)
    with open(path, "r+b") as f:
        f.truncate(path.stat().st_size // 2)
    kill_me()


def die_at(n: int):
    """A function to put in the place of `os.replace`: it does what that does, but the n-th call kills the process."""
    replace, calls = files.os.replace, iter(range(1, n))
    return lambda *args: replace(*args) if next(calls, 0) else kill_me()


MOMENTS = {  # where the child dies, and whether the old SAE or the new one is there then
    "weights half written": (store, "save_file", truncate_and_die, "old"),
    "all written": (files.os, "fsync", kill_me, "old"),
    "before the step that counts": (files.os, "replace", die_at(1), "old"),
    "after the step that counts": (files.os, "replace", die_at(2), "new"),
    "one file in its place": (files.os, "replace", die_at(3), "new"),
    "two files in their places": (files.os, "replace", die_at(4), "new"),
    "all in their places": (files.os, "rmdir", kill_me, "new"),
    "before the end": (files.shutil, "rmtree", kill_me, "new"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_while_saving_leaves_a_whole_sae(sae, tmp_path, moment, monkeypatch):
    module, name, die, left = MOMENTS[moment]
    path = save_sae(sae, tmp_path / "sae")
    new = TopKSAE(6, 20, k=2)

    def work():
        setattr(module, name, die)
        save_sae(new, path)

    assert killed(work)
    with monkeypatch.context() as read_only:  # a reader who may not write finds it where it waits
        read_only.setattr(store, "settle", lambda _: None)
        assert same(load_sae(path), new if left == "new" else sae)
    assert same(load_sae(path), new if left == "new" else sae) and not (path / files.JOURNAL).exists()
    save_sae(newer := TopKSAE(4, 8, k=2), path)
    assert same(load_sae(path), newer)
    assert len(list(path.iterdir())) == 3 and [p.name for p in tmp_path.iterdir()] == ["sae"]


def test_an_sae_that_two_processes_save_is_never_read_in_part(tmp_path):
    """Every value of each SAE is its own number, so a mixture shows."""

    def numbered(i):
        sae = TopKSAE(6, 20, k=i)
        for tensor in sae.state_dict().values():
            tensor.fill_(i)
        sae.dead_after = i
        return sae

    def keep_saving(i):
        sae = numbered(i)
        while True:
            save_sae(sae, path)

    path = save_sae(numbered(1), tmp_path / "sae")
    children = [start_child(keep_saving, i) for i in (1, 2)]
    seen = []
    try:
        while len(seen) < 600 or len(set(seen)) < 2:
            sae = load_sae(path)
            assert same(sae, numbered(sae.k))
            seen.append(sae.k)
            assert all(child.is_alive() for child in children)
    finally:
        for child in children:
            child.kill()
            child.join()
    save_sae(numbered(3), path)
    assert same(load_sae(path), numbered(3))
    assert len(list(path.iterdir())) == 3 and [p.name for p in tmp_path.iterdir()] == ["sae"]


def test_a_first_save_killed_is_no_sae(sae, tmp_path):
    def work():
        store.save_file = truncate_and_die
        save_sae(sae, tmp_path / "sae")

    assert killed(work)
    with pytest.raises(FileNotFoundError):
        load_sae(tmp_path / "sae")
    assert same(load_sae(save_sae(sae, tmp_path / "sae")), sae)
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]


def test_a_moved_directory_loads(sae, tmp_path):
    shutil.move(save_sae(sae, tmp_path / "sae"), tmp_path / "elsewhere")
    assert same(load_sae(str(Path(tmp_path / "elsewhere"))), sae)


def test_a_class_of_the_library_is_found_without_being_imported(tmp_path):
    from sae_utils import MutualChoiceSAE

    save_sae(MutualChoiceSAE(4, 8, k=2), tmp_path / "sae")
    code = f"from sae_utils import load_sae; print(type(load_sae({str(tmp_path / 'sae')!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "MutualChoiceSAE", done.stderr
