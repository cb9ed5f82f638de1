"""JAX's runtime runs the step that TensorFlow traces: the same losses and weights, whatever the
step holds and however many devices there are.
"""

import os

import numpy as np
import pytest
import tensorflow as tf

import evaluate
import train
from common import machine
from common.storage import read_json
from experiment import planning
from experiment import session as sessions
from inputs import augment
from modeling import loops, models, steps
from tests.conftest import slow
from tests.test_train import stop_at

jax = pytest.importorskip('jax', '0.10', 'JAX 0.10 is for Python 3.11 and later')
from devices import jax_start, pjrt  # noqa: E402

UPDATES, BATCH_SIZE = 40, 32


@pytest.fixture(scope='module', autouse=True)
def started():
    """JAX's runtime with four virtual devices; other tests of this process compute in 32 bits."""
    jax_start.start_virtual(4)
    yield
    jax.config.update('jax_enable_x64', False)


def on_jax(replicas):
    return pjrt.PjrtStrategy(jax.devices()[:replicas])


def on_tensorflow(replicas):
    if replicas == 1:
        return tf.distribute.OneDeviceStrategy('CPU:0')
    devices = [f'CPU:{index}' for index in range(replicas)]
    return tf.distribute.MirroredStrategy(devices, tf.distribute.ReductionToOneDevice())


def state_for(config, strategy, policy='float32'):
    tf.keras.backend.clear_session()
    models.keras.config.set_dtype_policy(policy)
    plan = planning.make_plan(config, 1437, 360, 10, strategy.num_replicas_in_sync)
    sessions.random.seed(0)
    with strategy.scope():
        return sessions.build_state(models.build_model(config, 10), config, plan, policy)


def batches_for(strategy, config, updates=UPDATES):
    """The same global batches for any number of replicas: replica r of n gets every n-th."""
    random, size = np.random.RandomState(0), config.image_size
    images = random.randint(0, 256, (updates * BATCH_SIZE, size, size, 3)).astype(np.uint8)
    labels = random.randint(0, 10, updates * BATCH_SIZE)
    examples = tf.data.Dataset.from_tensor_slices((images, labels)).enumerate()
    share = BATCH_SIZE // strategy.num_replicas_in_sync

    def with_draws(number, example):
        return *example, augment.draw_numbers(config.augment, tf.stack([0, number]))

    parts = examples.map(with_draws).batch(share, drop_remainder=True)
    return iter(strategy.distribute_datasets_from_function(lambda context: parts))


def trained(config, strategy, policy='float32', updates=UPDATES, on_tpu=False):
    """(losses [updates], all variables by part) after training from the same start."""
    state = state_for(config, strategy, policy)
    step = steps.make_train_step(
        state,
        config,
        augment.make_device_augment(config.augment, 10),
        num_classes=10,
        num_replicas=strategy.num_replicas_in_sync,
        jit_compile=False,
        on_tpu=on_tpu,
    )
    loop = loops.make_train_loop(strategy, step)
    batches = batches_for(strategy, config, updates)
    losses = [float(loop(batches, tf.constant(1))['loss']) for _ in range(updates)]
    sessions.make_synchronize(strategy, state, config.model.sync_batch_norm)()
    values = {
        part: np.concatenate([value.numpy().astype('float64').ravel() for value in variables])
        for part, variables in state.variables().items()
        if variables
    }
    return np.array(losses), values


def without_masks(config):
    config.augment.translate = config.augment.rotate = config.augment.zoom = 0.0
    config.model.dropout = 0.0
    config.schedule.peak_lr = 3e-3
    config.train_for = f'{UPDATES} steps'
    return config


@pytest.mark.parametrize('replicas', [2, slow(4)])
def test_losses_are_those_of_tensorflow(tiny, replicas):
    config = without_masks(tiny)
    losses, _ = trained(config, on_jax(replicas))
    np.testing.assert_allclose(losses, trained(config, on_tensorflow(1))[0], atol=1e-4)


@pytest.mark.parametrize('mixup', [0.0, 0.2])
def test_a_loop_over_micro_batches_computes_the_same(tiny, mixup):
    config = without_masks(tiny)
    config.accumulate_steps, config.model.dropout = 4, 0.5
    config.augment.flip, config.augment.mixup, config.augment.cutmix = True, mixup, mixup
    expected, state = trained(config, on_jax(2), updates=10)
    losses, looped = trained(config, on_jax(2), updates=10, on_tpu=True)
    np.testing.assert_allclose(losses, expected, atol=1e-4)
    for part, values in state.items():
        np.testing.assert_allclose(looped[part], values, rtol=1e-3, atol=1e-4, err_msg=part)


