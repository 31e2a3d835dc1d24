"""A backbone small enough for the digits student."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet

__all__ = ["build_tiny_resnet_fpn_backbone"]


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
    return FPN(
        bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
