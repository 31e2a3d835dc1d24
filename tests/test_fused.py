"""The fused PCKA: equal to the plain form, and no more work than it promises."""

import math
from contextlib import nullcontext

import pytest
import torch
from helpers import rand
from torch.utils._python_dispatch import TorchDispatchMode

from pcka_distill import functional
from pcka_distill.functional import CHANNEL_LAYOUTS, FORMS, LAYOUTS, patch_counts, pcka_loss
from pcka_distill.fused import BandedResize, _bags, _windows

ATEN = torch.ops.aten
WEIGHTS = [(1.0, 0.0), (0.0, 2.0), (3.0, 2.0)]


def plain(student, teacher, patch_size, layout, center, intra_weight, inter_weight, form="cka"):
    """The form that autograd differentiates; test_functional.py holds it to the definition."""
    x, y = (functional.to_patches(z, patch_size, layout) for z in (student, teacher))
    loss = intra_weight * functional._dissimilarity(x, y, center, form=form)
    return loss + inter_weight * functional._dissimilarity(x.mT, y.mT, center, form=form)


def both_forms(student, teacher, *settings, scale=1.0):
    """(loss, gradient) of the fused and of the plain form."""
    results = []
    names = ("patch_size", "layout", "center", "intra_weight", "inter_weight", "form")
    for form in (lambda s: pcka_loss(s, teacher, **dict(zip(names, settings))),
                 lambda s: plain(s, teacher, *settings)):  # fmt: skip
        x = student.clone().requires_grad_()
        loss = form(x)
        (loss * scale).backward()
        results.append((loss.detach(), x.grad))
    return results


def work_in(cache, monkeypatch):
    """So many bytes at a time, or as on a GPU, in more steps than one."""
    if cache == "few launches":
        monkeypatch.setattr(functional, "in_caches", lambda device: False)
        monkeypatch.setattr(functional, "_DEVICE_BUDGET", 1)
        return
    for name in ("_CACHE", "_LEAST"):
        monkeypatch.setattr(functional, name, cache)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("weights", WEIGHTS)
