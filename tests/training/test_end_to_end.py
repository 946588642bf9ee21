"""End-to-end objectives: values against the whole model by autograd, the direction of the KL, a model that stays as it is."""

import functools
import math

import numpy as np
import pytest
import torch

from sae_utils import ActivationStore, GatedSAE, JumpReluSAE, ReluSAE, TopKSAE, load_language_model, train
from sae_utils.activations.hooks import run_prefix, run_spliced
from sae_utils.training import end_to_end
from sae_utils.training.end_to_end import Suffix, e2e_downstream_loss, e2e_loss
from sae_utils.training.identity import training_parts
from sae_utils.training.losses import auxk_loss, batch_fvu, gated_loss, jumprelu_loss, l1_loss, reconstruction_loss

HOOK = "blocks.1.hook_resid_pre"
ARCHITECTURES = [
    (TopKSAE, reconstruction_loss, {}),
    (ReluSAE, l1_loss, {"coefficient": 0.3, "warmup": 0.0}),
    (GatedSAE, gated_loss, {"coefficient": 0.3, "warmup": 0.0}),
    (JumpReluSAE, jumprelu_loss, {"coefficient": 0.3, "warmup": 0.0}),
]


def batch_of(lm, hook=HOOK, rows=3, seed=0):
    tokens = torch.from_numpy(np.random.default_rng(seed).integers(0, 300, (rows, 12)))
    x = run_prefix(lm, tokens, [hook])[hook]
    return {"x": x.float(), "tokens": tokens}


def sae_for(lm, cls=TopKSAE, d_sae=64):
    torch.manual_seed(0)
    sae = cls(lm.cfg.d_model, d_sae, **({"k": 4} if cls is TopKSAE else {}))
    sae.initialise(torch.randn(50, lm.cfg.d_model))
    return sae.eval()


def whole(lm, batch, x_hat, hook=HOOK):
    """KL(orig ‖ new) and the FVUs of later layers, by the whole model and plain autograd."""
    spliced = torch.cat([batch["x"][:, :1], x_hat], 1)
    seen = {}
    later = [f"blocks.{layer}.hook_resid_pre" for layer in range(int(hook.split(".")[1]) + 1, lm.cfg.n_layers)]
    hooks = [(name, lambda a, hook, n=name: seen.__setitem__(n, a[:, 1:])) for name in later]
    log_q = run_spliced(lm, batch["tokens"], hook, lambda x: spliced, hooks).log_softmax(-1)[:, 1:]
    with torch.no_grad():
        log_p = lm(batch["tokens"]).log_softmax(-1)[:, 1:]
        clean = {name: run_prefix(lm, batch["tokens"], [name])[name][:, 1:] for name in later}
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return kl, [batch_fvu(clean[name], seen[name]) for name in later]


@pytest.mark.parametrize("family", ["gpt2", "neox", "llama"])
@pytest.mark.parametrize("large", [False, True])
def test_values_and_gradients_are_those_of_the_whole_model(family, large, request, monkeypatch):
    """Also where the vocabulary is taken in chunks of five tokens and no clean probability is kept."""
    if large:
        monkeypatch.setattr(end_to_end, "AT_ONCE", 5 * 300)
        monkeypatch.setattr(end_to_end, "KEPT", 0)
    lm = request.getfixturevalue(f"tiny_{family}")
    batch, sae = batch_of(lm), sae_for(lm)
    suffix = Suffix(lm, HOOK)
    terms = e2e_downstream_loss(sae, batch, suffix=suffix, kl=0.5, beta=3.0, mse=0.25)
    gradients = torch.autograd.grad(terms["loss"], list(sae.parameters()))
    out = sae(batch["x"][:, 1:])
    kl, later = whole(lm, batch, out.x_hat)
    fvu = batch_fvu(batch["x"][:, 1:], out.x_hat)
    assert len(later) == 1 and suffix.later == ["blocks.2.hook_resid_pre"]
    loss = 0.5 * kl + 3.0 * sum(later) / len(later) + 0.25 * fvu
    expected = torch.autograd.grad(loss, list(sae.parameters()))
    for key, value in {"loss": loss, "kl": kl, "downstream": later[0], "fvu": fvu}.items():
        assert terms[key].item() == pytest.approx(value.item(), rel=2e-5), key
    for gradient, oracle in zip(gradients, expected):
        torch.testing.assert_close(gradient, oracle, rtol=1e-3, atol=1e-6)


