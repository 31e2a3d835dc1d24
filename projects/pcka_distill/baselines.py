"""The losses of the field that PCKA is compared to, as pure functions of tensors.

Shape legend, as in :mod:`pcka_distill.functional`:

    B  images in the batch            N  rows of logits
    C  channels of a feature map      P  columns of logits: classes, maybe with the background
    H, W  height, width of a map      T  temperature

Each is its paper's formula; where a paper sums over what depends on the size of a map, and the
function takes the mean, it says so. All compute in fp32 when they are given half precision, and
nothing in, such as no rows, is a loss of 0 with a gradient of 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pcka_distill.functional import full_precision, unit_peak, widen

__all__ = [
    "at_loss",
    "cwd_loss",
    "dist_loss",
    "dkd_loss",
    "fgd_focal_loss",
    "hcl_loss",
    "kd_loss",
    "mimic_loss",
    "object_masks",
    "pkd_loss",
    "sp_loss",
]


def _maps(name: str, student: Tensor, teacher: Tensor, *, channels: bool) -> None:
    """Refuse what are not two maps of one shape, but for the channels if they may differ."""
    mine, theirs = (list(x.shape) for x in (student, teacher))
    if not channels:
        del mine[1:2], theirs[1:2]
    if student.dim() != 4 or mine != theirs:
        but = "" if channels else " but for their channels"
        raise ValueError(
            f"{name} takes two (B, C, H, W) maps of one shape{but}, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )


def _rows(name: str, student: Tensor, teacher: Tensor) -> None:
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"{name} takes two (N, P) sets of logits of one shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )


def _nothing(student: Tensor) -> Tensor:
    return widen(student).sum() * 0


def _normalize(x: Tensor, dim: int | tuple[int, ...], *, center: bool = False) -> Tensor:
    """Scale x to unit length along dimensions; what is constant (or zero) there becomes 0.

    So does its gradient: the square root and the quotient only ever see ones there.
    """
    info = torch.finfo(x.dtype)
    peak = x.detach().abs().amax(dim, keepdim=True)
    floor = torch.full_like(peak, info.tiny)
    if center:
        x = x - x.mean(dim, keepdim=True)
        # So small a rest is the rounding error of the mean.
        floor = torch.maximum(floor, 16 * info.eps * peak)
        peak = x.detach().abs().amax(dim, keepdim=True)
    varies = ~(peak <= floor)
    # Of unit peak, so that no square overflows or vanishes.
    x = x / torch.where(varies, peak, 1)
    length = torch.where(varies, x.square().sum(dim, keepdim=True), 1).sqrt()
    return torch.where(varies, x / length, 0)


def mimic_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error between two feature maps (FitNets, Romero et al., ICLR 2015, eq. 3).

    Args:
        student: (B, C, H, W), already projected to the teacher's channels.
        teacher: (B, C, H, W).

    Returns:
        a scalar.

    Raises:
        ValueError: shapes differ.

    >>> mimic_loss(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 3.0)).item()
    9.0
    """
    _maps("mimic_loss", student, teacher, channels=True)
    if student.numel() == 0:
        return _nothing(student)
    with full_precision(student.device):
        return F.mse_loss(widen(student), widen(teacher))


