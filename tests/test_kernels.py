"""PCKA's kernels for a GPU, run by Triton's interpreter; and that they compile for one."""

import logging
import os
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import rand, value_and_gradient
from test_fused import IN_MEMORY, Operations

from pcka_distill import functional, kernels
from pcka_distill.functional import CHANNEL_LAYOUTS, pcka_loss

WEIGHTS = [(1.0, 0.0), (0.0, 2.0), (1.0, 2.0)]
compiler = pytest.mark.skipif(not kernels.available, reason="there is no Triton of version 3")


@pytest.fixture
def interpreted(monkeypatch):
    """As on a GPU, in pieces as small as can be."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU tests/test_cuda.py runs them")
    monkeypatch.setattr(kernels, "_run", lambda device: True)
    monkeypatch.setattr(functional, "in_caches", lambda device: False)
    monkeypatch.setattr(functional, "_DEVICE_BUDGET", 1)
    monkeypatch.setattr(kernels, "_LEAST", 2)
    monkeypatch.setattr(kernels, "_DOWN", 4)
    monkeypatch.setattr(kernels, "_TILE", 64)
    # What overflows, or is divided by zero, it says.
    with np.errstate(all="ignore"):
        yield


def expected(x, y, **options):
    """By autograd, in fp64."""
    x = x.double().clone().requires_grad_()
    # A teacher that wants a gradient takes the plain form.
    loss = pcka_loss(x, y.double().clone().requires_grad_(), **options)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def same(found, wanted, tolerance=1e-5):
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=tolerance, atol=1e-6)
    error = (found[1].double() - wanted[1]).norm() / wanted[1].norm()
    assert error < 10 * tolerance


@compiler
@pytest.mark.parametrize("layout", CHANNEL_LAYOUTS)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("weights", WEIGHTS)
# In whole patches; either side resized, or both; more samples than values, and fewer.
@pytest.mark.parametrize(
    ("shape", "patch"), [((2, 3, 8, 12), 4), ((2, 2, 9, 12), 4), ((1, 3, 12, 14), 2)]
)
@pytest.mark.parametrize("pieces", [True, False])
def test_equal_to_the_plain_form(
    layout, center, weights, shape, patch, pieces, interpreted, monkeypatch
):
    if not pieces:
        monkeypatch.setattr(functional, "_DEVICE_BUDGET", 1 << 26)
        monkeypatch.setattr(kernels, "_LEAST", 1 << 10)
    x, y = rand(*shape), rand(*shape, seed=1)
    y = y + 0.5 * x
    intra, inter = weights
    options = {"patch_size": patch, "layout": layout, "center": center}
    options |= {"intra_weight": intra, "inter_weight": inter}
    found = value_and_gradient(pcka_loss, x, y, **options)
    same(found, expected(x, y, **options))
    # Of which there is no gradient to make.
    torch.testing.assert_close(pcka_loss(x, y, **options), found[0])


@compiler
@pytest.mark.parametrize("form", ["sqrt", "log"])
@pytest.mark.parametrize("near", [0.0, 1.0])
def test_forms(form, near, interpreted):
    x = rand(2, 3, 9, 8)
    y = near * x + rand(2, 3, 9, 8, seed=1)
    options = {"patch_size": 4, "inter_weight": 2.0, "form": form}
    same(value_and_gradient(pcka_loss, x, y, **options), expected(x, y, **options))


@compiler
@pytest.mark.parametrize("teacher", [torch.float32, torch.float64])
def test_weighted_channels(teacher, interpreted):
    x, y = rand(2, 5, 9, 8), rand(2, 5, 9, 8, seed=1) * torch.arange(1, 6).view(1, 5, 1, 1)
    y = y.to(teacher)
    options = {"patch_size": 4, "inter_weight": 1.0, "channel_weight": "variance"}
    same(value_and_gradient(pcka_loss, x, y, **options), expected(x, y, **options))


@compiler
@pytest.mark.parametrize("student", IN_MEMORY)
@pytest.mark.parametrize("teacher", IN_MEMORY)
def test_however_maps_lie_in_memory(student, teacher, interpreted):
    x, y = (rand(2, 6, 10, 8, seed=i) for i in range(2))
    options = {"patch_size": 4, "inter_weight": 1.0}
    there = IN_MEMORY[student](x)
    found = value_and_gradient(pcka_loss, there, IN_MEMORY[teacher](y), **options)
    same(found, expected(x, y, **options))
    assert found[1].stride() == torch.empty_like(there).stride()


@compiler
@pytest.mark.parametrize("student", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("teacher", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision(student, teacher, interpreted):
    """In fp32; the gradient is cast once, after AMP's scale."""
    x, y = rand(2, 4, 9, 8).to(student), rand(2, 4, 9, 8, seed=1).to(teacher)
    options = {"patch_size": 4, "inter_weight": 1.0}
    value, gradient = value_and_gradient(pcka_loss, x, y, **options)
    assert value.dtype == torch.float32 and gradient.dtype == student
    same((value, gradient), expected(x, y, **options), max(1e-5, torch.finfo(student).eps / 10))


