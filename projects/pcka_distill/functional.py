"""CKA, PCKA and RCKA as pure functions of tensors.

Shape legend:

    B  images in the batch            N     samples that are related to one another
    C  channels of a feature map      P, Q  features of a sample (student, teacher)
    H, W  height, width of a map      p     side of a square patch
    U, V  patches down, across        G     independent CKAs computed at once

Sources: Zhou et al., "Rethinking Centered Kernel Alignment in Knowledge Distillation",
IJCAI 2024 (RCKA, PCKA); Kornblith et al., "Similarity of Neural Network Representations
Revisited", ICML 2019 (linear CKA); Song et al., "Feature Selection via Dependence
Maximization", JMLR 2012 (the unbiased HSIC estimator).

All of them compute in fp32 when they are given half-precision tensors, with autocast off:
Gram matrices of fp16 features overflow. fp64 stays fp64.

A CKA is *undefined* where one side does not vary (a dead channel, a constant map, a single
sample): its denominator is zero. So is a debiased one of fewer than four samples.
:func:`linear_cka` returns 0 for the first and refuses the second. In the losses a group whose
teacher does not vary, or that has too few samples, has nothing to teach and adds 0; a group in
which only the student does not vary has CKA 0 and adds its full weight. The gradient is zero
in all of these cases, never NaN.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pcka_distill import kernels
from pcka_distill.fused import (
    FORMS,
    BandedResize,
    FusedCKA,
    Resize,
    cut,
    dissimilarity,
)

__all__ = [
    "CHANNEL_FREE_LAYOUTS",
    "CHANNEL_LAYOUTS",
    "CHANNEL_WEIGHTS",
    "FILLS",
    "FORMS",
    "LAYOUTS",
    "fcka_loss",
    "full_precision",
    "linear_cka",
    "own_cells",
    "patch_counts",
    "pcka_loss",
    "pool_places",
    "rcka_loss",
    "to_patches",
    "widen",
    "without_padding",
]

# name -> (permutation of (B, C, U, p, V, p), the number of leading axes that index G, samples N)
_PERMUTATIONS: dict[str, tuple[tuple[int, ...], int, int]] = {
    "spatial": ((1, 2, 4, 0, 3, 5), 1, 2),  # C | U V | B p p
    "sample": ((1, 0, 2, 4, 3, 5), 1, 3),  # C | B U V | p p
    "per_image": ((0, 2, 4, 1, 3, 5), 1, 2),  # B | U V | C p p
    "per_position": ((3, 5, 2, 4, 0, 1), 2, 2),  # p p | U V | B C
    "batch": ((0, 2, 4, 1, 3, 5), 0, 3),  # | B U V | C p p
}
LAYOUTS = tuple(_PERMUTATIONS)
#: layouts in which every channel is a CKA, that may be weighted
CHANNEL_LAYOUTS = ("spatial", "sample")
CHANNEL_WEIGHTS = ("equal", "variance")
#: layouts in which channels are but features of a sample, so that their number may differ
CHANNEL_FREE_LAYOUTS = ("per_image", "batch")
#: what :func:`without_padding` can put in the place of padding
FILLS = ("zero", "image", "batch")

# Bytes that are worked in at a time. On a CPU a core's share of its caches, but no more than the
# student's features take; if those are small, what makes a step worth it. On a GPU, where each step
# costs the time of its launches, as much as the features of both sides take, or at least this.
_CACHE = 9 << 20
_LEAST = 3 << 20
_DEVICE_BUDGET = 64 << 20


def in_caches(device: torch.device) -> bool:
    """Whether work is cut into pieces for a core's caches; a GPU wants few launches instead."""
    return device.type == "cpu"


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Autocast off."""
    with torch.autocast(device_type=device.type, enabled=False):
        yield


def widen(x: Tensor) -> Tensor:
    """In at least fp32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unit_peak(x: Tensor) -> Tensor:
    """X of a scale at which squares neither overflow nor vanish, for what does not depend on it."""
    return x / x.detach().abs().amax().clamp(min=torch.finfo(x.dtype).tiny)


