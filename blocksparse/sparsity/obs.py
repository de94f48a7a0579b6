"""The optimal brain surgeon: prune without training, and let the weights that stay make up for it.

Layer by layer, the outputs of the dense network are the goal: of all weights with zeros where the
mask has them, those are taken that come closest to it on the calibration images, by least squares.
A unit is worth what that distance grows by when it goes, each output channel counting for what the
logits move with it. This is Hassibi and Stork's optimal brain surgeon (NIPS 1992), for whole units
as in Optimal Brain Compression (Frantar and Alistarh, arXiv 2208.11580), with layers in order of
execution as in SparseGPT (arXiv 2301.00774).

Where those keep the dense weights as the goal, here it is the dense outputs, ||W X - W_dense
X_dense||, X being the inputs in the pruned network: each layer undoes what it can of the errors of
the layers before it.
"""

# C channels   T taps of a kernel   F inputs of one output: C * T, as in `calibration`

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from blocksparse.sparsity.calibration import Moments, run_beside
from blocksparse.sparsity.influence import influences
from blocksparse.sparsity.least_squares import MaskedLeastSquares
from blocksparse.sparsity.masked import MaskedWeights
from blocksparse.sparsity.masks import pack_mask, plan_masks
from blocksparse.sparsity.plan import LayerPlan, Plan
from blocksparse.sparsity.scores import l2

Progress = Callable[[str], None]


@dataclass(frozen=True)
class OptimalBrainSurgeon:
    """One-shot pruning with calibration.

    Parameters
    ----------
    images : int
        Training images to calibrate on.
    damping : float
        How much moving a weight costs by itself, as a fraction of the mean square of the layer's
        inputs; above 0, so that dead or equal inputs have a solution as well.
    rounds : int
        Steps in which the units of a layer go, with least squares after each. 1 chooses all at
        once. The cost rises with it: see `prune`.
    """

    images: int = 256
    damping: float = 0.01
    rounds: int = 8

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"calibration.images is {self.images}; at least 1 is needed")
        if not self.damping > 0.0:
            raise ValueError(f"calibration.damping is {self.damping}; it must be above 0")
        if self.rounds < 1:
            raise ValueError(f"calibration.rounds is {self.rounds}; at least 1 is needed")

    @torch.no_grad()
    def prune(
        self, network: nn.Module, plan: Plan, images: Tensor, progress: Progress | None = None
    ) -> MaskedWeights:
        """Prune ``network`` in place.

        Parameters
        ----------
        network : nn.Module
            The dense network of ``plan``, one that `torch.fx` can trace. What changes are the
            weights and biases of the pruned layers, and the running statistics of batch norms.
        plan : Plan
            What happens to every layer; floors and targets hold as in training.
        images : Tensor
            float32 [N, C, H, W], normalised as the network takes them, on its device.
        progress : callable, optional
            Called with the name of each layer when it is done, once for each of ``plan.pruned``.

        Returns
        -------
        MaskedWeights
            The masks, which the network has been imposed on: exact zeros.

        Raises
        ------
        ValueError
            If the network cannot be calibrated, see `run_beside`, or the inputs of a layer are not
            finite, or depend on each other too nearly for the damping.

        Notes
        -----
        The images run once for `influences`, forward and back, with the memory of a training step
        of 32 images; then once more, twofold, with that of 2N images in evaluation. With float64
        matrices [F, F], five at a time, a layer of 4608 inputs takes 0.9 GB beside that. Time goes
        into one Cholesky factorisation and inverse, F^3 operations, for each round and each set of
        output channels with a mask of its own: a block row, or a single channel with N:M.
        """
        layers = {layer.name: layer for layer in plan.pruned}
        if not layers:
            return MaskedWeights(plan)
        influence = influences(network, images, list(layers))
        zeros = self._zeros(network, plan, images, influence)
        masks: dict[str, Tensor] = {}

        def visit(name: str, module: nn.Module, moments: Moments) -> None:
            layer = replace(layers[name], zeros=zeros[name])
            with self._solving(name):
                masks[name] = self._prune_layer(module, layer, plan, moments, influence[name])
            if progress is not None:
                progress(name)

        run_beside(network, images, list(layers), visit)
        masked = MaskedWeights(plan)
        masked.adopt({layers[name].param: pack_mask(mask) for name, mask in masks.items()})
        masked.impose(network)
        masked.check_reached(masked.count(network))
        return masked

    def _prune_layer(
        self,
        module: nn.Module,
        layer: LayerPlan,
        plan: Plan,
        moments: Moments,
        influence: Tensor,
    ) -> Tensor:
        """Choose the mask of a layer, bool of the shape of its weight, and change its weight."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        problem = _problem(weight, moments, self.damping, layer.name)
        # Of what is ranked the squares sum to what a unit is worth, whatever ranks weights.
        alone = replace(plan, layers=(layer,), zeros=layer.zeros or 0, score=l2)
        together = plan.pattern.together(layer.shape).to(problem.goal.device)
        # What a sparse network has lost already (initial=from_model) is not called back.
        mask = plan_masks(alone, {layer.param: weight}, 0.0)[layer.param] | (weight != 0)
        mask = mask.to(problem.goal.device)
        root = influence.sqrt().to(problem.goal)[:, None]
        for done in range(1, self.rounds + 1):
            losses = (problem.losses(mask.flatten(1), together) * root).reshape(layer.shape)
            mask &= plan_masks(alone, {layer.param: losses}, done / self.rounds)[layer.param]
        weight.copy_(problem.solve(mask.flatten(1)).reshape(layer.shape))
        return mask

    def _zeros(
        self, network: nn.Module, plan: Plan, images: Tensor, influence: dict[str, Tensor]
    ) -> dict[str, int]:
        """Return how many zeros each layer ends with.

        With `Global`, the layers compete once before any is pruned, with what their units are worth
        in the dense network.
        """
        if plan.shared_out:
            return {layer.name: layer.zeros or 0 for layer in plan.pruned}
        losses: dict[str, Tensor] = {}

        def visit(name: str, module: nn.Module, moments: Moments) -> None:
            weight: Tensor = module.weight  # type: ignore[assignment]
            problem = _problem(weight, moments, self.damping, name)
            together = plan.pattern.together(tuple(weight.shape)).to(problem.goal.device)
            everything = torch.ones_like(problem.goal, dtype=torch.bool)
            root = influence[name].sqrt().to(problem.goal)[:, None]
            with self._solving(name):
                losses[name] = (problem.losses(everything, together) * root).reshape(weight.shape)

        run_beside(network, images, [layer.name for layer in plan.pruned], visit)
        params = {layer.param: losses[layer.name] for layer in plan.pruned}
        masks = plan_masks(replace(plan, score=l2), params, 1.0)
        return {layer.name: int((~masks[layer.param]).sum()) for layer in plan.pruned}

    @contextmanager
    def _solving(self, name: str) -> Iterator[None]:
        """Say which layer it was whose least squares have no solution in float64."""
        try:
            yield
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"{name}: its inputs on the calibration images depend on each other too nearly for "
                f"calibration.damping={self.damping}, so the least squares have no solution: raise "
                "it (0.01 is the default), or leave the layer dense "
                f"(sparsity.dense='[\"{name}\"]')"
            ) from error


def _problem(weight: Tensor, moments: Moments, damping: float, name: str) -> MaskedLeastSquares:
    try:
        return MaskedLeastSquares(weight, moments, damping)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
