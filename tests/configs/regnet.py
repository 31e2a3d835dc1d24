"""A RegNetX of 200 MFLOPS under an FPN."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import FPN, RegNet
from detectron2.modeling.backbone.regnet import ResBottleneckBlock, SimpleStem

from .vitdet import dataloader, model

__all__ = ["dataloader", "model"]

model.backbone = L(FPN)(
    bottom_up=L(RegNet)(
        stem_class=SimpleStem,
        stem_width=16,
        block_class=ResBottleneckBlock,
        depth=13,
        w_a=36.44,
        w_0=24,
        w_m=2.49,
        group_width=8,
        norm="BN",
        out_features=["s2", "s3", "s4"],
    ),
    in_features=["s2", "s3", "s4"],
    out_channels=48,
)