def at_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Attention transfer (Zagoruyko & Komodakis, ICLR 2017, eq. 2 with p = 2).

    .. math::
        \frac{1}{B} \sum_b \left\| \frac{Q_s}{\|Q_s\|} - \frac{Q_t}{\|Q_t\|} \right\|^2,
        \quad Q = \sum_c F_c^2

    The norm is squared, as in its code, which then takes the mean over cells as well.

    Args:
        student: (B, C, H, W).
        teacher: (B, C', H, W).

    Returns:
        a scalar, in [0, 2].

    Raises:
        ValueError: shapes differ in more than the channels.
    """
    _maps("at_loss", student, teacher, channels=False)
    if student.numel() == 0 or teacher.numel() == 0:
        return _nothing(student)
    with full_precision(student.device):
        x, y = (
            _normalize(unit_peak(widen(z)).square().sum(1).flatten(1), 1)
            for z in (student, teacher)
        )
        return (x - y).square().sum() / len(x)


def cwd_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Channel-wise distillation (Shu et al., ICCV 2021, eq. 4 and 5).

    .. math::
        \frac{T^2}{B C} \sum_{b,c} \mathrm{KL}(\phi(F_t) \,\|\, \phi(F_s)),
        \quad \phi(F)_i = \mathrm{softmax}_i(F_i / T) \text{ over the cells of a channel}

    Args:
        student: (B, C, H, W).
        teacher: (B, C, H, W).
        temperature: T.

    Returns:
        a scalar.

    Raises:
        ValueError: shapes differ.
    """
    _maps("cwd_loss", student, teacher, channels=True)
    if student.numel() == 0:
        return _nothing(student)
    with full_precision(student.device):
        x, y = (
            (widen(z).flatten(2) / temperature).log_softmax(-1).flatten(0, 1)
            for z in (student, teacher)
        )
        return temperature**2 * F.kl_div(x, y, reduction="batchmean", log_target=True)


def pkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Pearson correlation distillation (Cao et al., NeurIPS 2022, eq. 2 to 4).

    Each channel of both maps is standardised over the images and cells of the batch; half of the
    mean square between the two is 1 - r, the correlation of the channel:

    .. math:: \frac{1}{2 m} \sum \left( \hat F_s - \hat F_t \right)^2 = \frac{1}{C} \sum_c (1 - r_c)

    Args:
        student: (B, C, H, W).
        teacher: (B, C, H, W).

    Returns:
        a scalar, in [0, 2]; a channel that is constant on one side counts as 1/2, on both as 0.

    Raises:
        ValueError: shapes differ.
    """
    _maps("pkd_loss", student, teacher, channels=True)
    if student.numel() == 0:
        return _nothing(student)
    with full_precision(student.device):
        x, y = (_normalize(widen(z), (0, 2, 3), center=True) for z in (student, teacher))
        return (x - y).square().sum() / (2 * x.shape[1])


def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Similarity-preserving distillation (Tung & Mori, ICCV 2019, eq. 1 to 3).

    .. math::
        \frac{1}{B^2} \left\| \bar G_s - \bar G_t \right\|_F^2,
        \quad G = Q Q^\top,\ Q \in \mathbb{R}^{B \times C H W},
        \ \bar G \text{ with rows of unit length}

    Args:
        student: (B, C, H, W).
        teacher: (B, C', H, W).

    Returns:
        a scalar.

    Raises:
        ValueError: shapes differ in more than the channels.
    """
    _maps("sp_loss", student, teacher, channels=False)
    if student.numel() == 0 or teacher.numel() == 0:
        return _nothing(student)
    with full_precision(student.device):
        grams = []
        for z in (student, teacher):
            q = unit_peak(widen(z)).flatten(1)
            grams.append(_normalize(q @ q.mT, 1))
        return (grams[0] - grams[1]).square().sum() / len(student) ** 2


def hcl_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Hierarchical context loss of ReviewKD (Chen et al., CVPR 2021, section 3.4).

    Mean squared errors of the maps and of both averaged down to 4 x 4, 2 x 2 and 1 x 1 cells,
    with weights 1, 1/2, 1/4, 1/8, as a weighted mean. What is no coarser than the map is left out.

    Args:
        student: (B, C, H, W).
        teacher: (B, C, H, W).

    Returns:
        a scalar.

    Raises:
        ValueError: shapes differ.
    """
    _maps("hcl_loss", student, teacher, channels=True)
    if student.numel() == 0:
        return _nothing(student)
    with full_precision(student.device):
        x, y = widen(student), widen(teacher)
        loss, weight, total = F.mse_loss(x, y), 1.0, 1.0
        for side in (4, 2, 1):
            if side >= x.shape[2]:
                continue
            weight /= 2
            total += weight
            a, b = (F.adaptive_avg_pool2d(z, side) for z in (x, y))
            loss = loss + weight * F.mse_loss(a, b)
        return loss / total


def object_masks(
    boxes: Sequence[Tensor], size: tuple[float, float], maps: Tensor
) -> tuple[Tensor, Tensor]:
    """Where objects are on a map, and where none is (FGD, Yang et al., CVPR 2022, eq. 2 to 4).

    A box covers the cells that it touches. (The paper's code adds one at its end, and divides boxes
    by the size of the image before padding.)

    Args:
        boxes: per image (M, 4), x1, y1, x2, y2 in pixels of the network's input.
        size: (height, width) of what the map covers, in the same pixels.
        maps: (B, C, H, W).

    Returns:
        two (B, 1, H, W): the inverse of the cells of the smallest object that a cell is part of, 0
        outside; the inverse of the cells outside, 0 inside.
    """
    b, _, h, w = maps.shape
    foreground = maps.new_zeros(b, 1, h, w, dtype=torch.float32)
    rows, columns = (torch.arange(n, device=maps.device) for n in (h, w))
    scale = foreground.new_tensor([w / size[1], h / size[0]]).repeat(2)
    for i, image in enumerate(boxes):
        if not len(image):
            continue
        x1, y1, x2, y2 = (image.to(scale) * scale)[..., None].unbind(1)
        inside_y = (rows >= y1.floor()) & (rows < torch.maximum(y2.ceil(), y1.floor() + 1))
        inside_x = (columns >= x1.floor()) & (columns < torch.maximum(x2.ceil(), x1.floor() + 1))
        area = inside_y.sum(1).clamp(min=1) * inside_x.sum(1).clamp(min=1)
        inside = inside_y[:, :, None] & inside_x[:, None]
        foreground[i, 0] = (inside / area[:, None, None]).amax(0)
    background = (foreground == 0).float()
    return foreground, background / background.sum((1, 2, 3), keepdim=True).clamp(min=1)


def _attention(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Spatial (B, 1, H, W) and channel (B, C, 1, 1) attention, of mean 1 each."""
    magnitude = x.abs()
    cells = magnitude.mean(1, keepdim=True)
    channels = magnitude.mean((2, 3), keepdim=True)
    spatial = (cells.flatten(1) / temperature).softmax(1).view_as(cells) * cells[0].numel()
    channel = (channels / temperature).softmax(1) * channels.shape[1]
    return spatial, channel


def fgd_focal_loss(
    student: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    background: Tensor,
    *,
    alpha: float = 1e-3,
    beta: float = 5e-4,
    gamma: float = 1e-3,
    temperature: float = 0.5,
) -> Tensor:
    r"""Focal distillation of FGD (Yang et al., CVPR 2022, eq. 5 to 10).

    .. math::
        \sum (\alpha M_f + \beta M_b) A^S A^C (F_t - F_s)^2
            + \gamma \left( |A^S_t - A^S_s|_1 + |A^C_t - A^C_s|_1 \right)

    summed over an image and averaged over images; A^S and A^C are the teacher's attention to cells
    and to channels, a softmax of mean magnitudes.

    Args:
        student: (B, C, H, W).
        teacher: (B, C, H, W).
        foreground, background: see :func:`object_masks`.
        alpha, beta, gamma: weights of objects, background and attention.
        temperature: of the attention.

    Returns:
        a scalar.

    Raises:
        ValueError: shapes differ.
    """
    _maps("fgd_focal_loss", student, teacher, channels=True)
    if student.numel() == 0:
        return _nothing(student)
    with full_precision(student.device):
        x, y = widen(student), widen(teacher)
        mine, theirs = (_attention(z, temperature) for z in (x, y))
        mask = (alpha * foreground + beta * background) * theirs[0]
        loss = (mask * theirs[1] * (y - x).square()).sum()
        attention = (theirs[0] - mine[0]).abs().sum() + (theirs[1] - mine[1]).abs().sum()
        return (loss + gamma * attention) / len(x)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    sigmoid: bool = False,
) -> Tensor:
    r"""Knowledge distillation (Hinton et al., 2015).

    .. math:: \frac{T^2}{N} \sum_n \mathrm{KL}(p_t \,\|\, p_s), \quad p = \mathrm{softmax}(z / T)

    or, for heads that score classes one by one, the sum over classes of the divergence of two
    Bernoulli distributions with p = sigmoid(z / T), which is their binary cross-entropy up to a
    constant.

    Args:
        student_logits: (N, P).
        teacher_logits: (N, P).
        temperature: T.
        sigmoid: score classes one by one.

    Returns:
        a scalar.

    Raises:
        ValueError: shapes differ or are not (N, P).

    >>> kd_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 4.0]])).item()
    0.0
    """
    _rows("kd_loss", student_logits, teacher_logits)
    if student_logits.numel() == 0:
        return _nothing(student_logits)
    with full_precision(student_logits.device):
        x, y = (widen(z) / temperature for z in (student_logits, teacher_logits))
        if sigmoid:
            # The two outcomes of each class, on an axis of their own.
            x, y = (F.logsigmoid(torch.stack([z, -z], -1)) for z in (x, y))
        else:
            x, y = x.log_softmax(-1), y.log_softmax(-1)
        return temperature**2 * F.kl_div(x, y, reduction="batchmean", log_target=True)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    r"""Decoupled knowledge distillation (Zhao et al., CVPR 2022, eq. 7).

    .. math::
        \frac{T^2}{N} \sum_n \alpha \, \mathrm{KL}(b_t \,\|\, b_s)
            + \beta \, \mathrm{KL}(\hat p_t \,\|\, \hat p_s)

    b are the scores of the target class and of all others together, p^ those of the others among
    themselves. alpha = 1 and beta = 1 - the teacher's score of the target would be :func:`kd_loss`.

    Args:
        student_logits: (N, P).
        teacher_logits: (N, P).
        labels: (N,), the column of the target; rows with a negative one are left out.
        alpha: weight of the target class (TCKD).
        beta: weight of the others (NCKD).
        temperature: T.

    Returns:
        a scalar.

    Raises:
        ValueError: shapes differ or are not (N, P) and (N,).
    """
    _rows("dkd_loss", student_logits, teacher_logits)
    if labels.shape != student_logits.shape[:1]:
        raise ValueError(f"dkd_loss takes (N,) labels, got {tuple(labels.shape)}")
    known = labels >= 0
    student_logits, teacher_logits, labels = (
        z[known] for z in (student_logits, teacher_logits, labels)
    )
    n, p = student_logits.shape
    if n == 0 or p < 2:
        return _nothing(student_logits)
    with full_precision(student_logits.device):
        others = ~F.one_hot(labels, p).bool()
        binary, rest = [], []
        for z in (student_logits, teacher_logits):
            z = (widen(z) / temperature).log_softmax(-1)
            other = z[others].view(n, p - 1)
            sums = other.logsumexp(-1, keepdim=True)
            binary.append(torch.cat([z.gather(1, labels[:, None]), sums], 1))
            rest.append(other - sums)
        tckd, nckd = (
            F.kl_div(x, y, reduction="batchmean", log_target=True) for x, y in (binary, rest)
        )
        return temperature**2 * (alpha * tckd + beta * nckd)


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    temperature: float = 1.0,
    sigmoid: bool = False,
) -> Tensor:
    r"""Distillation from a stronger teacher, DIST (Huang et al., NeurIPS 2022, eq. 6 to 9).

    .. math::
        \frac{\beta T^2}{N} \sum_n \left( 1 - r(p_{s,n}, p_{t,n}) \right)
            + \frac{\gamma T^2}{P} \sum_k \left( 1 - r(p_{s,:k}, p_{t,:k}) \right)

    with r the correlation of the scores of a sample over the classes ("inter-class"), and of those
    of a class over the samples ("intra-class").

    Args:
        student_logits: (N, P).
        teacher_logits: (N, P).
        inter_weight: beta.
        intra_weight: gamma.
        temperature: T.
        sigmoid: score by a sigmoid instead of a softmax.

    Returns:
        a scalar; scores that do not vary on one side count as uncorrelated.

    Raises:
        ValueError: shapes differ or are not (N, P).
    """
    _rows("dist_loss", student_logits, teacher_logits)
    if student_logits.numel() == 0:
        return _nothing(student_logits)
    with full_precision(student_logits.device):
        x, y = (widen(z) / temperature for z in (student_logits, teacher_logits))
        x, y = (z.sigmoid() if sigmoid else z.softmax(-1) for z in (x, y))
        loss = x.new_zeros(())
        for weight, dim in ((inter_weight, 1), (intra_weight, 0)):
            r = (_normalize(x, dim, center=True) * _normalize(y, dim, center=True)).sum(dim)
            loss = loss + weight * (1 - r).mean()
        return temperature**2 * loss
