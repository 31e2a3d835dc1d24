r"""1 - CKA of many pairs at once, with its gradient: five products, and no graph.

What :mod:`pcka_distill.functional` defines, for the case that training spends its time in: the
plain (biased) estimator, against a teacher that is a constant. The letters are those of its
legend; X is the student's, Y the teacher's. With K = X X^T, L = Y Y^T and M = X Y^T, all N x N,

    intra CKA = <K, L> / (|K| |L|)        inter CKA = |M|^2 / (|K| |L|)

since <X^T X, Y^T Y> = |X Y^T|^2 and |X^T X| = |X X^T|: three products serve both, however large
P is. Two more make the gradients,

    d intra / dX = 2 (L / |L| - intra K / |K|) X / |K|
    d inter / dX = 2 (M Y / |L| - inter K X / |K|) / |K|

Centring makes the two differ: intra is centred over the samples, inter over the features. D is X
centred over both, r and c are the means of the rows and columns that it lost, both centred:

    intra: X = D + r 1^T, K = D D^T + P r r^T
    inter: X = D + 1 c^T, K = D D^T + (D c) 1^T + 1 (D c)^T + |c|^2 1 1^T

so that the products are still made only once, and the corrections are added, never subtracted.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FORMS", "Resize", "dissimilarity", "dissimilarity_", "sides", "workspace"]

#: what a loss makes of a CKA
FORMS = ("cka", "sqrt", "log", "signed")
# (outputs, the inputs that they are made of, weights (outputs, inputs)) of each
Bands = tuple[tuple[slice, slice, Tensor], ...]

# Below it the steep forms go on as straight lines, so that no slope is infinite.
_FLOOR = 1e-4


def dissimilarity(cka: Tensor, form: str) -> Tensor:
    """1 - CKA, 1 - its square root, or minus its logarithm: the loss that a CKA is.

    Of the signed form, which compares no Grams, 1 - its similarity.
    """
    if form in ("cka", "signed"):
        return 1 - cka
    safe = cka.clamp(min=_FLOOR)
    below = (safe - cka) / _FLOOR
    if form == "sqrt":
        root = safe.sqrt()
        return 1 - root + below * (root / 2)
    return below - safe.log()


def _slope(cka: Tensor, form: str) -> Tensor | float:
    """How fast that falls as the CKA grows."""
    if form == "cka":
        return 1.0
    safe = cka.clamp(min=_FLOOR)
    return 0.5 / safe.sqrt() if form == "sqrt" else 1 / safe


@functools.lru_cache(maxsize=256)
def _bands(
    size: int, to: int, width: int, backward: bool, dtype: torch.dtype, device: torch.device
) -> Bands:
    """A bilinear resize of one side, or its gradient's, in bands; none if its size stays.

    Args:
        size: of what is resized.
        to: its new size.
        width: outputs of a band, at most.
        backward: of the gradient, whose outputs are the resize's inputs.
        dtype: of the weights.
        device: likewise.
    """
    if size == to:
        return ()
    eye = torch.eye(size, dtype=dtype, device=device)[None, None]
    matrix = F.interpolate(eye, size=(to, size), mode="bilinear", align_corners=False)[0, 0]
    if backward:
        matrix = matrix.mT
    bands = []
    for start in range(0, len(matrix), width):
        outputs = slice(start, min(start + width, len(matrix)))
        used = matrix[outputs].any(0).nonzero()
        inputs = slice(int(used.min()), int(used.max()) + 1)
        bands.append((outputs, inputs, matrix[outputs, inputs].contiguous()))
    return tuple(bands)


class Resize:
    """Bilinear resize of maps of one shape (B, C, H, W), and its gradient, without a graph.

    It is linear and separable, so it is a product with a band matrix from either side. Both
    methods work in the same memory: what one returns holds until either is called again.

    Args:
        shape: (B, C, H, W) of what is resized.
        to: its new sides.
        like: a tensor of the type and on the device to work in.
    """

    def __init__(self, shape: torch.Size, to: tuple[int, int], like: Tensor) -> None:
        b, c, h, w = shape
        # A core is quickest where few cells of a band are zero, a GPU on one large product.
        high, across = (8, 16) if like.device.type == "cpu" else (max(h, w, *to),) * 2
        # Height comes first, so that both products are plain matrix products.
        self._small = like.new_empty(h, b, c, w)
        self._tall = like.new_empty(to[0], b, c, w) if h != to[0] else self._small
        self._large = like.new_empty(to[0], b, c, to[1]) if w != to[1] else self._tall
        small, tall = self._small.view(h, -1), self._tall.view(to[0], -1)
        narrow, wide = self._tall.view(-1, w), self._large.view(-1, to[1])

        def bands(size: int, to: int, width: int, backward: bool = False) -> Bands:
            return _bands(size, to, width, backward, like.dtype, like.device)

        self._forward = [(m, small[i], tall[o]) for o, i, m in bands(h, to[0], high)]
        self._forward += [(narrow[:, i], m.mT, wide[:, o]) for o, i, m in bands(w, to[1], across)]
        back = [(wide[:, i], m.mT, narrow[:, o]) for o, i, m in bands(w, to[1], across, True)]
        self._backward = back + [(m, tall[i], small[o]) for o, i, m in bands(h, to[0], high, True)]

    def __call__(self, x: Tensor) -> Tensor:
        """The resized maps (B, C, H', W') of x."""
        self._small.copy_(x.permute(2, 0, 1, 3))
        for a, b, out in self._forward:
            torch.mm(a, b, out=out)
        return self._large.permute(1, 2, 0, 3)

    def gradient(self) -> Tensor:
        """The gradient (B, C, H, W) of x, once that of the resized maps is written over them."""
        for a, b, out in self._backward:
            torch.mm(a, b, out=out)
        return self._small.permute(1, 2, 0, 3)


def _varies(left: Tensor, lost: Tensor) -> Tensor:
    """Where sums of squares are more than the rounding error of the means that were taken out.

    NaN must stay visible (it compares False both ways), so this tests for "does not vary".
    """
    info = torch.finfo(left.dtype)
    return ~(left <= ((16 * info.eps) ** 2 * (left + lost)).clamp(min=info.tiny))


def _signed_(
    both: Tensor, grad: Tensor | None, weight: Tensor, dims: Sequence[int], *, center: bool
) -> Tensor:
    """weight * (1 - <X, Y> / (|X| |Y|)), X and Y centred over a dimension, summed.

    Args:
        both: (2, G, N, P), X and Y.
        grad: see :func:`dissimilarity_`.
        weight: (1 or 2, 1 or G, 1, 1), of each dimension.
        dims: the dimensions to centre over.
        center: whether to.
    """
    loss = both.new_zeros(())
    made = []
    for weight_, dim in zip(weight, dims):
        x = both
        lost = x.new_zeros(())
        if center:
            mean = x.mean(dim, keepdim=True)
            x = x - mean
            lost = x.shape[dim] * mean.square().sum((-2, -1), keepdim=True)
        square = x.square().sum((-2, -1), keepdim=True)
        varies = _varies(square, lost)
        inverse = torch.where(varies, square, 1).rsqrt() * varies
        x = x * inverse
        similarity = (x[0] * x[1]).sum((-2, -1), keepdim=True)
        loss += (weight_ * torch.where(varies[1], 1 - similarity, 0)).sum()
        if grad is not None:
            made.append((x[0] * similarity - x[1]) * (weight_ * inverse[0]))
    if grad is not None:
        grad.copy_(sum(made[1:], made[0]))
    return loss


def padded(n: int) -> int:
    """How many rows to give N samples: products are quicker on multiples of 8."""
    return n if n < 16 else -(-n // 8) * 8


def workspace(groups: int, n: int, p: int, like: Tensor) -> Tensor:
    """What :func:`dissimilarity_` works in, of a tensor's type and on its device.

    Returns:
        (G, R, P), zeros: rows of X, as many of Y, and three for what centring takes out, so that
        one product with all of them makes the gradient.
    """
    return like.new_zeros(groups, 2 * padded(n) + 3, p)


def sides(z: Tensor, n: int) -> Tensor:
    """X and Y in a :func:`workspace`, (2, G, N, P)."""
    return z[:, : 2 * padded(n)].unflatten(1, (2, -1))[:, :, :n].transpose(0, 1)


def dissimilarity_(
    z: Tensor,
    n: int,
    grad: Tensor | None,
    *,
    center: bool,
    intra_weight: float,
    inter_weight: float,
    form: str = "cka",
    weights: Tensor | None = None,
) -> Tensor:
    """intra_weight * (1 - CKA) of X and Y + inter_weight * (1 - CKA) of their transposes.

    Args:
        z: a :func:`workspace`, fp32 or fp64, X and Y in its :func:`sides`; **overwritten**. It is
            fast where N <= P.
        n: N.
        grad: (G, N, P), written: the gradient with respect to X; None leaves it out.
        center: centre over N for intra, over P for inter.
        intra_weight: 0 leaves the relation out, but one is needed.
        inter_weight: likewise.
        form: what to make of a CKA, one of :data:`FORMS`.
        weights: (G, 1, 1) of the pairs; None for 1 each.

    Returns:
        the sum of the losses over G, a scalar.
    """
    both = sides(z, n)
    _, g, _, p = both.shape
    wanted = [(w, d) for w, d in ((intra_weight, -2), (inter_weight, -1)) if w]
    # Filled on its device: to send numbers there would make it wait.
    weight = z.new_empty(len(wanted), 1, 1, 1)
    for row, (w, _) in zip(weight, wanted):
        row.fill_(w)
    if weights is not None:
        weight = weight * weights
    if form == "signed":
        return _signed_(both, grad, weight, [d for _, d in wanted], center=center)

    columns = rows = None
    lost = z.new_zeros(2, g, 1, 1)
    if center and intra_weight:
        columns = both.mean(-2, keepdim=True)
        both -= columns
        lost += n * columns.square().sum((-2, -1), keepdim=True)
    if center and inter_weight:
        rows = both.mean(-1, keepdim=True)
        both -= rows
        lost += p * rows.square().sum((-2, -1), keepdim=True)

    end = padded(n)
    x, y, c = z[:, :end], z[:, end : 2 * end], z[:, 2 * end :]
    whole = z.new_empty(3 if inter_weight else 2, g, end, end)
    torch.bmm(x, x.mT, out=whole[0])
    torch.bmm(y, y.mT, out=whole[1])
    if inter_weight:
        torch.bmm(x, y.mT, out=whole[2])
    # K and L of one or each of the relations, (1 or 2, 2, G, N, N), and M.
    grams, m = whole[None, :2, :, :n, :n], whole[-1, :, :n, :n]
    apart = columns is not None and rows is not None
    if columns is not None and rows is not None:
        # The rows c_x, c_y and 1, which D lacks.
        c[:, :2] = (columns - columns.mean(-1, keepdim=True)).squeeze(2).transpose(0, 1)
        c[:, 2] = 1
        cc = c[:, :2] @ c[:, :2].mT
        of_x, of_y = (c[:, :2] @ z[:, : 2 * end].mT).unflatten(2, (2, -1))[..., :n].unbind(2)
        m += of_x[:, 1, :, None] + cc[:, :1, 1:]
        m += of_y[:, 0, None]
        half = torch.stack([of_x[:, 0] + cc[:, 0, :1] / 2, of_y[:, 1] + cc[:, 1, 1:] / 2])
        parts = z.new_empty(2, 2, g, n, n)
        torch.addcmul(grams[0], rows, rows.mT, value=p, out=parts[0])
        torch.add(grams[0], half[..., None], out=parts[1])
        parts[1] += half[..., None, :]
        grams = parts

    trace = grams.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    varies = _varies(trace, lost)
    # A CKA does not depend on the scale: Grams of unit trace can be squared, whatever theirs was.
    scale = torch.where(varies, trace, 1).reciprocal() * varies
    grams *= scale
    norms = torch.linalg.vector_norm(grams, dim=(-2, -1), keepdim=True)
    inverse = torch.where(varies, norms, 1).reciprocal() * varies
    product = inverse[:, 0] * inverse[:, 1]
    dots, factors = [], []
    if intra_weight:
        dots.append((grams[0, 0] * grams[0, 1]).sum((-2, -1), keepdim=True))
        factors.append(scale[0, 0])
    if inter_weight:
        root = scale[-1].sqrt()
        factors.append(root[0] * root[1])
        m *= factors[-1]
        dots.append(m.square().sum((-2, -1), keepdim=True))
    cka = torch.stack(dots) * product
    loss = (weight * torch.where(varies[:, 1], dissimilarity(cka, form), 0)).sum()
    if grad is None:
        return loss

    # The gradient is a product with X, Y and what D lacks.
    twice = 2 * weight * _slope(cka, form)
    of_k = twice * cka * (scale[:, 0] * inverse[:, 0].square())
    of_other = -twice * product * torch.stack(factors)
    used = len(z[0]) if apart else 2 * end if inter_weight else end
    by = z.new_zeros(g, n, used)
    by_x = by[..., :n]
    if intra_weight:
        torch.mul(grams[0, 0], of_k[0], out=by_x)
        by_x.addcmul_(grams[0, 1], of_other[0])
        if rows is not None and apart:
            torch.bmm(by_x, rows[0], out=by[..., -1:])
    if inter_weight:
        by_y = by[..., end : end + n]
        torch.mul(m, of_other[-1], out=by_y)
        by_x.addcmul_(grams[-1, 0], of_k[-1])
        if apart:
            by[..., -3] = grams[1, 0].sum(-1) * of_k[1, ..., 0]
            by[..., -2] = by_y.sum(-1)
    torch.bmm(by, z[:, :used], out=grad)
    return loss
