"""The residual networks for small images of He et al. (CVPR 2016), section 4.2.

Three stages of `depth` blocks: 6 * depth + 2 layers. A shortcut that changes the shape is option
A of the paper: every second pixel, and zeros for the new channels, so they have no parameters.
"""

# N batch, C channels, H W image height and width.

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = channels - in_channels
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C_in, H, W] to [N, C, H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            before = self.new_channels // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(y + x)


class ResNetCifar(nn.Module):
    """A residual network for images of a few dozen pixels.

    Parameters
    ----------
    depth : int
        Blocks per stage: 1 makes ResNet-8, 3 ResNet-20, 9 ResNet-56, 18 ResNet-110.
    num_classes : int
        Number of logits.
    in_channels : int
        Channels of the images.
    widths : three ints
        Channels of the stages, not falling. The paper's are 16, 32, 64.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_channels: int = 3,
        widths: Sequence[int] = (16, 32, 64),
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth is {depth}: a stage needs at least one block")
        if len(widths) != 3 or min(widths) < 1 or sorted(widths) != list(widths):
            raise ValueError(
                f"widths is {list(widths)}: give the channels of three stages, none below the one "
                "before (the shortcut "
                "adds channels, it takes none away)"
            )
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[0], depth, stride=1)
        self.layer2 = _stage(widths[0], widths[1], depth, stride=2)
        self.layer3 = _stage(widths[1], widths[2], depth, stride=2)
        self.linear = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, C, H, W] to logits [N, num_classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _stage(in_channels: int, channels: int, depth: int, stride: int) -> nn.Sequential:
    blocks = [BasicBlock(in_channels, channels, stride)]
    blocks += [BasicBlock(channels, channels, 1) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)
