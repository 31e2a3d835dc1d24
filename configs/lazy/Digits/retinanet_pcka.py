"""configs/Digits/retinanet_pcka.yaml as a LazyConfig."""

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

student = model_zoo.get_config("common/models/retinanet.py").model
student.backbone = backbone
student.num_classes = 10
student.head_in_features = ["p3", "p4", "p5"]
student.head.input_shape = [ShapeSpec(channels=64)] * 3
student.head.conv_dims = [64]
student.head.norm = "GN"
student.head.num_anchors = 4
student.anchor_generator.sizes = [[14, 20], [26, 34], [42, 52]]
student.anchor_generator.aspect_ratios = [1.0, 1.6]
student.anchor_generator.strides = [8, 16, 32]
student.smooth_l1_beta = 0.1
student.test_score_thresh = 0.02
student.max_detections_per_image = 30
student.pixel_mean = pixel_mean
student.pixel_std = pixel_std

model = L(DistillationModel)(
    student=student,
    teacher=L(load_teacher)(
        config="configs/Digits/retinanet_teacher.yaml",
        weights="output/digits/retinanet_teacher/model_final.pth",
    ),
    losses=losses,
)

train.output_dir = "output/digits/lazy/retinanet_pcka"
