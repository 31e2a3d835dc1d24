"""Image classifiers as Detectron2 models: of torchvision, timm, or those of CIFAR."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from detectron2.structures import ImageList
from torch import Tensor, nn

from pcka_distill.checkpoint import hide_prefix
from pcka_distill.cifar import CIFAR_NETS
from pcka_distill.errors import UserError, reason
from pcka_distill.recorder import Recorder

__all__ = ["ClassifierNet", "ImageClassifier", "build_net"]

_LOST = 4


def build_net(name: str, classes: int) -> nn.Module:
    """A network by its name, with random weights.

    Args:
        name: ``cifar/``, ``torchvision/`` or ``timm/`` and a name that is known there.
        classes: of its last layer.

    Raises:
        UserError: it is not known, or its library is not installed.
    """
    family, _, rest = name.partition("/")
    what = f"MODEL.CLASSIFIER.NAME {name!r}"
    if family == "cifar":
        if rest not in CIFAR_NETS:
            raise UserError(f"{what} is not known; of cifar/ there are {', '.join(CIFAR_NETS)}")
        return CIFAR_NETS[rest](classes)
    makers = {"torchvision": ("torchvision.models", "get_model"), "timm": ("timm", "create_model")}
    if family not in makers:
        raise UserError(
            f"{what} is not known; write cifar/, torchvision/ or timm/ and a model's name"
        )
    module, function = makers[family]
    try:
        # Neither is needed unless it is named.
        make = getattr(importlib.import_module(module), function)
        net: nn.Module = make(rest, num_classes=classes)
    except ImportError as e:
        raise UserError(f"{what} needs {e.name}; install it") from e
    except (RuntimeError, ValueError, TypeError) as e:
        # What get_model and create_model raise for a name that they do not know.
        raise UserError(f"{what} cannot be built: {reason(e)}") from e
    return net


class _Level(NamedTuple):
    """Where a level comes from: a module, and which of its calls."""

    module: str
    call: int
    shape: ShapeSpec


class ClassifierNet(Backbone):
    """A network whose maps can be read, whoever wrote it.

    Its levels are found by a forward of one blank image: of each resolution the last map that its
    parts give, which are its children and those of sequences. They are called by their stride,
    ``stride4``, ``stride8``, ...; a network without maps has none but its logits.

    Args:
        net: images (B, 3, H, W) -> logits (B, K). It keeps its weights.
        image_size: height and width of the images that it is made for.
    """

    def __init__(self, net: nn.Module, image_size: int) -> None:
        super().__init__()
        self.net = net
        self._levels = _find_levels(net, image_size)
        modules = dict(net.named_modules())
        self._recorder = Recorder({k: modules[x.module] for k, x in self._levels.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Level -> (B, C, H, W), and ``logits`` -> (B, K)."""
        with self._recorder.recording() as record:
            logits = self.net(x)
            maps = {k: record[k][x.call].output for k, x in self._levels.items()}
        if not isinstance(logits, Tensor):
            raise UserError(
                f"{type(self.net).__name__} has auxiliary classifiers in training, which are not "
                "supported; change MODEL.CLASSIFIER.NAME"
            )
        return {**maps, "logits": logits}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {level: x.shape for level, x in self._levels.items()}


