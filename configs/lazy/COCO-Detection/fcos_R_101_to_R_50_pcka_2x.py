"""configs/COCO-Detection/fcos_R_101_to_R_50_pcka_2x.yaml as a LazyConfig."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from pcka_distill import DistillationModel, PCKALoss
from pcka_distill.build import load_teacher

from ..common.coco_2x import dataloader, lr_multiplier, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

student = model_zoo.get_config("common/models/fcos.py").model
student.backbone.bottom_up.freeze_at = 2
# The yaml's builder makes p6 and p7 before the ResNet: so here, for the same random numbers.
student.backbone = {"top_block": student.backbone.pop("top_block"), **student.backbone}

teacher = model_zoo.get_config("common/models/fcos.py").model
teacher.backbone.bottom_up.stages.depth = 101

model = L(DistillationModel)(
    student=student,
    # The model zoo has none. It is trained from configs/COCO-Detection/fcos_R_101_FPN_2x.yaml.
    teacher=L(load_teacher)(
        config={"model": teacher},
        weights="output/coco/fcos_R_101_FPN_2x/model_final.pth",
    ),
    losses=[
        L(PCKALoss)(
            levels=["p3", "p4", "p5", "p6"],
            # p6 of an 800 px image has 13 x 13 cells: patches of 16 leave one, with nothing to
            # relate.
            patch_size=[16, 16, 16, 8],
            intra_weight=10.0,
        )
    ],
)

optimizer.lr = 0.01
train.output_dir = "output/coco/lazy/fcos_R_101_to_R_50_pcka_2x"
