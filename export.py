"""Exports a SavedModel: images in, classes out, preprocessing inside.

It is verified in a fresh process that has TensorFlow alone.
"""

import os
import subprocess
import sys
import tempfile
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from common import console, storage
from common.errors import RunError, counted, one_line
from experiment.resume import SUMMARY, is_finished, require_same_config
from experiment.session import Session, open_session
from inputs import image_validation
from inputs.image_ops import center_crop_and_resize, decode
from modeling import labels_file, models, pretrained, steps
from outputs import report

MAX_CHECKED = 1000  # evaluation examples that the exported model is compared on
MAX_DECODED = 8  # of them that are also given decoded, one at a time, because their sizes differ
# Largest difference of a logit, as share of the largest logit: a few roundings of the type that the
# model computes in.
TOLERANCE = {'float64': 1e-6, 'float32': 1e-4, 'mixed_bfloat16': 5e-2, 'mixed_float16': 1e-2}
# Of float32 on a GPU: TensorFlow multiplies with 10 bits there, as many as float16 has.
TOLERANCE_TF32 = 1e-2
READER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'outputs', 'read_saved_model.py')


def run(config: ConfigDict, workdir: str, which: str | None = None) -> dict[str, Any] | None:
    """Exports a checkpoint of `workdir` into `workdir`/export, and verifies it.

    Args:
        which: 'last', 'best', or None for the one that training exports.
    """
    require_same_config(config, workdir)
    session = open_session(config, workdir, trains=False)
    step, progress, which = restore(session, which)
    if not session.is_chief:
        return None
    weights = describe(config, step, session.checkpoints.latest_step())
    console.row('exports', weights)
    exported = {'export/step': step, **write(session, os.path.join(workdir, 'export'))}
    if is_finished(workdir):
        _correct_summary(workdir, {**exported, **evaluation(progress, step)})
        report.note_export(workdir, weights)
    exported = {'export/checkpoint': which, **exported}
    console.line(storage.as_json(exported))
    return exported


def exports_best(config: ConfigDict) -> bool:
    """Returns whether training exports the best checkpoint, and not the last."""
    return bool(config.patience)


def restore(session: Session, which: str | None = None) -> tuple[int, dict, str]:
    """Restores the weights to export.

    If training exports the best and it is missing, these are the last.

    Returns: (after which update they were, the `progress` saved with them, 'last' or 'best').
    """
    if which is None and exports_best(session.config):
        try:
            return *session.checkpoints.restore('best', partly=True), 'best'
        except (RunError, tf.errors.OpError) as error:
            if session.is_chief:
                console.note(f'{one_line(error)}; the weights of the last update are exported')
    which = which or 'last'
    return *session.checkpoints.restore(which, partly=True), which


def describe(config: ConfigDict, step: int, last_step: int | None) -> str:
    """Returns in words which weights are exported, and how to get others."""
    weights = f'the weights after update {step:,}'
    if step == last_step:
        return f'{weights}, the last'
    weights = f'{weights}, the best by {config.best_metric}'
    if not exports_best(config):
        return weights
    return (
        f'{weights}: config.patience is set; --mode=export --checkpoint=last takes those '
        f'after update {last_step or 0:,}'
    )


def evaluation(progress: dict, step: int) -> dict:
    """Returns what the evaluation after update `step` gave over the whole split.

    Args:
        progress: the fields of `outputs.train_progress.Progress`, as they were then.

    Returns: {'export/eval_accuracy', 'export/eval_loss', 'export/eval_top5'}; None where that
        update was not evaluated.
    """
    metrics = storage.nan_for_null(progress['metrics']) if progress['evaluated_at'] == step else {}
    return {
        f'export/eval_{name}': metrics.get(f'eval/{name}') for name in ('accuracy', 'loss', 'top5')
    }


def _correct_summary(workdir: str, exported: dict) -> None:
    """Replaces what summary.json says of the export."""
    path = os.path.join(workdir, SUMMARY)
    storage.write_json(path, {**storage.read_json(path), **exported})


