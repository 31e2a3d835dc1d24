"""The maths, against numpy from the definitions and against the published code's numbers."""

import doctest
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import rand
from hypothesis import given, settings
from hypothesis import strategies as st

from pcka_distill import baselines, functional
from pcka_distill.functional import (
    CHANNEL_FREE_LAYOUTS,
    LAYOUTS,
    linear_cka,
    pcka_loss,
    rcka_loss,
    without_padding,
)

# Inputs, losses and gradients of the code that the paper's authors published, weight 10 for each
# form. loss_ours = loss_theirs + the sum of the weights: they minimise -CKA, we 1 - CKA.
VECTORS = np.load(Path(__file__).parent / "data" / "reference_losses.npz")


# ---- oracles: numpy, float64, straight from the definitions ---------------------------------


def np_hsic(k, l):
    """tr(K H L H) / (N - 1)^2, with the centring matrix written out."""
    n = len(k)
    h = np.eye(n) - np.ones((n, n)) / n
    return np.trace(k @ h @ l @ h) / (n - 1) ** 2


def np_hsic_unbiased(k, l):
    n = len(k)
    k, l = (m - np.diag(np.diag(m)) for m in (k, l))
    one = np.ones(n)
    total = np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


def np_cka(x, y, center=True, debiased=False):
    k, l = x @ x.T, y @ y.T
    if debiased:
        hsic = np_hsic_unbiased
    elif center:
        hsic = np_hsic
    else:
        hsic = lambda a, b: np.trace(a @ b)  # noqa: E731
    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


def np_patches(x, p, layout):
    """(B, C, H, W) -> list of (N, P), one an independent CKA, by explicit loops."""
    b, c, h, w = x.shape
    u, v = h // p, w // p

    def cell(i, ch, r, s):
        return x[i, ch, r * p : (r + 1) * p, s * p : (s + 1) * p]

    grid = [(r, s) for r in range(u) for s in range(v)]
    if layout == "spatial":
        return [
            np.stack([np.concatenate([cell(i, ch, *g).ravel() for i in range(b)]) for g in grid])
            for ch in range(c)
        ]
    if layout == "sample":
        return [
            np.stack([cell(i, ch, *g).ravel() for i in range(b) for g in grid]) for ch in range(c)
        ]
    if layout == "per_image":
        return [
            np.stack([np.concatenate([cell(i, ch, *g).ravel() for ch in range(c)]) for g in grid])
            for i in range(b)
        ]
    if layout == "batch":
        return [
            np.stack(
                [
                    np.concatenate([cell(i, ch, *g).ravel() for ch in range(c)])
                    for i in range(b)
                    for g in grid
                ]
            )
        ]
    return [
        np.stack([[cell(i, ch, *g)[dy, dx] for i in range(b) for ch in range(c)] for g in grid])
        for dy in range(p)
        for dx in range(p)
    ]


# ---- the published code ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "kwargs"),
    [
        ("spatial_intra", {"layout": "spatial", "inter_weight": 0.0}),
        ("spatial_intra_inter", {"layout": "spatial", "inter_weight": 10.0}),
        ("spatial_exact_multiple", {"layout": "spatial", "inter_weight": 10.0}),
        ("per_image", {"layout": "per_image", "inter_weight": 10.0}),
        ("per_position", {"layout": "per_position", "inter_weight": 10.0}),
        ("logits", {"inter_weight": 10.0}),
        ("logits_soft", {"inter_weight": 10.0, "temperature": 4.0}),
    ],
)
def test_published_code(case, kwargs):
    student = torch.tensor(VECTORS[f"{case}/student"], requires_grad=True)
    teacher = torch.tensor(VECTORS[f"{case}/teacher"])
    if case.startswith("logits"):
        loss_fn = rcka_loss
    else:
        loss_fn, kwargs = pcka_loss, {"patch_size": 16, **kwargs}
    loss = loss_fn(student, teacher, center=False, intra_weight=10.0, **kwargs)
    loss.backward()
    constant = 10.0 + kwargs["inter_weight"]
    assert loss.item() - constant == pytest.approx(float(VECTORS[f"{case}/loss"]), rel=1e-4)
    gradient = VECTORS[f"{case}/grad"]
    np.testing.assert_allclose(
        student.grad.numpy(), gradient, rtol=1e-4, atol=1e-4 * np.abs(gradient).max()
    )