def _standardize(x: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """Centre x (..., N, P) over its samples and scale it to unit maximum.

    CKA does not depend on the scale, so the scale carries no gradient. What is left after
    centring counts as variation only above the rounding error of the mean.

    Returns:
        the standardised x, and a mask (...,) that is False where nothing varies.
    """
    info = torch.finfo(x.dtype)
    peak = torch.linalg.vector_norm(x.detach(), ord=float("inf"), dim=(-2, -1))
    floor = torch.full_like(peak, info.tiny)
    if center:
        x = x - x.mean(-2, keepdim=True)
        floor = torch.maximum(floor, 16 * info.eps * peak)
        peak = torch.linalg.vector_norm(x.detach(), ord=float("inf"), dim=(-2, -1))
    # NaN must stay visible (it compares False both ways), so test for "does not vary".
    varies = ~(peak <= floor)
    scale = torch.where(varies, peak, torch.ones_like(peak)).reciprocal()
    return x * torch.where(varies, scale, torch.zeros_like(scale))[..., None, None], varies


def _square_sum(x: Tensor) -> Tensor:
    return x.square().sum((-2, -1))


def _gram_products(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """<K, L>, <K, K>, <L, L> of the Grams K = X X^T, L = Y Y^T of x (..., N, P), y (..., N, Q).

    <X X^T, Y Y^T> = ||X^T Y||^2, so each of the three is made on its smaller side: nothing
    larger than N x N is built, nor anything larger than P x Q, P x P or Q x Q.
    """
    n, p, q = x.shape[-2], x.shape[-1], y.shape[-1]
    small = n * n <= p * q
    k = x @ x.mT if small or n <= p else None
    l = y @ y.mT if small or n <= q else None
    kl = (k * l).sum((-2, -1)) if k is not None and l is not None else _square_sum(x.mT @ y)
    return kl, _square_sum(x.mT @ x if k is None else k), _square_sum(y.mT @ y if l is None else l)


def _debias(kl: Tensor, kk: Tensor, ll: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Turn Gram products into the unbiased estimator HSIC_1 (Song et al. 2012, eq. 5).

    The estimator zeroes the diagonals of K and L; only the diagonals and the row sums are
    needed for that, never an N x N matrix. Its factor 1 / (N (N - 3)) cancels in a CKA and is
    left out.
    """
    n = x.shape[-2]

    def diagonal_and_row_sums(z: Tensor) -> tuple[Tensor, Tensor]:
        diagonal = z.square().sum(-1)
        return diagonal, (z @ z.sum(-2, keepdim=True).mT).squeeze(-1) - diagonal

    def hsic(dot: Tensor, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
        trace = dot - (a[0] * b[0]).sum(-1)
        sums = a[1].sum(-1) * b[1].sum(-1) / ((n - 1) * (n - 2))
        return trace + sums - 2 / (n - 2) * (a[1] * b[1]).sum(-1)

    a, b = diagonal_and_row_sums(x), diagonal_and_row_sums(y)
    return hsic(kl, a, b), hsic(kk, a, a), hsic(ll, b, b)


def _cka(x: Tensor, y: Tensor, center: bool, debiased: bool) -> tuple[Tensor, Tensor]:
    """CKA of x (..., N, P) and y (..., N, Q), and where y varies; both (...,)."""
    if x.numel() == 0 or y.numel() == 0 or (debiased and x.shape[-2] < 4):
        zero = (x.sum((-2, -1)) + y.sum((-2, -1))) * 0
        return zero, torch.zeros_like(zero, dtype=torch.bool)
    # HSIC_1 does not change when X is centred, but fp32 is more accurate on centred data.
    x, x_varies = _standardize(x, center or debiased)
    y, y_varies = _standardize(y, center or debiased)
    kl, kk, ll = _gram_products(x, y)
    if debiased:
        eps = 16 * torch.finfo(x.dtype).eps
        k_floor, l_floor = eps * kk.detach(), eps * ll.detach()
        kl, kk, ll = _debias(kl, kk, ll, x, y)
        x_varies, y_varies = x_varies & ~(kk <= k_floor), y_varies & ~(ll <= l_floor)
    varies = x_varies & y_varies
    # sqrt and division only ever see ones where the CKA is undefined: 0/0 has a NaN gradient
    # even under a mask.
    kk = torch.where(varies, kk, torch.ones_like(kk))
    ll = torch.where(varies, ll, torch.ones_like(ll))
    return torch.where(varies, kl / (kk.sqrt() * ll.sqrt()), torch.zeros_like(kl)), y_varies


def _similarity(x: Tensor, y: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """<X, Y> / (|X| |Y|) of x and y (..., N, P), and where y varies; both (...,)."""
    x, x_varies = _standardize(x, center)
    y, y_varies = _standardize(y, center)
    varies = x_varies & y_varies
    squares = _square_sum(x) * _square_sum(y)
    similarity = (x * y).sum((-2, -1)) / torch.where(varies, squares, 1).sqrt()
    return torch.where(varies, similarity, torch.zeros_like(similarity)), y_varies


def linear_cka(x: Tensor, y: Tensor, *, center: bool = True, debiased: bool = False) -> Tensor:
    r"""Centered kernel alignment with linear kernels.

    .. math::
        \mathrm{CKA}(X, Y) = \frac{\|Y^\top X\|_F^2}{\|X^\top X\|_F \, \|Y^\top Y\|_F}

    for X and Y whose columns have mean zero (paper, Theorem 1; Kornblith et al., eq. 3).

    Args:
        x: (..., N, P), N samples of P features.
        y: (..., N, Q), the same samples in another representation.
        center: subtract each feature's mean over the samples. ``False`` is the form of the
            paper's published code.
        debiased: use the unbiased HSIC estimator. The plain one tends to 1 for independent
            X and Y when P is much larger than N. Needs N > 3, and is centred by construction.

    Returns:
        (...,), in [0, 1] (the debiased form can be negative); 0 where it is undefined.

    Raises:
        ValueError: the two differ in their leading axes or in N, or debiased with N < 4.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> round(linear_cka(x, 3 * x.flip(1)).item(), 6)
    1.0
    """
    if x.dim() < 2 or y.dim() < 2 or x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"linear_cka takes (..., N, P) and (..., N, Q), got {tuple(x.shape)} and "
            f"{tuple(y.shape)}"
        )
    if debiased and x.shape[-2] < 4:
        raise ValueError(f"debiased CKA needs at least 4 samples, got {x.shape[-2]}")
    with full_precision(x.device):
        return _cka(widen(x), widen(y), center, debiased)[0]


def pool_places(x: Tensor, grid: int = 4) -> Tensor:
    """What feature maps say of places in their images, as samples for :func:`linear_cka`.

    Args:
        x: (B, C, H, W).
        grid: places across, and down, that share no cell; maps of any size then have the same
            samples. At most H and W: a cell that is counted twice would be alike to itself.

    Returns:
        (B * grid * grid, C), in at least fp32.
    """
    if not 0 < grid <= min(x.shape[-2:]):
        raise ValueError(f"a grid of {grid} on maps of {tuple(x.shape[-2:])}")
    x = widen(x)
    for axis in (-2, -1):
        edges = [i * x.shape[axis] // grid for i in range(grid + 1)]
        parts = (x.narrow(axis, a, b - a).mean(axis) for a, b in itertools.pairwise(edges))
        x = torch.stack(tuple(parts), axis)
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _dissimilarity(
    x: Tensor,
    y: Tensor,
    center: bool,
    debiased: bool = False,
    form: str = "cka",
    weights: Tensor | None = None,
) -> Tensor:
    """The loss of a student's x (G, N, P) and its teacher's y: a mean over G, weighted or not."""
    if form == "signed":
        cka, teachable = _similarity(x, y, center)
    else:
        cka, teachable = _cka(x, y, center, debiased)
    loss = torch.where(teachable, dissimilarity(cka, form), torch.zeros_like(cka))
    return (loss if weights is None else loss * weights).mean()


def without_padding(x: Tensor, extents: Sequence[tuple[int, int]], fill: str = "zero") -> Tensor:
    """Feature maps without what the padding of their images has left in them.

    Images of a batch are padded to one size, and what two networks make of nothing is no relation
    to learn. Rows and columns that are padding in every image are cut off. Where only some have
    padding, each channel gets one value, which carries no gradient.

    Args:
        x: (B, C, H, W).
        extents: per image, the (rows, columns) that are not padding, from the upper left corner.
        fill: the value: "zero", for losses of differences; or the mean of the channel over what is
            not padding, in its "image" or in the "batch", which is what centring takes out.

    Returns:
        (B, C, H', W'), the most rows and columns of an image; a view of x if all have as many.

    Raises:
        ValueError: there are not as many extents as images, or an unknown fill.
    """
    if len(extents) != len(x) or fill not in FILLS:
        raise ValueError(
            f"without_padding takes an extent for each of {len(x)} images, got {len(extents)}, and "
            f"a fill of {', '.join(FILLS)}, got {fill!r}"
        )
    if not len(x):
        return x
    rows, columns = (max(sides) for sides in zip(*extents))
    x = x[..., :rows, :columns]
    if all(extent == x.shape[-2:] for extent in extents):
        return x
    parts = [image[:, :h, :w] for image, (h, w) in zip(x.detach(), extents)]
    value = x.new_zeros(())
    if fill == "image":
        value = torch.stack([part.mean((1, 2)) for part in parts])[..., None, None]
    elif fill == "batch":
        total = torch.stack([widen(part).sum((1, 2)) for part in parts]).sum(0)
        value = (total / sum(h * w for h, w in extents)).to(x.dtype)[:, None, None]
    return torch.where(own_cells(extents, x.device)[:, None], x, value)


def own_cells(extents: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """(B, H, W), False where :func:`without_padding` fills."""
    # A GPU need not have come as far as this for the numbers to be sent.
    rows, columns = torch.tensor(extents).to(device, non_blocking=True).unbind(1)
    row, column = (
        torch.arange(int(side), device=device) for side in (max(x) for x in zip(*extents))
    )
    return (row[:, None] < rows[:, None, None]) & (column < columns[:, None, None])


def patch_counts(shape: Sequence[int], patch_size: int, layout: str) -> tuple[int, int, int]:
    """(G, N, P) of :func:`pcka_loss` for maps of a shape (B, C, H, W)."""
    sizes = _cell_sizes(shape, patch_size)
    order, n_group, n_sample = _PERMUTATIONS[layout]
    axes = [sizes[i] for i in order]
    return (
        math.prod(axes[:n_group]),
        math.prod(axes[n_group : n_group + n_sample]),
        math.prod(axes[n_group + n_sample :]),
    )


def _cell_sizes(shape: Sequence[int], patch_size: int) -> tuple[int, ...]:
    """(B, C, U, p, V, p) of maps of a shape (B, C, H, W)."""
    b, c, height, width = shape
    return b, c, -(-height // patch_size), patch_size, -(-width // patch_size), patch_size


def _raised(shape: Sequence[int], patch_size: int) -> tuple[int, int]:
    """The sides of a map (B, C, H, W) raised to the next multiples of the patch."""
    _, _, u, _, v, _ = _cell_sizes(shape, patch_size)
    return u * patch_size, v * patch_size


def to_patches(x: Tensor, patch_size: int, layout: str) -> Tensor:
    """Cut x (B, C, H, W) into patches: (G, N, P), by layout.

    A side that is no multiple of the patch is first raised to the next one by bilinear
    interpolation, as in the paper's code.
    """
    size = _raised(x.shape, patch_size)
    if size != x.shape[-2:]:
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    cells = cut(x, patch_size).permute(_PERMUTATIONS[layout][0])
    return cells.reshape(patch_counts(x.shape, patch_size, layout))


class _FusedPCKA(torch.autograd.Function):
    """:func:`pcka_loss` against a constant teacher, some groups at a time.

    All that is kept is the student's gradient: it is made together with the loss, and backward
    scales it.
    """

    @staticmethod
    def forward(
        ctx: Any, gradient: bool, student: Tensor, teacher: Tensor, *settings: Any
    ) -> Tensor:
        loss, grad = _fused_pcka(gradient, student, teacher, *settings)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        # A copy for nothing, mostly; to ask a GPU would make it wait.
        if scale.device.type != "cpu" or scale.item() != 1:
            # In at least fp32. Autograd casts it to the student's type, now that AMP's scale is
            # in: before that half a precision would lose it.
            grad = grad * scale
        return None, grad, *(None,) * 8


# numpy asks for huge pages from so many bytes on.
_HUGE = 4 << 20
# Memory of gradients, and who uses it, if that is still there.
_gradients: list[tuple[np.ndarray[Any, Any], weakref.ref[Any]]] = []
_one_at_a_time = threading.Lock()


def _gradient_like(like: Tensor, dtype: torch.dtype) -> Tensor:
    """torch.empty_like; on a CPU, where it is large, in memory of a gradient that is gone.

    It would go back to the system, and to touch new memory for the first time takes a tenth of the
    loss's time; in a virtual machine that gives it back to its host, a sixth. It is numpy's, which
    asks for huge pages.
    """
    made = torch.empty_like(like, dtype=dtype, device="meta")
    # Tensors without values are of a subclass.
    if not (type(like) is Tensor and like.device.type == "cpu" and made.nbytes >= _HUGE):
        return torch.empty_like(like, dtype=dtype)
    with _one_at_a_time:
        # Asked once: what is in use now may be gone a moment later.
        free = [x for x in _gradients if x[1]() is None]
        fit = [x for x in free if made.nbytes <= x[0].nbytes < 2 * made.nbytes]
        taken = [min(fit, key=lambda x: len(x[0]))] if fit else []
        memory = taken[0][0] if taken else np.empty(made.nbytes, np.uint8)
        values = memory[: made.nbytes].view(torch.finfo(dtype).dtype)
        # If nothing fits, what is free is of other sizes than are asked for now.
        over = {id(x) for x in taken or free}
        _gradients[:] = [x for x in _gradients if id(x) not in over]
        _gradients.append((memory, weakref.ref(values)))
    return torch.from_numpy(values).as_strided(made.shape, made.stride())


def _fused_pcka(
    gradient: bool,
    student: Tensor,
    teacher: Tensor,
    patch_size: int,
    layout: str,
    center: bool,
    intra_weight: float,
    inter_weight: float,
    form: str,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The loss, and its gradient with respect to the student in at least fp32."""
    small_steps = in_caches(student.device)
    order, n_group, n_sample = _PERMUTATIONS[layout]
    groups, n, p = patch_counts(student.shape, patch_size, layout)
    raised = _raised(student.shape, patch_size)
    resized = raised != student.shape[-2:]
    split = n_group + n_sample
    samples, features = order[n_group:split], order[split:]
    # intra of X is inter of X^T. Alone it takes 3 products of n * n * p, inter, as both, 5.
    as_it_is, transposed = (5 if weight else 3 for weight in (inter_weight, intra_weight))
    if as_it_is * n > transposed * p:
        n, p = p, n
        samples, features = features, samples
        intra_weight, inter_weight = inter_weight, intra_weight
    if small_steps and resized:
        # A CKA knows no order of samples; a resize writes a column of patches at once.
        samples = tuple(sorted(samples, key=lambda axis: axis != 4))
    # Of the sides in caches.
    in_memory = samples + order[:n_group] + features
    order = order[:n_group] + samples + features
    inverse = tuple(order.index(i) for i in range(len(order)))
    # Groups are cut off along the channels or the images; positions in a patch cannot be.
    axis = order[0] if n_group == 1 else None
    # Grams of half-precision features overflow.
    dtype = torch.promote_types(student.dtype, torch.float32)
    like = torch.empty(0, dtype=dtype, device=student.device)

    size = student.numel() * like.element_size()
    if small_steps:
        budget = min(_CACHE * torch.get_num_threads(), max(size, _LEAST))
    else:
        budget = max(2 * size, _DEVICE_BUDGET)
    relations = {"intra": bool(intra_weight), "inter": bool(inter_weight)}
    own_kernels = layout in CHANNEL_LAYOUTS and kernels.fit(student, teacher, p, form)
    if own_kernels:
        values = kernels.values(n, p, **relations, center=center)
    else:
        values = FusedCKA.values(n, p, **relations, center=center, form=form)
    if resized and small_steps:
        # About: the rows that it makes, and those of the gradient before and after.
        values += 3 * student.shape[0] * student.shape[1] * raised[0] * raised[1] // groups
    step = groups if axis is None else max(1, min(groups, budget // (values * like.element_size())))
    # As even as can be: a last one of another size has memory and views of its own.
    step = -(-groups // -(-groups // step))
    if own_kernels:
        return kernels.pcka(
            student,
            teacher,
            step=step,
            patch_size=patch_size,
            samples=samples,
            features=features,
            weights=(intra_weight / groups, inter_weight / groups),
            channels=weights,
            center=center,
            form=form,
            gradient=gradient,
        )
    if small_steps:
        # Threads share out the groups of a product: with 2 of them 5 take as long as 6.
        threads = torch.get_num_threads()
        if step > threads:
            step = (step + threads // 2) // threads * threads
        if threads == 1 and n > 8:
            # Samples that lie a multiple of a large power of two apart share few of a cache's sets,
            # of eight places each: products of 32 groups took 8 % longer than those of 33.
            step |= 1
        step = min(groups, step)

    wanted = [weight / groups for weight in (intra_weight, inter_weight) if weight]
    if weights is not None:
        weights = weights[:, None]

    def cut_off(x: Tensor) -> Tensor:
        return x if axis is None else x.narrow(axis, start, count)

    grad: Tensor | None = None

    def whole() -> Tensor:
        # Made when it is first written to: by then a GPU has freed the patches.
        nonlocal grad
        if grad is None:
            grad = _gradient_like(student, dtype)
        return grad

    loss: Any = None
    cka = resize = None
    for start in range(0, groups, step):
        count = min(step, groups - start)
        parts = [cut_off(x) for x in (student, teacher)]
        # In caches all steps work in the same memory; otherwise it is free as soon as it can be.
        if count < step:
            cka = resize = None
        if cka is None:
            cka = FusedCKA(
                count,
                n,
                p,
                like,
                gradient=gradient,
                **relations,
                center=center,
                form=form,
                in_caches=small_steps,
            )
        if resized and resize is None:
            settings = (parts[0].shape, raised, patch_size, like)
            resize = BandedResize(*settings, in_memory) if small_steps else Resize(*settings)
        sizes = [_cell_sizes(parts[0].shape, patch_size)[i] for i in order]
        for side, x in zip(cka.sides, parts):
            cells = side.view(sizes).permute(inverse)
            if resize:
                resize(x, cells)
            else:
                cells.copy_(cut(x, patch_size))
        del side, cells
        part = cka(
            wanted if weights is None else [w * weights[start : start + count] for w in wanted]
        )
        loss = part if loss is None else loss + part
        cells = None if cka.grad is None else cka.grad.view(sizes).permute(inverse)
        if not small_steps:
            cka = None
        if cells is None:
            continue
        if resize:
            maps = resize.joined(cells)
            del cells
            resize.gradient(maps, cut_off(whole()))
            del maps
        else:
            cut(cut_off(whole()), patch_size).copy_(cells)
            del cells
    return loss, grad


def pcka_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    patch_size: int = 16,
    layout: str = "spatial",
    center: bool = True,
    intra_weight: float = 1.0,
    inter_weight: float = 0.0,
    debiased: bool = False,
    form: str = "cka",
    channel_weight: str = "equal",
) -> Tensor:
    r"""Patch-based CKA loss between two feature maps (PCKA, paper section 3.4).

    .. math::
        \mathcal{L} = \frac{1}{G} \sum_g \alpha \, (1 - \mathrm{CKA}(X_g, Y_g))
            + \beta \, (1 - \mathrm{CKA}(X_g^\top, Y_g^\top))

    where X_g (N, P) and Y_g come from cutting both maps into patches of p x p. The layout says
    what is a sample and what is one CKA:

    ============== ================ ============== =====================================
    layout         G                N              P
    ============== ================ ============== =====================================
    spatial        C                U*V            B*p*p  (the paper's)
    sample         C                B*U*V          p*p    (every patch of every image)
    per_image      B                U*V            C*p*p
    per_position   p*p              U*V            B*C
    batch          1                B*U*V          C*p*p
    ============== ================ ============== =====================================

    Args:
        student: (B, C, H, W).
        teacher: (B, C, H, W); (B, C', H, W) in :data:`CHANNEL_FREE_LAYOUTS` where
            beta is 0 and Grams are compared.
        patch_size: p, in cells of the map. Sides are raised to its next multiple.
        layout: one of :data:`LAYOUTS`.
        center: centre the Grams. ``False`` is the form of the paper's published code, which
            never centres.
        intra_weight: alpha, of the relations between samples.
        inter_weight: beta, of the relations between the features of a sample.
        debiased: see :func:`linear_cka`.
        form: "cka" as above; "sqrt" has the root of each CKA in its place, "log" minus its
            logarithm in that of 1 - CKA. The gradient of a CKA vanishes where nothing is related
            yet (of one-dimensional samples it is a squared correlation); theirs does not, though
            below a CKA of 1e-4 it stays what it is there. "signed" has <X, Y> / (|X| |Y|) of the
            centred X and Y in place of the CKA: what a Gram does not see, a sign or a rotation of
            the samples, is then a difference. With p = 1 and layout sample it is a correlation, the
            loss of PKD.
        channel_weight: where every channel is a CKA, "equal" or in proportion to the "variance" of
            the teacher's channel.

    Returns:
        a scalar; 0 with a zero gradient for empty input. The gradient is computed with it
        (see :mod:`pcka_distill.fused`), so it can be differentiated once; with ``debiased``, where
        channels differ, or where the teacher wants a gradient too, autograd does it, at several
        times the cost.

    Raises:
        ValueError: shapes differ, unknown layout or form, or a patch size below 1.

    >>> x = torch.rand(2, 3, 8, 8)
    >>> bool(pcka_loss(x, 2 * x + 1, patch_size=2) < 1e-5)
    True
    """
    if layout not in _PERMUTATIONS:
        raise ValueError(f"unknown layout {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}, expected one of {', '.join(FORMS)}")
    if channel_weight not in CHANNEL_WEIGHTS or (
        channel_weight != "equal" and layout not in CHANNEL_LAYOUTS
    ):
        raise ValueError(
            f"channel_weight {channel_weight!r} with layout {layout!r}: expected "
            f"{' or '.join(CHANNEL_WEIGHTS)}, with one of {', '.join(CHANNEL_LAYOUTS)}"
        )
    if form != "cka" and debiased:
        raise ValueError(f"a debiased CKA may be negative, which form {form!r} is not made for")
    channel_free = layout in CHANNEL_FREE_LAYOUTS and not inter_weight and form != "signed"
    alike = student.shape == teacher.shape
    shapes = [x.shape[:1] + x.shape[2:] for x in (student, teacher)]
    if student.dim() != 4 or not (alike or (channel_free and shapes[0] == shapes[1])):
        raise ValueError(
            "pcka_loss takes two (B, C, H, W) maps of one shape, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
    if student.numel() == 0 or not (intra_weight or inter_weight):
        return widen(student).sum() * 0
    with full_precision(student.device):
        weights = _channel_weights(teacher) if channel_weight == "variance" else None
        if alike and not (debiased or teacher.requires_grad):
            gradient = student.requires_grad and torch.is_grad_enabled()
            loss: Tensor = _FusedPCKA.apply(
                gradient,
                student,
                teacher,
                patch_size,
                layout,
                center,
                intra_weight,
                inter_weight,
                form,
                weights,
            )
            return loss
        x = to_patches(widen(student), patch_size, layout)
        y = to_patches(widen(teacher), patch_size, layout)
        loss = x.new_zeros(())
        if intra_weight:
            part = _dissimilarity(x, y, center, debiased, form, weights)
            loss = loss + intra_weight * part
        if inter_weight:
            part = _dissimilarity(x.mT, y.mT, center, debiased, form, weights)
            loss = loss + inter_weight * part
        return loss


def _channel_weights(teacher: Tensor) -> Tensor:
    """(C,), of mean 1, in proportion to the variance of each channel of (B, C, H, W)."""
    variance = unit_peak(widen(teacher.detach())).var((0, 2, 3), correction=0)
    return variance / variance.mean().clamp(min=torch.finfo(variance.dtype).tiny)


def fcka_loss(student: Tensor, teacher: Tensor, *, center: bool = True) -> Tensor:
    r"""CKA loss between the images of a batch (FCKA, paper section 3.3).

    .. math:: \mathcal{L} = 1 - \mathrm{CKA}(X, Y), \quad X \in \mathbb{R}^{B \times C H W}

    Args:
        student: (B, C, H, W).
        teacher: (B, C', H', W'); only B must agree.
        center: centre the Grams.

    Returns:
        a scalar; 0 with a zero gradient for fewer than two images (a relation needs two).

    Raises:
        ValueError: B differs.
    """
    if not len(student) == len(teacher):
        raise ValueError(
            f"fcka_loss takes two maps of as many images, got {len(student)} and {len(teacher)}"
        )
    if len(student) < 2 or student.numel() == 0:
        return widen(student).sum() * 0
    with full_precision(student.device):
        x, y = (widen(z).flatten(1) for z in (student, teacher))
        return _dissimilarity(x, y, center)


def rcka_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    center: bool = True,
    intra_weight: float = 1.0,
    inter_weight: float = 1.0,
    temperature: float | None = None,
    sigmoid: bool = False,
) -> Tensor:
    r"""Relation CKA loss between two sets of logits (RCKA, paper section 3.3).

    .. math::
        \mathcal{L} = \alpha \, (1 - \mathrm{CKA}(Z_s, Z_t))
            + \beta \, (1 - \mathrm{CKA}(Z_s^\top, Z_t^\top))

    intra relates the N samples to one another, inter relates the P classes.

    Args:
        student_logits: (N, P), N samples of P classes.
        teacher_logits: (N, P).
        center: centre the Grams.
        intra_weight: alpha.
        inter_weight: beta.
        temperature: T > 0 relates the samples by softmax(z / T); ``None`` by the logits. The
            classes are always related by their logits, as in the paper's published code:
            softmax ties the classes of a sample to one another.
        sigmoid: with a temperature relate both by sigmoid(z / T) instead, which does not tie them.

    Returns:
        a scalar; 0 with a zero gradient for fewer than two samples (a relation needs two).

    Raises:
        ValueError: shapes differ or are not (N, P), or the temperature is not positive.

    >>> z = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0], [1.0, 5.0, 0.0]])
    >>> bool(rcka_loss(z, 4 * z) < 1e-5)
    True
    """
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "rcka_loss takes two (N, P) sets of logits of one shape, got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    if temperature is not None and temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if student_logits.shape[0] < 2 or student_logits.numel() == 0:
        return widen(student_logits).sum() * 0
    with full_precision(student_logits.device):
        student, teacher = widen(student_logits), widen(teacher_logits)
        if temperature is not None and sigmoid:
            student, teacher = ((z / temperature).sigmoid() for z in (student, teacher))
        loss = student.new_zeros(())
        if intra_weight:
            x, y = student, teacher
            if temperature is not None and not sigmoid:
                x, y = ((z / temperature).softmax(-1) for z in (x, y))
            loss = loss + intra_weight * _dissimilarity(x, y, center)
        if inter_weight:
            loss = loss + inter_weight * _dissimilarity(student.mT, teacher.mT, center)
        return loss
