"""Telling torch.ao's and torchao's classes from others, without importing either."""

from __future__ import annotations


def is_stock(cls: type) -> bool:
    """Whether a class is defined in torch.ao or torchao."""
    return cls.__module__.startswith(("torch.ao.", "torchao."))
