"""PCKA of a GPU in a few launches: what lies between its matrix products, in kernels of its own.

:mod:`pcka_distill.fused` says what is computed, with torch's operations; its letters are used here.
Those are some fifty to eighty launches a step, most of which move all of the maps or all of the
Grams once more. Here a step is three kernels around torch's products, and two before them that add
up what many programs share:

    sum_columns, write_sides   resize both maps, cut them into patches and centre them: X, Y, and
                               what they lost
    sum_grams, write_factors   make the losses of the Grams, and what X and Y are multiplied with
                               for the gradient
    spread                     puts the gradient of the patches back together, through the resize

They are Triton's, which comes with torch where there is CUDA. Sums are added up in one order
always, so that runs repeat bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pcka_distill.fused import FLOOR, padded

try:
    import triton

    # Older ones take other arguments.
    available = int(triton.__version__.split(".")[0]) >= 3
except ImportError:
    available = False
if available:
    from pcka_distill import triton_kernels

__all__ = ["fit", "pcka", "values"]

logger = logging.getLogger(f"detectron2.{__name__}")

# Values of a sample that a program can hold.
_WIDEST = 8192
# What a program works on at a time, and its warps: values of a side, rows and columns of Grams,
# values of a map. The first two have a chunk of the samples each.
_TILE, _SIDE_WARPS = 2048, 8
_DOWN, _ACROSS, _GRAM_WARPS = 16, 32, 4
_BLOCK, _SPREAD_WARPS = 512, 4
# As many as there are in a chunk at least, and how many chunks there are at most.
_LEAST, _CHUNKS = 32, 8
# Rows after X and Y where centring makes the two relations differ: c_x, c_y, 1, and what makes the
# number of all rows a multiple of 8, on which products are quick.
_EXTRA = 8


def fit(student: Tensor, teacher: Tensor, p: int, form: str) -> bool:
    """Whether the kernels are for such maps (B, C, H, W), with P values in a sample, and run."""
    maps = (student, teacher)
    return (
        # Tensors without values are of a subclass.
        type(student) is type(teacher) is Tensor
        and student.device == teacher.device
        and student.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and form != "signed"
        and p <= _WIDEST
        # Places in a map are counted in 32 bits.
        and all(max(x.numel(), _reach(x)) < 1 << 31 for x in maps)
        and _run(student.device)
    )


def _reach(x: Tensor) -> int:
    """How far the last value lies behind the first."""
    return sum((n - 1) * stride for n, stride in zip(x.shape, x.stride()))


def _strides(x: Tensor) -> list[int]:
    """Strides; 0 where they do not matter, and may be of any size."""
    return [stride if n > 1 else 0 for n, stride in zip(x.shape, x.stride())]


@functools.cache
def _run(device: torch.device) -> bool:
    """Whether the kernels run on a device. Where they should and do not, the log says why."""
    if device.type != "cuda" or torch.version.hip or not available:
        return False
    if torch.cuda.get_device_capability(device) < (7, 0):
        return False
    logger.info("PCKA compiles its kernels for this GPU: a few seconds, once")
    try:
        x = torch.zeros(1, 1, 3, 3, device=device)
        pcka(
            x,
            x,
            step=1,
            patch_size=2,
            samples=(2, 4),
            features=(0, 3, 5),
            weights=(1.0, 1.0),
            channels=None,
            center=True,
            form="cka",
            gradient=True,
        )
    except torch.cuda.OutOfMemoryError:
        raise
    # Whatever keeps a compiler from its work: none there, no place to write to.
    except Exception as e:
        reason = str(e).strip().split("\n")[0] or type(e).__name__
        logger.warning(
            f"PCKA's kernels do not compile here ({reason}); torch's operations do the same in "
            "more time"
        )
        return False
    return True


def values(n: int, p: int, *, intra: bool, inter: bool, center: bool) -> int:
    """How many values one of the G takes at a time, about."""
    end = padded(n)
    rows = 2 * end + _EXTRA * (intra and inter and center)
    # What is multiplied, the Grams, and the factors; or in the place of the Grams the gradient.
    if not inter:
        return rows * p + max(3 * end**2, end**2 + n * p)
    grams = end * rows + (rows - end) ** 2
    return rows * p + n * rows + max(grams, n * p)


@functools.lru_cache(maxsize=256)
def _places(shape: tuple[int, ...], axes: tuple[int, ...], device: torch.device) -> Tensor:
    """(3, count), the image, row and column of every place along some axes of (B, C, U, p, V, p).

    That of a sample and that of a value in it add up to that of the value.
    """
    p = shape[3]
    steps = {0: (1, 0, 0), 2: (0, p, 0), 3: (0, 1, 0), 4: (0, 0, p), 5: (0, 0, 1)}
    # Whatever the default device is: others have no such products.
    every = itertools.product(*(range(shape[axis]) for axis in axes))
    indices = torch.tensor(list(every), device="cpu")
    places = indices @ torch.tensor([steps[axis] for axis in axes], device="cpu")
    return places.mT.to(torch.int32).contiguous().to(device)


def _chunks(n: int, at_a_time: int) -> tuple[int, int]:
    """Into how many chunks to cut samples, and how many are in one."""
    size = -(-n // min(_CHUNKS, max(1, n // _LEAST)))
    size = -(-size // at_a_time) * at_a_time
    return -(-n // size), size


@contextlib.contextmanager
def _products_of(dtype: torch.dtype) -> Iterator[None]:
    """Products as exact as maps of a type: of half a precision they are TF32's, of 11 bits."""
    matmul = torch.backends.cuda.matmul
    # Newer torch has two settings of this, and refuses to read the older where the newer was used.
    before = getattr(matmul, "fp32_precision", None)
    exact = not matmul.allow_tf32 if before is None else before != "tf32"
    if not exact or dtype == torch.float32:
        yield
        return
    matmul.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32 = False
        if before is not None:
            matmul.fp32_precision = before


