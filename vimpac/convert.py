"""Reading and writing weights: `load` and `save` of `vimpac.weights`, `from_authors` of `vimpac.released`."""

from vimpac.released import from_authors
from vimpac.weights import load, save

__all__ = ["from_authors", "load", "save"]
