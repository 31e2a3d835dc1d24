"""Datasets that are registered once, and again only where they are wanted somewhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

__all__ = ["register"]


def register(
    name: str, load: Callable[[], list[dict[str, Any]]], *, anew: bool, **metadata: Any
) -> None:
    """Register a dataset.

    Args:
        name: of the dataset.
        load: gives its records, when they are needed.
        anew: take the place of one of that name, which is left alone otherwise.
        metadata: of Detectron2's catalogue.
    """
    if name in DatasetCatalog:
        if not anew:
            return
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**metadata)
