"""The model in memory: what makes two of them equal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from craft import small_model

from blocksparse.format import DenseWeight, Preprocessing


def test_shapes():
    model = small_model()
    assert (model.input_shape, model.output_shape) == ((3, 6, 5), (4,))
    assert model.graph.shapes["body"] == (6, 6, 5)


def test_equal_models():
    assert small_model() == small_model()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: {"graph": replace(m.graph, outputs=("flat",))},
        lambda m: {"weights": {**m.weights, "stem": DenseWeight(m.weights["stem"].values * 2)}},
        lambda m: {"weights": {"stem": m.weights["stem"]}},
        lambda m: {"vectors": {**m.vectors, "norm.shift": np.ones(8, np.float32)}},
        lambda m: {"vectors": {"norm.shift": m.vectors["norm.shift"]}},
        lambda m: {"classes": None},
        lambda m: {"preprocessing": Preprocessing(None, None, (0, 0, 0), (1, 1, 1), "rgb")},
        lambda m: {"provenance": {}},
    ],
)
def test_equality_sees_every_part(change):
    model = small_model()
    assert replace(model, **change(model)) != model
