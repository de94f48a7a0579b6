"""The training step of a classifier."""

# N batch, C channels, H W image height and width, K classes.

from __future__ import annotations

import hashlib
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from blocksparse.training.compilation import CompiledNetwork
from blocksparse.training.cutmix import cutmix
from blocksparse.training.data.order import stream_seed
from blocksparse.training.distillation import Distillation
from blocksparse.training.features import feature_error, recorded_features
from blocksparse.training.optimization import Optimization
from blocksparse.training.weights import WeightsError

# Weights of auxiliary losses, by the field of torchvision's outputs in training mode: Inception V3
# (C. Szegedy et al., "Rethinking the Inception Architecture", as torchvision's recipe has it) and
# GoogLeNet ("Going Deeper with Convolutions", section 5).
_AUXILIARY = {"aux_logits": 0.4, "aux_logits1": 0.3, "aux_logits2": 0.3}


class Classifier(LightningModule):
    """Train a network to tell images apart.

    Logs `train/loss`, `lr`, where features are followed `train/feature_error`, and for each
    validation `val/loss`, `val/accuracy` and, above five classes, `val/accuracy_top5` (fractions,
    0..1); `test/...` likewise.

    The network's entries in `state_dict` are its own under `model.`; the teacher is not in there.
    Random numbers within a step (dropout) come from (seed, epoch, step), and gradients half
    accumulated go into the checkpoint: a resumed training ends in the same weights.

    Parameters
    ----------
    model : nn.Module
        Maps images [N, C, H, W] to logits [N, K].
    optimization : Optimization, optional
        Optimizer, learning rate and weight decay.
    label_smoothing : float
        Share of each label spread over all classes, 0..1.
    distillation : Distillation, optional
        How to follow the teacher; None: not at all.
    teacher : nn.Module, optional
        The dense network; needed with `distillation`. It is put in evaluation mode,
        its weights never change, and it must be given again to resume (its fingerprint in the
        checkpoint tells a wrong one).
    channels_last : bool
        Keep the network and the images channels innermost in memory, which convolutions on CPUs and
        GPUs often prefer.
    compile_steps : bool
        Run network and teacher through `torch.compile` in training steps. Validation runs the
        network as it is.
    seed : int
        Seed of the random numbers within training steps.
    """

    def __init__(
        self,
        model: nn.Module,
        optimization: Optimization | None = None,
        *,
        label_smoothing: float = 0.0,
        distillation: Distillation | None = None,
        teacher: nn.Module | None = None,
        channels_last: bool = False,
        compile_steps: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing}; it is a share, 0..1")
        if distillation is not None and teacher is None:
            raise ValueError(
                "distillation is on but there is no teacher: give the dense network, or set "
                "distillation to null"
            )
        if compile_steps and distillation is not None and distillation.features:
            raise ValueError(
                "a compiled network does not show its feature maps: set compile_steps=false, or "
                "distillation.features=0"
            )
        # Lightning leaves modes as they are: a network just evaluated would be trained with
        # its batch norms frozen and without dropout.
        self.model = model if model.training else model.train()
        self.optimization = optimization or Optimization()
        self.lr = self.optimization.lr  # Lightning's learning-rate finder reads and sets it
        self.label_smoothing = label_smoothing
        self.distillation = distillation
        self.channels_last = channels_last
        self.seed = seed
        # In a tuple, where nn.Module does not look: no parameter, no entry of state_dict.
        self._teacher: tuple[nn.Module, ...] = (
            (teacher.eval(),) if teacher is not None and distillation is not None else ()
        )
        self._compiled = (
            {network: CompiledNetwork(network) for network in (self.model, *self._teacher)}
            if compile_steps
            else {}
        )
        self._gradients: dict[str, Tensor] = {}
        if channels_last:
            self.model.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Any:
        """Run the network: logits [N, K], with torchvision's auxiliary logits in training mode."""
        return self.model(self._arrange(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch of images and labels."""
        images, labels = batch
        following = self.distillation
        mixed = following is not None and 0 < following.cutmix > float(torch.rand(()))
        images = self._arrange(cutmix(images) if mixed else images)
        with self._recorded(self.model) as features:
            logits, auxiliary = _unpack(self._step_through(self.model, images))
        loss = self._cross_entropy(logits, labels)
        if self._teacher and following is not None:
            teacher = self._teacher[0]
            with torch.no_grad(), self._recorded(teacher) as wanted_features:
                wanted = self._step_through(teacher, images)
            divergence = following.divergence(logits, wanted)
            loss = divergence if mixed else following.mix(loss, divergence)
            if following.features:
                error = feature_error(features, wanted_features)
                self.log("train/feature_error", error)
                loss = loss + following.features * error
        for weight, extra in auxiliary if not mixed else []:  # the teacher has none to follow
            loss = loss + weight * self._cross_entropy(extra, labels)
        self.log("train/loss", loss, prog_bar=True)
        self.log("lr", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of a batch."""
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of a batch."""
        self._evaluate("test", batch)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the logits [N, K] of a batch."""
        return self(batch[0])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Make the optimizer and the per-step schedule."""
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ValueError(
                "the training has no end, so its learning rate cannot fall towards it: set the "
                "trainer's max_epochs or max_steps"
            )
        optimizer = self.optimization.make_optimizer(self.model, self.lr)
        scheduler = self.optimization.make_scheduler(optimizer, int(steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_fit_start(self) -> None:
        """Bring the teacher to where the network is."""
        for teacher in self._teacher:
            teacher.to(self.device)
            if self.channels_last:
                teacher.to(memory_format=torch.channels_last)

    def on_train_start(self) -> None:
        """Take up gradients that were half accumulated when the checkpoint was written."""
        for name, parameter in self.named_parameters():
            if name in self._gradients:
                parameter.grad = self._gradients[name].to(parameter)
        self._gradients = {}

    def on_fit_end(self) -> None:
        """Take over the first process's batch-norm statistics: each has seen other images."""
        if self.trainer.world_size > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        """Set this step's random numbers and weight decay."""
        rank, epoch = self.global_rank, self.current_epoch
        torch.manual_seed(stream_seed(self.seed, rank, epoch, batch_idx))
        time = self.global_step / max(1, self.trainer.estimated_stepping_batches)
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            if group["weight_decay"]:
                group["weight_decay"] = self.optimization.weight_decay_at(time)

    def on_train_batch_end(self, outputs: Any, batch: object, batch_idx: int) -> None:
        """Stop a training that diverged, as often as Lightning logs: a GPU has to be waited for.

        Raises
        ------
        ValueError
            The loss is not finite. What the last epochs left stays.
        """
        often = max(1, self.trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if (batch_idx + 1) % often and not self.trainer.is_last_batch:
            return
        if not torch.isfinite(outputs["loss"]).all():
            raise ValueError(f"the loss is {float(outputs['loss'])} {self._diverged()}")

    def on_train_end(self) -> None:
        """Refuse weights that the last step made NaN or infinite.

        Raises
        ------
        ValueError
            Some are.
        """
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise ValueError(f"{name} is not finite {self._diverged()}")

    def _diverged(self) -> str:
        return (
            f"after step {self.global_step}, in epoch {self.current_epoch + 1}: the training "
            "diverged. Lower the optimizer's lr, lengthen its warmup, or set "
            "trainer.gradient_clip_val, and start anew"
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the teacher's fingerprint and half-accumulated gradients."""
        if self._teacher:
            checkpoint["teacher"] = fingerprint(self._teacher[0])
        if self._trainer is not None and self.trainer.accumulate_grad_batches > 1:
            checkpoint["gradients"] = {
                name: parameter.grad.clone()
                for name, parameter in self.named_parameters()
                if parameter.grad is not None
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the teacher, and keep the gradients for the start of training."""
        self._gradients = checkpoint.get("gradients", {})
        wanted = checkpoint.get("teacher")
        if self._teacher and wanted and wanted != fingerprint(self._teacher[0]):
            raise WeightsError(
                "the checkpoint was written while distilling from another teacher (fingerprint "
                f"{wanted[:12]}, this one has {fingerprint(self._teacher[0])[:12]}): give the "
                "dense checkpoint that the training began with, its channels in the same order"
            )

    def _step_through(self, network: nn.Module, images: Tensor) -> Any:
        """Run the network or its teacher in a training step."""
        return self._compiled.get(network, network)(images)

    def _recorded(self, network: nn.Module) -> AbstractContextManager[dict[str, Tensor]]:
        """Record features within the context, if anybody is going to compare them."""
        followed = self.distillation is not None and self.distillation.features > 0
        return recorded_features(network) if followed else nullcontext({})

    def _arrange(self, images: Tensor) -> Tensor:
        if self.channels_last:
            return images.contiguous(memory_format=torch.channels_last)
        return images

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        logits = self(images)
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        figures = {"loss": F.cross_entropy(logits, labels), "accuracy": ranked[:, 0].float().mean()}
        if logits.shape[1] > 5:
            figures["accuracy_top5"] = ranked.any(dim=1).float().mean()
        for name, value in figures.items():
            # Weighted by batch size, so a smaller last batch counts for what it is.
            self.log(
                f"{stage}/{name}",
                value,
                prog_bar=name == "accuracy",
                on_epoch=True,
                batch_size=len(labels),
                sync_dist=True,
            )


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of a network's weights: names, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _unpack(outputs: Any) -> tuple[Tensor, list[tuple[float, Tensor]]]:
    if isinstance(outputs, Tensor):
        return outputs, []
    fields = outputs._asdict()
    auxiliary = [
        (weight, fields[name])
        for name, weight in _AUXILIARY.items()
        if fields.get(name) is not None
    ]
    return fields["logits"], auxiliary
