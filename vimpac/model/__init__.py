"""Backbone, heads, layouts and positions."""

from vimpac.model.backbone import Backbone
from vimpac.model.heads import ContrastiveHead, TokenHead
from vimpac.model.models import ClassificationModel, PretrainModel

__all__ = ["Backbone", "ClassificationModel", "ContrastiveHead", "PretrainModel", "TokenHead"]
