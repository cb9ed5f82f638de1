"""Durations become the steps one would count by hand, and an impossible config is one clear
line.
"""

import glob
import importlib
import os
from fractions import Fraction

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from common.commands import ROOT
from common.errors import ConfigError
from configs import default
from experiment import config_schema, planning
from inputs import augment
from modeling import optimizers
from tests.conftest import refused

NAMES = sorted(
    os.path.basename(path)[:-3] for path in glob.glob(os.path.join(ROOT, 'configs', '[a-z]*.py'))
)


def shipped(name):
    return importlib.import_module(f'configs.{name}').get_config()


def test_all_configs_of_the_readme_are_there():
    assert {
        'default',
        'digits',
        'imagenet',
        'imagenet_strong',
        'imagenet_distill',
        'imagenette',
        'cifar10',
        'folder',
        'finetune',
        'debug',
    } <= set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_a_shipped_config_is_valid_and_wastes_no_update(name):
    config = shipped(name)
    config_schema.check_config(config)
    numbers = planning.make_plan(
        config, train_examples=9_469, eval_examples=3_925, num_classes=10, num_replicas=1
    )
    assert 0 < planning.learning_rate_of(config, numbers)(0) < config.schedule.peak_lr
    assert planning.learning_rate_of(config, numbers)(numbers.total_steps) == config.schedule.end_lr
    optimizers.check_optimizer(
        config.optimizer.name,
        {key: value for key, value in config.optimizer.items() if key != 'name'},
    )
    drawn = {
        name: tf.stack([value] * 2)
        for name, value in augment.draw_numbers(
            config.augment, tf.constant([0, 1], tf.int64)
        ).items()
    }
    assert augment.make_device_augment(config.augment, 10)(
        tf.zeros([2, 8, 8, 3], tf.uint8), tf.constant([3, 4]), drawn
    )[1].shape == (2, 10)


@pytest.mark.parametrize('name', NAMES)
def test_a_shipped_config_says_what_it_costs_and_how_it_is_run(name):
    text = importlib.import_module(f'configs.{name}').__doc__
    if name != 'default':
        for word in ('python main.py', 'Costs', 'Reaches', 'Measured'):
            assert word in text


def test_imagenet_takes_as_many_steps_as_the_paper():
    config = shipped('imagenet')
    numbers = planning.make_plan(config, 1_281_167, 50_000, 1_000, num_replicas=8)
    assert numbers.total_steps == 350 * 1_281_167 // 4096 == 109_474
    assert numbers.warmup_steps == 5 * 1_281_167 // 4096
    assert config.schedule.peak_lr == pytest.approx(0.256)  # 0.016 for each 256 images
    after_warmup = planning.learning_rate_of(config, numbers)
    steps_per_2_4_epochs = 2.4 * 1_281_167 / 4096
    assert after_warmup(numbers.warmup_steps + 10 * round(steps_per_2_4_epochs)) == pytest.approx(
        0.256 * 0.97**10, rel=1e-3
    )


@pytest.mark.parametrize(
    'text, steps',
    [
        ('500 steps', 500),
        ('1_281_167 examples', 20_018),
        ('10 epochs', 15_625),
        ('0.5 epochs', 781),
        ('1 epoch', 1562),
        ('64,000 examples', 1000),
    ],
)
def test_a_duration_is_counted_in_updates(text, steps):
    config = default.get_config()
    config.batch_size, config.train_for = 64, text
    assert planning.make_plan(config, 100_000, 10, 10, 1).total_steps == steps


@given(
    epochs=st.integers(1, 500),
    examples=st.integers(1_000, 2_000_000),
    batch_size=st.integers(1, 1_000),
    warmup=st.integers(0, 60),
    hold=st.integers(0, 40),
)
def test_a_plan_is_exact_arithmetic(epochs, examples, batch_size, warmup, hold):
    config = default.get_config()
    config.batch_size, config.train_for = batch_size, f'{epochs} epochs'
    config.schedule.warmup, config.schedule.hold = f'{warmup}%', f'{hold}%'
    numbers = planning.make_plan(config, examples, 10, 10, 1)
    assert numbers.total_steps == epochs * examples // batch_size
    assert numbers.warmup_steps == int(Fraction(numbers.total_steps * warmup, 100))
    assert numbers.hold_steps == int(Fraction(numbers.total_steps * hold, 100))
    assert 1 <= numbers.log_every <= max(1, numbers.total_steps)


def at_batch(batch_size, train_for='27 epochs'):
    config = default.get_config()
    config.batch_size, config.train_for = batch_size, train_for
    return config, planning.make_plan(config, 1437, 360, 10, 1)


