"""ReLU, Gated and JumpReLU SAEs: values and gradient facts of arXiv 2404.16014 by hand, and the exact JumpReLU form."""

import math
from functools import partial

import pytest
import torch

from sae_utils import GatedSAE, JumpReluSAE, ReluSAE, load_sae, save_sae, to_jumprelu, train
from sae_utils.saes.jumprelu import step
from sae_utils.sparse import select_encode as sparse
from sae_utils.training.losses import batch_fvu, gated_loss, jumprelu_loss, l1_loss


@pytest.fixture(params=[0.0, 2.0], ids=["dense", "sparse"], autouse=True)
def form(request, monkeypatch):
    """Everything here holds in both forms, whichever of them the share of active latents would choose."""
    monkeypatch.setattr(sparse, "FEW", request.param)


def by_hand():
    """d_in 2, latents reading x₀ and x₁, b_dec = (1, 0); magnitudes 2 × the projection."""
    sae = GatedSAE(2, 2)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.eye(2))
        sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
        sae.b_gate.copy_(torch.tensor([-1.0, 0.5]))
        sae.b_mag.copy_(torch.tensor([0.5, -3.0]))
        sae.r_mag.fill_(math.log(2))
    return sae.eval()


def test_gated_forward_by_hand():
    # projections (2, 1) and (0.5, −0.2); π = (1, 1.5) and (−0.5, 0.3); magnitudes (4.5, −1) and (1.5, −3.4)
    out = by_hand()(torch.tensor([[3.0, 1.0], [1.5, -0.2]]))
    torch.testing.assert_close(out.latents, torch.tensor([[4.5, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(out.x_hat, torch.tensor([[5.5, 0.0], [1.0, 0.0]]))
    gate = out.extra["gate"] if out.active is None else sparse.densify(out.extra["gate"], out.active)
    torch.testing.assert_close(gate, torch.tensor([[1.0, 1.5], [0.0, 0.3]]))


def test_losses_by_hand():
    x = torch.tensor([[3.0, 1.0], [1.5, -0.2]])
    variance = 2 * 0.75**2 + 2 * 0.6**2  # of the batch, summed
    sigma = math.sqrt(variance / 2)
    terms = gated_loss(by_hand(), x, coefficient=0.3, warmup=0)
    fvu = ((3 - 5.5) ** 2 + 1 + 0.5**2 + 0.2**2) / variance
    aux = ((3 - 2) ** 2 + (1 - 1.5) ** 2 + (1.5 - 1) ** 2 + (-0.2 - 0.3) ** 2) / variance  # relu(π) + b_dec
    l1 = (1 + 1.5 + 0.3) / 2 / sigma
    expected = {"fvu": fvu, "aux": aux, "l1": l1, "l0": 0.5, "loss": fvu + 0.3 * l1 + aux}
    assert {key: value.item() for key, value in terms.items()} == pytest.approx(expected)
    relu = ReluSAE(2, 2)
    with torch.no_grad():
        relu.W_enc.copy_(torch.eye(2))
        relu.W_dec.copy_(torch.eye(2))
    terms = l1_loss(relu, x, coefficient=0.3, warmup=0)  # latents (3, 1), (1.5, 0)
    assert terms["l1"].item() == pytest.approx(5.5 / 2 / sigma)
    assert terms["loss"].item() == pytest.approx(0.2**2 / variance + 0.3 * 5.5 / 2 / sigma)


def test_the_coefficient_warms_up():
    x, sae = torch.randn(8, 2), by_hand()
    terms = [gated_loss(sae, {"x": x, "progress": p}, coefficient=0.4, warmup=0.1) for p in (0.0, 0.05, 0.1, 1.0)]
    weights = [((t["loss"] - t["fvu"] - t["aux"]) / t["l1"]).item() for t in terms]
    assert weights == pytest.approx([0, 0.2, 0.4, 0.4], abs=1e-5)


def random_gated(**arguments):
    torch.manual_seed(0)
    sae = GatedSAE(6, 20, **arguments)
    with torch.no_grad():
        for name in ("b_gate", "b_mag", "r_mag", "b_dec"):
            if hasattr(sae, name):
                getattr(sae, name).copy_(0.3 * torch.randn(getattr(sae, name).shape))
    return sae, torch.randn(50, 6)


def gradients(sae, loss):
    found = torch.autograd.grad(loss, list(sae.parameters()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(sae.named_parameters(), found)}


def test_the_auxiliary_term_stops_at_the_decoder_and_not_at_the_encoders_centring():
    sae, x = random_gated()
    aux = gradients(sae, gated_loss(sae, x)["aux"])
    assert (aux["W_dec"] == 0).all(), "W_dec must be stopped"
    assert aux["W_enc"].abs().max() > 0 and aux["b_gate"].abs().max() > 0
    # the whole gradient of b_dec comes through π: −(gradient summed over tokens) W_encᵀ
    torch.testing.assert_close(aux["b_dec"], -(aux["b_gate"] @ sae.W_enc.T).detach())
    assert aux["b_dec"].abs().max() > 0
    thawed = gradients(sae, gated_loss(sae, x, frozen=False)["aux"])
    assert thawed["W_dec"].abs().max() > 0


def test_the_reconstruction_term_reaches_the_gates_weights_through_the_tying_and_never_b_gate():
    sae, x = random_gated()
    fvu = gradients(sae, gated_loss(sae, x)["fvu"])
    assert fvu["W_enc"].abs().max() > 0 and fvu["r_mag"].abs().max() > 0 and (fvu["b_gate"] == 0).all()
    untied, x = random_gated(tied=False)
    fvu = gradients(untied, gated_loss(untied, x)["fvu"])
    assert (fvu["W_enc"] == 0).all() and fvu["W_mag"].abs().max() > 0


def test_gated_gradients_equal_the_equations_written_out():
    sae, x = random_gated()
    centred = x - sae.b_dec
    pi = centred @ sae.W_enc + sae.b_gate
    f = (pi > 0) * (centred @ (sae.W_enc * sae.r_mag.exp()) + sae.b_mag).relu()
    sigma = (x - x.mean(0)).square().sum(1).mean().sqrt()
    loss = batch_fvu(x, f @ sae.W_dec + sae.b_dec) + 0.2 * pi.relu().sum(1).mean() / sigma
    loss = loss + batch_fvu(x, pi.relu() @ sae.W_dec.detach() + sae.b_dec.detach())
    ours = gradients(sae, gated_loss(sae, x, coefficient=0.2, warmup=0)["loss"])
    for name, expected in gradients(sae, loss).items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_jumprelu_form_is_exact():
    sae, x = random_gated()
    assert (sae.b_mag - sae.r_mag.exp() * sae.b_gate < 0).any(), "the max of the threshold should matter"
    sae.dead_after = 7
    jump = to_jumprelu(sae.double().eval())
    assert torch.equal(jump.dead(), sae.dead()) and jump.dead_after == 7
    assert isinstance(jump, JumpReluSAE) and (jump.threshold >= 0).all()
    torch.testing.assert_close(jump.encode(x.double()), sae.encode(x.double()))
    torch.testing.assert_close(jump(x.double()).x_hat, sae(x.double()).x_hat)
    with pytest.raises(ValueError, match="only a tied GatedSAE"):
        to_jumprelu(ReluSAE(2, 3))


def test_jumprelu_by_hand():
    sae = JumpReluSAE(1, 2)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 1.0]]))
        sae.threshold.copy_(torch.tensor([0.5, 2.0]))
    assert sae.encode(torch.tensor([[0.5], [1.0], [3.0]])).tolist() == [[0, 0], [1, 0], [3, 3]]


@pytest.mark.parametrize(
    "make, architecture",
    [
        (lambda: ReluSAE(6, 20), "standard"),
        (lambda: random_gated()[0], "gated"),
        (lambda: random_gated(rescale=False)[0], "gated"),
        (lambda: random_gated(tied=False)[0], "sae_utils_gated_untied"),
        (lambda: to_jumprelu(random_gated()[0]), "jumprelu"),
    ],
)
def test_saved_and_loaded_bit_for_bit(tmp_path, make, architecture):
    sae = make()
    loaded = load_sae(save_sae(sae, tmp_path / "sae"))
    assert type(loaded) is type(sae) and loaded.arguments == sae.arguments and loaded.architecture == architecture
    for (name, a), b in zip(sae.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    x = torch.randn(9, 6)
    assert torch.equal(loaded(x).x_hat, sae.eval()(x).x_hat)


def test_the_gradients_of_the_smeared_step_by_hand():
    z, threshold = torch.tensor([[0.9, 1.2, 3.0]]), torch.tensor([1.0, 1.0, 1.0], requires_grad=True)
    active = step(z, threshold, torch.tensor(0.5))
    assert active.tolist() == [[0, 1, 1]]
    active.sum().backward()
    assert threshold.grad.tolist() == [-2, -2, 0]  # −1/ε within ε/2 = 0.25 of the threshold
    sae = JumpReluSAE(1, 1, bandwidth=0.5)  # σ = x_scale = 1: ε = 0.5
    sae.x_scale.fill_(1)
    with torch.no_grad():
        sae.W_enc.fill_(1.0)
        sae.W_dec.fill_(1.0)
        sae.threshold.fill_(1.0)
    out = sae(torch.tensor([[1.2]]))
    (grad_theta, grad_b) = torch.autograd.grad(out.latents.sum(), [sae.threshold, sae.b_enc])
    assert grad_theta.tolist() == [-2] and grad_b.tolist() == [1]  # −θ/ε, and 1 where active


def test_jumprelu_reaches_its_target_l0():
    torch.manual_seed(0)
    sae = JumpReluSAE(16, 32)
    loss = partial(jumprelu_loss, coefficient=0.3, target_l0=3)
    history = train(sae, planted(torch.Generator().manual_seed(1)), loss, n_steps=600, lr=3e-3, progress=False)
    assert history["l0"].iloc[-1] == pytest.approx(3, rel=0.15) and history["fvu"].iloc[-1] < 0.3
    assert (sae.threshold >= 0).all()


def planted(generator):
    truth = torch.nn.functional.normalize(torch.randn(24, 16, generator=generator), dim=1)
    while True:
        chosen = torch.rand(512, 24, generator=generator).topk(2, dim=1).indices
        yield torch.zeros(512, 24).scatter(1, chosen, 0.5 + torch.rand(512, 2, generator=generator)) @ truth


def test_l1_shrinks_and_the_gate_does_not():
    """At about equal sparsity on a planted dictionary: γ well below 1 for ReLU, near 1 for Gated."""
    from sae_utils.analysis.metrics import ReconstructionSums, times_fired

    gammas, l0 = {}, {}
    for name, cls, loss in (
        ("relu", ReluSAE, partial(l1_loss, coefficient=0.25)),
        ("gated", GatedSAE, partial(gated_loss, coefficient=0.5)),
    ):
        torch.manual_seed(0)
        sae = cls(16, 32)
        batches = planted(torch.Generator().manual_seed(1))
        train(sae, batches, loss, n_steps=800, lr=3e-3, progress=False)
        sums = ReconstructionSums()
        with torch.no_grad():
            x = next(batches)
            out = sae(x)
            sums.add(x, out.x_hat, times_fired(out))
        gammas[name], l0[name] = sums.result()["gamma"], sums.result()["l0"]
    assert gammas["relu"] < 0.93 and abs(gammas["gated"] - 1) < 0.03, (gammas, l0)
    assert all(1 < value < 6 for value in l0.values()), l0
