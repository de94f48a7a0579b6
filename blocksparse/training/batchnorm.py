"""Re-estimate batch-norm statistics for the weights as they are now.

Training keeps a moving average, which lags behind the weights; after pruning it describes a network
that is gone. So the statistics are reset and become the plain mean over some batches, every batch
weighing the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from blocksparse.sparsity.modes import evaluating
from blocksparse.training.data import ImageData


@torch.no_grad()
def reestimate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_batches: int = 50,
    device: torch.device | str | None = None,
) -> None:
    """Replace the running statistics of every batch norm by means over batches.

    Only running means and variances change. Everything but batch norm runs in evaluation mode, so
    dropout is off; modes and momenta are as before afterwards. The result depends on the weights
    and the batches alone.

    Parameters
    ----------
    model : nn.Module
        Changed in place; without batch norms nothing happens.
    batches : iterable of (images, labels)
        Images [N, C, H, W], such as `ImageData.statistics_dataloader()`.
    num_batches : int
        How many to use, or fewer if there are not as many.
    device : torch.device or str, optional
        Where the model is; by default its first parameter's device.

    Raises
    ------
    ValueError
        `num_batches` is below one, or there was no batch.
    """
    if num_batches < 1:
        raise ValueError(f"batchnorm.num_batches is {num_batches}; it must be at least 1")
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return
    device = device or next(model.parameters()).device
    batches = iter(itertools.islice(batches, num_batches))
    first = next(batches, None)
    if first is None:
        raise ValueError("no batch to re-estimate batch-norm statistics on: the loader is empty")
    before = [(norm.momentum, {k: b.clone() for k, b in norm.named_buffers()}) for norm in norms]
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # PyTorch's cumulative mean
                norm.training = True
            for images, _ in itertools.chain([first], batches):
                model(images.to(device))
    finally:
        for norm, (momentum, buffers) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked == 0:
                # Not reached: an auxiliary head that evaluation skips keeps what it had.
                norm.load_state_dict(buffers, strict=False)


class BatchNormReestimation(Callback):
    """Re-estimate before validation, so that a checkpoint holds what was validated.

    It happens before the last validation of a training, or before each; and at the end of a
    training that has no validation there. Stand-alone `validate` and `test` evaluate the network as
    it is.

    Parameters
    ----------
    num_batches : int
        Batches of `ImageData.statistics_dataloader()` to use.
    each_validation : bool
        Before each validation rather than only the last.
    """

    def __init__(self, num_batches: int = 50, each_validation: bool = False) -> None:
        self.num_batches = num_batches
        self.each_validation = each_validation
        self._done_at = -1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Re-estimate if this validation belongs to a training and is due."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if self.each_validation or trainer.global_step >= trainer.estimated_stepping_batches:
            self._reestimate(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Re-estimate if training is over, unless a validation just did."""
        if trainer.global_step >= trainer.estimated_stepping_batches:
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Re-estimate if training was stopped early, unless a validation just did."""
        if self._done_at != trainer.global_step:
            self._reestimate(trainer, pl_module)

    def _reestimate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, ImageData):
            raise ValueError(
                "batch-norm re-estimation takes its images from the data module's "
                "statistics_dataloader(): pass a blocksparse data module to the trainer, or leave "
                "this callback out"
            )
        with trainer.precision_plugin.forward_context():
            reestimate(
                pl_module,
                data.statistics_dataloader(),
                self.num_batches,
                pl_module.device,
            )
        self._done_at = trainer.global_step
