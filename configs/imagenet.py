"""EfficientNetV2B0 on ImageNet: the recipe of the paper (Tan and Le, 2021), sized for a TPU slice.

    python main.py --config=configs/imagenet.py --config.dataset.data_dir=gs://BUCKET/DATA

Costs      350 epochs x 1,281,167 images = 448 million. 8 replicas take 512 images each per step.
           On other hardware lower batch_size, and peak_lr with it: 0.016 for each 256 images.
Reaches    78.7 % in the paper at 224 pixels, with training sizes that grow from 128 to 192, which
this config does not do. Measured   not yet: only the tiny model has been run with it, on a
           synthetic ImageNet (tests/test_imagenet.py).
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.dataset.name = 'imagenet2012'
    config.dataset.eval_split = 'validation'
    config.image_size = 224
    config.eval_crop = 0.875  # 224 of 256, the customary central crop

    config.batch_size = 4096
    config.accumulate_steps = 'auto'  # on a TPU: batch normalisation sees about 128 images at once
    config.eval_batch_size = 1024
    config.train_for = '350 epochs'  # 350 x 1,281,167 / 4096 = 109,474 steps

    config.schedule = {
        'name': 'exponential',
        'peak_lr': 0.016 * 4096 / 256,  # 0.256
        'start_lr': 0.256 / 1563,  # one step of the warmup: 5 x 1,281,167 / 4096 = 1,563 steps
        'end_lr': 0.0,
        'warmup': '5 epochs',
        'hold': '0%',
        # 0.97 every 2.4 epochs, over the 345 after warmup: 0.0125 of the peak.
        'decay': 0.97 ** (345 / 2.4),
    }

    # In Keras' terms: rho is the decay of the squared gradient.
    config.optimizer = {'name': 'rmsprop', 'rho': 0.9, 'momentum': 0.9, 'epsilon': 1e-3}
    config.weight_decay = 0.0
    # The paper's weight decay is L2 in the loss, which RMSProp divides like a gradient.
    config.l2_regularization = 1e-5
    config.label_smoothing = 0.1
    config.ema_decay = 0.9999

    config.model.dropout = 0.2
    config.model.drop_path = 0.2
    # A micro-batch of 128 images is enough; this saves 2 all-reduces per layer and micro-batch.
    config.model.sync_batch_norm = False

    config.augment.crop = 'random'
    config.augment.flip = True
    config.augment.policy.name = 'rand_augment'
    config.augment.policy.magnitude = 15.0

    config.steps_per_loop = 100
    config.log_every = '100 steps'
    config.eval_every = '5 epochs'
    config.checkpoint_every = '10 minutes'
    return config