def test_the_kl_has_its_direction_and_reduction_by_hand(tiny_gpt2):
    """Two tokens, two words: p = (½, ½) and (¾, ¼), q = (¼, ¾) for both. A mean over tokens, a sum over words."""
    suffix = Suffix(tiny_gpt2, HOOK)
    suffix.logits = lambda last: last  # the "residual" is the logits
    p = torch.tensor([[0.5, 0.5], [0.75, 0.25]])
    q = torch.tensor([[0.25, 0.75], [0.25, 0.75]])

    def kl(p, q):
        return suffix.kl(end_to_end.Clean(None, None, p.log(), [end_to_end.probabilities(p.log())], {}), q.log()).item()

    orig_new = (0.5 * math.log(2) + 0.5 * math.log(2 / 3) + 0.75 * math.log(3) + 0.25 * math.log(1 / 3)) / 2
    new_orig = (0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 3) + 0.75 * math.log(3)) / 2
    assert abs(orig_new - new_orig) > 0.005
    assert kl(p, q) == pytest.approx(orig_new, rel=1e-5)
    assert kl(q, p) == pytest.approx(new_orig, rel=1e-5)


def test_gradcheck_of_the_kl(tiny_gpt2, monkeypatch):
    monkeypatch.setattr(end_to_end, "AT_ONCE", 2 * 300)  # 3 chunks: 2 + 2 + 1 tokens
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(3, 7, generator=generator, dtype=torch.double)
    suffix = Suffix(tiny_gpt2, HOOK)
    suffix.logits = lambda last: last @ W
    clean, new = torch.randn(2, 5, 3, generator=generator, dtype=torch.double)
    for kept in (None, [end_to_end.probabilities(part @ W) for part in suffix.chunks(clean)]):
        about = end_to_end.Clean(None, None, clean, kept, {})
        torch.autograd.gradcheck(lambda last: 2 * suffix.kl(about, last), new.requires_grad_())


@pytest.mark.parametrize("cls, local, settings", ARCHITECTURES)
def test_an_architecture_keeps_its_own_terms(cls, local, settings, tiny_gpt2):
    batch, sae = batch_of(tiny_gpt2), sae_for(tiny_gpt2, cls)
    sae.dead_after = 1
    sae.tokens_since_fired[:8] = 1  # AuxK has something to do
    own = functools.partial(local, **settings)
    x = batch["x"][:, 1:]
    terms, alone = e2e_loss(sae, batch, suffix=Suffix(tiny_gpt2, HOOK), local=own), own(sae, x)
    out = sae(x)
    kl, _ = whole(tiny_gpt2, batch, out.x_hat)
    assert terms["kl"].item() == pytest.approx(kl.item(), rel=1e-4)
    assert terms["fvu"].item() == pytest.approx(alone["fvu"].item(), rel=1e-4)
    assert terms["l0"] == alone["l0"]
    expected = alone["loss"] - alone["fvu"] + kl
    if cls is TopKSAE:  # AuxK keeps its part in the loss
        expected = kl + (alone["loss"] - alone["fvu"]) * kl / alone["fvu"]
    if cls is GatedSAE:
        from_gate = out.extra["gate"].relu() @ sae.W_dec + sae.b_dec
        expected = expected - alone["aux"] + whole(tiny_gpt2, batch, from_gate.view(x.shape))[0]
    if cls is TopKSAE:
        assert terms["auxk"].item() == pytest.approx(auxk_loss(sae, x, out.x_hat).item(), rel=1e-4) != 0
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    terms["loss"].backward()
    assert sae.W_enc.grad.abs().sum() > 0 and sae.W_dec.grad.abs().sum() > 0
    assert e2e_loss(sae, batch, suffix=Suffix(tiny_gpt2, HOOK)).keys() == terms.keys(), (
        "its own is what it takes by itself"
    )