@pytest.mark.parametrize(
    'changes',
    [
        slow(
            {
                'model.dropout': 0.5,
                'grad_clip_norm': 0.5,
                'accumulate_steps': 4,
                'ema_decay': 0.9,
            }
        ),
        slow({'model.sync_batch_norm': False}),
        slow(
            {
                'model.freeze': 'block1',
                'l2_regularization': 1e-3,
                'model.layer_decay': 0.5,
                'label_smoothing': 0.1,
                'max_skipped_updates': 0,
            }
        ),
    ],
)
def test_each_feature_of_the_step_is_that_of_tensorflow(tiny, changes):
    """Masks of dropout, which differ from replica to replica, included."""
    config = without_masks(tiny)
    config.update_from_flattened_dict(changes)
    expected, weights = trained(config, on_tensorflow(2), 'float64', 6)
    losses, values = trained(config, on_jax(2), 'float64', 6)
    np.testing.assert_allclose(losses, expected, atol=1e-6)
    assert values.keys() == weights.keys()
    for part in weights:
        np.testing.assert_allclose(values[part], weights[part], atol=1e-8, err_msg=part)


@pytest.mark.slow
def test_float16_scales_its_loss_as_under_tensorflow(tiny):
    """Its first scale is too large, so the first updates are skipped, and counted."""
    config = without_masks(tiny)
    expected, weights = trained(config, on_tensorflow(1), 'mixed_float16', 4)
    losses, values = trained(config, on_jax(1), 'mixed_float16', 4)
    np.testing.assert_allclose(losses, expected, atol=1e-2)
    np.testing.assert_array_equal(values['skipped'], weights['skipped'])
    np.testing.assert_array_equal(values['loss_scale'], weights['loss_scale'])


@pytest.mark.slow
def test_a_run_is_trained_evaluated_exported_and_resumed(tiny, tmp_path, monkeypatch):
    tiny.strategy, tiny.virtual_devices = 'pjrt', 4
    whole, stopped = str(tmp_path / 'whole'), str(tmp_path / 'stopped')
    assert train.run(tiny, whole) == 0
    summary = read_json(os.path.join(whole, 'summary.json'))
    assert summary['steps'] == 30 and summary['export/accuracy'] == summary['eval/accuracy']
    environment = read_json(os.path.join(whole, 'environment.json'))
    assert environment['runtime'] == pjrt.PjrtStrategy.runtime and len(environment['devices']) == 4
    metrics = evaluate.run(tiny, whole)
    assert metrics['eval/accuracy'] == summary['eval/accuracy']
    with monkeypatch.context() as patch:
        stop_at(patch, 14)
        assert train.run(tiny, stopped) == 143
    assert train.run(tiny, stopped) == 0
    again = read_json(os.path.join(stopped, 'summary.json'))
    assert again['weights_sha256'] == summary['weights_sha256']


@pytest.mark.slow
@pytest.mark.parametrize('first, second', [('one_device', 'pjrt'), ('pjrt', 'one_device')])
def test_a_run_continues_on_the_other_runtime_with_a_note(
    tiny, tmp_path, monkeypatch, capsys, first, second
):
    tiny.strategy, tiny.virtual_devices = first, 4
    with monkeypatch.context() as patch:
        stop_at(patch, 14)
        assert train.run(tiny, str(tmp_path)) == 143
    tiny.strategy = second
    capsys.readouterr()
    assert train.run(tiny, str(tmp_path)) == 0
    assert 'changed at step 14: ' in capsys.readouterr().out
    (*_, note) = read_json(str(tmp_path / 'environment.json'))['changes']
    assert 'JAX' in note and 'TensorFlow' in note
    assert read_json(str(tmp_path / 'summary.json'))['steps'] == 30


@pytest.mark.slow
def test_a_progressive_run_with_a_teacher_has_a_program_a_stage(tiny, tmp_path):
    tiny.image_size, tiny.progressive.stages, tiny.progressive.image_size = 64, 2, 32
    tiny.strategy, tiny.virtual_devices = 'pjrt', 4
    assert train.run(tiny, str(tmp_path / 'teacher')) == 0
    tiny.distill.teacher = str(tmp_path / 'teacher' / 'export')
    assert train.run(tiny, str(tmp_path / 'taught')) == 0
    assert read_json(str(tmp_path / 'taught' / 'summary.json'))['steps'] == 30


@pytest.mark.slow
def test_compiled_programs_are_kept(tiny, monkeypatch):
    """A second process compiles nothing: the programs' keys are the same."""
    keys = []
    monkeypatch.setattr(
        pjrt.compiler.compilation_cache,
        'get_executable_and_time',
        lambda key, *others: keys.append(key) or (None, None),
    )
    for _ in range(2):
        trained(without_masks(tiny), on_jax(2), updates=1)
    assert len(keys) == 2 and keys[0] == keys[1], keys


def test_the_cache_is_beside_the_compilers():
    assert jax.config.jax_compilation_cache_dir == os.path.join(machine.cache_folder(), 'jax')
