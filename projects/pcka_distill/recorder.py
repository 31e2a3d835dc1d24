"""Reading the inputs and outputs of submodules without touching the model's code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

__all__ = ["Call", "Recorder"]


class Call(NamedTuple):
    """One call of a module."""

    args: tuple[Any, ...]
    output: Any


class _Tap:
    """Keeps every call of one module while it is open.

    Its bound method is the hook: unlike a closure it is copied and pickled together with the
    module and with the recorder, so that a deep copy of the model records into itself.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.open = False
        self.before: Callable[[tuple[Any, ...]], None] | None = None

    def pre_hook(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.before is not None:
            before, self.before = self.before, None
            before(args)

    def hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Returns None: the output passes on unchanged.
        if self.open:
            self.calls.append(Call(args, output))


class Recorder:
    """Forward hooks on named modules, set once, that record only inside :meth:`recording`.

    All calls are kept, in order: a head that is shared by the levels of an FPN is called once a
    level, a cascade's pooler once a stage.

    Args:
        modules: name -> module to listen to.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._taps = {name: _Tap() for name in modules}
        for name, module in modules.items():
            module.register_forward_pre_hook(self._taps[name].pre_hook)
            module.register_forward_hook(self._taps[name].hook)

    @contextlib.contextmanager
    def recording(
        self, before: Mapping[str, Callable[[tuple[Any, ...]], None]] | None = None
    ) -> Iterator[dict[str, list[Call]]]:
        """Record the calls made inside the block; nothing is kept after it, even on an error.

        Args:
            before: name -> what to do, with its arguments, before the module's first call.

        Yields:
            name -> calls so far.
        """
        try:
            for name, tap in self._taps.items():
                tap.calls = []
                tap.open = True
                tap.before = (before or {}).get(name)
            yield {name: tap.calls for name, tap in self._taps.items()}
        finally:
            for tap in self._taps.values():
                tap.calls = []
                tap.open = False
                tap.before = None
