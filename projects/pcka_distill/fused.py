r"""1 - CKA of many pairs at once, with its gradient: four products, and no graph.

What :mod:`pcka_distill.functional` defines, for the case that training spends its time in: the
plain (biased) estimator, against a teacher that is a constant. The letters are those of its
legend; X is the student's, Y the teacher's. With K = X X^T, L = Y Y^T and M = X Y^T, all N x N,

    intra CKA = <K, L> / (|K| |L|)        inter CKA = |M|^2 / (|K| |L|)

since <X^T X, Y^T Y> = |X Y^T|^2 and |X^T X| = |X X^T|: three products serve both, however large
P is. One more, with X and Y stacked, makes the gradients,

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
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "FORMS",
    "BandedResize",
    "Resize",
    "dissimilarity",
    "dissimilarity_",
    "padded",
    "rows_of",
    "sides",
    "workspace",
]

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


@functools.lru_cache(maxsize=1024)
def _bands(
    size: int, to: int, width: int | None, backward: bool, dtype: torch.dtype, device: torch.device
) -> Bands:
    """A bilinear resize of one side, or its gradient's, in bands; none if its size stays.

    Args:
        size: of what is resized.
        to: its new size.
        width: outputs of a band, at most; None for a single band of all.
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
    if width is None:
        # Nothing is asked of the matrix, for which a device would have to be waited for.
        return ((slice(None), slice(None), matrix),)
    bands = []
    for start in range(0, len(matrix), width):
        outputs = slice(start, min(start + width, len(matrix)))
        used = matrix[outputs].any(0).nonzero()
        inputs = slice(int(used.min()), int(used.max()) + 1)
        bands.append((outputs, inputs, matrix[outputs, inputs].contiguous()))
    return tuple(bands)


class Resize:
    """Bilinear resize of maps of one shape (B, C, H, W), and its gradient, in a few launches.

    Args:
        shape: (B, C, H, W) of what is resized.
        to: its new sides.
        like: a tensor of the type and on the device to work in.
    """

    def __init__(self, shape: torch.Size, to: tuple[int, int], like: Tensor) -> None:
        self.shape, self.to, self.like = shape, to, like

    def bands(self, by_row: int | None, by_column: int | None, backward: bool) -> tuple[Bands, ...]:
        """Those of either side, see :func:`_bands`."""
        h, w = self.shape[-2:]
        facts = (backward, self.like.dtype, self.like.device)
        return _bands(h, self.to[0], by_row, *facts), _bands(w, self.to[1], by_column, *facts)

    def __call__(self, x: Tensor) -> Tensor:
        """The resized maps (B, C, H', W') of x."""
        x = x.to(self.like.dtype)
        return F.interpolate(x, size=self.to, mode="bilinear", align_corners=False)

    def maps(self) -> Tensor:
        """Room for the gradient of the resized maps (B, C, H', W')."""
        return self.like.new_empty(*self.shape[:2], *self.to)

    def gradient(self, maps: Tensor) -> Tensor:
        """The gradient (B, C, H, W) of x, of that which was written into :meth:`maps`."""
        # A product for each side: what torch has for it adds up in another order in every run.
        rows, columns = self.bands(None, None, backward=True)
        for _, _, m in rows:
            maps = m @ maps
        for _, _, m in columns:
            maps = maps @ m.mT
        return maps


