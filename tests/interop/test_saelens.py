"""SAEs cross between this library and SAELens 6.54, both ways, with equal latents and reconstructions.

Run by `make interop`, in an environment of its own: SAELens needs transformer-lens < 4.
"""

import json
import warnings
from functools import partial
from importlib.metadata import version

import pytest
import sae_lens
import torch

from sae_utils import (
    FeatureChoiceSAE,
    GatedSAE,
    JumpReluSAE,
    MutualChoiceSAE,
    ReluSAE,
    TopKSAE,
    frozen,
    load_language_model,
    load_sae,
    random_like,
    save_sae,
    to_jumprelu,
    train,
)
from sae_utils.activations.hooks import run_prefix, run_spliced
from sae_utils.training.losses import gated_loss, jumprelu_loss, l1_loss, nested_loss, reconstruction_loss

D_IN, D_SAE = 12, 40
close = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def x():
    """Off-centre, so that it shows whether b_dec is subtracted."""
    return torch.randn(200, D_IN, generator=torch.Generator().manual_seed(1)) + 1


OURS = {  # SAE and loss here; the key begins with the architecture there
    "standard": (lambda: ReluSAE(D_IN, D_SAE), l1_loss),
    "standard, free norm": (lambda: ReluSAE(D_IN, D_SAE, free_norm=True), l1_loss),
    "gated": (lambda: GatedSAE(D_IN, D_SAE), gated_loss),
    "topk": (lambda: TopKSAE(D_IN, D_SAE, k=5), reconstruction_loss),
    "jumprelu": (lambda: JumpReluSAE(D_IN, D_SAE), jumprelu_loss),
    "jumprelu, one threshold": (lambda: MutualChoiceSAE(D_IN, D_SAE, k=5), reconstruction_loss),
    "jumprelu, nested": (lambda: MutualChoiceSAE(D_IN, D_SAE, k=5), partial(nested_loss, prefixes=(10, D_SAE))),
    "topk, soft-frozen": (lambda: frozen(TopKSAE(D_IN, D_SAE, k=5), "decoder", 0.8), reconstruction_loss),
    "jumprelu, one each": (lambda: FeatureChoiceSAE(D_IN, D_SAE, k=5), reconstruction_loss),
}


