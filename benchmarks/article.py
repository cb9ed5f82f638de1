"""The program that people would write instead: Keras' `fit` with warmup, on the same digits.

    python benchmarks/article.py

It says when the first step is done, and goes on for an epoch.
"""

import os
import sys

os.environ['KERAS_BACKEND'] = 'tensorflow'

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

EPOCHS, BATCH_SIZE, SIZE = 30, 64, 32


class Warmup(keras.callbacks.Callback):
    """Linear warmup, then a cosine, set before each batch."""

    def __init__(self, peak: float, warmup: int, total: int):
        super().__init__()
        self.peak, self.warmup, self.total, self.step = peak, warmup, total, 0

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        share = (self.step - self.warmup) / (self.total - self.warmup)
        cosine = 0.5 * (1 + np.cos(np.pi * max(0.0, share)))
        rate = self.peak * min(self.step / self.warmup, cosine)
        self.model.optimizer.learning_rate.assign(rate)
        self.step += 1

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if self.step == 1:
            print('first step', flush=True)


def main() -> None:
    digits = load_digits()
    images = np.repeat(digits.images[..., None] * 255 / 16, 3, -1).astype(np.float32)
    images = tf.image.resize(images, (SIZE, SIZE)).numpy()
    steps = EPOCHS * (len(images) // BATCH_SIZE)
    data = tf.data.Dataset.from_tensor_slices((images, digits.target)).shuffle(len(images))
    model = keras.applications.EfficientNetV2B0(
        weights=None, classes=10, input_shape=(SIZE, SIZE, 3)
    )
    model.compile('adam', 'sparse_categorical_crossentropy', metrics=['accuracy'])
    model.fit(
        data.batch(BATCH_SIZE).prefetch(tf.data.AUTOTUNE),
        epochs=1,
        verbose=0,
        callbacks=[Warmup(3e-3, steps // 10, steps)],
    )


if __name__ == '__main__':
    sys.exit(main())