class BandedResize(Resize):
    """The same in a core's caches, where values are moved as seldom as can be.

    A resize is linear and separable. Each row of the outcome is a sum of two, an embedding bag, that
    takes them from wherever they are; columns are products with a band matrix. All methods work in
    the same memory: what one returns holds until another is called.
    """

    def __init__(self, shape: torch.Size, to: tuple[int, int], like: Tensor) -> None:
        super().__init__(shape, to, like)
        b, c, _, w = shape
        # A row of all images in a run, so that patches are cut in long ones.
        self._tall = like.new_empty(c, to[0], b, w)
        self._maps = like.new_empty(c, to[0], b, to[1])
        # Narrow bands have few zeros, and each is a call.
        self._forward, self._backward = (self.bands(None, 16, x)[1] for x in (False, True))

    def _sum_rows(self, table: Tensor, strides: Sequence[int], backward: bool) -> Tensor:
        """Resize the height, or make the gradient of that.

        Args:
            table: (rows, W).
            strides: in rows of it, of images, channels and the rows of a map.
            backward: see :func:`_bands`.

        Returns:
            (C, H', B, W), or of the gradient (C, H, B, W).
        """
        b, c, h, _ = self.shape
        index, weights = _bags(h, self.to[0], backward, self.like.dtype, (b, c), tuple(strides))
        sums = F.embedding_bag(index, table, mode="sum", per_sample_weights=weights)
        return sums.view(c, -1, b, table.shape[1])

    def __call__(self, x: Tensor) -> Tensor:
        x = x.detach().to(self.like.dtype)
        width = x.shape[3]
        if x.stride(3) != 1 or any(stride % width for stride in x.stride()[:3]):
            x = x.contiguous()
        strides = [stride // width for stride in x.stride()[:3]]
        rows = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides))
        tall = self._sum_rows(x.as_strided((rows, width), (width, 1)), strides, False)
        if self._forward:
            _products(tall, self._forward, self._maps)
        else:
            self._maps = tall
        return self.maps()

    def maps(self) -> Tensor:
        return self._maps.permute(2, 0, 1, 3)

    def gradient(self, maps: Tensor) -> Tensor:
        tall = self._maps
        if self._backward:
            tall = _products(tall, self._backward, self._tall)
        _, rows, images, width = tall.shape
        strides = (1, rows * images, images)
        return self._sum_rows(tall.view(-1, width), strides, True).permute(2, 0, 1, 3)


def _products(x: Tensor, bands: Bands, out: Tensor) -> Tensor:
    """Out (..., W'), made of x (..., W) band by band."""
    rows, made = x.flatten(0, -2), out.flatten(0, -2)
    for outputs, inputs, matrix in bands:
        torch.mm(rows[:, inputs], matrix.mT, out=made[:, outputs])
    return out


@functools.lru_cache(maxsize=256)
def _bags(
    size: int,
    to: int,
    backward: bool,
    dtype: torch.dtype,
    count: tuple[int, int],
    strides: tuple[int, int, int],
) -> tuple[Tensor, Tensor]:
    """Which rows make a row, and their weights, (C * outputs * B, K) each; see :func:`_bands`.

    Args:
        size: of what is resized.
        to: its new size.
        backward: of the gradient.
        dtype: of the weights.
        count: B and C.
        strides: of images, channels and rows.
    """
    bands = _bands(size, to, None, backward, dtype, torch.device("cpu"))
    matrix = bands[0][2] if bands else torch.eye(size, dtype=dtype)
    used = matrix != 0
    most = int(used.sum(1).max())
    # Those that are used come first; one that is not has the weight 0.
    inputs = used.sort(dim=1, descending=True, stable=True).indices[:, :most]
    weights = matrix.gather(1, inputs)
    image, channel = (n_stride[1] * torch.arange(n_stride[0]) for n_stride in zip(count, strides))
    index = channel[:, None, None, None] + image[:, None] + strides[2] * inputs[:, None]
    weights = weights[:, None].expand(index.shape)
    return index.flatten(0, 2).int(), weights.flatten(0, 2)


def _dead(square: Tensor, means: Sequence[tuple[Tensor, int]]) -> Tensor:
    """Where sums of squares are no more than the rounding errors of what was taken out before.

    NaN and infinity must stay visible: compared to anything they are False.

    Args:
        square: (..., G, 1, 1).
        means: (2, G, ...), that were taken out, and of how many values each.
    """
    info = torch.finfo(square.dtype)
    for mean, n in means:
        lost = torch.linalg.vector_norm(mean, dim=(-2, -1), keepdim=True)
        square = torch.addcmul(square, lost, lost, value=-n * (16 * info.eps) ** 2)
    return square < info.tiny


