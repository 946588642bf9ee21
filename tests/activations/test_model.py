import json
import math
import shutil
import socket
import time

import numpy as np
import pytest
import torch
from families import FAMILIES
from helpers import word_tokenizer
from safetensors.torch import load_file, save_file

from sae_utils import ActivationStore, TopKSAE, evaluate, load_language_model, resolve_device
from sae_utils.activations import model_files
from sae_utils.activations.hooks import (
    check_hook,
    run_prefix,
    run_spliced,
    run_with_gradient,
    token_loss,
)
from sae_utils.activations.model_files import model_hash, write_sums
from sae_utils.analysis.metrics import evaluate_downstream
from sae_utils.analysis.steering import Add, direct_logits, effects, generate
from sae_utils.files import file_hash
from sae_utils.training.end_to_end import Suffix

KINDS = ("hook_resid_pre", "hook_resid_post", "hook_mlp_out", "hook_attn_out", "attn.hook_z")
HOOKS = [f"blocks.{layer}.{kind}" for layer in range(3) for kind in KINDS]
PARTS = {  # where Hugging Face's model has its layers; in a layer: attention, its output projection, mlp
    "gpt2": ("transformer.h", "attn", "attn.c_proj", "mlp"),
    "neox": ("gpt_neox.layers", "attention", "attention.dense", "mlp"),
    "llama": ("model.layers", "self_attn", "self_attn.o_proj", "mlp"),
}


@pytest.fixture(params=["gpt2", "neox", "llama"])
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


EXACT = [f for f in FAMILIES if f not in ("falcon_alibi", "falcon_grouped", "gpt1")]


