"""configs/Digits/faster_rcnn_pcka.yaml as a LazyConfig."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from pcka_distill import DistillationModel
from pcka_distill.build import load_teacher

from ..common.digits import (
    backbone,
    dataloader,
    losses,
    lr_multiplier,
    optimizer,
    pixel_mean,
    pixel_std,
    train,
)

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

student = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
student.backbone = backbone
student.pixel_mean = pixel_mean
student.pixel_std = pixel_std

rpn = student.proposal_generator
rpn.in_features = ["p3", "p4", "p5"]
rpn.head.in_channels = 64
rpn.head.num_anchors = 2
rpn.anchor_generator.sizes = [[18], [30], [46]]
rpn.anchor_generator.aspect_ratios = [1.0, 1.6]
rpn.anchor_generator.strides = [8, 16, 32]
rpn.batch_size_per_image = 64
rpn.pre_nms_topk = (150, 100)
rpn.post_nms_topk = (100, 50)

heads = student.roi_heads
for key in ("mask_in_features", "mask_pooler", "mask_head"):
    del heads[key]
heads.num_classes = 10
heads.batch_size_per_image = 32
heads.box_in_features = ["p3", "p4", "p5"]
heads.box_pooler.output_size = 5
heads.box_pooler.scales = (1 / 8, 1 / 16, 1 / 32)
heads.box_pooler.sampling_ratio = 2
heads.box_head.input_shape = ShapeSpec(channels=64, height=5, width=5)
heads.box_head.fc_dims = [128]
heads.box_predictor.input_shape = ShapeSpec(channels=128)
heads.box_predictor.test_score_thresh = 0.02
heads.box_predictor.test_topk_per_image = 30

model = L(DistillationModel)(
    student=student,
    teacher=L(load_teacher)(
        config="configs/Digits/faster_rcnn_teacher.yaml",
        weights="output/digits/faster_rcnn_teacher/model_final.pth",
    ),
    losses=losses,
)

train.output_dir = "output/digits/lazy/faster_rcnn_pcka"
train.clip_gradients = {"enabled": True, "clip_type": "norm", "clip_value": 5.0}
