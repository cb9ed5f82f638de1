"""EfficientNetV2B0 on ImageNet, taught by a larger model, to be better than it is alone.

    python main.py --config=configs/imagenet_distill.py --config.dataset.data_dir=gs://BUCKET/DATA

Costs      500 epochs, as configs/imagenet_strong.py, and the forward pass of the teacher: 15.4 G
           multiply-adds an image, where the student's whole step is about 2.2. 350 MB of weights
           are downloaded once.
Reaches    not known for this pair. Beyer et al. (2022) taught a ResNet-50 like this to 82.8 %, in
           9,600 epochs; alone it has 76 to 80 %.
Measured   not yet; benchmarks/transfer.py has a small pair.
"""

from ml_collections import ConfigDict

from configs import imagenet_strong


def get_config() -> ConfigDict:
    config = imagenet_strong.get_config()
    # 85.8 % at 224 pixels (Liu et al. 2022), the size that the student sees.
    config.distill.teacher = 'ConvNeXtBase'
    # The teacher's answers alone: a label says nothing about a crop that misses its object.
    config.distill.alpha = 1.0
    config.label_smoothing = 0.0
    # "Patient and consistent" teaching: crops, flips and mixtures, which the teacher sees too.
    config.augment.policy.name = ''
    config.augment.mixup = 1.0
    return config