@pytest.mark.parametrize("name", EXACT)
@torch.no_grad()
def test_every_family_is_spliced_as_transformers_would(name, model_directories, text):
    """Residual hooks against hooks on the raw model's layers; the other two by what they add to the residual stream.

    The layers before a residual hook are left out: a fallback would warn, and a warning is an error in these tests.
    """
    from transformers import AutoModelForCausalLM

    raw = AutoModelForCausalLM.from_pretrained(model_directories[name]).eval()
    layers = next(m for m in raw.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    lm = load_language_model(str(model_directories[name]), device="cpu")
    clean = lm(text)
    torch.testing.assert_close(clean, raw(text).logits, atol=1e-5, rtol=1e-5)
    noise = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(0))
    for i in (1, 2):
        kinds = ("resid_pre", "attn_out", "mlp_out", "resid_post")
        hooks = {kind: f"blocks.{i}.hook_{kind}" for kind in kinds}
        x = dict(zip(kinds, run_prefix(lm, text, list(hooks.values())).values()))
        torch.testing.assert_close(x["resid_post"], x["resid_pre"] + x["attn_out"] + x["mlp_out"], atol=1e-5, rtol=1e-5)
        for kind, hook in hooks.items():
            assert (run_spliced(lm, text, hook, x[kind]) - clean).abs().max() <= 1e-6
            assert (run_spliced(lm, text, hook, lambda x: x.clone()) - clean).abs().max() <= 1e-6
            spliced = run_spliced(lm, text, hook, noise)
            torch.testing.assert_close(spliced, run_spliced(lm, text, hook, lambda x: noise), atol=1e-6, rtol=1e-6)
            assert (spliced - clean).abs().max() > 0.1
        more = run_spliced(lm, text, hooks["mlp_out"], x["mlp_out"] + noise)
        torch.testing.assert_close(more, run_spliced(lm, text, hooks["resid_post"], x["resid_post"] + noise))

        def put(module, args, kwargs):
            return ((noise, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": noise})

        def put_after(module, args, out):
            return (noise, *out[1:]) if isinstance(out, tuple) else noise

        for kind, register in [
            ("resid_pre", lambda: layers[i].register_forward_pre_hook(put, with_kwargs=True)),
            ("resid_post", lambda: layers[i].register_forward_hook(put_after)),
        ]:
            handle = register()
            expected = raw(text).logits
            handle.remove()
            torch.testing.assert_close(run_spliced(lm, text, hooks[kind], noise), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", EXACT)
@torch.no_grad()
def test_every_family_is_measured_and_steered(name, model_directories, text):
    lm, hook = load_language_model(str(model_directories[name]), device="cpu"), "blocks.1.hook_resid_pre"
    rows, sae = text.numpy(), TopKSAE(16, 40, k=4).eval()
    check_hook(lm, hook)
    before = [torch.is_tensor(lm(text)), *(vars(block.original_component).get("forward") for block in lm.blocks)]
    clean = lm(text)

    found = evaluate(sae, lm, rows, hook)
    spliced = run_spliced(lm, text, hook, lambda x: torch.cat([x[:, :1], sae(x[:, 1:]).x_hat], 1))
    assert found["ce_clean"] == pytest.approx(token_loss(clean, text)[:, 1:].mean().item(), abs=1e-5)
    assert found["ce_sae"] == pytest.approx(token_loss(spliced, text)[:, 1:].mean().item(), abs=1e-5)
    downstream = evaluate_downstream(sae, lm, rows, hook)["downstream_fvu"]
    assert list(downstream) == [hook, "blocks.2.hook_resid_pre", "blocks.2.hook_resid_post"]
    assert downstream[hook] == pytest.approx(found["fvu"], rel=1e-4)

    suffix = Suffix(lm, hook)
    last, _ = suffix.run(text, run_prefix(lm, text, [hook])[hook], suffix.later)
    torch.testing.assert_close(suffix.logits(last), clean[:, 1:].flatten(0, 1), atol=1e-5, rtol=1e-5)

    _, gradient = run_with_gradient(lm, text, [hook], hook)
    direction = torch.randn(16, generator=torch.Generator().manual_seed(0))
    losses = [token_loss(run_spliced(lm, text, hook, shifted(1e-3 * sign * direction)), text).sum() for sign in (1, -1)]
    assert (losses[0] - losses[1]).item() / 2e-3 == pytest.approx(
        (gradient @ direction).sum().item(), rel=0.05, abs=0.05
    )

    push = Add(2 * torch.randn(2, 16, generator=torch.Generator().manual_seed(0)))
    found = effects(lm, rows, hook, push, torch.tensor([[5], [6]]))
    new = run_spliced(lm, text, hook, lambda x: torch.cat([x[:, :1], x[:, 1:] + push.directions[0]], 1))
    assert found["max_logit"][0].item() == pytest.approx((new - clean)[:, 1:].abs().amax(-1).mean().item(), rel=1e-3)
    cached = generate(lm, rows, 6, hook, push, seed=1)
    assert torch.equal(cached, generate(lm, rows, 6, hook, push, seed=1, cached=False))
    assert lm.cache_is_exact and not torch.equal(cached[0], cached[1])
    assert direct_logits(lm, push.directions).shape == (2, 300)
    assert before[1:] == [vars(block.original_component).get("forward") for block in lm.blocks]


def shifted(step):
    """x plus a step at the positions that have a gradient: all but the first and the last."""
    return lambda x: torch.cat([x[:, :1], x[:, 1:-1] + step, x[:, -1:]], 1)


def test_a_family_that_needs_its_early_layers_runs_them_all(model_directories, text):
    """GPT-1's layers return a list, which a layer that was left out would not, and it has no cache for generation."""
    lm, hook = load_language_model(str(model_directories["gpt1"]), device="cpu"), "blocks.1.hook_resid_pre"
    with pytest.warns(UserWarning, match="blocks.1.hook_resid_pre: this model needs its early layers"):
        check_hook(lm, hook)
    x = run_prefix(lm, text, [hook])[hook]
    assert torch.equal(run_spliced(lm, text, hook, x), lm(text))
    assert torch.equal(run_spliced(lm, text, hook, 0 * x), run_spliced(lm, text, hook, lambda x: 0 * x))
    push = Add(2 * torch.ones(1, 16))
    assert torch.equal(*(generate(lm, text, 6, hook, push, cached=cached) for cached in (True, False)))
    direct = push.directions @ lm.unembed.original_component.weight.T
    torch.testing.assert_close(direct_logits(lm, push.directions), direct)
    with pytest.raises(ValueError, match="'blocks.1.hook_resid_post' does not give one vector for each token"):
        check_hook(lm, "blocks.1.hook_resid_post")


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("falcon_alibi", "float32", "its logits in TransformerLens are not those of transformers"),
        (
            "falcon_grouped",
            "float32",
            r"TransformerLens \S+ cannot run it \(family 'falcon'; RuntimeError: split.*Use another",
        ),
        ("codegen", "bfloat16", "cannot run it .*same dtype.*Use dtype='float32', or another family"),
    ],
)
def test_a_family_that_transformer_lens_runs_otherwise_is_refused(name, dtype, message, model_directories):
    with pytest.raises(ValueError, match=message):
        load_language_model(str(model_directories[name]), device="cpu", dtype=dtype)


def test_a_hook_whose_value_the_model_does_not_use_is_refused_before_any_harvest(tiny_llama, text):
    with pytest.raises(ValueError, match="'rotary_emb.hook_in': what is put there does not reach the logits"):
        ActivationStore(tiny_llama, text.numpy(), "rotary_emb.hook_in")


def test_layers_work_again_after_an_error_in_the_suffix(tiny_gpt2, text):
    before = tiny_gpt2(text)
    wrong = [
        torch.zeros(1),
        torch.zeros(3, 16, 12),
        torch.zeros(36, 16),
        None,
        lambda x: x[:, 1:],
    ]  # two as many numbers as x
    for replacement in wrong:
        with pytest.raises(ValueError, match=r"it has to be a tensor \[3, 12, 16\], as x there"):
            run_spliced(tiny_gpt2, text, "blocks.2.hook_resid_pre", replacement)
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
    import huggingface_hub.constants

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
        ("distilgpt2", "HF_HUB_OFFLINE is set, and the hub cache does not hold it"),
        ("openai-community/gpt2@main", "HF_HUB_OFFLINE is set"),
        ("pyton-lm", r"no such directory \(did you mean 'python-lm'\?\)\. Allowed: .* a hub name such as 'openai-"),
        ("my_modle", r"no such directory \(did you mean 'my_model'\?\)"),
        ("./my_modle", r"no such directory \(did you mean 'my_model'\?\)"),
        ("runs/my_modle", r"no such directory \(did you mean 'my_model'\?\)"),
        ("file.txt", "it is a file, not a directory"),
        ("a b", "model='a b': no such directory, and no hub model can have this name. Allowed"),
        (" ", "no hub model can have this name"),
        ("owner/na me", "no hub model can have this name"),
        ("x\0y", "no hub model can have this name"),
        ("@main", "no hub model can have this name"),
        ("~nobody_here/x", "model='~nobody_here/x': "),
    ],
)
def test_a_model_that_is_not_there(model, message, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").touch()
    for directory in ("my_model", "runs/my_model"):
        (tmp_path / directory).mkdir(parents=True)
    for use in [load_language_model] + [model_hash] * ("HF_HUB" not in message):
        with pytest.raises(FileNotFoundError, match=message):
            use(model)


@pytest.mark.parametrize("model", [None, 3, "", ["python-lm"]])
def test_a_model_that_is_no_name(model):
    with pytest.raises(ValueError, match="model=.*: it has to be 'python-lm', a directory, or a hub name"):
        load_language_model(model, device="cpu")


def test_a_near_name_is_suggested_without_the_network(network):
    """Already where a run is identified, before any kernel starts."""
    for use in (load_language_model, model_hash):
        with pytest.raises(FileNotFoundError, match="did you mean 'python-lm'"):
            use("pyton-lm")
    assert not network


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine that holds one model, `org/pickled`, without safetensors."""
    import http.server
    import threading

    import huggingface_hub.constants

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = "/org/pickled/" in self.path
            names = ["config.json", "pytorch_model.bin"]
            body = {"id": "org/pickled", "sha": 40 * "a", "siblings": [{"rfilename": name} for name in names]}
            if "/tree/" in self.path:
                body = [{"type": "file", "path": name, "size": 2, "oid": 40 * "b"} for name in names]
            body = b"{}" if "/resolve/" in self.path else json.dumps(body).encode()
            self.send_response(200 if found else 404)
            if not found:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("X-Repo-Commit", 40 * "a")
            self.send_header("ETag", '"b"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    files = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(huggingface_hub.HfApi, "__init__", endpoint(f"http://127.0.0.1:{server.server_port}"))
    yield server
    server.shutdown()
    server.server_close()


def endpoint(url):
    """HfApi.__init__ with another address: the one that it knows was read when it was imported."""
    import huggingface_hub

    own = huggingface_hub.HfApi.__init__
    return lambda self, endpoint=None, **kwargs: own(self, endpoint=url, **kwargs)


def test_the_hub_does_not_have_it_or_cannot_be_reached(hub):
    start = time.monotonic()
    with pytest.raises(FileNotFoundError, match="model='org/nothing': no such directory, and the hub does not have it"):
        load_language_model("org/nothing", device="cpu")
    with pytest.raises(
        ValueError,
        match="model.safetensors is missing, and only safetensors are loaded.*load the model and its tokenizer",
    ):
        load_language_model("org/pickled", device="cpu")
    hub.shutdown()
    hub.server_close()
    with pytest.raises(FileNotFoundError, match="the hub cannot be reached.*and the hub cache does not hold it"):
        load_language_model("org/nothing", device="cpu")
    assert time.monotonic() - start < 10


# ---------------------------------------------------------------------------------------------------------------------
# Files that are not loaded
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(model_directories, tmp_path):
    return shutil.copytree(model_directories["gpt2"], tmp_path / "model")


def save_pickle(directory, shards=1):
    """The model's weights as transformers 4 wrote them, in place of the safetensors."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    if shards == 1:
        torch.save(tensors, directory / "pytorch_model.bin")
        return
    files = {name: f"pytorch_model-0000{i % shards + 1}-of-0000{shards}.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({n: tensors[n] for n in names if files[n] == file}, directory / file)
    index = {"metadata": {}, "weight_map": files}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 2])
