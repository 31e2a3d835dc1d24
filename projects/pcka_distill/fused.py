r"""1 - CKA of many pairs at once, with its gradient: four products, and no graph.

What :mod:`pcka_distill.functional` defines, for the case that training spends its time in: the
plain (biased) estimator, against a teacher that is a constant. The letters are those of its
legend; X is the student's, Y the teacher's. With K = X X^T, L = Y Y^T and M = X Y^T, all N x N,

    intra CKA = <K, L> / (|K| |L|)        inter CKA = |M|^2 / (|K| |L|)

since <X^T X, Y^T Y> = |X Y^T|^2 and |X^T X| = |X X^T|: three products serve both, however large
P is, and K and L are symmetric. One more, with X and Y stacked, makes the gradients,

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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "FLOOR",
    "FORMS",
    "BandedResize",
    "FusedCKA",
    "Resize",
    "cut",
    "dissimilarity",
    "padded",
]

#: what a loss makes of a CKA
FORMS = ("cka", "sqrt", "log", "signed")

# Below it the steep forms go on as straight lines, so that no slope is infinite.
FLOOR = 1e-4


def dissimilarity(cka: Tensor, form: str) -> Tensor:
    """1 - CKA, 1 - its square root, or minus its logarithm: the loss that a CKA is.

    Of the signed form, which compares no Grams, 1 - its similarity.
    """
    if form in ("cka", "signed"):
        return 1 - cka
    safe = cka.clamp(min=FLOOR)
    below = (safe - cka) / FLOOR
    if form == "sqrt":
        root = safe.sqrt()
        return 1 - root + below * (root / 2)
    return below - safe.log()


def _slope(cka: Tensor, form: str) -> Tensor | float:
    """How fast that falls as the CKA grows."""
    if form == "cka":
        return 1.0
    safe = cka.clamp(min=FLOOR)
    return 0.5 / safe.sqrt() if form == "sqrt" else 1 / safe


def _matrix(size: int, to: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(to, size) of a bilinear resize of one side."""
    eye = torch.eye(size, dtype=dtype, device=device)[None, None]
    return F.interpolate(eye, size=(to, size), mode="bilinear", align_corners=False)[0, 0]


_kept_matrix = functools.lru_cache(maxsize=256)(_matrix)


def cut(x: Tensor, patch_size: int) -> Tensor:
    """View x (B, C, H, W), of whole patches, as cells (B, C, U, p, V, p)."""
    return x.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))


class Resize:
    """Bilinear resize of maps of one shape (B, C, H, W), and its gradient, in a few launches.

    Args:
        shape: (B, C, H, W) of what is resized.
        to: its new sides, multiples of the patch's.
        patch_size: p, side of a patch.
        like: a tensor of the type and on the device to work in.
    """

    def __init__(
        self, shape: torch.Size, to: tuple[int, int], patch_size: int, like: Tensor
    ) -> None:
        self.shape, self.to, self.patch_size, self.like = shape, to, patch_size, like

    def __call__(self, x: Tensor, cells: Tensor) -> None:
        """Write the resized maps of x into cells (B, C, U, p, V, p)."""
        x = F.interpolate(x.to(self.like.dtype), size=self.to, mode="bilinear", align_corners=False)
        cells.copy_(cut(x, self.patch_size))

    def joined(self, cells: Tensor) -> Tensor:
        """What :meth:`gradient` needs of cells, which are of no more use then."""
        maps = self.like.new_empty(*self.shape[:2], *self.to)
        cut(maps, self.patch_size).copy_(cells)
        return maps

    def gradient(self, maps: Tensor, out: Tensor) -> None:
        """Write the gradient of x into out (B, C, H, W), of that of the cells, :meth:`joined`."""
        # A product for each side: what torch has for it adds up in another order in every run.
        # What is made of tensors without values, as tools do that look at shapes, is not kept.
        make = _kept_matrix if type(self.like) is Tensor else _matrix
        rows, columns = (
            None if size == to else make(size, to, self.like.dtype, self.like.device)
            for size, to in zip(self.shape[2:], self.to)
        )
        if rows is not None:
            maps = rows.mT @ maps
        out.copy_(maps if columns is None else maps @ columns)