def write(session: Session, directory: str) -> dict[str, Any]:
    """Writes the SavedModel and verifies it against the model on evaluation examples.

    Its signatures take images of any size, which are cropped and resized as in evaluation:
    `classify` (and serving_default) uint8 [batch, height, width, 3]; `classify_float` float32 in
    0..255, the same shape; `classify_encoded` JPEG or PNG files, string [batch]. Of 16 bits,
    `config.dataset.white_level` of the run is white. A graph can lay a transparent PNG over white,
    and does, but it cannot turn an image as its EXIF data say, nor read other formats:
    `inputs.image_validation.as_decodable` converts any file that training accepts into one that
    this signature reads as evaluation does. Each returns `logits` and `probabilities`, float32
    [batch, classes], `class_index`, int64 [batch], and `label`, string [batch]. `label_names`
    returns all labels, and `logits` is the bare model, float32 [batch, image_size, image_size, 3]
    in 0..255 -> [batch, classes], which can teach another. For a model of keras.applications,
    backbone.weights.h5 beside it has all weights but the head's, as that library reads them.

    Returns:
        'export/examples': compared, taken evenly from the split;
        'export/accuracy' of the exported model on them, 'export/model_accuracy' of the model
        itself; 'export/max_difference' of a logit; 'export/converted_examples': user's files that
        went through `as_decodable` first.

    Raises: RunError if its outputs differ from the model's, or if these or its weights are not
        finite; what was at `directory` before stays then.
    """
    _require_finite(session)
    with storage.atomic_directory(directory) as partial:
        with storage.explained(partial):
            _write_saved_model(session, partial)
        storage.write(
            os.path.join(partial, labels_file.NAME), labels_file.to_text(session.source.class_names)
        )
        return _compare(session, partial)


def _require_finite(session: Session) -> None:
    """Raises RunError if a weight that evaluation uses is not finite: the model has diverged."""
    variables = models.float_variables(session.state.model)
    for variable, value in zip(variables, steps.evaluated_weights(session.state), strict=True):
        if not np.isfinite(value.numpy()).all():
            raise RunError(
                f'the weights are not finite, {variable.path} for one', _diverged(session)
            )


def _diverged(session: Session) -> str:
    best = (
        'export the weights of its best evaluation with --mode=export --checkpoint=best, or '
        if session.checkpoints.has_best()
        else ''
    )
    return (
        f'the model has diverged: {best}train anew with a lower config.schedule.peak_lr or '
        'with config.grad_clip_norm'
    )


