"""What a model begins with and whom it learns from: weights, frozen layers, rates by layer, a
teacher.
"""

import os
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import special

import train
from benchmarks.same_step import without_batch
from common.errors import ConfigError, RunError
from common.storage import read, read_json
from diagnostics import tensorflow_checks
from experiment import planning
from experiment import session as sessions
from inputs import image_ops
from modeling import distillation, loops, models, optimizers, pretrained, steps
from outputs.checkpoints import find_checkpoint
from tests.conftest import refused, slow, tiny_config

IMAGES = np.random.RandomState(0).randint(0, 256, (32, 16, 16, 3)).astype(np.uint8)
LABELS = np.random.RandomState(1).randint(0, 10, 32)
NAMES = [str(digit) for digit in range(10)]


def no_change(images, labels, draws):
    return tf.cast(images, tf.float32), tf.one_hot(labels, 10)


def devices(count):
    return (
        tf.distribute.MirroredStrategy(
            [f'CPU:{index}' for index in range(count)], tf.distribute.ReductionToOneDevice()
        )
        if count > 1
        else tf.distribute.OneDeviceStrategy('CPU:0')
    )


def updates(config, number=3, count=1, jit_compile=False, dtype_policy='float64'):
    """(evaluated weights before, and after, losses) of some updates on one batch, on `count`
    devices.
    """
    keras.config.set_dtype_policy(dtype_policy)
    strategy = devices(count)
    with strategy.scope():
        sessions.random.seed(0)
        plan = planning.make_plan(config, 1437, 360, 10, count)
        state = sessions.build_state(models.build_model(config, 10), config, plan, dtype_policy)
        teacher = distillation.make_teacher(config, NAMES)
    loop = loops.make_train_loop(
        strategy,
        steps.make_train_step(
            state,
            config,
            no_change,
            num_classes=10,
            num_replicas=count,
            jit_compile=jit_compile,
            teacher=teacher.predict if teacher else None,
        ),
    )
    batches = iter(
        strategy.distribute_datasets_from_function(
            lambda context: (
                tf.data.Dataset.from_tensor_slices((IMAGES, LABELS))
                .map(lambda image, label: (image, label, {}))
                .batch(32 // count)
                .repeat()
            )
        )
    )

    def evaluated():
        return {
            variable.path: value.numpy()
            for variable, value in zip(
                models.float_variables(state.model), steps.evaluated_weights(state), strict=True
            )
        }

    before = evaluated()
    losses = [float(loop(batches, tf.constant(1))['loss']) for _ in range(number)]
    return before, evaluated(), losses


@pytest.fixture(scope='module')
def digits_run(tmp_path_factory):
    """A finished run of the tiny model, with averages, a best checkpoint and a SavedModel."""
    keras.config.set_dtype_policy('float32')
    workdir = str(tmp_path_factory.mktemp('teacher') / 'run')
    assert train.run(tiny_config(), workdir) == 0
    return workdir


def averages_in(workdir):
    """What evaluation of a run uses, in the order of the model, read by TensorFlow's own listing of
    a checkpoint.
    """
    path = os.path.join(workdir, 'checkpoints', 'step-30', 'variables')
    names = [name for name, _ in tf.train.list_variables(path) if name.startswith('average/')]
    return [
        tf.train.load_variable(path, name)
        for name in sorted(names, key=lambda name: int(name.split('/')[1]))
    ]


@pytest.mark.parametrize(
    'part',
    ['', 'checkpoints', 'checkpoints/step-30', 'checkpoints/step-30/variables.index', 'export'],
)
def test_run_checkpoint_and_saved_model_give_evaluated_weights(digits_run, tiny, part):
    tiny.model.weights = os.path.join(digits_run, part)
    model = models.build_model(tiny, 10)
    said = pretrained.load_weights(model, tiny, NAMES, find_checkpoint)
    for ours, theirs in zip(models.float_variables(model), averages_in(digits_run), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert said.startswith('12 of 12 variables (5,562 parameters) from ') and said.endswith(
        '; the head too'
    )


def test_the_best_checkpoint_can_be_taken(digits_run, tiny):
    tiny.model.weights = os.path.join(digits_run, 'checkpoints', 'best')
    model = models.build_model(tiny, 10)
    best = read_json(os.path.join(digits_run, 'summary.json'))['best/step']
    assert f'/checkpoints/step-{best};' in pretrained.load_weights(
        model, tiny, NAMES, find_checkpoint
    )


@pytest.mark.parametrize('part', ['checkpoints', 'export'])
def test_a_head_of_which_nothing_says_what_it_knows_is_not_taken(digits_run, tiny, tmp_path, part):
    shutil.copytree(os.path.join(digits_run, part), tmp_path / part)
    if part == 'export':
        os.remove(tmp_path / part / 'labels.txt')
    tiny.model.weights = str(tmp_path / part)
    assert 'the head is new, 32 features to 10 classes' in pretrained.load_weights(
        models.build_model(tiny, 10), tiny, NAMES, find_checkpoint
    )


@pytest.mark.parametrize('part', ['', 'export'])
@pytest.mark.parametrize('names', [NAMES[::-1], NAMES[:7]])
def test_a_head_of_other_classes_is_new(digits_run, tiny, part, names):
    tiny.model.weights = os.path.join(digits_run, part)
    model = models.build_model(tiny, len(names))
    fresh = model.get_layer('predictions').kernel.numpy()
    said = pretrained.load_weights(model, tiny, names, find_checkpoint)
    for ours, theirs in zip(
        models.float_variables(model)[:-2], averages_in(digits_run), strict=False
    ):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(model.get_layer('predictions').kernel, fresh)
    assert said.startswith('10 of 12 variables (5,232 parameters)')
    assert f'; the head is new, 32 features to {len(names)} classes: ' in said


def test_keras_applications_weights_are_taken_without_the_head(tmp_path, tiny):
    theirs = keras.applications.MobileNetV2(
        include_top=False, weights=None, input_shape=(32, 32, 3), pooling='avg'
    )
    tiny.model.name = 'MobileNetV2'
    tiny.model.weights = str(tmp_path / 'backbone.weights.h5')
    tiny.image_size = 32
    theirs.save_weights(tiny.model.weights)
    model = models.build_model(tiny, 7)
    assert 'the head is new, 1,280 features to 7 classes' in pretrained.load_weights(
        model, tiny, NAMES[:7], find_checkpoint
    )
    for ours, original in zip(
        models.float_variables(model), models.float_variables(theirs), strict=False
    ):
        np.testing.assert_array_equal(ours, original)


def without_labels(workdir, tmp_path):
    copy = str(tmp_path / 'unlabelled')
    shutil.copytree(os.path.join(workdir, 'export'), copy)
    with open(os.path.join(copy, 'labels.txt'), 'wb') as file:
        file.write(b'\xd0\xff\n')
    return copy


def damaged(workdir, tmp_path):
    copy = str(tmp_path / 'damaged')
    shutil.copytree(os.path.join(workdir, 'checkpoints'), copy)
    path = os.path.join(copy, 'step-30', 'variables.index')
    with open(path, 'r+b') as file:
        file.truncate(os.path.getsize(path) // 2)
    return copy


@pytest.mark.parametrize(
    'weights, name, data, fix',
    [
        ('{run}/nothing', 'tiny', "nothing'", "write 'imagenet'"),
        ('{run}', 'MobileNetV2', 'it has 12 variables, and this one 262', 'model.name'),
        ('{tmp}', 'tiny', 'holds no weights', "write 'imagenet'"),
        ('Imagenet', 'tiny', "'Imagenet'", 'did you mean imagenet?'),
        ('{damaged}', 'tiny', 'damaged', ''),
        ('{unlabelled}', 'tiny', 'labels.txt', ''),
        ('{foreign}', 'tiny', 'foreign', ''),
        ('/no/such/file.h5', 'MobileNetV2', '/no/such/file.h5', ''),
        ('imagenet', 'tiny', "'tiny'", ''),
    ],
)
def test_weights_that_cannot_be_taken_are_one_line(
    digits_run, tiny, tmp_path, weights, name, data, fix
):
    foreign = tf.train.Checkpoint(something=tf.Variable(1.0)).write(str(tmp_path / 'foreign'))
    tiny.model.name, tiny.image_size = name, 32
    tiny.model.weights = weights.format(
        run=digits_run,
        tmp=tmp_path,
        damaged=damaged(digits_run, tmp_path),
        foreign=foreign,
        unlabelled=without_labels(digits_run, tmp_path),
    )
    model = models.build_model(tiny, 10)
    with refused((RunError, ConfigError), data, fix=fix):
        pretrained.load_weights(model, tiny, NAMES, find_checkpoint)


@pytest.mark.slow
def test_a_run_from_other_weights_says_so_and_resumes_without(digits_run, tiny, tmp_path, capsys):
    begun_with = str(tmp_path / 'begun_with')
    shutil.copytree(digits_run, begun_with)
    tiny.model.weights, tiny.train_for, tiny.schedule.peak_lr = begun_with, '6 steps', 1e-6
    tiny.ema_decay = 0.0
    workdir = str(tmp_path / 'run')
    assert train.run(tiny, workdir) == 0
    expected = (
        'weights   12 of 12 variables (5,562 parameters) from '
        f'{begun_with}/checkpoints/step-30; the head too'
    )
    assert expected in capsys.readouterr().out
    # Hardly trained, so it must be about as good as what it began with.
    assert (
        abs(
            read_json(f'{workdir}/summary.json')['eval/accuracy']
            - read_json(f'{begun_with}/summary.json')['eval/accuracy']
        )
        < 0.15
    )
    assert expected in read(os.path.join(workdir, 'report.md')).decode()
    shutil.rmtree(begun_with)
    rows = sessions.open_session(tiny, workdir).describe()
    assert dict(rows)['weights'] == expected.removeprefix('weights').strip()


@pytest.mark.parametrize(
    'frozen, kept',
    [
        ('backbone', ('block1', 'block2')),
        ('top', ('block1', 'block2')),
        ('block1', ('block1',)),
        ('block1_conv', ('block1_conv',)),
        ('stem', ()),
    ],
)
@pytest.mark.parametrize('count, jit_compile, ema_decay', [(1, False, 0.99), slow(2, True, 0.0)])
def test_frozen_layers_stay_as_they_are_with_their_statistics(
    still, frozen, kept, count, jit_compile, ema_decay
):
    still.model.freeze = frozen
    still.weight_decay = 0.1
    still.optimizer = {'name': 'adamw'}
    still.ema_decay = ema_decay
    before, after, _ = updates(still, count=count, jit_compile=jit_compile, dtype_policy='float32')
    for path in before:
        same = np.array_equal(before[path], after[path])
        assert same == any(part in path for part in kept), path


def test_frozen_layers_compute_as_in_evaluation(still):
    still.model.name = 'EfficientNetV2B0'
    still.image_size = 32
    still.model.drop_path = 0.5
    still.model.freeze = 'block6'
    model = models.build_model(still, 10)
    images = IMAGES[:4].repeat(2, 1).repeat(2, 2).astype('float32')
    backbone = models._backbone(model)
    frozen = keras.Model(backbone.input, backbone.get_layer('block6h_add').output)
    np.testing.assert_allclose(
        frozen(images, training=True), frozen(images, training=False), rtol=1e-5, atol=1e-6
    )
    trained = [variable.path for variable in model.trainable_variables]
    assert trained == [
        'top_conv/kernel',
        'top_bn/gamma',
        'top_bn/beta',
        'predictions/kernel',
        'predictions/bias',
    ]


@pytest.mark.parametrize(
    'name, blocks',
    [
        (
            'EfficientNetV2B0',
            [
                'stem',
                'block1a',
                'block2a',
                'block2b',
                'block3a',
                'block3b',
                'block4a',
                'block4b',
                'block4c',
                *(f'block5{letter}' for letter in 'abcde'),
                *(f'block6{letter}' for letter in 'abcdefgh'),
                'top',
            ],
        ),
        (
            'ResNet50',
            [
                'stem',
                *(
                    f'conv{stage}_block{block}'
                    for stage, number in ((2, 3), (3, 4), (4, 6), (5, 3))
                    for block in range(1, number + 1)
                ),
                'top',
            ],
        ),
        slow('ConvNeXtTiny', None),
        ('tiny', ['stem', 'block1', 'block2', 'top']),
    ],
)
def test_blocks_are_those_that_the_layers_are_named_after(still, name, blocks):
    still.model.name, still.image_size = name, 32
    model = models.build_model(still, 10)
    if blocks:
        assert list(dict.fromkeys(models._blocks(models._backbone(model)))) == blocks
    factors = models.layer_lr_multipliers(model, 0.5)
    assert factors[-2:] == [1.0, 1.0] and factors[-3] == 0.5 and factors[0] == min(factors)
    if name == 'EfficientNetV2B0':  # 21 blocks, the stem and the top
        assert factors[0] == 0.5**23


@pytest.mark.parametrize(
    'name',
    # Without Adafactor, whose rate is the smaller one of the schedule's and another.
    [
        'adamw',
        *map(slow, sorted(set(optimizers.OPTIMIZERS) - {'adafactor', 'adamw'})),
    ],
)
def test_the_rate_of_a_block_is_that_of_a_run_with_this_rate(still, name):
    """Every block of a run with layer-wise decay moves as in a run whose whole rate is multiplied
    by its factor.
    """
    still.optimizer = {'name': name}
    still.weight_decay = 0.1
    still.ema_decay = 0.0
    still.schedule.peak_lr = 1e-3
    still.schedule.start_lr = 1e-4
    policy = 'float32' if name == 'muon' else 'float64'
    still.model.layer_decay = 0.5
    before, after, _ = updates(still, number=1, dtype_policy=policy)
    still.model.layer_decay = 1.0
    for factor, block in ((1.0, 'predictions'), (0.5, 'block2'), (0.25, 'block1')):
        still.schedule.peak_lr, still.schedule.start_lr = 1e-3 * factor, 1e-4 * factor
        _, alone, _ = updates(still, number=1, dtype_policy=policy)
        compared = [path for path in before if block in path]
        assert compared
        for path in compared:
            np.testing.assert_allclose(
                after[path], alone[path], rtol=0, atol=1e-10 if policy == 'float64' else 3e-7
            )  # of steps of about 1e-4


@pytest.mark.parametrize(
    'count, jit_compile',
    [(2, False), slow(2, True), slow(4, False)],
)
def test_frozen_layers_and_layer_rates_match_on_several_devices(still, count, jit_compile):
    still.model.freeze, still.model.layer_decay, still.grad_clip_norm = 'block1_conv', 0.5, 0.5
    _, one, losses = updates(still)
    _, several, their_losses = updates(still, count=count, jit_compile=jit_compile)
    np.testing.assert_allclose(losses, their_losses, rtol=1e-6)
    for path in one:
        np.testing.assert_allclose(one[path], several[path], rtol=0, atol=1e-10)


@pytest.mark.parametrize('alpha, temperature', [(0.3, 1.0), (1.0, 4.0)])
@pytest.mark.parametrize('count, jit_compile', [(1, False), slow(2, True)])
def test_the_loss_of_a_taught_model_is_that_of_hinton(
    digits_run, still, alpha, temperature, count, jit_compile
):
    still.distill.teacher = digits_run
    still.distill.alpha = alpha
    still.distill.temperature = temperature
    still.label_smoothing = 0.1
    *_, losses = updates(
        still, number=1, count=count, jit_compile=jit_compile, dtype_policy='float32'
    )
    teacher = tf.saved_model.load(os.path.join(digits_run, 'export'))
    taught = (
        teacher.signatures['logits'](images=tf.cast(IMAGES, tf.float32))['output_0']
        .numpy()
        .astype(np.float64)
    )
    sessions.random.seed(0)
    logits = (
        models.build_model(still, 10)(IMAGES.astype('float32'), training=True)
        .numpy()
        .astype(np.float64)
    )
    targets = 0.9 * np.eye(10)[LABELS] + 0.01
    hard = -(targets * special.log_softmax(logits, -1)).sum(-1).mean()
    wanted = special.softmax(taught / temperature, -1)
    given = special.softmax(logits / temperature, -1)
    soft = special.rel_entr(wanted, given).sum(-1).mean() * temperature**2
    assert losses[0] == pytest.approx((1 - alpha) * hard + alpha * soft, rel=1e-4)


@pytest.mark.slow
def test_a_teacher_matches_on_devices_and_in_micro_batches(digits_run, still, monkeypatch):
    monkeypatch.setattr(models, 'BatchNormalization', without_batch)
    still.distill.teacher, still.distill.alpha = digits_run, 0.7
    _, one, losses = updates(still)
    for count, parts, jit_compile in ((2, 1, False), (2, 4, True), (4, 1, False), (1, 4, False)):
        still.accumulate_steps = parts
        _, other, their_losses = updates(still, count=count, jit_compile=jit_compile)
        np.testing.assert_allclose(
            losses, their_losses, rtol=1e-5
        )  # the teacher computes in float32
        assert max(np.abs(one[path] - other[path]).max() for path in one) < 1e-5


def write_foreign_teacher(path):
    """A SavedModel of somebody else: uint8 images of 8 pixels, probabilities."""

    class Foreign(tf.Module):
        def __init__(self):
            super().__init__()
            self.kernel = tf.Variable(
                np.random.RandomState(3).randn(8 * 8 * 3, 10).astype(np.float32) * 0.02
            )

        @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 3], tf.uint8, name='pictures')])
        def serve(self, pictures):
            flat = tf.reshape(tf.cast(pictures, tf.float32), [-1, 192]) / 255
            return {'probabilities': tf.nn.softmax(flat @ self.kernel)}

    module = Foreign()
    tf.saved_model.save(module, path, signatures={'serving_default': module.serve})
    return module


