"""The arithmetic of estimates, by hand on a model small enough for it; ranges refused; the sweep file for GPT-2."""

import json
import socket
import subprocess
import sys

import pytest

from sae_utils.files import ROOT
from sae_utils.lab import estimate, parameters, sweep
from sae_utils.lab.estimate import KNOWN, Model, Plan, model_of, sae_parameters

TINY = Model(n_layers=2, d_model=2, n_heads=1, n_ctx=4, d_vocab=3)
PARAMETERS = {
    "model": "tiny",
    "dataset": "text",
    "hook_name": "blocks.0.hook_resid_post",
    "n_tokens": 9,
    "n_eval_tokens": 8,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def defaults(monkeypatch):
    """Parameters not named are the notebooks' own, not those of the tests' tier; a dry run's environment is taken back."""
    monkeypatch.delenv(parameters.TIER, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def plan():
    return Plan(PARAMETERS | {"d_sae": 5, "k": 1, "batch_size": 4}, TINY)


def test_shapes_of_models(tmp_path):
    assert KNOWN["gpt2"].n_parameters == 124_439_808  # what its safetensors hold
    assert TINY.n_parameters == 7 * 2 + 2 * (12 * 4 + 13 * 2) + 2 * 2 == 166
    assert TINY.layers(1) == 24 * 4 + 4 * 4 * 2 == 128 and TINY.unembedding == 12
    assert model_of("python-lm") == Model(6, 128, 4, 256, 4096)
    assert model_of("gpt2@main") == KNOWN["gpt2"] and model_of("someone/unheard-of") is None
    keys = "num_hidden_layers hidden_size num_attention_heads max_position_embeddings vocab_size".split()
    (tmp_path / "config.json").write_text(json.dumps(dict(zip(keys, TINY))))
    assert model_of(str(tmp_path)) == TINY
    (tmp_path / "config.json").write_text("{}")
    assert model_of(str(tmp_path)) is None


def test_harvest_by_hand(plan):
    assert (plan.n_tokens, plan.layer, plan.after) == (8, 1, 1)  # whole rows; the hook is after the first of two layers
    plan.harvest(8)
    assert plan.flop == 8 * 128 and list(plan.stores.values()) == [8 * (2 * 2 + 2)]
    plan.harvest(8, gradients=True)  # the hook's own store is the same one
    assert plan.flop == 2 * 8 * 128 + 2 * 8 * (128 + 12) and list(plan.stores.values()) == [48, 48]


def test_training_by_hand(plan):
    assert sae_parameters(2, 5) == 20 + 10 + 2
    plan.train([5, 5])
    assert plan.flop == 2 * 8 * (2 * 2 * 5 + 12 * 2)
    assert plan.bytes == 2 * 2 * 40 * 32  # two steps of two SAEs
    assert (plan.kept, plan.checkpoints) == (2 * 8 * 32, 2 * 12 * 32)
    # weights and gradients, Adam's two moments, 20 pre-activations, x and what is like it, 4 entries
    assert plan.phases["train"][0] == 2 * 16 * 32 + 4 * 20 + 32 * 4 * 2 + 64 * 4
    plan.train([5])  # its Adam state comes after the others' is gone
    assert plan.kept == 3 * 8 * 32
    assert plan.phases["train"][0] == 3 * 8 * 32 + 8 * 32 + 4 * 20 + 32 * 4 * 2 + 64 * 4
    assert plan.hours(1e-12, 1e-9) == pytest.approx((plan.flop + plan.bytes) / 3600)


def test_end_to_end_by_hand(plan):
    plan.end_to_end(2, 0.5)
    assert plan.flop == 2 * 4 * 44 + 4 * (1 + 3 * 2) * (128 + 12)


def test_evaluation_by_hand(plan):
    plan.evaluate([5])
    assert plan.flop == 8 * (128 + 4 * 140) + 8 * 20
    # two rows of four tokens: seven times the logits, the latents, the attention patterns of two layers
    assert plan.phases["evaluate"][0] == 4 * 2 * 4 * (7 * 3 + 5) + 4 * 2 * 2 * 1 * 4**2
    assert plan.memory(device=True) == 4 * 166 + 832 + 256
    plan.kept = 1000
    plan.phase("solve", 2000, host=5000)
    assert plan.memory(device=True) == 4 * 166 + 3000 and plan.memory() == estimate.PROCESS + 4 * 166 + 8000
    assert plan.in_phase() == "solve"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": 1025}, "k=1025: active latents per token are at most d_sae=1024"),
        ({"ks": [2, 2000]}, r"ks=\[2, 2000\]: active latents"),
        ({"batch_size": 10**6}, "give 597,465 activations"),  # 2,343 rows of 255
        ({"hook_name": "blocks.6.hook_resid_pre"}, "has layers 0 to 5"),
        ({"n_tokens": 255}, "n_tokens=255: less than one row"),
        ({"n_eval_tokens": 100}, "n_eval_tokens=100: less than one row"),
    ],
)
def test_parameters_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        parameters.resolve("01_train_topk", change)


