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

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FORMS", "Resize", "dissimilarity", "dissimilarity_", "padded"]

#: what a loss makes of a CKA
FORMS = ("cka", "sqrt", "log", "signed")
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
    size: int, to: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[slice, slice, Tensor], ...]:
    """A bilinear resize of one side, in bands of at most a width; none if there is none.

    Returns:
        (outputs, the inputs that they are made of, weights (outputs, inputs)) of each band.
    """
    if size == to:
        return ()
    eye = torch.eye(size, dtype=dtype, device=device)[None, None]
    matrix = F.interpolate(eye, size=(to, size), mode="bilinear", align_corners=False)[0, 0]
    bands = []
    for start in range(0, to, width):
        outputs = slice(start, min(start + width, to))
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
        # A core is quickest on the few cells that are not zero, a GPU on one large product.
        width = 16 if like.device.type == "cpu" else max(to)
        rows, columns = (_bands(n, m, width, like.dtype, like.device) for n, m in zip((h, w), to))
        # Height comes first, so that both products are plain matrix products.
        self._small = like.new_empty(h, b, c, w)
        self._tall = self._small.new_empty(to[0], b, c, w) if rows else self._small
        self._large = self._small.new_empty(to[0], b, c, to[1]) if columns else self._tall
        small, tall = self._small.view(h, -1), self._tall.view(to[0], -1)
        self._rows = [(band, small[i], tall[o]) for o, i, band in rows]
        narrow, wide = self._tall.view(-1, w), self._large.view(-1, to[1])
        self._columns = [(band, narrow[:, i], wide[:, o]) for o, i, band in columns]

    def __call__(self, x: Tensor) -> Tensor:
        """The resized maps (B, C, H', W') of x."""
        self._small.copy_(x.permute(2, 0, 1, 3))
        for band, small, tall in self._rows:
            torch.mm(band, small, out=tall)
        for band, narrow, wide in self._columns:
            torch.mm(narrow, band.mT, out=wide)
        return self._large.permute(1, 2, 0, 3)

    def gradient(self) -> Tensor:
        """The gradient (B, C, H, W) of x, once that of the resized maps is written over them."""
        if self._columns:
            self._tall.zero_()
        for band, narrow, wide in self._columns:
            narrow.addmm_(wide, band)
        if self._rows:
            self._small.zero_()
        for band, small, tall in self._rows:
            small.addmm_(band.mT, tall)
        return self._small.permute(1, 2, 0, 3)


def _varies(left: Tensor, lost: Tensor) -> Tensor:
    """Where sums of squares are more than the rounding error of the means that were taken out.

    NaN must stay visible (it compares False both ways), so this tests for "does not vary".
    """
    info = torch.finfo(left.dtype)
    return ~(left <= ((16 * info.eps) ** 2 * (left + lost)).clamp(min=info.tiny))


def _signed_(
    z: Tensor,
    n: int,
    grad: Tensor | None,
    *,
    center: bool,
    parts: tuple[tuple[float | Tensor, int], ...],
) -> Tensor:
    """weight * (1 - <X, Y> / (|X| |Y|)), X and Y centred over a dimension, summed over the parts.

    Args:
        z, n, grad: see :func:`dissimilarity_`.
        center: likewise.
        parts: (weight, dimension to centre over), those of no weight left out.
    """
    loss = z.new_zeros(())
    made = []
    for weight, dim in parts:
        x = z[:, :, :n]
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
        loss += (weight * torch.where(varies[1], 1 - similarity, 0)).sum()
        if grad is not None:
            made.append((x[0] * similarity - x[1]) * (weight * inverse[0]))
    if grad is not None:
        grad.copy_(sum(made[1:], made[0]))
    return loss


