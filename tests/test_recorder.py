import copy
import pickle
import weakref

import pytest
import torch
from torch import nn

from pcka_distill.recorder import Recorder


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(2, 2)
        self.recorder = Recorder({"shared": self.shared})

    def forward(self, xs):
        return [self.shared(x) for x in xs]


def test_every_call_is_kept_in_order_and_only_inside():
    net = Net()
    xs = [torch.full((1, 2), float(i)) for i in range(3)]
    net(xs)
    with net.recorder.recording() as record:
        assert record["shared"] == []
        out = net(xs)
        assert [c.args[0] for c in record["shared"]] == xs
        assert all(a.output is b for a, b in zip(record["shared"], out))
    assert all(not tap.calls and not tap.open for tap in net.recorder._taps.values())


def test_outside_nothing_is_kept_alive():
    """An evaluation of thousands of images passes through the hooks, too."""
    net = Net()
    out = net([torch.zeros(1, 2)])[0]
    alive = weakref.ref(out)
    del out
    assert alive() is None


def test_nothing_is_kept_after_an_error():
    net = Net()

    def fail(module, args, output):
        raise ZeroDivisionError

    net.shared.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError), net.recorder.recording():
        net([torch.zeros(1, 2)])
    assert not net.recorder._taps["shared"].calls


def test_what_comes_before_the_first_call_comes_once_and_is_forgotten():
    net, xs, seen = Net(), [torch.zeros(1, 2), torch.ones(1, 2)], []
    with net.recorder.recording({"shared": seen.append}) as record:
        net(xs)
        assert seen == [(xs[0],)] and len(record["shared"]) == 2
    with net.recorder.recording({"shared": seen.append}):
        pass
    net(xs)
    assert len(seen) == 1


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_records_into_itself(clone):
    net = Net()
    twin = clone(net)
    with net.recorder.recording() as mine, twin.recorder.recording() as theirs:
        twin([torch.zeros(1, 2)])
        assert len(mine["shared"]) == 0
        assert len(theirs["shared"]) == 1
