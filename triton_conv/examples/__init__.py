"""Small networks, each a lesson about one kind of convolution, to read, to train and to count.

Each one takes `layers`, the namespace that its convolutions come from: `torch.nn`, or one with the same classes. They
run anywhere that those do; the deformable classifier runs our kernel in any case.

    triton-conv cost --model triton_conv.examples:mobilenet --input 1,3,224,224
"""

from .classifiers import Inception, ShuffleUnit, googlenet, mobilenet, shufflenet, vgg16
from .others import (
    AudioStack,
    DeformableClassifier,
    SegmentationHead,
    autoencoder,
    dcgan_generator,
    video_classifier,
)

__all__ = [
    "AudioStack",
    "DeformableClassifier",
    "Inception",
    "SegmentationHead",
    "ShuffleUnit",
    "autoencoder",
    "dcgan_generator",
    "googlenet",
    "mobilenet",
    "shufflenet",
    "vgg16",
    "video_classifier",
]