def pcka(
    student: Tensor,
    teacher: Tensor,
    *,
    step: int,
    patch_size: int,
    samples: tuple[int, ...],
    features: tuple[int, ...],
    weights: Sequence[float],
    channels: Tensor | None,
    center: bool,
    form: str,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """The weighted losses of all channels.

    Args:
        student: (B, C, H, W); every channel is a CKA.
        teacher: (B, C, H, W).
        step: how many channels to work on at a time.
        patch_size: p.
        samples: the axes of (B, C, U, p, V, p) that are related to one another.
        features: the others, but for C.
        weights: of the relation between samples, and of that between features; 0 leaves it out.
        channels: (C,), what else to weigh each channel with; None for nothing.
        center: see :func:`pcka_distill.functional.pcka_loss`; so is the form.
        form: "cka", "sqrt" or "log".
        gradient: whether to make it.

    Returns:
        their sum, and its gradient with respect to the student; both in fp32.
    """
    batch, count, height, width = student.shape
    up, across = -(-height // patch_size), -(-width // patch_size)
    shape = (batch, 1, up, patch_size, across, patch_size)
    device = student.device
    of_samples, of_features = (_places(shape, axes, device) for axes in (samples, features))
    n, p = of_samples.shape[1], of_features.shape[1]
    intra, inter = (bool(weight) for weight in weights)
    apart = intra and inter and center
    end = padded(n)
    rows = 2 * end + _EXTRA * apart
    to = (up * patch_size, across * patch_size)
    scales = [a / b for a, b in zip((height, width), to)]
    resized = [a != b for a, b in zip((height, width), to)]
    # How many rows, or columns, of the patches one of a map may be part of.
    reach = [math.ceil(2 / s) if r else 1 for s, r in zip(scales, resized)]
    over = (intra and center, inter and center)
    block = triton.next_power_of_2(p)
    tall = max(1, min(16, _TILE // block))
    warps = _SIDE_WARPS if block < 4096 else 16
    if channels is not None:
        channels = channels.float()
    losses = torch.empty(count, dtype=torch.float32, device=device)
    whole: Tensor | None = None
    info = torch.finfo(torch.float32)

    # Padding is written, too.
    chunks, per_chunk = _chunks(end, tall)
    more, per_more = _chunks(n, _DOWN)

    # Triton's are launched where torch is at the moment.
    with torch.cuda.device_of(student):
        for start in range(0, count, step):
            g = min(step, count - start)
            z = losses.new_empty(g, rows, p)
            # The means of the samples of either side, and the squared norms of those over samples.
            lost = losses.new_empty(g, 2, end)
            squares = losses.new_empty(g, 2)
            sums = losses.new_empty(g, 2, chunks, p) if over[0] and chunks > 1 else lost
            maps = [x.narrow(1, start, g) for x in (student, teacher)]
            if student.dtype != teacher.dtype:
                maps = [x.float() for x in maps]
            places = (of_samples, of_features, per_chunk, n, p)
            sizes = (*_strides(maps[0]), *_strides(maps[1]), height, width, *scales, *resized)
            tile = {"TALL": tall, "BLOCK": block, "num_warps": warps}
            if sums is not lost:
                triton_kernels.sum_columns[(g, chunks, 2)](*maps, sums, *places, *sizes, **tile)
            triton_kernels.write_sides[(g, chunks, 2)](
                *maps, z, lost, squares, sums, *places, end, rows, *sizes, *over, apart,
                chunks == 1, **tile,
            )  # fmt: skip
            with _products_of(student.dtype):
                if inter:
                    x, y = z[:, :end], z[:, end:]
                    of_x, of_y = torch.bmm(x, z.mT), torch.bmm(y, y.mT)
                else:
                    x = y = z.view(2 * g, end, p)
                    of_x, of_y = torch.bmm(x, x.mT).view(g, 2, end, end).unbind(1)
            del x, y
            factors = losses.new_empty(g, n, rows if inter else end) if gradient else of_x
            dots = losses.new_empty(g, more, 6) if more > 1 else lost
            grams = (n, p, end, *of_x.stride()[:2], *of_y.stride()[:2])
            limits = (info.tiny, (16 * info.eps) ** 2)
            kinds = (intra, inter, apart, *over)
            tile = {"DOWN": _DOWN, "ACROSS": _ACROSS, "num_warps": _GRAM_WARPS}
            if more > 1:
                triton_kernels.sum_grams[(g, more)](
                    of_x, of_y, dots, lost, squares, per_more, *grams, *limits, *kinds, **tile
                )
            triton_kernels.write_factors[(g, more)](
                of_x, of_y, factors, dots, lost, squares,
                losses if channels is None else channels[start:], losses[start:],
                per_more, *grams, factors.shape[2], *(float(weight) for weight in weights), *limits,
                FLOOR, *kinds, channels is not None, form, gradient, more == 1,
                **tile,
            )  # fmt: skip
            del of_x, of_y
            if not gradient:
                continue
            with _products_of(student.dtype):
                made = torch.bmm(factors, z if inter else z[:, :end])
            del z, factors
            axes = (1, *samples, *features)
            sizes = (batch, g, *shape[2:])
            cells = made.view([sizes[axis] for axis in axes])
            cells = cells.permute([axes.index(axis) for axis in range(6)])
            if whole is None:
                # By now there is room.
                whole = torch.empty_like(student, dtype=torch.float32)
            out = whole.narrow(1, start, g)
            triton_kernels.spread[(triton.cdiv(height * width, _BLOCK), g, batch)](
                cells,
                out,
                *_strides(cells),
                *_strides(out),
                height,
                width,
                *to,
                *scales,
                *reach,
                *resized,
                patch_size,
                _BLOCK,
                num_warps=_SPREAD_WARPS,
            )
            del made, cells
    return losses.sum(), whole
