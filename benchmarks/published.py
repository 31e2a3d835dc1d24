"""The published PCKA algorithm as it is written down: what the fast one is compared with.

Zhou et al., IJCAI 2024, and its published code: maps raised to multiples of 16, one pair of Gram
matrices a channel and relation, in a loop, and every inner product the trace of a matrix product.
Equal to that code's own numbers (tests/test_benchmarks.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _hsic(k: Tensor, l: Tensor) -> Tensor:
    return torch.trace(k @ l.mT)


def _cka(x: Tensor, y: Tensor) -> Tensor:
    k, l = x @ x.mT, y @ y.mT
    return _hsic(k, l) / (_hsic(k, k) * _hsic(l, l)).sqrt()


def published_pcka(
    student: Tensor,
    teacher: Tensor,
    *,
    patch_size: int = 16,
    intra_weight: float = 1.0,
    inter_weight: float = 1.0,
) -> Tensor:
    """-(intra_weight * intra CKA + inter_weight * inter CKA), mean over the channels.

    Args:
        student: (B, C, H, W).
        teacher: (B, C, H, W).
        patch_size: side of a patch; the sides of the maps are raised to its next multiple.
        intra_weight: of the relation between patches.
        inter_weight: of the relation between positions.
    """
    p = patch_size
    b, c = student.shape[:2]
    height, width = (-(-side // p) * p for side in student.shape[-2:])

    def patches(x: Tensor) -> Tensor:
        x = F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)
        cells = x.reshape(b, c, height // p, p, width // p, p).permute(1, 2, 4, 0, 3, 5)
        return cells.reshape(c, -1, b * p * p)

    loss = student.new_zeros(())
    for x, y in zip(patches(student), patches(teacher)):
        loss = loss - intra_weight * _cka(x, y) - inter_weight * _cka(x.mT, y.mT)
    return loss / c