@pytest.mark.parametrize("cls, local, settings", ARCHITECTURES)
def test_balanced_weighs_kl_and_fvu_alike(cls, local, settings, tiny_gpt2):
    """½ (FVU + sg(FVU / KL) KL): the size of the FVU, and half the gradient of each, the KL's in units of the FVU."""
    batch, sae = batch_of(tiny_gpt2), sae_for(tiny_gpt2, cls)
    own = functools.partial(local, **settings)
    x, parameters = batch["x"][:, 1:], [sae.W_enc, sae.W_dec]
    terms = e2e_loss(sae, batch, suffix=Suffix(tiny_gpt2, HOOK), local=own, balanced=True)
    alone = own(sae, x)
    assert terms["loss"].item() == pytest.approx(alone["loss"].item(), rel=1e-4)
    if cls is GatedSAE:  # whose gate is balanced by a ratio of its own
        return
    x_hat = sae(x).x_hat
    fvu, (kl, _) = batch_fvu(x, x_hat), whole(tiny_gpt2, batch, x_hat)
    expected = alone["loss"] - alone["fvu"] + (fvu + (fvu / kl).detach() * kl) / 2
    gradients = torch.autograd.grad(terms["loss"], parameters)
    for gradient, oracle in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(gradient, oracle, rtol=1e-3, atol=1e-6)


def test_x_itself_costs_nothing_and_position_0_stays_clean(tiny_gpt2):
    batch, suffix = batch_of(tiny_gpt2), Suffix(tiny_gpt2, HOOK)
    clean = suffix.clean(batch)
    last, _ = suffix.run(clean.tokens, batch["x"], [])
    assert suffix.kl(clean, last).abs() < 1e-5
    seen = []

    def local(sae, batch, distance):
        seen.append(batch["x"])
        return {"loss": distance(batch["x"], batch["x"].clone())}

    terms = e2e_downstream_loss(sae_for(tiny_gpt2), batch, suffix=suffix, local=local)
    assert terms["kl"].abs() < 1e-5 and terms["downstream"] < 1e-10 and terms["fvu"] == 0
    assert torch.equal(seen[0], batch["x"][:, 1:])


def test_beta_is_split_over_the_later_layers(tiny_gpt2):
    hooks = {f"blocks.0.hook_{kind}": Suffix(tiny_gpt2, f"blocks.0.hook_{kind}") for kind in ("resid_pre", "mlp_out")}
    assert all(s.later == ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"] for s in hooks.values())
    # the residual after layer 0 is resid_pre of layer 1 under another name: what is spliced in is not "downstream"
    for name in ("hook_resid_post", "hook_out"):
        assert Suffix(tiny_gpt2, f"blocks.0.{name}").later == ["blocks.2.hook_resid_pre"]
    hook = "blocks.0.hook_resid_pre"
    batch, sae = batch_of(tiny_gpt2, hook), sae_for(tiny_gpt2)
    _, later = whole(tiny_gpt2, batch, sae(batch["x"][:, 1:]).x_hat, hook)
    terms = e2e_downstream_loss(
        sae, batch, suffix=hooks[hook], kl=0.0, beta=2.5, local=functools.partial(reconstruction_loss, alpha=0)
    )
    assert len(later) == 2 and terms["loss"].item() == pytest.approx(2.5 * sum(later).item() / 2, rel=1e-4)


@pytest.mark.parametrize("hook", ["blocks.1.hook_mlp_out", "blocks.2.hook_resid_post", "blocks.0.attn.hook_z"])
def test_any_hook(hook, tiny_gpt2):
    batch, sae = batch_of(tiny_gpt2, hook), sae_for(tiny_gpt2)
    terms = e2e_loss(sae, batch, suffix=Suffix(tiny_gpt2, hook))
    spliced = torch.cat([batch["x"][:, :1], sae(batch["x"][:, 1:]).x_hat], 1)
    log_p = tiny_gpt2(batch["tokens"]).log_softmax(-1)[:, 1:]
    log_q = run_spliced(tiny_gpt2, batch["tokens"], hook, spliced).log_softmax(-1)[:, 1:]
    assert terms["kl"].item() == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-4)