def test_a_choice_batch_that_cannot_use_every_latent_is_refused():
    with pytest.raises(ValueError, match="batch_size=128: Feature Choice needs"):
        parameters.resolve("05_train_adaptive", {"batch_size": 128})


def test_contexts_that_leave_no_room_for_what_is_generated_are_refused():
    parameters.resolve("07_steering", {"n_prompt": 244, "n_new": 12})
    with pytest.raises(ValueError, match="n_prompt=245: beside n_new=12 the model's context has room for 244 tokens"):
        parameters.resolve("07_steering", {"n_prompt": 245, "n_new": 12})


def dry_run(capsys, path, *more):
    code = sweep.main([str(path), "--dry-run", "--tflops", "10", "--gbs", "1000", *more])
    return code, capsys.readouterr()


def test_the_sweep_for_gpt2_is_estimated_without_the_hub(capsys, monkeypatch):
    def refuse(*args):
        raise AssertionError("a dry run must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    code, said = dry_run(capsys, ROOT / "sweeps" / "gpt2.toml")
    *_, total, basis = said.out.splitlines()
    assert code == 0 and "unknown" not in said.out
    assert total.startswith("in all") and basis == "hours at 10 TFLOP/s in float32 and 1e+03 GB/s (as given)"
    assert "04_train_gsae hook_name=blocks.7.hook_resid_pre" in said.out


def test_the_total_counts_a_shared_store_once():
    runs = [("01_train_topk", parameters.resolve("01_train_topk", {"lr": lr})) for lr in (0.1, 0.2)]
    (*rows, total), _ = estimate.table(runs, 1, 1)
    one = estimate.estimate(*runs[0])
    assert [row[0] for row in rows] == ["01_train_topk lr=0.1", "01_train_topk lr=0.2"]
    assert float(total[-1]) == pytest.approx(
        (2 * one.disk + one.checkpoints + sum(one.stores.values())) / 2**30, rel=0.01
    )


def test_a_mistake_in_a_sweep_is_one_line(capsys, tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text("[01_train_topk]\nd_sae = 16\nk = 17\n")
    code, said = dry_run(capsys, path)
    assert code == 2 and said.err == "error: 01_train_topk: k=17: active latents per token are at most d_sae=16\n"


def test_hours_are_measured_where_no_throughput_is_given():
    rows, basis = estimate.table([("01_train_topk", parameters.resolve("01_train_topk", {}))])
    assert len(rows) == 2 and "measured on this CPU" in basis
    _, basis = estimate.table([("01_train_topk", parameters.resolve("01_train_topk", {}))], 1)
    assert basis.startswith("hours at 1 TFLOP/s") and "bandwidth guessed" in basis
    assert estimate.table([("no_such", {})]) == ([], "")


@pytest.mark.parametrize("speed", [(-1, 0), (1, -3), (float("nan"), 1), (1, float("inf"))])
def test_a_speed_that_is_none_is_refused(speed):
    with pytest.raises(ValueError, match="have to be above 0"):
        estimate.table([("01_train_topk", parameters.resolve("01_train_topk", {}))], *speed)


def test_a_model_that_is_not_known_is_said():
    rows, _ = estimate.table(
        [("01_train_topk", parameters.resolve("01_train_topk", {"model": "someone/unheard-of"}))], 1, 1
    )
    assert rows[0][1:] == ("unknown",) * 5


def test_every_notebook_has_an_estimate_and_none_needs_torch():
    code = (
        "import sys; from sae_utils.lab import estimate, parameters\n"
        "names = [path.stem for path in sorted(parameters.notebooks_dir().glob('*.ipynb'))]\n"
        "assert list(estimate.PLANS) == names, names\n"
        "made = [estimate.estimate(name, parameters.resolve(name, {}), 1024) for name in names]\n"
        "assert all(plan.memory() > 0 and plan.flop >= 0 for plan in made)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
