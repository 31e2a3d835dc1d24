"""What README.md shows is so."""

import ast
import itertools
import re

import pytest
import yaml
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.projects.deeplab import add_deeplab_config
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
    stock = get_cfg()
    add_deeplab_config(stock)
    stock = dict(leaves(stock))
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
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))
    scope = {"__name__": "readme"}
    exec(source, scope)
    if "model" in scope:
        assert isinstance(scope["model"], DistillationModel)


def test_files_that_it_names_are_there():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (REPO / path).exists(), path
    for path in re.findall(r"configs/[^\s{<]+\.yaml", README):
        assert (REPO / path).exists(), path


def test_every_pair_for_coco_is_in_the_table_and_no_cell_is_empty():
    table = re.findall(r"^\| `(COCO-\S+)` \|(.*)\|$", README, re.M)
    named = set()
    for pair, cells in table:
        assert all(cell.strip() for cell in cells.split("|")), pair
        paths = {f"{pair}_{losses}_2x" for losses in ("pcka", "pcka_mimic", "pcka_rcka")}
        paths |= set(re.findall(r"`(COCO-\S+)`", cells))
        assert all((REPO / "configs" / f"{p}.yaml").exists() for p in paths), pair
        named |= paths
    shipped = {
        str(p.relative_to(REPO / "configs").with_suffix(""))
        for p in (REPO / "configs").glob("COCO-*/*.yaml")
        if not p.name.startswith("Base") and "32x8d" not in p.name
    }
    assert named == shipped


def test_every_other_pair_is_in_its_table():
    table = re.findall(r"^\| `((?:Cityscapes|CIFAR-100|ImageNet)/\S+)` \|(.*)\|$", README, re.M)
    named = set()
    for pair, cells in table:
        assert all(cell.strip() for cell in cells.split("|")), pair
        named |= {pair, *re.findall(r"`((?:Cityscapes|CIFAR-100|ImageNet)/\S+)`", cells)}
    shipped = {
        str(p.relative_to(REPO / "configs").with_suffix(""))
        for folder in ("Cityscapes", "CIFAR-100", "ImageNet")
        for p in (REPO / "configs" / folder).glob("*.yaml")
        if not p.name.startswith("Base")
    }
    assert named == shipped


def comparison(section):
    """benchmarks/comparison.md: method -> the cells of its row in a section."""
    page = (REPO / "benchmarks" / "comparison.md").read_text()
    table = page.split(f"## {section}\n")[1].split("\n## ")[0]
    rows = [[x.strip() for x in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row for row in rows if len(row) > 3}


TEACHERS = {
    "RetinaNet": "retinanet",
    "FCOS": "fcos",
    "Faster R-CNN": "faster_rcnn",
    "the same, with a Cascade R-CNN": "cascade_rcnn",
}


@pytest.mark.parametrize(
    ("start", "section"),
    [
        ("RetinaNet", "RetinaNet, 1x"),
        ("FCOS", "FCOS, 1x"),
        ("Faster R-CNN", "Faster R-CNN, 1x"),
        ("the same, with a Cascade R-CNN", "Faster R-CNN with a Cascade R-CNN as teacher, 1x"),
    ],
)
def test_numbers_are_those_of_the_comparison(start, section):
    line = re.search(rf"^\| {re.escape(start)}.*\|$", README, re.M)[0]
    _, alone, taught, by, teacher = (x.strip() for x in line.strip("|").split("|"))
    rows = comparison(section)
    assert alone == rows["student alone"][2]
    assert taught.strip("*") == rows[by][2]
    page = (REPO / "benchmarks" / "comparison.md").read_text()
    config = f"configs/Digits/{TEACHERS[start]}_teacher.yaml"
    assert f"| {config} | {teacher.split()[0]} |" in page


@pytest.mark.parametrize(
    ("name", "after", "rows"),
    [
        (
            "classification", "five seeds (`configs/Digits/classifier_",
            {"alone": "student alone", "RCKA": "RCKA, whole", "KD": "KD",
             "PCKA signed": "PCKA, signed"},
        ),
        (
            "segmentation", "(`configs/Digits/sem_seg_",
            {"alone": "student alone", "RCKA": "RCKA, pixels as samples",
             "KD": "KD of every pixel", "PKD": "PKD", "PCKA signed": "PCKA, signed"},
        ),
        (
            "instances", "(`configs/Digits/mask_rcnn_",
            {"alone": "student alone", "PCKA signed": "PCKA, signed",
             "PCKA signed + KD": "PCKA (signed) + KD"},
        ),
    ],
)  # fmt: skip
def test_other_numbers_are_those_of_their_pages(name, after, rows):
    page = (REPO / "benchmarks" / f"{name}.md").read_text()
    text = re.split(r"Masks of|And scikit-learn", README.split(after)[1])[0].split("\n\n")[0]
    text = " ".join(text.split())
    for said, method in rows.items():
        row = re.search(rf"^\| {re.escape(method)} \|.*$", page, re.M)[0].split("|")
        assert f" {said} {row[3].strip()}" in text
    teacher = re.search(r"^\| configs/Digits/\S+_teacher.yaml \| (\S+) \|", page, re.M)[1]
    assert f"has {teacher}" in text


def test_the_table_of_losses_is_that_of_the_comparison():
    found = comparison("RetinaNet, 1x")
    table = README.split("| losses | test AP |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]*)\|$", table, re.M)
    assert len(rows) == 17
    for name, ap, gain in rows:
        cells = found[name]
        assert cells[2] == ap.strip("*") and cells[3] == gain.strip()


def test_the_table_of_tools_is_complete():
    table = README.split("## Tools")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+\.py)`", "".join(re.findall(r"^\| (`.*?) \|", table, re.M))))
    there = {x.name for x in (REPO / "tools").glob("*.py")}
    assert named == there - {"draw_docs.py"}