def test_the_clean_model_runs_once_a_batch_and_only_after_the_hook(tiny_gpt2):
    suffix, sae, ran = Suffix(tiny_gpt2, HOOK), sae_for(tiny_gpt2), []
    handles = [b.mlp.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(tiny_gpt2.blocks)]
    try:
        batch = batch_of(tiny_gpt2)
        ran.clear()
        for _ in range(3):
            e2e_loss(sae, batch, suffix=suffix)
        assert ran == [1, 2] * 4, "one clean suffix, three spliced"
        e2e_loss(sae, batch_of(tiny_gpt2, seed=1), suffix=suffix)
    finally:
        for handle in handles:
            handle.remove()
    again = e2e_loss(sae, batch, suffix=suffix)["kl"]
    assert again == e2e_loss(sae, batch, suffix=Suffix(tiny_gpt2, HOOK))["kl"]


def test_training_changes_the_sae_alone(tiny_gpt2):
    """No parameter of the language model changes, requires a gradient or holds one; the KL falls."""
    rows = np.random.default_rng(0).integers(0, 300, (32, 12)).astype(np.uint16)
    store, suffix = ActivationStore(tiny_gpt2, rows, HOOK), Suffix(tiny_gpt2, HOOK)
    before = {name: p.clone() for name, p in tiny_gpt2.state_dict().items()}
    sae = sae_for(tiny_gpt2)
    seen = []

    def watched(sae, batch):
        seen.append(any(p.requires_grad for p in tiny_gpt2.parameters()))
        return e2e_downstream_loss(sae, batch, suffix=suffix)

    history = train(sae, store.batches(8, whole_rows=True), watched, n_steps=60, lr=1e-2, progress=False)
    assert history["kl"].iloc[-5:].mean() < 0.7 * history["kl"].iloc[:5].mean()
    assert not any(seen) and len(seen) == 60
    for name, parameter in tiny_gpt2.named_parameters():
        assert parameter.grad is None and not parameter.requires_grad, name
    assert all(torch.equal(value, before[name]) for name, value in tiny_gpt2.state_dict().items())
    assert not any(hook.fwd_hooks for hook in tiny_gpt2.hook_dict.values())


def test_resumed_side_by_side_training_is_the_uninterrupted_one(model_directories, tmp_path):
    """Another process has another Suffix of the same model: the checkpoint has to know it again."""
    rows = np.random.default_rng(0).integers(0, 300, (32, 12)).astype(np.uint16)

    def run(stop_at=None, checkpoint=None):
        lm = load_language_model(str(model_directories["gpt2"]), device="cpu")
        suffix, store = Suffix(lm, HOOK), ActivationStore(lm, rows, HOOK)
        own = functools.partial(l1_loss, coefficient=0.1)
        saes = {"topk": sae_for(lm), "relu": sae_for(lm, ReluSAE)}
        jobs = {
            "topk": (saes["topk"], functools.partial(e2e_loss, suffix=suffix)),
            "relu": (saes["relu"], functools.partial(e2e_downstream_loss, suffix=suffix, local=own)),
        }

        class Stream:
            def from_step(self, step):
                for batch in store.batches(4, whole_rows=True).from_step(step):
                    if step == stop_at:
                        raise KeyboardInterrupt
                    yield batch
                    step += 1

        history = train(jobs, Stream(), n_steps=20, lr=1e-2, progress=False, checkpoint=checkpoint, checkpoint_every=5)
        return saes, history

    whole_saes, whole_history = run()
    with pytest.raises(KeyboardInterrupt):
        run(stop_at=13, checkpoint=tmp_path / "c")
    resumed, history = run(checkpoint=tmp_path / "c")
    assert history.equals(whole_history)
    for name, sae in resumed.items():
        assert all(torch.equal(a, b) for a, b in zip(sae.state_dict().values(), whole_saes[name].state_dict().values()))


