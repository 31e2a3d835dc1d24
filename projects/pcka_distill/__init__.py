"""Detection distillation by centered kernel alignment, for Detectron2.

Importing it registers the meta-architectures ``DistillationModel``, ``FCOS`` and
``ImageClassifier``, the distillation losses, backbones, PSPNet's head, and the datasets of digits,
CIFAR and ImageNet.
"""

from pcka_distill import _quiet  # noqa: F401  (before anything imports Detectron2)
from pcka_distill import backbones as _backbones  # noqa: F401  (registers them)
from pcka_distill import fcos as _fcos  # noqa: F401  (registers it)
from pcka_distill import psp as _psp  # noqa: F401  (registers it)
from pcka_distill.adapters import Adapter, find_adapter, register_adapter
from pcka_distill.build import (
    get_config_file,
    get_distill_cfg,
    load_teacher,
    register_config,
    student_config,
)
from pcka_distill.classifier import ImageClassifier
from pcka_distill.config import add_pcka_distill_config
from pcka_distill.data import register_classification, register_digits, register_image_folder
from pcka_distill.errors import UserError
from pcka_distill.losses import (
    DISTILL_LOSS_REGISTRY,
    ATLoss,
    CWDLoss,
    DistillLoss,
    DISTLoss,
    DKDLoss,
    FCKALoss,
    FeatureLoss,
    FGDLoss,
    KDLoss,
    LogitLoss,
    MGDLoss,
    MimicLoss,
    PCKALoss,
    PKDLoss,
    RCKALoss,
    ReviewKDLoss,
    SPLoss,
)
from pcka_distill.meta_arch import DistillationModel
from pcka_distill.structures import Taps
from pcka_distill.teacher import FrozenTeacher, load_teacher_weights

__version__ = "0.1.0"

__all__ = [
    "DISTILL_LOSS_REGISTRY",
    "ATLoss",
    "Adapter",
    "CWDLoss",
    "DISTLoss",
    "DKDLoss",
    "DistillLoss",
    "DistillationModel",
    "FCKALoss",
    "FGDLoss",
    "FeatureLoss",
    "FrozenTeacher",
    "ImageClassifier",
    "KDLoss",
    "LogitLoss",
    "MGDLoss",
    "MimicLoss",
    "PCKALoss",
    "PKDLoss",
    "RCKALoss",
    "ReviewKDLoss",
    "SPLoss",
    "Taps",
    "UserError",
    "add_pcka_distill_config",
    "find_adapter",
    "get_config_file",
    "get_distill_cfg",
    "load_teacher",
    "load_teacher_weights",
    "register_adapter",
    "register_classification",
    "register_config",
    "register_digits",
    "register_image_folder",
    "student_config",
]

register_digits()
register_classification()