def _write_saved_model(session: Session, directory: str) -> None:
    """Builds the model again without a strategy, with the evaluated weights, and writes it."""
    config = session.config
    size, share, white_level = config.image_size, config.eval_crop, config.dataset.white_level
    names = tf.constant(session.source.class_names)
    model = models.build_model(session.config, session.plan.num_classes)
    for variable, value in zip(
        models.float_variables(model), steps.evaluated_weights(session.state), strict=True
    ):
        variable.assign(value.numpy())
    if session.config.model.name not in models.NETWORKS:
        pretrained.save_backbone(
            model, session.config, os.path.join(directory, 'backbone.weights.h5')
        )

    def answer(images: tf.Tensor) -> dict[str, tf.Tensor]:
        logits = model(tf.cast(images, tf.float32), training=False)  # [batch, classes]
        best = tf.argmax(logits, -1)
        return {
            'logits': logits,
            'probabilities': tf.nn.softmax(logits),
            'class_index': best,
            'label': tf.gather(names, best),
        }

    def classify(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return answer(center_crop_and_resize(images, size, share))

    def classify_encoded(encoded: tf.Tensor) -> dict[str, tf.Tensor]:
        def decode_file(file: tf.Tensor) -> tf.Tensor:
            return center_crop_and_resize(decode(file, white_level), size, share)

        shape = tf.TensorSpec([size, size, 3], tf.uint8)
        return answer(tf.map_fn(decode_file, encoded, fn_output_signature=shape))

    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint(
        'classify', classify, [tf.TensorSpec([None, None, None, 3], tf.uint8, name='images')]
    )
    archive.add_endpoint(
        'classify_float',
        classify,
        [tf.TensorSpec([None, None, None, 3], tf.float32, name='images')],
    )
    archive.add_endpoint(
        'classify_encoded', classify_encoded, [tf.TensorSpec([None], tf.string, name='encoded')]
    )
    archive.add_endpoint(
        'logits',
        lambda images: model(images, training=False),
        [tf.TensorSpec([None, *model.input_shape[1:]], tf.float32, name='images')],
    )
    archive.add_endpoint('label_names', lambda: names, [])
    archive.write_out(directory, verbose=False)


def _compare(session: Session, directory: str) -> dict[str, Any]:
    """Runs evaluation examples through the SavedModel in another process, and the model here.

    The SavedModel gets the user's own files, as the documentation says to give them to it.
    """
    with tempfile.TemporaryDirectory() as folder:
        served, evaluated, decoded, answers = (
            os.path.join(folder, name)
            for name in ('served.tfrecord', 'evaluated.tfrecord', 'decoded.tfrecord', 'answers.npz')
        )
        labels, num_converted = _write_examples(session, served, evaluated, decoded)
        # Without accelerators: they are this process's. Without the caller's paths: the model must
        # need TensorFlow alone.
        environment = {
            **os.environ,
            'CUDA_VISIBLE_DEVICES': '-1',
            'TPU_LOAD_LIBRARY': '0',
            'PYTHONPATH': '',
            'TF_CPP_MIN_LOG_LEVEL': '3',
        }
        reader = subprocess.run(
            [sys.executable, READER, directory, served, decoded, answers],
            env=environment,
            capture_output=True,
            text=True,
        )
        if reader.returncode:
            last_line = (
                reader.stderr.splitlines()
                or [f'status {reader.returncode}, perhaps for want of memory']
            )[-1]
            raise RunError(
                f'the exported model cannot be used with TensorFlow alone: {one_line(last_line)}'
            )
        exported = dict(np.load(answers))
        expected = _expected_logits(session, evaluated)
    num_answered = int(np.isfinite(expected).all(-1).sum())
    if num_answered < len(expected):
        examples = (
            f'{len(expected) - num_answered:,} of {counted(len(expected), "evaluation example")}'
        )
        raise RunError(f'the answers of the model to {examples} are not finite', _diverged(session))

    tolerance = (
        TOLERANCE_TF32
        if (session.kind, session.dtype_policy) == ('GPU', 'float32')
        else TOLERANCE[session.dtype_policy]
    )
    allowed = tolerance * max(1.0, float(np.abs(expected).max()))
    largest = 0.0
    for name, logits in exported.items():
        difference = float(np.abs(logits - expected[: len(logits)]).max())
        if not difference <= allowed:  # also when it is not a number
            raise RunError(
                f'the exported model disagrees with the model: {name} differs by '
                f'{difference:.3g} in a logit '
                f'(allowed {allowed:.3g}); it was left in {directory}'
            )
        largest = max(largest, difference)
    return {
        'export/examples': len(labels),
        'export/accuracy': float(np.mean(exported['classify_encoded'].argmax(-1) == labels)),
        'export/model_accuracy': float(np.mean(expected.argmax(-1) == labels)),
        'export/max_difference': largest,
        'export/converted_examples': num_converted,
    }


def _write_examples(
    session: Session, served: str, evaluated: str, decoded: str
) -> tuple[np.ndarray, int]:
    """Writes TFRecord files of evaluation examples.

    Args:
        served: path of what the exported model gets; of a folder these are the user's own files.
        evaluated: path of what evaluation reads of the same examples.
        decoded: path of the first of them as PNG files without alpha, whose pixels are what
            evaluation sees.

    Returns: labels, int64 [examples]; and how many of the user's files `as_decodable` had to
        convert.
    """
    labels: list[int] = []
    num_converted = 0
    white_level = session.config.dataset.white_level
    with (
        tf.io.TFRecordWriter(served) as questions,
        tf.io.TFRecordWriter(evaluated) as records,
        tf.io.TFRecordWriter(decoded) as pngs,
    ):
        for encoded, original, label in session.source.sample(
            session.source.eval_split, MAX_CHECKED
        ):
            question = encoded
            if original is not None and original != encoded:  # evaluation reads a copy
                question = image_validation.as_decodable(original)
                num_converted += 1
            questions.write(question)
            records.write(encoded)
            if len(labels) < MAX_DECODED:
                pngs.write(tf.io.encode_png(decode(encoded, white_level)).numpy())
            labels.append(label)
    return np.array(labels), num_converted


def _expected_logits(session: Session, evaluated: str) -> np.ndarray:
    """Computes the logits of evaluation for a TFRecord file of images, float32 [files, classes]."""
    config, predict = session.config, steps.make_predict(session.state)

    def decode_file(file: tf.Tensor) -> tf.Tensor:
        image = decode(file, config.dataset.white_level)
        return center_crop_and_resize(image, config.image_size, config.eval_crop)

    images = tf.data.TFRecordDataset(evaluated).map(decode_file, tf.data.AUTOTUNE)
    return np.concatenate([predict(batch).numpy() for batch in images.batch(100)])
