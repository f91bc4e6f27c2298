"""The projected discriminator on frozen DINOv2 features (App. C.1)."""

from .heads import DiscriminatorHeads as DiscriminatorHeads
from .model import Discriminator as Discriminator
