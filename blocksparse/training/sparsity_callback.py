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

from blocksparse.sparsity import (
    Allocation,
    Block,
    Cubic,
    Floors,
    Layers,
    MaskedWeights,
    Pattern,
    Plan,
    Ramp,
    Schedule,
    Uniform,
    Updates,
    plan_table,
    resolve,
    save_plan,
)
from blocksparse.sparsity.scores import score_named
from blocksparse.sparsity.state import STATE_KEY
from blocksparse.training.step_hooks import StepHooks

logger = logging.getLogger(__name__)

# Strategies that cut a parameter into pieces, so that no process sees the whole block grid.
_SHARDING = ("FSDP", "DeepSpeed", "ModelParallel")


class SparsityCallback(Callback):
    """Prune a network gradually: masks and schedule live here, the network stays a plain one.

    Masks are imposed right after every step of an optimizer, so that neither momentum nor weight
    decay brings a pruned weight back, and every checkpoint, whoever writes it and when, has exact
    zeros. Every `interval` steps, until the ramp ends, the masks are built anew from the weights.
    After that they are fixed. A later fit keeps them.

    With ``backward="straight_through"`` dropped weights are zero in the network all the same, but
    go on learning, and come back when they outgrow others: see `StraightThrough`.

    In the logs: ``sparsity`` (of the prunable weights, also in the progress bar),
    ``sparsity_of_all`` (of all parameters) and, every epoch, ``density/<layer>``. All are counted
    in the weights.

    Parameters
    ----------
    target : float
        Sparsity of the prunable weights at the end of the ramp, 0..1. 0 prunes nothing.
    pattern : Pattern, optional
        What may be zero together; default: 8x8 blocks shared over the kernel positions.
    score : {"l1", "l2", "taylor", "movement"}
        What ranks the units of the pattern. The last two go by gradients: see `gradient_scores`.
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
    backward : {"masked", "straight_through"}
        What dropped weights learn: nothing, or by the gradients at the masked weights.
    decay : float
        Straight-through only: this times its value is added to the gradient of a dropped weight.
    update_until : float, optional
        Straight-through only: fraction of training until which masks are built anew, at least the
        schedule's end; default: that end.
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
        backward: str = "masked",
        decay: float = 2e-4,
        update_until: float | None = None,
        root: str = "model",
        save_dir: str | None = None,
    ) -> None:
        self.target = float(target)
        self.pattern = pattern or Block()
        self.score = score_named(score)
        self.allocation = allocation or Uniform()
        self.layers = Layers(tuple(include), tuple(dense), first_conv_dense, classifier_dense)
        self.floors = Floors(min_density, keep_channels)
        self.initial = initial
        self.updates = Updates(schedule or Cubic(), interval, backward, decay, update_until)
        if self.score.gradients and self.updates.schedule.at(0.0) > 0.0:
            raise ValueError(
                f"sparsity.score={score} needs gradients, and there are none before the first "
                "step: let sparsity.schedule.start be above 0"
            )
        self.root = root
        self.save_dir = save_dir
        self._made: Ramp | None = None
        self._loaded_settings: dict[str, str] | None = None
        # What one fit needs and no checkpoint holds.
        self._total_steps = 1
        self._hooks: StepHooks | None = None
        self._zeros: dict[str, int] = {}  # counted in each pruned weight

    @property
    def state_key(self) -> str:
        """The key of `state_dict` among the callbacks in a checkpoint."""
        return STATE_KEY

    @property
    def plan(self) -> Plan | None:
        """What happens to every layer; None before the first fit."""
        return self._made.plan if self._made else None

    @property
    def finished(self) -> bool:
        """Whether the planned sparsity is reached: the ramp is over, or nothing is to prune."""
        return self._made is not None and self._made.finished

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks now: bool on the CPU, True where kept, by parameter name."""
        return self._made.masked.masks if self._made else {}

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
        state = {"share": 1.0, "masks": masked.packed}
        self._made = Ramp(masked.plan, self.updates, state)

    # -- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return plan, ramp and packed masks as tensors and plain values; empty before a fit."""
        if self._made is None:
            return {}
        plan = self._made.plan.to_json()
        return {"settings": self._settings(), "plan": plan, **self._made.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._made = Ramp(Plan.from_json(state_dict["plan"]), self.updates, state_dict)
        # Before there was a choice, dropped weights learnt nothing.
        self._loaded_settings = {"backward": "masked", **state_dict["settings"]}

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
        if self._made is None:
            self._made = Ramp(self.plan_for(network), self.updates)
        if self._loaded_settings is not None:
            self._check_settings(self._loaded_settings)
        plan = self._made.plan
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
        # Masks made without training, or read from a checkpoint, are those of the first process.
        made = self.state_dict() if self._ramp.masked.packed else {}
        state = trainer.strategy.broadcast(made, src=0)
        if not trainer.is_global_zero and state:
            self._made = Ramp(Plan.from_json(state["plan"]), self.updates, state)
        ramp, network = self._ramp, self._network(pl_module)
        ramp.updated_at = min(ramp.updated_at, trainer.global_step)  # a new trainer counts anew
        self._release()
        if not ramp.masked.packed and ramp.plan.pruned:
            self._update(trainer, network, trainer.global_step)
        ramp.masked.impose(network)
        self._zeros = ramp.masked.count(network)

        def before_step(optimizer: Optimizer) -> None:
            params = [param for group in optimizer.param_groups for param in group["params"]]
            self._ramp.before_step(network, params)

        def after_step(optimizer: Optimizer) -> None:
            self._ramp.after_step(network)
            # Lightning counts the step only after the optimizer returns.
            if self._ramp.due(trainer.global_step + 1, self._total_steps):
                self._update(trainer, network, trainer.global_step + 1)

        self._hooks = StepHooks(trainer.optimizers, before_step, after_step)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Put dropped weights that learn back in place, and gather gradient scores."""
        if self._hooks:
            self._hooks.gradients_ready(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Log the sparsity counted last."""
        plan, zeros = self._ramp.plan, sum(self._zeros.values())
        pl_module.log("sparsity", zeros / max(plan.prunable, 1), prog_bar=True, batch_size=1)
        pl_module.log("sparsity_of_all", zeros / max(plan.parameters, 1), batch_size=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count and log the density of each layer."""
        self._zeros = self._ramp.masked.count(self._network(pl_module))
        for layer in self._ramp.plan.pruned:
            density = 1.0 - self._zeros[layer.param] / layer.size
            # The same in all processes, but Lightning warns of what they do not settle together.
            pl_module.log(f"density/{layer.name}", density, batch_size=1, sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that what was promised is there."""
        ramp, network = self._ramp, self._network(pl_module)
        # The mixed-precision scaler may have skipped the very last step.
        if ramp.due(trainer.global_step, self._total_steps):
            self._update(trainer, network, trainer.global_step)
        ramp.masked.impose(network)
        self._release()
        self._zeros = ramp.masked.count(network)
        if self.finished:
            ramp.masked.check_reached(self._zeros)
        else:
            logger.warning(
                "training stopped at step %d of %d, before the sparsity ramp ended (schedule.end="
                "%g): sparsity is %.4f and the target %.4f. Resume, or let the ramp end earlier",
                trainer.global_step,
                self._total_steps,
                self.updates.schedule.end,
                sum(self._zeros.values()) / ramp.plan.prunable,
                ramp.plan.sparsity,
            )

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let go of optimizers and weights, with zeros in them wherever the step broke off."""
        if self._hooks and self.masks:
            self._ramp.masked.impose(self._network(pl_module))
        self._release()

    # -- inner workings ------------------------------------------------------------------------

    @property
    def _ramp(self) -> Ramp:
        if self._made is None:
            raise RuntimeError(
                "the sparsity callback has no plan yet: it is made when a fit starts"
            )
        return self._made

    def _settings(self) -> dict[str, str]:
        """Return what decides about the masks, as text, to tell when a resumed run differs."""
        return {
            "target": repr(self.target),
            "pattern": str(self.pattern),
            "score": self.score.name,
            "allocation": repr(self.allocation),
            "layers": repr(self.layers),
            "floors": repr(self.floors),
            "initial": repr(self.initial),
            **self.updates.settings(),
        }

    def _check_settings(self, loaded: dict[str, str]) -> None:
        """Refuse to go on with other settings than those in the checkpoint."""
        own = self._settings()
        differing = [key for key in own if loaded.get(key) != own[key]]
        if differing:
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
                f"{children}. Set root to one of them, or to '' for all of it"
            ) from None

    def _update(self, trainer: Trainer, network: nn.Module, step: int) -> None:
        """Build the masks anew from the weights, and impose them."""
        ramp, total = self._ramp, self._total_steps
        # All ranks have the same weights, yet the ranking of one counts: they cannot differ. It
        # sends its error too, or the others would wait for masks that never come.
        built: dict[str, Tensor] | ValueError | None = None
        if trainer.is_global_zero:
            try:
                built = ramp.build(network, step, total)
            except ValueError as error:
                built = error
        built = trainer.strategy.broadcast(built, src=0)
        if not isinstance(built, dict):
            raise built or RuntimeError("rank 0 sent no masks")
        ramp.adopt(network, built, step, total)
        self._zeros = ramp.masked.count(network)
        if self.finished:
            ramp.masked.check_reached(self._zeros)

    def _release(self) -> None:
        if self._hooks:
            self._hooks.remove()
        self._hooks = None
        if self._made is not None:
            self._made.masked.forget()
