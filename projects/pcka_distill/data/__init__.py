"""Datasets: the digits, which need no download, and those of classification."""

from pcka_distill.data.classification import register_classification, register_image_folder
from pcka_distill.data.digits import register_digits

__all__ = ["register_classification", "register_digits", "register_image_folder"]
