"""A network through `torch.compile`, for the steps of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException


class CompiledNetwork:
    """Runs a network through `torch.compile`; the network itself stays as it is.

    It is no `nn.Module`, so that whoever holds it has no parameters twice. It is compiled at the
    first call, which takes a minute, and again for images of another shape.

    Parameters
    ----------
    network : nn.Module
        Shares its weights and its mode with what is run.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = torch.compile(network, dynamic=False)

    def __call__(self, images: Tensor) -> Any:
        """Return what the network returns.

        Raises
        ------
        ValueError
            If it cannot be compiled here.
        """
        try:
            return self._network(images)
        except TorchDynamoException as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(
                f"compile_steps=true, but torch.compile fails here: {reason}. On a CPU it needs a "
                "C++ compiler, such as g++, and the headers of Python; compile_steps=false trains "
                "without it"
            ) from error
