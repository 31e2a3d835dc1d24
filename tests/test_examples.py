"""The examples run, from any folder, write where they are told to, and do what they say."""

import os
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from helpers import REPO, digits_cfg
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pcka_distill import DISTILL_LOSS_REGISTRY, UserError, build, get_distill_cfg, load_teacher

EXAMPLES = REPO / "examples"


def run(script, folder, *args):
    """What a script prints, started in an empty folder; all that it leaves there is in out/."""
    done = subprocess.run(
        [sys.executable, str(script), *map(str, args)],
        capture_output=True, text=True, cwd=folder, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(os.listdir(folder)) == ({"out"} if "--output" in args else set())
    return done.stdout


def printed_losses(text):
    """name -> values, of lines like "3: loss_a 0.5, loss_b 0.25"."""
    losses = {}
    for line in re.findall(r"^\d+: (loss_.*)$", text, re.M):
        for term in line.split(", "):
            name, value = term.split()
            losses.setdefault(name, []).append(float(value))
    return losses


def assert_falls(losses, count, *names):
    for name in names:
        values = losses[name]
        assert len(values) == count
        assert sum(values[-4:]) < sum(values[:4]), name


def test_every_example_is_tested():
    assert all(f"test_{path.stem}" in globals() for path in EXAMPLES.glob("*.py"))


@pytest.mark.usefixtures("digits")
def test_own_detector(tmp_path):
    losses = printed_losses(run(EXAMPLES / "own_detector.py", tmp_path, "--iterations", 12))
    assert_falls(losses, 12, "loss_pcka_p3", "loss_mimic_p3", "loss_rcka_intra")


def test_the_adapter_of_the_example_is_short():
    source = (EXAMPLES / "own_detector.py").read_text()
    adapter = re.search(r"@register_adapter\n.*?\n\n\n", source, re.S)[0].strip().splitlines()
    assert len(adapter) < 60
    assert f"{len(adapter)} lines" in source


@pytest.mark.usefixtures("digits")
def test_plain_trainer(tmp_path):
    path = EXAMPLES / "plain_trainer.py"
    text = run(path, tmp_path, "--iterations", 12, "--output", "out")
    terms = [f"loss_{loss}_{level}" for loss in ("pcka", "mimic") for level in ("p3", "p4", "p5")]
    assert_falls(printed_losses(text), 12, *terms)
    assert text.endswith("the stock RetinaNet has what was trained: True\n")

    file = tmp_path / "out" / "model_final.pth"
    state = torch.load(file)["model"]
    assert any(k.startswith("distill.mimic.") for k in state)
    student = {k: x for k, x in state.items() if not k.startswith("distill.")}
    build_model(digits_cfg("retinanet_student")).load_state_dict(student, strict=True)
    # A student is no teacher.
    teacher = str(REPO / "configs" / "Digits" / "retinanet_teacher.yaml")
    with pytest.raises(UserError, match="do not fit its config"):
        load_teacher(config=teacher, weights=str(file))


@pytest.mark.usefixtures("digits")
def test_plain_trainer_without_its_three_lines(tmp_path, tmp_path_factory):
    source = (EXAMPLES / "plain_trainer.py").read_text()
    lines = source.splitlines(keepends=True)
    kept = [x for x in lines if not x.endswith("# distill\n")]
    assert len(lines) - len(kept) == 3
    root = "Path(__file__).resolve().parents[1]"
    assert root in source
    script = tmp_path_factory.mktemp("script") / "plain.py"
    script.write_text("".join(kept).replace(root, f"Path({str(REPO)!r})"))
    text = run(script, tmp_path, "--iterations", 1, "--output", "out")
    assert set(printed_losses(text)) == {"loss_cls", "loss_box_reg"}
    state = torch.load(tmp_path / "out" / "model_final.pth")["model"]
    assert not any(k.startswith("distill.") for k in state)


@pytest.mark.usefixtures("digits")
def test_own_loss(tmp_path):
    text = run(EXAMPLES / "own_loss.py", tmp_path, "--iterations", 30, "--output", "out")
    found = re.findall(r"^(loss_\w+): (\S+) -> (\S+)$", text, re.M)
    losses = {name: (float(first), float(last)) for name, first, last in found}
    # What the keys say: two levels of the one, all of the other.
    assert [k for k in losses if "gram" in k] == ["loss_gram_p3", "loss_gram_p4"]
    assert [k for k in losses if "pcka" in k] == ["loss_pcka_p3", "loss_pcka_p4", "loss_pcka_p5"]
    for name, (first, last) in losses.items():
        if "gram" in name or "pcka" in name:
            assert last < first, name


def test_the_loss_of_the_example(monkeypatch):
    # Registered for this test alone.
    monkeypatch.setattr(build, "_ADD_KEYS", list(build._ADD_KEYS))
    known = dict(DISTILL_LOSS_REGISTRY._obj_map)
    monkeypatch.setattr(DISTILL_LOSS_REGISTRY, "_obj_map", known)
    runpy.run_path(str(EXAMPLES / "own_loss.py"))
    cfg = get_distill_cfg()
    cfg.MODEL.DISTILL.GRAM.WEIGHT = 3.0
    normalized = DISTILL_LOSS_REGISTRY.get("GramLoss")(cfg)
    assert normalized.weight == 3.0
    cfg.MODEL.DISTILL.GRAM.NORMALIZE = False
    plain = DISTILL_LOSS_REGISTRY.get("GramLoss")(cfg)

    rng = np.random.default_rng(0)
    maps = rng.normal(size=(2, 2, 3, 4, 5))

    def expected(normalize):
        terms = []
        for image in range(2):
            grams = np.zeros((2, 3, 3))
            for gram, x in zip(grams, maps[:, image]):
                for i in range(3):
                    for j in range(3):
                        dot = (x[i] * x[j]).sum()
                        scale = np.sqrt((x[i] ** 2).sum() * (x[j] ** 2).sum())
                        gram[i, j] = dot / (scale if normalize else 20)
            terms.append((grams[0] - grams[1]) ** 2)
        return np.mean(terms)

    student, teacher = torch.tensor(maps)
    assert normalized.compare("p3", student, teacher).item() == pytest.approx(expected(True))
    assert plain.compare("p3", student, teacher).item() == pytest.approx(expected(False))
    # Squares of these are beyond fp16.
    large = (1000 * student).half()
    assert plain.compare("p3", large, large.flip(0)).isfinite()
    pair = student.float(), teacher.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = plain.compare("p3", *pair)
    assert mixed == plain.compare("p3", *pair)


def test_own_dataset(tmp_path):
    text = run(EXAMPLES / "own_dataset.py", tmp_path, "--output", "out")
    line = re.search(r"^box AP on my_val: teacher (\S+), student (\S+)$", text, re.M)
    truth = COCO(str(tmp_path / "out" / "val" / "annotations.json"))
    assert len(truth.getImgIds()) == 30 and len(truth.getAnnIds()) == 60
    for who, printed in zip(("teacher", "student"), line.groups()):
        folder = tmp_path / "out" / who
        found = truth.loadRes(str(folder / "inference" / "my_val" / "coco_instances_results.json"))
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert float(printed) == pytest.approx(100 * evaluation.stats[0], abs=0.051)
        # Far above chance, far below what is trained for longer.
        assert float(printed) > 5
        head = torch.load(folder / "model_final.pth")["model"]["head.cls_score.weight"]
        # Four anchors a cell, two classes.
        assert len(head) == 4 * 2
    assert "tensors loaded from out/teacher/model_final.pth" in text
    assert "loss_pcka_p3" in text and "loss_kd" in text


def test_bare_pytorch(tmp_path):
    losses = printed_losses(run(EXAMPLES / "bare_pytorch.py", tmp_path, "--iterations", 30))
    assert_falls(losses, 30, "loss_ce", "loss_pcka_stride8", "loss_pcka_stride16", "loss_rcka")
    assert len(losses["loss_kd"]) == 30


def test_measure_cka(tmp_path):
    text = run(EXAMPLES / "measure_cka.py", tmp_path, "--batches", 2)
    itself, other = (
        np.array([line.split()[1:] for line in block.splitlines()[2:]], dtype=float)
        for block in text.strip().split("\n\n")
    )
    assert itself.shape == other.shape == (5, 5)
    assert (itself.diagonal() == 1).all()
    assert (itself == itself.T).all()
    assert (itself[~np.eye(5, dtype=bool)] < 0.9).all()
    # Layers far from each other are less alike.
    assert (np.diff(itself[0]) < 0).all()
    assert (np.abs(other) < 0.5).all()


def debiased_cka(x, y):
    """From the definition, Song et al. 2012, eq. 5, of features (N, P) and (N, Q)."""

    def hsic(a, b):
        n = len(a)
        k, l = a @ a.T, b @ b.T
        np.fill_diagonal(k, 0)
        np.fill_diagonal(l, 0)
        one = np.ones(n)
        total = np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
        return (total - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))

    return hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))


def test_the_table_of_the_example():
    cka_table = runpy.run_path(str(EXAMPLES / "measure_cka.py"))["cka_table"]
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(32, 1, 6, 6, generator=g, dtype=torch.float64) for _ in range(3)]
    mixed = torch.randn(36, 12, generator=g, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(36, 36, generator=g, dtype=torch.float64))[0]

    def net_a(x):
        return {"pixels": x, "mixed": x.flatten(1) @ mixed}

    def net_b(x):
        noise = torch.randn(len(x), 5000, generator=g, dtype=x.dtype)
        return [7 * x.flatten(1) @ rotation + 3, (x.flatten(1) @ mixed).relu(), noise]

    table = cka_table(net_a, net_b, batches)
    assert table.shape == (2, 3)
    assert table[0, 0].item() == pytest.approx(1)
    # Of so many features plain CKA would be 0.5 and more.
    assert table[:, 2].abs().max() < 0.1
    pairs = [(net_a(z)["mixed"].numpy(), net_b(z)[1].numpy()) for z in batches]
    expected = np.mean([debiased_cka(x, y) for x, y in pairs])
    assert table[1, 1].item() == pytest.approx(expected, rel=1e-5)
