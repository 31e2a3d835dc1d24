"""The field's losses against their papers' formulas, written out in numpy."""

import numpy as np
import pytest
import torch

from pcka_distill.baselines import (
    at_loss,
    cwd_loss,
    dist_loss,
    dkd_loss,
    fgd_focal_loss,
    hcl_loss,
    kd_loss,
    mimic_loss,
    object_masks,
    pkd_loss,
    sp_loss,
)
from pcka_distill.functional import fcka_loss

SHAPE = (3, 5, 6, 7)


def maps(shape=SHAPE, other=SHAPE, dtype=torch.float64):
    rng = np.random.default_rng(0)
    x, y = (torch.tensor(rng.normal(0.3, 2, s), dtype=dtype) for s in (shape, other))
    return x.requires_grad_(), y


def rows(n=9, p=5, dtype=torch.float64):
    rng = np.random.default_rng(1)
    x, y = (torch.tensor(rng.normal(0, 2, (n, p)), dtype=dtype) for _ in range(2))
    return x.requires_grad_(), y


def softmax(z, axis=-1):
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def kl(p, q, axis=None):
    return (p * np.log(p / q)).sum(axis)


def correlation(a, b):
    return np.corrcoef(a, b)[0, 1]


# ---- the definitions -------------------------------------------------------------------------


def np_mimic(x, y):
    return ((x - y) ** 2).mean()


def np_at(x, y):
    total = 0
    for a, b in zip(x, y):
        q = [(z**2).sum(0).ravel() for z in (a, b)]
        q = [z / np.linalg.norm(z) for z in q]
        total += np.linalg.norm(q[0] - q[1]) ** 2
    return total / len(x)


def np_cwd(x, y, temperature=1.0):
    b, c = x.shape[:2]
    terms = [
        kl(softmax(y[i, k].ravel() / temperature), softmax(x[i, k].ravel() / temperature))
        for i in range(b)
        for k in range(c)
    ]
    return temperature**2 * np.mean(terms)


def np_pkd(x, y):
    c = x.shape[1]
    return np.mean([1 - correlation(x[:, k].ravel(), y[:, k].ravel()) for k in range(c)])


def np_sp(x, y):
    grams = []
    for z in (x, y):
        q = z.reshape(len(z), -1)
        g = q @ q.T
        grams.append(g / np.linalg.norm(g, axis=1, keepdims=True))
    return np.linalg.norm(grams[0] - grams[1]) ** 2 / len(x) ** 2


