"""Training batches that a resumed run continues with, image by image."""

from __future__ import annotations

import contextlib
import itertools
import logging
import operator
import random
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList

# Private, and the one place that knows which keys choose a sampler: a copy of it would know fewer.
from detectron2.data.build import _train_loader_from_config
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from PIL.Image import DecompressionBombError
from torch.utils.data import DataLoader, IterableDataset, Sampler, get_worker_info

from pcka_distill.errors import UserError, reason

__all__ = ["ResumableLoader", "build_train_loader", "own_random_numbers"]

# A child of Detectron2's logger, so that it is seen wherever that one is.
logger = logging.getLogger(f"detectron2.{__name__}")

Record = dict[str, Any]
Mapper = Callable[[Record], "Record | None"]
# Of a file, not of a program: what PIL, OpenCV and Detectron2 raise on one that is no image.
_UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, DecompressionBombError,
)  # fmt: skip
# How many images are tried in place of one that is unreadable, or has no object left in it.
_ATTEMPTS = 100


@contextlib.contextmanager
def own_random_numbers(seed: int | None = None) -> Iterator[None]:
    """Let what is done inside draw from Python, numpy and torch (CPU) without moving them.

    Args:
        seed: of all three inside; None leaves them where they are.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed)
        # Not torch.manual_seed, which would seed every GPU too.
        torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


@dataclass
class _Image:
    """One of the stream."""

    #: the bucket it goes to
    group: int
    record: Record | None
    #: files that could not be read before this one took their place: name -> why
    failures: dict[str, str]


@dataclass(eq=False)
class _Images(IterableDataset):  # type: ignore[type-arg]
    """An endless stream of images, each augmented from random numbers of its own.

    In a worker of a loader it is that worker's share; all shares in turn are the stream.
    """

    records: Sequence[Record]
    #: of each record
    groups: Sequence[int]
    mapper: Mapper
    sampler: Sampler[int]
    #: (position, index) of images to begin with
    pending: list[tuple[int, int]]
    #: where in the sampler it goes on then
    begin: int
    #: see :class:`ResumableLoader`
    seed: int
    rank: int
    processes: int

    def __iter__(self) -> Iterator[_Image]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        rest = itertools.islice(enumerate(self.sampler), self.begin, None)
        order = itertools.chain(self.pending, rest)
        for position, index in itertools.islice(order, first, None, step):
            yield self._map(position, index)

    def _map(self, position: int, index: int) -> _Image:
        # All that an augmentation depends on: not the workers, nor what came before.
        place = position * self.processes + self.rank
        seed = int(np.random.SeedSequence([self.seed, place]).generate_state(1)[0])
        substitutes = random.Random(seed)
        group = self.groups[index]
        failures: dict[str, str] = {}
        with own_random_numbers(seed):
            for _ in range(_ATTEMPTS):
                record = self.records[index]
                try:
                    mapped = self.mapper(record)
                except UserError:
                    raise
                except _UNREADABLE as e:
                    failures[str(record.get("file_name"))] = reason(e)
                else:
                    if mapped is not None:
                        return _Image(group, mapped, failures)
                # Of the same group, so that what is in a batch is known without reading an image.
                index = substitutes.randrange(len(self.records))
                while self.groups[index] != group:
                    index = substitutes.randrange(len(self.records))
        return _Image(group, None, failures)


class ResumableLoader:
    """Detectron2's training batches, which can be begun at any of them.

    Images are in the sampler's order, and grouped by aspect ratio as Detectron2 does. Each is
    augmented from random numbers of its own, given by the seed and its place in the order: batches
    are the same with any number of workers, and those of a resumed run are those that it would
    have had.

    An image that cannot be read is told, and another one stands in for it, up to a number of them.

    Args:
        records: of the dataset.
        sampler: endless indices of this process, the same whenever it is begun.
        mapper: record -> model input, or None for an image without objects.
        batch_size: of this process.
        group_by_aspect: make batches of lying and of upright images.
        num_workers: 0 loads in this process.
        seed: of the augmentation.
        max_unreadable: files that may be left out, in each process; one more is an error.

    Attributes:
        first_batch: where the next iteration over it begins.

    Raises:
        UserError: while iterating, on an image that cannot be read.
    """

    def __init__(
        self,
        records: Sequence[Record],
        sampler: Sampler[int],
        mapper: Mapper,
        batch_size: int,
        *,
        group_by_aspect: bool = True,
        num_workers: int = 0,
        seed: int = 0,
        max_unreadable: int = 0,
    ) -> None:
        self.first_batch = 0
        self.batch_size = batch_size
        self._sampler = sampler
        # A lambda goes to the workers as well.
        self._mapper = PicklableWrapper(mapper)
        self._num_workers = num_workers
        self._seed = seed
        self._max_unreadable = max_unreadable
        self._unreadable: set[str] = set()
        self._groups = [
            int(group_by_aspect and not x.get("width", 0) > x.get("height", 0)) for x in records
        ]
        self._records = DatasetFromList(list(records), copy=False)

    def __len__(self) -> int:
        """Images of the dataset."""
        return len(self._groups)

    def __iter__(self) -> Iterator[list[Record]]:
        pending, begin = self._seek(self.first_batch)
        images = _Images(
            self._records, self._groups, self._mapper, self._sampler, pending, begin,
            self._seed, comm.get_rank(), comm.get_world_size(),
        )  # fmt: skip
        loader: Any = DataLoader(
            images, num_workers=self._num_workers, collate_fn=operator.itemgetter(0)
        )
        # Now, and not with the first batch: it draws a number from torch's generator.
        return self._batches(iter(loader))

    def _batches(self, images: Iterator[_Image]) -> Iterator[list[Record]]:
        buckets: tuple[list[Record], list[Record]] = ([], [])
        for image in images:
            self._tell(image.failures)
            if image.record is None:
                raise UserError(
                    f"the mapper of DATASETS.TRAIN made nothing of {_ATTEMPTS} images in a row; "
                    "change INPUT.CROP or the mapper"
                )
            bucket = buckets[image.group]
            bucket.append(image.record)
            if len(bucket) == self.batch_size:
                yield bucket[:]
                bucket.clear()

    def _tell(self, failures: dict[str, str]) -> None:
        for name, why in failures.items():
            if name in self._unreadable:
                continue
            self._unreadable.add(name)
            count = len(self._unreadable)
            if count > self._max_unreadable:
                raise UserError(
                    f"image {name} cannot be read ({why}); mend it, take it out of the dataset, or "
                    f"set DATALOADER.MAX_UNREADABLE to more than {self._max_unreadable} to leave "
                    "out such images"
                )
            logger.warning(
                f"Image {name} cannot be read ({why}); another one stands in for it. It is the "
                f"{count}. of at most {self._max_unreadable} (DATALOADER.MAX_UNREADABLE)"
            )

    def _seek(self, batch: int) -> tuple[list[tuple[int, int]], int]:
        """(position, index) of images that wait for a batch of theirs, and the next position."""
        if not batch:
            return [], 0
        buckets: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        for position, index in enumerate(self._sampler):
            bucket = buckets[self._groups[index]]
            bucket.append((position, index))
            if len(bucket) == self.batch_size:
                bucket.clear()
                batch -= 1
                if not batch:
                    return sorted(buckets[0] + buckets[1]), position + 1
        raise UserError("the sampler ended before the batch that the run stopped at")


def build_train_loader(
    cfg: CfgNode, records: list[Record], mapper: Mapper | None = None
) -> ResumableLoader:
    """Detectron2's training loader of a config, resumable.

    Args:
        cfg: its ``DATALOADER``, ``SOLVER.IMS_PER_BATCH`` and ``SEED`` are read.
        records: of ``DATASETS.TRAIN``, as ``get_detection_dataset_dicts`` gives them.
        mapper: Detectron2's ``DatasetMapper`` if None.

    Raises:
        UserError: a sampler that is not known or does not fit.
    """
    try:
        parts = _train_loader_from_config(cfg, mapper, dataset=records)
    except (ValueError, AssertionError) as e:
        raise UserError(f"the training data cannot be sampled: {reason(e)}") from e
    factors = getattr(parts["sampler"], "_int_part", None)
    if factors is not None and len(factors) != len(records):
        raise UserError(
            f"{cfg.DATALOADER.SAMPLER_TRAIN} counts {len(factors)} images and {len(records)} can "
            "be used: take out those that the log names, or choose another SAMPLER_TRAIN"
        )
    return ResumableLoader(
        records,
        parts["sampler"],
        parts["mapper"],
        parts["total_batch_size"] // comm.get_world_size(),
        group_by_aspect=parts["aspect_ratio_grouping"],
        num_workers=parts["num_workers"],
        seed=max(cfg.SEED, 0),
        max_unreadable=cfg.DATALOADER.MAX_UNREADABLE,
    )