def trained(architecture, x):
    """A few steps away from its start: no parameter is at zero."""
    torch.manual_seed(0)
    sae, loss = OURS[architecture][0](), OURS[architecture][1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(sae, [x], loss, n_steps=40, lr=1e-2, progress=False)
    assert all(parameter.abs().max() > 0 for parameter in sae.parameters())
    return sae


def agree(ours, theirs, x):
    latents, expected = ours.encode(x), theirs.encode(x)
    assert 0 < (expected > 0).float().mean() < 1
    torch.testing.assert_close(latents, expected, **close)
    torch.testing.assert_close(ours.decode(expected), theirs.decode(expected), **close)
    torch.testing.assert_close(ours(x).x_hat, theirs(x), **close)


def test_the_pinned_versions():
    assert version("sae-lens") == "6.54.0" and int(version("transformer-lens").split(".")[0]) < 4


@pytest.mark.parametrize("architecture", OURS)
def test_ours_opens_in_saelens(tmp_path, x, architecture):
    sae = trained(architecture, x)
    about = {"model_name": "python-lm", "hook_name": "blocks.3.hook_resid_pre", "context_size": 128}
    theirs = sae_lens.SAE.load_from_disk(save_sae(sae, tmp_path / "sae", about))
    assert theirs.cfg.architecture() == architecture.split(",")[0]
    assert type(load_sae(tmp_path / "sae")) is type(sae)
    assert theirs.cfg.metadata.hook_name == about["hook_name"] and theirs.cfg.metadata.context_size == 128
    agree(sae, theirs, x)


def test_random_directions_open_in_saelens(tmp_path, x):
    random = random_like(trained("topk", x), x)
    agree(random, sae_lens.SAE.load_from_disk(save_sae(random, tmp_path / "sae")), x)


def test_the_jumprelu_form_of_gated_opens_in_saelens(tmp_path, x):
    gated = trained("gated", x)
    theirs = sae_lens.SAE.load_from_disk(save_sae(to_jumprelu(gated), tmp_path / "sae"))
    assert theirs.cfg.architecture() == "jumprelu"
    agree(gated, theirs, x)


def test_ours_on_an_attention_hook_takes_heads_in_saelens(tmp_path, x):
    sae = trained("topk", x)
    theirs = sae_lens.SAE.load_from_disk(save_sae(sae, tmp_path / "sae", {"hook_name": "blocks.0.attn.hook_z"}))
    heads = x.view(10, 20, 3, 4)  # [batch, position, head, d_head]
    torch.testing.assert_close(theirs.encode(heads).flatten(0, 1), sae.encode(x), **close)
    torch.testing.assert_close(theirs(heads).flatten(0, 1).flatten(1), sae(x).x_hat, **close)


def test_what_saelens_cannot_express_is_refused_there(tmp_path):
    path = save_sae(GatedSAE(D_IN, D_SAE, tied=False), tmp_path / "sae")
    with pytest.raises(KeyError, match="sae_utils_gated_untied"):
        sae_lens.SAE.load_from_disk(path)


@pytest.mark.parametrize("architecture", OURS)
def test_ours_saved_again_by_saelens_comes_back(tmp_path, x, architecture):
    sae = trained(architecture, x)
    sae_lens.SAE.load_from_disk(save_sae(sae, tmp_path / "sae")).save_model(tmp_path / "again")
    again = load_sae(tmp_path / "again")
    assert again.architecture == sae.architecture  # of the class behind it SAELens keeps nothing
    torch.testing.assert_close(again(x).x_hat, sae(x).x_hat, **close)


def theirs_of(architecture, **options):
    """An SAE made by SAELens with every weight at random: decoder rows of many norms, biases and thresholds of both signs."""
    cfg = sae_lens.registry.get_sae_class(architecture)[1](d_in=D_IN, d_sae=D_SAE, **options)
    sae = sae_lens.registry.get_sae_class(architecture)[0](cfg)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            scale = 0.3 if name.startswith(("W_enc", "r_mag")) else 1.0
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return sae


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(
    "architecture, options",
    [
        ("standard", {}),
        ("gated", {}),
        ("jumprelu", {}),
        ("topk", {"k": 7, "rescale_acts_by_decoder_norm": False}),
        ("topk", {"k": 7, "rescale_acts_by_decoder_norm": True}),
    ],
)
def test_theirs_opens_here(tmp_path, x, architecture, options, centred):
    theirs = theirs_of(architecture, apply_b_dec_to_input=centred, **options)
    theirs.save_model(tmp_path)
    ours = load_sae(tmp_path)
    assert ours.architecture == architecture
    torch.testing.assert_close(ours(x).x_hat, theirs(x), **close)
    torch.testing.assert_close(ours.encode(x), theirs.encode(x), **close)
    torch.testing.assert_close(ours.decode(ours.encode(x)), theirs(x), **close)
    # and back again, through our format
    torch.testing.assert_close(sae_lens.SAE.load_from_disk(save_sae(ours, tmp_path / "ours"))(x), theirs(x), **close)


@pytest.mark.parametrize("architecture", ["standard", "gated", "topk", "jumprelu", "batchtopk", "matryoshka_batchtopk"])
def test_what_saelens_trained_opens_here(tmp_path, x, architecture):
    """`save_inference_model` of a training SAE: the batch-dependent ones become JumpReLU."""
    sae_class, cfg_class = sae_lens.registry.get_sae_training_class(architecture)
    more = {"matryoshka_widths": [10, D_SAE]} if "matryoshka" in architecture else {}
    training = sae_class(cfg_class(d_in=D_IN, d_sae=D_SAE, **({"k": 4} if "topk" in architecture else {}), **more))
    if hasattr(training, "topk_threshold"):
        training.topk_threshold.fill_(0.4)
    training.save_inference_model(tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    torch.testing.assert_close(load_sae(tmp_path).encode(x), theirs.encode(x), **close)
    torch.testing.assert_close(load_sae(tmp_path)(x).x_hat, theirs(x), **close)


def test_theirs_on_an_attention_hook_takes_flat_heads_here(tmp_path, x):
    theirs = theirs_of("standard", reshape_activations="hook_z")
    theirs.save_model(tmp_path)
    expected = theirs(x.view(10, 20, 3, 4)).flatten(0, 1).flatten(1)
    torch.testing.assert_close(load_sae(tmp_path)(x).x_hat, expected, **close)


@pytest.mark.parametrize("scaling", ["layer_norm", "constant_norm_rescale", "expected_average_only_in"])
def test_input_scaling_is_refused(tmp_path, scaling):
    theirs_of("standard", normalize_activations=scaling).save_model(tmp_path)
    with pytest.raises(ValueError, match=f"normalize_activations='{scaling}'.* only 'none' can be loaded"):
        load_sae(tmp_path)


def test_a_folded_input_scaling_opens(tmp_path, x):
    theirs = theirs_of("gated", normalize_activations="expected_average_only_in")
    theirs.fold_activation_norm_scaling_factor(3.0)
    theirs.save_model(tmp_path)
    torch.testing.assert_close(load_sae(tmp_path)(x).x_hat, theirs(x), **close)


def test_architectures_that_are_not_here_are_refused(tmp_path):
    known = {"standard", "gated", "topk", "jumprelu"}
    others = sorted(set(sae_lens.registry.SAE_CLASS_REGISTRY) - known)
    assert {"abstopk", "transcoder"} <= set(others)
    theirs_of("standard").save_model(tmp_path)
    for architecture in others:
        cfg = json.loads((tmp_path / "cfg.json").read_text()) | {"architecture": architecture}
        (tmp_path / "cfg.json").write_text(json.dumps(cfg))
        with pytest.raises(ValueError, match=f"architecture='{architecture}': topk, standard, .* can be loaded"):
            load_sae(tmp_path)


def test_the_language_model_runs_under_this_transformer_lens():
    lm = load_language_model("python-lm", device="cpu")
    rows = torch.randint(lm.cfg.d_vocab, (2, 16), generator=torch.Generator().manual_seed(0))
    hook = "blocks.3.hook_resid_pre"
    torch.testing.assert_close(run_spliced(lm, rows, hook, run_prefix(lm, rows, [hook])[hook]), lm(rows))
