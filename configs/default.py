"""Every key of a config, with its default and its reason. The other files are small changes to this one.

Durations are one string with a unit: '90 epochs', '500 steps', '1_281_167 examples' or '5%' (of the run);
`checkpoint_every` may also be '10 minutes'. `experiment/planning.py` turns them into steps.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0

    config.dataset = ConfigDict()
    config.dataset.name = (
        'digits'  # a TFDS name, 'digits' (embedded), or 'folder' (see inputs/image_folder.py)
    )
    config.dataset.data_dir = ''  # '': TFDS's own default, $TFDS_DATA_DIR or ~/tensorflow_datasets
    config.dataset.train_split = (
        'train'  # a TFDS split: 'train', 'train[:90%]', ...; for a folder, a subfolder
    )
    config.dataset.eval_split = 'test'
    config.dataset.image_key = ''  # of a TFDS data set: the feature that is the image, such as 'photo' or 'views/front'; '': found
    config.dataset.label_key = ''  # and the one that is the class label
    config.dataset.eval_share = (
        0.2  # of a folder without such a subfolder: so much of each class is held out
    )
    config.dataset.split_seed = (
        0  # which pictures that is: not config.seed, so runs of several seeds compare
    )
    config.dataset.max_broken = (
        0.01  # of a folder: a larger share of files that cannot be used ends the run
    )
    config.dataset.white_level = (
        65535  # the value of white in images of 16 bits; 4095 where a camera used 12 of them
    )
    config.dataset.memory_gib = (
        4.0  # of host memory for encoded pictures and batches that are read ahead
    )
    config.dataset.service = ''  # 'HOST:PORT,HOST:PORT' of tf.data services that prepare the training pictures: see inputs/service.py
    config.image_size = 224  # pixels, height and width of what the model sees

    config.batch_size = 128  # global: over all replicas of all hosts
    config.accumulate_steps = 1  # > 1: in so many parts, one after the other, for less memory; batch normalisation sees a part
    config.eval_batch_size = 128
    config.train_for = '10 epochs'

    config.schedule = ConfigDict()
    config.schedule.name = 'cosine'  # the curve after warmup and hold: see schedules.CURVES
    config.schedule.peak_lr = 1e-3
    config.schedule.start_lr = 1e-5  # above 0: a first update with rate 0 would be wasted
    config.schedule.end_lr = 0.0
    config.schedule.warmup = (
        '5%'  # the article's rule of thumb: 5 % of the run, then hold for half of that
    )
    config.schedule.hold = '2.5%'
    # Any other key here is an argument of the curve, for example config.schedule.power = 2.0 for 'polynomial'.

    config.optimizer = ConfigDict()
    config.optimizer.name = (
        'adamw'  # see modeling/optimizers.py; 'muon' needs Python 3.11 (Keras 3.13)
    )
    # Any other key here is an argument of the Keras optimizer, for example config.optimizer.beta_2 = 0.99.
    config.weight_decay = (
        0.0  # decoupled, scaled by the rate (Keras' meaning); never on biases and normalisation
    )
    config.l2_regularization = 0.0  # added to the gradient: `l2 * weight`; same mask
    config.label_smoothing = 0.0
    config.ema_decay = 0.0  # > 0: an average of the weights is kept, evaluated and exported
    config.grad_clip_norm = 0.0  # > 0: the global norm of the summed gradient is clipped to this

    config.model = ConfigDict()
    config.model.name = 'EfficientNetV2B0'  # a name of keras.applications, or 'tiny'
    config.model.weights = ''  # '': random; 'imagenet': keras.applications', with a new head; or a run, checkpoint or SavedModel of yours
    config.model.freeze = ''  # 'backbone': only the head is trained; or up to where it is not: a layer or a block, such as 'block4'
    config.model.layer_decay = 1.0  # < 1: the rate of a block is this times that of the block after it; the head's is the schedule's
    config.model.dropout = 0.2  # before the head
    config.model.drop_path = 0.0  # of the last residual block; grows linearly from 0 at the first
    config.model.sync_batch_norm = (
        True  # statistics over the global batch: the same run on any number of replicas
    )

    config.distill = ConfigDict()
    config.distill.teacher = ''  # a run or SavedModel that knows the same classes, or on ImageNet a name of keras.applications
    config.distill.weights = (
        'imagenet'  # of a teacher of keras.applications; or a file of its weights
    )
    config.distill.alpha = (
        0.5  # share of the loss that the teacher makes; 1: labels count for nothing
    )
    config.distill.temperature = 1.0  # above 1: the teacher's small probabilities count for more

    config.augment = ConfigDict()
    config.augment.crop = 'center'  # 'center': as evaluation does; 'random': random resized crop
    config.augment.crop_area = (0.08, 1.0)  # share of the picture that a random crop covers
    config.augment.flip = False  # left-right, with probability 1/2
    config.augment.translate = 0.0  # at most this share of the size, both ways
    config.augment.rotate = 0.0  # at most this share of a full turn, both ways
    config.augment.zoom = 0.0  # at most this share, both ways
    config.augment.repeats = 1  # > 1: each example so often in its batch; an epoch then shows fewer of them, not more pictures
    config.augment.policy = ConfigDict()
    config.augment.policy.name = ''  # '', 'rand_augment' or 'trivial_augment'
    config.augment.policy.num_ops = 2  # of rand_augment
    config.augment.policy.magnitude = (
        10.0  # of rand_augment: 10 is what inputs/augment.py says in RANGES
    )
    config.augment.policy.rate = 1.0  # probability that a picture is changed at all
    config.augment.color_jitter = (
        0.0  # brightness, contrast and saturation: at most this share, both ways
    )
    config.augment.random_erasing = 0.0  # probability
    config.augment.mixup = 0.0  # alpha of Beta(alpha, alpha); 0: off
    config.augment.cutmix = 0.0  # alpha; with both, each pair takes one of the two by a coin
    config.eval_crop = (
        1.0  # side of the central square that is evaluated, as share of the shorter side
    )

    config.progressive = ConfigDict()
    config.progressive.stages = (
        1  # > 1: picture size and augmentation grow in so many equal parts of the run
    )
    config.progressive.image_size = 128  # of the first stage; of the last it is config.image_size
    config.progressive.strength = 0.33  # of the first stage: share of dropout, policy.magnitude, color_jitter, mixup and cutmix

    config.precision = (
        'auto'  # auto | float32 | bfloat16 | float16 | float64 (to compare runs without rounding)
    )
    config.jit_compile = 'auto'  # auto | true | false: XLA for forward and backward
    config.strategy = 'auto'  # auto | tpu | multi_worker | mirrored | one_device
    config.virtual_devices = (
        0  # CPU only: split the processor into this many devices, to try a strategy
    )
    config.tpu = 'local'  # 'local' (Colab, Kaggle, TPU VM) or the name of a TPU
    config.steps_per_loop = 20  # steps per host call

    config.log_every = '1%'
    config.eval_every = '10%'
    config.checkpoint_every = '10 minutes'
    config.keep_checkpoints = 2  # the last ones; the best stays beside them
    config.best_metric = (
        'eval/accuracy'  # what makes an evaluation the best: eval/accuracy | eval/top5 | eval/loss
    )
    config.patience = ''  # such as '10 epochs': the run ends when no evaluation was better for so long; the schedule stays that of train_for
    config.max_skipped_updates = 20  # in a row, because their loss or gradient is not finite, end the run; float16 needs 15 to
    # find its scale. 0: nothing is skipped, the run ends at once; a step of EfficientNetV2B0 takes 0.8 % less on a TPU (docs/tpu.md)
    return config
