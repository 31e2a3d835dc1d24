"""configs/COCO-Detection/retinanet_R_101_to_R_50_pcka_2x.yaml as a LazyConfig."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from pcka_distill import DistillationModel, PCKALoss
from pcka_distill.build import load_teacher

from ..common.coco_2x import dataloader, lr_multiplier, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

student = model_zoo.get_config("common/models/retinanet.py").model
student.backbone.bottom_up.freeze_at = 2

model = L(DistillationModel)(
    student=student,
    # A name in Detectron2's model zoo brings its weights along.
    teacher=L(load_teacher)(config="COCO-Detection/retinanet_R_101_FPN_3x.yaml"),
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
train.output_dir = "output/coco/lazy/retinanet_R_101_to_R_50_pcka_2x"