def test_weights_that_are_not_safetensors_are_refused_and_loaded_after_what_the_message_says(directory, shards):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    expected = load_language_model(str(directory), device="cpu")(torch.arange(5)[None])
    save_pickle(directory, shards)
    only = r"model/model\.safetensors is missing, and only safetensors are loaded"
    with pytest.raises(
        ValueError, match=only + ".* load the model and its tokenizer with transformers, and save_pretrained both"
    ):
        load_language_model(str(directory), device="cpu")
    new = directory.parent / "new"
    for automatic in (AutoModelForCausalLM, AutoTokenizer):
        automatic.from_pretrained(directory).save_pretrained(new)
    lm = load_language_model(new, device="cpu")
    torch.testing.assert_close(lm(torch.arange(5)[None]), expected)


@pytest.mark.parametrize("file", ["model.pt", "tf_model.h5", "model.gguf"])
def test_other_formats_are_refused_too(directory, file):
    (directory / "model.safetensors").rename(directory / file)
    with pytest.raises(ValueError, match=r"model/model\.safetensors is missing, and only safetensors are loaded"):
        load_language_model(str(directory), device="cpu")


def test_of_two_formats_only_safetensors_are_read(directory):
    """The pickle beside them would stop whoever opened it."""
    (directory / "pytorch_model.bin").write_bytes(b"not a pickle")
    before = model_hash(str(directory))
    load_language_model(str(directory), device="cpu")
    (directory / "pytorch_model.bin").unlink()
    assert model_hash(str(directory)) == before


