"""Baselines: what is frozen stays, through every class, loss, resampling, checkpoint and file; random directions at equal rates."""

import copy
import functools

import pytest
import torch

from sae_utils import (
    FeatureChoiceSAE,
    GatedSAE,
    GradientSAE,
    JumpReluSAE,
    MutualChoiceSAE,
    ReluSAE,
    TopKSAE,
    frozen,
    load_sae,
    random_like,
    save_sae,
    train,
)
from sae_utils.training.losses import batch_fvu, l1_loss
from sae_utils.training.optimizer import Optimizer, resample_dead

pytestmark = pytest.mark.filterwarnings("ignore:coefficient")  # how sparse the latents are is not the question here

CLASSES = {
    "topk": functools.partial(TopKSAE, k=4),
    "gradient": functools.partial(GradientSAE, k=4),
    "relu": ReluSAE,
    "gated": GatedSAE,
    "untied": functools.partial(GatedSAE, tied=False),
    "jumprelu": JumpReluSAE,
    "mutual": functools.partial(MutualChoiceSAE, k=4),
    "feature": functools.partial(FeatureChoiceSAE, k=4),
}
FORMS = {"decoder": ("decoder", 1.0), "soft": ("decoder", 0.8), "encoder": ("encoder", 1.0)}
WHOLE = 40  # steps


def new_sae(name, form):
    torch.manual_seed(0)
    return frozen(CLASSES[name](12, 32), *FORMS[form])


def batches():
    generator = torch.Generator().manual_seed(1)
    truth = torch.nn.functional.normalize(torch.randn(40, 12, generator=generator), dim=1)
    for _ in range(WHOLE):
        x = (torch.rand(128, 40, generator=generator) * (torch.rand(128, 40, generator=generator) < 0.1)) @ truth + 1
        yield {"x": x, "grad": torch.randn(128, 12, generator=generator)}


run = functools.partial(train, n_steps=WHOLE, lr=0.05, resample=(0.5,), progress=False)


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CLASSES)
def test_what_is_frozen_stays_and_the_rest_trains(name, form, tmp_path):
    sae = new_sae(name, form)
    before = copy.deepcopy(sae)
    history = run(sae, list(batches()))
    assert history["fvu"].iloc[-1] < 0.8 * history["fvu"].iloc[0]
    held = {"decoder": {"W_dec"}, "encoder": {"W_enc", "W_mag"}, "soft": set()}[form]
    for key, parameter in sae.named_parameters():
        assert torch.equal(parameter, before.get_parameter(key)) == (key in held), key
    cosines = torch.nn.functional.cosine_similarity(sae.W_dec, before.W_dec, dim=1)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    if form == "soft":
        assert torch.equal(sae.W_dec_start, before.W_dec)
        assert cosines.min() > 0.8 - 1e-6 and (cosines < 0.8 + 1e-6).any(), "some rows should reach the cone's edge"
    loaded = load_sae(save_sae(sae, tmp_path / "sae"))
    assert same_bits(sae, loaded) and loaded.frozen == sae.frozen
    run(loaded, list(batches()))
    for key in held & {key for key, _ in sae.named_parameters()}:
        assert torch.equal(loaded.get_parameter(key), before.get_parameter(key)), "a loaded SAE is frozen still"
    assert form != "soft" or torch.equal(loaded.W_dec_start, before.W_dec)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["topk", "untied"])
def test_a_frozen_sae_resumes_bit_for_bit_and_is_another_training(name, form, tmp_path):
    whole, part, resumed = (new_sae(name, form) for _ in range(3))
    run(whole, list(batches()))
    again = functools.partial(run, checkpoint=tmp_path / "training", checkpoint_every=10)
    again(part, list(batches()), stop_after=23)
    again(resumed, list(batches()))
    assert same_bits(whole, resumed) and not same_bits(whole, part)
    other = [key for key in FORMS if key != form][0]
    with pytest.raises(ValueError, match="another training. Different: .*the settings"):
        again(new_sae(name, other), list(batches()))


