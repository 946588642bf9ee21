import numpy as np
import pytest
import torch

from sae_utils import TopKSAE
from sae_utils.activations.hooks import run_spliced
from sae_utils.analysis.metrics import kl_divergence
from sae_utils.analysis.steering import (
    Add,
    SetLatent,
    direct_logits,
    effects,
    generate,
    generation_nats,
    latent_effects,
    specificity,
    steer,
    target_logprob,
)

HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture
def rows():
    return np.random.default_rng(0).integers(1, 300, (3, 10))


@torch.no_grad()
def test_effects_of_a_direction_are_those_of_one_plain_run(tiny_gpt2, rows):
    directions, norm = torch.randn(5, 16), 2.0
    found = latent_effects(tiny_gpt2, rows, HOOK, directions, norm, at_once=1)
    together = latent_effects(tiny_gpt2, rows, HOOK, directions, norm)
    tokens = torch.from_numpy(rows)
    clean = tiny_gpt2(tokens)[:, 1:]
    for i, d in enumerate(directions):
        push = torch.zeros(1, 10, 16)
        push[:, 1:] = norm * d / d.norm()
        new = run_spliced(tiny_gpt2, tokens, HOOK, lambda x: x + push)[:, 1:]
        own = (new.log_softmax(-1) - clean.log_softmax(-1))[..., found["tokens"][i]]
        wanted = {
            "kl": kl_divergence(clean, new).mean(),
            "max_logit": (new - clean).abs().amax(-1).mean(),
            "own_logprob": own.mean(),
        }
        for name, value in wanted.items():
            torch.testing.assert_close(found[name][i], value, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(together[name][i], value, rtol=1e-3, atol=1e-5)


def test_a_direction_of_length_zero_is_an_error(tiny_gpt2, rows):
    with pytest.raises(ValueError, match="direction 1 has length 0"):
        latent_effects(tiny_gpt2, rows, HOOK, torch.eye(2, 16) * torch.tensor([[1.0], [0.0]]), 1.0)


@torch.no_grad()
def test_direct_logits_by_hand(tiny_gpt2, tiny_llama):
    d = torch.randn(4, 16)
    norm, head = tiny_gpt2.ln_final.original_component, tiny_gpt2.unembed.original_component.weight
    centred = d - d.mean(1, keepdim=True)
    wanted = centred / (centred.square().mean(1, keepdim=True) + norm.eps).sqrt() * norm.weight @ head.T
    torch.testing.assert_close(direct_logits(tiny_gpt2, d), wanted, rtol=1e-4, atol=1e-4)
    assert direct_logits(tiny_llama, d).shape == (4, 300)


# ---------------------------------------------------------------------------------------------------------------------
# Interventions
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sae():
    torch.manual_seed(0)
    return TopKSAE(16, 40, k=4).eval()


@torch.no_grad()
def test_a_latent_is_set_with_the_error_kept_or_dropped(sae):
    x = torch.randn(1, 3, 5, 16)
    f = sae.encode(x)[0]
    latents, values = [7, 0, 39], torch.tensor([5.0, 0.0, 1.0])
    kept, dropped = SetLatent(sae, latents, values)(x), SetLatent(sae, latents, values, keep_error=False)(x)
    each = SetLatent(sae, latents, values)(x.expand(3, -1, -1, -1))
    for i, latent in enumerate(latents):
        wanted = f.clone()
        wanted[..., latent] = values[i]
        torch.testing.assert_close(dropped[i], sae.decode(wanted))
        torch.testing.assert_close(kept[i], x[0] + sae.decode(wanted) - sae.decode(f))
        torch.testing.assert_close(each[i], kept[i])


def test_what_cannot_be_steered_is_said(tiny_gpt2, rows, sae):
    with pytest.raises(ValueError, match="latents: 40 is outside this SAE; allowed are 0 to 39"):
        SetLatent(sae, [3, 40])
    sae.tokens_since_fired[5], sae.dead_after = 100, 50
    with pytest.raises(ValueError, match="latent 5 is dead"):
        SetLatent(sae, [4, 5])
    with pytest.raises(ValueError, match="positions: 10 is outside the context; allowed are 0 to 9"):
        next(steer(tiny_gpt2, rows, HOOK, Add(torch.ones(1, 16)), positions=[10]))
    with pytest.raises(ValueError, match="at: -1 is outside the context; allowed are 0 to 9"):
        effects(tiny_gpt2, rows, HOOK, Add(torch.ones(1, 16)), torch.tensor([[5]]), at=[-1])
    with pytest.raises(ValueError, match="positions: 12 is outside the context; allowed are 0 to 11"):
        generate(tiny_gpt2, rows, 2, HOOK, Add(torch.ones(1, 16)), positions=[12])
    with pytest.raises(ValueError, match="latents: -1 is outside this SAE; allowed are 0 to 39"):
        SetLatent(sae, [-1])
    with pytest.raises(ValueError, match="more than the model's context of 32"):
        generate(tiny_gpt2, rows, 23, HOOK, Add(torch.ones(1, 16)))
    with pytest.raises(ValueError, match="contexts for 2 interventions, but there are 3"):
        next(steer(tiny_gpt2, np.stack([rows, rows]), HOOK, Add(torch.ones(3, 16))))


ONE = torch.ones(1, 16)
TARGET = torch.tensor([[5]])


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda lm, rows, sae: SetLatent(sae, [1.5]), r"latents=\[1.5\]: they have to be whole numbers from 0 to 39"),
        (lambda lm, rows, sae: SetLatent(sae, [True]), "latents=.*whole numbers from 0 to 39, at least one"),
        (lambda lm, rows, sae: SetLatent(sae, []), r"latents=\[\]: .*at least one"),
        (lambda lm, rows, sae: SetLatent(sae, [1, 2], [1.0, 2.0, 3.0]), r"values=.*3.0.*: one finite number, or one for each of 2 latents"),
        (lambda lm, rows, sae: SetLatent(sae, [1], float("nan")), "values=.*nan.*: one finite number"),
        (lambda lm, rows, sae: Add(torch.ones(16)), r"directions are torch.float32 \[16\]: .* finite tensor \[n, d_in\]"),
        (lambda lm, rows, sae: Add([[1.0]]), "directions are list"),
        (lambda lm, rows, sae: Add(ONE * torch.nan), "directions are .* finite tensor"),
        (lambda lm, rows, sae: next(steer(lm, rows, HOOK, Add(torch.ones(1, 1)))), "1 wide, and x at this hook is 16 wide"),
        (lambda lm, rows, sae: next(steer(lm, rows, HOOK, Add(ONE), positions=[])), r"positions=\[\]"),
        (lambda lm, rows, sae: next(steer(lm, rows, HOOK, Add(ONE), positions=[1.5])), r"positions=\[1.5\]"),
        (lambda lm, rows, sae: effects(lm, rows, HOOK, Add(ONE), TARGET, at=[]), r"at=\[\]"),
        (lambda lm, rows, sae: effects(lm, rows, HOOK, Add(ONE), torch.tensor([[300]])), "targets: 300 is outside the vocab"),
        (lambda lm, rows, sae: effects(lm, rows, HOOK, Add(ONE), torch.tensor([[-1]])), "targets: -1 is outside the vocab"),
        (lambda lm, rows, sae: effects(lm, rows, HOOK, Add(ONE), torch.tensor([5])), r"targets have shape \[1\]"),
        (lambda lm, rows, sae: effects(lm, rows, HOOK, Add(ONE), {"a": TARGET, "b": TARGET + 300}), "targets: 305"),
        (lambda lm, rows, sae: latent_effects(lm, rows, HOOK, ONE, 1.0, tokens=torch.tensor([300])), "targets: 300"),
        (lambda lm, rows, sae: latent_effects(lm, rows, HOOK, ONE, float("nan")), "norm=nan"),
        (lambda lm, rows, sae: next(steer(lm, rows + 300, HOOK, Add(ONE))), "another tokenizer's"),
        (lambda lm, rows, sae: next(steer(lm, rows[0], HOOK, Add(ONE))), "rows are torch.int64 .*tokens are .contexts, n_ctx"),
        (lambda lm, rows, sae: next(steer(lm, rows * 1.0, HOOK, Add(ONE))), "tokens are torch.float64"),
        (lambda lm, rows, sae: generate(lm, rows, 2, HOOK, Add(ONE), temperature=-1), "temperature=-1: .*at least 0"),
        (lambda lm, rows, sae: generate(lm, rows, 2, HOOK, Add(ONE), seed=-1), "seed=-1"),
        (lambda lm, rows, sae: generate(lm, rows, 0, HOOK, Add(ONE)), "n_new=0"),
        (lambda lm, rows, sae: generate(lm, rows - 1, 2.0, HOOK, Add(ONE)), "n_new=2.0"),
        (lambda lm, rows, sae: generate(lm, 0 * rows - 1, 2, HOOK, Add(ONE)), "holds token -1"),
        (lambda lm, rows, sae: generation_nats(lm, torch.from_numpy(rows)[None], 0), "n_prompt=0: .* from 1 to 9"),
        (lambda lm, rows, sae: generation_nats(lm, torch.from_numpy(rows)[None], 10), "n_prompt=10"),
    ],
)  # fmt: skip
def test_values_that_mean_nothing_are_named(tiny_gpt2, rows, sae, use, message):
    with pytest.raises(ValueError, match=message):
        use(tiny_gpt2, rows, sae)