def test_adapters_are_refused_and_code_is_not_run(directory):
    expected = load_language_model(str(directory), device="cpu")(torch.arange(5)[None])
    (directory / "modeling_gpt2.py").write_text("raise SystemExit")
    config = json.loads((directory / "config.json").read_text())
    own = {"AutoConfig": "modeling_gpt2.Own", "AutoModelForCausalLM": "modeling_gpt2.Own"}
    (directory / "config.json").write_text(json.dumps(config | {"auto_map": own}))
    assert torch.equal(load_language_model(str(directory), device="cpu")(torch.arange(5)[None]), expected)
    (directory / "config.json").write_text(json.dumps(config | {"auto_map": own, "model_type": "gpt99"}))
    with pytest.raises(ValueError, match="no tokenizer in|transformers cannot make a model"):
        load_language_model(str(directory), device="cpu")
    (directory / "adapter_config.json").write_text("{}")
    for use in (model_hash, lambda path: load_language_model(path, device="cpu")):
        with pytest.raises(ValueError, match="model holds an adapter. Merge it"):
            use(str(directory))


def test_the_hash_covers_all_that_determines_the_result(directory):
    """Every shard and the index, configuration, and tokenizer; not what generation or training left there."""
    shard(directory)
    seen = [model_hash(str(directory))]
    for file in sorted(directory.iterdir()):
        if file.name != "generation_config.json":
            file.write_bytes(file.read_bytes() + b" ")
            seen.append(model_hash(str(directory)))
    assert len(set(seen)) == len(seen) == 7
    for name in ("generation_config.json", "training.json", "optimizer.pt", "README.md"):
        (directory / name).write_text("{}")
    assert model_hash(str(directory)) == seen[-1]


