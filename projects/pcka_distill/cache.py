"""Teacher feature maps on disk, for training images that come back unchanged."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from detectron2.utils import comm
from torch import Tensor

from pcka_distill.errors import UserError, reason

__all__ = ["FeatureCache"]

# A child of Detectron2's logger, so that it is seen wherever that one is.
logger = logging.getLogger(f"detectron2.{__name__}")

_DIGEST = 16


class FeatureCache:
    """Keeps what a teacher's backbone says of an image: level -> (C, H, W), in half precision.

    An entry belongs to the teacher's weights, the pixels that it was given and the padding of
    their batch, so that whatever changes one of them, another checkpoint or an augmentation, finds
    nothing there. It pays where images come back as they were, and only there: a flip doubles the
    entries, random crops or sizes never hit.

    What is read back is what was written, rounded: a run is the same with a cold and with a warm
    cache. Every entry holds its own checksum; a damaged one is computed again. Processes, of one
    run or of several, can share a folder.

    Args:
        folder: made if it is not there.
        max_bytes: of all entries in the folder; when they are reached no more is written.
        owner: what else the features depend on: the teacher's fingerprint.

    Raises:
        UserError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int, owner: str) -> None:
        self.hits = self.misses = self.damaged = 0
        self._owner = owner
        self._folder = Path(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._folder).close()
            used = sum(x.stat().st_size for x in self._folder.glob("*/*.pt"))
        except OSError as e:
            raise UserError(
                f"the teacher's cache cannot be used: {reason(e)}; change "
                "MODEL.DISTILL.TEACHER.CACHE.DIR"
            ) from e
        # Each process may write its part of what is left.
        self._left = (max_bytes - used) // comm.get_world_size()
        logger.info(
            f"Teacher cache in {folder}: {used / 2**30:.2f} of {max_bytes / 2**30:.2f} GiB used"
        )

    def fetch(
        self,
        images: Sequence[Tensor],
        levels: Sequence[str],
        padded_size: tuple[int, int],
        device: torch.device,
        compute: Callable[[], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """The teacher's feature maps of a batch, computed only if an image is not there.

        Args:
            images: (3, H, W), as the data loader gives them.
            levels: of the maps that are wanted.
            padded_size: of their batch, in pixels.
            device: where the maps are wanted.
            compute: gives level -> (B, C, H, W), of these levels or more.

        Returns:
            what ``compute`` does, in fp32, rounded to half precision.
        """
        paths = [self._path(image, levels, padded_size) for image in images]
        entries = [self._read(path) for path in paths]
        found = sum(entry is not None for entry in entries)
        self.hits += found
        self.misses += len(entries) - found
        if found < len(entries):
            maps = compute()
            for i, path in enumerate(paths):
                if entries[i] is None:
                    entries[i] = {level: _halve(maps[level][i]).cpu() for level in levels}
                    self._write(path, entries[i])
        whole = [entry for entry in entries if entry is not None]
        return {
            level: torch.stack([entry[level].to(device).float() for entry in whole])
            for level in levels
        }

    def _path(self, image: Tensor, levels: Sequence[str], padded_size: tuple[int, int]) -> Path:
        facts = (self._owner, sorted(levels), tuple(image.shape), tuple(padded_size))
        digest = hashlib.blake2b(repr(facts).encode())
        digest.update(image.contiguous().cpu().numpy().data)
        name = digest.hexdigest()[:40]
        # A folder of a million files is slow in many file systems.
        return self._folder / name[:2] / f"{name}.pt"

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as e:
            self._complain(path, reason(e))
            return None
        if hashlib.blake2b(data[_DIGEST:], digest_size=_DIGEST).digest() != data[:_DIGEST]:
            self._complain(path, "its checksum is wrong")
            return None
        entry: dict[str, Tensor] = torch.load(io.BytesIO(data[_DIGEST:]), weights_only=True)
        return entry

    def _complain(self, path: Path, why: str) -> None:
        self.damaged += 1
        if self.damaged == 1:
            logger.warning(f"Teacher cache: {path} is computed again, {why} (said once)")

    def _write(self, path: Path, entry: dict[str, Tensor] | None) -> None:
        buffer = io.BytesIO()
        torch.save(entry, buffer)
        data = buffer.getvalue()
        if self._left <= 0:
            return
        self._left -= len(data)
        if self._left <= 0:
            logger.warning(
                f"Teacher cache: {self._folder} is full, no more is written; raise "
                "MODEL.DISTILL.TEACHER.CACHE.MAX_GB for all to be kept"
            )
            return
        try:
            path.parent.mkdir(exist_ok=True)
            # Whole or not at all, whoever else writes it or is stopped meanwhile.
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as f:
                f.write(hashlib.blake2b(data, digest_size=_DIGEST).digest() + data)
            os.replace(f.name, path)
        except OSError as e:
            self._left = 0
            logger.warning(f"Teacher cache: {reason(e)}; no more is written to {self._folder}")
            with contextlib.suppress(OSError, UnboundLocalError):
                os.unlink(f.name)


def _halve(x: Tensor) -> Tensor:
    half = x.half()
    # What fp16 cannot hold bf16 can, with fewer digits.
    return half if bool(half.isfinite().all()) else x.bfloat16()