def test_indices_of_any_type_and_plain_lists_of_tokens(tiny_gpt2, rows, sae):
    wanted = next(steer(tiny_gpt2, rows, HOOK, SetLatent(sae, [1, 2], 3.0), [4, 5], [6]))[2]
    for latents, positions, tokens in [
        (np.array([1, 2]), {4, 5}, rows.astype(np.uint16)),
        (torch.tensor([1, 2], dtype=torch.int32), range(4, 6), rows.tolist()),
        (range(1, 3), torch.tensor([4, 5]), torch.from_numpy(rows).int()),
    ]:
        found = next(steer(tiny_gpt2, tokens, HOOK, SetLatent(sae, latents, 3), positions, np.array([6])))[2]
        assert torch.equal(found, wanted)


@torch.no_grad()
@pytest.mark.parametrize("hook_name", [HOOK, "blocks.1.hook_mlp_out"])
def test_steering_acts_at_the_chosen_positions_alone_and_chunks_change_nothing(tiny_gpt2, rows, hook_name):
    directions = torch.randn(4, 16)
    own = np.stack([rows, rows + 1, rows + 2, rows + 3])
    for contexts in (rows, own):
        found = [
            torch.cat(
                [new for _, _, new, _ in steer(tiny_gpt2, contexts, hook_name, Add(directions), [4], [3, 6], size)]
            )
            for size in (1, 2**24)
        ]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
        for i, d in enumerate(directions):
            push = torch.zeros(10, 16)
            push[4] = d
            tokens = torch.from_numpy(contexts if contexts.ndim == 2 else contexts[i])
            wanted = run_spliced(tiny_gpt2, tokens, hook_name, lambda x, push=push: x + push)[:, [3, 6]]
            torch.testing.assert_close(found[0][i], wanted, rtol=1e-4, atol=1e-4)
            clean = tiny_gpt2(tokens)[:, [3, 6]]
            torch.testing.assert_close(wanted[:, 0], clean[:, 0], rtol=1e-4, atol=1e-4)  # 3 comes before 4


