"""A ViTDet of 96 pixels: a plain ViT under a SimpleFeaturePyramid, padded to a square."""

from functools import partial

import torch
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import FCOS, SimpleFeaturePyramid, ViT
from detectron2.modeling.meta_arch.fcos import FCOSHead

model = L(FCOS)(
    backbone=L(SimpleFeaturePyramid)(
        net=L(ViT)(
            img_size=128,
            patch_size=16,
            embed_dim=32,
            depth=2,
            num_heads=2,
            drop_path_rate=0.0,
            window_size=4,
            mlp_ratio=2,
            qkv_bias=True,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            window_block_indexes=[0],
            residual_block_indexes=[],
            use_rel_pos=True,
            out_feature="last_feat",
        ),
        in_feature="${.net.out_feature}",
        out_channels=48,
        scale_factors=(2.0, 1.0, 0.5),
        norm="LN",
        square_pad=128,
    ),
    head=L(FCOSHead)(
        input_shape=[ShapeSpec(channels=48)] * 3, num_classes=10, conv_dims=[48], norm="LN"
    ),
    num_classes=10,
    pixel_mean=[127.5] * 3,
    pixel_std=[64.0] * 3,
)
dataloader = {
    "train": {"dataset": {"names": "digits_train"}, "mapper": {"image_format": "RGB"}},
}