def test_half_the_batch_leaves_as_many_epochs():
    before, _ = at_batch(64)
    config, numbers = at_batch(32)
    assert numbers.total_steps == 1212
    numbers = planning.resumed_plan(
        numbers, config, 303, 303 * 64, 303 * 64
    )  # after half of 606 updates
    assert numbers.total_steps - 303 == 606
    assert numbers.epochs == pytest.approx(27, abs=32 / 1437)
    assert (numbers.total_steps - 303) * 32 / 1437 == pytest.approx(13.5, abs=64 / 1437)
    rate = planning.learning_rate_of(config, numbers)
    of_before = planning.learning_rate_of(*at_batch(64))
    for examples in range(303 * 64, 27 * 1437 - 64, 64 * 17):
        assert rate(303 + (examples - 303 * 64) // 32) == pytest.approx(
            of_before(examples // 64), abs=1e-6
        )
    assert planning.stages(config, numbers)[-1][0] == 909
    chosen, rates = planning.planned_rates(config, numbers)
    assert (chosen[0], chosen[-1], rates[-1]) == (0, 909, config.schedule.end_lr)


def test_a_run_counted_in_updates_goes_on_at_the_same_update():
    config, numbers = at_batch(4, '30 steps')
    moved = planning.resumed_plan(numbers, config, 14, 14 * 32, 14 * 32)
    assert (moved.total_steps, moved.offset.updates) == (30, 0)
    assert moved.stream_position(14, 1) == 448 and moved.stream_position(30, 1) == 448 + 64
    assert moved.epochs == (448 + 64) / 1437


def test_stages_and_curve_start_later_after_larger_batches():
    config, _ = at_batch(64)
    config.progressive.stages = 2
    numbers = planning.make_plan(config, 1437, 360, 10, 1)
    moved = planning.resumed_plan(numbers, config, 606, 606 * 32, 606 * 32)  # position 303 of 606
    assert [end for end, _ in planning.stages(config, moved)] == [606, 909]
    assert planning.planned_rates(config, moved)[0][0] == 303 and moved.total_steps == 909
    assert (
        planning.summarize(config, moved).steps.partition(', ')[2]
        == 'some with another batch size; 26.99 epochs, now 22.4531 steps each'
    )


@given(
    parts=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 40)), min_size=1, max_size=4),
    batch_size=st.integers(1, 300),
    more=st.integers(0, 50),
    unit=st.sampled_from(['27 epochs', '9000 steps', '40_000 examples']),
)
def test_the_position_follows_from_the_examples_seen(parts, batch_size, more, unit):
    config, numbers = at_batch(batch_size, unit)
    step, seen = sum(count for _, count in parts), sum(size * count for size, count in parts)
    moved = planning.resumed_plan(numbers, config, step, seen, seen)
    assert (
        planning.resumed_plan(
            moved, config, step + more, seen + more * batch_size, seen + more * batch_size
        )
        == moved
    )  # after any stop
    assert moved.stream_position(step, 1) == seen
    if unit != '9000 steps':
        examples = seen + (moved.total_steps - step) * batch_size
        assert numbers.total_steps * batch_size <= examples < (numbers.total_steps + 1) * batch_size
    if all(size == batch_size for size, _ in parts):
        assert moved == numbers


@pytest.mark.parametrize(
    'key, value, says',
    [
        ('train_for', '20', "'20 epochs'"),
        ('train_for', '5%', 'not a valid duration'),
        ('train_for', '2.5 steps', 'a whole number'),
        ('train_for', '-3 epochs', 'not a valid duration'),
        ('train_for', '1,5 epochs', 'not a valid duration'),
        ('schedule.warmup', '120%', 'more than the whole run'),
        ('schedule.warmup', '10 minutes', 'not a valid duration'),
        ('checkpoint_every', 'often', 'not a valid duration'),
        ('checkpoint_every', '9' * 400 + ' minutes', 'not a valid duration'),
        ('eval_every', '0%', 'at least 1 step'),
        ('dataset.memory_gib', 1e300, 'impossible'),
        ('batch_size', 10**30, 'impossible'),
        ('batch_size', 0, 'from 1 to'),
        ('batch_size', 6.5, 'a whole number'),
        ('batch_size', True, 'a whole number'),
        ('label_smoothing', 1.5, 'from 0 to 0.999'),
        ('schedule.peak_lr', float('nan'), 'impossible'),
        ('schedule.peak_lr', float('inf'), 'impossible'),
        ('schedule.name', 'cosin', '--config.schedule.name=cosine'),
        ('precision', 'fp16', 'float16'),
        ('jit_compile', True, 'text'),
        ('augment.crop_area', (0.5, 0.1), 'low <= high'),
        ('augment.crop_area', (0.5,), 'two numbers'),
        ('augment.flip', 1, 'true or false'),
        ('augment.cutmix', -1.0, 'at least 0'),
        ('augment.policy.name', 'randaugment', '--config.augment.policy.name=rand_augment'),
        ('schedule.warmup_steps', 100, 'did you mean warmup?'),
        ('schedule.peek_lr', 0.1, 'did you mean peak_lr?'),
        ('schedule.step', 3, '; cosine has name, peak_lr'),
        ('schedule.warmups', '5%', 'did you mean schedule.warmup?'),
        ('optimizer.nam', 'sgd', 'did you mean optimizer.name?'),
        ('optimizer.nested', {'key': 1}, 'does not exist'),
    ],
)
def test_an_impossible_value_is_one_line_that_says_what_to_write(key, value, says):
    config = default.get_config().unlock()
    section, _, name = key.rpartition('.')
    with config.ignore_type():
        (config[section] if section else config)[name] = value
    with refused(ConfigError) as error:
        config_schema.check_config(config)
    assert error.value.key.startswith(key)
    assert says in str(error.value)


