"""A chapter and its study measure the same SAE alike, at the tests' small sizes.

Runs last (conftest.py), when nbval has run the notebooks: their runs are found, and made only where they are missing.
"""

import re

import pytest

from sae_utils.lab import execute

PAIRS = {
    "02_train_gated": "02_gated",
    "03_train_e2e": "03_e2e",
    "04_train_gsae": "04_gsae",
    "05_train_adaptive": "05_adaptive",
    "06_dark_matter": "06_error",
    "07_steering": "07_interventions",
    "08_compare": "08_methods",
}
OTHERWISE = {  # what one name means otherwise in a study, as a pattern of paths
    "02_gated": r"ReLU|relu|rescaled|at \d+|_l0_\d+|at_k|gap|less_gated|pursuit|/(l0|fvu|kl|gamma|dead|ce_(sae|increase|recovered))",  # read off six λ, not three; ReLU at a rate of its own
    "03_e2e": r"matched_cosine",  # of end-to-end SAEs from scratch
    "04_gsae": r"best_beta|effect_(kl|max_logit|own_logprob|gaps|latents)",  # over more β and latents
    "06_error": r"^/ce|CE:|grid_|claims",  # over all test rows and six levels; claims: checked by their numbers
    "07_interventions": r"ReLU|Gated|verdicts|rank_|_at_0.2_|success",  # SAEs at another of the study's λ
    "08_methods": r"ReLU|Gated|f1_another|over_topk",
}


def numbers(found, path=""):
    """(path, value) of every number in nested metrics; records of a list go by their names where they have some."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield from numbers(value, f"{path}/{key}")
    elif isinstance(found, list):
        for i, value in enumerate(found):
            yield from numbers(value, f"{path}/{value.get('name', i) if isinstance(value, dict) else i}")
    elif isinstance(found, (int, float)):
        yield path, found


@pytest.mark.parametrize("chapter, study", PAIRS.items(), ids=PAIRS.values())
def test_a_chapter_and_its_study_measure_the_same_sae_alike(chapter, study):
    here, there = (dict(numbers(execute.run(name).metrics)) for name in (chapter, study))
    shared = [path for path in here if path in there and not re.search(OTHERWISE.get(study, "^$"), path)]
    assert len(shared) >= 10
    assert {path: here[path] for path in shared} == pytest.approx({path: there[path] for path in shared}, rel=1e-9)
