"""Distillation losses. Importing this package registers them."""

from pcka_distill.losses.at import ATLoss
from pcka_distill.losses.base import DISTILL_LOSS_REGISTRY, DistillLoss, FeatureLoss, LogitLoss
from pcka_distill.losses.cwd import CWDLoss
from pcka_distill.losses.dist import DISTLoss
from pcka_distill.losses.dkd import DKDLoss
from pcka_distill.losses.fcka import FCKALoss
from pcka_distill.losses.fgd import FGDLoss
from pcka_distill.losses.kd import KDLoss
from pcka_distill.losses.mgd import MGDLoss
from pcka_distill.losses.mimic import MimicLoss
from pcka_distill.losses.pcka import PCKALoss
from pcka_distill.losses.pkd import PKDLoss
from pcka_distill.losses.rcka import RCKALoss
from pcka_distill.losses.reviewkd import ReviewKDLoss
from pcka_distill.losses.sp import SPLoss

__all__ = [
    "DISTILL_LOSS_REGISTRY",
    "ATLoss",
    "CWDLoss",
    "DISTLoss",
    "DKDLoss",
    "DistillLoss",
    "FCKALoss",
    "FGDLoss",
    "FeatureLoss",
    "KDLoss",
    "LogitLoss",
    "MGDLoss",
    "MimicLoss",
    "PCKALoss",
    "PKDLoss",
    "RCKALoss",
    "ReviewKDLoss",
    "SPLoss",
]