def to_tf32(x, up):
    """11 bits of the significand, to the nearest or cut off."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + (0x1000 if up else 0)) & ~0x1FFF).view(torch.float32)


@compiler
@pytest.mark.parametrize("nearest", [True, False])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_products_in_tf32_are_compared_with_their_like(nearest, weights, interpreted, monkeypatch):
    """The CKA of a map with itself is 1 then, too, also where means are most of it."""
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *x: bmm(*(to_tf32(y, nearest) for y in x)))
    x = rand(1, 2, 12, 12) + 20 * rand(1, 2, 4, 4, seed=1).repeat(1, 1, 3, 3)
    options = dict(zip(("intra_weight", "inter_weight"), weights), patch_size=4)
    assert pcka_loss(x.half(), x.half(), **options).item() == pytest.approx(0, abs=2e-6)


@compiler
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("side", [0, 1])
def test_what_does_not_vary(weights, side, interpreted):
    """Of a teacher it teaches nothing; a student that does not is as wrong as can be."""
    maps = [rand(3, 3, 12, 20).clone(), rand(3, 3, 12, 20, seed=1).clone()]
    maps[side][:, 0] = 777.7
    intra, inter = weights
    options = {"patch_size": 4, "intra_weight": intra, "inter_weight": inter}
    value, gradient = value_and_gradient(pcka_loss, *maps, **options)
    rest = expected(*(x[:, 1:] for x in maps), **options)[0] * 2 / 3
    worst = (intra + inter) / 3
    torch.testing.assert_close(value.double(), rest + (0 if side else worst))
    assert (gradient[:, 0] == 0).all() and gradient[:, 1:].any()


@compiler
def test_rounding_errors_of_many_samples_are_no_variation(interpreted, monkeypatch):
    """Added up one by one: their mean was 30 times further from this value than it could be."""
    monkeypatch.setattr(kernels, "_TILE", 1)
    monkeypatch.setattr(kernels, "_CHUNKS", 1)
    for name in ("_DOWN", "_ACROSS"):
        monkeypatch.setattr(kernels, name, 128)
    x, y = rand(1, 1, 256, 256), torch.full((1, 1, 256, 256), 1.939773678779602)
    value, gradient = value_and_gradient(pcka_loss, x, y, patch_size=16)
    assert value == 0 and (gradient == 0).all()


@compiler
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("magnitude", [1e-15, 1e-8, 1e9, 1e15])
def test_the_magnitude_does_not_matter(weights, magnitude, interpreted):
    x, y = rand(2, 3, 8, 12), rand(2, 3, 8, 12, seed=1)
    options = dict(zip(("intra_weight", "inter_weight"), weights), patch_size=4)
    value, gradient = value_and_gradient(pcka_loss, magnitude * x, magnitude * y, **options)
    same((value, gradient.double() * magnitude), expected(x, y, **options))


@compiler
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("center", [True, False])
def test_what_is_no_number_stays_visible(weights, center, interpreted):
    options = dict(zip(("intra_weight", "inter_weight"), weights), patch_size=4, center=center)
    for side, value in ((0, np.nan), (1, np.nan), (0, np.inf), (1, -np.inf)):
        maps = [rand(2, 3, 8, 8).clone(), rand(2, 3, 8, 8, seed=1).clone()]
        maps[side][0, 0, 2, 2] = value
        value, gradient = value_and_gradient(pcka_loss, *maps, **options)
        assert value.isnan()
        assert gradient[:, 1:].isfinite().all() and gradient[:, 1:].any()
    # A trace that overflows, where no entry of a Gram does.
    x = 1.5e18 * rand(2, 3, 16, 16).sign()
    assert pcka_loss(x, x, **options).isnan()


@compiler
@pytest.mark.parametrize("patch", [2, 5, 16])
@pytest.mark.parametrize("sides", [(1, 1), (1, 33), (25, 42), (9, 50), (50, 3)])
def test_a_gradient_goes_through_the_resize(patch, sides, interpreted):
    """Of one channel, against torch's own."""
    x, y = rand(1, 1, *sides), rand(1, 1, *sides, seed=1)
    options = {"patch_size": patch, "center": False, "intra_weight": 0.0, "inter_weight": 1.0}
    found, wanted = value_and_gradient(pcka_loss, x, y, **options), expected(x, y, **options)
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-3, atol=2e-6)


