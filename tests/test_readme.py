"""What README.md shows is so."""

import ast
import itertools
import json
import re
import statistics

import pytest
import yaml
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from helpers import REPO

from pcka_distill import DistillationModel, get_distill_cfg

README = (REPO / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def expand(key):
    """{A,B}.X -> A.X, B.X"""
    parts = [p.strip("{}").split(",") for p in re.findall(r"\{.*?\}|[^{}]+", key)]
    return ["".join(p) for p in itertools.product(*parts)]


def test_the_table_of_keys_is_complete_and_its_defaults_are_true():
    table = README.split("## Keys")[1].split("\n## ")[0]
    documented = {
        key: ast.literal_eval(default)
        for keys, default in re.findall(r"^\| `(\S+)` \| `(.*?)` \|", table, re.M)
        for key in expand(keys)
    }
    cfg = get_distill_cfg()
    stock = dict(leaves(get_cfg()))
    own = {k: v for k, v in leaves(cfg) if k not in stock and not k.startswith("MODEL.FCOS.")}
    actual = {k.removeprefix("MODEL.DISTILL."): v for k, v in own.items()}
    assert documented == actual


@pytest.mark.parametrize("source", blocks("yaml"))
def test_yaml(source):
    content = yaml.safe_load(source)
    known = dict(leaves(get_distill_cfg()))
    assert all(key in known for key, _ in leaves(content) if key != "_BASE_")


@pytest.mark.parametrize("source", blocks("python"))
def test_python(source, monkeypatch):
    def get(name, trained=False):
        """Without a network: the zoo's architectures, not their weights."""
        cfg = model_zoo.get_config(name)
        cfg.MODEL.DEVICE = "cpu"
        return build_model(cfg)

    monkeypatch.setattr(model_zoo, "get", get)
    scope = {"__name__": "readme"}
    exec(source, scope)
    if "model" in scope:
        assert isinstance(scope["model"], DistillationModel)


def test_files_that_it_names_are_there():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (REPO / path).is_file(), path
    for path in re.findall(r"configs/[^\s{<]+\.yaml", README):
        assert (REPO / path).is_file(), path


def test_every_pair_for_coco_is_in_the_table_and_no_cell_is_empty():
    table = re.findall(r"^\| `(COCO-\S+)` \|(.*)\|$", README, re.M)
    named = set()
    for pair, cells in table:
        assert all(cell.strip() for cell in cells.split("|")), pair
        paths = {f"{pair}_{losses}_2x" for losses in ("pcka", "pcka_mimic", "pcka_rcka")}
        paths |= set(re.findall(r"`(COCO-\S+)`", cells))
        assert all((REPO / "configs" / f"{p}.yaml").is_file() for p in paths), pair
        named |= paths
    shipped = {
        str(p.relative_to(REPO / "configs").with_suffix(""))
        for p in (REPO / "configs").glob("COCO-*/*.yaml")
        if not p.name.startswith("Base") and "32x8d" not in p.name
    }
    assert named == shipped


def benchmark():
    """benchmarks/digits.jsonl: (pair, method) -> test AP by seed."""
    aps = {}
    for line in (REPO / "benchmarks" / "digits.jsonl").read_text().splitlines():
        row = json.loads(line)
        ap = row["results"]["digits_test"]["bbox"]["AP"]
        aps.setdefault((row["pair"], row["method"]), []).append(ap)
    return aps


def spread(values):
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


@pytest.mark.parametrize(
    ("pair", "start"),
    [
        ("retinanet", "RetinaNet,"),
        ("fcos", "FCOS,"),
        ("faster_rcnn", "Faster R-CNN,"),
        ("cascade_to_faster_rcnn", "the same, taught by a Cascade R-CNN"),
    ],
)
def test_numbers_are_those_of_the_benchmark(pair, start):
    aps = benchmark()
    row = re.search(rf"^\| {re.escape(start)}.*\|$", README, re.M)[0]
    alone, taught, teacher = re.findall(r"\d+\.\d(?: ± \d+\.\d)?(?=\*\*| \||  ?\()", row)[-3:]
    assert alone == spread(aps[pair, "student"])
    assert taught == spread(aps[pair, "pcka"])
    assert teacher == f"{aps[pair, 'teacher'][0]:.1f}"


def test_the_table_of_losses_is_that_of_the_comparison():
    page = (REPO / "benchmarks" / "comparison.md").read_text()
    table = README.split("| losses | test AP |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]*)\|$", table, re.M)
    assert len(rows) == 9
    for name, ap, gain in rows:
        line = re.search(rf"^\| {re.escape(name)} \|.*$", page, re.M)[0]
        cells = [x.strip() for x in line.strip("|").split("|")]
        assert cells[2] == ap.strip("*") and cells[3] == gain.strip()


def test_the_benchmarks_page_is_that_of_its_raw_figures():
    page = (REPO / "benchmarks" / "digits.md").read_text()
    titles = {
        "retinanet": "RetinaNet",
        "fcos": "FCOS",
        "faster_rcnn": "Faster R-CNN",
        "cascade_to_faster_rcnn": "Cascade R-CNN to Faster R-CNN",
    }
    labels = {"student": "plain", "pcka": "PCKA", "pcka_mimic": "PCKA + mimic"}
    for (pair, method), values in benchmark().items():
        section = page.split(f"## {titles[pair]}\n")[1].split("\n## ")[0]
        by_seed = " / ".join(f"{v:.1f}" for v in values)
        if method == "teacher":
            assert f"| {by_seed} |  | {by_seed} |" in section
        else:
            assert len(values) == 3
            row = re.search(rf"^\| {re.escape(labels[method])} \(.*$", section, re.M)[0]
            assert f"| {spread(values)} |" in row and f"| {by_seed} |" in row
