"""One's own pictures: DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg (.jpeg and .png as well).

    python main.py --config=configs/folder.py --config.dataset.data_dir=DIR

Classes and counts are found. For few pictures start from pretrained weights instead, with configs/finetune.py.

Costs      50 epochs of what is in DIR/train.
Reaches    depends on the pictures.
Measured   not yet; a made-up folder is trained on in tests/test_train.py.
"""
from configs import default


def get_config():
    config = default.get_config()
    config.dataset.name = 'folder'
    config.image_size = 224
    config.eval_crop = 0.875

    config.batch_size = 64
    config.eval_batch_size = 64
    config.train_for = '50 epochs'

    config.schedule.start_lr = 1e-5
    config.weight_decay = 0.05
    config.label_smoothing = 0.1
    config.ema_decay = 0.99
    config.model.drop_path = 0.1

    config.augment.crop = 'random'
    config.augment.crop_area = (0.25, 1.0)
    config.augment.flip = True
    return config
