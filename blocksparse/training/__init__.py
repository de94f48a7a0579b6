"""Training: data, networks, the training step, and what helps a network through pruning."""

from blocksparse.training.batchnorm import BatchNormReestimation, reestimate
from blocksparse.training.data import Cifar10, Cifar100, Digits, Fake, ImageData, ImageFolder
from blocksparse.training.distillation import Distillation, Ensemble
from blocksparse.training.models import build_model, model_names
from blocksparse.training.module import Classifier
from blocksparse.training.optimization import Optimization
from blocksparse.training.resnet_cifar import ResNetCifar
from blocksparse.training.sparsity_callback import SparsityCallback
from blocksparse.training.weights import WeightsError, load_weights, read_weights

__all__ = [
    "BatchNormReestimation",
    "Cifar10",
    "Cifar100",
    "Classifier",
    "Digits",
    "Distillation",
    "Ensemble",
    "Fake",
    "ImageData",
    "ImageFolder",
    "Optimization",
    "ResNetCifar",
    "SparsityCallback",
    "WeightsError",
    "build_model",
    "load_weights",
    "model_names",
    "read_weights",
    "reestimate",
]
