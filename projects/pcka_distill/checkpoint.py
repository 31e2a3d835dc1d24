"""Checkpoints: whole on disk, read without running what they hold, and compared to the model."""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from pcka_distill.errors import UserError, reason

__all__ = [
    "Mismatch",
    "SafeCheckpointer",
    "StrictCheckpointer",
    "hide_prefix",
    "remove_partial",
    "write_whole",
]

_PARTIAL = ".partial"
_MOST_CHANNELS = 64
# Of the attributes of a file in a zip archive.
_DOS_FOLDER = 0x10


def hide_prefix(module: nn.Module, inner: str, besides: str = "") -> None:
    """Give a module's state the names that the state of a module inside of it has by itself.

    Args:
        module: of which the state is meant.
        inner: where that module is, with a dot at the end.
        besides: where what is not in it is, likewise; its names stay.
    """
    # Not closures: they are copied and pickled with the module.
    module._register_state_dict_hook(functools.partial(_drop_prefix, inner))
    module._register_load_state_dict_pre_hook(functools.partial(_restore_prefix, inner, besides))
    module.register_load_state_dict_post_hook(functools.partial(_tell_without, inner))


def _drop_prefix(
    inner: str, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
) -> None:
    whole = prefix + inner
    for key in [k for k in state if k.startswith(whole)]:
        state[prefix + key[len(whole) :]] = state.pop(key)
    versions = getattr(state, "_metadata", {})
    for key in [k for k in versions if (k + ".").startswith(whole)]:
        versions[prefix + key[len(whole) :]] = versions.pop(key)


