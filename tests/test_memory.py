"""Gradient accumulation and activation checkpointing: the same updates."""

import contextlib
import copy
import pickle

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import digits_cfg, distill_cfg, make_batch
from torch import nn

from pcka_distill import UserError
from pcka_distill.memory import (
    AccumulatingAMPTrainer,
    AccumulatingTrainer,
    checkpoint_activations,
)

# Of the student; its batch norm would relate the images of a part to one another.
FROZEN_NORM = (
    *("MODEL.RESNETS.NORM", "FrozenBN"),
    *("MODEL.DISTILL.TEACHER.OPTS", ["MODEL.RESNETS.NORM", "BN"]),
)
SYNC_NORM = (*("MODEL.RESNETS.NORM", "SyncBN"), *FROZEN_NORM[2:])
FAMILIES = ["retinanet", "fcos", "faster_rcnn"]


def build(family, teacher_files, *opts):
    torch.manual_seed(0)
    return build_model(distill_cfg(family, teacher_files[family], *opts))


def gradients(model, batch):
    """(losses, gradients) of one forward; the random numbers that it draws are always the same."""
    model.zero_grad()
    torch.manual_seed(1)
    with EventStorage(0):
        losses = model(batch)
    sum(losses.values()).backward()
    return losses, {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def accumulate(model, batch, parts, lr):
    """One update of the trainer, by plain SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    trainer = AccumulatingTrainer(model, [batch], optimizer)
    trainer.parts = parts
    trainer.iter = 0
    with EventStorage(0) as storage:
        trainer.run_step()
    return storage.latest()


def test_gradients_of_an_earlier_step_do_not_count(teacher_files, batch):
    model = build("retinanet", teacher_files)
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
    model = build(family, teacher_files)
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
    model = build("fcos", teacher_files, *FROZEN_NORM, "MODEL.DISTILL.LOSSES", ["MimicLoss"])
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("distill."))
    batch = [x for i in range(2) for x in make_batch(i)]
    whole = copy.deepcopy(model)
    accumulate(model, batch, parts=4, lr=1.0)
    accumulate(whole, batch, parts=1, lr=1.0)
    for a, b in zip(model.distill.parameters(), whole.distill.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_accumulation_in_mixed_precision(teacher_files, monkeypatch):
    """The scaler's: scaled, unscaled, and skipped where a gradient is not finite."""
    model = build("fcos", teacher_files, *FROZEN_NORM)
    batch = [x for i in range(2) for x in make_batch(i)]
    reference = copy.deepcopy(model)
    accumulate(reference, batch, parts=2, lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = AccumulatingAMPTrainer(model, [batch], optimizer, grad_scaler=scaler)
    trainer.parts, trainer.iter, trainer.precision = 2, 0, torch.bfloat16
    # There is no CUDA here: what is tested is the scaler.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with EventStorage(0):
        trainer.run_step()
    for a, b in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_processes_exchange_gradients_once_a_batch(teacher_files, tmp_path):
    model = build("fcos", teacher_files, *FROZEN_NORM)
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
    model = build("fcos", teacher_files)
    trainer = AccumulatingTrainer(model, [make_batch()], torch.optim.SGD(model.parameters(), 0.1))
    model.eval()
    with pytest.raises(AssertionError, match="eval mode"):
        trainer.run_step()


def saved_bytes(model, batch):
    """What autograd keeps of a forward."""
    seen = {}

    def pack(x):
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), EventStorage(0):
        losses = model(batch)
    assert losses
    return sum(seen.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("opts", [(), FROZEN_NORM, SYNC_NORM])
def test_checkpointed_activations_change_nothing_but_memory(family, opts, teacher_files, batch):
    """Bit for bit, batch norm's statistics included, in copies and pickles too."""
    plain = build(family, teacher_files, *opts)
    model = copy.deepcopy(plain)
    assert checkpoint_activations(model.student) == 4
    assert list(model.state_dict()) == list(plain.state_dict())
    less, all_of_it = saved_bytes(copy.deepcopy(model), batch), saved_bytes(plain, batch)
    assert less < 0.75 * all_of_it
    plain = build(family, teacher_files, *opts)
    expected, expected_gradients = gradients(plain, batch)
    for clone in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        losses, found = gradients(clone, batch)
        assert all(torch.equal(losses[k], expected[k]) for k in expected)
        assert found.keys() == expected_gradients.keys()
        assert all(torch.equal(found[k], expected_gradients[k]) for k in found)
        buffers = dict(plain.named_buffers())
        assert all(torch.equal(x, buffers[k]) for k, x in clone.named_buffers())


def test_frozen_stages_are_left_alone():
    cfg = digits_cfg("retinanet", "MODEL.BACKBONE.FREEZE_AT", 2)
    model = build_model(cfg)
    assert checkpoint_activations(model) == 3
    assert type(model.backbone.bottom_up.res2) is nn.Sequential


def test_a_backbone_without_stages_is_refused():
    with pytest.raises(UserError, match="ACTIVATION_CHECKPOINT works on ResNets"):
        checkpoint_activations(nn.Linear(2, 2))