# ---------------------------------------------------------------------------------------------------------------------
# Measures, by hand
# ---------------------------------------------------------------------------------------------------------------------


def test_measures_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.125]]))
    new = torch.log(torch.tensor([[0.125, 0.5, 0.25, 0.125]]))
    assert target_logprob(logits, new, torch.tensor([1])).item() == pytest.approx(np.log(2))
    assert target_logprob(logits, new, torch.tensor([1, 2])).item() == pytest.approx(np.log(0.75 / 0.375))
    # Δ logits 4, 1, 2, 3 of which token 0 is the target: (4 − 2) / sqrt(2/3)
    delta = torch.tensor([[4.0, 1, 2, 3]])
    assert specificity(logits, logits + delta, torch.tensor([0])).item() == pytest.approx(2 / (2 / 3) ** 0.5, rel=1e-5)
    # targets of their own for each intervention
    two = torch.stack([new, new])
    found = target_logprob(logits[None], two, torch.tensor([[1], [0]]))
    assert found.flatten().tolist() == pytest.approx([np.log(2), np.log(0.25)])


def test_effect_per_norm_is_the_effect_over_the_length_added(tiny_gpt2, rows):
    found = effects(tiny_gpt2, rows, HOOK, Add(3.0 * torch.eye(2, 16)), torch.tensor([[5], [6]]), at=[9])
    assert found["norm"].tolist() == pytest.approx([3, 3])
    torch.testing.assert_close(found["logprob_per_norm"], found["target_logprob"] / 3)
    sets = {"target_logprob": torch.tensor([[5], [6]]), "other": torch.tensor([[6], [5]])}
    push = Add(3.0 * torch.eye(2, 16))
    each = effects(tiny_gpt2, rows, HOOK, push, sets, at=[9], each_context=True, at_once=1)
    swapped = effects(tiny_gpt2, rows, HOOK, push, sets["other"], at=[9])
    torch.testing.assert_close(each.pop("other").mean(1), swapped["target_logprob"])
    assert each["norm"].shape == (2, 1)
    for name, value in each.items():
        torch.testing.assert_close(value.mean(1), found[name])
        assert name == "norm" or value.shape == (2, 3)
    nothing = effects(tiny_gpt2, rows, HOOK, Add(torch.zeros(1, 16)), torch.tensor([[5]]))
    assert all(abs(float(v)) < 1e-5 for k, v in nothing.items() if k != "specificity")