def _restore_prefix(inner: str, besides: str, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [k for k in state if k.startswith(prefix)]:
        if not (besides and key.startswith(prefix + besides)):
            state[prefix + inner + key[len(prefix) :]] = state.pop(key)


def _tell_without(inner: str, module: nn.Module, incompatible: Any) -> None:
    for keys in (incompatible.missing_keys, incompatible.unexpected_keys):
        keys[:] = [k.replace(inner, "", 1) for k in keys]


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that, whenever the machine stops, the old or the new one is whole.

    Raises:
        OSError: it cannot be written; the old one is still there.
    """
    partial = path.with_name(path.name + _PARTIAL)
    try:
        with open(partial, "wb") as f:
            try:
                write(f)
                f.flush()
            except RuntimeError as e:
                # torch's writer says of a full disk that its position is not the one it expected.
                if not re.search("StreamWriter|unexpected pos|enforce fail", str(e)):
                    raise
                raise OSError(reason(e)) from e
            os.fsync(f.fileno())
        os.replace(partial, path)
        # The name too has to reach the disk, and before the name of a later file does.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as e:
            # Some network file systems have no such thing; the file is there.
            if e.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
                raise
        finally:
            os.close(folder)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def remove_partial(folder: str) -> None:
    """Remove what killed runs began to write."""
    for path in Path(folder).glob(f"*{_PARTIAL}"):
        path.unlink(missing_ok=True)


class Mismatch(NamedTuple):
    """What of a checkpoint and a model did not find its counterpart."""

    #: (key, shape in the file, shape in the model)
    shapes: list[tuple[str, Any, Any]]
    #: of the model, not in the file
    missing: list[str]
    #: in the file, not of the model
    unexpected: list[str]

    def __str__(self) -> str:
        shapes = [f"{k} {tuple(a)} != {tuple(b)}" for k, a, b in self.shapes]
        kinds = {
            "of another shape than the model's": shapes,
            "missing in the file": self.missing,
            "unknown to the model": self.unexpected,
        }
        return "; ".join(f"{len(v)} {k}: {_shorten(v)}" for k, v in kinds.items() if v)


def _shorten(keys: list[str], limit: int = 8) -> str:
    more = f", and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


class _Refused(pickle.UnpicklingError):
    """A pickle that names a function we do not know."""


class _Memo(dict[int, Any]):
    """What a pickle keeps to name it again, numbered one after the other.

    The reader in C, which Detectron2 uses, makes room for as many as the highest number says: a
    single damaged byte is gigabytes.
    """

    def __setitem__(self, number: int, value: Any) -> None:
        # Those of Python 2 begin at 1.
        if number > len(self) + 1:
            raise pickle.UnpicklingError(f"its part {number} comes after {len(self)} others")
        super().__setitem__(number, value)


class _Dtype:
    """Stands for the type of numbers in an array: of no Python objects, and of one number each.

    What numpy makes of any other state would read the numbers of a file as addresses.
    """

    def __init__(self, kind: str, align: int = 0, copy: int = 1) -> None:
        if not re.fullmatch(r"[biufc]\d{1,2}", kind):
            raise _Refused(f"it has an array of type {kind!r:.20}")
        self.size = int(kind[1:])

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, order, *rest = state
        # No parts, no names, no fields, size and alignment of the type, and no flags.
        if (
            version != 3
            or order not in ("<", ">", "|", "=")
            or rest != [None, None, None, -1, -1, 0]
        ):
            raise _Refused(f"it has an array of type {state!r:.80}")


class _Array:
    """Stands for an array: its type and its size fit the bytes that are its numbers."""

    def __init__(self, kind: Any, shape: Any, code: Any) -> None:
        if kind is not np.ndarray or shape != (0,):
            raise _Refused(f"it has an array of kind {kind!r:.40} and shape {shape!r:.40}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, dtype, _, numbers = state
        if version != 1 or not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array is damaged")
        if not all(isinstance(side, int) and side >= 0 for side in shape):
            raise pickle.UnpicklingError(f"an array has the shape {shape!r:.80}")
        _check_size(dtype, math.prod(shape), numbers)


def _check_size(dtype: _Dtype, count: int, numbers: bytes | str) -> None:
    if len(numbers) != count * dtype.size:
        raise pickle.UnpicklingError(
            f"an array of {count} numbers of {dtype.size} bytes has {len(numbers)} bytes"
        )


def _scalar(dtype: _Dtype, number: bytes | str) -> None:
    _check_size(dtype, 1, number)


class _Tensors(pickle._Unpickler):
    """Looks through what Detectron2's model zoo has in its .pkl files, and makes nothing of it.

    Numbers, text, lists, and numpy arrays; Detectron2 itself then reads the file.
    """

    _ALLOWED = {  # noqa: RUF012  (no dataclass)
        ("collections", "OrderedDict"): OrderedDict,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): _Dtype,
    }

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="latin1")
        self.memo = _Memo()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ALLOWED:
            return self._ALLOWED[module, name]
        # numpy moved them in its version 2.
        if module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            if name == "_reconstruct":
                return _Array
            if name == "scalar":
                return _scalar
        if (module, name) == ("_codecs", "encode"):
            # Of an array pickled by Python 2: latin1 alone.
            return _encode_latin1
        raise _Refused(f"it asks to run {module}.{name}")


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise _Refused(f"it asks for the encoding {encoding}")
    return text.encode("latin1")


class _SafeReader(Checkpointer):
    """What Detectron2's checkpointer asks to read a file of torch, whatever its version."""

    trusted = False

    def _load_file(self, f: str) -> Any:
        if not self.trusted and zipfile.is_zipfile(f):
            # torch reads over a flipped bit in a weight.
            with zipfile.ZipFile(f) as archive:
                if any(x.compress_type != zipfile.ZIP_STORED for x in archive.infolist()):
                    # A few kilobytes could become any number of gigabytes.
                    raise OSError("it is compressed, which checkpoints of torch never are")
                folders = [x.filename for x in archive.infolist() if x.external_attr & _DOS_FOLDER]
                if folders:
                    # torch would read zeros.
                    raise OSError(f"{folders[0]} is marked as a folder")
                damaged = archive.testzip()
            if damaged:
                raise OSError(f"the checksum of {damaged} is wrong")
        try:
            return torch.load(f, map_location="cpu", weights_only=not self.trusted)
        except pickle.UnpicklingError as e:
            # Of a damaged file it says something else.
            if not re.search(r"Unsupported (global|class)|Trying to|persistent_load", str(e)):
                raise
            raise UserError(_untrusted(f, reason(e))) from e


def read_checkpoint(path: str, *, trusted: bool = False) -> Any:
    """All that a file of torch holds, as it is.

    Args:
        path: of the file.
        trusted: see :class:`SafeCheckpointer`.
    """
    reader = _SafeReader(nn.Module())
    reader.trusted = trusted
    return reader._load_file(reader.path_manager.get_local_path(path))


class SafeCheckpointer(DetectionCheckpointer, _SafeReader):
    """Detectron2's checkpointer, for days of training and for files of others.

    A checkpoint is written beside the last one and takes its name when it is whole on the disk.
    What is read is tensors and numbers: a file that needs more could run any program, and is
    refused.

    Args:
        trusted: read such files all the same.
    """

    def __init__(self, *args: Any, trusted: bool = False, **checkpointables: Any) -> None:
        super().__init__(*args, **checkpointables)
        self.trusted = trusted

    def save(self, name: str, **kwargs: Any) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        if "://" in self.save_dir:
            # A store that iopath knows has files whole or not at all, and no names to swap.
            super().save(name, **kwargs)
            return
        content = {"model": self.model.state_dict()}
        content.update((key, x.state_dict()) for key, x in self.checkpointables.items())
        content.update(kwargs)
        path = Path(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        self._write(path, lambda f: torch.save(content, f))
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        if "://" in self.save_dir:
            super().tag_last_checkpoint(last_filename_basename)
            return
        name = last_filename_basename.encode()
        self._write(Path(self.save_dir, "last_checkpoint"), lambda f: f.write(name))

    def _write(self, path: Path, write: Callable[[IO[bytes]], object]) -> None:
        try:
            write_whole(path, write)
        except OSError as e:
            last = self.get_checkpoint_file()
            kept = f"the last whole one is {last}" if last else "there is none yet"
            raise UserError(
                f"checkpoint {path} cannot be written ({reason(e)}); {kept}. Make room or change "
                "OUTPUT_DIR, and go on with --resume"
            ) from e

    def _load_file(self, filename: str) -> Any:
        if not self.trusted and filename.endswith((".pkl", ".pyth")):
            # Detectron2 reads these itself, any of them; it does so where nothing can be run.
            if filename.endswith(".pyth"):
                _SafeReader._load_file(self, filename)
            else:
                with open(filename, "rb") as f:
                    try:
                        _Tensors(f).load()
                    except _Refused as e:
                        raise UserError(_untrusted(filename, reason(e))) from e
        return super()._load_file(filename)


def _untrusted(path: str, why: str) -> str:
    return (
        f"{path} holds more than tensors and numbers ({why}): reading it could run any program. If "
        "you trust where it comes from, add TRUST_CHECKPOINT True to the command line"
    )


class StrictCheckpointer(SafeCheckpointer):
    """Loads a model alone, also from the checkpoint of a distilled student.

    Attributes:
        mismatch: of the last load.
        pixels: the normalisation that its file was trained with, where it says so.
    """

    mismatch = Mismatch([], [], [])
    #: pixel_mean and pixel_std, where the file has them: name -> values
    pixels: dict[str, list[float]] = {}  # noqa: RUF012  (replaced, never changed)

    def _load_model(self, checkpoint: Any) -> Any:
        state = checkpoint["model"]
        self.pixels = {
            name: torch.as_tensor(state[name]).flatten().tolist()
            for name in ("pixel_mean", "pixel_std")
            if name in state and np.prod(np.shape(state[name])) <= _MOST_CHANNELS
        }
        return super()._load_model(checkpoint)

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        def counts(key: str) -> bool:
            # BN counters come and go with the kind of BN and are unused in eval mode; pixel
            # statistics were part of checkpoints until 2020 and come from the config since; the
            # adapters of a distilled student are no part of it.
            return not (
                key.endswith("num_batches_tracked")
                or key in ("pixel_mean", "pixel_std")
                or key.startswith("distill.")
            )

        shapes = list(incompatible.incorrect_shapes)
        # A tensor of the wrong shape is not loaded, so it is listed as missing as well.
        wrong = {k for k, _, _ in shapes}
        self.mismatch = Mismatch(
            shapes,
            sorted(k for k in incompatible.missing_keys if counts(k) and k not in wrong),
            sorted(k for k in incompatible.unexpected_keys if counts(k)),
        )
