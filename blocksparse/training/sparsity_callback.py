"""The Lightning callback that prunes a network while it trains."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    MaskedWeights,
    Pattern,
    Plan,
    Schedule,
    Uniform,
    plan_table,
    resolve,
    save_plan,
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
        self._masked: MaskedWeights | None = None
        self._share = 0.0  # of the ramp; it never falls
        self._updated_at = 0  # global step
        self._loaded_settings: dict[str, str] | None = None
        # What one fit needs and no checkpoint holds.
        self._total_steps = 1
        self._hooks: list[RemovableHandle] = []
        self._zeros: dict[str, int] = {}  # counted in each pruned weight

    @property
    def state_key(self) -> str:
        """The key of `state_dict` among the callbacks in a checkpoint."""
        return STATE_KEY

    @property
    def plan(self) -> Plan | None:
        """What happens to every layer; None before the first fit."""
        return self._masked.plan if self._masked else None

    @property
    def finished(self) -> bool:
        """Whether the masks are final: the ramp has ended, or there is nothing to prune."""
        return self.plan is not None and (self._share >= 1.0 or not self.plan.pruned)

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks now: bool on the CPU, True where kept, by parameter name."""
        return self._masked.masks if self._masked else {}

    def patterns(self) -> dict[str, Pattern]:
        """Return the pattern of each pruned parameter, by its name in the network."""
        return self.plan.patterns() if self.plan else {}

    def plan_for(self, network: nn.Module) -> Plan:
        """Return what these settings mean for ``network``, without a fit; see `resolve`."""
        return resolve(
            network,
            target=self.target,
            pattern=self.pattern,
            score=self.score,
            allocation=self.allocation,
            floors=self.floors,
            layers=self.layers,
            initial=self.initial,
        )

    def adopt(self, masked: MaskedWeights) -> None:
        """Take over masks that were made without training; they are final from the first step."""
        self._masked, self._share = masked, 1.0

    # -- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return plan, ramp and packed masks as tensors and plain values; empty before a fit."""
        if self._masked is None:
            return {}
        return {
            "settings": self._settings(),
            "plan": self._masked.plan.to_json(),
            "share": self._share,
            "updated_at": self._updated_at,
            "masks": dict(self._masked.packed),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._masked = MaskedWeights(Plan.from_json(state_dict["plan"]), state_dict["masks"])
        self._share = state_dict["share"]
        self._updated_at = state_dict["updated_at"]
        self._loaded_settings = state_dict["settings"]

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Impose the masks on what is saved.

        The weights in training have them already; this is for callbacks that put other weights in
        their place, e.g. averages over time. List those before this one.
        """
        prefix = f"{self.root}." if self.root else ""
        for param, mask in self.masks.items():
            saved = checkpoint["state_dict"][prefix + param]
            dropped = ~mask.to(saved.device)
            if bool(saved[dropped].any()):
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
        if self._masked is None:
            self._masked = MaskedWeights(self.plan_for(network))
        self._check_settings()
        plan = self._masked.plan
        plan.weights(network)  # refuses another network than the plan's
        if trainer.is_global_zero:
            # Wide enough for every column: a log file has no width of its own.
            Console(width=max(Console().width, 100)).print(plan_table(plan))
            paths = save_plan(plan, Path(self.save_dir or trainer.default_root_dir))
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
        self._updated_at = min(self._updated_at, trainer.global_step)  # a new trainer counts anew
        self._release()
        masked, network = self._active, self._network(pl_module)
        if not masked.packed and masked.plan.pruned:
            self._update(trainer, network, trainer.global_step)
        masked.impose(network)
        self._zeros = masked.count(network)

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._active.impose(network)
            # Lightning counts the step only after the optimizer returns.
            if self._due(trainer.global_step + 1):
                self._update(trainer, network, trainer.global_step + 1)

        self._hooks = [
            optimizer.register_step_post_hook(after_step) for optimizer in trainer.optimizers
        ]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Log the sparsity counted last."""
        plan, zeros = self._active.plan, sum(self._zeros.values())
        pl_module.log("sparsity", zeros / max(plan.prunable, 1), prog_bar=True, batch_size=1)
        pl_module.log("sparsity_of_all", zeros / max(plan.parameters, 1), batch_size=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count and log the density of each layer."""
        self._zeros = self._active.count(self._network(pl_module))
        for layer in self._active.plan.pruned:
            density = 1.0 - self._zeros[layer.param] / layer.size
            pl_module.log(f"density/{layer.name}", density, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that what was promised is there."""
        masked, network = self._active, self._network(pl_module)
        # The mixed-precision scaler may have skipped the very last step.
        if self._due(trainer.global_step):
            self._update(trainer, network, trainer.global_step)
        masked.impose(network)
        self._release()
        self._zeros = masked.count(network)
        if self.finished:
            masked.check_reached(self._zeros)
        else:
            logger.warning(
                "training stopped at step %d of %d, before the sparsity ramp ended (schedule.end="
                "%g): sparsity is %.4f and the target %.4f. Resume, or let the ramp end earlier",
                trainer.global_step,
                self._total_steps,
                self.schedule.end,
                sum(self._zeros.values()) / masked.plan.prunable,
                masked.plan.sparsity,
            )

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let go of optimizers and weights."""
        self._release()

    # -- inner workings ------------------------------------------------------------------------

    @property
    def _active(self) -> MaskedWeights:
        if self._masked is None:
            raise RuntimeError(
                "the sparsity callback has no plan yet: it is made when a fit starts"
            )
        return self._masked

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

    def _due(self, step: int) -> bool:
        """Say whether the masks are to be built anew once ``step`` optimizer steps are done."""
        if self.finished:
            return False
        progress = step / self._total_steps
        if step - self._updated_at < self.interval and progress < self.schedule.end:
            return False
        return self.schedule.at(progress) > self._share

    def _update(self, trainer: Trainer, network: nn.Module, step: int) -> None:
        """Build the masks anew from the weights, and impose them."""
        share = self.schedule.at(step / self._total_steps)
        # All ranks have the same weights, yet the ranking of one counts: they cannot differ. It
        # sends its error too, or the others would wait for masks that never come.
        built: dict[str, Tensor] | ValueError | None = None
        if trainer.is_global_zero:
            try:
                built = self._active.build(network, share)
            except ValueError as error:
                built = error
        built = trainer.strategy.broadcast(built, src=0)
        if not isinstance(built, dict):
            raise built or RuntimeError("rank 0 sent no masks")
        self._active.adopt(built)
        self._active.impose(network)
        self._share, self._updated_at = share, step
        self._zeros = self._active.count(network)
        if self.finished:
            self._active.check_reached(self._zeros)

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._masked is not None:
            self._masked.forget()
