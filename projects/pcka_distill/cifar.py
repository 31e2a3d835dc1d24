"""The networks that distillation of CIFAR classifiers is reported on, for images of 32 x 32.

Their sizes are those of the field's common setting (Tian et al., "Contrastive Representation
Distillation", ICLR 2020): ResNets of widths 16, 32, 64 (He et al., CVPR 2016) or four times and
twice that (``x4``), wide ResNets (Zagoruyko and Komodakis, BMVC 2016), VGG with batch norm and one
linear layer, ShuffleNetV1 of three groups (Zhang et al., CVPR 2018) and MobileNetV2 of half width
(Sandler et al., CVPR 2018). No library that this project builds on has them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CIFAR_NETS"]


def _conv(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        channels, out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
    )


def _conv_norm(*args: int, **kwargs: int) -> nn.Sequential:
    conv = _conv(*args, **kwargs)
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))


class _Classifier(nn.Module):
    """Stages of one resolution each, a mean over what is left, a linear layer."""

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Module], width: int, classes: int):
        super().__init__()
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(width, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, K)."""
        logits: Tensor = self.fc(self.stages(self.stem(x)).mean((-2, -1)))
        return logits


class _Basic(nn.Module):
    """A residual block of two 3x3 convolutions."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv_norm(channels, out, 3, stride)
        self.conv2 = _conv_norm(out, out, 3)
        same = channels == out and stride == 1
        self.shortcut = nn.Identity() if same else _conv_norm(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class _PreActivation(nn.Module):
    """The same with norms and activations first, as wide ResNets have it."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), _conv(channels, out, 3, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(out), _conv(out, out, 3)
        same = channels == out and stride == 1
        self.shortcut = None if same else _conv(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        left = x if self.shortcut is None else self.shortcut(y)
        return left + self.conv2(F.relu(self.norm2(self.conv1(y))))


def _stages(
    block: Callable[[int, int, int], nn.Module], widths: Sequence[int], count: int, channels: int
) -> list[nn.Sequential]:
    """Stages of so many blocks; each but the first halves the resolution."""
    stages = []
    for i, width in enumerate(widths):
        blocks = []
        for j in range(count):
            blocks.append(block(channels, width, 2 if i and not j else 1))
            channels = width
        stages.append(nn.Sequential(*blocks))
    return stages


def _resnet(depth: int, stem: int, widths: Sequence[int], classes: int) -> nn.Module:
    first = nn.Sequential(_conv_norm(3, stem, 3), nn.ReLU())
    stages = _stages(_Basic, widths, (depth - 2) // 6, stem)
    return _Classifier(first, stages, widths[-1], classes)


def _wide_resnet(depth: int, factor: int, classes: int) -> nn.Module:
    widths = [16 * factor * 2**i for i in range(3)]
    stages = _stages(_PreActivation, widths, (depth - 4) // 6, 16)
    stages[-1].append(nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU()))
    return _Classifier(_conv(3, 16, 3), stages, widths[-1], classes)


def _vgg(convolutions: int, classes: int) -> nn.Module:
    """Five stages of so many convolutions; the last two share a resolution."""
    channels, stages = 3, []
    for i, width in enumerate((64, 128, 256, 512, 512)):
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if 0 < i < 4 else []
        for _ in range(convolutions):
            layers += [
                nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            ]  # fmt: skip
            channels = width
        stages.append(nn.Sequential(*layers))
    return _Classifier(nn.Identity(), stages, 512, classes)


class _Shuffle(nn.Module):
    """Grouped 1x1, channels shuffled, depthwise 3x3, grouped 1x1; added, or beside a mean."""

    def __init__(self, channels: int, out: int, stride: int, groups: int) -> None:
        super().__init__()
        self.stride = stride
        # The stem's 24 channels are too few to be grouped.
        self.groups = 1 if channels == 24 else groups
        own = out - channels if stride == 2 else out
        middle = own // 4
        self.conv1 = _conv_norm(channels, middle, 1, groups=self.groups)
        self.conv2 = _conv_norm(middle, middle, 3, stride, groups=middle)
        self.conv3 = _conv_norm(middle, own, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        y = F.channel_shuffle(F.relu(self.conv1(x)), self.groups)
        y = self.conv3(F.relu(self.conv2(y)))
        if self.stride == 1:
            return F.relu(x + y)
        return F.relu(torch.cat([y, F.avg_pool2d(x, 3, stride=2, padding=1)], 1))


def _shufflenet(classes: int) -> nn.Module:
    channels, stages = 24, []
    for width, count in ((240, 4), (480, 8), (960, 4)):
        blocks = []
        for i in range(count):
            blocks.append(_Shuffle(channels, width, 1 if i else 2, 3))
            channels = width
        stages.append(nn.Sequential(*blocks))
    stem = nn.Sequential(_conv_norm(3, 24, 1), nn.ReLU())
    return _Classifier(stem, stages, channels, classes)


class _Inverted(nn.Module):
    """1x1 up, depthwise 3x3, 1x1 down without an activation."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = channels * expansion
        self.same = channels == out and stride == 1
        self.body = nn.Sequential(
            _conv_norm(channels, middle, 1), nn.ReLU(),
            _conv_norm(middle, middle, 3, stride, groups=middle), nn.ReLU(),
            _conv_norm(middle, out, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.same else y


def _mobilenet(factor: float, classes: int) -> nn.Module:
    # Expansion, channels, blocks, stride; the stem has the first of the strides.
    plan = (
        (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
        (6, 320, 1, 1),
    )  # fmt: skip
    channels = int(32 * factor)
    stem = nn.Sequential(_conv_norm(3, channels, 3, 2), nn.ReLU())
    stages = []
    for expansion, width, count, stride in plan:
        width = int(width * factor)
        blocks = []
        for i in range(count):
            blocks.append(_Inverted(channels, width, 1 if i else stride, expansion))
            channels = width
        stages.append(nn.Sequential(*blocks))
    stages.append(nn.Sequential(_conv_norm(channels, 1280, 1), nn.ReLU()))
    return _Classifier(stem, stages, 1280, classes)


#: name -> constructor, of the number of classes
CIFAR_NETS: dict[str, Callable[[int], nn.Module]] = {
    **{
        f"resnet{depth}": functools.partial(_resnet, depth, 16, (16, 32, 64))
        for depth in (8, 14, 20, 32, 44, 56, 110)
    },
    **{
        f"resnet{depth}x4": functools.partial(_resnet, depth, 32, (64, 128, 256))
        for depth in (8, 32)
    },
    **{
        f"wrn_{depth}_{factor}": functools.partial(_wide_resnet, depth, factor)
        for depth, factor in ((16, 1), (16, 2), (40, 1), (40, 2))
    },
    "vgg8": functools.partial(_vgg, 1),
    "vgg13": functools.partial(_vgg, 2),
    "shufflenet_v1": _shufflenet,
    "mobilenet_v2": functools.partial(_mobilenet, 0.5),
}
