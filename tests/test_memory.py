"""Activation checkpointing: the same updates."""

import copy
import pickle

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import FROZEN_NORM, build_distilled, digits_cfg, gradients
from torch import nn

from pcka_distill import UserError
from pcka_distill.memory import checkpoint_activations

SYNC_NORM = (*("MODEL.RESNETS.NORM", "SyncBN"), *FROZEN_NORM[2:])
FAMILIES = ["retinanet", "fcos", "faster_rcnn"]


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
    plain = build_distilled(family, teacher_files, *opts)
    model = copy.deepcopy(plain)
    assert checkpoint_activations(model.student) == 4
    assert list(model.state_dict()) == list(plain.state_dict())
    less, all_of_it = saved_bytes(copy.deepcopy(model), batch), saved_bytes(plain, batch)
    assert less < 0.75 * all_of_it
    plain = build_distilled(family, teacher_files, *opts)
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
