"""The README's Python blocks run as they stand, one after the other in an empty directory, on less text."""

import re

from sae_utils.files import ROOT


def test_code_blocks_of_the_readme_run(tmp_path, monkeypatch, own_cache):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block.replace("200_000", "20_000").replace("16_384", "2_048"), "README.md", "exec"), names)
    assert len(names["history"]) == 200 and names["store"].d_in == 128  # 100 rows of each of two SAEs