def test_position_0_has_no_say_in_the_start(tiny_gpt2):
    batch = batch_of(tiny_gpt2)
    batch["x"][:, 0] = 1e6
    sae = TopKSAE(16, 64, k=4)
    objective = functools.partial(e2e_loss, suffix=Suffix(tiny_gpt2, HOOK))
    train(sae, [batch], objective, n_steps=1, lr=1e-6, progress=False)
    torch.testing.assert_close(sae.b_dec.detach(), batch["x"][:, 1:].mean((0, 1)), atol=1e-4, rtol=1e-4)


def test_a_signature_tells_models_hooks_and_settings_apart(tiny_gpt2, tiny_neox):
    sae = sae_for(tiny_gpt2, ReluSAE)

    def of(lm, hook, coefficient):
        own = functools.partial(l1_loss, coefficient=coefficient)
        objective = functools.partial(e2e_loss, suffix=Suffix(lm, hook), local=own)
        return training_parts({"": (sae, objective)}, {}, {})

    one = of(tiny_gpt2, HOOK, 0.1)
    assert one == of(tiny_gpt2, HOOK, 0.1)
    others = [of(tiny_neox, HOOK, 0.1), of(tiny_gpt2, "blocks.2.hook_resid_pre", 0.1), of(tiny_gpt2, HOOK, 0.2)]
    assert len({str(parts) for parts in (one, *others)}) == 4


def test_advice_on_the_coefficient_of_the_local_objective(tiny_gpt2):
    own = functools.partial(l1_loss, coefficient=1e3)
    objective = functools.partial(e2e_loss, suffix=Suffix(tiny_gpt2, HOOK), local=own)
    with pytest.warns(UserWarning, match="coefficient=1000.0 leaves almost no latent active"):
        train(sae_for(tiny_gpt2, ReluSAE), [batch_of(tiny_gpt2)], objective, n_steps=60, lr=1e-2, progress=False)


def test_errors_say_what_to_do(tiny_gpt2, model_directories):
    suffix, sae = Suffix(tiny_gpt2, HOOK), sae_for(tiny_gpt2)
    batch = batch_of(tiny_gpt2)
    for wrong in ({"x": batch["x"]}, {"x": batch["x"][:, 1:], "tokens": batch["tokens"]}, batch | {"x": batch["x"][0]}):
        with pytest.raises(ValueError, match="whole_rows=True"):
            e2e_loss(sae, wrong, suffix=suffix)
    for settings in ({"mse": 1.0}, {"kl": 0.5}, {"beta": 1.0}):
        with pytest.raises(ValueError, match="leave out kl, beta and mse"):
            e2e_loss(sae, batch, suffix=suffix, balanced=True, **settings)
    with pytest.raises(ValueError, match="balanced='yes': it has to be True or False"):
        e2e_loss(sae, batch, suffix=suffix, balanced="yes")
    with pytest.raises(ValueError, match="no layer's resid_pre comes after blocks.2.hook_resid_pre"):
        e2e_downstream_loss(
            sae, batch_of(tiny_gpt2, "blocks.2.hook_resid_pre"), suffix=Suffix(tiny_gpt2, "blocks.2.hook_resid_pre")
        )
    with pytest.raises(ValueError, match="Near ones: .*blocks.1.hook_resid_pre"):
        Suffix(tiny_gpt2, "blocks.1.resid_pre")
    thawed = load_language_model(str(model_directories["gpt2"]), device="cpu")
    next(thawed.parameters()).requires_grad_(True)
    with pytest.raises(ValueError, match="requires_grad_"):
        Suffix(thawed, HOOK)
    scaled = load_language_model(str(model_directories["gpt2"]), device="cpu")
    scaled.unembed.hook_out.add_hook(lambda logits, hook: logits)
    forward = scaled.forward
    scaled.forward = lambda *a, **k: 2 * forward(*a, **k)
    with pytest.raises(ValueError, match="more to its logits"):
        Suffix(scaled, HOOK)
