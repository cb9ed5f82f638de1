"""The augmentation of inputs/augment.py beside Keras' own layers: milliseconds for a batch of
pictures.

    python benchmarks/augmentation.py [--rounds=7] [--output=benchmarks/results/augmentation.json]

RandAugment runs where each would run, on the host inside of tf.data, over pictures or over batches;
the rest in a compiled function, as in the training step. Both take turns, and the ratio is the
median of the rounds'.
"""

import argparse
import json
import os
import statistics
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.update(KERAS_BACKEND='tensorflow', TF_CPP_MIN_LOG_LEVEL='2')

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from configs import default  # noqa: E402
from inputs import augment  # noqa: E402

SIZE, BATCH_SIZE, CLASSES = 224, 64, 1000
RANGE = (0, 255)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--output')
    options = parser.parse_args()
    random = np.random.RandomState(0)
    images = tf.constant(random.randint(0, 256, (BATCH_SIZE, SIZE, SIZE, 3)).astype(np.uint8))
    labels = tf.constant(random.randint(0, CLASSES, BATCH_SIZE))
    report = {}
    for name, (ours, theirs) in {
        'rand_augment': rand_augment(images),
        **on_device(images, labels),
    }.items():
        times = [(seconds(ours), seconds(theirs)) for _ in range(options.rounds + 1)][
            1:
        ]  # the first round traces
        report[name] = {
            'ours_ms': round(1000 * statistics.median(one for one, _ in times), 1),
            'keras_ms': round(1000 * statistics.median(other for _, other in times), 1),
            'keras_divided_by_ours': round(
                statistics.median(other / one for one, other in times), 2
            ),
        }
        print(
            f'{name:15} ours {report[name]["ours_ms"]:8.1f} ms   Keras '
            f'{report[name]["keras_ms"]:8.1f} ms   '
            f'Keras / ours {report[name]["keras_divided_by_ours"]:.2f}',
            flush=True,
        )
    if options.output:
        with open(options.output, 'w') as file:
            json.dump(
                {
                    'cpu_cores': os.cpu_count(),
                    'batch_size': BATCH_SIZE,
                    'image_size': SIZE,
                    'augmentations': report,
                },
                file,
                indent=1,
            )


def seconds(call):
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def rand_augment(images):
    """Two operations of magnitude 10 on each picture, as a pass over a tf.data set of four
    batches.
    """
    policy = default.get_config().augment.policy
    policy.name = 'rand_augment'
    layer = keras.layers.RandAugment(value_range=RANGE, num_ops=2, factor=0.5, seed=0)
    pictures = tf.data.Dataset.from_tensors(images).repeat(4).cache()
    numbered = pictures.unbatch().enumerate()
    ours = numbered.map(
        lambda number, image: augment.apply_policy(
            image, tf.stack([tf.constant(0, tf.int64), number * augment.SEEDS]), policy
        ),
        tf.data.AUTOTUNE,
    ).batch(BATCH_SIZE)
    theirs = pictures.map(
        lambda batch: layer(tf.cast(batch, tf.float32), training=True), tf.data.AUTOTUNE
    )
    return lambda: list(ours), lambda: list(theirs)


def on_device(images, labels):
    """{name: (ours, Keras' layer)}, each a call of a compiled function on one batch."""
    seeds = [tf.constant([0, number * augment.SEEDS], tf.int64) for number in range(BATCH_SIZE)]
    one_hot = tf.one_hot(labels, CLASSES)
    layers = {
        'flip': ({'flip': True}, keras.layers.RandomFlip('horizontal', seed=0)),
        'color_jitter': (
            {'color_jitter': 0.4},
            keras.layers.RandomColorJitter(RANGE, 0.4, 0.4, 0.4, None, seed=0),
        ),
        'random_erasing': (
            {'random_erasing': 0.25},
            keras.layers.RandomErasing(0.25, value_range=RANGE, seed=0),
        ),
        'mixup': ({'mixup': 0.2}, keras.layers.MixUp(0.2, seed=0)),
        'cutmix': ({'cutmix': 1.0}, keras.layers.CutMix(1.0, seed=0)),
    }
    pairs = {}
    for name, (values, layer) in layers.items():
        settings = default.get_config().augment
        settings.update(values)
        drawn = [augment.draw_numbers(settings, seed) for seed in seeds]
        drawn = {key: tf.stack([one[key] for one in drawn]) for key in drawn[0]}
        ours = tf.function(augment.make_device_augment(settings, CLASSES), autograph=False)
        if name in ('mixup', 'cutmix'):
            theirs = tf.function(
                lambda images, labels, layer=layer: layer(
                    {'images': tf.cast(images, tf.float32), 'labels': labels}, training=True
                )
            )
        else:
            theirs = tf.function(
                lambda images, labels, layer=layer: (
                    layer(tf.cast(images, tf.float32), training=True),
                    labels,
                )
            )
        pairs[name] = (
            lambda ours=ours, drawn=drawn: ours(images, labels, drawn),
            lambda theirs=theirs: theirs(images, one_hot),
        )
    return pairs


if __name__ == '__main__':
    main()
