import math
import shutil
import socket

import numpy as np
import pytest
import torch

from sae_utils import lm as lm_module
from sae_utils import load_language_model, resolve_device
from sae_utils.lm import bits_per_byte, check_hook, run_prefix, run_spliced, token_loss

FAMILIES = ("gpt2", "neox", "llama")
KINDS = ("hook_resid_pre", "hook_resid_post", "hook_mlp_out", "hook_attn_out", "attn.hook_z")
HOOKS = [f"blocks.{layer}.{kind}" for layer in range(3) for kind in KINDS]
PARTS = {  # where Hugging Face's model has its layers; in a layer: attention, its output projection, mlp
    "gpt2": ("transformer.h", "attn", "attn.c_proj", "mlp"),
    "neox": ("gpt_neox.layers", "attention", "attention.dense", "mlp"),
    "llama": ("model.layers", "self_attn", "self_attn.o_proj", "mlp"),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def lm(family, request):
    return request.getfixturevalue(f"tiny_{family}")


@pytest.fixture(scope="module")
def text():
    """[3, 12] tokens; the end-of-text token 0 stands at the start and in the middle of rows."""
    rows = torch.from_numpy(np.random.default_rng(0).integers(1, 300, (3, 12)))
    rows[0, 0] = rows[1, 5] = rows[1, 6] = 0
    return rows


@torch.no_grad()
def hugging_face(path, family, tokens):
    """What the raw Hugging Face model has at every hook, and its logits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path).eval()
    layers, *names = PARTS[family]
    found = {}

    def keep(name, output):
        found[name] = output[0] if isinstance(output, tuple) else output

    for i, layer in enumerate(model.get_submodule(layers)):
        attention, projection, mlp = map(layer.get_submodule, names)
        for module, kind, before in [
            (layer, "hook_resid_pre", True),
            (layer, "hook_resid_post", False),
            (mlp, "hook_mlp_out", False),
            (attention, "hook_attn_out", False),
            (projection, "attn.hook_z", True),
        ]:
            name = f"blocks.{i}.{kind}"
            if before:
                module.register_forward_pre_hook(
                    lambda _, x, kw, n=name: keep(n, x or kw["hidden_states"]), with_kwargs=True
                )
            else:
                module.register_forward_hook(lambda _, x, out, n=name: keep(n, out))
    logits = model(tokens).logits
    assert len(found) == len(HOOKS)
    return found, logits


# ---------------------------------------------------------------------------------------------------------------------
# Prefix
# ---------------------------------------------------------------------------------------------------------------------


def test_hooks_and_logits_are_those_of_hugging_face(lm, family, text, model_directories):
    """Every kind of hook, also at the first and the last layer, against the raw model."""
    found, logits = hugging_face(model_directories[family], family, text)
    torch.testing.assert_close(lm(text), logits, atol=1e-5, rtol=1e-5)
    for name in HOOKS:
        x = run_prefix(lm, text, [name])[name]
        assert x.shape == (3, 12, 16) and not x.requires_grad
        torch.testing.assert_close(x, found[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", HOOKS)
def test_prefix_equals_the_full_run(lm, text, name):
    full = {}
    with torch.no_grad():
        lm.run_with_hooks(text, fwd_hooks=[(name, lambda x, hook: full.update(x=x.flatten(2)))])
    torch.testing.assert_close(run_prefix(lm, text, [name])[name], full["x"], atol=0, rtol=0)


def test_several_hooks_in_one_run(lm, text):
    names = ["blocks.2.hook_resid_pre", "blocks.0.attn.hook_z", "blocks.1.hook_resid_post", "blocks.0.attn.hook_z"]
    found = run_prefix(lm, text, names)
    assert list(found) == names[:3]
    for name in names:
        torch.testing.assert_close(found[name], run_prefix(lm, text, [name])[name], atol=0, rtol=0)
    torch.testing.assert_close(
        found[names[0]], found[names[2]], atol=0, rtol=0
    )  # the same point of the residual stream


@pytest.mark.parametrize("name", HOOKS)
def test_the_run_stops_early(lm, text, name):
    """Blocks after the hook's do not run, nor does the unembedding; the model is as it was."""
    clean = lm(text)
    finished = []
    handles = [b.register_forward_hook(lambda *_, i=i: finished.append(i)) for i, b in enumerate(lm.blocks)]
    started = [
        b.register_forward_pre_hook(lambda *_, i=i: finished.append(f"start {i}")) for i, b in enumerate(lm.blocks)
    ]
    handles += [*started, lm.unembed.register_forward_hook(lambda *_: finished.append("unembed"))]
    try:
        run_prefix(lm, text, [name])
        stopped = list(finished)
        finished.clear()
        lm(text)
    finally:
        for handle in handles:
            handle.remove()
    layer = int(name.split(".")[1])
    done = [step for i in range(layer) for step in (f"start {i}", i)]
    assert stopped == [*done, f"start {layer}"]
    assert finished[-1] == "unembed" and len(finished) == 7
    assert not any(hook.fwd_hooks for hook in lm.hook_dict.values())
    torch.testing.assert_close(lm(text), clean, atol=0, rtol=0)


def test_one_row_is_what_it_is_in_a_batch(lm, text):
    name = "blocks.2.hook_mlp_out"
    whole = run_prefix(lm, text, [name])[name]
    torch.testing.assert_close(run_prefix(lm, text[1:2], [name])[name], whole[1:2], atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Splicing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOOKS)
def test_splicing(lm, text, name):
    """The clean activation gives the clean logits, zeros others; from a position on only."""
    with torch.no_grad():
        clean = lm(text)
        x = run_prefix(lm, text, [name])[name]
        torch.testing.assert_close(run_spliced(lm, text, name, x), clean, atol=1e-6, rtol=1e-6)
        seen = []
        spliced = run_spliced(lm, text, name, lambda x: seen.append(x) or x.clone())
        torch.testing.assert_close(spliced, clean, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(seen, [x], atol=0, rtol=0)
        assert (run_spliced(lm, text, name, torch.zeros_like(x)) - clean).abs().max() > 1e-2

        def ablate_from_7(x):
            return torch.where(torch.arange(12)[:, None] < 7, x, 0)

        later = (run_spliced(lm, text, name, ablate_from_7) - clean).abs().amax((0, 2))
        assert later[:7].max() < 1e-6 and later[7] > 1e-3
        assert not any(hook.fwd_hooks for hook in lm.hook_dict.values())


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_pre", "blocks.0.attn.hook_z", "blocks.2.hook_resid_post"])
def test_gradient_flows_through_the_replacement(family, text, name, model_directories):
    """Against a central difference of the loss in a random direction, in float64."""
    lm = load_language_model(str(model_directories[family]), device="cpu", dtype="float64")
    x = run_prefix(lm, text, [name])[name]
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)

    def loss(replacement):
        log_probs = run_spliced(lm, text, name, replacement)[:, :-1].log_softmax(-1)
        return -log_probs.gather(-1, text[:, 1:, None]).sum()

    replacement = x.clone().requires_grad_()
    loss(replacement).backward()
    slope = (loss(x + 1e-3 * direction) - loss(x - 1e-3 * direction)).item() / 2e-3
    rel = 5e-3 if family == "llama" else 1e-4  # its RMSNorm computes in float32
    assert (replacement.grad * direction).sum().item() == pytest.approx(slope, rel=rel)
    assert (replacement.grad[:, :-1].norm(dim=-1) > 0).all()
    assert replacement.grad[:, -1].abs().max() == 0  # nothing is predicted from the last position

    shift = torch.zeros(16, requires_grad=True)
    loss(lambda x: x + shift).backward()
    torch.testing.assert_close(shift.grad.double(), replacement.grad.sum((0, 1)), rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in lm.parameters())


@pytest.mark.parametrize("name", HOOKS)
def test_a_tensor_gives_what_a_function_gives_and_runs_only_the_layers_after_a_residual_hook(lm, text, name):
    clean = run_prefix(lm, text, [name])[name]
    noise = clean + torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    ran = []
    hooks = [b.mlp.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(lm.blocks)]
    suffix = run_spliced(lm, text, name, noise)
    layers_run, layer = sorted(set(ran)), int(name.split(".")[1])
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(suffix, run_spliced(lm, text, name, lambda x: noise))
    first = layer + 1 if name.endswith("resid_post") else layer if name.endswith("resid_pre") else 0
    assert layers_run == list(range(first, 3))
    torch.testing.assert_close(run_spliced(lm, text, name, clean), lm(text))


def test_layers_work_again_after_an_error_in_the_suffix(tiny_gpt2, text):
    before = tiny_gpt2(text)
    with pytest.raises(RuntimeError):
        run_spliced(tiny_gpt2, text, "blocks.2.hook_resid_pre", torch.zeros(1))
    assert torch.equal(tiny_gpt2(text), before)


def test_a_heads_hook_is_flattened_head_by_head(lm, text):
    """Ablating the first d_head of the 16 flattened entries is ablating head 0."""
    name = "blocks.1.attn.hook_z"
    with torch.no_grad():
        raw = {}
        lm.run_with_hooks(text, fwd_hooks=[(name, lambda z, hook: raw.update(z=z.clone()))])
        flat = run_prefix(lm, text, [name])[name]
        assert torch.equal(raw["z"].reshape(3, 12, 16), flat)
        d_head = 16 // lm.cfg.n_heads
        ablated = flat.clone()
        ablated[..., :d_head] = 0

        def ablate(z, hook):
            z = z.reshape(3, 12, lm.cfg.n_heads, d_head).clone()
            z[:, :, 0] = 0
            return z.view(raw["z"].shape)

        expected = lm.run_with_hooks(text, fwd_hooks=[(name, ablate)])
        torch.testing.assert_close(run_spliced(lm, text, name, ablated), expected, atol=1e-6, rtol=1e-6)


def test_a_replacement_need_not_be_contiguous_or_of_the_models_dtype(tiny_gpt2, text):
    name = "blocks.1.attn.hook_z"
    x = run_prefix(tiny_gpt2, text, [name])[name]
    strided = x.double().transpose(0, 2).contiguous().transpose(0, 2)
    assert not strided.is_contiguous()
    torch.testing.assert_close(run_spliced(tiny_gpt2, text, name, strided), tiny_gpt2(text), atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------


def test_token_loss_by_hand():
    """Probabilities 1/4, 3/4 at position 0 and 1/2, 1/2 at position 1; the last position predicts nothing."""
    logits = torch.tensor([[[0.0, math.log(3)], [5.0, 5.0], [9.0, -9.0]]])
    loss = token_loss(logits, torch.tensor([[0, 1, 0]]))
    torch.testing.assert_close(loss, torch.tensor([[math.log(4 / 3), math.log(2)]]))
    loss = token_loss(logits, torch.tensor([[1, 0, 1]], dtype=torch.int32))
    torch.testing.assert_close(loss, torch.tensor([[math.log(4), math.log(2)]]))


def test_token_loss_is_in_fp32_and_has_a_gradient():
    logits = torch.zeros(2, 3, 300, dtype=torch.bfloat16, requires_grad=True)
    loss = token_loss(logits, torch.zeros(2, 3, dtype=torch.long))
    assert loss.dtype == torch.float32 and loss.shape == (2, 2)
    torch.testing.assert_close(loss, torch.full((2, 2), math.log(300)))
    loss.sum().backward()
    assert logits.grad[0, 0, 0].item() == pytest.approx(1 / 300 - 1, rel=1e-2)
    assert logits.grad[:, -1].abs().max() == 0


def test_bits_per_byte_by_hand():
    assert bits_per_byte(math.log(2) * 12, 4) == pytest.approx(3)


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def test_a_loaded_model_is_frozen_and_has_its_tokenizer(lm, tokenizer):
    assert not lm.training and not any(p.requires_grad for p in lm.parameters())
    assert lm(torch.zeros(1, 3, dtype=torch.long)).grad_fn is None
    assert lm.tokenizer.decode(tokenizer("a model")["input_ids"]) == "a model"
    assert lm.tokenizer.eos_token_id == 0
    assert (lm.cfg.n_layers, lm.cfg.d_model, lm.cfg.n_ctx) == (3, 16, 32)


@pytest.fixture
def network(monkeypatch):
    """Addresses that were asked for; none is reached."""
    import huggingface_hub

    asked = []

    def refuse(*address, **_):
        asked.append(address)
        raise OSError("no network in tests")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked


def test_the_network_fixture_sees_a_hub_call(network):
    import huggingface_hub

    with pytest.raises(Exception):  # noqa: B017 - whatever the client makes of it
        huggingface_hub.HfApi().model_info("gpt2")
    assert network


def test_a_local_directory_makes_no_hub_call(family, model_directories, network):
    lm = load_language_model(str(model_directories[family]), device="cpu")
    lm(torch.zeros(1, 3, dtype=torch.long))
    assert not network


@pytest.mark.parametrize("name", ["gpt2", "model@main", "organisation/model"])
def test_a_directory_goes_before_a_hub_name(name, model_directories, tmp_path, monkeypatch, network):
    """Relative paths that look like hub names; also a revision mark is a plain character of a directory's name."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copytree(model_directories["gpt2"], tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert load_language_model(name, device="cpu").cfg.d_model == 16
    assert not network


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/nowhere/model", "model='/nowhere/model': no such directory.*Allowed"),
        ("./nowhere", "no such directory"),
        ("a/b/c", "no such directory"),
        ("gpt2", "HF_HUB_OFFLINE is set"),
        ("openai-community/gpt2@main", "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_model_that_is_not_there(model, message, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=message):
        load_language_model(model, device="cpu")


def test_a_directory_without_config(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_language_model(str(tmp_path))
    monkeypatch.setattr(lm_module, "ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match="model='python-lm': no config.json"):
        load_language_model("python-lm")


def test_devices():
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        for device in ("cuda", "cuda:0"):
            with pytest.raises(ValueError, match=f"device='{device}': this torch sees no CUDA GPU"):
                load_language_model("gpt2", device=device)


def test_dtype(model_directories, text):
    lm = load_language_model(str(model_directories["gpt2"]), device="cpu", dtype="bfloat16")
    name = "blocks.1.hook_resid_pre"
    x = run_prefix(lm, text, [name])[name]
    assert x.dtype == torch.bfloat16
    assert run_spliced(lm, text, name, x.float()).dtype == torch.bfloat16
    for dtype in ("float31", "nn"):
        with pytest.raises(ValueError, match=f"dtype='{dtype}' is no type of torch"):
            load_language_model(str(model_directories["gpt2"]), dtype=dtype)


def test_unknown_hooks_list_near_ones(lm, text):
    with pytest.raises(ValueError, match=r"'blocks.1.hook_resid_per' is not a hook.*blocks\.1\.hook_resid_pre"):
        run_prefix(lm, text, ["blocks.1.hook_resid_per"])
    with pytest.raises(ValueError, match=r"Near ones: .*blocks\.2\.hook_mlp_out"):
        run_spliced(lm, text, "blocks.3.hook_mlp_out", lambda x: x)
    with pytest.raises(ValueError, match="Near ones: .*hook_"):
        check_hook(lm, "")


def test_a_hook_that_is_not_one_vector_a_token(tiny_gpt2, text):
    with pytest.raises(ValueError, match="'blocks.0.attn.hook_pattern' does not give one vector for each token"):
        run_prefix(tiny_gpt2, text, ["blocks.0.attn.hook_pattern"])


def test_a_context_longer_than_the_models(lm):
    for run in (lambda t: run_prefix(lm, t, HOOKS[:1]), lambda t: run_spliced(lm, t, HOOKS[0], lambda x: x)):
        run(torch.ones(1, 32, dtype=torch.long))
        with pytest.raises(ValueError, match="n_ctx=33 is longer than the model's context of 32"):
            run(torch.ones(1, 33, dtype=torch.long))