def _relation(
    grams: Tensor, m: Tensor | None, lost: Tensor, weight: float | Tensor, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    """One relation of G pairs: intra of K and L, or inter if M is given.

    Args:
        grams: (2, G, N, N), K and L, centred.
        m: (G, N, N), likewise.
        lost: (2, G, 1, 1), the traces of what centring took out.
        weight: of the relation, one or (G, 1, 1).
        form: one of :data:`FORMS`.

    Returns:
        weight * the dissimilarity, summed over the pairs, and two (G, N, N): its gradient is the
        first times X plus the second times Y, or for intra, where both are of X, times X.
    """
    trace = grams.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    varies = _varies(trace, lost)
    # A CKA does not depend on the scale: Grams of unit trace can be squared, whatever theirs was.
    scale = torch.where(varies, trace, 1).reciprocal() * varies
    k, l = grams = grams * scale
    root = scale.sqrt()
    other = l if m is None else m * (root[0] * root[1])
    norms = torch.linalg.vector_norm(grams, dim=(-2, -1), keepdim=True)
    inverse = torch.where(varies, norms, 1).reciprocal() * varies
    product = inverse[0] * inverse[1]
    dot = (k * l if m is None else other.square()).sum((-2, -1), keepdim=True)
    cka = dot * product
    loss = (weight * torch.where(varies[1], dissimilarity(cka, form), 0)).sum()
    twice = 2 * weight * _slope(cka, form)
    of_k = k * (twice * scale[0] * cka * inverse[0].square())
    factor = scale[0] if m is None else root[0] * root[1]
    return loss, of_k, other * (-twice * factor * product)


def padded(n: int) -> int:
    """How many rows to give N samples: products are quicker on multiples of 8."""
    return n if n < 16 else -(-n // 8) * 8


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
        z: (2, G, N', P), X and Y stacked; contiguous, fp32 or fp64, and **overwritten**. Of the N'
            rows N are samples and the rest zeros. It is fast where N <= P.
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
    whole = z
    z = whole[:, :, :n]
    _, g, _, p = z.shape
    pairs = 1.0 if weights is None else weights
    if form == "signed":
        wanted = ((intra_weight, -2), (inter_weight, -1))
        parts = tuple((weight * pairs, dim) for weight, dim in wanted if weight)
        return _signed_(whole, n, grad, center=center, parts=parts)
    columns = rows = None
    lost = z.new_zeros(2, g, 1, 1)
    if center and intra_weight:
        columns = z.mean(-2, keepdim=True)
        z -= columns
        lost += n * columns.square().sum((-2, -1), keepdim=True)
    if center and inter_weight:
        rows = z.mean(-1, keepdim=True)
        z -= rows
        lost += p * rows.square().sum((-2, -1), keepdim=True)

    x, y = z
    flat = whole.flatten(0, 1)
    grams = torch.bmm(flat, flat.mT)[:, :n, :n]
    intra = inter = grams.unflatten(0, (2, g))
    m = torch.bmm(whole[0], whole[1].mT)[:, :n, :n] if inter_weight else None
    left_out = None
    if m is not None and columns is not None and rows is not None:
        r = rows.view(2 * g, n, 1)
        intra = torch.baddbmm(grams, r, r.mT, alpha=p).view(2, g, n, n)
        # The rows c_x, c_y and 1, which D lacks.
        left_out = z.new_ones(g, 3, p)
        c = left_out[:, :2]
        c.copy_((columns - columns.mean(-1, keepdim=True)).squeeze(2).transpose(0, 1))
        cc = c @ c.mT
        (x_cx, x_cy), (y_cx, y_cy) = ((d @ c.mT).split(1, -1) for d in z)
        half = torch.stack([x_cx + cc[:, :1, :1] / 2, y_cy + cc[:, 1:, 1:] / 2])
        inter = (inter + half).add_(half.mT)
        m.add_(x_cy + cc[:, :1, 1:]).add_(y_cx.mT)

    loss = z.new_zeros(())
    of_x = of_y = None
    lacking = []
    if m is not None:
        part, of_x, of_y = _relation(inter, m, lost, inter_weight * pairs, form)
        loss += part
        lacking = [of_x.sum(-1, keepdim=True), of_y.sum(-1, keepdim=True)]
    if intra_weight:
        part, of_k, of_l = _relation(intra, None, lost, intra_weight * pairs, form)
        loss += part
        alone = of_k.add_(of_l)
        if rows is not None:
            lacking.append(alone @ rows[0])
        of_x = alone if of_x is None else of_x.add_(alone)
    if grad is None or of_x is None:
        return loss
    torch.bmm(of_x, x, out=grad)
    if of_y is not None:
        grad.baddbmm_(of_y, y)
    if left_out is not None:
        grad.baddbmm_(torch.cat(lacking, -1), left_out)
    return loss
