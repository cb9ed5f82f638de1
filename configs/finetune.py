r"""Pretrained EfficientNetV2B0 with a new head, for 102 kinds of flowers: 330 MB + 24 MB downloads.

    python main.py --config=configs/finetune.py
    python main.py --config=configs/finetune.py --config.dataset.name=folder \
        --config.dataset.data_dir=DIR \
        --config.dataset.train_split=train --config.dataset.eval_split=test

From a run of your own: --config.model.weights=runs/NAME. With very few images:
--config.model.freeze=backbone, and a peak_lr ten times as high.

Costs      30 epochs x 2,040 images at 224 pixels.
Reaches    not known.
Measured   not yet.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.dataset.name = 'oxford_flowers102'
    config.dataset.train_split = 'train+validation'
    config.image_size = 224
    config.eval_crop = 0.875
    config.model.weights = 'imagenet'

    config.batch_size = 64
    config.eval_batch_size = 64
    config.train_for = '30 epochs'  # 30 x 2,040 / 64 = 956 steps

    # A few times below that of training from scratch, so that the weights stay near.
    config.schedule.peak_lr = 3e-4
    config.schedule.start_lr = 3e-6
    config.weight_decay = 0.05
    config.label_smoothing = 0.1
    config.ema_decay = 0.99
    config.model.drop_path = 0.1

    config.augment.crop = 'random'
    config.augment.crop_area = (0.25, 1.0)
    config.augment.flip = True
    return config
