"""An InternViT checkpoint on its own: features, and nothing that reads or writes text."""

from torch import nn

from ..config import VisionConfig
from .intern_vit import InternViT


class VisionTower(nn.Module):
    """The encoder, under the name it has inside the other models."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = InternViT(config)
