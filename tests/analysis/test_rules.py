import numpy as np
import pytest

from sae_utils.analysis.rules import KINDS, firing_as_often, fit_rule, judge, n_grams, predict, scores

TRAIN = np.array([[0, 1, 2, 1, 2], [0, 1, 3, 1, 2]])  # position 0 is left out
TEST = np.array([[0, 1, 2, 3, 2]])
CODES = {kind: n_grams(TRAIN, TEST, 4, n, skip) for kind, (n, skip) in KINDS.items()}


def test_scores_by_hand():
    """Eight tokens; the latent fires on the first two of three `self`; the rule is: this token is `self`."""
    text = np.array(["self", ".", "x", "=", "self", ".", "y", "self"])
    fires = np.array([1, 0, 0, 0, 1, 0, 0, 0], bool)
    assert scores(text == "self", fires) == pytest.approx({"f1": 4 / 5, "balanced": (1 + 5 / 6) / 2})
    assert np.isnan(scores(fires, np.zeros(8, bool))["f1"])


def test_equal_n_grams_have_equal_codes_and_none_reaches_over_the_start_of_a_row():
    train, test, counts = CODES["this token"]
    assert train.tolist() == [0, 1, 0, 1, 0, 2, 0, 1] and test.tolist() == [0, 1, 2, 1] and counts.tolist() == [4, 3, 1]
    train, test, counts = CODES["last two"]  # 01 12 21 12, 01 13 31 12; 01 12 23 32
    assert train[1] == train[3] == train[7] == test[1] and counts[train[1]] == 3 and counts[train[0]] == 2
    train, test, counts = CODES["last three"]  # none for the first token of a row, which has position 0 alone before it
    assert train[0] == train[4] == test[0] and counts[train[0]] == 0 and counts[train[1]] == 1
    train, _, _ = CODES["token before"]  # 0 1 2 1, 0 1 3 1
    assert train.tolist() == [0, 1, 2, 1, 0, 1, 3, 1]
    with pytest.raises(ValueError, match="n=4: n-grams of a vocabulary of 100,000 are too many"):
        n_grams(TRAIN, TEST, 100_000, 4)


def test_a_rule_by_hand():
    """The latent fires on every token 2, which each time follows a 1: "this token" says so, and "last two" as well."""
    values = np.array([0, 3.0, 0, 2.0, 0, 0, 0, 1.0])
    rule = fit_rule(values, CODES)
    assert rule["kind"] == "this token" and rule["listed"].tolist() == [1] and rule["f1"] == 1 and rule["purity"] == 1
    assert rule["top"].tolist() == [1, 3, 7], "strongest first"
    assert predict(rule, CODES).tolist() == [False, True, False, True]
    # one of two firings is on a 2: 1 of 3 others there does not keep it in the list, and the n-gram of the other occurs once
    rule = fit_rule(np.array([0, 3.0, 0, 0, 0, 2.0, 0, 0]), {"this token": CODES["this token"]})
    assert rule["listed"].tolist() == [] and rule["f1"] == 0 and rule["purity"] == 1 / 2


def test_latents_are_judged_by_their_own_rule_and_by_the_next_ones():
    fires_on = np.stack([CODES["this token"][0] == 1, CODES["this token"][0] == 0], 1).astype(float)
    on_test = np.stack([CODES["this token"][1] == 1, CODES["this token"][1] == 0], 1).astype(float)
    table, rules = judge(fires_on, on_test, CODES)
    assert table["f1"].tolist() == [1, 1] and table["another"].tolist() == [0, 0] and len(rules) == 2
    assert table["train_f1"].tolist() == [1, 1] and table["kind"].tolist() == ["this token", "this token"]


def test_directions_fire_as_often_as_asked():
    values = np.arange(100.0)[:, None] * [1, -1]
    train, test = firing_as_often(values, values + 1000, np.array([0.1, 0.25]))
    assert (train > 0).mean(0).tolist() == [0.1, 0.25] and (test[:, 0] > 0).all()
