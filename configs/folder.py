"""Your own images, in a folder for each class: DIR/CLASS/*.jpg, or DIR/train/CLASS/*.jpg.

    python main.py --config=configs/folder.py --config.dataset.data_dir=DIR

Classes and counts are detected, and so is DIR/test/CLASS/*.jpg. Without it a fifth of each class is
held out for evaluation; config.dataset.split_seed says which images. JPEG, PNG, GIF (first frame),
BMP, WebP, TIFF, AVIF, JPEG 2000 and PPM files are read (HEIC with the extra `heif`), in any colour
mode and rotated as EXIF says; transparent parts become white. Cameras and scanners that store 10,
12 or 14 bits in 16 need config.dataset.white_level=1023, 4095 or 16383. Broken files are skipped
and named in report.md; more than config.dataset.max_broken of them end the run. For few images
start from pretrained weights instead, with configs/finetune.py.

Costs      50 epochs of the training images; the first start decodes each image once more.
Reaches    depends on the images.
Measured   not yet; tests/test_train.py and tests/inputs/test_image_folder.py train on synthetic
folders.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
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