def shard(directory):
    """Write the model anew in two shards and an index."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="45KB")
    assert len(list(directory.glob("model-*.safetensors"))) == 2


def damage(directory, kind):
    weights = directory / "model.safetensors"
    raw, tensors = weights.read_bytes(), load_file(weights)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    if kind == "truncated":
        weights.write_bytes(raw[:-100])
    elif kind == "foreign":
        weights.write_bytes(b"<html>not found</html>" * 9)
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "shape":
        save_file(tensors | {"transformer.wte.weight": torch.zeros(299, 16)}, weights, {"format": "pt"})
    elif kind == "tensor":
        save_file(
            {k: v for k, v in tensors.items() if k != "transformer.h.1.mlp.c_fc.weight"}, weights, {"format": "pt"}
        )
    elif kind == "nan":
        tensors["transformer.h.1.mlp.c_fc.weight"][3, 4] = torch.nan
        save_file(tensors, weights, {"format": "pt"})
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no tokenizer":
        (directory / "tokenizer.json").unlink()
    elif kind == "tokenizer":
        (directory / "tokenizer.json").write_text("{")
    elif kind == "config":
        (directory / "config.json").write_text("{")
    elif kind == "no settings":
        (directory / "config.json").write_text("[]")
    elif kind == "family":
        (directory / "config.json").write_text('{"model_type": "gpt99"}')
    elif kind == "empty tokenizer":
        (directory / "tokenizer.json").write_text("{}")
    elif kind == "list of settings":
        (directory / "tokenizer_config.json").write_text("[]")
    elif kind == "words without a tokenizer":  # transformers makes an empty one
        (directory / "tokenizer.json").unlink()
        (directory / "tokenizer_config.json").unlink()
        (directory / "vocab.txt").write_text("one\ntwo\n")
    elif kind == "activation":
        config = directory / "config.json"
        config.write_text(config.read_text().replace("gelu_new", "gelu_knew"))
    elif kind.startswith("index"):
        shard(directory)
        weight_map = {"index": None, "index list": [1], "index null": {"a": None}, "index lists": {"a": [1]}}[kind]
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    elif kind == "sums of another encoding":
        (directory / "SHA256SUMS").write_bytes(b"caf\xe9\n")
    elif kind == "missing shard":
        shard(directory)
        (directory / second).unlink()
    elif kind == "shard elsewhere":  # no hash would cover it
        shard(directory)
        (directory / second).rename(directory.parent / second)
        index = directory / "model.safetensors.index.json"
        index.write_text(index.read_text().replace(second, f"../{second}"))
    elif kind == "swapped shard":
        shard(directory)
        (directory / second).write_bytes((directory / first).read_bytes())
    elif kind in ("bit", "tail"):
        write_sums(directory)
        changed = bytearray(raw)
        changed[-1000] ^= 4
        weights.write_bytes(changed if kind == "bit" else raw[:-64] + bytes(64))
    elif kind == "not listed":
        write_sums(directory)
        sums = directory / "SHA256SUMS"
        sums.write_text("".join(line for line in sums.open() if "safetensors" not in line))
    elif kind == "no sums":
        (directory / "SHA256SUMS").write_text("hello\n")
    elif kind == "lost":
        write_sums(directory)
        (directory / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", r"model/model\.safetensors is truncated or no safetensors file"),
        ("foreign", r"model/model\.safetensors is truncated or no safetensors file"),
        ("empty", r"model/model\.safetensors is truncated or no safetensors file"),
        (
            "shape",
            r"model: the weights do not fit config\.json in transformer\.wte\.weight, \[299, 16\] and not \[300, 16\]",
        ),
        ("tensor", r"model: the weights have no tensor transformer\.h\.1\.mlp\.c_fc\.weight \(1 such in all\)"),
        ("nan", r"model: transformer\.h\.1\.mlp\.c_fc\.weight holds NaN or infinity as float32"),
        ("no weights", r"model/model\.safetensors is missing, and only safetensors are loaded"),
        ("no tokenizer", r"no tokenizer in .*/model: save one there \(tokenizer\.save_pretrained\)"),
        ("tokenizer", r"no tokenizer in .*/model: save one there .* makes of the files there: "),
        ("config", r"model/config\.json is not valid JSON"),
        ("no settings", r"model/config\.json holds no JSON object"),
        ("family", r"model: transformers cannot make a model of config\.json \(ValueError: .*gpt99"),
        ("empty tokenizer", r"no tokenizer in .*/model: save one there .* makes of the files there: KeyError"),
        ("list of settings", r"no tokenizer in .*/model: save one there .* makes of the files there: "),
        (
            "words without a tokenizer",
            r"no tokenizer in .*/model: save one there .* makes of the files there: it is empty",
        ),
        ("activation", r"model: transformers cannot make a model of config\.json \(KeyError: .*gelu_knew"),
        ("index", r"model\.safetensors\.index\.json has no weight_map from tensors to files"),
        ("index list", r"model\.safetensors\.index\.json has no weight_map from tensors to files"),
        ("index null", r"model/None is missing"),
        ("index lists", r"model\.safetensors\.index\.json has no weight_map from tensors to files"),
        ("sums of another encoding", r"SHA256SUMS has no line for model\.safetensors: write it anew with sha256sum"),
        (
            "missing shard",
            r"model-00002-of-00002\.safetensors is missing, and only safetensors are loaded",
        ),
        (
            "shard elsewhere",
            r"\.\./model-00002-of-00002\.safetensors is missing, and only safetensors are loaded",
        ),
        ("swapped shard", r"model: the weights have no tensor .*they are another model's"),
        ("bit", r"model/model\.safetensors is damaged: its bytes are not those that .*SHA256SUMS names"),
        ("tail", r"model/model\.safetensors is damaged: its bytes are not those that .*SHA256SUMS names"),
        ("not listed", r"SHA256SUMS has no line for model\.safetensors"),
        ("no sums", r"SHA256SUMS has no line for model\.safetensors: write it anew with sha256sum"),
        ("lost", r"tokenizer_config\.json is missing: it is one that .*SHA256SUMS names"),
    ],
)
def test_damaged_files_are_named(directory, kind, message):
    damage(directory, kind)
    with pytest.raises(ValueError, match=message):
        load_language_model(str(directory), device="cpu")


def test_the_built_in_model_is_verified(tmp_path, monkeypatch):
    shutil.copytree(model_files.ASSETS / "python-lm", tmp_path / "python-lm")
    monkeypatch.setattr(model_files, "ASSETS", tmp_path)
    weights = tmp_path / "python-lm/model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 2] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_language_model("python-lm", device="cpu")


def test_the_hub_cache_is_verified(directory, tmp_path, monkeypatch):
    """Its large files are links to files named by their SHA-256."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    store = tmp_path / "hub/models--org--tiny"
    snapshot = store / "snapshots" / (40 * "b")
    for path in (store / "blobs", store / "refs", snapshot):
        path.mkdir(parents=True)
    (store / "refs/main").write_text(40 * "b")
    for file in directory.iterdir():
        blob = store / "blobs" / file_hash(file, length=64 if file.suffix == ".safetensors" else 40)
        file.rename(blob)
        (snapshot / file.name).symlink_to(blob)
    load_language_model("org/tiny", device="cpu")
    weights = (snapshot / "model.safetensors").resolve()
    weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))
    with pytest.raises(
        ValueError, match=r"model\.safetensors is damaged: its bytes are not those that its name in the hub cache"
    ):
        load_language_model("org/tiny", device="cpu")


