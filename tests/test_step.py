"""One training step: Detectron2's own, in parts, in mixed precision, and on what is not finite."""

import copy
import logging
import math
import re
import subprocess
import sys

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import (
    FAMILIES,
    FROZEN_NORM,
    REPO,
    build_distilled,
    digits_cfg,
    distill_cfg,
    gradients,
    make_batch,
)
from torch import nn

from pcka_distill import DistillationModel
from pcka_distill.step import NonFiniteError, TrainingStep, replay


def make_step(model, *batches, lr=0.5, optimizer=None, **kwargs):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr)
    return TrainingStep(model, batches, optimizer, **kwargs)


def take_step(step, iteration=0):
    """What it logged."""
    step.iter = iteration
    with EventStorage(iteration) as storage:
        step.run_step()
    return storage.latest()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_detectron2s_step(family, teacher_files):
    """Bit for bit, in all that it logs too."""
    batches = [make_batch(i) for i in range(3)]
    results = []
    for kind in (SimpleTrainer, TrainingStep):
        model = build_distilled(family, teacher_files)
        step = kind(model, batches, torch.optim.AdamW(model.parameters(), 1e-3))
        torch.manual_seed(1)
        logged = [take_step(step, i) for i in range(3)]
        for x in logged:
            del x["data_time"], x["rank_data_time"]
        results.append((logged, model.state_dict()))
    (logged, state), (mine, my_state) = results
    assert logged == mine
    assert all(torch.equal(x, my_state[k]) for k, x in state.items())


def accumulate(model, batch, parts, lr):
    """One update of the trainer, by plain SGD."""
    return take_step(make_step(model, batch, lr=lr, parts=parts))


def test_gradients_of_an_earlier_step_do_not_count(teacher_files, batch):
    model = build_distilled("retinanet", teacher_files)
    reference = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for x in (model, reference):
        torch.manual_seed(1)
        accumulate(x, batch, parts=2, lr=0.5)
    expected = dict(reference.named_parameters())
    assert all(torch.equal(p, expected[k]) for k, p in model.named_parameters())


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
@pytest.mark.parametrize("images", [4, 3])
def test_accumulation_updates_by_the_mean_gradient_of_the_parts(family, images, teacher_files):
    """Of 3 images in 2 parts the first part, of two, counts twice."""
    model = build_distilled(family, teacher_files)
    batch = [x for i in range(2) for x in make_batch(i)][:images]
    reference = copy.deepcopy(model)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    latest = accumulate(model, batch, parts=2, lr=0.5)
    losses, first = gradients(reference, batch[:2])
    other, second = gradients(reference, batch[2:])
    share = 2 / images
    for name, p in model.named_parameters():
        if name in first:
            mean = share * first[name] + (1 - share) * second[name]
            torch.testing.assert_close(p, before[name] - 0.5 * mean, rtol=1e-4, atol=1e-6)
    for name in losses:
        mean = share * losses[name] + (1 - share) * other[name]
        assert latest[name][0] == pytest.approx(mean.item(), rel=1e-5)