def test_a_saved_model_of_somebody_else_can_teach(still, tmp_path):
    module = write_foreign_teacher(str(tmp_path / 'foreign'))
    still.distill.teacher = str(tmp_path / 'foreign')
    teacher = distillation.make_teacher(still, NAMES)
    assert not teacher.is_pretrained and teacher.name.endswith(
        'assumed to have the same classes in the same order'
    )
    resized = tf.cast(tf.round(tf.image.resize(IMAGES.astype('float32'), (8, 8))), tf.uint8)
    np.testing.assert_allclose(
        tf.nn.softmax(teacher.predict(tf.cast(IMAGES, tf.float32))),
        module.serve(resized)['probabilities'],
        rtol=1e-4,
    )


@pytest.mark.parametrize('jit_compile', [False, True])
@pytest.mark.parametrize('size', [(8, 8), (11, 5), (16, 7), (7, 20), (16, 16), (30, 40)])
def test_a_fixed_size_teacher_sees_images_resized_as_inputs_are(size, jit_compile):
    images = np.random.RandomState(0).uniform(0, 255, (2, 16, 16, 3)).astype(np.float32)
    resized = tf.function(distillation.resize, jit_compile=jit_compile)(images, size)
    np.testing.assert_allclose(resized, image_ops.resize(images, size), atol=1e-3)