def _signed_(
    both: Tensor,
    grad: Tensor | None,
    weight: Sequence[float | Tensor],
    dims: Sequence[int],
    *,
    center: bool,
) -> Tensor:
    """weight * (1 - <X, Y> / (|X| |Y|)), X and Y centred over a dimension, summed.

    Args:
        both: (2, G, N, P), X and Y.
        grad: see :func:`dissimilarity_`.
        weight: a number or (1 or G, 1, 1), of each dimension.
        dims: the dimensions to centre over.
        center: whether to.
    """
    losses = []
    for i, (weight_, dim) in enumerate(zip(weight, dims)):
        x, means = both, []
        if center:
            mean = x.mean(dim, keepdim=True)
            # The last relation may overwrite what no other reads any more.
            x = x - mean if i + 1 < len(dims) else x.sub_(mean)
            means.append((mean, x.shape[dim]))
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        dead = _dead(norm.square(), means)
        norm.masked_fill_(dead, math.inf)
        x = x.div_(norm) if center or i + 1 == len(dims) else x / norm
        similarity = (x[0] * x[1]).sum((-2, -1), keepdim=True)
        losses.append((weight_ * (1 - similarity).masked_fill_(dead[1], 0)).sum())
        if grad is not None:
            made = torch.mul(x[0], similarity, out=grad if i == 0 else None).sub_(x[1])
            scale = weight_ / norm[0]
            made.mul_(scale) if i == 0 else grad.addcmul_(made, scale)
    return sum(losses[1:], losses[0])


def _stacked(weight: Sequence[float | Tensor], like: Tensor) -> float | Tensor:
    """What multiplies (1 or 2, G, 1, 1) by the weight of each relation."""
    first = weight[0]
    if all(x is first or (isinstance(x, float) and x == first) for x in weight):
        return first
    made = torch.empty_like(like)
    for row, x in zip(made, weight):
        # Filled where it is: sending a number to a GPU makes the processor wait for it.
        row.copy_(x) if isinstance(x, Tensor) else row.fill_(x)
    return made


