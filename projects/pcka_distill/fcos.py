"""FCOS from a yaml: Detectron2 has the model, and builds it from a LazyConfig only."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from torch import Tensor, nn

from pcka_distill.errors import UserError
from pcka_distill.functional import widen

__all__ = ["FCOS", "widen_head"]


def _widened(
    head: nn.Module, inputs: Any, outputs: tuple[list[Tensor], ...]
) -> tuple[list[Tensor], ...]:
    return tuple([widen(x) for x in kind] for kind in outputs)


def widen_head(model: Any) -> None:
    """Let a Detectron2 FCOS compute its losses in fp32 under autocast; others are left alone.

    Its GIoU loss (fvcore's) writes fp32 values into tensors of the type of its predictions, which
    torch refuses in mixed precision.
    """
    try:
        from detectron2.modeling.meta_arch.fcos import FCOSHead
    except ImportError:
        return
    head: Any = getattr(model, "head", None)
    if type(head) is FCOSHead and _widened not in head._forward_hooks.values():
        head.register_forward_hook(_widened)


def FCOS(cfg: CfgNode) -> Any:
    """Detectron2's own FCOS (Tian et al., ICCV 2019), as ``MODEL.FCOS`` describes it."""
    # Not at the top: older versions of Detectron2 have none.
    try:
        import detectron2.modeling.meta_arch.fcos as stock
    except ImportError as e:
        raise UserError("this Detectron2 has no FCOS; install a newer one") from e

    node = cfg.MODEL.FCOS
    backbone = build_backbone(cfg)
    shapes = [backbone.output_shape()[f] for f in node.IN_FEATURES]
    head = stock.FCOSHead(
        input_shape=shapes,
        conv_dims=[shapes[0].channels] * node.NUM_CONVS,
        num_classes=node.NUM_CLASSES,
        norm=node.NORM,
        prior_prob=node.PRIOR_PROB,
    )
    model = stock.FCOS(
        backbone=backbone,
        head=head,
        head_in_features=list(node.IN_FEATURES),
        num_classes=node.NUM_CLASSES,
        center_sampling_radius=node.CENTER_SAMPLING_RADIUS,
        focal_loss_alpha=node.FOCAL_LOSS_ALPHA,
        focal_loss_gamma=node.FOCAL_LOSS_GAMMA,
        test_score_thresh=node.SCORE_THRESH_TEST,
        test_topk_candidates=node.TOPK_CANDIDATES_TEST,
        test_nms_thresh=node.NMS_THRESH_TEST,
        max_detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )
    widen_head(model)
    return model


# Other projects have an FCOS of their own: theirs stays.
if "FCOS" not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY.register(FCOS)