@pytest.mark.parametrize("start, moved, cosine, expected", [
    ((1.0, 0.0), (0.0, 2.0), 0.8, (0.8, 0.6)),  # from a right angle to the edge of the cone
    ((1.0, 0.0), (-1.0, -1.0), 0.6, (0.6, -0.8)),  # from behind, on its own side
    ((1.0, 0.0), (9.0, 4.0), 0.8, (9 / 97**0.5, 4 / 97**0.5)),  # inside the cone only the norm changes
    ((1.0, 0.0), (-3.0, 0.0), 0.8, (1.0, 0.0)),  # all directions are equally near: back to the start
    ((1.0, 0.0), (-1.0, 2.0), 0.0, (0.0, 1.0)),
])  # fmt: skip
def test_the_cone_by_hand(start, moved, cosine, expected):
    sae = TopKSAE(2, 1, k=1)
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([start]))
        frozen(sae, "decoder", cosine).W_dec.copy_(torch.tensor([moved]))
    sae.after_step()
    torch.testing.assert_close(sae.W_dec.detach(), torch.tensor([expected]), atol=2e-6, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_resampling_moves_nothing_that_is_frozen(form):
    """A dead latent whose decoder row stays begins anew with its encoder along that row."""
    sae = new_sae("relu", form)
    with torch.no_grad():
        sae.W_enc += 0.1 * torch.randn(12, 32)
    sae.dead_after, sae.tokens_since_fired[1] = 10, 10
    before = copy.deepcopy(sae)
    resample_dead(sae, torch.randn(20, 12), Optimizer(sae, (0.9, 0.999)), torch.Generator().manual_seed(0))
    assert sae.tokens_since_fired[1] == 0
    if form == "encoder":
        assert torch.equal(sae.W_enc, before.W_enc) and not torch.equal(sae.W_dec[1], before.W_dec[1])
    else:
        assert torch.equal(sae.W_dec, before.W_dec) and not torch.equal(sae.W_enc, before.W_enc)
        torch.testing.assert_close(torch.nn.functional.normalize(sae.W_enc[:, 1], dim=0), sae.W_dec[1])


def test_what_cannot_be_frozen_is_refused():
    sae = TopKSAE(12, 32, k=4)
    with pytest.raises(ValueError, match="it has to be an SAE"):
        frozen(torch.nn.Linear(2, 2), "decoder")
    with pytest.raises(ValueError, match="part='decoders'.*did you mean 'decoder'"):
        frozen(sae, "decoders")
    for cosine in (1.1, -0.1, float("nan"), "0.8"):
        with pytest.raises(ValueError, match="cosine=.*finite number of at least 0 and of at most 1"):
            frozen(sae, "decoder", cosine)
    with pytest.raises(ValueError, match="only a decoder.*can be soft-frozen"):
        frozen(sae, "encoder", 0.8)
    assert not sae.frozen and not TopKSAE.frozen, "what is refused leaves no trace"
    frozen(frozen(sae, "decoder", 0.8), "encoder")
    with pytest.raises(ValueError, match="part='decoder' is frozen already, at cosine=0.8"):
        frozen(sae, "decoder")


# ---------------------------------------------------------------------------------------------------------------------
# Random directions
# ---------------------------------------------------------------------------------------------------------------------


def trained(name):
    torch.manual_seed(0)
    sae, x = CLASSES[name](12, 32), torch.cat([batch["x"] for batch in batches()])
    train(
        sae,
        x,
        functools.partial(l1_loss, coefficient=0.4) if name == "relu" else None,
        n_steps=60,
        lr=0.02,
        progress=False,
    )
    return sae, x


@pytest.mark.parametrize("name", ["topk", "relu", "mutual"])
def test_random_directions_fire_as_often_and_reconstruct_by_the_best_scale_and_offset(name):
    sae, x = trained(name)
    fvu = batch_fvu(x, sae(x).x_hat)
    with torch.no_grad():
        (sae.b_enc if name != "mutual" else sae.threshold)[3] = -100 if name != "mutual" else 100  # never fires
        if name == "relu":
            sae.b_enc[5] = 100  # fires on every token
    made = random_like(sae, x)
    rates = (sae.encode(x) > 0).sum(0)
    assert torch.equal((made.encode(x) > 0).sum(0), rates) and rates[3] == 0 and (name != "relu" or rates[5] == len(x))
    torch.testing.assert_close(made.W_dec.norm(dim=1), torch.ones(32))
    torch.testing.assert_close(made.W_enc.T / made.W_enc.norm(dim=0)[:, None], made.W_dec)
    assert (made.W_dec @ sae.W_dec.T).abs().mean() < 0.4 and (made.threshold >= 0).all() and not made.training
    x_hat = made(x).x_hat.detach().double()
    centred = x_hat - x_hat.mean(0)
    scale = (centred * (x - x.mean(0))).sum() / centred.square().sum()  # the best further factor
    torch.testing.assert_close(scale.item(), 1.0, atol=1e-4, rtol=0)
    torch.testing.assert_close(x_hat.mean(0).float(), x.mean(0), atol=1e-4, rtol=0)
    assert fvu < batch_fvu(x, made(x).x_hat) < 1


def test_random_directions_are_saved_and_drawn_by_their_seed(tmp_path):
    sae, x = trained("topk")
    before = torch.get_rng_state()
    made = random_like(sae, x.view(40, -1, 12), seed=3)
    assert torch.equal(before, torch.get_rng_state()), "no other random state is touched"
    assert same_bits(made, random_like(sae, x, seed=3)) and not same_bits(made, random_like(sae, x, seed=4))
    assert same_bits(made, load_sae(save_sae(made, tmp_path / "random")))


def test_random_directions_of_a_bfloat16_sae_fire_as_often_too():
    sae, x = trained("topk")
    sae, x = sae.bfloat16(), x.bfloat16()
    made = random_like(sae, x)
    assert made.W_dec.dtype == torch.float32
    assert torch.equal((made.encode(x) > 0).sum(0), (sae.encode(x) > 0).sum(0))


def test_what_is_frozen_stays_so_though_someone_asks_for_its_gradient():
    sae = new_sae("topk", "decoder")
    before = sae.W_dec.clone()
    sae.requires_grad_(True)
    run(sae, list(batches()))
    assert torch.equal(sae.W_dec, before)


def test_random_directions_need_an_active_sae():
    with pytest.raises(ValueError, match="sae is a Linear: it has to be an SAE"):
        random_like(torch.nn.Linear(12, 32), torch.randn(9, 12))
    sae, x = trained("relu")
    with torch.no_grad():
        sae.b_enc.fill_(-100)
    with pytest.raises(ValueError, match="no latent of sae fires on these 5,120 tokens, or all are the same"):
        random_like(sae, x)
    with pytest.raises(ValueError, match="or all are the same"):
        random_like(TopKSAE(12, 32, k=4), x[:1].expand(50, 12))
