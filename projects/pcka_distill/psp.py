"""PSPNet's head for Detectron2's SemanticSegmentor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from detectron2.utils import comm
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pcka_distill.errors import UserError

__all__ = ["PSPHead"]


def _conv(channels: int, out: int, kernel: int, norm: str) -> Conv2d:
    conv = Conv2d(
        channels, out, kernel, padding=kernel // 2, bias=not norm, norm=get_norm(norm, out),
        activation=F.relu,
    )  # fmt: skip
    c2_msra_fill(conv)
    return conv


@SEM_SEG_HEADS_REGISTRY.register()
class PSPHead(nn.Module):
    """Pyramid pooling (Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017).

    One feature map is averaged over grids of a few sizes; the averages, brought to a fraction of
    its channels and back to its size, are put beside it, and a 3x3 convolution makes of all what
    the predictor scores. An auxiliary head on an earlier map helps to train it.

    Args:
        input_shape: level -> channels and stride of the backbone's maps.
        in_feature: the level that is pooled.
        num_classes: of the predictor.
        conv_dims: channels before it.
        norm: of all convolutions; pooled to a single cell, BN needs two images in each process.
        pool_sizes: sides of the grids.
        dropout: probability, before the predictors.
        aux_feature: level of the auxiliary head, empty for none.
        aux_weight: of its loss.
        loss_weight: of both losses.
        ignore_value: label of pixels that are not trained on.

    Raises:
        UserError: a level that the backbone lacks.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        in_feature: str,
        num_classes: int,
        conv_dims: int = 512,
        norm: str = "SyncBN",
        pool_sizes: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        aux_feature: str = "",
        aux_weight: float = 0.4,
        loss_weight: float = 1.0,
        ignore_value: int = 255,
    ) -> None:
        super().__init__()
        for name in filter(None, (in_feature, aux_feature)):
            if name not in input_shape:
                raise UserError(
                    f"PSPHead reads {name!r} and the backbone gives {', '.join(input_shape)}; "
                    "change MODEL.SEM_SEG_HEAD.IN_FEATURES, MODEL.PSP_HEAD.AUX_FEATURE or "
                    "MODEL.RESNETS.OUT_FEATURES"
                )
        self.in_features = [in_feature]
        self.ignore_value = ignore_value
        self.common_stride = input_shape[in_feature].stride
        self.loss_weight = loss_weight
        self.pool_sizes = tuple(pool_sizes)
        channels = input_shape[in_feature].channels
        assert channels is not None
        branch = channels // len(self.pool_sizes)
        self.branches = nn.ModuleList(_conv(channels, branch, 1, norm) for _ in self.pool_sizes)
        whole = channels + branch * len(self.pool_sizes)
        self.bottleneck = _conv(whole, conv_dims, 3, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.predictor = Conv2d(conv_dims, num_classes, kernel_size=1)
        self.aux: nn.Module | None = None
        self.aux_feature, self.aux_weight = aux_feature, aux_weight
        if aux_feature:
            self.aux_stride = input_shape[aux_feature].stride
            theirs = input_shape[aux_feature].channels
            assert theirs is not None
            self.aux = nn.Sequential(
                _conv(theirs, theirs // 4, 3, norm),
                nn.Dropout2d(dropout),
                Conv2d(theirs // 4, num_classes, kernel_size=1),
            )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        head, psp = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.PSP_HEAD
        if len(head.IN_FEATURES) != 1:
            raise UserError(
                f"PSPHead reads one level, and MODEL.SEM_SEG_HEAD.IN_FEATURES has "
                f"{', '.join(head.IN_FEATURES)}; set it to [res5]"
            )
        return {
            "input_shape": input_shape,
            "in_feature": head.IN_FEATURES[0],
            "num_classes": head.NUM_CLASSES,
            "conv_dims": head.CONVS_DIM,
            "norm": head.NORM,
            "pool_sizes": psp.POOL_SIZES,
            "dropout": psp.DROPOUT,
            "aux_feature": psp.AUX_FEATURE,
            "aux_weight": psp.AUX_WEIGHT,
            "loss_weight": head.LOSS_WEIGHT,
            "ignore_value": head.IGNORE_VALUE,
        }

    def forward(
        self, features: dict[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Detectron2's contract of such heads.

        Args:
            features: level -> (B, C, H, W).
            targets: (B, height, width) labels, in training.

        Returns:
            in training None and the losses, otherwise logits (B, K, height, width) and {}.
        """
        x = self.layers(features)
        if not self.training:
            return self._enlarge(x, self.common_stride), {}
        assert targets is not None
        losses = {"loss_sem_seg": self.loss_weight * self._loss(x, targets, self.common_stride)}
        if self.aux is not None:
            aux = self._loss(self.aux(features[self.aux_feature]), targets, self.aux_stride)
            losses["loss_sem_seg_aux"] = self.loss_weight * self.aux_weight * aux
        return None, losses

    def layers(self, features: dict[str, Tensor]) -> Tensor:
        """Logits (B, K, H, W) on the grid of the level that is read."""
        x = features[self.in_features[0]]
        norm = getattr(self.branches[0], "norm", None)
        together = comm.get_world_size() if isinstance(norm, nn.SyncBatchNorm) else 1
        if self.training and x.shape[0] * together == 1 and isinstance(norm, _BatchNorm):
            raise UserError(
                "PSPHead normalises what is pooled over a whole image, and a batch has only one: "
                "set MODEL.SEM_SEG_HEAD.NORM GN, or raise SOLVER.IMS_PER_BATCH"
            )
        pooled = [
            F.interpolate(
                branch(F.adaptive_avg_pool2d(x, size)),
                size=x.shape[-2:], mode="bilinear", align_corners=False,
            )
            for size, branch in zip(self.pool_sizes, self.branches)
        ]  # fmt: skip
        logits: Tensor = self.predictor(self.dropout(self.bottleneck(torch.cat([x, *pooled], 1))))
        return logits

    @staticmethod
    def _enlarge(x: Tensor, factor: int) -> Tensor:
        return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)

    def _loss(self, logits: Tensor, targets: Tensor, stride: int) -> Tensor:
        height, width = targets.shape[-2:]
        # As in inference: by the stride, and cut where the last cells reach over the image.
        logits = self._enlarge(logits.float(), stride)[..., :height, :width]
        total = F.cross_entropy(logits, targets, ignore_index=self.ignore_value, reduction="sum")
        # A crop of nothing but ignored pixels has a loss of 0, not of 0 / 0.
        return total / (targets != self.ignore_value).sum().clamp(min=1)