# ---- linear_cka ------------------------------------------------------------------------------

SIZES = st.tuples(st.integers(4, 12), st.integers(1, 20), st.integers(1, 20), st.integers(0, 999))


@given(SIZES, st.booleans(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_cka_equals_the_definition(sizes, center, debiased):
    n, p, q, seed = sizes
    x, y = rand(n, p, seed=seed, dtype=torch.float64), rand(n, q, seed=seed + 1).double()
    ours = linear_cka(x, y, center=center, debiased=debiased).item()
    assert ours == pytest.approx(np_cka(x.numpy(), y.numpy(), center, debiased), abs=1e-9)


@given(SIZES, st.floats(0.01, 100), st.floats(-5, 5))
@settings(max_examples=50, deadline=None)
def test_cka_invariances(sizes, scale, shift):
    n, p, q, seed = sizes
    x, y = rand(n, p, seed=seed).double(), rand(n, q, seed=seed + 1).double()
    rotation = torch.linalg.qr(rand(p, p, seed=seed + 2).double())[0]
    base = linear_cka(x, y)
    assert torch.allclose(linear_cka(y, x), base)
    assert torch.allclose(linear_cka(scale * x @ rotation + shift, y), base, atol=1e-8)
    assert torch.allclose(linear_cka(x, x), torch.ones((), dtype=torch.float64))
    assert -1e-9 <= base <= 1 + 1e-9


def test_cka_uncentred_is_not_shift_invariant():
    x, y = rand(6, 5), rand(6, 4, seed=1)
    assert not torch.allclose(
        linear_cka(x + 3, y, center=False), linear_cka(x, y, center=False), atol=1e-3
    )


def test_cka_is_batched():
    x, y = rand(3, 2, 9, 5), rand(3, 2, 9, 7, seed=1)
    one_by_one = torch.stack([linear_cka(a, b) for a, b in zip(x.flatten(0, 1), y.flatten(0, 1))])
    torch.testing.assert_close(linear_cka(x, y).flatten(), one_by_one)


def test_debiased_cka_of_many_samples_in_fp32():
    """N HSIC_1 is of the order of 1 / N^2 of the Gram products: no rounding floor may eat it."""
    x = rand(3, 1000, 6)
    y = x + 0.5 * rand(3, 1000, 6, seed=1)
    expected = [np_cka(a, b, debiased=True) for a, b in zip(*(z.double().numpy() for z in (x, y)))]
    assert linear_cka(x, y, debiased=True).tolist() == pytest.approx(expected, abs=1e-5)


def test_debiased_cka_of_noise_is_zero_and_biased_is_not():
    """With many more features than samples the plain estimator is near 1 on noise."""
    x, y = rand(50, 77, 512), rand(50, 77, 512, seed=1)
    assert linear_cka(x, y, center=False).mean() > 0.8
    assert abs(linear_cka(x, y, debiased=True).mean()) < 0.02


def test_cka_rejects_what_it_cannot_compare():
    with pytest.raises(ValueError, match=r"\(5, 2\) and \(6, 2\)"):
        linear_cka(rand(5, 2), rand(6, 2))
    with pytest.raises(ValueError, match="at least 4 samples, got 3"):
        linear_cka(rand(3, 2), rand(3, 2), debiased=True)


@pytest.mark.parametrize(("n", "p", "q"), [(5, 400, 1), (400, 5, 1), (25, 600, 1), (25, 600, 600)])
def test_no_large_gram(n, p, q):
    """Each product is made on its smaller side: never a 400 x 400 or a 600 x 600 matrix."""
    seen = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                seen.append(out.numel())
            return out

    x, y = rand(2, n, p), rand(2, n, q, seed=1)
    with Spy():
        for a, b in ((x, y), (y, x), (x, x + 1), (x.mT, x.mT + 1)):
            linear_cka(a, b)
            linear_cka(a, b, debiased=True)
    assert max(seen) <= 2 * n * p


# ---- pcka_loss -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("debiased", [True, False])
def test_pcka_equals_the_definition(layout, center, debiased):
    s, t = rand(2, 3, 8, 12).double(), rand(2, 3, 8, 12, seed=1).double()
    ours = pcka_loss(
        s, t, patch_size=4, layout=layout, center=center, debiased=debiased,
        intra_weight=2.0, inter_weight=3.0,
    )  # fmt: skip
    pairs = list(zip(np_patches(s.numpy(), 4, layout), np_patches(t.numpy(), 4, layout)))
    intra = np.mean([1 - np_cka(x, y, center, debiased) for x, y in pairs])
    inter = np.mean([1 - np_cka(x.T, y.T, center, debiased) for x, y in pairs])
    assert ours.item() == pytest.approx(2 * intra + 3 * inter, abs=1e-9)


@pytest.mark.parametrize("layout", CHANNEL_FREE_LAYOUTS)
def test_pcka_of_other_channels_equals_the_definition(layout):
    s, t = rand(2, 3, 8, 12).double().requires_grad_(), rand(2, 5, 8, 12, seed=1).double()
    pairs = zip(np_patches(s.detach().numpy(), 4, layout), np_patches(t.numpy(), 4, layout))
    expected = np.mean([1 - np_cka(x, y) for x, y in pairs])
    assert pcka_loss(s, t, patch_size=4, layout=layout).item() == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda x: pcka_loss(x, t, patch_size=4, layout=layout), s)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("center", [True, False])
def test_the_signed_form_equals_the_definition(layout, center):
    s, t = rand(2, 3, 8, 12).double() + 1, rand(2, 3, 8, 12, seed=1).double() + 1
    s.requires_grad_()

    def cosine(x, y, axis):
        x, y = (z - center * z.mean(axis, keepdims=True) for z in (x, y))
        return (x * y).sum() / (np.linalg.norm(x) * np.linalg.norm(y))

    options = {"patch_size": 4, "layout": layout, "center": center, "form": "signed"}
    options |= {"intra_weight": 2.0, "inter_weight": 3.0}
    pairs = list(zip(*(np_patches(z.detach().numpy(), 4, layout) for z in (s, t))))
    expected = np.mean([5 - 2 * cosine(x, y, 0) - 3 * cosine(x, y, 1) for x, y in pairs])
    assert pcka_loss(s, t, **options).item() == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda x: pcka_loss(x, t, **options), s)
    assert pcka_loss(s, -s.detach(), **options).item() == pytest.approx(10)