class BandedResize(Resize):
    """The same in a core's caches, where values are moved as seldom as can be.

    A resize is linear and separable. Each row of the outcome is a sum of two, an embedding bag,
    that takes them from wherever they are, into the order of the cells. Of these rows some columns,
    such as those of a column of patches, are products of windows with band matrices. Those of the
    gradient, too, whose rows are sums of what the cells have, joined to rows or as it is.

    Args:
        order: of the axes of the cells in memory, the slowest first. Where that is V, and the last
            one p, products write into cells themselves; otherwise they are copied once more.
    """

    def __init__(
        self,
        shape: torch.Size,
        to: tuple[int, int],
        patch_size: int,
        like: Tensor,
        order: Sequence[int],
    ) -> None:
        super().__init__(shape, to, patch_size, like)
        self._order = tuple(axis for axis in order if axis < 4)
        b, c, _, width = shape
        sizes = (b, c, to[0] // patch_size, patch_size)
        self._sizes = tuple(sizes[axis] for axis in self._order)
        self._maps = like.new_empty(math.prod(sizes), to[1])
        self._resized = width != to[1]
        # Products with a few columns are slow.
        self._by_patch: Windows = ()
        if self._resized and patch_size >= _WINDOW // 2:
            self._by_patch = _windows(width, to[1], patch_size, False, like.dtype)

    def _resize_columns(self, rows: Tensor, out: Tensor, backward: bool) -> None:
        """Write what becomes of rows (.., W) into out (.., W')."""
        width, to, dtype = self.shape[3], self.to[1], self.like.dtype
        for window in _windows(width, to, _WINDOW, backward, dtype):
            torch.bmm(window.of(rows), window.weights, out=window.made(out))

    def _by_column(self, rows: Tensor) -> Tensor:
        """Rows (.., W') as cells (V, .., p), B, C, U and p in order."""
        cells = rows.unflatten(1, (-1, self.patch_size))
        return cells.unflatten(0, self._sizes).movedim(4, 0)

    def _sum_rows(
        self, table: Tensor, strides: Sequence[int], *, backward: bool, columns: int = 1
    ) -> Tensor:
        """Resize the height, or make the gradient of that.

        Args:
            table: (rows, W).
            strides: in rows of it, of images, channels, patches, the rows of a patch, and columns.
            backward: whether to make the gradient.
            columns: as many rows of the table make one of the map, for the gradient.

        Returns:
            The rows of the cells, in order, or of (B, C, H, columns): (.., W).
        """
        b, c, h, _ = self.shape
        index, offsets, weights = _bags(
            h,
            self.to[0],
            self.like.dtype,
            (b, c, self.patch_size, columns),
            tuple(strides),
            None if backward else self._order,
        )
        return F.embedding_bag(
            index,
            table,
            offsets,
            mode="sum",
            per_sample_weights=weights,
            include_last_offset=True,
        )

    def __call__(self, x: Tensor, cells: Tensor) -> None:
        x = x.detach().to(self.like.dtype)
        table = _as_table(x)
        if table is None:
            table = x.contiguous().view(-1, x.shape[3])
            x = table.view(x.shape)
        image, channel, row = (stride // table.shape[1] for stride in x.stride()[:3])
        strides = (image, channel, row * self.patch_size, row, 0)
        rows = self._sum_rows(table, strides, backward=False)
        columns = cells.permute(4, *self._order, 5)
        if self._by_patch and columns.is_contiguous():
            out = columns.flatten(1, 4)
            for window in self._by_patch:
                first = window.to // self.patch_size
                some = out[first : first + len(window.weights)]
                torch.bmm(window.of(rows), window.weights, out=some)
            return
        if self._resized:
            self._resize_columns(rows, self._maps, backward=False)
            rows = self._maps
        columns.copy_(self._by_column(rows[:, : self.to[1]]))

    def joined(self, cells: Tensor) -> Tensor:
        p = self.patch_size
        table, columns, strides = self._maps, 1, cells.stride()
        span = 1 + sum((n - 1) * stride for n, stride in zip(cells.shape, strides))
        rows = cells.numel() // p
        # The rows of patches, as they are, unless they are short, too many, or not in a row.
        if p >= _WINDOW // 2 and rows <= _ROWS and span == cells.numel() and strides[5] == 1:
            table, columns = cells.as_strided((rows, p), (p, 1)), cells.shape[4]
            strides = tuple(stride // p for stride in strides[:5])
        else:
            self._by_column(table).copy_(cells.permute(4, *self._order, 5))
            steps = [math.prod(self._sizes[i + 1 :]) for i in range(4)]
            strides = (*(steps[self._order.index(axis)] for axis in range(4)), 0)
        maps = self._sum_rows(table, strides, backward=True, columns=columns)
        return maps.view(*self.shape[:3], self.to[1])

    def gradient(self, maps: Tensor, out: Tensor) -> None:
        if not self._resized:
            out.copy_(maps)
            return
        _, _, height, _ = self.shape
        in_rows = out.stride(3) == 1 and out.stride(1) == height * out.stride(2)
        written = out if in_rows else self.like.new_empty(self.shape)
        for image, made in zip(maps, written):
            self._resize_columns(image.flatten(0, 1), made.flatten(0, 1), backward=True)
        if not in_rows:
            out.copy_(written)


def _as_table(x: Tensor) -> Tensor | None:
    """A view (rows, W') of (B, C, H, W) in which its rows begin rows; None if there is none.

    Of a map that was cut off W' may be more than W: a little, as all of it is worked on.
    """
    width = max(x.stride(2), x.shape[3])
    if x.stride(3) != 1 or any(stride % width for stride in x.stride()[:3]):
        return None
    if width > 1.25 * x.shape[3]:
        return None
    count = 1 + sum((n - 1) * stride // width for n, stride in zip(x.shape, x.stride()[:3]))
    behind = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return x.as_strided((count, width), (width, 1)) if count * width <= behind else None


# Columns that a product makes: as many as it is fast with.
_WINDOW = 16


class _Window(NamedTuple):
    """Windows of one size, as far apart as one another.

    Attributes:
        first: column of what is resized in which the first begins.
        step: how many columns after it the next one does.
        to: column of the outcome in which what the first makes begins; the next ones follow.
        weights: (windows, inputs, outputs).
    """

    first: int
    step: int
    to: int
    weights: Tensor

    def of(self, rows: Tensor) -> Tensor:
        """(windows, .., inputs) of rows (.., W)."""
        return self._view(rows, self.weights.shape[1], self.first, self.step)

    def made(self, rows: Tensor) -> Tensor:
        """(windows, .., outputs) of rows (.., W')."""
        outputs = self.weights.shape[2]
        return self._view(rows, outputs, self.to, outputs)

    def _view(self, rows: Tensor, width: int, first: int, step: int) -> Tensor:
        size, strides = (len(self.weights), len(rows), width), (step, rows.stride(0), 1)
        return rows.as_strided(size, strides, rows.storage_offset() + first)


Windows = tuple[_Window, ...]


@functools.lru_cache(maxsize=1024)
def _windows(size: int, to: int, width: int, backward: bool, dtype: torch.dtype) -> Windows:
    """A bilinear resize of one side, or its gradient, in few batches of products of windows.

    Args:
        size: of what is resized.
        to: its new size.
        width: outputs of a window. A last one makes some once more, where they are no multiple.
        backward: of the gradient.
        dtype: of the weights.
    """
    matrix = _matrix(size, to, dtype, torch.device("cpu"))
    if backward:
        matrix = matrix.mT
    outputs, inputs = matrix.shape
    width = min(width, outputs)
    places = [min(start, outputs - width) for start in range(0, outputs, width)]
    windows = torch.stack([matrix[start : start + width] for start in places])
    used = windows.any(1).int()
    starts, ends = used.argmax(1).tolist(), (inputs - used.flip(1).argmax(1)).tolist()
    step = max(1, round(inputs * width / outputs))
    made = []
    begin = 0
    while begin < len(starts):
        # Windows drift. A batch goes on as long as one size holds them that is hardly above the
        # step, from which a window alone differs by up to two, and none leaves the map.
        first, last, count = starts[begin], ends[begin], 1
        for i in range(1, len(starts) - begin):
            low = min(first, starts[begin + i] - i * step)
            high = max(last, ends[begin + i] - i * step)
            apart = places[begin + i] - places[begin] == i * width
            if not apart or low < 0 or high + i * step > inputs or high - low > step + 3:
                break
            first, last, count = low, high, i + 1
        weights = torch.stack(
            [windows[begin + i, :, first + i * step : last + i * step].mT for i in range(count)]
        )
        made.append(_Window(first, step, places[begin], weights))
        begin += count
    return tuple(made)


# Rows of patches that are taken from where they are: each has its places and weights kept.
_ROWS = 1 << 16


# A batch of one size has some twenty; of all channels at once each may take megabytes.
@functools.lru_cache(maxsize=32)
def _bags(
    size: int,
    to: int,
    dtype: torch.dtype,
    count: tuple[int, int, int, int],
    strides: tuple[int, ...],
    order: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows of a table make each of the outcome, where these begin, and their weights.

    Args:
        size: H, of what is resized.
        to: its new size.
        dtype: of the weights.
        count: B, C, p and the columns, of which only the gradient has more than one.
        strides: in rows of the table, of images, channels, patches, rows of a patch and columns.
        order: of (B, C, U, p) in the outcome. None for the gradient: (B, C, H, columns).
    """
    matrix = _matrix(size, to, dtype, torch.device("cpu"))
    if order is None:
        matrix = matrix.mT
    used = matrix != 0
    # Those that are used come first, as many of each row as the most that any uses.
    inputs = used.sort(dim=1, descending=True, stable=True).indices[:, : int(used.sum(1).max())]
    weights = matrix.gather(1, inputs)[:, None]
    b, c, p, columns = count
    inputs = inputs[:, None]
    places = (
        torch.arange(b)[:, None, None, None, None],
        torch.arange(c)[:, None, None, None],
        inputs // p,
        inputs % p,
        torch.arange(columns)[:, None],
    )
    # (B, C, rows, columns, inputs)
    index = functools.reduce(torch.add, (x * stride for x, stride in zip(places, strides)))
    weights = weights.expand(index.shape)
    if order is not None:
        index, weights = (
            x.squeeze(3).unflatten(2, (-1, p)).permute(*order, 4) for x in (index, weights)
        )
    used = weights != 0
    offsets = F.pad(used.sum(-1).flatten().cumsum(0), (1, 0))
    return index[used].int(), offsets.int(), weights[used]


def _dead(square: Tensor, means: Sequence[tuple[Tensor, int]]) -> Tensor:
    """Where sums of squares are no more than the rounding errors of what was taken out before.

    NaN and infinity must stay visible: compared to anything they are False.

    Args:
        square: (..., G, 1).
        means: (2, G, ...), that were taken out, as rows, and of how many values each.
    """
    info = torch.finfo(square.dtype)
    for mean, n in means:
        lost = torch.linalg.vector_norm(mean, dim=-1, keepdim=True)
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
        grad: (G, N, P), written: the gradient with respect to X; None leaves it out.
        weight: a number or (1 or G, 1), of each dimension.
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
            means.append((mean.flatten(2), x.shape[dim]))
        norm = torch.linalg.vector_norm(x, dim=(-2, -1))[..., None]
        dead = _dead(norm.square(), means)
        norm.masked_fill_(dead, math.inf)
        length = norm[..., None]
        x = x.div_(length) if center or i + 1 == len(dims) else x / length
        similarity = (x[0] * x[1]).sum((-2, -1))[:, None]
        losses.append((weight_ * (1 - similarity).masked_fill_(dead[1], 0)).sum())
        if grad is not None:
            made = torch.mul(x[0], similarity[..., None], out=grad if i == 0 else None).sub_(x[1])
            scale = (weight_ / norm[0])[..., None]
            made.mul_(scale) if i == 0 else grad.addcmul_(made, scale)
    return sum(losses[1:], losses[0])


def _stacked(weight: Sequence[float | Tensor], like: Tensor) -> float | Tensor:
    """What multiplies (1 or 2, G, 1) by the weight of each relation."""
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


def _apart(intra: bool, inter: bool, center: bool, form: str) -> bool:
    """Whether there are Grams of both relations, each centred in its way."""
    return intra and inter and center and form != "signed"


def _rows_of(n: int, apart: bool) -> int:
    """Rows of X, as many of Y, and if apart three for what centring takes out.

    One product with all of them makes the gradient.
    """
    return 2 * padded(n) + 3 * apart


# Rows of a Gram that are made at a time, where only one half of it is.
_BAND = 64
# X, Y^T, where to make their product, and what to copy of it: (where to, what).
Product = tuple[Tensor, Tensor, Tensor, tuple[tuple[Tensor, Tensor], ...]]


def _gram_products(x: Tensor, gram: Tensor, height: int, room: Tensor) -> list[Product]:
    """The products that make X X^T of (G, N, P) in (G, N, N), so many rows at a time.

    Where that is less than all of them the part above the diagonal is copied, and a product is made
    in a room of G * height * N: it is fast into memory of its own alone.
    """
    g, n, _ = x.shape
    if height >= n:
        return [(x, x.mT, gram, ())]
    made = []
    for start in range(0, n, height):
        end = min(start + height, n)
        band = room[: g * (end - start) * end].view(g, -1, end)
        copies = [(gram[:, start:end, :end], band)]
        if start:
            copies.append((gram[:, :start, start:end], band[..., :start].mT))
        made.append((x[:, start:end], x[:, :end].mT, band, tuple(copies)))
    return made


class FusedCKA:
    """Weighted 1 - CKA of X and Y (intra), of their transposes (inter), or both.

    It works in memory of its own, all views of which are made once: on a CPU the many steps of a
    large map share it, and there a view costs as much as an operation on a few numbers.

    Args:
        groups: G.
        n: N. It is fast where that is the smaller side, or hardly larger.
        p: P.
        like: a tensor of the type, fp32 or fp64, and on the device to work in.
        gradient: whether to make the gradient.
        intra: whether the one relation is wanted.
        inter: whether the other is; one of them has to be.
        center: centre over N for intra, over P for inter.
        form: what to make of a CKA, one of :data:`FORMS`.
        in_caches: the sides are (2, padded N, G, P) in memory, so that one sample of all G is
            written at once; and of large Grams, which are symmetric, one half is made, and copied:
            less work, in more operations.

    Attributes:
        sides: (2, G, N, P), X and Y, to be written before each call, which **overwrites** them.
        grad: (G, N, P), the gradient with respect to X, written by each call; None without.
    """

    def __init__(
        self,
        groups: int,
        n: int,
        p: int,
        like: Tensor,
        *,
        gradient: bool,
        intra: bool,
        inter: bool,
        center: bool,
        form: str = "cka",
        in_caches: bool = False,
    ) -> None:
        self.intra, self.inter, self.center, self.form = intra, inter, center, form
        self.gradient, self.in_caches = gradient, in_caches
        self.grad: Tensor | None = None
        rows = _rows_of(n, _apart(intra, inter, center, form))
        if in_caches:
            self._z = like.new_zeros(rows, groups, p).transpose(0, 1)
        else:
            self._z = like.new_zeros(groups, rows, p)
        self.sides = self._z[:, : 2 * padded(n)].unflatten(1, (2, -1))[:, :, :n].transpose(0, 1)
        self._prepared = False

    def _prepare(self) -> None:
        """Make the rest: by now a GPU has freed what the sides were made of."""
        self._prepared = True
        z, intra, inter = self._z, self.intra, self.inter
        _, groups, n, p = self.sides.shape
        if self.gradient:
            self.grad = z.new_empty(groups, n, p)
        if self.form == "signed":
            return
        end, apart = padded(n), _apart(intra, inter, self.center, self.form)
        # The means over an axis; the same as rows, and of how many values each is one.
        self._means: list[tuple[int, Tensor]] = []
        self._lost: list[tuple[Tensor, int]] = []
        for wanted, axis, shape, count in ((intra, -2, (1, p), n), (inter, -1, (n, 1), p)):
            if wanted and self.center:
                mean = z.new_empty(2, groups, *shape)
                self._means.append((axis, mean))
                self._lost.append((mean.flatten(2), count))
        x, y = z[:, :end], z[:, end : 2 * end]
        products = z.new_empty(2 + inter, groups, end, end)
        bands = -(-n // _BAND) if self.in_caches else 1
        height = padded(-(-end // bands))
        room = z.new_empty(groups * height * end if bands > 1 else 0)
        self._products = [
            *_gram_products(x, products[0], height, room),
            *_gram_products(y, products[1], height, room),
        ]
        if inter:
            self._products.append((x, y.mT, products[2], ()))
        # What is padding adds nothing to these Grams, but it would to centred ones.
        width = n if apart else end
        grams, m = products[None, :2, :, :n, :width], products[-1, :, :n, :width]
        self._unscaled_m, self._apart = m, None
        if apart:
            (_, columns), (_, rows) = self._means
            self._apart = _Apart(z, columns, rows, grams[0], self._products.pop()[:3])
            grams, m = self._apart.grams, torch.empty_like(m)
        # As rows: K and L of one or each of the relations (1 or 2, 2, G, ...), M (G, ...).
        self._grams, self._m = grams.flatten(-2), m.flatten(-2)
        self._diagonals = self._grams[..., :: width + 1]
        self._scaled_m, self._room = m, torch.empty_like(m)
        self._flat_room = self._room.flatten(-2)
        if self.gradient:
            self._of_x = (grams[0, 0], grams[0, 1], grams[-1, 0])
            self._used = z if inter else x
            self._factor = z.new_zeros(groups, n, self._used.shape[1])
            self._times_x = self._factor[..., :width]
            self._times_y = self._factor[..., end : end + width]
            self._times_c = self._factor[..., -3:].unbind(-1)

    @staticmethod
    def values(n: int, p: int, *, intra: bool, inter: bool, center: bool, form: str) -> int:
        """How many values one of the G takes, about."""
        end, apart = padded(n), _apart(intra, inter, center, form)
        return (_rows_of(n, apart) + n) * p + (11 if apart else 7) * end**2

    def __call__(self, weight: Sequence[float | Tensor]) -> Tensor:
        """The sum of the losses over G, a scalar.

        Args:
            weight: a number or (1 or G, 1), of each relation that is wanted, of every pair.
        """
        if not self._prepared:
            self._prepare()
        if self.form == "signed":
            dims = [dim for dim, wanted in ((-2, self.intra), (-1, self.inter)) if wanted]
            return _signed_(self.sides, self.grad, weight, dims, center=self.center)
        # Every operation on a GPU costs the time of its launch: there are as few as can be.
        for axis, mean in self._means:
            torch.mean(self.sides, axis, keepdim=True, out=mean)
            self.sides.sub_(mean)
        for a, b, out, copies in self._products:
            torch.bmm(a, b, out=out)
            for to, made in copies:
                to.copy_(made)
        if self._apart is not None:
            self._apart.make()

        grams = self._grams
        trace = self._diagonals.sum(-1, keepdim=True)
        dead = _dead(trace, self._lost)
        # A CKA does not depend on the scale: Grams of unit trace can be squared, whatever theirs
        # was.
        trace.masked_fill_(dead, math.inf)
        grams.div_(trace)
        norms = torch.linalg.vector_norm(grams, dim=-1, keepdim=True)
        inverse = norms.masked_fill_(dead, math.inf).reciprocal_()
        product = inverse[:, 0] * inverse[:, 1]
        dots = []
        if self.intra:
            products = torch.mul(grams[0, 0], grams[0, 1], out=self._flat_room)
            dots.append(products.sum(-1, keepdim=True))
        if self.inter:
            root = trace[-1].rsqrt()
            of_m = root[0] * root[1]
            torch.mul(self._unscaled_m, of_m[..., None], out=self._scaled_m)
            dots.append(torch.linalg.vector_norm(self._m, dim=-1, keepdim=True).square_())
        cka = product * (torch.stack(dots) if len(dots) > 1 else dots[0])
        weights = _stacked(weight, cka)
        loss = (weights * dissimilarity(cka, self.form).masked_fill_(dead[:, 1], 0)).sum()
        if self.grad is None:
            return loss

        # The gradient is a product with X, Y and what D lacks.
        twice = 2 * weights
        if self.form != "cka":
            twice = twice * _slope(cka, self.form)
        of_l = (twice * product)[..., None]
        of_k = (twice * inverse[:, 0].square() * cka / trace[:, 0])[..., None]
        k, l, inter_k = self._of_x
        times_x, times_y = self._times_x, self._times_y
        # Not centred both relations have one K.
        shared = self._apart is None and len(of_k) > 1
        torch.mul(k, of_k.sum(0) if shared else of_k[0], out=times_x)
        if self.intra:
            times_x.addcmul_(l, of_l[0] / trace[0, 0, ..., None], value=-1)
            if self._apart is not None:
                torch.mul(times_x, self._apart.row_of_x, out=self._room)
                torch.sum(self._room, -1, out=self._times_c[2])
                times_x.addcmul_(inter_k, of_k[-1])
        if self.inter:
            torch.mul(self._scaled_m, of_l[-1] * -of_m[..., None], out=times_y)
            if self._apart is not None:
                torch.mul(inter_k.sum(-1), of_k[1, ..., 0], out=self._times_c[0])
                torch.sum(times_y, -1, out=self._times_c[1])
        torch.bmm(self._factor, self._used, out=self.grad)
        return loss


class _Apart:
    """The Grams of both relations, each centred in its way, of those of D.

    Args:
        z: (G, rows, P), those of X and Y, which are D, and three more: c_x, c_y and 1.
        columns: (2, G, 1, P), the means that D lacks of either side.
        rows: (2, G, N, 1), likewise.
        plain: (2, G, N, N), the Grams of D.
        mixed: X, Y^T and where M belongs, with their padding.

    Attributes:
        grams: (2, 2, G, N, N), of intra and inter, of X and Y; and M is in its place.
        row_of_x: (G, 1, N), the means of X.
    """

    def __init__(
        self,
        z: Tensor,
        columns: Tensor,
        rows: Tensor,
        plain: Tensor,
        mixed: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        self._rows, self._plain, self._mixed = (rows, rows.mT), plain, mixed
        self._count = z.shape[2]
        self.grams = plain.new_empty(2, *plain.shape)
        self.row_of_x = rows[0].mT
        z[:, -1].fill_(1)
        c = z[:, -3:-1]
        self._c = (columns.squeeze(2), c.transpose(0, 1))
        # Of either c with D of either side, and with either c.
        of_c = z.new_empty(len(z), 2, z.shape[1] - 1)
        self._of_c = (c, z[:, :-1].mT, of_c)
        d, cc = of_c[..., :-2].unflatten(2, (2, -1)), of_c[..., -2:]
        self._of_m = (d[:, 1, 0, :, None], cc[:, 0, 1, None, None], d[:, 0, 1, None])
        self._own = d.diagonal(dim1=1, dim2=2).permute(2, 0, 1)[..., : plain.shape[-1]]
        self._squares = cc.diagonal(dim1=1, dim2=2).mT[..., None]

    def make(self) -> None:
        """Make them, and M."""
        columns, c = self._c
        torch.sub(columns, columns.mean(-1, keepdim=True), out=c)
        c, others, of_c = self._of_c
        torch.bmm(c, others, out=of_c)
        x, y, m = self._mixed
        of_x, square, of_y = self._of_m
        torch.add(of_x + square, of_y, out=m)
        m.baddbmm_(x, y)
        intra, inter = self.grams
        torch.addcmul(self._plain, *self._rows, value=self._count, out=intra)
        torch.add(self._plain, self._own[..., None], out=inter)
        inter.add_((self._own + self._squares)[..., None, :])
