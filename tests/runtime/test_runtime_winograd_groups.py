"""Convolutions in groups through Winograd's transforms: blocks at the channels of their group."""

from __future__ import annotations

import numpy as np
import pytest
from bare import LANES, engine_of, run_over
from models import Builder, randoms

from blocksparse.runtime import reference
from blocksparse.runtime.algorithms import Algorithm, layer_key, ways
from blocksparse.runtime.kernels import records
from blocksparse.runtime.pieces import cut
from blocksparse.runtime.steps import lower

CASES = {
    "columns": (Algorithm.COLUMNS, records.WINOGRAD, {}),
    "columns at stride 2": (
        Algorithm.COLUMNS, records.WINOGRAD,
        {"kernel": (7, 7), "stride": (2, 2), "padding": (3, 3)},
    ),
    "rows": (Algorithm.ROWS, records.LINES_CONV, {"kernel": (1, 7), "padding": (0, 3)}),
    "tiles": (Algorithm.TILES, records.TILES_CONV, {}),
}  # fmt: skip


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_groups_compute_what_the_definition_says(case, groups, lanes):
    way, op, options = CASES[case]
    b = Builder((5 * groups, 21, 26))
    name = b.conv("x", 12 * groups, groups=groups, **options)
    b.conv(name, 4)
    model, x = b.model(), randoms(2, 5 * groups, 21, 26)
    engine = engine_of(model, lanes)
    engine._pieces = cut(lower(model, engine.target, {name: way}))
    assert op in [step.op for step in engine.steps.steps if step.node.name == name]
    expected = reference.run(model, x)
    for batch, threads in ((2, 1), (2, 2), (1, 2)):
        got, _, _ = run_over(engine, x[:batch], np.nan, threads)
        atol = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(got, expected[:batch], rtol=0, atol=atol)


@pytest.mark.parametrize(("groups", "allowed"), [(1, True), (2, True), (3, False), (24, False)])
def test_groups_of_few_outputs_go_direct(groups, allowed):
    """A tile of 8 rows would be half empty, and the transforms of the inputs serve few outputs."""
    b = Builder((24, 21, 26))
    name = b.conv("x", 24 if groups == 24 else 7 * groups + 2 * (groups < 3), groups=groups)
    (node,) = b.model().graph.nodes
    found = ways(node, b.weights[name], engine_of(b.model()).target, True)
    assert (Algorithm.TILES in found) == allowed
    assert (Algorithm.COLUMNS in found) == allowed


def test_groups_are_part_of_what_times_are_kept_by():
    """The shapes of weight and outputs are those of a layer with fewer inputs and one group."""
    keys = set()
    for groups in (1, 2):
        b = Builder((8 * groups, 9, 9))
        name = b.conv("x", 16, groups=groups)
        (node,) = b.model().graph.nodes
        keys.add(layer_key(node, b.weights[name]))
    assert len(keys) == 2
