"""A Swin transformer of four one-block stages under an FPN."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import FPN, SwinTransformer

from .vitdet import dataloader, model

__all__ = ["dataloader", "model"]

model.backbone = L(FPN)(
    bottom_up=L(SwinTransformer)(
        patch_size=4,
        embed_dim=24,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        out_indices=[1, 2, 3],
    ),
    in_features=["p1", "p2", "p3"],
    out_channels=48,
)