def test_pkd_is_a_signed_pcka():
    s, t = rand(2, 3, 8, 12).double(), rand(2, 3, 8, 12, seed=1).double()
    loss = pcka_loss(s, t, patch_size=1, layout="sample", form="signed")
    torch.testing.assert_close(loss, baselines.pkd_loss(s, t))


@pytest.mark.parametrize(
    ("form", "oracle"), [("sqrt", lambda c: 1 - np.sqrt(c)), ("log", lambda c: -np.log(c))]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forms_equal_the_definition(form, oracle, layout):
    s, t = rand(2, 3, 8, 12).double(), rand(2, 3, 8, 12, seed=1).double()
    weights = {"intra_weight": 2.0, "inter_weight": 3.0}
    ours = pcka_loss(s, t, patch_size=4, layout=layout, form=form, **weights)
    pairs = list(zip(np_patches(s.numpy(), 4, layout), np_patches(t.numpy(), 4, layout)))
    intra = np.mean([oracle(np_cka(x, y)) for x, y in pairs])
    inter = np.mean([oracle(np_cka(x.T, y.T)) for x, y in pairs])
    assert ours.item() == pytest.approx(2 * intra + 3 * inter)


@pytest.mark.parametrize("form", ["sqrt", "log"])
def test_forms_have_a_slope_where_cka_has_none(form):
    """A student that is barely related: r = 1e-3, of which the square is no news."""
    t = rand(1, 1, 8, 8).double()
    noise = rand(1, 1, 8, 8, seed=1).double()
    t, noise = ((x - x.mean()) / x.std() for x in (t, noise))
    noise = noise - (noise * t).mean() / t.square().mean() * t
    gradients = {}
    for name in ("cka", form):
        s = (noise + 1e-3 * t).requires_grad_()
        pcka_loss(s, t, patch_size=1, layout="sample", form=name).backward()
        gradients[name] = -(s.grad * t).sum().item()
    assert 0 < gradients["cka"] < 5e-3 and gradients[form] > 100 * gradients["cka"] / 10
    # And none is infinite: below a floor it is a straight line, also of no relation at all.
    for r in (1e-9, 0.0):
        s = (noise + r * t).requires_grad_()
        loss = pcka_loss(s, t, patch_size=1, layout="sample", form=form)
        loss.backward()
        assert torch.isfinite(loss) and s.grad.abs().max() < 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pcka_gradcheck(layout):
    s, t = rand(2, 2, 5, 6).double().requires_grad_(), rand(2, 2, 5, 6, seed=1).double()
    for debiased in (False, True):
        torch.autograd.gradcheck(
            lambda x, d=debiased: pcka_loss(
                x, t, patch_size=2, layout=layout, inter_weight=0.5, debiased=d
            ),
            s,
        )


def test_rcka_gradcheck():
    s, t = rand(6, 4).double().requires_grad_(), rand(6, 4, seed=1).double()
    torch.autograd.gradcheck(lambda x: rcka_loss(x, t), s)
    torch.autograd.gradcheck(lambda x: rcka_loss(x, t, temperature=2.0), s)


def _dead_channel(x):
    x = x.clone()
    x[:, 0] = 0
    return x


def _constant(x):
    return torch.full_like(x, 3.7)


def _tiny(x):
    return x * 1e-8


def _huge(x):
    return x * 1e6


def _offset(x):
    return x * 1e-3 + 1e3


def _identical_patches(x):
    return x[..., :2, :2].repeat(1, 1, x.shape[-2] // 2, x.shape[-1] // 2)


HARD = [_dead_channel, _constant, _tiny, _huge, _offset, _identical_patches, torch.zeros_like]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spoil", HARD)
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("center", [True, False])
def test_pcka_is_finite_on_hard_input(layout, spoil, side, center):
    s, t = rand(2, 3, 8, 8), rand(2, 3, 8, 8, seed=1)
    s = spoil(s) if side != "teacher" else s
    t = spoil(t) if side != "student" else t
    s = s.requires_grad_()
    loss = pcka_loss(s, t, patch_size=2, layout=layout, center=center, inter_weight=1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert -1e-6 <= loss <= 2 + 1e-6
    assert torch.isfinite(s.grad).all()


def test_undefined_cka_teaches_nothing():
    """A constant teacher adds 0, a student that alone is constant adds its full weight."""
    x, constant = rand(2, 3, 8, 8), torch.full((2, 3, 8, 8), 3.7)
    assert linear_cka(x[0, 0], constant[0, 0]) == 0
    assert pcka_loss(x, constant, patch_size=2).item() == 0
    assert pcka_loss(constant, x, patch_size=2).item() == 1
    student = constant.clone().requires_grad_()
    pcka_loss(student, x, patch_size=2).backward()
    assert (student.grad == 0).all()


@pytest.mark.parametrize(
    ("shape", "patch"),
    [
        ((2, 3, 4, 4), 4),
        ((2, 3, 2, 3), 16),
        ((1, 3, 1, 1), 1),
        ((0, 3, 8, 8), 2),
        ((2, 0, 8, 8), 2),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("debiased", [False, True])
def test_pcka_of_one_patch_or_nothing(shape, patch, layout, debiased):
    s, t = rand(*shape).requires_grad_(), rand(*shape, seed=1)
    loss = pcka_loss(s, t, patch_size=patch, layout=layout, inter_weight=1.0, debiased=debiased)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(s.grad).all()


def test_debiased_pcka_of_three_patches_teaches_nothing():
    s, t = rand(1, 2, 4, 12).requires_grad_(), rand(1, 2, 4, 12, seed=1)
    loss = pcka_loss(s, t, patch_size=4, debiased=True)
    loss.backward()
    assert loss.item() == 0 and (s.grad == 0).all()


def test_pcka_rejects_what_it_cannot_compare():
    x = rand(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 4\) and \(1, 3, 4, 4\)"):
        pcka_loss(x, rand(1, 3, 4, 4))
    with pytest.raises(ValueError, match="unknown layout 'diagonal'"):
        pcka_loss(x, x, layout="diagonal")
    with pytest.raises(ValueError, match="unknown form 'square', expected one of cka, sqrt, l"):
        pcka_loss(x, x, form="square")
    with pytest.raises(ValueError, match="a debiased CKA may be negative, which form 'signed'"):
        pcka_loss(x, x, form="signed", debiased=True)
    with pytest.raises(ValueError, match="channel_weight 'variance' with layout 'batch'"):
        pcka_loss(x, x, layout="batch", channel_weight="variance")
    for layout in CHANNEL_FREE_LAYOUTS:
        pcka_loss(x, rand(1, 3, 4, 4), patch_size=1, layout=layout)
        with pytest.raises(ValueError, match="maps of one shape"):
            pcka_loss(x, rand(1, 3, 4, 4), patch_size=1, layout=layout, inter_weight=1.0)
    with pytest.raises(ValueError, match="at least 1"):
        pcka_loss(x, x, patch_size=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_fp32(dtype):
    s, t = rand(2, 4, 16, 16).to(dtype), rand(2, 4, 16, 16, seed=1).to(dtype)
    expected = pcka_loss(s.float(), t.float(), patch_size=4, inter_weight=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pcka_loss(s, t, patch_size=4, inter_weight=1.0)
        logits = rcka_loss(s.flatten(1), t.flatten(1))
    assert loss.dtype == logits.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(logits, rcka_loss(s.flatten(1).float(), t.flatten(1).float()))


# ---- rcka_loss -------------------------------------------------------------------------------


def test_rcka_equals_the_definition():
    s, t = rand(30, 7).double(), rand(30, 7, seed=1).double()
    x, y = s.numpy(), t.numpy()
    expected = 2 * (1 - np_cka(x, y)) + 3 * (1 - np_cka(x.T, y.T))
    assert rcka_loss(s, t, intra_weight=2.0, inter_weight=3.0).item() == pytest.approx(expected)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_rcka_of_scores_equals_the_definition(sigmoid):
    """A sigmoid does not tie the classes to one another, so that they can be related by it."""
    s, t = rand(30, 7).double(), rand(30, 7, seed=1).double()
    logits = x, y = s.numpy(), t.numpy()
    if sigmoid:
        x, y = logits = [1 / (1 + np.exp(-z / 2)) for z in logits]
    else:
        x, y = [np.exp(z / 2) / np.exp(z / 2).sum(1, keepdims=True) for z in logits]
    expected = 2 * (1 - np_cka(x, y)) + 3 * (1 - np_cka(logits[0].T, logits[1].T))
    loss = rcka_loss(s, t, intra_weight=2.0, inter_weight=3.0, temperature=2.0, sigmoid=sigmoid)
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("rows", [0, 1])
def test_rcka_of_no_relation_is_zero(rows):
    s = rand(rows, 5).requires_grad_()
    loss = rcka_loss(s, rand(rows, 5, seed=1))
    loss.backward()
    assert loss.item() == 0 and (s.grad == 0).all()


def test_rcka_rejects_what_it_cannot_compare():
    with pytest.raises(ValueError, match=r"\(4, 5\) and \(4, 6\)"):
        rcka_loss(rand(4, 5), rand(4, 6))
    with pytest.raises(ValueError, match="temperature must be positive"):
        rcka_loss(rand(4, 5), rand(4, 5), temperature=-1.0)


@pytest.mark.parametrize("module", [functional, baselines])
def test_doctests(module):
    done = doctest.testmod(module)
    assert done.attempted and not done.failed


# ---- padding ----------------------------------------------------------------------------------

EXTENTS = [(4, 6), (6, 3), (6, 6)]


@pytest.mark.parametrize("fill", functional.FILLS)
def test_padding_is_cut_off_and_filled(fill):
    x = torch.randn(3, 2, 7, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = without_padding(x, EXTENTS, fill)
    assert y.shape == (3, 2, 6, 6)
    own = [x[i, :, :h, :w].detach().numpy() for i, (h, w) in enumerate(EXTENTS)]
    whole = np.concatenate([part.reshape(2, -1) for part in own], 1).mean(1)
    for i, (h, w) in enumerate(EXTENTS):
        value = {"zero": [0.0, 0.0], "image": own[i].mean((1, 2)), "batch": whole}[fill]
        expected = np.tile(np.asarray(value)[:, None, None], (1, 6, 6))
        expected[:, :h, :w] = own[i]
        np.testing.assert_allclose(y[i].detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    y.sum().backward()
    for i, (h, w) in enumerate(EXTENTS):
        assert x.grad[i, :, :h, :w].eq(1).all()
        assert x.grad[i].sum() == 2 * h * w


def test_padding_of_all_images_costs_no_copy():
    x = torch.rand(2, 3, 8, 8)
    y = without_padding(x, [(7, 5)] * 2)
    assert y.shape == (2, 3, 7, 5) and y.data_ptr() == x.data_ptr()
    assert without_padding(x, [(8, 8)] * 2).shape == x.shape
    with pytest.raises(ValueError, match="takes an extent for each of 2 images, got 1"):
        without_padding(x, [(8, 8)])


def padded_noise(seed, channels=3, side=12):
    """Unrelated maps, and what a network makes of padding: one value a channel."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, channels, side, side, generator=g, dtype=torch.float64) + 2
    x[0, :, :, side // 2 :] = 5 + torch.rand(channels, 1, 1, generator=g, dtype=torch.float64)
    return x, [(side, side // 2), (side, side)]


@pytest.mark.parametrize("form", ["cka", "signed"])
def test_cells_relate_as_if_there_were_no_padding(form):
    """Patches of one cell: of what is not padding, cell by cell, from the definition."""
    (x, extents), (y, _) = padded_noise(0), padded_noise(1)
    expected = []
    for channel in range(3):
        a, b = (
            np.concatenate(
                [z[i, channel, :h, :w].numpy().ravel() for i, (h, w) in enumerate(extents)]
            )
            for z in (x, y)
        )
        if form == "signed":
            expected.append(np.corrcoef(a, b)[0, 1])
        else:
            expected.append(np_cka(a[:, None], b[:, None]))
    x, y = (without_padding(z, extents, "batch") for z in (x, y))
    loss = pcka_loss(x, y, patch_size=1, layout="sample", form=form)
    assert loss.item() == pytest.approx(1 - np.mean(expected), abs=1e-9)
    if form == "signed":
        assert baselines.pkd_loss(x, y).item() == pytest.approx(1 - np.mean(expected), abs=1e-9)


@pytest.mark.parametrize(("layout", "fill"), [("spatial", "image"), ("sample", "batch")])
def test_padding_is_no_relation(layout, fill):
    """Unrelated maps have the CKA that they have without, and not that of their margins."""
    (x, extents), (y, _) = padded_noise(2, 64, 24), padded_noise(3, 64, 24)
    options = {"patch_size": 2, "layout": layout}
    raw = 1 - pcka_loss(x, y, **options)
    filled = 1 - pcka_loss(*(without_padding(z, extents, fill) for z in (x, y)), **options)
    # The same number of samples, where the right half of the first image is left out altogether.
    without = 1 - pcka_loss(x[1:], y[1:], **options)
    assert filled < 0.1 and abs(filled - without) < 0.05 and raw > 0.3
