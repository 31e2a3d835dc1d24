"""The benchmarks measure what they say, and their pages are those of their raw figures."""

import importlib.util
import json
import re
import statistics
import sys

import numpy as np
import pytest
import torch
from helpers import REPO

from pcka_distill import functional
from pcka_distill.compare import Comparison, read_plan, write_page
from pcka_distill.functional import pcka_loss

FOLDER = REPO / "benchmarks"
VECTORS = np.load(REPO / "tests" / "data" / "reference_losses.npz")


@pytest.fixture(scope="module")
def performance():
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("bm_performance", FOLDER / "bm_performance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))


@pytest.mark.parametrize(
    ("case", "inter"),
    [("spatial_intra", 0.0), ("spatial_intra_inter", 10.0), ("spatial_exact_multiple", 10.0)],
)
def test_the_published_algorithm_gives_the_published_numbers(case, inter, performance):
    student = torch.tensor(VECTORS[f"{case}/student"], requires_grad=True)
    teacher = torch.tensor(VECTORS[f"{case}/teacher"])
    loss = performance.published_pcka(student, teacher, intra_weight=10.0, inter_weight=inter)
    loss.backward()
    assert loss.item() == pytest.approx(float(VECTORS[f"{case}/loss"]), rel=1e-4)
    gradient = VECTORS[f"{case}/grad"]
    np.testing.assert_allclose(
        student.grad.numpy(), gradient, rtol=1e-4, atol=1e-4 * np.abs(gradient).max()
    )


def test_ratios_are_of_rounds(performance):
    """A slow round is slow for both: the ratio of medians would be 2.5, or 1."""
    slow_round = performance.ratios([2.0, 20.0, 3.0], [1.0, 10.0, 1.0])
    assert slow_round == {"median": 2.0, "low": 2.0, "high": 3.0}


def test_peak_memory_is_what_is_alive_at_once(performance):
    mega = 1 << 20

    def run():
        for _ in range(3):
            a = torch.empty(4 * mega, dtype=torch.uint8)
            b = torch.empty(2 * mega, dtype=torch.uint8)
            del a, b
        return torch.empty(5 * mega, dtype=torch.uint8)

    peak = performance.peak_bytes(run, torch.device("cpu"))
    assert 6 * mega <= peak < 6 * mega + 4096


def test_peak_memory_counts_huge_pages(performance, monkeypatch):
    monkeypatch.setattr(functional, "_HUGE", 1 << 20)
    like = torch.empty(1 << 20)
    peak = performance.peak_bytes(
        lambda: functional._gradient_like(like, torch.float32), torch.device("cpu")
    )
    assert 4 << 20 <= peak < (4 << 20) + 4096


@pytest.mark.parametrize(("caches", "shape"), [(True, (50, 84)), (False, (100, 168))])
def test_the_loss_needs_little_memory(caches, shape, performance, monkeypatch):
    """The student's gradient, half of both sides' features, and some groups: far from a copy.

    As on a GPU, too, where memory is free as soon as it can be, also where steps make no gradient.
    """
    monkeypatch.setattr(functional, "in_caches", lambda device: caches)
    shape = (2, 256, *shape)
    student, teacher = (torch.randn(shape) for _ in range(2))
    student.requires_grad_()

    def run():
        return torch.autograd.grad(pcka_loss(student, teacher, inter_weight=1.0), student)

    def validate():
        with torch.no_grad():
            return pcka_loss(student, teacher, inter_weight=1.0)

    features = 2 * student.numel() * 4
    for what, most in ((run, 1.5), (validate, 0.75)):
        # As on a GPU in several steps.
        monkeypatch.setattr(functional, "_DEVICE_BUDGET", 1 if what is validate else 64 << 20)
        what()
        assert performance.peak_bytes(what, torch.device("cpu")) < most * features


def test_the_page_is_that_of_its_rows(performance):
    rows = [json.loads(x) for x in (FOLDER / "performance.jsonl").read_text().splitlines()]
    page = (FOLDER / "performance.md").read_text()
    assert page == performance.page(rows)
    assert {row["section"] for row in rows} == set(performance.SECTIONS)
    for name in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (FOLDER / name).is_file()


@pytest.mark.parametrize("name", sorted(x.stem for x in FOLDER.glob("*.yaml")))
def test_a_comparison_is_that_of_its_rows(name, tmp_path):
    """Every run of every table is there, and the page is made of them alone."""
    plan = read_plan(FOLDER / f"{name}.yaml")
    comparison = Comparison(plan, FOLDER / plan.results)
    assert not comparison.missing(comparison.plan.sections)
    page = (FOLDER / f"{name}.md").read_text()
    assert write_page(comparison, tmp_path / f"{name}.md") == page
    for name in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (FOLDER / name).is_file() and (tmp_path / name).is_file()


def test_the_comparison_by_hand():
    """A cell of the page, from the lines of the results themselves."""
    aps = {}
    for line in (FOLDER / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row.get("task") == "retinanet" and row["seed"] < 5:
            key = json.dumps(row["opts"], sort_keys=True)
            aps.setdefault(key, {})[row["seed"]] = row["metrics"]["digits_test"]["AP"]
    plain = aps['{"LOSSES": ["PCKALoss"], "PCKA.WEIGHT": 0.0}']
    pkd = aps['{"LOSSES": ["PKDLoss"], "PKD.WEIGHT": 3.0}']
    gain = statistics.mean(pkd[s] - plain[s] for s in range(5))
    page = (FOLDER / "comparison.md").read_text()
    row = re.search(r"^\| PKD \|.*$", page, re.M)[0]
    values = [pkd[s] for s in range(5)]
    assert f"| {statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} |" in row
    assert f"| {gain:+.1f} [" in row


def test_an_unknown_section_is_one_line(performance, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bm_performance.py", "los"])
    with pytest.raises(SystemExit):
        performance.main()
    assert "unknown section los, expected loss, step" in capsys.readouterr().err
