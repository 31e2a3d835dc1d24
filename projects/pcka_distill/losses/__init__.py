"""Distillation losses. Importing this package registers them."""

from pcka_distill.losses.base import DISTILL_LOSS_REGISTRY, DistillLoss, FeatureLoss
from pcka_distill.losses.mimic import MimicLoss
from pcka_distill.losses.pcka import PCKALoss
from pcka_distill.losses.rcka import RCKALoss

__all__ = [
    "DISTILL_LOSS_REGISTRY",
    "DistillLoss",
    "FeatureLoss",
    "MimicLoss",
    "PCKALoss",
    "RCKALoss",
]
