"""Datasets that need no download."""

from pcka_distill.data.digits import register_digits

__all__ = ["register_digits"]
