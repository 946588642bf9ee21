"""End to end on CUDA, wherever there is one: harvest, train, resume, save, load, evaluate, and agreement with the CPU."""

import pytest
import torch

from sae_utils import ActivationStore, TopKSAE, evaluate, load_language_model, load_sae, save_sae, tokens, train

HOOK = "blocks.3.hook_resid_pre"
pytestmark = pytest.mark.cuda


def test_a_topk_sae_from_text_to_metrics_on_cuda(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_UTILS_CACHE", str(tmp_path))
    lm = load_language_model("python-lm", device="cuda")
    rows = tokens("python-source", lm.tokenizer, lm.cfg.n_ctx, 131_072)
    test_rows = tokens("python-source", lm.tokenizer, lm.cfg.n_ctx, 8_192, "test")
    store = ActivationStore(lm, rows, HOOK)
    torch.manual_seed(0)
    sae = TopKSAE(store.d_in, 512, k=16).cuda()
    history = train(sae, store.batches(1024), n_steps=100, lr=2e-3, checkpoint=tmp_path / "training", progress=False)
    assert history["fvu"].iloc[-1] < 0.5 * history["fvu"].iloc[0]
    on_cuda = evaluate(sae, lm, test_rows, HOOK)
    loaded = load_sae(save_sae(sae, tmp_path / "sae"))
    on_cpu = evaluate(loaded, load_language_model("python-lm", device="cpu"), test_rows, HOOK)
    assert on_cuda == pytest.approx(on_cpu, rel=1e-2, abs=1e-3)
    assert on_cuda["ce_recovered_mean"] > 0.5


def test_forward_and_gradients_equal_those_of_the_cpu():
    torch.manual_seed(0)
    sae, x = TopKSAE(64, 256, k=8), torch.randn(200, 64)
    gradients = []
    for device in ("cpu", "cuda"):
        sae.to(device).zero_grad()
        (sae(x.to(device)).x_hat - x.to(device)).square().mean().backward()
        gradients.append({name: p.grad.cpu() for name, p in sae.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
