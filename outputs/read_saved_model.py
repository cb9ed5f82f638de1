"""Runs a SavedModel on TFRecord files of encoded images, with TensorFlow alone.

export.py runs this script in a separate process.

usage: python read_saved_model.py SAVED_MODEL ENCODED.tfrecord OPAQUE_PNGS.tfrecord ANSWERS.npz
"""

import sys

if __name__ == '__main__':
    # Makes any import of them fail: the model must not need Keras; JAX is for TensorFlow's
    # converter to TFLite, and takes a second.
    sys.modules['keras'] = sys.modules['jax'] = None  # type: ignore[assignment]

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402


def main(directory: str, encoded: str, opaque_pngs: str, answers: str) -> None:
    """Writes the logits of three signatures to an .npz file."""
    model = tf.saved_model.load(directory)
    logits = [
        model.signatures['classify_encoded'](encoded=batch)['logits'].numpy()
        for batch in tf.data.TFRecordDataset(encoded).batch(100)
    ]
    images = [
        tf.io.decode_png(file, channels=3)[None] for file in tf.data.TFRecordDataset(opaque_pngs)
    ]
    np.savez(
        answers,
        classify_encoded=np.concatenate(logits),
        classify=np.concatenate(
            [model.signatures['serving_default'](images=batch)['logits'] for batch in images]
        ),
        classify_float=np.concatenate(
            [
                model.signatures['classify_float'](images=tf.cast(batch, tf.float32))['logits']
                for batch in images
            ]
        ),
    )


if __name__ == '__main__':
    main(*sys.argv[1:])