def test_weights_that_config_has_no_place_for_are_said(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    with pytest.warns(
        UserWarning, match=r"model: 6 tensors of the weights have no place in config.json, such as .*h\.2\."
    ):
        load_language_model(str(directory), device="cpu")


def test_special_tokens_that_the_tokenizer_does_not_have_are_not_invented(directory):
    word_tokenizer([f"w{i}" for i in range(200)]).save_pretrained(directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_language_model(str(directory), device="cpu").tokenizer
    assert tokenizer.eos_token_id is None and tokenizer.bos_token_id is None
    assert tokenizer("w0 w1", add_special_tokens=False)["input_ids"] == [1, 2]


def test_a_model_with_a_short_context_is_loaded(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"n_positions": 4}))
    weights = load_file(directory / "model.safetensors")
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:4].clone()
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    lm = load_language_model(str(directory), device="cpu")
    check_hook(lm, HOOKS[0])
    assert lm.cfg.n_ctx == 4


def test_a_directory_without_config(tmp_path, monkeypatch):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_language_model(str(tmp_path))
    monkeypatch.setattr(model_files, "ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match="model='python-lm': no config.json"):
        load_language_model("python-lm")


def test_devices():
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        for device in ("cuda", "cuda:0"):
            with pytest.raises(ValueError, match=f"device='{device}': this torch sees no CUDA GPU"):
                load_language_model("gpt2", device=device)
    for device in ("gpu", None, -1, "meta", torch.float32):
        with pytest.raises(ValueError, match=r"device=.*Allowed here: 'auto', 'cpu'"):
            load_language_model("gpt2", device=device)


def test_dtype(model_directories, text):
    lm = load_language_model(str(model_directories["gpt2"]), device=torch.device("cpu"), dtype=torch.bfloat16)
    name = "blocks.1.hook_resid_pre"
    x = run_prefix(lm, text, [name])[name]
    assert x.dtype == torch.bfloat16
    assert run_spliced(lm, text, name, x.float()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("float31", r"dtype='float31' \(did you mean 'float32'\?\): allowed are 'float32', 'bf"),
        ("fp16", "dtype='fp16': allowed are 'float32', 'bfloat16', 'float16'"),
        ("nn", "allowed are 'float32'"),
        (torch.int8, "dtype='int8': allowed are"),
        (None, "dtype='None': allowed are"),
    ],
)
def test_dtypes_that_there_are_not(dtype, message):
    with pytest.raises(ValueError, match=message):
        load_language_model(dtype=dtype)


