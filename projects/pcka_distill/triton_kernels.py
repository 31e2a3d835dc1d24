"""The kernels of :mod:`pcka_distill.kernels`, in Triton's language.

Sums are added up in one order always. A kernel is compiled once for each set of the arguments that
are in capitals.
"""

# Lists of arguments are long here; a line for each of them would hide the rest.
# fmt: off

from typing import Any

import triton
import triton.language as tl

__all__ = ["spread", "sum_columns", "sum_grams", "write_factors", "write_sides"]


def _jit(*kept: str) -> Any:
    """Compile a kernel once, not for every size of a map that 16 divides, or does not."""

    def make(function: Any) -> Any:
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        free = [
            name
            for name in names
            if not name.isupper() and not name.endswith("_ptr") and name not in kept
        ]
        return triton.jit(function, do_not_specialize=free)

    return make


@triton.jit
def _source(place, side, scale, RESIZED: tl.constexpr):
    """Where a row or column of a resized map comes from: two places, and the second's share."""
    if RESIZED:
        at = tl.maximum((place.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
        first = at.to(tl.int32)
        return first, tl.minimum(first + 1, side - 1), at - first.to(tl.float32)
    else:
        return place, place, 0.0


@triton.jit
def _row_values(base, across, stride, second, share, valid, RESIZED: tl.constexpr):
    """Values of a row at columns, each of two if it is resized."""
    value = tl.load(base + across * stride, mask=valid, other=0.0).to(tl.float32)
    if RESIZED:
        next_ = tl.load(base + second * stride, mask=valid, other=0.0).to(tl.float32)
        value = (1 - share) * value + share * next_
    return value


@triton.jit
def _tile(
    x_ptr, n, samples_ptr, features_ptr, last, n_samples, n_features, stride_b, stride_h, stride_w,
    height, width, scale_h, scale_w, ROWS_RESIZED: tl.constexpr, COLUMNS_RESIZED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some samples (.., P) of a map; 0 from the last one on."""
    feature = tl.arange(0, BLOCK)
    valid = feature < n_features
    image = tl.load(features_ptr + feature, mask=valid, other=0)[None, :]
    row = tl.load(features_ptr + n_features + feature, mask=valid, other=0)[None, :]
    column = tl.load(features_ptr + 2 * n_features + feature, mask=valid, other=0)[None, :]
    there = n < last
    image += tl.load(samples_ptr + n, mask=there, other=0)[:, None]
    row += tl.load(samples_ptr + n_samples + n, mask=there, other=0)[:, None]
    column += tl.load(samples_ptr + 2 * n_samples + n, mask=there, other=0)[:, None]
    valid = there[:, None] & valid[None, :]
    first, second, share = _source(row, height, scale_h, ROWS_RESIZED)
    left, right, part = _source(column, width, scale_w, COLUMNS_RESIZED)
    base = x_ptr + image * stride_b
    value = _row_values(
        base + first * stride_h, left, stride_w, right, part, valid, COLUMNS_RESIZED
    )
    if ROWS_RESIZED:
        below = _row_values(
            base + second * stride_h, left, stride_w, right, part, valid, COLUMNS_RESIZED
        )
        value = (1 - share) * value + share * below
    return value


@triton.jit
def _column_sums(
    x_ptr, samples_ptr, features_ptr, first, last, n_samples, n_features, stride_b, stride_h,
    stride_w, height, width, scale_h, scale_w, ROWS_RESIZED: tl.constexpr,
    COLUMNS_RESIZED: tl.constexpr, TALL: tl.constexpr, BLOCK: tl.constexpr,
):
    """(P,), the sum of some samples of a map."""
    sums = tl.zeros([BLOCK], tl.float32)
    # What rounding lost: of many samples it would pass for variation.
    lost = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, TALL):
        tile = _tile(
            x_ptr, start + tl.arange(0, TALL), samples_ptr, features_ptr, last, n_samples,
            n_features, stride_b, stride_h, stride_w, height, width, scale_h, scale_w, ROWS_RESIZED,
            COLUMNS_RESIZED, BLOCK,
        )
        more = tl.sum(tile, 0) - lost
        total = sums + more
        lost = (total - sums) - more
        sums = total
    return sums


@triton.jit
def _map_of(
    side, group, student_ptr, teacher_ptr, student_b, student_c, student_h, student_w, teacher_b,
    teacher_c, teacher_h, teacher_w,
):
    """Where a channel of a side begins, and the strides of its images, rows and columns."""
    if side == 0:
        x_ptr = student_ptr + group.to(tl.int64) * student_c
        stride_b, stride_h, stride_w = student_b, student_h, student_w
    else:
        x_ptr = teacher_ptr + group.to(tl.int64) * teacher_c
        stride_b, stride_h, stride_w = teacher_b, teacher_h, teacher_w
    return x_ptr, stride_b, stride_h, stride_w


@_jit("n_features")
def sum_columns(
    student_ptr, teacher_ptr, sums_ptr, samples_ptr, features_ptr, per_chunk, n_samples, n_features,
    student_b, student_c, student_h, student_w, teacher_b, teacher_c, teacher_h, teacher_w, height,
    width, scale_h, scale_w, ROWS_RESIZED: tl.constexpr, COLUMNS_RESIZED: tl.constexpr,
    TALL: tl.constexpr, BLOCK: tl.constexpr,
):
    """The sum of a chunk of the samples, for every group and side."""
    group = tl.program_id(0)
    chunk = tl.program_id(1)
    side = tl.program_id(2)
    x_ptr, stride_b, stride_h, stride_w = _map_of(
        side, group, student_ptr, teacher_ptr, student_b, student_c, student_h, student_w,
        teacher_b, teacher_c, teacher_h, teacher_w,
    )
    first = chunk * per_chunk
    sums = _column_sums(
        x_ptr, samples_ptr, features_ptr, first, tl.minimum(first + per_chunk, n_samples),
        n_samples, n_features, stride_b, stride_h, stride_w, height, width, scale_h, scale_w,
        ROWS_RESIZED, COLUMNS_RESIZED, TALL, BLOCK,
    )
    feature = tl.arange(0, BLOCK)
    to = sums_ptr + ((group * 2 + side) * tl.num_programs(1) + chunk) * n_features + feature
    tl.store(to, sums, mask=feature < n_features)


@_jit("n_features")
def write_sides(
    student_ptr, teacher_ptr, z_ptr, lost_ptr, squares_ptr, sums_ptr, samples_ptr, features_ptr,
    per_chunk, n_samples, n_features, end, rows, student_b, student_c, student_h, student_w,
    teacher_b, teacher_c, teacher_h, teacher_w, height, width, scale_h, scale_w,
    ROWS_RESIZED: tl.constexpr, COLUMNS_RESIZED: tl.constexpr, OVER_SAMPLES: tl.constexpr,
    OVER_FEATURES: tl.constexpr, APART: tl.constexpr, ALONE: tl.constexpr, TALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A chunk of X and of Y of every group, and what centring takes out of them."""
    group = tl.program_id(0)
    chunk = tl.program_id(1)
    chunks = tl.num_programs(1)
    side = tl.program_id(2)
    x_ptr, stride_b, stride_h, stride_w = _map_of(
        side, group, student_ptr, teacher_ptr, student_b, student_c, student_h, student_w,
        teacher_b, teacher_c, teacher_h, teacher_w,
    )
    feature = tl.arange(0, BLOCK)
    valid = feature < n_features
    means = tl.zeros([BLOCK], tl.float32)
    if OVER_SAMPLES:
        if ALONE:
            means = _column_sums(
                x_ptr, samples_ptr, features_ptr, 0, n_samples, n_samples, n_features, stride_b,
                stride_h, stride_w, height, width, scale_h, scale_w, ROWS_RESIZED, COLUMNS_RESIZED,
                TALL, BLOCK,
            )
        else:
            sums_ptr += (group * 2 + side) * chunks * n_features + feature
            for i in range(0, chunks):
                means += tl.load(sums_ptr + i * n_features, mask=valid, other=0.0)
        means = means / n_samples
    c = means
    if APART:
        c = tl.where(valid, means - tl.sum(means, 0) / n_features, 0.0)
    z_ptr += group.to(tl.int64) * rows * n_features
    place = (group * 2 + side) * end
    first = chunk * per_chunk
    for start in range(first, tl.minimum(first + per_chunk, end), TALL):
        n = start + tl.arange(0, TALL)
        tile = _tile(
            x_ptr, n, samples_ptr, features_ptr, n_samples, n_samples, n_features, stride_b,
            stride_h, stride_w, height, width, scale_h, scale_w, ROWS_RESIZED, COLUMNS_RESIZED,
            BLOCK,
        )
        inside = (n < n_samples)[:, None] & valid[None, :]
        if OVER_SAMPLES:
            tile = tl.where(inside, tile - means[None, :], 0.0)
        if OVER_FEATURES:
            mean = tl.sum(tile, 1) / n_features
            tile = tl.where(inside, tile - mean[:, None], 0.0)
            tl.store(lost_ptr + place + n, mean, mask=n < end)
        to = z_ptr + (side * end + n)[:, None] * n_features + feature[None, :]
        tl.store(to, tile, mask=(n < end)[:, None] & valid[None, :])
    if chunk == 0:
        tl.store(squares_ptr + group * 2 + side, tl.sum(means * means, 0))
        if APART:
            extra = z_ptr + 2 * end * n_features + feature
            tl.store(extra + side * n_features, c, mask=valid)
            if side == 0:
                tl.store(extra + 2 * n_features, tl.where(valid, 1.0, 0.0), mask=valid)
                for i in range(3, 8):
                    tl.store(extra + i * n_features, tl.zeros([BLOCK], tl.float32), mask=valid)


@triton.jit
def _alive(
    trace, of_columns, of_rows, n, p, tiny, limit, OVER_SAMPLES: tl.constexpr,
    OVER_FEATURES: tl.constexpr,
):
    """Whether a side varies by more than the rounding errors of its means. NaN does."""
    square = trace
    if OVER_SAMPLES:
        square -= n * limit * of_columns
    if OVER_FEATURES:
        square -= p * limit * of_rows
    return (square < tiny) == 0


@triton.jit
def _traces(
    of_x_ptr, of_y_ptr, mine_ptr, squares_ptr, n, p, end, row_x, row_y, tiny, limit,
    APART: tl.constexpr, OVER_SAMPLES: tl.constexpr, OVER_FEATURES: tl.constexpr,
    DOWN: tl.constexpr,
):
    """The reciprocals of the traces of K and L of intra, and of inter; 0 of what is dead.

    A CKA does not depend on the scale: Grams of unit trace can be squared, whatever theirs
    was. Also |c_x|^2, |c_y|^2 and <c_x, c_y>.
    """
    of_k = tl.zeros([DOWN], tl.float32)
    of_l = tl.zeros([DOWN], tl.float32)
    of_a = tl.zeros([DOWN], tl.float32)
    of_b = tl.zeros([DOWN], tl.float32)
    of_r = tl.zeros([DOWN], tl.float32)
    of_s = tl.zeros([DOWN], tl.float32)
    for start in range(0, n, DOWN):
        i = start + tl.arange(0, DOWN)
        of_k += tl.load(of_x_ptr + i * (row_x + 1), mask=i < n, other=0.0)
        of_l += tl.load(of_y_ptr + i * (row_y + 1), mask=i < n, other=0.0)
        if OVER_FEATURES:
            r = tl.load(mine_ptr + i, mask=i < n, other=0.0)
            s = tl.load(mine_ptr + end + i, mask=i < n, other=0.0)
            of_r += r * r
            of_s += s * s
        if APART:
            # X times c_x, and Y times c_y.
            of_a += tl.load(of_x_ptr + i * row_x + 2 * end, mask=i < n, other=0.0)
            of_b += tl.load(of_y_ptr + i * row_y + end + 1, mask=i < n, other=0.0)
    k_trace = tl.sum(of_k, 0)
    l_trace = tl.sum(of_l, 0)
    x_rows = tl.sum(of_r, 0)
    y_rows = tl.sum(of_s, 0)
    x_columns = tl.load(squares_ptr)
    y_columns = tl.load(squares_ptr + 1)
    inter_k_trace = k_trace
    inter_l_trace = l_trace
    c_x = 0.0
    c_y = 0.0
    c_xy = 0.0
    if APART:
        c_x = tl.load(of_y_ptr + end * row_y + end)
        c_y = tl.load(of_y_ptr + (end + 1) * row_y + end + 1)
        c_xy = tl.load(of_y_ptr + end * row_y + end + 1)
        inter_k_trace += 2 * tl.sum(of_a, 0) + n * c_x
        inter_l_trace += 2 * tl.sum(of_b, 0) + n * c_y
        k_trace += p * x_rows
        l_trace += p * y_rows
    k_lives = _alive(k_trace, x_columns, x_rows, n, p, tiny, limit, OVER_SAMPLES, OVER_FEATURES)
    l_lives = _alive(l_trace, y_columns, y_rows, n, p, tiny, limit, OVER_SAMPLES, OVER_FEATURES)
    inter_k_lives = _alive(
        inter_k_trace, x_columns, x_rows, n, p, tiny, limit, OVER_SAMPLES, OVER_FEATURES
    )
    inter_l_lives = _alive(
        inter_l_trace, y_columns, y_rows, n, p, tiny, limit, OVER_SAMPLES, OVER_FEATURES
    )
    # One that is infinite makes NaN, as it has to be seen.
    return (
        tl.where(k_lives, (1 + 0 * k_trace) / k_trace, 0.0),
        tl.where(l_lives, (1 + 0 * l_trace) / l_trace, 0.0),
        tl.where(inter_k_lives, (1 + 0 * inter_k_trace) / inter_k_trace, 0.0),
        tl.where(inter_l_lives, (1 + 0 * inter_l_trace) / inter_l_trace, 0.0), c_x, c_y, c_xy,
    )


@triton.jit
def _loss_of(cka, weight, floor, FORM: tl.constexpr):
    """The weighted dissimilarity of a CKA, and how fast it falls as that grows."""
    safe = tl.where(cka < floor, floor, cka)
    below = (safe - cka) / floor
    if FORM == "sqrt":
        root = tl.sqrt(safe)
        return weight * (1 - root + below * (root / 2)), weight * (0.5 / root)
    elif FORM == "log":
        return weight * (below - tl.log(safe)), weight * (1 / safe)
    else:
        return weight * (1 - cka), weight


@triton.jit
def _grams(
    i, j, of_x_ptr, of_y_ptr, mine_ptr, n, p, end, row_x, row_y, c_x, c_y, c_xy,
    INTER: tl.constexpr, APART: tl.constexpr,
):
    """Of rows i and columns j: K and L of intra, K and L of inter, and M; 0 outside."""
    inside = (i < n)[:, None] & (j < n)[None, :]
    k = tl.load(of_x_ptr + i[:, None] * row_x + j[None, :], mask=inside, other=0.0)
    l = tl.load(of_y_ptr + i[:, None] * row_y + j[None, :], mask=inside, other=0.0)
    m = k
    if INTER:
        m = tl.load(of_x_ptr + i[:, None] * row_x + end + j[None, :], mask=inside, other=0.0)
    inter_k, inter_l = k, l
    if APART:
        x_i = tl.load(mine_ptr + i, mask=i < n, other=0.0)[:, None]
        x_j = tl.load(mine_ptr + j, mask=j < n, other=0.0)[None, :]
        y_i = tl.load(mine_ptr + end + i, mask=i < n, other=0.0)[:, None]
        y_j = tl.load(mine_ptr + end + j, mask=j < n, other=0.0)[None, :]
        # X times c_x, and Y times c_y: of the same products as what is compared to them, which may
        # be TF32's.
        a_i = tl.load(of_x_ptr + i * row_x + 2 * end, mask=i < n, other=0.0)[:, None]
        a_j = tl.load(of_x_ptr + j * row_x + 2 * end, mask=j < n, other=0.0)[None, :]
        b_i = tl.load(of_y_ptr + i * row_y + end + 1, mask=i < n, other=0.0)[:, None]
        b_j = tl.load(of_y_ptr + j * row_y + end + 1, mask=j < n, other=0.0)[None, :]
        # X times c_y, and Y times c_x.
        e_i = tl.load(of_x_ptr + i * row_x + 2 * end + 1, mask=i < n, other=0.0)[:, None]
        e_j = tl.load(of_y_ptr + j * row_y + end, mask=j < n, other=0.0)[None, :]
        inter_k = tl.where(inside, k + (a_i + (a_j + c_x)), 0.0)
        inter_l = tl.where(inside, l + (b_i + (b_j + c_y)), 0.0)
        m = tl.where(inside, m + (e_i + (e_j + c_xy)), 0.0)
        k = k + p * x_i * x_j
        l = l + p * y_i * y_j
    return k, l, inter_k, inter_l, m


@triton.jit
def _dots(
    of_x_ptr, of_y_ptr, mine_ptr, first, last, n, p, end, row_x, row_y, k_unit, l_unit,
    inter_k_unit, inter_l_unit, c_x, c_y, c_xy, INTRA: tl.constexpr, INTER: tl.constexpr,
    APART: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
):
    """|K|^2, |L|^2 and <K, L> of intra, |K|^2 and |L|^2 of inter, |M|^2, of some rows."""
    m_unit = tl.sqrt(inter_k_unit) * tl.sqrt(inter_l_unit)
    kk = tl.zeros([DOWN, ACROSS], tl.float32)
    ll = tl.zeros([DOWN, ACROSS], tl.float32)
    kl = tl.zeros([DOWN, ACROSS], tl.float32)
    inter_kk = tl.zeros([DOWN, ACROSS], tl.float32)
    inter_ll = tl.zeros([DOWN, ACROSS], tl.float32)
    mm = tl.zeros([DOWN, ACROSS], tl.float32)
    for start in range(first, last, DOWN):
        i = start + tl.arange(0, DOWN)
        for left in range(0, n, ACROSS):
            j = left + tl.arange(0, ACROSS)
            k, l, inter_k, inter_l, m = _grams(
                i, j, of_x_ptr, of_y_ptr, mine_ptr, n, p, end, row_x, row_y, c_x, c_y,
                c_xy, INTER, APART,
            )
            k *= k_unit
            l *= l_unit
            kk += k * k
            ll += l * l
            if INTRA:
                kl += k * l
            if INTER:
                m *= m_unit
                mm += m * m
            if APART:
                inter_k *= inter_k_unit
                inter_l *= inter_l_unit
                inter_kk += inter_k * inter_k
                inter_ll += inter_l * inter_l
    return (
        tl.sum(tl.sum(kk, 1), 0), tl.sum(tl.sum(ll, 1), 0), tl.sum(tl.sum(kl, 1), 0),
        tl.sum(tl.sum(inter_kk, 1), 0), tl.sum(tl.sum(inter_ll, 1), 0), tl.sum(tl.sum(mm, 1), 0),
    )


@_jit()
def sum_grams(
    of_x_ptr, of_y_ptr, dots_ptr, lost_ptr, squares_ptr, per_chunk, n, p, end, group_x, row_x,
    group_y, row_y, tiny, limit, INTRA: tl.constexpr, INTER: tl.constexpr, APART: tl.constexpr,
    OVER_SAMPLES: tl.constexpr, OVER_FEATURES: tl.constexpr, DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """What a chunk of the rows of the Grams adds to their products, for every group."""
    group = tl.program_id(0)
    chunk = tl.program_id(1)
    of_x_ptr += group.to(tl.int64) * group_x
    of_y_ptr += group.to(tl.int64) * group_y
    mine_ptr = lost_ptr + group * 2 * end
    k_unit, l_unit, inter_k_unit, inter_l_unit, c_x, c_y, c_xy = _traces(
        of_x_ptr, of_y_ptr, mine_ptr, squares_ptr + group * 2, n, p, end, row_x, row_y,
        tiny, limit, APART, OVER_SAMPLES, OVER_FEATURES, DOWN,
    )
    first = chunk * per_chunk
    kk, ll, kl, inter_kk, inter_ll, mm = _dots(
        of_x_ptr, of_y_ptr, mine_ptr, first, tl.minimum(first + per_chunk, n), n, p, end,
        row_x, row_y, k_unit, l_unit, inter_k_unit, inter_l_unit, c_x, c_y, c_xy, INTRA, INTER,
        APART, DOWN, ACROSS,
    )
    dots_ptr += (group * tl.num_programs(1) + chunk) * 6
    tl.store(dots_ptr, kk)
    tl.store(dots_ptr + 1, ll)
    tl.store(dots_ptr + 2, kl)
    tl.store(dots_ptr + 3, inter_kk)
    tl.store(dots_ptr + 4, inter_ll)
    tl.store(dots_ptr + 5, mm)


@_jit()
def write_factors(
    of_x_ptr, of_y_ptr, factors_ptr, dots_ptr, lost_ptr, squares_ptr, channels_ptr, losses_ptr,
    per_chunk, n, p, end, group_x, row_x, group_y, row_y, row_factors, intra_weight, inter_weight,
    tiny, limit, floor, INTRA: tl.constexpr, INTER: tl.constexpr, APART: tl.constexpr,
    OVER_SAMPLES: tl.constexpr, OVER_FEATURES: tl.constexpr, WEIGHTED: tl.constexpr,
    FORM: tl.constexpr, GRADIENT: tl.constexpr, ALONE: tl.constexpr, DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """The loss of a group; rows of the factors of X, Y and what D lacks in its gradient."""
    group = tl.program_id(0)
    chunk = tl.program_id(1)
    chunks = tl.num_programs(1)
    of_x_ptr += group.to(tl.int64) * group_x
    of_y_ptr += group.to(tl.int64) * group_y
    factors_ptr += group.to(tl.int64) * n * row_factors
    mine_ptr = lost_ptr + group * 2 * end
    k_unit, l_unit, inter_k_unit, inter_l_unit, c_x, c_y, c_xy = _traces(
        of_x_ptr, of_y_ptr, mine_ptr, squares_ptr + group * 2, n, p, end, row_x, row_y,
        tiny, limit, APART, OVER_SAMPLES, OVER_FEATURES, DOWN,
    )
    if ALONE:
        kk, ll, kl, inter_kk, inter_ll, mm = _dots(
            of_x_ptr, of_y_ptr, mine_ptr, 0, n, n, p, end, row_x, row_y, k_unit, l_unit,
            inter_k_unit, inter_l_unit, c_x, c_y, c_xy, INTRA, INTER, APART, DOWN, ACROSS,
        )
    else:
        kk = 0.0
        ll = 0.0
        kl = 0.0
        inter_kk = 0.0
        inter_ll = 0.0
        mm = 0.0
        dots_ptr += group * chunks * 6
        for other in range(0, chunks):
            kk += tl.load(dots_ptr + 6 * other)
            ll += tl.load(dots_ptr + 6 * other + 1)
            kl += tl.load(dots_ptr + 6 * other + 2)
            inter_kk += tl.load(dots_ptr + 6 * other + 3)
            inter_ll += tl.load(dots_ptr + 6 * other + 4)
            mm += tl.load(dots_ptr + 6 * other + 5)
    if not APART:
        inter_kk = kk
        inter_ll = ll
    factor = 1.0
    if WEIGHTED:
        factor = tl.load(channels_ptr + group)
    loss = 0.0
    k_factor = 0.0
    l_factor = 0.0
    inter_k_factor = 0.0
    m_factor = 0.0
    m_unit = tl.sqrt(inter_k_unit) * tl.sqrt(inter_l_unit)
    if INTRA:
        # Of what is dead the unit is 0; that of NaN is NaN, which stays.
        inverse = tl.where(k_unit == 0, 0.0, 1 / tl.sqrt(kk))
        product = tl.where(l_unit == 0, 0.0, inverse / tl.sqrt(ll))
        cka = product * kl
        part, slope = _loss_of(cka, factor * intra_weight, floor, FORM)
        loss += tl.where(l_unit == 0, 0.0, part)
        l_factor = -2 * slope * product * k_unit
        k_factor = 2 * slope * inverse * inverse * cka * k_unit
    if INTER:
        inverse = tl.where(inter_k_unit == 0, 0.0, 1 / tl.sqrt(inter_kk))
        product = tl.where(inter_l_unit == 0, 0.0, inverse / tl.sqrt(inter_ll))
        cka = product * mm
        part, slope = _loss_of(cka, factor * inter_weight, floor, FORM)
        loss += tl.where(inter_l_unit == 0, 0.0, part)
        m_factor = -2 * slope * product * m_unit
        inter_k_factor = 2 * slope * inverse * inverse * cka * inter_k_unit
    if chunk == 0:
        tl.store(losses_ptr + group, loss)

    if GRADIENT:
        first = chunk * per_chunk
        for start in range(first, tl.minimum(first + per_chunk, n), DOWN):
            i = start + tl.arange(0, DOWN)
            of_c_x = tl.zeros([DOWN], tl.float32)
            of_c_y = tl.zeros([DOWN], tl.float32)
            of_one = tl.zeros([DOWN], tl.float32)
            for left in range(0, end, ACROSS):
                j = left + tl.arange(0, ACROSS)
                k, l, inter_k, _, m = _grams(
                    i, j, of_x_ptr, of_y_ptr, mine_ptr, n, p, end, row_x, row_y, c_x, c_y,
                    c_xy, INTER, APART,
                )
                to = factors_ptr + i[:, None] * row_factors + j[None, :]
                valid = (i < n)[:, None] & (j < end)[None, :]
                times_x = tl.zeros([DOWN, ACROSS], tl.float32)
                if INTRA:
                    times_x = (k * k_unit) * k_factor + (l * l_unit) * l_factor
                    if APART:
                        mean = tl.load(mine_ptr + j, mask=j < n, other=0.0)
                        of_one += tl.sum(times_x * mean[None, :], 1)
                if INTER:
                    of_inter = (inter_k * inter_k_unit) * inter_k_factor
                    times_y = (m * m_unit) * m_factor
                    times_x += of_inter
                    tl.store(to + end, times_y, mask=valid)
                    if APART:
                        of_c_x += tl.sum(of_inter, 1)
                        of_c_y += tl.sum(times_y, 1)
                tl.store(to, times_x, mask=valid)
            if APART:
                e = tl.arange(0, 8)[None, :]
                more = tl.where(e == 0, of_c_x[:, None], 0.0)
                more = tl.where(e == 1, of_c_y[:, None], more)
                more = tl.where(e == 2, of_one[:, None], more)
                to = factors_ptr + i[:, None] * row_factors + 2 * end + e
                tl.store(to, more, mask=(i < n)[:, None] & (e < 8))


@triton.jit
def _share(place, of, side, to, scale, RESIZED: tl.constexpr):
    """How much of a row or column of a resized map is of one of the map; 0 outside of it."""
    if RESIZED:
        first, second, share = _source(place, side, scale, True)
        weight = tl.where(first == of, 1 - share, 0.0) + tl.where(second == of, share, 0.0)
        return tl.where((place >= 0) & (place < to), weight, 0.0)
    else:
        return tl.where(place < to, 1.0, 0.0)


@triton.jit
def _first(place, scale, RESIZED: tl.constexpr):
    """The first row or column of a resized map that one of the map is part of.

    Rounding may make it the one before, of which it is no part, or the one after, when its part
    in the first is a rounding error.
    """
    if RESIZED:
        return tl.floor((place.to(tl.float32) - 0.5) / scale - 0.5).to(tl.int32) + 1
    else:
        return place


@_jit()
def spread(
    cells_ptr, out_ptr, cell_b, cell_c, cell_u, cell_i, cell_v, cell_j, out_b, out_c, out_h, out_w,
    height, width, to_height, to_width, scale_h, scale_w, reach_h, reach_w,
    ROWS_RESIZED: tl.constexpr, COLUMNS_RESIZED: tl.constexpr, PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of a map of that of its cells (B, C, U, p, V, p)."""
    group = tl.program_id(1).to(tl.int64)
    image = tl.program_id(2)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = place < height * width
    row = place // width
    column = place % width
    cells_ptr += group * cell_c + image.to(tl.int64) * cell_b
    first_row = _first(row, scale_h, ROWS_RESIZED)
    first_column = _first(column, scale_w, COLUMNS_RESIZED)
    total = tl.zeros([BLOCK], tl.float32)
    for down in range(0, reach_h):
        y = first_row + down
        weight = _share(y, row, height, to_height, scale_h, ROWS_RESIZED)
        below = (y // PATCH) * cell_u + (y % PATCH) * cell_i
        of_row = tl.zeros([BLOCK], tl.float32)
        for across in range(0, reach_w):
            x = first_column + across
            share = _share(x, column, width, to_width, scale_w, COLUMNS_RESIZED)
            value = tl.load(
                cells_ptr + below + (x // PATCH) * cell_v + (x % PATCH) * cell_j, mask=valid &
                (weight != 0) & (share != 0), other=0.0,
            )
            of_row += share * value
        total += weight * of_row
    to = out_ptr + group * out_c + image.to(tl.int64) * out_b
    tl.store(to + row * out_h + column * out_w, total, mask=valid)
