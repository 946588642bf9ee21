"""A cache of its own for every test, no network, and tiny models with random weights, saved and booted like real ones."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when imported

import pytest  # noqa: E402
from families import Directories  # noqa: E402


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Where this test's token and activation caches are."""
    monkeypatch.setenv("SAE_UTILS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Everything here is too small for more, and threads that wait for each other on a busy machine take long."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A byte-level BPE of 300 tokens, saved and loaded."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([__doc__] * 10, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    eot = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **eot).save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="session")
def model_directories(tokenizer, tmp_path_factory):
    """Saved models with random weights, by the names in FAMILIES."""
    return Directories(tokenizer, tmp_path_factory.mktemp)


@pytest.fixture(scope="session")
def tiny_gpt2(model_directories):
    from sae_utils import load_language_model

    return load_language_model(str(model_directories["gpt2"]), device="cpu")


@pytest.fixture(scope="session")
def tiny_neox(model_directories):
    from sae_utils import load_language_model

    return load_language_model(str(model_directories["neox"]), device="cpu")


@pytest.fixture(scope="session")
def tiny_llama(model_directories):
    from sae_utils import load_language_model

    return load_language_model(str(model_directories["llama"]), device="cpu")