@pytest.mark.parametrize(
    'key, suggestion',
    [
        ('batch_sise', 'batch_size'),
        ('model.nme', 'model.name'),
        ('warmup', 'schedule.warmup'),
        ('dataset.nam', 'dataset.name'),
    ],
)
def test_an_unknown_key_suggests_the_nearest(key, suggestion):
    config = default.get_config().unlock()
    section, _, name = key.rpartition('.')
    (config[section] if section else config)[name] = 3
    with refused(ConfigError, suggestion, key=key):
        config_schema.check_config(config)


def test_a_schedule_longer_than_the_run_is_refused():
    config = default.get_config()
    config.train_for = '100 steps'
    config.schedule.warmup = '80 steps'
    config.schedule.hold = '30 steps'
    with refused(ConfigError, 80, 30, 100, key='schedule.warmup'):
        planning.make_plan(config, 1_000, 10, 10, 1)


def test_a_run_without_a_step_is_refused():
    config = default.get_config()
    config.train_for = '100 examples'
    with refused(ConfigError, '128', key='train_for'):
        planning.make_plan(config, 1_000, 10, 10, 1)


def test_an_unsplittable_batch_is_refused_with_one_that_splits():
    config = default.get_config()
    config.batch_size = 100
    with refused(ConfigError, key='batch_size', fix='--config.batch_size=96'):
        planning.make_plan(config, 1_000, 10, 10, num_replicas=8)


def test_an_odd_batch_for_mixing_is_refused_with_an_even_one():
    config = default.get_config()
    config.batch_size, config.augment.mixup = 36, 0.2
    with refused(ConfigError, key='batch_size', fix='--config.batch_size=40'):
        planning.make_plan(config, 1_000, 10, 10, num_replicas=4)
    config.batch_size = 40
    assert planning.make_plan(config, 1_000, 10, 10, num_replicas=4).total_steps > 0


def test_an_unknown_argument_of_the_curve_is_refused():
    config = default.get_config().unlock()
    config.schedule.powr = 2.0
    config.schedule.name = 'polynomial'
    with refused(ConfigError, 'power'):
        config_schema.check_config(config)


def test_a_progressive_run_grows_in_equal_stages_to_the_config():
    config = default.get_config()
    config.train_for, config.image_size, config.augment.mixup = '1_000 steps', 224, 0.4
    config.progressive.stages = 4
    config.progressive.image_size = 128
    config.progressive.strength = 0.25
    numbers = planning.make_plan(config, 10_000, 10, 10, 1)
    ends, stages = zip(*planning.stages(config, numbers), strict=True)
    assert ends == (250, 500, 750, 1000)
    assert [stage.image_size for stage in stages] == [128, 160, 192, 224]
    np.testing.assert_allclose([stage.augment.mixup for stage in stages], [0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose([stage.model.dropout for stage in stages], [0.05, 0.1, 0.15, 0.2])
    np.testing.assert_allclose(
        [stage.augment.policy.magnitude for stage in stages], [2.5, 5, 7.5, 10]
    )
    assert stages[-1].to_json() == config.to_json() and config.augment.mixup == 0.4


def test_one_stage_is_the_config_itself():
    config = default.get_config()
    ((end, stage),) = planning.stages(config, planning.make_plan(config, 10_000, 10, 10, 1))
    assert (end, stage.to_json()) == (781, config.to_json())


@pytest.mark.parametrize(
    'values, key, fix',
    [
        ({'progressive.image_size': 256}, 'progressive.image_size', 'config.image_size'),
        ({'progressive.image_size': 50}, 'progressive.image_size', 'multiples of 32'),
        ({'dataset.service': 'machine'}, 'dataset.service', 'HOST:PORT'),
        ({'train_for': '2 steps'}, 'progressive.stages', '--config.progressive.stages=2'),
        ({'augment.repeats': 3}, 'augment.repeats', '--config.batch_size=129'),
        ({'accumulate_steps': 3}, 'accumulate_steps', '--config.batch_size=129'),
    ],
)
def test_stages_and_parts_of_batches_that_cannot_be_are_refused(values, key, fix):
    config = default.get_config()
    config.progressive.stages = 3
    config.update_from_flattened_dict(values)
    with refused(ConfigError, key=key, fix=fix):
        config_schema.check_config(config)
        planning.make_plan(config, 10_000, 10, 10, 1)
