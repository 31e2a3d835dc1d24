"""What `python -m build` makes is complete, and works where it is installed."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from helpers import REPO

import pcka_distill
from pcka_distill import UserError, get_config_file

CONFIGS = {str(x.relative_to(REPO)) for x in (REPO / "configs").rglob("*.*") if x.is_file()}
CONFIGS = {x for x in CONFIGS if not x.endswith(".pyc")}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """sdist and wheel, the wheel from the sdist, of what git knows or would."""
    folder = tmp_path_factory.mktemp("built")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPO, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in files:
        if (REPO / name).is_file():
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((REPO / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "source"],
        capture_output=True, check=True,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def venv(built):
    """The wheel in an environment of its own, which has the libraries of this one."""
    folder = built / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (wheel,) = built.glob("*.whl")
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    site = folder / "lib" / version / "site-packages"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", folder, "install", "--no-deps", "--no-index",
         "--quiet", "--disable-pip-version-check", wheel],
        check=True,
    )  # fmt: skip
    # Of this environment not its own pcka_distill: a .pth below a .pth is not read.
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"])
    return folder


def run(venv, *command, cwd, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [venv / "bin" / command[0], *map(str, command[1:])],
        cwd=cwd, capture_output=True, text=True, env={**clean, **environment},
    )  # fmt: skip


def test_the_wheel_is_complete(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(x for x in names if x.endswith("METADATA"))).decode()
        scripts = archive.read(next(x for x in names if x.endswith("entry_points.txt"))).decode()
    package = REPO / "projects"
    modules = {str(x.relative_to(package)) for x in package.rglob("*.py")}
    assert modules | {"pcka_distill/py.typed"} <= names
    assert {f"pcka_distill/{x}" for x in CONFIGS} <= names
    assert not [x for x in names if not x.startswith(("pcka_distill/", "pcka_distill-"))]
    assert f"\nVersion: {pcka_distill.__version__}\n" in metadata
    assert "pcka-train = pcka_distill.engine:cli" in scripts
    assert "pcka-predict = pcka_distill.predict:cli" in scripts


# What is imported -> what it is called where it is installed from.
NAMES = {"PIL": "pillow", "cv2": "opencv-python-headless", "sklearn": "scikit-learn"}
NAMES |= {"yaml": "pyyaml"}


def test_what_is_imported_is_declared(built):
    """But for Detectron2, which brings torchvision and is not on the index, and torch's Triton."""
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        name = next(x for x in archive.namelist() if x.endswith("METADATA"))
        metadata = archive.read(name).decode()
        found = set()
        for module in (x for x in archive.namelist() if x.endswith(".py") and "configs/" not in x):
            for node in ast.walk(ast.parse(archive.read(module))):
                if isinstance(node, ast.Import):
                    found |= {x.name.split(".")[0] for x in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found.add(node.module.split(".")[0])
    declared = {x.lower() for x in re.findall(r"^Requires-Dist: ([\w-]+)", metadata, re.M)}
    own = {"pcka_distill", "detectron2", "torchvision", "timm", "triton"} | sys.stdlib_module_names
    assert {NAMES.get(x, x.lower()) for x in found - own} <= declared


def test_the_sdist_has_what_builds_it(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {x.split("/", 1)[-1] for x in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= names
    assert names >= CONFIGS
    # Not its tests either, which need the whole repository.
    assert not [x for x in names if x.startswith(("output", "datasets", ".venv", "tests"))]


def test_it_works_where_it_is_installed(venv, digits, tmp_path):
    code = (
        "import pcka_distill, os; print(pcka_distill.__file__);"
        "print(pcka_distill.get_config_file('Digits/retinanet_pcka.yaml'))"
    )
    done = run(venv, "python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    package, config = map(Path, done.stdout.splitlines())
    assert venv in package.parents
    assert package.parent in config.parents
    # A teacher's config that ships with it is found from anywhere, and a yaml by its name.
    common = ("MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()")
    common += ("DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR")
    root = str(Path(digits[0]["file_name"]).parents[2])
    done = run(
        venv, "pcka-train", "--config-file", "Digits/retinanet_teacher.yaml", *common, "teacher",
        cwd=tmp_path, DETECTRON2_DATASETS=root,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    done = run(
        venv, "pcka-train", "--config-file", "Digits/retinanet_pcka.yaml",
        "MODEL.DISTILL.TEACHER.WEIGHTS", "teacher/model_final.pth", *common, "student",
        cwd=tmp_path, DETECTRON2_DATASETS=root,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    done = run(
        venv, "pcka-predict", digits[0]["file_name"], "--config", "student/student_config.yaml",
        "--out", "found", cwd=tmp_path, DETECTRON2_DATASETS=root,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "found" / "predictions.json").is_file()
    done = run(venv, "pcka-train", "--config-file", "Digits/gone.yaml", cwd=tmp_path)
    assert done.stderr.strip().splitlines()[-1] == "error: config file not found: Digits/gone.yaml"


def test_configs_by_their_names():
    path = get_config_file("COCO-Detection/retinanet_R_101_to_R_50_pcka_2x.yaml")
    assert yaml.safe_load(Path(path).read_text())["_BASE_"]
    with pytest.raises(UserError, match=r"did you mean Digits/retinanet_pcka\.yaml"):
        get_config_file("Digits/retinanet_pkca.yaml")
    with pytest.raises(UserError, match=r"no config '\.\./setup\.py' ships"):
        get_config_file("../setup.py")


def test_version_and_changelog_are_in_step():
    log = (REPO / "CHANGELOG.md").read_text()
    released = [x.split("]")[0] for x in log.split("\n## [")[1:]]
    assert released[0] == "Unreleased"
    assert released[1] == pcka_distill.__version__
