"""Convolutions for the tests of Winograd's ways, and what each of these tests asks of its way.

With small integers, and weights that are multiples of `STEP`, planes are exact, and results are
such multiples plus integers: a wrong tap, mask or row is far outside the rounding errors. With
reals they must stay within a bound derived from the number of roundings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from bare import (
    SENTINEL,
    assert_nothing_else_written,
    assert_zeros_around,
    engine_of,
    run_over,
)
from definition import correlate
from models import Builder, block_zeros, randoms

from blocksparse.format import BsrWeight, DenseWeight
from blocksparse.runtime import products
from blocksparse.runtime.kernels import records

UNIT = 2.0**-24
"""Unit roundoff of float32."""

STEP = {3: 18, 4: 90, 5: 90, 7: 90}
"""What weights of so many taps have to be multiples of for planes without rounding."""


LAYOUTS = ["dense", ((8, 8), 0.5, True), ((8, 8), 0.3, False), ((4, 2), 0.4, False),
           ((5, 3), 0.5, True), ((1, 1), 0.2, False), ((8, 8), 0.0, True)]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A convolution of so many rows and columns of taps, perhaps with one more as its residual."""

    image: tuple[int, int]
    channels: int = 3
    outputs: int = 5
    rows: int = 3
    taps: int = 3
    padding: tuple[int, int] = (1, 1)
    dilation: int = 1
    stride: tuple[int, int] = (1, 1)
    layout: object = "dense"
    activation: str = "none"
    residual: bool = False
    batch: int = 1

    @property
    def read_rows(self):
        """Rows of taps on what is read: phase planes, if there is a stride."""
        return -(-self.rows // self.stride[0])

    def weights(self, values):
        """Two weights (K, C, R, S), zero where the layout has no blocks."""
        dense = values(2, self.outputs, self.channels, self.rows, self.taps).astype(np.float32)
        if self.layout == "dense":
            return dense
        block, density, shared = self.layout
        shape = (self.outputs, self.channels, *((1, 1) if shared else (self.rows, self.taps)))
        masks = [block_zeros(np.ones(shape, np.float32), block, density, seed) for seed in (0, 1)]
        return np.stack([d * (m != 0) for d, m in zip(dense, masks, strict=True)])

    def model(self, weights, bias):
        """The convolution, with a second one of the same geometry for a residual."""
        b = Builder((self.channels, *self.image))
        options = {
            "kernel": (self.rows, self.taps), "padding": self.padding,
            "dilation": (1, self.dilation), "stride": self.stride,
        }  # fmt: skip
        side = None
        for i in range(2 if self.residual else 1):
            last = i == self.residual
            name = b.conv("x", self.outputs, residual=side, **options,
                          activation=self.activation if last else "none")  # fmt: skip
            if self.layout == "dense":
                b.weights[name] = DenseWeight.from_dense(weights[i])
            else:
                b.weights[name] = BsrWeight.from_dense(weights[i], self.layout[0])
            b.vectors[f"{name}.bias"] = bias
            side = name
        return b.model()

    def engine(self, weights, bias, lanes=None):
        """The compiled engine, all products of which go down Winograd's columns."""
        engine = engine_of(self.model(weights, bias), lanes)
        ops = {step.op for step in engine.steps.steps if step.packed is not None}
        assert ops == {records.WINOGRAD}
        return engine

    def expected(self, x, weights, bias):
        """What the definition says, in float64."""
        y = sum(
            correlate(x, weights[i], self.padding, self.dilation, self.stride) + bias[:, None, None]
            for i in range(2 if self.residual else 1)
        )
        return np.clip(y, *products.BOUNDS[self.activation])


def case_of(image, taps, padding, dilation=1, down=(3, 1), along=1, **options):
    """Grow the image to the least that has an output; `down` is rows of taps, and their stride."""
    rows, stride = down[0], (down[1], along)
    dilation = dilation if stride == (1, 1) else 1
    least = (rows, dilation * (taps - 1) + 1)
    image = tuple(
        max(size, span - 2 * pad) for size, span, pad in zip(image, least, padding, strict=True)
    )
    return Case(
        image, rows=rows, taps=taps, padding=padding, dilation=dilation, stride=stride, **options
    )


def integers_of(case, rng):
    """Weights, bias and images with which all planes are exact."""
    step = STEP[max(case.read_rows, case.taps)]
    most = 2 if step == 18 else 1
    weights = case.weights(lambda *shape: step * rng.integers(-most, most + 1, shape))
    bias = rng.integers(-99, 100, case.outputs).astype(np.float32)
    x = rng.integers(-4, 5, (case.batch, case.channels, *case.image)).astype(np.float32)
    if case.activation == "relu6":  # leave something between the bounds
        return weights / 64, bias / 64, x / 8
    return weights, bias, x


def assert_integers_come_out_right(case, engine, numbers, op, threads):
    """Run what `integers_of` made, in memory of which nothing but the values may be written."""
    weights, bias, x = numbers
    got, plan, memory = run_over(engine, x, SENTINEL, threads)
    # rounding errors are below 0.1; scaled by 512 for relu6, and clamped, far below 1e-3
    atol = 1e-3 if case.activation == "relu6" else 0.1
    np.testing.assert_allclose(got, case.expected(x, weights, bias), rtol=0, atol=atol)
    assert_nothing_else_written(memory, plan, case.batch)
    assert_zeros_around(memory, plan, op, case.batch)
    return got


def reals_of(case, seed, decades):
    """Weights, bias and images; neighbours differ by up to twice as many orders of magnitude."""
    rng = np.random.default_rng(seed)

    def reals(*shape):
        values = rng.standard_normal(shape) * 10.0 ** rng.uniform(-decades, decades, shape)
        return values.astype(np.float32)

    return case.weights(reals), reals(case.outputs), reals(case.batch, case.channels, *case.image)


def error_bound(case, numbers, magnitudes, roundings):
    """Bound the rounding error of every output.

    ``magnitudes(case, x, weights)`` sums the absolute terms of each output, every one of which is
    rounded so often; a bias sees the last roundings only.
    """
    weights, bias, x = numbers
    error = 0
    for i in range(2 if case.residual else 1):
        terms = magnitudes(case, x, weights[i]) + np.abs(bias)[:, None, None]
        # what the residual is rounded to is then added, and rounded, once more
        error = error + terms * (roundings + 1) * UNIT / (1 - (roundings + 1) * UNIT)
    return error


def assert_within(case, engine, numbers, bound):
    """Compare the outputs of reals with the definition."""
    weights, bias, x = numbers
    got = engine.run(x, 1)
    error = np.abs(got - case.expected(x, weights, bias))
    bound = bound[:, :, : got.shape[2], : got.shape[3]]
    assert (error <= bound).all(), f"{np.max(error / bound):.2f} of the bound"


def assert_far_within(case, engine, numbers, bound):
    """Check that roundings mostly cancel: of normal weights and inputs a hundredth is left."""
    weights, bias, x = numbers
    expected = case.expected(x, weights, bias)
    error = np.abs(engine.run(x, 1) - expected)
    part = np.max(error / bound)
    relative = np.sqrt(np.mean(error**2) / np.mean(expected**2))
    print(f"largest error: {part:.4f} of the bound; root mean square {relative:.1e} of the output")
    assert part < 0.01
    assert relative < 30 * UNIT


def normal_of(case):
    """Weights, bias and images that are normally distributed."""
    return (
        case.weights(randoms),
        randoms(case.outputs),
        randoms(case.batch, case.channels, *case.image),
    )