def test_unknown_hooks_list_near_ones(lm, text):
    with pytest.raises(ValueError, match=r"'blocks.1.hook_resid_per' is not a hook.*blocks\.1\.hook_resid_pre"):
        run_prefix(lm, text, ["blocks.1.hook_resid_per"])
    with pytest.raises(ValueError, match=r"Near ones: .*blocks\.2\.hook_mlp_out"):
        run_spliced(lm, text, "blocks.3.hook_mlp_out", lambda x: x)
    for name in ("", None, 3, "blocks.*.hook_mlp_out"):
        with pytest.raises(ValueError, match="Near ones: .*hook_"):
            check_hook(lm, name)
    for name in ("transformer.h.1.mlp", "model.layers.1", "blocks.9.hook_mlp_out", "blocks.-1.hook_mlp_out"):
        with pytest.raises(ValueError, match=r"whose 3 layers are blocks\.0 to blocks\.2\. Near ones: blocks"):
            check_hook(lm, name)
    with pytest.raises(ValueError, match="lm is str: it has to be a model that load_language_model returned"):
        check_hook("python-lm", HOOKS[0])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.full((1, 4), 300), "holds token 300, and the model's vocabulary has 300"),
        (torch.tensor([[1, -1]]), "holds token -1, and"),
        (torch.ones(1, 4), r"tokens are torch.float32 \[1, 4\]: they have to be whole numbers \[batch, n_ctx\]"),
        (torch.ones(4, dtype=torch.long), r"tokens are torch.int64 \[4\]"),
        (torch.ones(0, 4, dtype=torch.long), r"tokens are torch.int64 \[0, 4\]"),
        ([[1, 2]], "tokens are list"),
    ],
)
def test_tokens_that_are_none_of_this_model(tokens, message, tiny_gpt2):
    hook = "blocks.1.hook_resid_pre"
    for run in (
        lambda: run_prefix(tiny_gpt2, tokens, [hook]),
        lambda: run_spliced(tiny_gpt2, tokens, hook, lambda x: x),
        lambda: run_with_gradient(tiny_gpt2, tokens, [hook], hook),
    ):
        with pytest.raises(ValueError, match=message):
            run()


def test_a_hook_that_is_not_one_vector_a_token(tiny_gpt2, text):
    with pytest.raises(ValueError, match="'blocks.0.attn.hook_pattern' does not give one vector for each token"):
        run_prefix(tiny_gpt2, text, ["blocks.0.attn.hook_pattern"])


def test_a_context_longer_than_the_models(lm):
    for run in (lambda t: run_prefix(lm, t, HOOKS[:1]), lambda t: run_spliced(lm, t, HOOKS[0], lambda x: x)):
        run(torch.ones(1, 32, dtype=torch.long))
        with pytest.raises(ValueError, match="n_ctx=33 is longer than the model's context of 32"):
            run(torch.ones(1, 33, dtype=torch.long))
