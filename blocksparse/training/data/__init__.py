"""Images to train on, as Lightning data modules."""

from blocksparse.training.data.base import ImageData
from blocksparse.training.data.cifar import Cifar10, Cifar100
from blocksparse.training.data.digits import Digits
from blocksparse.training.data.fake import Fake
from blocksparse.training.data.image_folder import ImageFolder
from blocksparse.training.data.loader import EpochLoader

__all__ = ["Cifar10", "Cifar100", "Digits", "EpochLoader", "Fake", "ImageData", "ImageFolder"]
