"""How many images go through a network together.

What a layer writes, the next one reads: of few images it is still in the caches next to the cores,
of many it is not. So a large batch goes through the network in parts, and every thread takes parts
of its own, see `streams`. Milliseconds an image of a batch of 8, medians of calls in turns, random
weights, AMD Zen 4 with 1 MB next to each core:

================== ============== ==============
network, sparsity  2 threads: all one thread:
                   in parts       all, in parts
================== ============== ==============
ResNet-50, dense   41.3 -> 39.7
ResNet-50, 75 %    16.6 -> 12.4   30.0 -> 22.8
ResNet-50, 90 %    11.6 ->  7.0
ResNet-18, 75 %     7.4 ->  5.8    9.4 ->  8.3
Inception V3, 75 % 20.3 -> 16.4   38.9 -> 28.7
MobileNet V2, 75 % 3.74 -> 2.87   6.36 -> 4.38
VGG-16, 75 %       22.4 -> 25.7   40.5 -> 42.1
================== ============== ==============

Not one image of VGG-16 fits, and its weights are many.
"""

from __future__ import annotations

import math

from blocksparse.format import Graph

CACHE = 8 << 20
"""Bytes that a layer may read and write for a part of several images."""

MOST_IMAGES = 16
"""Images of a part, where they are small. More gained nothing: a ResNet-56 for CIFAR's images takes
0.93 ms each in parts of 4, 0.96 of 16, 1.03 of 64."""


def images_in_cache(graph: Graph) -> int:
    """Return how many images there may be for every layer's to stay in the cache, 0 if not one.

    Parameters
    ----------
    graph : Graph
        Of the network, float32.
    """
    shapes = graph.shapes
    largest = max(
        4 * sum(math.prod(shapes[name]) for name in (*node.inputs, node.name))
        for node in graph.nodes
    )
    return min(MOST_IMAGES, CACHE // largest)


def divide(count: int, in_cache: int, threads: int) -> tuple[list[slice], list[slice]]:
    """Divide a batch into parts.

    Parameters
    ----------
    count : int
        Images, at least 1.
    in_cache : int
        See `images_in_cache`.
    threads : int
        That may compute.

    Returns
    -------
    own : list of slice
        Parts for a thread alone, as many of each size for every thread, the largest first. There
        are none with one thread, nor for a batch that fits as it is.
    shared : list of slice
        What is left, or all, for all threads together.
    """
    size = max(1, in_cache)
    own: list[slice] = []
    left = 0
    if threads > 1 and count > size:
        for images in _even(count // threads, size):
            for _ in range(threads):
                own.append(slice(left, left + images))
                left += images
    shared = []
    for images in _even(count - left, max(threads, size)):
        shared.append(slice(left, left + images))
        left += images
    return own, shared


def _even(count: int, most: int) -> list[int]:
    """Divide a number into as few of nearly the same size as there can be, the largest first."""
    number = -(-count // most)
    return [-(-(count - part) // number) for part in range(number)]