def _outer_modules(net: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What a network is made of: its children, and those of sequences of modules."""
    for name, module in net.named_children():
        # What they average is made larger again where images are small.
        if not isinstance(module, nn.AdaptiveAvgPool2d):
            yield prefix + name, module
        if isinstance(module, nn.Sequential):
            yield from _outer_modules(module, f"{prefix}{name}.")


def _find_levels(net: nn.Module, size: int) -> dict[str, _Level]:
    seen: list[tuple[str, int, Tensor]] = []

    def watch(name: str) -> Callable[..., None]:
        calls = itertools.count()

        def look(module: nn.Module, args: Any, output: Any) -> None:
            call = next(calls)
            if isinstance(output, Tensor) and output.dim() == 4:
                seen.append((name, call, output))

        return look

    hooks = [m.register_forward_hook(watch(name)) for name, m in _outer_modules(net)]
    training = {m: m.training for m in net.modules()}
    blank = torch.zeros(1, 3, size, size)
    try:
        with torch.no_grad():
            net.eval()(blank)
    except Exception as e:
        # Whatever a network makes of a size that it cannot take.
        raise UserError(
            f"the classifier cannot take images of {size} x {size}: {reason(e)}; change "
            "MODEL.CLASSIFIER.IMAGE_SIZE or NAME"
        ) from e
    finally:
        for hook in hooks:
            hook.remove()
        for m, was in training.items():
            m.training = was
    found: dict[int, _Level] = {}
    for name, call, x in seen:
        _, channels, height, width = x.shape
        # A single cell is no map, some networks hold (B, H, W, C), and attention is square as well.
        if x is blank or height != width or height < 2:
            continue
        stride = 2 ** max(0, round(math.log2(size / height)))
        # Without padding a few cells are lost on the way.
        if abs(size / stride - height) <= _LOST:
            # The last one; a sequence gives what its last module gave, after it.
            shape = ShapeSpec(channels=channels, height=height, stride=stride)
            found[stride] = _Level(name, call, shape)
    return {f"stride{x}": found[x] for x in sorted(found)}


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """A classifier with Detectron2's contract; its checkpoints are those of its network.

    Tensors have the names that they have in torchvision or timm: torchvision's files load here, and
    ours there.

    Args:
        net: see :class:`ClassifierNet`.
        num_classes: of its logits.
        image_size: see :class:`ClassifierNet`.
        pixel_mean, pixel_std: of each channel, in units of the images (0 to 255).
        label_smoothing: of the cross entropy.
    """

    @configurable
    def __init__(
        self,
        *,
        net: nn.Module,
        num_classes: int,
        image_size: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.backbone = ClassifierNet(net, image_size)
        self.num_classes = num_classes
        self.image_size = image_size
        self.label_smoothing = label_smoothing
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        hide_prefix(self, "backbone.net.", besides="distill.")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.CLASSIFIER
        return {
            "net": build_net(node.NAME, node.NUM_CLASSES),
            "num_classes": node.NUM_CLASSES,
            "image_size": node.IMAGE_SIZE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "label_smoothing": node.LABEL_SMOOTHING,
        }

    def __getattr__(self, name: str) -> Any:
        # Whoever reads its state looks for the tensors where that says they are.
        try:
            return super().__getattr__(name)
        except AttributeError:
            backbone = self.__dict__.get("_modules", {}).get("backbone")
            if backbone is None:
                raise
            return getattr(backbone.net, name)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        device: torch.device = self.pixel_mean.device
        return device

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """The normalised batch.

        Raises:
            UserError: images of several sizes.
        """
        images = [x["image"].to(self.device) for x in batched_inputs]
        sizes = {tuple(x.shape[-2:]) for x in images}
        if len(sizes) > 1:
            raise UserError(
                f"a classifier takes images of one size, and a batch has {sorted(sizes)}: set "
                "INPUT.CLASSIFICATION.AUGMENTATION to one that crops, or resize the dataset"
            )
        mean: Any = self.pixel_mean
        return ImageList.from_tensors([(x - mean) / self.pixel_std for x in images])

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Detectron2's contract.

        Args:
            batched_inputs: ``image`` (3, H, W), and in training ``label``, the index of its class.

        Returns:
            in training ``loss_cls``; in inference for each image ``scores`` (K,), which sum to 1.
        """
        logits = self.backbone(self.preprocess_image(batched_inputs).tensor)["logits"]
        if not self.training:
            return [{"scores": x} for x in logits.float().softmax(-1)]
        labels = torch.tensor([x["label"] for x in batched_inputs], device=logits.device)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        return {"loss_cls": loss}
