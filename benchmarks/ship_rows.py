"""Make the token rows that ship with the repository anew from the installed packages (for maintainers).

python benchmarks/ship_rows.py
"""

import shutil

from transformers import AutoTokenizer

from sae_utils import tokens
from sae_utils.activations.corpus import BUILTIN, ROWS, shipped_rows
from sae_utils.activations.text import tokenizer_hash
from sae_utils.files import ASSETS, BUILTIN_MODEL

# What the chapters ask for with their defaults, in rows of 256 tokens of `python-lm`: split, n_tokens, spread.
SHIPPED = [("train", 600_000, 16), ("train", 1_024_000, 1), ("validation", 16_384, 1)]
SHIPPED += [(split, n_tokens, 16) for split in ("validation", "test") for n_tokens in (16_384, 32_768, 65_536)]


def main():
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / BUILTIN_MODEL)
    for file in ROWS.glob("*.npy"):
        file.unlink()
    ROWS.mkdir(exist_ok=True)
    for split, n_tokens, spread in SHIPPED:
        rows = tokens(BUILTIN, tokenizer, 256, n_tokens, split, spread=spread)
        shutil.copyfile(rows.filename, shipped_rows(tokenizer_hash(tokenizer), 256, n_tokens, split, False, spread))


if __name__ == "__main__":
    main()
