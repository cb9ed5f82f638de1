"""Runs a SavedModel on a TFRecord file of encoded pictures, with TensorFlow alone. A program of its own: see export.py.

usage: python read_saved_model.py SAVED_MODEL ENCODED.tfrecord ANSWERS.npz
"""
import sys

sys.modules['keras'] = None  # an import of it fails from here on: the model must not need it

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

SINGLE = 8  # pictures that are given decoded, one at a time, because their sizes differ


def main(directory, records, answers):
    model = tf.saved_model.load(directory)
    files = tf.data.TFRecordDataset(records)
    logits = [model.signatures['classify_encoded'](encoded=batch)['logits'].numpy() for batch in files.batch(100)]
    pictures = [tf.io.decode_image(file, channels=3, expand_animations=False)[None] for file in files.take(SINGLE)]
    np.savez(
        answers,
        classify_encoded=np.concatenate(logits),
        classify=np.concatenate([model.signatures['serving_default'](images=picture)['logits'] for picture in pictures]),
        classify_float=np.concatenate([model.signatures['classify_float'](images=tf.cast(picture, tf.float32))['logits'] for picture in pictures]),
    )


if __name__ == '__main__':
    main(*sys.argv[1:])