@compiler
def test_what_torch_launches_beside_them(interpreted, monkeypatch):
    """Three products a step, and the sum of the losses; to ask for a type is none."""
    from pcka_distill import triton_kernels

    launched = []
    for name in triton_kernels.__all__:
        kernel = mock.MagicMock()
        kernel.__getitem__.return_value.side_effect = lambda *_, name=name, **__: launched.append(
            name
        )
        monkeypatch.setattr(triton_kernels, name, kernel)
    monkeypatch.setattr(functional, "_DEVICE_BUDGET", 1 << 26)
    x, y = rand(2, 4, 9, 8).requires_grad_(), rand(2, 4, 9, 8, seed=1)
    options = {"patch_size": 4, "inter_weight": 1.0}
    pcka_loss(x, y, **options)
    launched.clear()
    with Operations() as seen:
        pcka_loss(x, y, **options)
    assert seen.launches <= 4 + 1
    assert launched == ["sum_columns", "write_sides", "sum_grams", "write_factors", "spread"]


def test_what_they_are_not_for(interpreted):
    x = rand(2, 4, 9, 8)
    assert kernels.fit(x, x, 32, "cka")
    assert not kernels.fit(x.double(), x, 32, "cka")
    assert not kernels.fit(x, x, 32, "signed")
    assert not kernels.fit(x, x, 1 << 14, "cka")
    assert not kernels.fit(torch.nn.Parameter(x), x, 32, "cka")
    assert not kernels.fit(x, x.to("meta"), 32, "cka")
    # Too far apart to be counted in 32 bits.
    far = torch.empty_strided((2, 1, 1, 1), (1 << 31, 1, 1, 1), device="meta")
    assert not kernels.fit(far, far, 32, "cka")


def test_where_they_do_not_compile_torch_goes_on(monkeypatch, caplog):
    def fail(*args, **options):
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(kernels, "available", True)
    monkeypatch.setattr(kernels, "pcka", fail)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch, "zeros", lambda *size, device: torch.empty(size))
    with caplog.at_level(logging.WARNING, "detectron2"):
        assert not kernels._run.__wrapped__(torch.device("cuda"))
    (record,) = caplog.records
    assert "(Failed to find C compiler.); torch's operations" in record.message


def test_a_processor_or_an_old_gpu_has_none(monkeypatch):
    assert not kernels._run.__wrapped__(torch.device("cpu"))
    monkeypatch.setattr(kernels, "available", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert not kernels._run.__wrapped__(torch.device("cuda"))


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from pcka_distill import kernels, triton_kernels

FLOATS = ("scale_h", "scale_w", "intra_weight", "inter_weight", "tiny", "limit", "floor")
POINTERS = {"samples_ptr": "*i32", "features_ptr": "*i32"}
CONSTANTS = {
    "ROWS_RESIZED": True, "COLUMNS_RESIZED": True, "OVER_SAMPLES": True, "OVER_FEATURES": True,
    "APART": True, "INTRA": True, "INTER": True, "WEIGHTED": True, "FORM": "log", "GRADIENT": True,
    "PATCH": 16, "TALL": 4, "DOWN": kernels._DOWN, "ACROSS": kernels._ACROSS,
}


def build(name, warps, **constants):
    kernel = getattr(triton_kernels, name)
    signature, values = {}, {}
    for i, x in enumerate(kernel.arg_names):
        if x.isupper():
            signature[x], values[(i,)] = "constexpr", (CONSTANTS | constants)[x]
        elif x.endswith("_ptr"):
            half = x.startswith(("student", "teacher"))
            signature[x] = "*fp16" if half else POINTERS.get(x, "*fp32")
        else:
            signature[x] = "fp32" if x in FLOATS else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    assert compile(source, target=target, options={"num_warps": warps}).asm["cubin"]


for alone in (True, False):
    build("write_sides", kernels._SIDE_WARPS, ALONE=alone, BLOCK=512)
    build("write_factors", kernels._GRAM_WARPS, ALONE=alone)
build("write_sides", 16, ALONE=True, BLOCK=kernels._WIDEST, TALL=1)
build("sum_columns", kernels._SIDE_WARPS, BLOCK=512)
build("sum_grams", kernels._GRAM_WARPS)
build("spread", kernels._SPREAD_WARPS, BLOCK=kernels._BLOCK)
"""


@compiler
@pytest.mark.parametrize("capability", ["75", "80", "90"])
def test_they_compile_without_a_gpu(capability, tmp_path):
    environment = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, capability],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
