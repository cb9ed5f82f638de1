"""What benchmarks/bench.py lets take turns: a step of training or of evaluation, ours and others'.

    python benchmarks/peers.py NAME --size=32 --batch_size=64 --classes=10

All have one batch in memory, so that only the step counts, and all do the same training: the
network of EfficientNetV2-B0, AdamW, smoothed labels. Ours does what configs/digits.py has besides:
the rate of a schedule, averaged weights, and a check that skips an update that is not finite.
"""

import argparse
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from benchmarks import turns  # noqa: E402

RATE, DECAY, SMOOTHING = 3e-3, 0.02, 0.1
STEPS = 5  # of a call of our loop


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('name', choices=PEERS)
    parser.add_argument('--size', type=int, default=32)
    parser.add_argument('--batch_size', type=int, default=64)
    parser.add_argument('--classes', type=int, default=10)
    options = parser.parse_args()
    if options.name.startswith('ours'):
        import main as program  # noqa: F401 - for the variables that it sets before TensorFlow starts
    peer = PEERS[options.name]
    turns.take(peer(options.size, options.batch_size, options.classes))


def batch_of(size: int, batch_size: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (images uint8 [batch, size, size, 3], labels int64 [batch])."""
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (batch_size, size, size, 3)).astype(np.uint8)
    return images, random.randint(0, classes, batch_size)


def ours_train(size: int, batch_size: int, classes: int, model: str = '') -> Iterator[int]:
    import tensorflow as tf

    from inputs import augment
    from modeling import loops, steps

    config, strategy, state = _ours(size, batch_size, classes, model)
    train_step = steps.make_train_step(
        state,
        config,
        augment.make_device_augment(config.augment, classes),
        num_classes=classes,
        num_replicas=1,
        jit_compile=False,
        on_cpu=True,
    )
    loop = loops.make_train_loop(strategy, train_step)
    images, labels = batch_of(size, batch_size, classes)
    batches = iter(tf.data.Dataset.from_tensors((images, labels, {})).repeat())
    while True:
        float(loop(batches, tf.constant(STEPS))['loss'])
        yield STEPS * batch_size


def ours_evaluate(size: int, batch_size: int, classes: int) -> Iterator[int]:
    import tensorflow as tf

    from modeling import loops, steps

    _, strategy, state = _ours(size, batch_size, classes)
    loop = loops.make_eval_loop(strategy, steps.make_eval_step(state, num_classes=classes))
    images, labels = batch_of(size, batch_size, classes)
    batch = images, labels, np.ones(batch_size, np.float32)
    batches = iter(tf.data.Dataset.from_tensors(batch).repeat())
    while True:
        float(loop(batches, tf.constant(STEPS))['loss'])
        yield STEPS * batch_size


def _ours(size: int, batch_size: int, classes: int, model: str = '') -> tuple:
    """Returns (config, strategy, state) of configs/digits.py for such images."""
    import tensorflow as tf

    from configs import digits
    from experiment import planning, session
    from modeling import models

    config = digits.get_config()
    config.image_size, config.batch_size, config.train_for = size, batch_size, '1_000_000 steps'
    config.augment.translate = config.augment.rotate = config.augment.zoom = 0.0
    config.model.name = model or config.model.name
    plan = planning.make_plan(config, 1437, 360, classes, 1)
    strategy = tf.distribute.OneDeviceStrategy('CPU:0')
    with strategy.scope():
        network = models.build_model(config, classes)
        return config, strategy, session.build_state(network, config, plan, 'float32')


def fit(size: int, batch_size: int, classes: int, compiled: bool, tiny: bool = False) -> Iterator:
    """`model.fit`, which goes on in a thread and tells of each batch."""
    import keras
    import tensorflow as tf

    done: queue.SimpleQueue[int] = queue.SimpleQueue()

    class Tell(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
            done.put(batch_size)

    model = _keras_model(size, classes, compiled, tiny)
    images, labels = batch_of(size, batch_size, classes)
    targets = np.eye(classes, dtype=np.float32)[labels]
    data = tf.data.Dataset.from_tensors((images.astype(np.float32), targets)).repeat()
    arguments = {'epochs': 10**6, 'steps_per_epoch': 1000, 'verbose': 0, 'callbacks': [Tell()]}
    threading.Thread(target=model.fit, args=(data,), kwargs=arguments, daemon=True).start()
    while True:
        yield done.get()


def keras_evaluate(size: int, batch_size: int, classes: int) -> Iterator[int]:
    import tensorflow as tf

    model = _keras_model(size, classes, compiled=False)
    images, labels = batch_of(size, batch_size, classes)
    targets = np.eye(classes, dtype=np.float32)[labels]
    data = tf.data.Dataset.from_tensors((images.astype(np.float32), targets)).repeat(20)
    while True:
        model.evaluate(data, verbose=0)
        yield 20 * batch_size


def _keras_model(size: int, classes: int, compiled: bool, tiny: bool = False):
    import keras

    if tiny:
        from configs import digits
        from modeling import models

        config = digits.get_config()
        config.model.name, config.image_size = 'tiny', size
        model = models.build_model(config, classes)
    else:
        model = keras.applications.EfficientNetV2B0(
            weights=None, classes=classes, input_shape=(size, size, 3), classifier_activation=None
        )
    model.compile(
        keras.optimizers.AdamW(RATE, weight_decay=DECAY),
        keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=SMOOTHING),
        metrics=['accuracy'],
        jit_compile=compiled,
    )
    return model


def timm(size: int, batch_size: int, classes: int, compiled: bool, bfloat16: bool) -> Iterator:
    """PyTorch with timm's model, in the layout that is fastest for it."""
    import timm as library
    import torch

    torch.manual_seed(0)
    model = library.create_model(
        'tf_efficientnetv2_b0', num_classes=classes, drop_rate=0.2, drop_path_rate=0.2
    )
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=DECAY, foreach=True)
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    run = torch.compile(model) if compiled else model
    images, labels = batch_of(size, batch_size, classes)
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255)
    pictures = pictures.to(memory_format=torch.channels_last)
    targets = torch.from_numpy(labels)
    while True:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast('cpu', torch.bfloat16, enabled=bfloat16):
            loss = loss_of(run(pictures), targets)
        loss.backward()
        optimizer.step()
        yield batch_size


PEERS: dict[str, Callable[[int, int, int], Iterator[int]]] = {
    'ours': ours_train,
    'fit': lambda *sizes: fit(*sizes, compiled=False),
    'fit, jit_compile': lambda *sizes: fit(*sizes, compiled=True),
    'fit, oneDNN': lambda *sizes: fit(*sizes, compiled=False),  # with a variable of the environment
    'timm, eager': lambda *sizes: timm(*sizes, compiled=False, bfloat16=False),
    'timm, compiled': lambda *sizes: timm(*sizes, compiled=True, bfloat16=False),
    'timm, eager, bfloat16': lambda *sizes: timm(*sizes, compiled=False, bfloat16=True),
    'timm, compiled, bfloat16': lambda *sizes: timm(*sizes, compiled=True, bfloat16=True),
    'ours, evaluation': ours_evaluate,
    'evaluate': keras_evaluate,
    'evaluate, oneDNN': keras_evaluate,
    'ours, tiny': lambda *sizes: ours_train(*sizes, model='tiny'),
    'fit, tiny': lambda *sizes: fit(*sizes, compiled=False, tiny=True),
}


if __name__ == '__main__':
    main()
