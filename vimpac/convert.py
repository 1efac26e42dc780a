"""Weights in and out under one name: `load` and `save` of `vimpac.weights`, `from_authors` of `vimpac.released`."""

from vimpac.released import from_authors
from vimpac.weights import load, save

__all__ = ["from_authors", "load", "save"]
