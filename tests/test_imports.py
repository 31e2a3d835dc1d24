"""Imports run downwards, and only from_config reads a config."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "projects" / "pcka_distill"

# module -> the package's modules it may import; the order is the order of the layers
ALLOWED = {
    "_quiet": set(),
    "errors": set(),
    "tool": {"errors"},
    "fused": set(),
    "triton_kernels": set(),
    "kernels": {"fused", "triton_kernels"},
    "functional": {"fused", "kernels"},
    "baselines": {"functional"},
    "structures": set(),
    "recorder": set(),
    "config": set(),
    "backbones": {"errors"},
    "psp": {"errors"},
    "cifar": set(),
    "fcos": {"errors", "functional"},
    "pairing": {"errors"},
    "checkpoint": {"errors"},
    "classifier": {"errors", "checkpoint", "cifar", "recorder"},
    "cache": {"errors"},
    "teacher": {"errors", "cache", "checkpoint"},
    "losses": {"errors", "functional", "baselines", "structures", "pairing"},
    "adapters": {"errors", "structures", "recorder", "classifier"},
    "build": {"errors", "cache", "config", "losses", "teacher"},
    "data": {"errors", "checkpoint", "build"},
    "meta_arch": {
        "errors", "structures", "recorder", "pairing", "losses", "adapters", "teacher", "build",
        "checkpoint", "functional", "fcos",
    },
    "memory": {"errors"},
    "preflight": {"errors", "teacher"},
    "drawing": {"errors"},
    "hooks": {"errors", "drawing"},
    "step": {"errors", "checkpoint", "build", "hooks"},
    "engine": {
        "errors", "config", "data", "checkpoint", "teacher", "adapters", "build", "memory", "hooks",
        "preflight", "step", "meta_arch",
    },
    "lazy": {"errors", "adapters", "build", "data", "engine", "meta_arch"},
    "inference": {"errors", "adapters", "build", "classifier", "data", "engine", "lazy"},
    "predict": {"errors", "tool", "checkpoint", "drawing", "inference"},
    "visualize": {
        "errors", "build", "checkpoint", "functional", "losses", "meta_arch", "engine", "drawing",
        "inference",
    },
    "report": {"errors", "checkpoint", "drawing", "visualize"},
    "export": {"errors", "checkpoint", "classifier", "engine", "inference", "report"},
    "bench": {"errors", "build"},
    "demo": {"bench", "visualize"},
    "compare": {"errors", "teacher", "build", "bench"},
}  # fmt: skip
# What a module must not know of the outside.
FORBIDDEN = {
    "fused": ("detectron2",),
    "triton_kernels": ("detectron2",),
    "kernels": ("detectron2",),
    "functional": ("detectron2",),
    "baselines": ("detectron2",),
    "recorder": ("detectron2",),
    "structures": ("detectron2",),
    "config": ("torch",),
    "losses": ("detectron2.modeling", "detectron2.structures"),
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            yield node.module
            if node.module == "pcka_distill":
                yield from (f"pcka_distill.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", ["losses", "adapters"])
def test_the_config_is_read_in_from_config_alone(folder):
    for path in (PACKAGE / folder).glob("*.py"):
        tree = ast.parse(path.read_text())
        allowed = {
            id(node)
            for f in ast.walk(tree)
            if isinstance(f, ast.FunctionDef) and f.name == "from_config"
            for node in ast.walk(f)
        }
        names = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "cfg"]
        assert all(id(n) in allowed for n in names), path


def files():
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if relative.name != "__init__.py" or len(relative.parts) > 1:
            yield pytest.param(path, relative.parts[0].removesuffix(".py"), id=str(relative))


@pytest.mark.parametrize(("path", "layer"), list(files()))
def test_imports_run_downwards(path, layer):
    for name in imports(path):
        for outside in FORBIDDEN.get(layer, ()):
            assert not name.startswith(outside), f"{layer} must not know {outside}"
        if name.startswith("pcka_distill."):
            other = name.split(".")[1]
            assert other == layer or other in ALLOWED[layer], f"{layer} must not import {other}"


def test_there_are_no_cycles():
    order = list(ALLOWED)
    for layer, below in ALLOWED.items():
        assert all(order.index(b) < order.index(layer) for b in below)


def test_one_file_per_loss_and_adapter_knows_no_sibling():
    for path in (PACKAGE / "losses").glob("*.py"):
        if path.name != "__init__.py":
            siblings = {n for n in imports(path) if n.startswith("pcka_distill.losses")}
            assert siblings <= {"pcka_distill.losses.base"}


def test_without_what_newer_versions_of_detectron2_have():
    """v0.6 is older than FCOS: the package works, and says so if FCOS is asked for."""
    check = """
import sys
import detectron2.modeling
for name in ("dense_detector", "fcos"):
    sys.modules[f"detectron2.modeling.meta_arch.{name}"] = None
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import digits_cfg, make_batch
from pcka_distill import DistillationModel, FrozenTeacher, PCKALoss, RCKALoss, UserError
student, teacher = (build_model(digits_cfg("retinanet")) for _ in range(2))
losses = [PCKALoss(patch_size=2, layout="sample"), RCKALoss()]
model = DistillationModel(student=student, teacher=FrozenTeacher(teacher), losses=losses)
with EventStorage(0):
    assert model(make_batch())["loss_rcka_intra"] > 0
try:
    build_model(digits_cfg("fcos"))
except UserError as e:
    print(e)
"""
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr
    assert "this Detectron2 has no FCOS" in done.stdout
