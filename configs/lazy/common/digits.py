"""The digits task on a CPU, and what its students share, as configs/Digits/*.yaml have it."""

import torch
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler

from pcka_distill import PCKALoss

pixel_mean = [127.5, 127.5, 127.5]
pixel_std = [64.0, 64.0, 64.0]

# Four stages of one block each. Trained from scratch in minutes: without a norm nothing is learned.
backbone = L(FPN)(
    bottom_up=L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=16, norm="BN"),
        stages=[
            L(ResNet.make_stage)(
                block_class=BasicBlock,
                num_blocks=1,
                stride_per_block=[1 if i == 0 else 2],
                in_channels=16 * 2 ** max(0, i - 1),
                out_channels=16 * 2**i,
                norm="BN",
            )
            for i in range(4)
        ],
        out_features=["res3", "res4", "res5"],
        freeze_at=0,
    ),
    in_features=["res3", "res4", "res5"],
    out_channels=64,
    norm="GN",
)

losses = [
    # The maps are 12 x 12 to 3 x 3: small patches. The best of PCKA's forms here, see
    # benchmarks/comparison.md.
    L(PCKALoss)(levels=["p3", "p4", "p5"], patch_size=2, form="signed", weight=3.0),
]


def _mapper(is_train):
    side = [96] if is_train else 96
    return L(DatasetMapper)(
        is_train=is_train,
        # No flip: a mirrored digit is no digit.
        augmentations=[
            L(ResizeShortestEdge)(short_edge_length=side, max_size=1333, sample_style="choice")
        ],
        image_format="BGR",
        instance_mask_format="bitmask",
    )


def _test(name):
    return L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names=name, filter_empty=False),
        mapper=_mapper(False),
        num_workers=0,
    )


def _evaluator(name):
    return L(COCOEvaluator)(dataset_name=name, output_dir="${train.output_dir}/inference/" + name)


dataloader = {
    "train": L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="digits_train"),
        mapper=_mapper(True),
        total_batch_size=8,
        num_workers=0,
    ),
    "test": [_test("digits_val"), _test("digits_test")],
    "evaluator": [_evaluator("digits_val"), _evaluator("digits_test")],
}

optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0),
    lr=0.005,
    weight_decay=0.0001,
)

# Of 100 iterations, the warm-up: as a share, it follows train.max_iter.
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_factor=0.001,
    warmup_length=100 / 1200,
    warmup_method="linear",
)

train = {
    "output_dir": "???",
    "init_checkpoint": "",
    "max_iter": 1200,
    "amp": {"enabled": False},
    "ddp": {"broadcast_buffers": False},
    "checkpointer": {"period": 300},
    "eval_period": 0,
    "log_period": 20,
    "device": "cpu",
    "seed": 0,
}
