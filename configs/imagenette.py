"""EfficientNetV2B0 from scratch on Imagenette: ten easy classes of ImageNet, a 326 MB download.

    python main.py --config=configs/imagenette.py

Costs      100 epochs x 9,469 images at 192 pixels.
Reaches    not known.
Measured   not yet.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.dataset.name = 'imagenette/320px-v2'
    config.dataset.eval_split = 'validation'
    config.image_size = 192
    config.eval_crop = 0.875

    config.batch_size = 256
    config.eval_batch_size = 256
    config.train_for = '100 epochs'  # 100 x 9,469 / 256 = 3,698 steps

    config.schedule.peak_lr = 2e-3
    config.schedule.start_lr = 2e-5
    config.weight_decay = 0.05
    config.label_smoothing = 0.1
    config.ema_decay = 0.999
    config.model.drop_path = 0.1

    config.augment.crop = 'random'
    config.augment.crop_area = (0.25, 1.0)
    config.augment.flip = True
    return config
