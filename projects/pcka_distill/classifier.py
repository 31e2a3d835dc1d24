"""Image classifiers as Detectron2 models: of torchvision, timm, or those of CIFAR."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

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


class ClassifierNet(Backbone):
    """A network whose maps can be read, whoever wrote it.

    Its levels are found by a forward of one blank image: of each resolution the last map that one
    of its outermost modules gives. They are called by their stride, ``stride4``, ``stride8``, ...;
    a network without maps, such as a vision transformer, has none but its logits.

    Args:
        net: images (B, 3, H, W) -> logits (B, K). It keeps its weights.
        image_size: height and width of the images that it is made for.
    """

    def __init__(self, net: nn.Module, image_size: int) -> None:
        super().__init__()
        self.net = net
        self._levels = _find_levels(net, image_size)
        modules = dict(net.named_modules())
        self._recorder = Recorder({k: modules[name] for k, (name, _) in self._levels.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Level -> (B, C, H, W), and ``logits`` -> (B, K)."""
        with self._recorder.recording() as record:
            logits = self.net(x)
            maps = {level: calls[-1].output for level, calls in record.items()}
        if not isinstance(logits, Tensor):
            # Inception and GoogLeNet have auxiliary classifiers in training.
            logits = logits[0]
        return {**maps, "logits": logits}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {level: shape for level, (_, shape) in self._levels.items()}


def _find_levels(net: nn.Module, size: int) -> dict[str, tuple[str, ShapeSpec]]:
    """Level -> the module that gives it, and its shape."""
    seen: list[tuple[str, tuple[int, ...]]] = []

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4 and name:
                seen.append((name, tuple(output.shape)))

        return look

    hooks = [m.register_forward_hook(watch(name)) for name, m in net.named_modules()]
    training = {m: m.training for m in net.modules()}
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, 3, size, size))
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
    found: dict[int, tuple[str, ShapeSpec]] = {}
    for name, (_, channels, height, width) in seen:
        # A single cell is no map, some networks hold (B, H, W, C), and attention is square as well.
        if height != width or height < 2:
            continue
        stride = 2 ** max(0, round(math.log2(size / height)))
        # Without padding a few cells are lost on the way.
        if abs(size / stride - height) > _LOST:
            continue
        known = found.get(stride)
        if known is None or name.count(".") <= known[0].count("."):
            found[stride] = name, ShapeSpec(channels=channels, height=height, stride=stride)
    return {f"stride{x}": found[x] for x in sorted(found)}


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """A classifier with Detectron2's contract; its checkpoints are those of its network.

    Tensors have the names that they have in torchvision or timm, so that their files load here and
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
        hide_prefix(self, "backbone.net.")

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

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        device: torch.device = self.pixel_mean.device  # type: ignore[assignment]
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
