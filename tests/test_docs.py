"""What docs/ says is so: its tutorial is run, its pictures are drawn, its site is built."""

import contextlib
import doctest
import importlib.util
import io
import json
import os
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from helpers import REPO, digits_cfg
from PIL import Image

from pcka_distill import DISTILL_LOSS_REGISTRY, adapters, build, get_distill_cfg
from pcka_distill.build import config_keys, merge_config
from pcka_distill.engine import stock_config

DOCS = REPO / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text() for path in DOCS.rglob("*.md")}


def blocks(page, language):
    """(title, content) of the fenced blocks of a page."""
    return re.findall(rf'^```{language}(?: title="(.*?)")?\n(.*?)^```$', PAGES[page], re.M | re.S)


# ---- the tutorial ----------------------------------------------------------------------------

# File -> what it says, and what is run here instead.
SMALL = {
    "my/make_data.py": ("COUNT = 400\n", "COUNT = 50\n"),
    "my/teacher.yaml": ("MAX_ITER: 400\n", "MAX_ITER: 2\n"),
    "my/student.yaml": ("MAX_ITER: 400\n", "MAX_ITER: 2\n"),
}


def run_blocks(page, folder):
    """Write the files and run the commands of a page, in its order, in a folder.

    Returns:
        command -> what it printed.
    """
    for name in ("tools", "configs"):
        (folder / name).symlink_to(REPO / name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Of conftest.py: without it there is no TorchScript.
    environment.pop("PYTORCH_JIT")
    changes = dict(SMALL)
    said = {}
    fence = r'^```(\w+)(?: title="(.*?)")?\n(.*?)^```$'
    for language, title, content in re.findall(fence, PAGES[page], re.M | re.S):
        if title:
            old, new = changes.pop(title, ("", ""))
            assert not old or content.count(old) == 1, title
            (folder / title).parent.mkdir(exist_ok=True)
            (folder / title).write_text(content.replace(old, new) if old else content)
            continue
        assert language == "bash", f"a block of {language} is neither a file nor a command"
        done = subprocess.run(
            ["bash", "-e", "-c", content],
            capture_output=True, text=True, cwd=folder, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, content + done.stdout[-2000:] + done.stderr[-2000:]
        said[content] = done.stdout
    assert not changes
    return said


def test_the_tutorial(tmp_path):
    said = run_blocks("tutorial.md", tmp_path)
    my = tmp_path / "my"
    assert "my/annotations.json can be trained on" in "".join(said.values())
    with Image.open(my / "sheet.png") as sheet:
        assert min(sheet.size) > 300
    split = [json.loads((my / "split" / f"{x}.json").read_text()) for x in ("train", "val")]
    assert [len(x["images"]) for x in split] == [40, 10]

    results = {}
    for name in ("teacher", "alone", "taught"):
        results[name] = json.loads((my / "output" / name / "results.json").read_text())
        assert "AP-triangle" in results[name]["results"]["my_val"]["bbox"]
    assert results["alone"]["parameters"] == results["taught"]["parameters"]
    assert results["alone"]["parameters"] < results["teacher"]["parameters"] / 10
    log = (my / "output" / "taught" / "log.txt").read_text()
    assert re.search(r"(\d+) of \1 tensors loaded from my/output/teacher/model_final\.pth", log)
    losses = {
        name: [k for k in json.loads(line) if k.startswith("loss_")]
        for name in ("alone", "taught")
        for line in (my / "output" / name / "metrics.json").read_text().splitlines()[:1]
    }
    of_teacher = ["loss_kd", *(f"loss_pcka_{x}" for x in ("p3", "p4", "p5"))]
    assert sorted({*losses["taught"]} - {*losses["alone"]}) == of_teacher
    again = json.loads((my / "output" / "taught" / "evaluation.json").read_text())
    assert again["results"] == results["taught"]["results"]

    page = (my / "report.html").read_text()
    assert "alone" in page and "taught" in page and page.count("data:image/") == 2
    assert "Not drawn" not in page
    assert {x.name for x in (my / "cka").glob("*.png")} == {
        "levels.png", "layers.png", "channels.png", "relations.png", "features.png",
    }  # fmt: skip
    found = json.loads((my / "found" / "predictions.json").read_text())
    assert found["classes"] == ["square", "disc", "triangle"]
    assert len(found["files"]) == 50
    exported = {x.name for x in (my / "exported").iterdir()}
    assert exported == {
        *("model_final.pth", "student_config.yaml", "classes.json", "model.ts", "model_card.md")
    }
    assert re.fullmatch(r"\d+ objects\n", list(said.values())[-1])


# ---- other pages -----------------------------------------------------------------------------


@pytest.mark.parametrize("page", [x for x in PAGES if blocks(x, "pycon")])
def test_what_python_prints(page):
    globs = {}
    for i, (_, content) in enumerate(blocks(page, "pycon")):
        test = doctest.DocTestParser().get_doctest(content, globs, page, page, i)
        printed = io.StringIO()
        found = doctest.DocTestRunner().run(test, out=printed.write, clear_globs=False)
        assert found.attempted > 0 and not found.failed, printed.getvalue()
        globs = test.globs


@pytest.fixture
def own_registries(monkeypatch):
    """What is registered is forgotten after the test."""
    monkeypatch.setattr(build, "_ADD_KEYS", list(build._ADD_KEYS))
    monkeypatch.setattr(adapters.base, "_ADAPTERS", list(adapters.base._ADAPTERS))
    for registry in (DISTILL_LOSS_REGISTRY, META_ARCH_REGISTRY):
        monkeypatch.setattr(registry, "_obj_map", dict(registry._obj_map))
    # README's and the pages' datasets have the same names.
    others = {k: v for k, v in DatasetCatalog.items() if not k.startswith("my_")}
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", {k: v for k, v in catalog.data.items() if k in others})


@pytest.mark.usefixtures("own_registries")
def test_what_is_said_of_extensions():
    scope = {"__name__": "docs"}
    for _, content in blocks("extending.md", "python"):
        exec(content, scope)
    cfg = get_distill_cfg()
    cfg.MODEL.DISTILL.SMOOTHMIMIC.WEIGHT = 2.0
    cfg.MODEL.DISTILL.SMOOTHMIMIC.LEVELS = ("p4",)
    loss = DISTILL_LOSS_REGISTRY.get("SmoothMimicLoss")(cfg)
    assert loss.name == "smoothmimic" and loss.weight == 2.0 and loss.levels == ("p4",)
    assert loss.compare("p4", torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 3.0)) == 2.5
    model = META_ARCH_REGISTRY.get("MyDetector")()
    model.num_classes = 7
    assert adapters.find_adapter(model).num_classes(model) == 7
    # Every example and every tool has its place.
    assert {x.name for x in (REPO / "examples").glob("*.py")} <= {
        *re.findall(r"examples/(\w+\.py)", PAGES["extending.md"])
    }
    assert {x.name for x in (REPO / "tools").glob("*.py")} <= {
        *re.findall(r"\w+\.py", PAGES["tools.md"])
    }


def test_the_migrated_experiment_is_the_same(tmp_path):
    (tmp_path / "configs").symlink_to(REPO / "configs")
    ((title, content),) = blocks("migration.md", "yaml")
    path = tmp_path / title
    path.parent.mkdir()
    path.write_text(content)
    cfg = get_distill_cfg()
    merge_config(cfg, str(path), [], "config")
    theirs = {}
    exec(blocks("migration.md", "python")[0][1], theirs)
    distiller = theirs["model"]["distiller"]
    losses, inputs = distiller["distill_losses"], distiller["loss_forward_mappings"]
    ours = cfg.MODEL.DISTILL
    assert {x["type"] for x in losses.values()} == set(ours.LOSSES)
    assert {x["loss_weight"] for x in losses.values()} == {ours.PKD.WEIGHT}
    # The first output of MMDetection's neck is p3.
    assert losses.keys() == inputs.keys()
    read = [f"p{3 + x['preds_S']['data_idx']}" for x in inputs.values()]
    assert read == list(ours.PKD.LEVELS)
    assert all(x["preds_S"]["data_idx"] == x["preds_T"]["data_idx"] for x in inputs.values())
    # The schedule that the table speaks of.
    assert cfg.SOLVER.MAX_ITER == 24 * 7330 and cfg.SOLVER.IMS_PER_BATCH == 16
    assert cfg.SOLVER.STEPS == (16 * 7330, 22 * 7330)


def keys_in(text):
    """Config keys that a page names; those of MODEL.DISTILL also without these words."""
    distill = "|".join(get_distill_cfg().MODEL.DISTILL)
    roots = "MODEL|SOLVER|INPUT|DATASETS|DATALOADER|TEST"
    for key in re.findall(rf"(?<![\w.])((?:{roots}|{distill})(?:\.[A-Z][A-Z_]*)+)", text):
        first = key.split(".")[0]
        yield key if re.fullmatch(roots, first) else f"MODEL.DISTILL.{key}"


@pytest.mark.parametrize("page", PAGES)
def test_keys_are_there(page):
    known = dict(config_keys(get_distill_cfg()))
    text = re.sub(r"^```python.*?^```$", "", PAGES[page], flags=re.M | re.S)
    named = set(keys_in(text))
    if page in ("method.md", "faq.md", "migration.md", "tutorial.md"):
        assert len(named) > 6
    for _, content in blocks(page, "yaml"):
        named |= {k for k, _ in config_keys(yaml.safe_load(content)) if k != "_BASE_"}
    assert named <= known.keys()


def helps(tool):
    """--help of a tool."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [tool, "--help"])
        with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
            runpy.run_path(str(REPO / tool), run_name="__main__")
    return shown.getvalue()


def test_commands_and_files_are_there():
    named = {}
    for page, text in PAGES.items():
        for path in re.findall(r"(?<![\w/])((?:configs|examples|benchmarks)/[\w/.-]+\.\w+)", text):
            assert (REPO / path).is_file(), f"{page}: {path}"
        text = text.replace("\\\n", " ")
        for tool, rest in re.findall(r"(?<![\w/])(tools/[a-z_]+\.py)([^\n`|]*)", text):
            named.setdefault(tool, set()).update(re.findall(r"(?<!\S)--[a-z-]+", rest))
    assert len(named) > 12
    for tool, flags in named.items():
        if tool != "tools/setup_env.py":
            known = set(re.findall(r"--[a-z-]+", helps(tool)))
            assert flags <= known, tool


def test_numbers_are_those_of_the_benchmarks():
    pages = [x.read_text() for x in (REPO / "benchmarks").glob("*.md")]
    count = 0
    for page, text in PAGES.items():
        for line in text.splitlines():
            numbers = re.findall(r"\d+\.\d ± \d+\.\d", line)
            count += len(numbers)
            assert all(any(x in y for y in pages) for x in numbers), f"{page}: {line}"
            row = re.fullmatch(r"(\| [^|]+ \|) (\d+\.\d ± \d+\.\d) \|", line)
            if row:
                rows = [y for x in pages for y in x.splitlines() if y.startswith(row[1])]
                assert any(row[2] in y for y in rows), f"{page}: {line}"
    assert count > 9


# ---- pictures --------------------------------------------------------------------------------

SHOWN = {
    (DOCS / page).parent.joinpath(path).resolve()
    for page, text in PAGES.items()
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What `make demo` leaves, of models that nobody trained."""
    folder = tmp_path_factory.mktemp("demo")
    names = {"teacher": "teacher", "plain": "student", "distilled": "pcka_kd"}
    for name, config in names.items():
        (folder / name).mkdir()
        cfg = digits_cfg(f"retinanet_{config}")
        (folder / name / "config.yaml").write_text(cfg.dump())
        student = stock_config(cfg)
        (folder / name / "student_config.yaml").write_text(student.dump())
        torch.manual_seed(0)
        torch.save({"model": build_model(student).state_dict()}, folder / name / "model_final.pth")
    return folder


@pytest.mark.usefixtures("digits")
def test_pictures_are_drawn_by_the_command_of_the_docs(demo, tmp_path, monkeypatch):
    (command,) = {
        x for _, x in blocks("tools.md", "bash") if x.startswith("python tools/draw_docs.py")
    }
    tool, *args = command.removeprefix("python ").split()
    assert args == ["--demo", "output/demo", "--out", "docs/pictures"]
    monkeypatch.setattr(
        sys, "argv", [tool, "--demo", str(demo), "--out", str(tmp_path), "--images", "8"]
    )
    runpy.run_path(str(REPO / tool), run_name="__main__")
    drawn = {x.name for x in tmp_path.iterdir()}
    # Those that are shown, those that are there, and those that are drawn.
    assert {x.relative_to(DOCS / "pictures").as_posix() for x in SHOWN} == drawn
    assert {x.name for x in (DOCS / "pictures").iterdir()} == drawn
    for name in drawn:
        for folder in (tmp_path, DOCS / "pictures"):
            picture = np.asarray(Image.open(folder / name).convert("L"))
            assert min(picture.shape) > 200 and picture.std() > 5, folder / name
    assert sum(x.stat().st_size for x in (DOCS / "pictures").iterdir()) < 1.5e6


# ---- the site --------------------------------------------------------------------------------

needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None,
    reason="mkdocs and mkdocstrings are not installed",
)
WITHOUT_NETWORK = """
import socket

def refuse(*_, **__):
    raise OSError("there is no network")

socket.socket.connect = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli()
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NETWORK, "build", "--strict", "--site-dir", str(folder)],
        capture_output=True, text=True, cwd=REPO,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


class Loaded(HTMLParser):
    """What a browser loads with a page."""

    def __init__(self, page):
        super().__init__()
        self.addresses = []
        self.ids = set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        if tag != "a":
            self.addresses += [attributes[k] for k in ("src", "href", "srcset") if k in attributes]


@needs_mkdocs
def test_the_site_has_every_page(site):
    built = {x.relative_to(site).with_suffix(".md").as_posix() for x in site.rglob("*.html")}
    assert built >= PAGES.keys() | {"CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/comparison.md"}
    assert not list(site.rglob("*.py"))
    # What can be searched for is in it as well.
    index = json.loads((site / "search" / "search_index.json").read_text())
    assert any("pcka_loss" in x["title"] for x in index["docs"])


@needs_mkdocs
def test_the_site_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    for page in pages:
        addresses = Loaded(page.read_text()).addresses
        assert len(addresses) > 3
        assert not [x for x in addresses if re.match(r"(https?:)?//", x)], page
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", path.read_text()), path


@needs_mkdocs
def test_docstrings_are_rendered(site):
    for page in (site / "reference").glob("*.html"):
        text = re.sub(r"<pre.*?</pre>", "", page.read_text(), flags=re.S)
        # A doctest as plain Markdown is a quotation.
        left = re.findall(r":(?:func|class|meth|mod|attr|data):|\.\. math|``|<blockquote", text)
        assert not left, page
    text = (site / "reference" / "functional.html").read_text()
    assert {"pcka_distill.functional.pcka_loss", "pcka_distill.baselines.kd_loss"} <= Loaded(
        text
    ).ids
    # Formulas are pictures, that say what they show; what is named is linked.
    formula = re.search(r'<img alt="\\mathrm\{CKA\}[^"]*" src="data:image/svg\+xml;', text)
    assert formula
    assert re.search(r'<a [^>]*href="#pcka_distill.functional.linear_cka"><code>linear_cka', text)
    # The table of layouts keeps its columns.
    assert re.search(r"spatial {8}C {16}U\*V", re.sub(r"<.*?>", "", text))