def test_a_smaller_teacher_sees_no_aliasing(still, tmp_path):
    """Dots too fine for it, at 24 pixels: sampled at 8, every third, they would be all there is."""
    module = write_foreign_teacher(str(tmp_path / 'foreign'))
    still.distill.teacher = str(tmp_path / 'foreign')
    teacher = distillation.make_teacher(still, NAMES)
    rows, columns = np.mgrid[:24, :24] % 3 == 1
    dots = np.where(rows & columns, 255.0, 0.0)[None, :, :, None].repeat(3, -1)
    grey = np.full((1, 8, 8, 3), round(255 / 9), np.uint8)
    expected = module.serve(tf.constant(grey))['probabilities']
    answers = tf.nn.softmax(teacher.predict(tf.constant(dots, tf.float32)))
    np.testing.assert_allclose(answers, expected, rtol=1e-4)


@pytest.mark.parametrize(
    'name, module, size',
    [
        ('MobileNetV2', keras.applications.mobilenet_v2, 224),
        slow('MobileNetV3Small', keras.applications.mobilenet_v3, 64),  # of any size
    ],
)
def test_a_model_of_keras_applications_can_teach(still, tmp_path, name, module, size):
    theirs = getattr(keras.applications, name)(weights=None, classes=10, classifier_activation=None)
    still.distill.teacher, still.distill.weights = name, str(tmp_path / 'teacher.weights.h5')
    theirs.save_weights(still.distill.weights)
    teacher = distillation.make_teacher(still, NAMES)
    images = IMAGES[:4].repeat(4, 1).repeat(4, 2).astype('float32')
    expected = theirs(
        module.preprocess_input(tf.image.resize(images, (size, size)).numpy()), training=False
    )
    np.testing.assert_allclose(teacher.predict(tf.constant(images)), expected, rtol=1e-3, atol=1e-4)


