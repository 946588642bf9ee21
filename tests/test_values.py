"""Values as users pass them."""

import numpy as np
import pytest
import torch

from sae_utils.values import flag, near, one_of, real, whole


@pytest.mark.parametrize("value", [8, np.int64(8), np.uint16(8), torch.tensor(8)])
def test_every_type_of_integer_is_a_whole_number(value):
    found = whole("k", value)
    assert found == 8 and type(found) is int


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), 8.0, "8", None, [8], 0, 65])
def test_what_is_no_whole_number_in_range_is_named(value):
    with pytest.raises(ValueError, match=r"k=.*has to be a whole number from 1 to 64"):
        whole("k", value, most=64)


@pytest.mark.parametrize("value", [1, 0.5, np.float32(0.5), torch.tensor(0.5), np.int64(1)])
def test_every_type_of_number_is_a_number(value):
    assert real("lr", value, above=0) == float(value)


@pytest.mark.parametrize("value", [True, "1e-3", None, [1.0], float("nan"), float("inf"), 0, -1.0, 2.5])
def test_what_is_no_number_in_range_is_named(value):
    with pytest.raises(ValueError, match=r"lr=.*has to be a finite number above 0 and of at most 2"):
        real("lr", value, above=0, most=2)


def test_flags_are_true_or_false():
    assert flag("bos", True) is True and flag("bos", np.False_) is False
    for value in (0, 1, "false", None):
        with pytest.raises(ValueError, match="bos=.*True or False"):
            flag("bos", value)


def test_near_names_are_suggested():
    assert one_of("split", "test", ("train", "test")) == "test"
    with pytest.raises(ValueError, match=r"split='tset' \(did you mean 'test'\?\): allowed are 'train', 'test'"):
        one_of("split", "tset", ("train", "test"))
    with pytest.raises(ValueError, match="allowed are"):
        one_of("split", None, ("train", "test"))
    assert near("nothing like it", ["a", "b"]) == ""
