"""tools/train_net.py for tests/test_processes.py, with models whose updates can be compared.

Says at the end whether all processes have the same model.
"""

import os
import time
from pathlib import Path

import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.utils import comm

import pcka_distill  # noqa: F401  (registers everything)
from pcka_distill import engine
from pcka_distill.teacher import digest_of

torch.set_num_threads(1)


class Finalized:
    """One of several processes, once Python takes it down: gloo may abort it then, this does."""

    def __del__(self):
        os.abort()


LAST = []


@META_ARCH_REGISTRY.register()
class Untaught(RetinaNet):
    """Its own losses, which are no means over images, do not count."""

    def forward(self, batched_inputs):
        losses = super().forward(batched_inputs)
        return {k: 0.0 * v for k, v in losses.items()} if self.training else losses


class Trainer(engine.Trainer):
    def run_step(self):
        rank, at, file = os.environ.get("FAIL", "-1 -1 -").split()
        if comm.get_rank() == int(rank) and self.iter == int(at):
            Path(file).write_text(str(time.time()))
            raise RuntimeError("the first error")
        super().run_step()

    def train(self):
        result = super().train()
        if comm.get_world_size() > 1:
            LAST.append(Finalized())
        if self.cfg.DATASETS.TEST:
            comm.synchronize()
        state = self.model.state_dict()
        trained = {k: v for k, v in state.items() if "running_" not in k and "num_batches" not in k}
        kinds = {"weights": trained}
        if self.cfg.DATASETS.TEST:
            kinds["buffers"] = dict(self.model.named_buffers())
        for name, tensors in kinds.items():
            same = len(set(comm.all_gather(digest_of(tensors)))) == 1
            if comm.is_main_process():
                print(f"{name} in step in {comm.get_world_size()} processes: {same}")
        return result


engine.Trainer = Trainer

if __name__ == "__main__":
    engine.cli()