# ---------------------------------------------------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "neox", "llama"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_cached_generation_is_uncached_generation(request, rows, family, temperature):
    lm = request.getfixturevalue(f"tiny_{family}")
    torch.manual_seed(1)
    edits = [Add(2 * torch.randn(4, 16)), SetLatent(TopKSAE(16, 40, k=4).eval(), [1, 2, 3, 4], 4.0)]
    for edit in edits:
        for positions in (None, [2, 12]):  # one in the prompt, one generated
            kw = dict(temperature=temperature, seed=3)
            cached = generate(lm, rows, 6, HOOK, edit, positions, **kw)
            assert torch.equal(cached, generate(lm, rows, 6, HOOK, edit, positions, cached=False, **kw))
            assert torch.equal(cached, generate(lm, rows, 6, HOOK, edit, positions, at_once=1, **kw))
    assert cached.shape == (4, 3, 16) and (cached[..., :10] == torch.from_numpy(rows)).all()
    clean = generate(lm, rows, 6, HOOK, Add(torch.zeros(1, 16)), **kw)
    steered = generate(lm, rows, 6, HOOK, edits[0], **kw)
    assert not torch.equal(clean[0], steered[0])


@torch.no_grad()
def test_fluency_is_the_loss_of_the_generated_tokens_alone(tiny_gpt2, rows):
    texts = torch.from_numpy(np.stack([rows, rows + 1]))
    found = generation_nats(tiny_gpt2, texts, 7, batch_rows=4)
    for i in range(2):
        log_p = tiny_gpt2(texts[i]).log_softmax(-1)
        by_hand = -torch.stack([log_p[:, p - 1].gather(1, texts[i][:, p : p + 1])[:, 0] for p in (7, 8, 9)]).mean(0)
        torch.testing.assert_close(found[i], by_hand)


@pytest.mark.parametrize("kind", [torch.Tensor.double, torch.Tensor.bfloat16])
def test_directions_of_any_type_are_pushed_alike(tiny_gpt2, kind):
    directions, rows = torch.eye(16)[:2] + 0.5, np.arange(12).reshape(2, 6)
    expected = latent_effects(tiny_gpt2, rows, HOOK, directions, 1.0)
    found = latent_effects(tiny_gpt2, rows, HOOK, kind(directions), 1.0, tokens=expected["tokens"].tolist())
    torch.testing.assert_close(found["kl"], expected["kl"], rtol=2e-2, atol=1e-4)


def test_what_is_no_intervention_is_named(tiny_gpt2):
    rows = np.arange(12).reshape(2, 6)
    with pytest.raises(ValueError, match="is no intervention: use Add"):
        effects(tiny_gpt2, rows, HOOK, lambda x: x, [[1]])
    with pytest.raises(ValueError, match="is no intervention"):
        generate(tiny_gpt2, rows, 2, HOOK, torch.ones(1, 16))
    for directions in (torch.ones(16), np.ones((1, 16)), torch.full((1, 16), float("nan"))):
        with pytest.raises(ValueError, match=r"finite tensor \[n, d_in\]"):
            latent_effects(tiny_gpt2, rows, HOOK, directions, 1.0)
    with pytest.raises(ValueError, match="tokens are .*whole numbers"):
        generate(tiny_gpt2, np.zeros((2, 0), int), 2, HOOK, Add(torch.ones(1, 16)))


def test_a_temperature_near_zero_is_greedy(tiny_gpt2):
    rows, edit = np.arange(12).reshape(2, 6), Add(torch.ones(1, 16))
    greedy = generate(tiny_gpt2, rows, 4, HOOK, edit, temperature=0)
    assert torch.equal(generate(tiny_gpt2, rows, 4, HOOK, edit, temperature=1e-40), greedy)
