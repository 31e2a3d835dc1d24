"""COCO 2017 and the paper's 2x schedule, as configs/COCO-Detection/Base-2x.yaml has them.

24 epochs at 16 images (2 on each of 8 GPUs), steps after epochs 16 and 22, one scale. An epoch is
7,330 iterations.
"""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.mapper.use_instance_mask = False
dataloader.train.mapper.augmentations[0].short_edge_length = [800]
dataloader.test.mapper.augmentations[0].sample_style = "choice"
dataloader.evaluator.output_dir = "${train.output_dir}/inference/coco_2017_val"

# The yaml's has foreach=True: on a GPU torch's own choice, on a CPU the same numbers.
optimizer = model_zoo.get_config("common/optim.py").SGD

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.1**2], milestones=[117280, 161260], num_updates=175920
    ),
    warmup_length=500 / 175920,
    warmup_factor=0.001,
    warmup_method="linear",
)

train = model_zoo.get_config("common/train.py").train
train.max_iter = 175920
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
# As with the yaml: at the end alone, and of a seed that is drawn and kept with the run.
train.eval_period = 0
train.seed = -1