def write_odd_teacher(path, inputs):
    """A SavedModel that takes what no image is."""
    module = tf.Module()
    module.serve = tf.function(
        lambda *tensors: tf.zeros([tf.shape(tensors[0])[0], 10]), input_signature=inputs
    )
    tf.saved_model.save(module, path, signatures={'serving_default': module.serve})


@pytest.mark.parametrize(
    'teacher, weights, names, says',
    [
        (
            'ResNet50',
            'imagenet',
            NAMES,
            "ImageNet's 1,000 classes, but this data set has 10",
        ),
        (
            'ResNet5',
            'imagenet',
            NAMES,
            "config.distill.teacher='ResNet5'",
        ),
        ('ResNet50', 'image', NAMES, "config.distill.weights='image'"),
        ('ResNet50', '/no/such/file.h5', NAMES, '/no/such/file.h5'),
        (
            '{tmp}/nothing',
            'imagenet',
            NAMES,
            '/nothing',
        ),
        (
            '{run}',
            'imagenet',
            NAMES[::-1],
            'other classes',
        ),
        (
            '{tmp}/foreign',
            'imagenet',
            NAMES[:3],
            'and give (None, 3), but it takes pictures uint8 (None, 8, 8, 3) and gives '
            'probabilities float32 (None, 10)',
        ),
        ('{tmp}/one', 'imagenet', NAMES, 'but it takes tensors_0 float32 (1, 16, 16, 3) and gives'),
        (
            '{tmp}/channels_first',
            'imagenet',
            NAMES,
            'but it takes tensors_0 float32 (None, 3, 16, 16) and gives',
        ),
        ('{tmp}/files', 'imagenet', NAMES, 'but it takes tensors_0 string (None,) and gives'),
        (
            '{tmp}/broken',
            'imagenet',
            NAMES,
            'no signature serving_default',
        ),
        ('{unlabelled}', 'imagenet', NAMES, 'labels.txt'),
    ],
)
def test_a_teacher_that_cannot_be_had_is_one_line(
    digits_run, still, tmp_path, teacher, weights, names, says
):
    write_foreign_teacher(str(tmp_path / 'foreign'))
    for name, shape, dtype in (
        ('one', [1, 16, 16, 3], tf.float32),
        ('channels_first', [None, 3, 16, 16], tf.float32),
        ('files', [None], tf.string),
    ):
        write_odd_teacher(str(tmp_path / name), [tf.TensorSpec(shape, dtype)])
    shutil.copytree(os.path.join(digits_run, 'export'), tmp_path / 'broken')
    (tmp_path / 'broken' / 'variables' / 'variables.data-00000-of-00001').write_bytes(
        b'this is no model'
    )
    still.distill.teacher = teacher.format(
        run=digits_run, tmp=tmp_path, unlabelled=without_labels(digits_run, tmp_path)
    )
    still.distill.weights = weights
    with refused((ConfigError, RunError), says):
        distillation.make_teacher(still, names)


