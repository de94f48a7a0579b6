"""The format's page: its example runs, and its tables name what the code has."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np

from blocksparse.format import ACTIVATIONS, OPS, read
from blocksparse.format.container import ALIGNMENT, DTYPES, MAX_DEPTH, MAX_HEADER

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")


def test_the_example_reads_the_golden_file(tmp_path, monkeypatch):
    golden = ROOT / "tests" / "golden" / "v1.bsr.safetensors"
    shutil.copy(golden, tmp_path / "network.bsr.safetensors")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], names)
    weight = read(golden).weights[names["node"]["name"]]
    assert names["matrix"].shape == weight.matrix_shape
    k, c, *taps = weight.shape
    dense = names["matrix"].toarray().reshape(-1, *taps, names["shape"][1] // np.prod(taps))
    np.testing.assert_array_equal(np.moveaxis(dense, -1, 1)[:k, :c], weight.to_dense())


def test_the_page_names_every_operation_attribute_and_limit():
    section = PAGE.split("### Operations")[1].split("## 4.")[0]
    table = {line.split("|")[1].strip(" `"): line for line in section.splitlines() if "|" in line}
    for name, op in OPS.items():
        assert all(f"`{key}`" in table[name] for key in op.attrs), name
    assert all(f"`{word}`" in PAGE for word in (*ACTIVATIONS, *DTYPES))
    assert f"{MAX_HEADER >> 20} MiB" in PAGE
    assert f"nesting deeper than {MAX_DEPTH}" in PAGE
    assert f"multiple of {ALIGNMENT}" in PAGE
