"""Backbones that Detectron2 cannot build from a yaml."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet
from torch import nn

__all__ = ["build_fcos_resnet_fpn_backbone", "build_tiny_resnet_fpn_backbone"]


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


def _fpn(cfg: CfgNode, bottom_up: ResNet, top_block: nn.Module | None = None) -> FPN:
    return FPN(
        bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
