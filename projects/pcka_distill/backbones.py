"""Backbones that Detectron2 cannot build from a yaml."""

from __future__ import annotations

import re
from collections.abc import Mapping

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from detectron2.projects.deeplab.resnet import DeepLabStem
from torch import Tensor, nn

from pcka_distill.errors import UserError

__all__ = [
    "build_dilated_resnet_backbone",
    "build_fcos_resnet_fpn_backbone",
    "build_tiny_resnet_fpn_backbone",
    "from_torchvision",
]

_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


@BACKBONE_REGISTRY.register()
def build_tiny_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A ResNet of four one-block stages under an FPN, without extra levels.

    Reads ``MODEL.RESNETS.{STEM_OUT_CHANNELS, RES2_OUT_CHANNELS, NORM}`` and ``MODEL.FPN``; the
    channels double at every stage. Detectron2's own ResNet-18 insists on 64 in its first stage.
    """
    resnet = cfg.MODEL.RESNETS
    channels = resnet.STEM_OUT_CHANNELS
    stem = BasicStem(input_shape.channels, channels, norm=resnet.NORM)
    stages = []
    for i in range(4):
        out_channels = resnet.RES2_OUT_CHANNELS * 2**i
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                1,
                stride_per_block=[1 if i == 0 else 2],
                in_channels=channels,
                out_channels=out_channels,
                norm=resnet.NORM,
            )
        )
        channels = out_channels
    bottom_up = ResNet(
        stem, stages, out_features=resnet.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT
    )
    return _fpn(cfg, bottom_up)


@BACKBONE_REGISTRY.register()
def build_fcos_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A ResNet under an FPN whose p6 and p7 come from p5, as in Detectron2's FCOS."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    top_block = LastLevelP6P7(channels, channels, in_feature="p5")
    return _fpn(cfg, build_resnet_backbone(cfg, input_shape), top_block)


@BACKBONE_REGISTRY.register()
def build_dilated_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """A ResNet whose last stages are dilated instead of strided, of any depth, 18 and 34 too.

    Detectron2's own dilates those of bottleneck blocks alone. Tensors have the names that they have
    there, so that its checkpoints load. Reads ``MODEL.RESNETS``; ``RES4_DILATION`` 2 and
    ``RES5_DILATION`` 4 give an output stride of 8, as in PSPNet, 1 and 2 one of 16.

    Raises:
        UserError: a depth, a stem or dilations that are not known.
    """
    resnet = cfg.MODEL.RESNETS
    if resnet.DEPTH not in _BLOCKS:
        raise UserError(
            f"MODEL.RESNETS.DEPTH is {resnet.DEPTH}, expected {', '.join(map(str, _BLOCKS))}"
        )
    stems = {"basic": BasicStem, "deeplab": DeepLabStem}
    if resnet.STEM_TYPE not in stems:
        raise UserError(
            f"MODEL.RESNETS.STEM_TYPE is {resnet.STEM_TYPE!r}, expected {', '.join(stems)}"
        )
    dilations = (1, 1, resnet.RES4_DILATION, resnet.RES5_DILATION)
    if dilations[2:] not in ((1, 1), (1, 2), (2, 4)):
        raise UserError(
            "MODEL.RESNETS.RES4_DILATION and RES5_DILATION must be 1 and 1, 1 and 2, or 2 and 4; "
            f"got {resnet.RES4_DILATION} and {resnet.RES5_DILATION}"
        )
    channels, out_channels = resnet.STEM_OUT_CHANNELS, resnet.RES2_OUT_CHANNELS
    stem = stems[resnet.STEM_TYPE](input_shape.channels, channels, norm=resnet.NORM)
    bottleneck = resnet.NUM_GROUPS * resnet.WIDTH_PER_GROUP
    stages = []
    for i, (count, dilation) in enumerate(zip(_BLOCKS[resnet.DEPTH], dilations)):
        stride = 1 if i == 0 or dilation > 1 else 2
        common = {
            "num_blocks": count,
            "stride_per_block": [stride] + [1] * (count - 1),
            "in_channels": channels,
            "out_channels": out_channels,
            "norm": resnet.NORM,
        }
        if resnet.DEPTH < 50:
            blocks = ResNet.make_stage(BasicBlock, **common)
            for conv in (x for block in blocks for x in (block.conv1, block.conv2)):
                conv.dilation = conv.padding = (dilation, dilation)
        else:
            blocks = ResNet.make_stage(
                BottleneckBlock,
                bottleneck_channels=bottleneck,
                stride_in_1x1=resnet.STRIDE_IN_1X1,
                num_groups=resnet.NUM_GROUPS,
                dilation=dilation,
                **common,
            )
        channels, out_channels, bottleneck = out_channels, 2 * out_channels, 2 * bottleneck
        stages.append(blocks)
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    return ResNet(stem, stages, out_features=resnet.OUT_FEATURES, freeze_at=freeze_at)


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of torchvision's ResNet under Detectron2's names, without the classifier.

    Raises:
        UserError: it is that of another network.
    """
    found = {}
    for key, value in state.items():
        match = re.fullmatch(r"(?:layer(\d)\.(\d+)\.)?(conv\d|bn\d|downsample\.\d)\.(\w+)", key)
        if match is None:
            if key not in ("fc.weight", "fc.bias"):
                raise UserError(f"no tensor of torchvision's ResNets is called {key!r}")
            continue
        layer, block, part, name = match.groups()
        place = f"res{int(layer) + 1}.{block}" if layer else "stem"
        kind, number = part[:-1], part[-1]
        if kind == "downsample.":
            part = "shortcut" if number == "0" else "shortcut.norm"
        else:
            part = f"conv{number}" + (".norm" if kind == "bn" else "")
        if name != "num_batches_tracked":
            found[f"{place}.{part}.{name}"] = value
    if "stem.conv1.weight" not in found:
        raise UserError("that is no state of torchvision's ResNets")
    return found


def _fpn(cfg: CfgNode, bottom_up: ResNet, top_block: nn.Module | None = None) -> FPN:
    return FPN(
        bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
