"""Teacher feature maps on disk, for training images that come back unchanged."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import tempfile
import time
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
_STALE_SECONDS = 3600
# How often the folder is looked through for what others wrote.
_MEASURE_EVERY = 512

#: level -> what :func:`_pack` makes of its map
Entry = dict[str, tuple[Tensor, ...]]


class FeatureCache:
    """Keeps what a teacher's backbone says of an image: level -> (C, H, W), in half precision.

    An entry belongs to the teacher, the pixels that it was given and the padding of their batch:
    whatever changes one of them, another checkpoint or an augmentation, finds nothing there. It
    pays where images come back as they were, and only there: a flip doubles the entries, random
    crops or sizes never hit.

    What is read back is what was written, rounded: a run is the same with a cold and with a warm
    cache. Every entry holds its own checksum; a damaged one is computed again. Processes, of one
    run or of several, can share a folder.

    Args:
        folder: made if it is not there.
        max_bytes: of all files in the folder; when they are reached no more is written. Runs that
            fill it together see one another's files now and then, not at once.
        owner: what the maps depend on beside the pixels: a digest of the teacher and of how it is
            run. Each has a folder of its own in there.

    Raises:
        UserError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int, owner: str) -> None:
        self.hits = self.misses = self.damaged = 0
        self._whole = Path(folder)
        self._folder = self._whole / hashlib.blake2b(owner.encode(), digest_size=8).hexdigest()
        self._max_bytes = max_bytes
        self._full = False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._folder).close()
            for path in self._whole.glob("*/*/*.tmp"):
                # Of a process that was killed; one that lives is done within seconds.
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()
            self._measure()
        except OSError as e:
            raise UserError(
                f"the teacher's cache cannot be used: {reason(e)}; change "
                "MODEL.DISTILL.TEACHER.CACHE.DIR"
            ) from e
        used = max_bytes - self._left
        logger.info(
            f"Teacher cache in {folder}: {used / 2**30:.2f} of {max_bytes / 2**30:.2f} GiB used"
        )
        if self._left <= 0:
            self._stop("it is full")

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
                    entry = {level: _pack(maps[level][i]) for level in levels}
                    entries[i] = entry
                    self._write(path, entry)
        return {
            level: torch.stack([_unpack(x[level], device) for x in entries if x is not None])
            for level in levels
        }

    def _path(self, image: Tensor, levels: Sequence[str], padded_size: tuple[int, int]) -> Path:
        facts = (sorted(levels), tuple(image.shape), tuple(padded_size))
        digest = hashlib.blake2b(repr(facts).encode())
        digest.update(image.contiguous().cpu().numpy().data)
        name = digest.hexdigest()[:40]
        # A folder of a million files is slow in many file systems.
        return self._folder / name[:2] / f"{name}.pt"

    def _read(self, path: Path) -> Entry | None:
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
        try:
            entry: Entry = torch.load(io.BytesIO(data[_DIGEST:]), weights_only=True)
        except Exception as e:
            # Whole, but of another version of torch: whatever that one's reader raises.
            self._complain(path, reason(e))
            return None
        return entry

    def _complain(self, path: Path, why: str) -> None:
        self.damaged += 1
        if self.damaged == 1:
            logger.warning(f"Teacher cache: {path} is computed again, {why} (said once)")

    def _write(self, path: Path, entry: Entry) -> None:
        # Maps that are not finite are a failure of this run, not to be handed to the next.
        if self._full or not all(bool(x.isfinite().all()) for part in entry.values() for x in part):
            return
        buffer = io.BytesIO()
        torch.save({level: tuple(x.cpu() for x in part) for level, part in entry.items()}, buffer)
        data = buffer.getvalue()
        self._writes += 1
        if self._writes == _MEASURE_EVERY:
            self._measure()
        self._left -= len(data) * comm.get_world_size()
        if self._left <= 0:
            self._stop("it is full")
            return
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            # Whole or not at all, whoever else writes it or is stopped meanwhile.
            temporary.write_bytes(hashlib.blake2b(data, digest_size=_DIGEST).digest() + data)
            os.replace(temporary, path)
        except BaseException as e:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if not isinstance(e, OSError):
                raise
            self._stop(reason(e))

    def _measure(self) -> None:
        self._writes = 0
        files = [x for pattern in ("*.pt", "*.tmp") for x in self._whole.glob(f"*/*/{pattern}")]
        used = 0
        for path in files:
            # Another process may have replaced it meanwhile.
            with contextlib.suppress(FileNotFoundError):
                used += path.stat().st_size
        self._left = self._max_bytes - used

    def _stop(self, why: str) -> None:
        self._full = True
        logger.warning(
            f"Teacher cache in {self._whole}: {why}; nothing more is written. Raise "
            "MODEL.DISTILL.TEACHER.CACHE.MAX_GB, or delete what is there of other teachers (this "
            f"one's is {self._folder.name})"
        )


def _pack(x: Tensor) -> tuple[Tensor, ...]:
    """Half-precision values of each channel of a map (C, H, W), and what they are relative to.

    Neither the offset nor the scale of a channel, which a CKA does not see, costs digits then.
    """
    x = x.float()
    mean = x.mean((-2, -1), keepdim=True)
    peak = (x - mean).abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return ((x - mean) / peak).half(), mean, peak


def _unpack(part: tuple[Tensor, ...], device: torch.device) -> Tensor:
    values, mean, peak = (x.to(device) for x in part)
    return values.float() * peak + mean
