"""Write the golden files of one format version: a tiny model, an input, and its logits.

Run ``python tests/golden/make_golden.py`` only when a new version of the format is born, and keep
the files of the old one: reading them must keep working.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from blocksparse.format import (
    BsrWeight,
    DenseWeight,
    Graph,
    Model,
    NMWeight,
    Node,
    Preprocessing,
    ValueSpec,
    write,
)
from blocksparse.runtime import reference

FOLDER = Path(__file__).parent


def golden_model() -> Model:
    """Return a network with every weight layout and every operation of version 1."""
    rng = np.random.default_rng(0)

    def sparse(*shape: int, keep: float = 1.0) -> np.ndarray:
        values = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        return (values * (rng.random((*shape[:2], *[1] * (len(shape) - 2))) < keep)).astype("f4")

    def conv(activation: str, **changed: object) -> dict[str, object]:
        attrs = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
        return attrs | {"activation": activation} | changed

    two_four = sparse(7, 10, 3, 3)
    two_four[:, 1::4] = two_four[:, 2::4] = 0
    half = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0)}
    pool = half | {"ceil_mode": True}
    nodes = (
        Node("stem", "conv2d", ("image",), conv("relu"), (5, 9, 8)),
        Node("depthwise", "conv2d", ("stem",), conv("hardswish", groups=5), (5, 9, 8)),
        Node("sum", "add", ("stem", "depthwise"), {"activation": "relu6"}, (5, 9, 8)),
        Node("stack", "concat", ("sum", "stem"), {}, (10, 9, 8)),
        Node("norm", "affine", ("stack",), {"activation": "silu"}, (10, 9, 8)),
        Node("body.0", "conv2d", ("norm",), conv("none"), (7, 9, 8)),
        Node(
            "body.1",
            "conv2d",
            ("body.0", "body.0"),
            conv("relu", padding=(1, 2), dilation=(1, 2)),
            (7, 9, 8),
        ),
        Node("max", "max_pool2d", ("body.1",), pool | {"dilation": (1, 1)}, (7, 5, 4)),
        Node("avg", "avg_pool2d", ("body.0",), pool | {"count_include_pad": False}, (7, 5, 4)),
        Node("gate", "adaptive_avg_pool2d", ("avg",), {"output_size": (1, 1)}, (7, 1, 1)),
        Node("squash", "activation", ("gate",), {"activation": "hardsigmoid"}, (7, 1, 1)),
        Node("scaled", "mul", ("max", "squash"), {}, (7, 5, 4)),
        Node(
            "cut",
            "slice",
            ("scaled",),
            {"start": (0, 1, 0), "stop": (7, 5, 4), "step": (1, 2, 3)},
            (7, 2, 2),
        ),
        Node("wide", "pad", ("cut",), {"before": (1, 0, 0), "after": (0, 0, 1)}, (8, 2, 3)),
        Node("flat", "flatten", ("wide",), {}, (48,)),
        Node("head", "linear", ("flat",), {"activation": "none"}, (4,)),
    )
    return Model(
        graph=Graph((ValueSpec("image", (3, 9, 8)),), ("head",), nodes),
        weights={
            "stem": DenseWeight(sparse(5, 3, 3, 3)),
            "depthwise": DenseWeight(sparse(5, 1, 3, 3)),
            "body.0": NMWeight.from_dense(two_four, 2, 4),
            "body.1": BsrWeight.from_dense(sparse(7, 7, 3, 3, keep=0.3), (2, 3)),
            "head": BsrWeight.from_dense(8 * sparse(4, 48, keep=0.4), (8, 1)),
        },
        vectors={
            "stem.bias": sparse(5, 1)[:, 0],
            "norm.scale": sparse(10, 1)[:, 0],
            "norm.shift": sparse(10, 1)[:, 0],
            "body.1.bias": sparse(7, 1)[:, 0],
            "head.bias": sparse(4, 1)[:, 0],
        },
        classes=("null", "eins", "zwei", "drei"),
        preprocessing=Preprocessing((9, 8), None, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), "rgb"),
        provenance={"made_by": "tests/golden/make_golden.py", "seed": 0},
    )


def main() -> None:
    """Write ``v1.bsr.safetensors`` and ``v1.npz`` beside this file."""
    model = golden_model()
    write(FOLDER / "v1.bsr.safetensors", model)
    x = np.random.default_rng(1).standard_normal((3, *model.input_shape)).astype(np.float32)
    x *= np.float32(3)
    np.savez(FOLDER / "v1.npz", x=x, logits=reference.run(model, x))


if __name__ == "__main__":
    main()
