"""Steps of pruning taken by hand, in variants, so that they can take turns; each part is timed."""

# B batch, H W image height and width

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.training_figures import PARTS, Variant
from blocksparse.image_files import read_image
from blocksparse.sparsity import Block, MaskedWeights, resolve
from blocksparse.training import Classifier, Distillation, ImageFolder
from blocksparse.training.data.files import to_pixels
from blocksparse.training.data.loader import Source
from blocksparse.training.data.order import BatchKey, EpochOrder

SPARSITY = 0.5  # of the masks: they are final
SMALL = 64  # pixels up to which image files have the size of the network's input
BATCHES = 2  # batches of image files there are


def write_pictures(folder: Path, count: int, side: int, seed: int) -> None:
    """Write PNG files with the statistics of photographs: amplitudes fall as 1 / frequency.

    So they compress, and take to decode, as photographs do (D. J. Field, "Relations between the
    statistics of natural images and the response properties of cortical cells", 1987).

    Parameters
    ----------
    folder : Path
        Made if need be.
    count, side : int
        How many, and their height and width in pixels.
    seed : int
        The same one gives the same files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    amplitude = 1 / np.maximum(frequency, 1 / side)
    for i in range(count):
        phases = np.exp(2j * np.pi * generator.random((3, *frequency.shape)))
        phases[1:] = 0.9 * phases[:1] + 0.1 * phases[1:]  # colours are mostly alike
        values = np.fft.irfft2(amplitude * phases, s=(side, side))
        values = 128 + 48 * (values - values.mean()) / values.std()
        pixels = np.clip(values, 0, 255).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / f"{i}.png")


def picture_side(image: int) -> int:
    """Return height and width of the files for a network's input: photographs are larger."""
    return image if image <= SMALL else 2 * image


def make_data(root: Path, image: int, batch: int, seed: int) -> dict[bool, ImageFolder]:
    """Write image files of two classes, and return data modules: decoded once (True), or each time.

    Parameters
    ----------
    root : Path
        An empty folder.
    image, batch : int
        Height and width of the network's input in pixels; images of a step.
    seed : int
        Of pictures, order and augmentation.
    """
    side = picture_side(image)
    for i, name in enumerate(("a", "b")):
        write_pictures(root / "train" / name, BATCHES * batch // 2 + 1, side, seed + i)
        write_pictures(root / "val" / name, 1, side, seed)
    # ImageNet's 256 for 224, where files are larger than the input.
    resize = None if image <= SMALL else image * 8 // 7
    return {
        in_memory: ImageFolder(
            root=root,
            size=image,
            resize=resize,
            in_memory=in_memory,
            batch_size=batch,
            seed=seed,
        )
        for in_memory in (True, False)
    }


@dataclass(frozen=True)
class Batches:
    """Batches without end from the training images of a data module.

    Attributes
    ----------
    source : Source
        Makes them.
    keys : sequence of BatchKey
        Over and over.
    """

    source: Source
    keys: Sequence[BatchKey]

    @classmethod
    def of(cls, data: ImageFolder) -> Batches:
        """Take the batches of a data module's first epoch, without workers."""
        source = data.train_dataloader().source
        order = EpochOrder(len(source), data.batch_size, data.seed, shuffle=True, drop_last=True)
        return cls(source, order.batches(0))


class Decoding:
    """Decodes the files of one batch, and nothing else; call it."""

    def __init__(self, root: Path, batch: int) -> None:
        self.paths = sorted((root / "train").rglob("*.png"))[:batch]

    def __call__(self) -> None:
        """Decode to bytes in memory."""
        for path in self.paths:
            to_pixels(read_image(path, 3))


class Step:
    """One training of a network: each call is a step of it.

    It is what the trainer does, without the trainer: `Classifier.training_step` (under autocast, if
    so), the backward pass, the optimizer, and then the masks are imposed, as the sparsity callback
    does. Masks are final, for half of the 8x8 blocks.

    Parameters
    ----------
    variant : Variant
        How.
    network : nn.Module
        What is trained, and its own teacher; copied twice.
    batches : Batches
        Made within the step, as a data loader without workers does.

    Attributes
    ----------
    seen : list of dict of str to float
        Of each step so far, the seconds of each of `PARTS`.
    cpu : list of float
        Of each step so far, the seconds that all threads of this process computed.
    """

    def __init__(self, variant: Variant, network: nn.Module, batches: Batches) -> None:
        self.variant = variant
        self.seen: list[dict[str, float]] = []
        self.cpu: list[float] = []
        self._batches = batches
        self._keys = itertools.cycle(batches.keys)
        model, teacher = copy.deepcopy(network), _Timed(copy.deepcopy(network))
        self._module = _ByHand(
            model,
            distillation=Distillation() if variant.teacher else None,
            teacher=teacher,
            channels_last=variant.channels_last,
        )
        self._module.on_fit_start()  # brings the teacher into the same memory format
        self._teacher = teacher
        plan = resolve(model, target=SPARSITY, pattern=Block(8, 8))
        self._masked = MaskedWeights(plan)
        self._masked.adopt(self._masked.build(model, share=1.0))
        self._optimizer = self._module.optimization.make_optimizer(model, lr=1e-3)
        self._module.stepped = self._optimizer
        if variant.compiled:
            model.compile()
            teacher.network.compile()

    def __call__(self) -> None:
        """Train on the next batch."""
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(self.variant.deterministic)
        start = time.process_time()
        try:
            self.seen.append(dict(zip(PARTS, self._parts(), strict=True)))
            self.cpu.append(time.process_time() - start)
        finally:
            torch.use_deterministic_algorithms(before)

    def first(self) -> float:
        """Take the first steps, which compile and set up memory; return the seconds of the last."""
        self()
        if self.variant.compiled:
            self()
        seconds = sum(self.seen[-1].values())
        self.seen.clear()
        self.cpu.clear()
        return seconds

    def _parts(self) -> list[float]:
        self._teacher.seconds = 0.0
        times = [time.perf_counter()]
        batch = self._batches.source[next(self._keys)]
        times.append(time.perf_counter())
        with torch.autocast("cpu", torch.bfloat16, enabled=self.variant.autocast):
            loss = self._module.training_step(batch, 0)
        times.append(time.perf_counter())
        self._optimizer.zero_grad()
        loss.backward()
        times.append(time.perf_counter())
        self._optimizer.step()
        times.append(time.perf_counter())
        self._masked.impose(self._module.model)
        times.append(time.perf_counter())
        making, forward, *rest = np.diff(times).tolist()
        teacher = self._teacher.seconds
        return [making, teacher, forward - teacher, *rest]


class _ByHand(Classifier):
    """A classifier without a trainer: there is nowhere to log to, and one optimizer."""

    stepped: torch.optim.Optimizer

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log nothing."""

    def optimizers(self, *args: Any, **kwargs: Any) -> Any:
        """Return the optimizer."""
        return self.stepped


class _Timed(nn.Module):
    """A network that adds up the seconds it takes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seconds = 0.0

    def forward(self, images: Tensor) -> Any:
        start = time.perf_counter()
        outputs = self.network(images)
        self.seconds += time.perf_counter() - start
        return outputs