def np_hcl(x, y):
    def pool(z, side):
        h, w = z.shape[2:]
        cut = [[(i * n // side, -(-(i + 1) * n // side)) for i in range(side)] for n in (h, w)]
        return np.stack(
            [np.stack([z[:, :, a:b, c:d].mean((2, 3)) for c, d in cut[1]], -1) for a, b in cut[0]],
            2,
        )

    loss, total = ((x - y) ** 2).mean(), 1.0
    for side, weight in ((4, 0.5), (2, 0.25), (1, 0.125)):
        loss += weight * ((pool(x, side) - pool(y, side)) ** 2).mean()
        total += weight
    return loss / total


def np_fcka(x, y):
    b = len(x)
    h = np.eye(b) - 1 / b
    k, l = (h @ (z.reshape(b, -1) @ z.reshape(b, -1).T) @ h for z in (x, y))
    return 1 - (k * l).sum() / (np.linalg.norm(k) * np.linalg.norm(l))


@pytest.mark.parametrize(
    ("loss", "oracle", "channels"),
    [
        (mimic_loss, np_mimic, 5),
        (at_loss, np_at, 4),
        (cwd_loss, np_cwd, 5),
        (pkd_loss, np_pkd, 5),
        (sp_loss, np_sp, 4),
        (hcl_loss, np_hcl, 5),
        (fcka_loss, np_fcka, 4),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_of_features(loss, oracle, channels):
    """By value, and by gradient: at equal maps none, elsewhere that of finite differences."""
    x, y = maps(other=(SHAPE[0], channels, *SHAPE[2:]))
    expected = oracle(x.detach().numpy(), y.numpy())
    assert loss(x, y).item() == pytest.approx(expected, rel=1e-9)
    assert torch.autograd.gradcheck(lambda z: loss(z, y), x)
    same = loss(x, x.detach())
    same.backward()
    assert same.item() == pytest.approx(0, abs=1e-9) and x.grad.abs().max() < 1e-7


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_cwd_at_other_temperatures(temperature):
    x, y = maps()
    expected = np_cwd(x.detach().numpy(), y.numpy(), temperature)
    assert cwd_loss(x, y, temperature=temperature).item() == pytest.approx(expected)


def test_hcl_leaves_out_what_is_no_coarser():
    x, y = maps((2, 3, 2, 2), (2, 3, 2, 2))
    a, b = x.detach().numpy(), y.numpy()
    pooled = ((a.mean((2, 3)) - b.mean((2, 3))) ** 2).mean()
    expected = (((a - b) ** 2).mean() + 0.5 * pooled) / 1.5
    assert hcl_loss(x, y).item() == pytest.approx(expected)


# ---- logits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd(temperature):
    x, y = rows()
    p, q = (softmax(z.detach().numpy() / temperature) for z in (y, x))
    expected = temperature**2 * kl(p, q, -1).mean()
    loss = kd_loss(x, y, temperature=temperature)
    assert loss.item() == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda z: kd_loss(z, y, temperature=temperature), x)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_of_classes_one_by_one(temperature):
    x, y = rows()
    p, q = (1 / (1 + np.exp(-z.detach().numpy() / temperature)) for z in (y, x))
    expected = temperature**2 * (kl(p, q, -1) + kl(1 - p, 1 - q, -1)).mean()
    loss = kd_loss(x, y, temperature=temperature, sigmoid=True)
    assert loss.item() == pytest.approx(expected)
    # Up to a constant the binary cross-entropy with the teacher's scores.
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    target = (y / temperature).sigmoid()
    loss.backward()
    (gradient,) = torch.autograd.grad(
        temperature**2 * bce(x / temperature, target, reduction="sum") / len(x), x
    )
    torch.testing.assert_close(x.grad, gradient)


def test_dkd():
    x, y = rows()
    labels = torch.arange(9) % 5
    t, alpha, beta = 4.0, 1.5, 8.0
    total = 0
    for a, b, k in zip(x.detach().numpy(), y.numpy(), labels.tolist()):
        p, q = softmax(b / t), softmax(a / t)
        others = [i for i in range(5) if i != k]
        tckd = kl(np.array([p[k], 1 - p[k]]), np.array([q[k], 1 - q[k]]))
        nckd = kl(p[others] / p[others].sum(), q[others] / q[others].sum())
        total += alpha * tckd + beta * nckd
    options = {"alpha": alpha, "beta": beta, "temperature": t}
    assert dkd_loss(x, y, labels, **options).item() == pytest.approx(t**2 * total / 9)
    assert torch.autograd.gradcheck(lambda z: dkd_loss(z, y, labels, **options), x)


def test_kd_is_dkd_with_the_weight_of_the_teachers_doubt():
    """KL = TCKD + (1 - p) NCKD (the paper's eq. 6), row by row."""
    x, y = rows()
    for i in range(len(x)):
        labels = torch.tensor([i % 5])
        doubt = 1 - y[i].softmax(0)[i % 5].item()
        a, b = x[i : i + 1], y[i : i + 1]
        torch.testing.assert_close(
            dkd_loss(a, b, labels, alpha=1.0, beta=doubt, temperature=1.0), kd_loss(a, b)
        )


def test_dkd_leaves_out_what_is_ignored():
    x, y = rows()
    labels = torch.tensor([0, -1, 2, -1, 4, 0, -1, 1, 1])
    known = labels >= 0
    torch.testing.assert_close(dkd_loss(x, y, labels), dkd_loss(x[known], y[known], labels[known]))
    nothing = dkd_loss(x, y, torch.full((9,), -1))
    nothing.backward()
    assert nothing.item() == 0 and not x.grad.any()


@pytest.mark.parametrize("sigmoid", [False, True])
def test_dist(sigmoid):
    x, y = rows()
    t = 2.0
    scores = [z.detach().numpy() / t for z in (x, y)]
    a, b = (1 / (1 + np.exp(-z)) if sigmoid else softmax(z) for z in scores)
    inter = np.mean([1 - correlation(a[i], b[i]) for i in range(9)])
    intra = np.mean([1 - correlation(a[:, k], b[:, k]) for k in range(5)])
    options = {"inter_weight": 2.0, "intra_weight": 3.0, "temperature": t, "sigmoid": sigmoid}
    expected = t**2 * (2 * inter + 3 * intra)
    assert dist_loss(x, y, **options).item() == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda z: dist_loss(z, y, **options), x)


# ---- FGD -------------------------------------------------------------------------------------


def test_masks_of_objects():
    """One box of 2 x 3 cells, and one of 1 x 1 in it, of an image of 8 x 8 cells of 4 pixels."""
    boxes = [torch.tensor([[4.0, 8.0, 16.0, 16.0], [5.0, 9.0, 7.0, 11.0]]), torch.zeros(0, 4)]
    foreground, background = object_masks(boxes, (32, 32), torch.zeros(2, 5, 8, 8))
    expected = np.zeros((8, 8))
    expected[2:4, 1:4] = 1 / 6
    expected[2, 1] = 1
    np.testing.assert_allclose(foreground[0, 0], expected)
    np.testing.assert_allclose(background[0, 0], (expected == 0) / 58)
    assert not foreground[1].any()
    np.testing.assert_allclose(background[1, 0], np.full((8, 8), 1 / 64))


def test_boxes_at_the_edges_are_of_cells_that_are_there():
    """Touching the far edge, without an extent, beyond a map that is cut: never an error."""
    boxes = [torch.tensor([[28.0, 28.0, 32.0, 32.0], [4.0, 4.0, 4.0, 4.0], [40.0, 0.0, 44.0, 4.0]])]
    foreground, background = object_masks(boxes, (32, 32), torch.zeros(1, 2, 8, 8))
    assert foreground[0, 0, 7, 7] == 1 and foreground[0, 0, 1, 1] == 1
    assert (foreground > 0).sum() == 2
    assert background.sum().item() == pytest.approx(1)


def test_fgd():
    x, y = maps()
    rng = np.random.default_rng(2)
    masks = [torch.tensor(rng.random((3, 1, 6, 7))) for _ in range(2)]
    alpha, beta, gamma, t = 0.3, 0.2, 0.1, 0.5
    total = 0
    for i in range(3):
        a, b = x[i].detach().numpy(), y[i].numpy()
        spatial, channel = (
            [softmax(np.abs(z).mean(0).ravel() / t) * 42 for z in (a, b)],
            [softmax(np.abs(z).mean((1, 2)) / t) * 5 for z in (a, b)],
        )
        f, g = (m[i, 0].numpy() for m in masks)
        mask = (alpha * f + beta * g) * spatial[1].reshape(6, 7)
        total += (mask * channel[1][:, None, None] * (b - a) ** 2).sum()
        total += gamma * sum(np.abs(z[0] - z[1]).sum() for z in (spatial, channel))
    options = {"alpha": alpha, "beta": beta, "gamma": gamma, "temperature": t}
    assert fgd_focal_loss(x, y, *masks, **options).item() == pytest.approx(total / 3)
    assert torch.autograd.gradcheck(lambda z: fgd_focal_loss(z, y, *masks, **options), x)


# ---- hard input ------------------------------------------------------------------------------

OF_MAPS = [mimic_loss, at_loss, cwd_loss, pkd_loss, sp_loss, hcl_loss, fcka_loss]
OF_ROWS = [
    kd_loss,
    lambda x, y: kd_loss(x, y, sigmoid=True),
    lambda x, y: dkd_loss(x, y, torch.zeros(len(x), dtype=torch.long)),
    dist_loss,
    lambda x, y: dist_loss(x, y, sigmoid=True),
]


def finite(loss, x, y):
    x = x.detach().clone().requires_grad_()
    value = loss(x, y)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(x.grad).all()
    return value.item(), x.grad


@pytest.mark.parametrize("loss", OF_MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_maps_that_do_not_vary(loss, dtype):
    x, y = maps(dtype=dtype)
    x = x.detach()
    constant, zero = torch.full_like(x, 3.0), torch.zeros_like(x)
    for a, b in ((constant, y), (x, constant), (zero, y), (x, zero), (zero, zero)):
        finite(loss, a, b)
    dead = x.clone()
    dead[:, 1] = 0
    finite(loss, dead, y)


@pytest.mark.parametrize("loss", OF_MAPS)
def test_half_precision_is_computed_in_single(loss):
    """Squares of 300 overflow fp16; under autocast, too."""
    x, y = maps(dtype=torch.float16)
    x, y = x.detach() * 100, y * 100
    expected = finite(loss, x.float(), y.float())[0]
    assert finite(loss, x, y)[0] == pytest.approx(expected, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert finite(loss, x.float(), y.float())[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", OF_ROWS)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e4])
def test_logits_of_any_size(loss, scale):
    x, y = rows(dtype=torch.float32)
    finite(loss, x * scale, y * scale)
    finite(loss, x * scale, torch.zeros_like(y))
    finite(loss, torch.zeros_like(x), y * scale)


@pytest.mark.parametrize("loss", OF_ROWS)
def test_no_rows(loss):
    value, gradient = finite(loss, torch.zeros(0, 5), torch.zeros(0, 5))
    assert value == 0 and gradient.shape == (0, 5)


@pytest.mark.parametrize("loss", OF_MAPS)
def test_no_images(loss):
    value, _ = finite(loss, torch.zeros(0, 5, 4, 4), torch.zeros(0, 5, 4, 4))
    assert value == 0


def test_one_image_is_no_relation():
    x, y = maps((1, 5, 6, 7), (1, 5, 6, 7))
    value, gradient = finite(fcka_loss, x, y)
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: mimic_loss(x, y[:, :3]), "mimic_loss takes two .* maps of one shape, got"),
        (lambda x, y: cwd_loss(x, y[..., :3]), "cwd_loss takes two"),
        (lambda x, y: pkd_loss(x, y[:2]), "pkd_loss takes two"),
        (lambda x, y: at_loss(x, y[..., :3]), "one shape but for their channels, got"),
        (lambda x, y: sp_loss(x, y[:2]), "one shape but for their channels, got"),
        (lambda x, y: hcl_loss(x[0], y[0]), "hcl_loss takes two"),
        (lambda x, y: fcka_loss(x, y[:2]), "as many images, got 3 and 2"),
        (lambda x, y: kd_loss(x, y), r"kd_loss takes two \(N, P\)"),
        (lambda x, y: dist_loss(x[:, :, 0, 0], y[:2, :, 0, 0]), "dist_loss takes two"),
        (
            lambda x, y: dkd_loss(x[:, :, 0, 0], y[:, :, 0, 0], torch.zeros(2)),
            r"\(N,\) labels, got \(2,\)",
        ),
    ],
)
def test_shapes_that_do_not_match(call, message):
    with pytest.raises(ValueError, match=message):
        call(*maps())