# N < P, N > P, sides that are raised (both, one, none), many steps and one.
@pytest.mark.parametrize(
    ("shape", "patch"), [((2, 5, 9, 13), 4), ((3, 4, 16, 7), 2), ((1, 3, 8, 12), 4)]
)
@pytest.mark.parametrize("cache", [1, 1 << 30, "few launches"])
def test_equal_to_the_plain_form(layout, center, weights, shape, patch, cache, monkeypatch):
    work_in(cache, monkeypatch)
    s = rand(*shape, dtype=torch.float64)
    t = 0.5 * s + rand(*shape, seed=1, dtype=torch.float64)
    (loss, grad), (expected, expected_grad) = both_forms(
        s, t, patch, layout, center, *weights, scale=7.0
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("near", [0.0, 0.5, 1.0])
def test_forms_equal_to_the_plain_form(form, weights, near):
    """Down to where the CKA is below the floor, and up to where it is 1."""
    t = rand(2, 4, 8, 12, seed=1, dtype=torch.float64)
    s = near * t + (1 - near) * rand(2, 4, 8, 12, dtype=torch.float64)
    for layout, patch in (("sample", 1), ("sample", 2), ("spatial", 4)):
        (loss, grad), (expected, expected_grad) = both_forms(
            s, t, patch, layout, True, *weights, form
        )
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("layout", CHANNEL_LAYOUTS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("cache", [1, 1 << 30, "few launches"])
def test_weighted_channels_are_the_sum_of_their_losses(layout, weights, cache, monkeypatch):
    work_in(cache, monkeypatch)
    scale = torch.tensor([0.0, 0.3, 1.0, 5.0])[:, None, None]
    s = rand(2, 4, 8, 12, dtype=torch.float64).requires_grad_()
    t = rand(2, 4, 8, 12, seed=1, dtype=torch.float64) * scale + 7.0
    options = dict(zip(("intra_weight", "inter_weight"), weights))
    options |= {"patch_size": 4 if layout == "spatial" else 2, "layout": layout}
    variance = t.numpy().var((0, 2, 3))
    expected = sum(
        v / variance.sum() * pcka_loss(s[:, [c]], t[:, [c]], **options)
        for c, v in enumerate(variance)
    )
    for debiased in (False, True):
        loss = pcka_loss(s, t, channel_weight="variance", debiased=debiased, **options)
        if not debiased:
            torch.testing.assert_close(loss, expected)
            gradients = [torch.autograd.grad(x, s)[0] for x in (loss, expected)]
            torch.testing.assert_close(*gradients)
    # Of the plain form, too: the teacher's own gradient is wanted here.
    plainly = pcka_loss(s, t.requires_grad_(), channel_weight="variance", **options)
    torch.testing.assert_close(plainly, expected)


@pytest.mark.parametrize("layout", ["spatial", "sample"])
@pytest.mark.parametrize("center", [True, False])
def test_equal_to_the_plain_form_in_fp32(layout, center):
    s, t = rand(2, 8, 50, 84), rand(2, 8, 50, 84, seed=1) + 3.0
    (loss, grad), (expected, expected_grad) = both_forms(s + t, t, 16, layout, center, 1.0, 1.0)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    difference = (grad - expected_grad).norm() / expected_grad.norm()
    assert difference < (2e-5 if center else 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equal_to_the_plain_form_under_autocast(dtype):
    """A half-precision map is widened; its gradient is cast only after AMP's scale is in."""
    s, t = rand(2, 4, 20, 24).to(dtype), rand(2, 4, 20, 24, seed=1).to(dtype)
    scale = 65536.0
    x, wide = s.clone().requires_grad_(), s.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pcka_loss(x, t, patch_size=8, inter_weight=1.0)
    (loss * scale).backward()
    expected = plain(wide, t.float(), 8, "spatial", True, 1.0, 1.0)
    (expected * scale).backward()
    assert loss.dtype == torch.float32 and x.grad.dtype == dtype
    torch.testing.assert_close(loss, expected)
    largest = wide.grad.abs().max().item()
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 1e-6 * largest}
    torch.testing.assert_close(x.grad, wide.grad.to(dtype), **tolerance)


def test_a_teacher_in_half_precision():
    s, t = rand(2, 4, 16, 24), rand(2, 4, 16, 24, seed=1).bfloat16()
    torch.testing.assert_close(pcka_loss(s, t, patch_size=8), pcka_loss(s, t.float(), patch_size=8))


IN_MEMORY = {
    "in rows": lambda x: x.clone(),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "some of the channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "cut off": lambda x: torch.nn.functional.pad(x, (0, 3, 0, 5))[..., : x.shape[2], : x.shape[3]],
}


@pytest.mark.parametrize("student", IN_MEMORY)
@pytest.mark.parametrize("teacher", IN_MEMORY)
# Where rows are resized, columns, both and none.
@pytest.mark.parametrize("sides", [(20, 24), (24, 20), (20, 20), (24, 24)])
# A gradient in torch's memory, and in numpy's, as it is for large maps.
@pytest.mark.parametrize("huge", [1 << 30, 0])
def test_however_maps_lie_in_memory(student, teacher, sides, huge, monkeypatch):
    monkeypatch.setattr(functional, "_HUGE", huge)
    s, t = rand(2, 6, *sides), rand(2, 6, *sides, seed=1)
    options = {"patch_size": 8, "inter_weight": 1.0}
    loss = pcka_loss(expected := s.clone().requires_grad_(), t, **options)
    loss.backward()
    x = IN_MEMORY[student](s).requires_grad_()
    result = pcka_loss(x, IN_MEMORY[teacher](t), **options)
    torch.testing.assert_close(result, loss)
    gradient = torch.autograd.grad(result, x)[0]
    torch.testing.assert_close(gradient, expected.grad)
    assert gradient.stride() == torch.empty_like(x).stride()
    # numpy's is of a size of its own.
    assert gradient.untyped_storage().resizable() == bool(huge)


def test_gradients_are_made_in_memory_of_those_that_are_gone(monkeypatch):
    monkeypatch.setattr(functional, "_HUGE", 0)
    monkeypatch.setattr(functional, "_gradients", kept := [])

    def make(size=1000):
        return functional._gradient_like(torch.empty(size), torch.float32)

    one, other = make(), make()
    places = {one.data_ptr(), other.data_ptr()}
    assert len(places) == 2
    # Whatever still reads it.
    view = one.view(10, 100)[3:]
    del one
    assert make().data_ptr() not in places and len(kept) == 3
    del view, other
    again = [make(), make(900), make()]
    assert places <= {x.data_ptr() for x in again} and len(kept) == 3
    del again
    # Other sizes have their own, and the old ones go.
    for size in (400, 1200):
        make(size)
        assert [memory.size for memory, _ in kept] == [4 * size]


# One row, both sides, one that stays; windows that drift apart, of few columns, and of too many.
@pytest.mark.parametrize("patch", [2, 5, 16, 40])
@pytest.mark.parametrize("sides", [(1, 1), (1, 33), (25, 42), (9, 80), (80, 3), (3, 1585)])
# As cells of a layout lie in memory, in which a resize writes or does not.
@pytest.mark.parametrize("order", [(4, 2, 1, 0, 3, 5), (0, 1, 2, 3, 4, 5), (3, 5, 4, 2, 0, 1)])
def test_a_resize_in_caches_is_that_of_torch(patch, sides, order):
    shape = torch.Size((2, 3, *sides))
    to = [-(-side // patch) * patch for side in sides]
    x = rand(*shape, dtype=torch.float64).requires_grad_()
    expected = torch.nn.functional.interpolate(x, size=to, mode="bilinear", align_corners=False)
    resize = BandedResize(shape, to, patch, torch.empty(0, dtype=torch.float64), order)

    sizes = (2, 3, to[0] // patch, patch, to[1] // patch, patch)
    inverse = [order.index(i) for i in range(6)]
    memory = torch.full([sizes[i] for i in order], math.nan, dtype=torch.float64)
    cells = memory.permute(inverse)
    resize(x, cells)
    torch.testing.assert_close(cells.reshape(expected.shape), expected)
    cells.copy_(rand(*sizes, seed=1, dtype=torch.float64))
    gradient = torch.autograd.grad(expected, x, cells.reshape(expected.shape))[0]
    joined = resize.joined(cells)
    # Some channels of more, in rows or not; what is beside them stays.
    more = torch.full((2, 5, *sides), math.nan, dtype=torch.float64)
    for whole in (more, more.to(memory_format=torch.channels_last)):
        resize.gradient(joined, whole[:, 1:4])
        torch.testing.assert_close(whole[:, 1:4], gradient)
        assert whole[:, ::4].isnan().all()


@pytest.mark.parametrize(
    ("size", "to", "width", "most"),
    [(168, 176, 16, 1), (84, 96, 16, 3), (167, 168, 2, 3), (1585, 1600, 16, 8)],
)
def test_columns_are_resized_in_few_batches(size, to, width, most):
    assert len(_windows(size, to, width, False, torch.float32)) <= most


def test_a_retained_graph_can_be_gone_through_again():
    x, t = rand(2, 4, 9, 9).requires_grad_(), rand(2, 4, 9, 9, seed=1)
    loss = 2 * pcka_loss(x, t, patch_size=4)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    third = torch.autograd.grad(3 * loss, x)[0]
    assert torch.equal(first, second)
    torch.testing.assert_close(third, 3 * first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


def test_a_teacher_that_wants_a_gradient_gets_it():
    s, t = rand(2, 4, 9, 9).requires_grad_(), rand(2, 4, 9, 9, seed=1).requires_grad_()
    pcka_loss(s, t, patch_size=4).backward()
    mirrored = torch.autograd.grad(pcka_loss(t, s.detach(), patch_size=4), t)[0]
    torch.testing.assert_close(t.grad, mirrored)


def test_without_a_gradient_none_is_made():
    s, t = rand(2, 4, 9, 9), rand(2, 4, 9, 9, seed=1)
    with_gradient = pcka_loss(s.clone().requires_grad_(), t, patch_size=4, inter_weight=1.0)
    assert not pcka_loss(s, t, patch_size=4).requires_grad
    with torch.no_grad():
        loss = pcka_loss(s.requires_grad_(), t, patch_size=4, inter_weight=1.0)
    assert not loss.requires_grad and torch.equal(loss, with_gradient)


def test_no_weights_no_loss():
    x = rand(1, 2, 8, 8).requires_grad_()
    loss = pcka_loss(x, rand(1, 2, 8, 8, seed=1), patch_size=4, intra_weight=0.0)
    loss.backward()
    assert loss.item() == 0 and (x.grad == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("form", FORMS)
def test_rounding_errors_of_a_constant_map_are_no_variation(layout, weights, side, form):
    """The mean of 15 patches of 0.1 is not quite 0.1."""
    shape, (intra, inter) = (3, 3, 12, 20), weights
    maps = {"student": rand(*shape), "teacher": rand(*shape, seed=1)}
    maps[side] = torch.linspace(0.1, 777.7, 3).view(1, 3, 1, 1).expand(shape)
    if layout in ("per_image", "per_position", "batch"):
        maps[side] = torch.full(shape, 0.1)
    student = maps["student"].clone().requires_grad_()
    loss = pcka_loss(
        student, maps["teacher"], patch_size=4, layout=layout,
        intra_weight=intra, inter_weight=inter, form=form,
    )  # fmt: skip
    loss.backward()
    # A constant teacher teaches nothing, a constant student is as wrong as can be.
    worst = {"log": 1 - math.log(1e-4), "sqrt": 1 - math.sqrt(1e-4) / 2}.get(form, 1.0)
    expected = 0.0 if side == "teacher" else worst * (intra + inter)
    assert loss.item() == pytest.approx(expected)
    assert (student.grad == 0).all()


@pytest.mark.parametrize("layout", ["spatial", "sample"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_rounding_errors_of_one_relation_are_no_variation(layout, side):
    """Patches of one value each have no inter relation; what is left of it is rounding."""
    maps = {"student": rand(3, 3, 12, 20), "teacher": rand(3, 3, 12, 20, seed=1)}
    cells = rand(3, 3, 4, 4, seed=2)[..., :5, :5]
    maps[side] = cells.repeat_interleave(3, 2).repeat_interleave(5, 3) / 3
    results = both_forms(maps["student"], maps["teacher"], 3, layout, True, 1.0, 1.0)
    (loss, grad), (expected, expected_grad) = results
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("magnitude", [1e-15, 1e-12, 1e-8, 1e6, 1e9, 1e15])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_the_magnitude_does_not_matter(magnitude, side, center, form):
    maps = {"student": rand(2, 3, 16, 24), "teacher": rand(2, 3, 16, 24, seed=1)}
    options = {"patch_size": 8, "center": center, "inter_weight": 1.0, "form": form}
    expected = pcka_loss(x := maps["student"].clone().requires_grad_(), maps["teacher"], **options)
    expected.backward()
    maps[side] = maps[side] * magnitude
    student = maps["student"].requires_grad_()
    loss = pcka_loss(student, maps["teacher"], **options)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    factor = magnitude if side == "student" else 1.0
    torch.testing.assert_close(student.grad * factor, x.grad, rtol=1e-4, atol=1e-8)


def test_a_teacher_in_inference_mode():
    s = rand(2, 4, 9, 9).requires_grad_()
    with torch.inference_mode():
        t = rand(2, 4, 9, 9, seed=1)
    pcka_loss(s, t, patch_size=4).backward()
    assert s.grad.abs().max() > 0


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_a_number_stays_visible(side, form):
    maps = [rand(2, 3, 8, 8).clone(), rand(2, 3, 8, 8, seed=1).clone()]
    maps[side][0, 0, 0, 0] = float("nan")
    for weights in WEIGHTS:
        names = ("intra_weight", "inter_weight")
        assert pcka_loss(*maps, patch_size=4, form=form, **dict(zip(names, weights))).isnan()


@pytest.mark.parametrize("form", [x for x in FORMS if x != "signed"])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_trace_that_overflows_stays_visible(form, center, weights):
    """Where no entry of a Gram does."""
    x = 1.5e18 * rand(2, 3, 16, 16).sign()
    names = ("intra_weight", "inter_weight")
    loss = pcka_loss(x, x, patch_size=4, form=form, center=center, **dict(zip(names, weights)))
    assert loss.isnan()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("magnitude", [1e-18, 1e-12, 1.0, 1e12])
def test_a_dead_channel_of_the_teacher_teaches_any_student_nothing(form, weights, magnitude):
    x, y = magnitude * rand(2, 3, 16, 16), rand(2, 3, 16, 16, seed=1)
    y[:, 0] = 0.7
    x.requires_grad_()
    names = ("intra_weight", "inter_weight")
    loss = pcka_loss(x, y, patch_size=4, form=form, **dict(zip(names, weights)))
    grad = torch.autograd.grad(loss, x)[0]
    assert loss.isfinite() and (grad[:, 0] == 0).all() and grad.isfinite().all()


@pytest.mark.parametrize("caches", [True, False])
@pytest.mark.parametrize("side", [16, 9])
def test_a_run_with_fake_tensors_leaves_nothing_behind(caches, side, monkeypatch):
    """As tools that only look at shapes do; another run in the same process computes."""
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    monkeypatch.setattr(functional, "in_caches", lambda device: caches)
    # In caches a resize asks for the numbers of its weights.
    refused = pytest.raises(fake.DataDependentOutputException)
    options = {"patch_size": 4, "inter_weight": 0.5}
    x, y = rand(2, 3, side, side), rand(2, 3, side, side, seed=1)
    x.requires_grad_()
    resized = side % options["patch_size"]
    for kept in (_windows, _bags):
        kept.cache_clear()
    with fake.FakeTensorMode() as mode, refused if caches and resized else nullcontext():
        pcka_loss(mode.from_tensor(x), mode.from_tensor(y), **options)
    loss = pcka_loss(x, y, **options)
    expected = plain(x, y, 4, "spatial", True, 1.0, 0.5)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(z, x)[0] for z in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e18, 1e25])
@pytest.mark.parametrize("size", [8, 7])
def test_no_finite_loss_has_a_gradient_that_is_not(side, form, center, value, size):
    """What overflows, too; and the other channels keep theirs."""
    maps = [rand(2, 3, size, size).clone(), rand(2, 3, size, size, seed=1).clone()]
    maps[side][0, 0, 2, 2] = value
    maps[0].requires_grad_()
    for intra, inter in WEIGHTS:
        weights = {"intra_weight": intra, "inter_weight": inter}
        loss = pcka_loss(*maps, patch_size=4, form=form, center=center, **weights)
        grad = torch.autograd.grad(loss, maps[0])[0]
        assert loss.isnan() or grad.isfinite().all()
        assert math.isfinite(value) or loss.isnan()
        assert grad[:, 1:].isfinite().all() and grad[:, 1:].any()


# ---- what it costs, in operations: no seconds ------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts what reaches the kernels: operations, multiplications, and the elements they make."""

    def __init__(self):
        super().__init__()
        self.count = self.launches = self.multiplications = 0
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += 1
        alias = func._schema.returns[0].alias_info if func._schema.returns else None
        made = not func._schema.name.startswith(("aten::empty", "aten::new_empty"))
        self.launches += made and (alias is None or alias.is_write)
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if func.overloadpacket in (ATEN.bmm, ATEN.baddbmm, ATEN.baddbmm_):
            a, b = tensors[-2:]
            self.multiplications += a.numel() * b.shape[-1]
        for x in out if isinstance(out, (tuple, list)) else (out,):
            # A view is nothing new.
            if isinstance(x, torch.Tensor) and not any(
                x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr() for y in tensors
            ):
                self.made.append(x.untyped_storage().nbytes() // 4)
        return out


def operations(shape, **options):
    s, t = rand(*shape).requires_grad_(), rand(*shape, seed=1)
    with Operations() as seen:
        pcka_loss(s, t, **options).backward(inputs=[s])
    return seen


def test_no_large_gram_and_no_copy():
    """Never P x P (2048 x 2048 here), nor all patches of a side: the gradient alone is as large.

    A second one is what backward puts into ``.grad``.
    """
    shape = (8, 96, 64, 96)
    whole = 8 * 96 * 64 * 96
    assert patch_counts(shape, 16, "spatial") == (96, 24, 2048)
    assert sorted(x for x in operations(shape, inter_weight=1.0).made if x > whole // 2) in (
        [whole], [whole, whole],
    )  # fmt: skip


def test_no_loop_over_channels(monkeypatch):
    for name in ("_CACHE", "_LEAST"):
        monkeypatch.setattr(functional, name, 1 << 30)
    counts = []
    for channels in (2, 64):
        counts.append(operations((2, channels, 20, 24), patch_size=4, inter_weight=1.0).count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("options", "most"),
    [({}, 48), ({"inter_weight": 1.0}, 79), ({"form": "signed"}, 35)],
)
def test_few_launches_on_a_gpu(options, most, monkeypatch):
    """Where each costs more than its work: one step for a small level, three for the largest."""
    monkeypatch.setattr(functional, "in_caches", lambda device: False)
    for shape, steps in (((2, 4, 24, 24), 1), ((2, 4, 120, 120), 1), ((2, 256, 100, 168), 3)):
        # The weights of a resize are made once.
        operations(shape, patch_size=16, **options)
        seen = operations(shape, patch_size=16, **options)
        assert seen.launches <= steps * most, seen.launches


@pytest.mark.parametrize(
    ("layout", "weights", "products"),
    # K, L and the gradient; with inter also M, and the gradient's other half.
    [("spatial", (1.0, 0.0), 3), ("spatial", (1.0, 1.0), 5), ("sample", (1.0, 1.0), 5)],
)
@pytest.mark.parametrize("center", [True, False])
def test_the_products_are_made_once(layout, weights, products, center):
    """On the smaller side, however large the other is; what is left is thin."""
    shape, patch = (2, 8, 64, 96), 16 if layout == "spatial" else 2
    groups, n, p = patch_counts(shape, patch, layout)
    n, p = sorted((n, p))
    seen = operations(
        shape, patch_size=patch, layout=layout, center=center,
        intra_weight=weights[0], inter_weight=weights[1],
    )  # fmt: skip
    least = products * groups * n * n * p
    thin = groups * n * (10 * (n + p) if products == 5 else n)
    assert least <= seen.multiplications <= least + thin


@pytest.mark.parametrize(
    ("weights", "sides", "least"),
    [
        # N of 48, P of 36: of the relation as it is, or of the other one of what is transposed.
        ((1.0, 0.0), (48, 36), 3 * 48 * 48 * 36),
        ((0.0, 1.0), (48, 36), 3 * 36 * 36 * 48),
        ((1.0, 1.0), (48, 36), 5 * 36 * 36 * 48),
        # N of 32, and of 64.
        ((0.0, 1.0), (48, 24), 3 * 36 * 36 * 32),
        ((1.0, 0.0), (48, 48), 5 * 36 * 36 * 64),
    ],
)
def test_relations_are_made_on_the_side_that_costs_less(weights, sides, least):
    """One relation alone takes three products, the other five, of N * N * P."""
    intra, inter = weights
    shape = (1, 4, *sides)
    options = {"patch_size": 6, "center": False, "intra_weight": intra, "inter_weight": inter}
    seen = operations(shape, **options).multiplications
    # Rows are padded to a multiple of 8.
    assert 4 * least <= seen <= 4 * least * 1.25
    s, t = rand(*shape, dtype=torch.float64), rand(*shape, seed=1, dtype=torch.float64)
    (loss, grad), (expected, expected_grad) = both_forms(s, t, 6, "spatial", True, *weights)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"inter_weight": 1.0}])
def test_of_a_large_symmetric_product_one_half_is_made(options):
    """N is 150 in P of 200: three bands of 56, 56 and 40 rows."""
    shape, n, p = (2, 2, 100, 150), 150, 200
    assert patch_counts(shape, 10, "spatial") == (2, n, p)
    full = (5 if "inter_weight" in options else 3) * 2 * 152 * 152 * p
    spared = 2 * 2 * (56 * (152 - 56) + 56 * 40) * p
    seen = operations(shape, patch_size=10, **options).multiplications
    assert seen <= full - spared + 2 * n * 10 * (n + p)
    s, t = rand(*shape, dtype=torch.float64), rand(*shape, seed=1, dtype=torch.float64)
    for weights in WEIGHTS:
        for center in (True, False):
            (loss, grad), (expected, expected_grad) = both_forms(
                s, t, 10, "spatial", center, *weights
            )
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-14)
