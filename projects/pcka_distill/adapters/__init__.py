"""Detector families: where to read a detector, found by its class."""

from pcka_distill.adapters.base import Adapter, find_adapter, prepare_alike, register_adapter
from pcka_distill.adapters.classifier import ClassifierAdapter
from pcka_distill.adapters.dense import DenseAdapter
from pcka_distill.adapters.rcnn import RCNNAdapter
from pcka_distill.adapters.sem_seg import SemSegAdapter

__all__ = [
    "Adapter",
    "ClassifierAdapter",
    "DenseAdapter",
    "RCNNAdapter",
    "SemSegAdapter",
    "find_adapter",
    "prepare_alike",
    "register_adapter",
]
