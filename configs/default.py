"""Every key of a config, with its default. The other files are small changes to this one.

docs/config.md has the meaning and the bounds of each key. Durations are one string with a unit:
'90 epochs', '500 steps', '1_281_167 examples' or '5%' (of the run); `checkpoint_every` may also be
'10 minutes'. experiment/planning.py turns them into steps.
"""

from ml_collections import ConfigDict, FieldReference


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0

    config.dataset = ConfigDict()
    config.dataset.name = 'digits'  # a TFDS name, 'digits' (embedded), or 'folder'
    config.dataset.data_dir = (
        ''  # TFDS' folder ('': $TFDS_DATA_DIR or ~/tensorflow_datasets); or your own images
    )
    config.dataset.train_split = 'train'  # a TFDS split; for a folder, a subfolder
    config.dataset.eval_split = 'test'
    # Features of a TFDS data set, such as 'photo' or 'views/front'; '' finds them.
    config.dataset.image_key = ''
    config.dataset.label_key = ''
    # For a folder without an evaluation split: the share of each class that is held out, and the
    # seed that chooses it. It is not config.seed, so that runs with several seeds can be compared.
    config.dataset.eval_share = 0.2
    config.dataset.split_seed = 0
    config.dataset.max_broken = 0.01  # for a folder: a larger share of unusable files ends the run
    config.dataset.white_level = 65535  # of 16-bit images; 4095 if a camera used 12 of the bits
    config.dataset.memory_gib = 4.0  # of host memory, for encoded images and read-ahead batches
    # 'HOST:PORT,HOST:PORT' of tf.data services that prepare training images: inputs/service.py.
    config.dataset.service = ''
    config.image_size = 224  # pixels, height and width of what the model sees

    config.batch_size = 128  # global: over all replicas of all hosts
    # Micro-batches per update (gradient accumulation), or 'auto'. Batch normalisation sees one at a
    # time.
    config.accumulate_steps = FieldReference(1, field_type=object)
    config.eval_batch_size = 128
    config.train_for = '10 epochs'

    # Any other key of `schedule` is an argument of the curve, such as `power` of 'polynomial'.
    config.schedule = ConfigDict()
    config.schedule.name = 'cosine'  # the curve after warmup and hold: see schedules.CURVES
    config.schedule.peak_lr = 1e-3
    config.schedule.start_lr = 1e-5  # above 0: a first update with rate 0 would be wasted
    config.schedule.end_lr = 0.0
    config.schedule.warmup = '5%'  # rule of thumb: 5 % of the run, then hold for half of that
    config.schedule.hold = '2.5%'

    # Any other key of `optimizer` is an argument of the Keras optimizer, such as `beta_2`.
    config.optimizer = ConfigDict()
    config.optimizer.name = 'adamw'  # see modeling/optimizers.py; 'muon' needs Python 3.11
    # Decoupled, scaled by the rate (Keras' meaning); never on biases and normalisation.
    config.weight_decay = 0.0
    config.l2_regularization = 0.0  # adds `l2 * weight` to the gradient, for the same variables
    config.label_smoothing = 0.0
    config.ema_decay = 0.0  # > 0: an average of the weights is kept, evaluated and exported
    config.grad_clip_norm = 0.0  # > 0: the global norm of the summed gradient is clipped to this

    config.model = ConfigDict()
    config.model.name = 'EfficientNetV2B0'  # a name of keras.applications, or 'tiny'
    # '': random; 'imagenet': pretrained, with a new head; or a run, checkpoint or SavedModel.
    config.model.weights = ''
    # 'backbone': only the head is trained; or the last frozen layer or block, such as 'block4'.
    config.model.freeze = ''
    # < 1: each block's learning rate is this times the next block's; the head has the full rate.
    config.model.layer_decay = 1.0
    config.model.dropout = 0.2  # before the head
    # The rate of the last residual block; it grows linearly from 0 at the first.
    config.model.drop_path = 0.0
    # Statistics over the global batch: the same run on any number of replicas.
    config.model.sync_batch_norm = True

    config.distill = ConfigDict()
    # A run or SavedModel of the same classes, or on ImageNet a name of keras.applications.
    config.distill.teacher = ''
    config.distill.weights = 'imagenet'  # for a teacher of keras.applications; or a weights file
    config.distill.alpha = 0.5  # the teacher's share of the loss; 1: labels are ignored
    config.distill.temperature = 1.0  # > 1: small probabilities of the teacher count for more

    config.augment = ConfigDict()
    config.augment.crop = 'center'  # 'center': as in evaluation; 'random': random resized crop
    config.augment.crop_area = (0.08, 1.0)  # share of the image that a random crop covers
    config.augment.flip = False  # left-right, with probability 1/2
    config.augment.translate = 0.0  # at most this share of the size, in either direction
    config.augment.rotate = 0.0  # at most this share of a full turn, in either direction
    config.augment.zoom = 0.0  # at most this share, in either direction
    # Copies of each example per batch (repeated augmentation). An epoch has as many images as
    # before, so it shows fewer different ones.
    config.augment.repeats = 1
    config.augment.policy = ConfigDict()
    config.augment.policy.name = ''  # '', 'rand_augment' or 'trivial_augment'
    config.augment.policy.num_ops = 2  # of rand_augment
    # Of rand_augment: 10 is full strength, FULL_STRENGTH in inputs/augment.py.
    config.augment.policy.magnitude = 10.0
    config.augment.policy.rate = 1.0  # probability that an image is changed at all
    config.augment.color_jitter = 0.0  # brightness, contrast, saturation: at most this share
    config.augment.random_erasing = 0.0  # probability
    config.augment.mixup = 0.0  # alpha of Beta(alpha, alpha); 0: off
    config.augment.cutmix = 0.0  # alpha; with both, a coin flip chooses for each pair
    config.eval_crop = 1.0  # side of the evaluated central square, as a share of the shorter side

    config.progressive = ConfigDict()
    config.progressive.stages = 1  # > 1: equal parts of the run, with growing size and augmentation
    config.progressive.image_size = 128  # of the first stage; the last has config.image_size
    # Of the first stage: share of dropout, policy.magnitude, color_jitter, mixup and cutmix.
    config.progressive.strength = 0.33

    config.precision = 'auto'  # auto | float32 | bfloat16 | float16 | float64 (for comparisons)
    config.jit_compile = 'auto'  # auto | true | false: XLA for forward and backward
    config.strategy = 'auto'  # auto | tpu | pjrt | multi_worker | mirrored | one_device
    config.virtual_devices = 0  # CPU only: split it into this many devices, to try a strategy
    config.tpu = 'local'  # 'local' (Colab, Kaggle, TPU VM) or the name of a TPU
    config.steps_per_loop = 20  # steps per host call

    config.log_every = '1%'
    config.eval_every = '10%'
    config.checkpoint_every = '10 minutes'
    config.keep_checkpoints = 2  # the last ones; the best is kept as well
    config.best_metric = 'eval/accuracy'  # eval/accuracy | eval/top5 | eval/loss
    # Such as '10 epochs': the run ends if no evaluation is better for that long. The schedule
    # remains that of train_for.
    config.patience = ''
    # The run ends after this many updates in a row with a loss or gradient that is not finite;
    # float16 needs 15 to find its scale. 0: nothing is skipped, the run ends at once, and a step of
    # EfficientNetV2B0 takes 0.8 % less on a TPU (docs/tpu.md).
    config.max_skipped_updates = 20
    return config