@pytest.mark.usefixtures('read_here')
@pytest.mark.slow
def test_a_taught_run_is_trained_and_exported_as_any_other(digits_run, tiny, tmp_path, capsys):
    tiny.distill.teacher = digits_run
    tiny.model.weights = digits_run
    tiny.model.freeze = 'block1'
    tiny.model.layer_decay = 0.5
    tiny.train_for = '6 steps'
    workdir = str(tmp_path / 'run')
    assert train.run(tiny, workdir) == 0
    said = capsys.readouterr().out
    assert 'frozen    everything up to block1: 5,002 of 5,562 parameters are trained' in said
    assert (
        'rates     x 1 at the head, down to x 0.5 at the first trained layers' in said
        and f'teacher   {digits_run}/export; 50% of the loss, temperature 1' in said
    )
    summary = read_json(f'{workdir}/summary.json')
    assert summary['export/accuracy'] == summary['eval/accuracy']


def test_a_teacher_costs_one_pass_of_its_own(tmp_path, tiny, digits_run):
    alone = {row.name: row for row in tensorflow_checks.results(tiny, str(tmp_path / 'run'), 0)}[
        'cost'
    ].message
    tiny.distill.teacher = digits_run  # the same network
    rows = {row.name: row for row in tensorflow_checks.results(tiny, str(tmp_path / 'run'), 0)}
    assert rows['teacher'].message == os.path.join(digits_run, 'export')
    of_one, of_all = (
        float(found.split('whole run ')[1].split()[0]) for found in (alone, rows['cost'].message)
    )
    assert of_all / of_one == pytest.approx(4 / 3, rel=0.05)