def padded(n: int) -> int:
    """How many rows to give N samples: products are quicker on multiples of 8."""
    return n if n < 16 else -(-n // 8) * 8


def rows_of(n: int, apart: bool) -> int:
    """R, the rows of a :func:`workspace`."""
    return 2 * padded(n) + 3 * apart


def workspace(groups: int, n: int, p: int, like: Tensor, *, apart: bool) -> Tensor:
    """What :func:`dissimilarity_` works in, of a tensor's type and on its device.

    Args:
        groups: G.
        n: N.
        p: P.
        like: such a tensor.
        apart: whether both relations are wanted, each centred in its way.

    Returns:
        (G, R, P): rows of X, as many of Y, and if apart three for what centring takes out, so that
        one product with all of them makes the gradient.
    """
    z = like.new_zeros(groups, rows_of(n, apart), p)
    if apart:
        z[:, -1].fill_(1)
    return z


def sides(z: Tensor, n: int) -> Tensor:
    """X and Y in a :func:`workspace`, (2, G, N, P)."""
    return z[:, : 2 * padded(n)].unflatten(1, (2, -1))[:, :, :n].transpose(0, 1)


def dissimilarity_(
    z: Tensor,
    n: int,
    grad: Tensor | None,
    weight: Sequence[float | Tensor],
    *,
    intra: bool,
    inter: bool,
    center: bool,
    form: str = "cka",
) -> Tensor:
    """Weighted 1 - CKA of X and Y (intra), of their transposes (inter), or both.

    Args:
        z: a :func:`workspace`, fp32 or fp64, X and Y in its :func:`sides`; **overwritten**. It is
            fast where N <= P.
        n: N.
        grad: (G, N, P), written: the gradient with respect to X; None leaves it out.
        weight: a number or (1 or G, 1, 1), of each relation that is wanted, of every pair.
        intra: whether the one is wanted.
        inter: whether the other is; one of them has to be.
        center: centre over N for intra, over P for inter.
        form: what to make of a CKA, one of :data:`FORMS`.

    Returns:
        the sum of the losses over G, a scalar.
    """
    both = sides(z, n)
    _, g, _, p = both.shape
    if form == "signed":
        dims = [dim for dim, wanted in ((-2, intra), (-1, inter)) if wanted]
        return _signed_(both, grad, weight, dims, center=center)

    # Every operation on a GPU costs the time of its launch: there are as few as can be.
    columns = rows = None
    means = []
    if center and intra:
        columns = both.mean(-2, keepdim=True)
        both -= columns
        means.append((columns, n))
    if center and inter:
        rows = both.mean(-1, keepdim=True)
        both -= rows
        means.append((rows, p))

    end = padded(n)
    x, y = z[:, :end], z[:, end : 2 * end]
    products = z.new_empty(2 + inter, g, end, end)
    for side, out in zip((x, y), products):
        torch.bmm(side, side.mT, out=out)
    if inter:
        torch.bmm(x, y.mT, out=products[2])
    products = products[..., :n, :n]
    # K and L of one or each of the relations, (1 or 2, 2, G, N, N), and M.
    grams, m = products[None, :2], products[-1]
    apart = None
    if columns is not None and rows is not None:
        # The rows c_x, c_y and 1, which D lacks.
        c = z[:, -3:-1]
        c.copy_((columns - columns.mean(-1, keepdim=True)).squeeze(2).transpose(0, 1))
        cc = c @ c.mT
        # Of either c with D of either side: (G, 2, 2, N).
        dc = (c @ z[:, : 2 * end].mT).unflatten(2, (2, -1))[..., :n]
        m += (dc[:, 1, 0] + cc[:, 0, 1, None])[..., None]
        m += dc[:, 0, 1, None]
        apart = z.new_empty(2, 2, g, n, n)
        torch.addcmul(grams[0], rows, rows.mT, value=p, out=apart[0])
        own = dc.diagonal(dim1=1, dim2=2).permute(2, 0, 1)
        torch.add(grams[0], own[..., None], out=apart[1])
        own = own + cc.diagonal(dim1=1, dim2=2).mT[..., None]
        apart[1].add_(own[..., None, :])
        grams = apart

    trace = grams.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    dead = _dead(trace, means)
    # A CKA does not depend on the scale: Grams of unit trace can be squared, whatever theirs was.
    trace.masked_fill_(dead, math.inf)
    grams /= trace
    norms = torch.linalg.vector_norm(grams, dim=(-2, -1), keepdim=True)
    inverse = norms.masked_fill_(dead, math.inf).reciprocal_()
    product = inverse[:, 0] * inverse[:, 1]
    dots = []
    if intra:
        dots.append((grams[0, 0] * grams[0, 1]).sum((-2, -1), keepdim=True))
    if inter:
        root = trace[-1].rsqrt()
        of_m = root[0] * root[1]
        m *= of_m
        dots.append(torch.linalg.vector_norm(m, dim=(-2, -1), keepdim=True).square_())
    cka = product * (torch.stack(dots) if len(dots) > 1 else dots[0])
    weights = _stacked(weight, cka)
    loss = (weights * dissimilarity(cka, form).masked_fill_(dead[:, 1], 0)).sum()
    if grad is None:
        return loss

    # The gradient is a product with X, Y and what D lacks.
    twice = 2 * weights
    if form != "cka":
        twice = twice * _slope(cka, form)
    of_l = twice * product
    of_k = twice * inverse[:, 0].square() * cka / trace[:, 0]
    used = z if inter else x
    factor = z.new_zeros(g, n, used.shape[1])
    times_x = factor[..., :n]
    if intra:
        torch.mul(grams[0, 0], of_k[0], out=times_x)
        times_x.addcmul_(grams[0, 1], of_l[0] / trace[0, 0], value=-1)
        if rows is not None and apart is not None:
            torch.sum(times_x * rows[0].mT, -1, out=factor[..., -1])
    if inter:
        times_y = factor[..., end : end + n]
        torch.mul(m, of_l[-1] * -of_m, out=times_y)
        times_x.addcmul_(grams[-1, 0], of_k[-1])
        if apart is not None:
            torch.mul(apart[1, 0].sum(-1), of_k[1, ..., 0], out=factor[..., -3])
            torch.sum(times_y, -1, out=factor[..., -2])
    torch.bmm(factor, used, out=grad)
    return loss