def test_accumulation_is_the_whole_batch_where_losses_are_means_over_images(teacher_files):
    """Mimic is one, and nothing else is trained here but its projection."""
    model = build_distilled(
        "fcos", teacher_files, *FROZEN_NORM, "MODEL.DISTILL.LOSSES", ["MimicLoss"]
    )
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("distill."))
    batch = [x for i in range(2) for x in make_batch(i)]
    whole = copy.deepcopy(model)
    accumulate(model, batch, parts=4, lr=1.0)
    accumulate(whole, batch, parts=1, lr=1.0)
    for a, b in zip(model.distill.parameters(), whole.distill.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_processes_exchange_gradients_once_a_batch(teacher_files, tmp_path):
    model = build_distilled("fcos", teacher_files, *FROZEN_NORM)
    reference = copy.deepcopy(model)
    batch = [x for i in range(2) for x in make_batch(i)]
    accumulate(reference, batch, parts=4, lr=0.5)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        buckets = []

        def count(state, bucket):
            buckets.append(bucket.is_last())
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        parallel.register_comm_hook(None, count)
        accumulate(parallel, batch, parts=4, lr=0.5)
    finally:
        torch.distributed.destroy_process_group()
    assert sum(buckets) == 1
    for a, b in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_model_in_eval_mode_is_not_trained(teacher_files):
    model = build_distilled("fcos", teacher_files)
    step = make_step(model, make_batch())
    model.eval()
    with pytest.raises(AssertionError, match="eval mode"):
        take_step(step)


# ---- mixed precision --------------------------------------------------------------------------


class Watched(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        self.seen = y.dtype
        return y


class Toy(nn.Module):
    """Two losses of a linear model; ``bad`` makes one of a batch not finite."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = Watched(3, 2)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, batch):
        x = torch.stack([item["x"] for item in batch])
        y = self.norm(self.layer(x))
        bad = sum(item.get("bad", 0.0) for item in batch)
        return {"loss_a": y.float().square().mean(), "loss_b": (self.layer(x) * bad).float().sum()}


def toy_batch(bad=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    items = [{"x": torch.randn(3, generator=g), "image_id": 10 + i} for i in range(4)]
    items[1]["bad"] = bad
    return items


def test_bfloat16_on_a_cpu():
    model = Toy()
    step = make_step(model, toy_batch(), precision=torch.bfloat16)
    take_step(step)
    assert model.layer.seen == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_mixed_precision(family, teacher_files):
    """FCOS, too, whose GIoU loss refuses predictions in half precision; alone as well."""
    model = build_distilled(family, teacher_files)
    alone = build_model(digits_cfg(family))
    if family == "fcos":
        # As Detectron2 builds it from a LazyConfig.
        model.student.head._forward_hooks.clear()
        model = DistillationModel(
            student=model.student, teacher=model.teacher, losses=list(model.losses)
        )
    for network in (model, alone):
        before = {k: x.clone() for k, x in network.named_parameters()}
        step = make_step(network, make_batch(), make_batch(1), lr=0.01, precision=torch.bfloat16)
        assert all(math.isfinite(take_step(step, i)["total_loss"][0]) for i in range(2))
        after = dict(network.named_parameters())
        assert all(x.dtype == torch.float32 for x in after.values())
        assert any(not torch.equal(x, before[k]) for k, x in after.items())


@pytest.mark.parametrize("parts", [1, 2])
def test_a_scaler_scales_and_leaves_out(parts):
    """Its updates are those without it, and none where a gradient overflows."""
    model, plain = Toy(), Toy()
    take_step(make_step(plain, toy_batch(), parts=parts))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    step = make_step(model, toy_batch(), toy_batch(bad=1e38), parts=parts, scaler=scaler)
    take_step(step)
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b)
    before = copy.deepcopy(list(model.parameters()))
    # Finite itself, and not any more when it is scaled.
    take_step(step)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))
    assert scaler.get_scale() == 512.0 and step.skipped == 0
    # Nothing is said of the order of the schedule's steps if the first is left out.
    fresh = Toy()
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.5)
    first = make_step(
        fresh, toy_batch(bad=1e38), optimizer=optimizer, scaler=torch.amp.GradScaler("cpu")
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    take_step(first)
    schedule.step()
    # It cannot go on like that for ever.
    stuck = make_step(Toy(), *[toy_batch(bad=1e38)] * 40, scaler=torch.amp.GradScaler("cpu"))
    stuck.model.layer.weight.register_hook(lambda g: g * float("inf"))
    for i in range(20):
        take_step(stuck, i)
    with pytest.raises(NonFiniteError, match="scaled gradient has not been finite in 21 steps in"):
        take_step(stuck, 20)
    again = make_step(Toy(), scaler=torch.amp.GradScaler("cpu"))
    again.load_state_dict(step.state_dict())
    assert again.scaler.get_scale() == 512.0


# ---- what is not finite -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_run_ends_with_loss_iteration_and_images(value, parts, tmp_path):
    model = Toy()
    before = copy.deepcopy(list(model.parameters()))
    step = make_step(model, toy_batch(value), parts=parts, folder=str(tmp_path))
    message = (
        r"loss_b is (nan|-?inf) at iteration 7 \(images 10, 11, 12, 13\); lower SOLVER.BASE_LR"
    )
    with pytest.raises(NonFiniteError, match=message) as e:
        take_step(step, 7)
    assert isinstance(e.value, FloatingPointError) and "\n" not in str(e.value)
    assert "loss_a" not in str(e.value).split(";")[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))
    assert (tmp_path / "nonfinite_0000007_rank0.pth").exists()


def test_a_gradient_that_is_not_finite():
    """Of a finite loss: a square root at zero."""

    class Root(Toy):
        def forward(self, batch):
            return {"loss_a": (self.layer.weight - self.layer.weight).sum().sqrt()}

    with pytest.raises(NonFiniteError, match=r"the gradient of layer.weight is not finite at iter"):
        take_step(make_step(Root(), toy_batch()))


def test_steps_are_left_out_and_counted(caplog):
    """As if the batch had never been there: weights, optimizer, and batch norm's statistics."""
    logging.getLogger("detectron2").propagate = True
    model, other = Toy(), Toy()
    bad = toy_batch(float("nan"))
    bad[0]["x"] = torch.full((3,), float("inf"))
    batches = [toy_batch(seed=1), bad, toy_batch(seed=2), toy_batch(float("inf")), bad]
    step = make_step(
        model, *batches, optimizer=torch.optim.AdamW(model.parameters(), 0.1), skip_nonfinite=2
    )
    logged = [take_step(step, i) for i in range(4)]
    assert logged[1]["skipped_steps"][0] == 1 and logged[3]["skipped_steps"][0] == 2
    assert "total_loss" not in logged[1]
    reference = make_step(
        other, batches[0], batches[2], optimizer=torch.optim.AdamW(other.parameters(), 0.1)
    )
    for i in range(2):
        take_step(reference, i)
    state = other.state_dict()
    assert all(torch.equal(x, state[k]) for k, x in model.state_dict().items())
    told = list(dict.fromkeys(m for m in caplog.messages if "Step left out" in m))
    assert len(told) == 2 and "It is the 2. of at most 2" in told[1]
    # The count goes on in a resumed run.
    again = make_step(Toy(), bad, skip_nonfinite=2)
    again.load_state_dict(step.state_dict() | {"optimizer": again.optimizer.state_dict()})
    with pytest.raises(NonFiniteError, match="after 2 steps that were left out"):
        take_step(again)


@pytest.mark.parametrize("family", ["retinanet", "faster_rcnn"])
def test_a_dump_shows_the_same_step_again(family, teacher_files, tmp_path):
    """Of real detectors, one of which gives up by itself before there are losses."""
    cfg = distill_cfg(family, teacher_files[family])
    torch.manual_seed(0)
    model = build_model(cfg)
    with torch.no_grad():
        model.student.backbone.fpn_lateral4.weight[0, 0] = float("nan")
    step = make_step(model, make_batch(), folder=str(tmp_path), config=cfg.dump())
    with pytest.raises(NonFiniteError, match=r"python tools/replay.py .*_rank0.pth$") as e:
        take_step(step, 3)
    assert ("Predicted boxes or scores contain Inf/NaN" in str(e.value)) == (family != "retinanet")
    path = re.search(r"replay.py (\S+)$", str(e.value))[1]
    recorded = torch.load(path, weights_only=False)["losses"]
    found = replay(path)
    assert found["losses"].keys() == recorded.keys()
    same = torch.tensor([list(found["losses"].values()), list(recorded.values())])
    assert torch.equal(same[0].nan_to_num(-1), same[1].nan_to_num(-1))
    assert found["modules"][0].startswith("student.backbone.fpn_lateral4")
    assert bool(found["gradients"]) == bool(recorded) == (family == "retinanet")


def test_the_random_numbers_of_a_step_are_dumped(teacher_files, tmp_path):
    """Faster R-CNN samples regions at random: with others its losses would be others."""
    cfg = distill_cfg(
        "faster_rcnn", teacher_files["faster_rcnn"], "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 8
    )
    model = build_distilled("faster_rcnn", teacher_files, "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 8)
    model.student.roi_heads.register_forward_hook(
        lambda m, a, out: (out[0], {**out[1], "loss_cls": out[1]["loss_cls"] * float("nan")})
    )
    step = make_step(model, make_batch(), folder=str(tmp_path), config=cfg.dump())
    torch.manual_seed(5)
    with pytest.raises(NonFiniteError, match="loss_cls is nan"):
        take_step(step)
    path = tmp_path / "nonfinite_0000000_rank0.pth"
    recorded = torch.load(path, weights_only=False)["losses"]
    found = replay(path)["losses"]
    assert {k: v for k, v in found.items() if k != "loss_cls"} == {
        k: v for k, v in recorded.items() if k != "loss_cls"
    }


def test_replay_from_the_command_line(teacher_files, tmp_path):
    cfg = distill_cfg("retinanet", teacher_files["retinanet"])
    model = build_model(cfg)
    with torch.no_grad():
        model.student.backbone.fpn_lateral4.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError):
        take_step(make_step(model, make_batch(), folder=str(tmp_path), config=cfg.dump()))
    tool = [sys.executable, str(REPO / "tools" / "replay.py")]
    dump = str(tmp_path / "nonfinite_0000000_rank0.pth")
    done = subprocess.run([*tool, dump], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "loss_pcka_p4: nan" in done.stdout
    assert "output not finite: student.backbone.fpn_lateral4" in done.stdout
    done = subprocess.run([*tool, str(REPO / "README.md")], capture_output=True, text=True)
    assert done.returncode == 1 and "is no dump of a step" in done.stderr.splitlines()[-1]


def test_a_skipped_step_leaves_nothing_behind(teacher_files):
    """Not the running normaliser, nor the number of masks that MGD drew."""
    model = build_distilled("retinanet", teacher_files, "MODEL.DISTILL.LOSSES", ["MGDLoss"])
    step = make_step(model, make_batch(0), make_batch(1), skip_nonfinite=1, lr=1e-4)
    take_step(step)
    before = model.student.loss_normalizer, model.losses[0].get_extra_state()
    hook = model.student.head.register_forward_hook(
        lambda m, a, out: ([x * float("nan") for x in out[0]], out[1])
    )
    take_step(step, 1)
    hook.remove()
    assert step.skipped == 1
    assert (model.student.loss_normalizer, model.losses[0].get_extra_state()) == before


def test_a_dump_that_cannot_be_written(tmp_path):
    """The error that is on its way matters more."""
    step = make_step(Toy(), toy_batch(float("nan")), folder=str(tmp_path / "gone"))
    with pytest.raises(NonFiniteError, match=r"loss_b is nan .*its dump could not be written"):
        take_step(step)


# ---- shares in the gradient -------------------------------------------------------------------


def test_the_monitor_tells_each_losss_share(teacher_files, batch):
    """Against one backward for each; the update is that of a run without it."""
    model = build_distilled("retinanet", teacher_files)
    reference = copy.deepcopy(model)
    names = list(gradients(copy.deepcopy(model), batch)[0])
    norms = {}
    for name in names:
        single = copy.deepcopy(model)
        torch.manual_seed(1)
        with EventStorage(0):
            single(batch)[name].backward()
        found = [p.grad.flatten() for p in single.parameters() if p.grad is not None]
        norms[name] = torch.cat(found).norm().item()
    results = []
    for period, x in ((2, model), (0, reference)):
        torch.manual_seed(1)
        step = make_step(x, batch, batch, monitor_period=period)
        results.append([take_step(step, i) for i in range(2)])
    (first, second), (plain, _) = results
    for name, norm in norms.items():
        assert first[f"grad_norm/{name.removeprefix('loss_')}"][0] == pytest.approx(norm, rel=1e-4)
        share = norm / sum(norms.values())
        assert first[f"grad_share/{name.removeprefix('loss_')}"][0] == pytest.approx(
            share, rel=1e-4
        )
    assert not any(k.startswith("grad_") for k in [*second, *plain])
    for a, b in zip(model.parameters(), reference.parameters()):
        assert torch.equal(a, b)
