"""The Lightning callback that prunes a network while it trains."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from blocksparse.sparsity import (
    Allocation,
    Block,
    Cubic,
    Floors,
    Layers,
    Pattern,
    Plan,
    Schedule,
    Uniform,
    pack_mask,
    plan_masks,
    plan_table,
    resolve,
    save_plan,
    unpack_mask,
)
from blocksparse.sparsity.scores import score_named
from blocksparse.sparsity.state import STATE_KEY

logger = logging.getLogger(__name__)

# Strategies that cut a parameter into pieces, so that no process sees the whole block grid.
_SHARDING = ("FSDP", "DeepSpeed", "ModelParallel")


class SparsityCallback(Callback):
    """Prune a network gradually: masks and schedule live here, the network stays a plain one.

    Masks are imposed right after every step of an optimizer, so that neither momentum nor weight
    decay brings a pruned weight back, and every checkpoint, whoever writes it and when, has exact
    zeros. Every `interval` steps, until the ramp ends, the masks are built anew from the weights.
    After that they are fixed. A later fit keeps them.

    In the logs: ``sparsity`` (of the prunable weights, also in the progress bar),
    ``sparsity_of_all`` (of all parameters) and, every epoch, ``density/<layer>``. All are counted
    in the weights.

    Parameters
    ----------
    target : float
        Sparsity of the prunable weights at the end of the ramp, 0..1. 0 prunes nothing.
    pattern : Pattern, optional
        What may be zero together; default: 8x8 blocks shared over the kernel positions.
    score : {"l1", "l2"}
        What ranks the units of the pattern.
    schedule : Schedule, optional
        When; default: a cubic ramp over the first half of the training.
    allocation : Allocation, optional
        How the target is shared out among the layers; default: uniform.
    include, dense : sequence of str
        Globs over layer names: only these, and none of those. See `Layers`.
    first_conv_dense, classifier_dense : bool
        Leave the first convolution, and the classifiers, dense.
    min_density : float
        Fraction of its weights that every layer keeps; see `Floors`.
    keep_channels : bool
        No block row and no block column of a layer loses everything; see `Floors`.
    initial : float or "from_model"
        Sparsity to begin with; "from_model": what each layer already has.
    interval : int
        Optimizer steps between two updates of the masks.
    root : str
        Name of the network within the LightningModule; "" is the LightningModule itself. Layer
        names are relative to it.
    save_dir : str, optional
        Where ``sparsity_plan.json`` and ``.md`` go; default: the trainer's ``default_root_dir``.

    Examples
    --------
    >>> callback = SparsityCallback(0.75, Block(8, 8), schedule=Cubic(0.0, 0.4))
    >>> trainer = Trainer(max_epochs=30, callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(
        self,
        target: float,
        pattern: Pattern | None = None,
        score: str = "l2",
        schedule: Schedule | None = None,
        allocation: Allocation | None = None,
        include: Sequence[str] = ("*",),
        dense: Sequence[str] = (),
        first_conv_dense: bool = True,
        classifier_dense: bool = True,
        min_density: float = 0.01,
        keep_channels: bool = True,
        initial: float | str = 0.0,
        interval: int = 100,
        root: str = "model",
        save_dir: str | None = None,
    ) -> None:
        if interval < 1:
            raise ValueError(f"sparsity.interval is {interval}; it counts steps, at least 1")
        self.target = float(target)
        self.pattern = pattern or Block()
        self.score = score_named(score)
        self.schedule = schedule or Cubic()
        self.allocation = allocation or Uniform()
        self.layers = Layers(tuple(include), tuple(dense), first_conv_dense, classifier_dense)
        self.floors = Floors(min_density, keep_channels)
        self.initial = initial
        self.interval = interval
        self.root = root
        self.save_dir = save_dir
        self._plan: Plan | None = None
        self._masks: dict[str, Tensor] = {}  # packed bits, on the CPU
        self._share = 0.0  # of the ramp; it never falls
        self._updated_at = 0  # global step
        self._loaded_settings: dict[str, str] | None = None
        # What one fit needs and no checkpoint holds.
        self._total_steps = 0
        self._started = False
        self._hooks: list[RemovableHandle] = []
        self._dropped: list[tuple[Tensor, Tensor]] | None = None  # weight, True where it is zero
        self._measured: dict[str, int] = {}  # zeros counted in each weight

    @property
    def state_key(self) -> str:
        """The key of `state_dict` among the callbacks in a checkpoint."""
        return STATE_KEY

    @property
    def plan(self) -> Plan | None:
        """What happens to every layer; None before the first fit."""
        return self._plan

    @property
    def finished(self) -> bool:
        """Whether the ramp has ended and the masks are final."""
        return self._share >= 1.0

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks now: bool on the CPU, True where kept, by parameter name."""
        if self._plan is None:
            return {}
        shapes = {layer.param: layer.shape for layer in self._plan.pruned}
        return {param: unpack_mask(bits, shapes[param]) for param, bits in self._masks.items()}

    def patterns(self) -> dict[str, Pattern]:
        """Return the pattern of each pruned parameter, by its name in the network."""
        return self._plan.patterns() if self._plan else {}

    # -- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return plan, ramp and packed masks as tensors and plain values; empty before a fit."""
        if self._plan is None:
            return {}
        return {
            "settings": self._settings(),
            "plan": self._plan.to_json(),
            "share": self._share,
            "updated_at": self._updated_at,
            "masks": dict(self._masks),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._plan = Plan.from_json(state_dict["plan"])
        self._share = state_dict["share"]
        self._updated_at = state_dict["updated_at"]
        self._masks = dict(state_dict["masks"])
        self._loaded_settings = state_dict["settings"]
        self._dropped = None  # the network's weights were exchanged with the masks

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Impose the masks on what is saved.

        The weights in training have them already; this is for callbacks that put other weights in
        their place, e.g. averages over time. List those before this one.
        """
        prefix = f"{self.root}." if self.root else ""
        for param, mask in self.masks.items():
            saved = checkpoint["state_dict"].get(prefix + param)
            if saved is not None and bool(saved[~mask.to(saved.device)].any()):
                dropped = ~mask.to(saved.device)
                checkpoint["state_dict"][prefix + param] = saved.masked_fill(dropped, 0.0)

    # -- a fit ---------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the plan, or check the one that was loaded; print and save it."""
        strategy = type(trainer.strategy).__name__
        if strategy.startswith(_SHARDING):
            raise ValueError(
                f"{strategy} cuts weights into pieces and masks need whole ones: use "
                "strategy=ddp or a single device to prune"
            )
        network = self._network(pl_module)
        if self._plan is None:
            self._plan = resolve(
                network,
                target=self.target,
                pattern=self.pattern,
                score=self.score,
                allocation=self.allocation,
                floors=self.floors,
                layers=self.layers,
                initial=self.initial,
            )
        self._check_settings()
        self._plan.weights(network)
        if trainer.is_global_zero:
            # Wide enough for every column: a log file has no width of its own.
            console = Console()
            Console(width=max(console.width, 100)).print(plan_table(self._plan))
            paths = save_plan(self._plan, Path(self.save_dir or trainer.default_root_dir))
            logger.info("sparsity plan saved in %s and %s", *paths)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Impose the masks there are, or the initial ones, and watch the optimizers."""
        total = trainer.estimated_stepping_batches
        if not math.isfinite(total) and not self.finished:
            raise ValueError(
                "the sparsity schedule is in fractions of the training, whose length is not known: "
                "set trainer.max_epochs or trainer.max_steps"
            )
        self._total_steps = max(int(total), 1) if math.isfinite(total) else 1
        self._dropped = None
        self._updated_at = min(self._updated_at, trainer.global_step)  # a new trainer counts anew
        if not self._masks and self._pruned:
            self._advance(trainer, pl_module, trainer.global_step, force=True)
        self._impose(pl_module)
        self._measure(pl_module)

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            # Lightning counts the step only after the optimizer returns.
            self._impose(pl_module)
            self._advance(trainer, pl_module, trainer.global_step + 1)

        self._release()
        self._hooks = [
            optimizer.register_step_post_hook(after_step) for optimizer in trainer.optimizers
        ]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Log the sparsity counted last."""
        zeros = sum(self._measured.values())
        assert self._plan is not None
        sparsity = zeros / max(self._plan.prunable, 1)
        pl_module.log("sparsity", sparsity, prog_bar=True, batch_size=1)
        pl_module.log("sparsity_of_all", zeros / max(self._plan.parameters, 1), batch_size=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count and log the density of each layer."""
        self._measure(pl_module)
        for layer in self._pruned:
            density = 1.0 - self._measured[layer.param] / layer.size
            pl_module.log(f"density/{layer.name}", density, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that what was promised is there."""
        # The mixed-precision scaler may have skipped the very last step.
        self._advance(trainer, pl_module, trainer.global_step)
        self._impose(pl_module)
        self._measure(pl_module)
        self._release()
        if self.finished:
            self._check_reached()
        elif self._pruned:
            assert self._plan is not None
            sparsity = sum(self._measured.values()) / self._plan.prunable
            logger.warning(
                "training stopped at step %d of %d, before the sparsity ramp ended (schedule.end="
                "%g): sparsity is %.4f and the target %.4f. Resume, or let the ramp end earlier",
                trainer.global_step,
                self._total_steps,
                self.schedule.end,
                sparsity,
                self._plan.sparsity,
            )

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Stop watching the optimizers."""
        self._release()

    # -- inner workings ------------------------------------------------------------------------

    @property
    def _pruned(self) -> tuple[Any, ...]:
        return self._plan.pruned if self._plan else ()

    def _settings(self) -> dict[str, str]:
        """Return what decides about the masks, as text, to tell when a resumed run differs."""
        return {
            "target": repr(self.target),
            "pattern": str(self.pattern),
            "score": self.score.name,
            "schedule": repr(self.schedule),
            "allocation": repr(self.allocation),
            "layers": repr(self.layers),
            "floors": repr(self.floors),
            "initial": repr(self.initial),
            "interval": repr(self.interval),
        }

    def _check_settings(self) -> None:
        """Refuse to go on with other settings than those in the checkpoint."""
        loaded, own = self._loaded_settings, self._settings()
        differing = [key for key in own if loaded is not None and loaded.get(key) != own[key]]
        if loaded is not None and differing:
            listed = "; ".join(
                f"{key}: {loaded.get(key)} in the checkpoint, {own[key]} here" for key in differing
            )
            raise ValueError(
                f"the checkpoint was pruned with other sparsity settings ({listed}). Resume with "
                "the same ones, or start a new training from its weights with "
                "sparsity.initial=from_model"
            )

    def _network(self, pl_module: LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self.root)
        except AttributeError:
            children = ", ".join(name for name, _ in pl_module.named_children()) or "none"
            raise ValueError(
                f"{type(pl_module).__name__} has no module {self.root!r} to prune; it has: "
                f"{children}. Set sparsity.root to one of them, or to '' for all of it"
            ) from None

    def _advance(
        self, trainer: Trainer, pl_module: LightningModule, step: int, force: bool = False
    ) -> None:
        """Build the masks anew if ``step`` optimizer steps are done and an update is due."""
        if self.finished or not self._pruned:
            return
        progress = step / self._total_steps
        due = step - self._updated_at >= self.interval or progress >= self.schedule.end
        share = max(self._share, self.schedule.at(progress))
        if not force and (not due or share == self._share):
            return
        assert self._plan is not None
        packed = None
        if trainer.is_global_zero:
            weights = self._plan.weights(self._network(pl_module))
            masks = plan_masks(self._plan, weights, share)
            packed = {param: pack_mask(mask) for param, mask in masks.items()}
        # Ranks have the same weights, yet the ranking of one counts, so that they cannot differ.
        self._masks = trainer.strategy.broadcast(packed, src=0)
        self._share = share
        self._updated_at = step
        self._dropped = None
        self._impose(pl_module)
        self._measure(pl_module)
        if self.finished:
            self._check_reached()

    @torch.no_grad()
    def _impose(self, pl_module: LightningModule) -> None:
        """Set every pruned weight to exactly +0.0, even if it is NaN."""
        if self._dropped is None:
            assert self._plan is not None
            weights = self._plan.weights(self._network(pl_module))
            self._dropped = []
            for param, mask in self.masks.items():
                weight = weights[param]
                if not mask.all():
                    # In the memory format of the weight, so that filling is one pass over memory.
                    dropped = torch.empty_like(weight, dtype=torch.bool)
                    self._dropped.append((weight, dropped.copy_(~mask)))
        for weight, dropped in self._dropped:
            weight.masked_fill_(dropped, 0.0)

    @torch.no_grad()
    def _measure(self, pl_module: LightningModule) -> None:
        """Count the zeros in every pruned weight."""
        assert self._plan is not None
        weights = self._plan.weights(self._network(pl_module))
        self._measured = {
            param: weight.numel() - int(torch.count_nonzero(weight))
            for param, weight in weights.items()
        }

    def _check_reached(self) -> None:
        """Raise if the weights are less sparse than the plan says."""
        assert self._plan is not None
        short = [
            f"{layer.name} {self._measured[layer.param] / layer.size:.4f} of {layer.target:.4f}"
            for layer in self._plan.pruned
            if layer.zeros is not None and self._measured[layer.param] < layer.zeros
        ]
        total = sum(self._measured.values())
        if short or total < self._plan.zeros:
            raise RuntimeError(
                f"the sparsity ramp has ended and the target is not reached: {total} of "
                f"{self._plan.prunable} weights are zero, and {self._plan.zeros} should be"
                + (f" (layers that fall short: {', '.join(short)})" if short else "")
                + ". Something changed the weights after the masks were imposed: look at the "
                "callbacks and hooks that write to them"
            )

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
