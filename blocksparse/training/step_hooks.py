"""Hooks right before and right after an optimizer changes weights, however Lightning gets there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class StepHooks:
    """Call functions around the steps of optimizers, once the gradients are final.

    The pre-hook of an optimizer alone comes too early: mostly the gradients are computed in a
    closure that its step runs. And Lightning's ``on_before_optimizer_step`` alone is too much: the
    scaler of float16 may skip the step after it, and nothing would undo what was done.

    Parameters
    ----------
    optimizers : iterable of Optimizer
        What to watch, until `remove`.
    before, after : callable
        Take the optimizer. No step goes without both, and nothing runs between ``before`` and the
        change of the weights but the clipping of gradients.
    """

    def __init__(
        self,
        optimizers: Iterable[Optimizer],
        before: Callable[[Optimizer], None],
        after: Callable[[Optimizer], None],
    ) -> None:
        self._before = before
        self._in_closure = False

        def pre_hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            # The arguments are those of the unbound method, the optimizer among them.
            self._in_closure = len(args) > 1 or kwargs.get("closure") is not None
            if not self._in_closure:
                before(optimizer)

        def post_hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._in_closure = False
            after(optimizer)

        self._handles: list[RemovableHandle] = []
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(pre_hook))
            self._handles.append(optimizer.register_step_post_hook(post_hook))

    def gradients_ready(self, optimizer: Optimizer) -> None:
        """Say that a closure is done; to be called from ``on_before_optimizer_step``."""
        if self._in_closure:
            self._before(optimizer)

    def remove(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
