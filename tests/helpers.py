"""What several test files use: children to kill, tokenizers to work out by hand."""

import multiprocessing
import os
import signal

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast


def word_tokenizer(words, **kwargs) -> PreTrainedTokenizerFast:
    """One token a word: `<eos>` is 0, the words are 1, 2, ... in their order."""
    vocabulary = {word: i for i, word in enumerate(["<eos>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **kwargs)


def start_child(function, *args):
    """Run `function` in a forked process, with the state of this one."""

    def run():
        import torch

        torch.set_num_threads(1)  # the threads of the parent are not there any more
        function(*args)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    return child


def exit_code(child) -> int:
    """Its exit code, at most a minute later."""
    child.join(60)
    if child.is_alive():
        child.kill()
        raise TimeoutError("the child hangs")
    return child.exitcode


def killed(function, *args) -> bool:
    """Run `function` in a child; was it killed by SIGKILL?"""
    return exit_code(start_child(function, *args)) == -signal.SIGKILL


def kill_me(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
