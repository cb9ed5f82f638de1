"""EfficientNetV2B0 from scratch on CIFAR-10: 50,000 images of 32x32 pixels, a 162 MB download.

    python main.py --config=configs/cifar10.py

Costs      100 epochs x 50,000 images at 96 pixels: EfficientNetV2 halves its input five times, so
           32 would leave one position.
Reaches    not known.
Measured   not yet.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.dataset.name = 'cifar10'
    config.image_size = 96

    config.batch_size = 512
    config.eval_batch_size = 500
    config.train_for = '100 epochs'  # 100 x 50,000 / 512 = 9,765 steps

    config.schedule.peak_lr = 2e-3
    config.schedule.start_lr = 2e-5
    config.weight_decay = 0.05
    config.label_smoothing = 0.1
    config.ema_decay = 0.999
    config.model.drop_path = 0.1

    config.augment.flip = True
    config.augment.translate = 0.125  # 4 of 32 pixels
    return config
