"""Exports a SavedModel: images in, classes out, preprocessing inside.

The export is verified in a fresh process with TensorFlow alone, without Keras.
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

MAX_COMPARED = 1000  # evaluation examples that the two models are compared on
MAX_DECODED = 8  # of these that are also passed decoded, one by one: their sizes differ
# Largest allowed logit difference, as a fraction of the largest logit: a few rounding errors of the
# compute dtype.
TOLERANCE = {'float64': 1e-6, 'float32': 1e-4, 'mixed_bfloat16': 5e-2, 'mixed_float16': 1e-2}
# For float32 on a GPU: TensorFlow uses TF32 there, whose 10-bit mantissa is that of float16.
TOLERANCE_TF32 = 1e-2
VERIFIER = os.path.join(
    os.path.dirname(os.path.abspath(__file__)), 'outputs', 'read_saved_model.py'
)


def run(config: ConfigDict, workdir: str, which: str | None = None) -> dict[str, Any] | None:
    """Exports a checkpoint of `workdir` into `workdir`/export, and verifies it.

    Args:
        which: 'last', 'best', or None for the checkpoint that training would export.
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
        _correct_summary(workdir, {**exported, **export_metrics(progress, step)})
        report.note_export(workdir, weights)
    exported = {'export/checkpoint': which, **exported}
    console.line(storage.as_json(exported))
    return exported


def exports_best(config: ConfigDict) -> bool:
    """Returns whether training exports the best checkpoint instead of the last."""
    return bool(config.patience)


def restore(session: Session, which: str | None = None) -> tuple[int, dict, str]:
    """Restores the weights to export.

    If training exports the best but that is missing, restores the last.

    Returns: (their step, the `progress` saved with them, 'last' or 'best').
    """
    if which is None and exports_best(session.config):
        try:
            return *session.checkpoints.restore('best', allow_extra=True), 'best'
        except (RunError, tf.errors.OpError) as error:
            if session.is_chief:
                console.note(f'{one_line(error)}; exporting the weights of the last update instead')
    which = which or 'last'
    return *session.checkpoints.restore(which, allow_extra=True), which


def describe(config: ConfigDict, step: int, last_step: int | None) -> str:
    """Describes which weights are exported, and how to export others."""
    weights = f'the weights after update {step:,}'
    if step == last_step:
        return f'{weights}, the last'
    weights = f'{weights}, the best by {config.best_metric}'
    if not exports_best(config):
        return weights
    return (
        f'{weights} because config.patience is set; --mode=export --checkpoint=last exports those '
        f'after update {last_step or 0:,}'
    )


def export_metrics(progress: dict, step: int) -> dict:
    """Returns the metrics of the evaluation after update `step`, over the whole split.

    Args:
        progress: the fields of `outputs.train_progress.Progress` at that step.

    Returns: {'export/eval_accuracy', 'export/eval_loss', 'export/eval_top5'}; None where that
        update was not evaluated.
    """
    metrics = storage.nan_for_null(progress['metrics']) if progress['evaluated_at'] == step else {}
    return {
        f'export/eval_{name}': metrics.get(f'eval/{name}') for name in ('accuracy', 'loss', 'top5')
    }


def _correct_summary(workdir: str, exported: dict) -> None:
    """Updates the export's entries in summary.json."""
    path = os.path.join(workdir, SUMMARY)
    storage.write_json(path, {**storage.read_json(path), **exported})


def write(session: Session, directory: str) -> dict[str, Any]:
    """Writes the SavedModel and verifies it against the model on evaluation examples.

    Each signature takes images of any size, and crops and resizes them as evaluation does:
        classify, serving_default: uint8 [batch, height, width, 3].
        classify_float: float32 in 0..255, of the same shape.
        classify_encoded: JPEG or PNG files, string [batch].
    Each returns `logits` and `probabilities`, float32 [batch, classes]; `class_index`, int64
    [batch]; and `label`, string [batch]. Two more signatures:
        label_names: returns all labels.
        logits: the bare model, float32 [batch, image_size, image_size, 3] in 0..255 -> [batch,
            classes], for use as a teacher.

    In 16-bit images white is `config.dataset.white_level` of the run. A graph can blend a
    transparent PNG onto white, and does, but it cannot apply EXIF rotation or read other formats:
    `inputs.image_validation.as_decodable` converts any file that training accepts into one that
    `classify_encoded` reads as evaluation does.

    For a model of keras.applications, backbone.weights.h5 in the same folder holds all weights but
    the head's, in that library's format.

    Returns:
        'export/examples': number compared, evenly spaced through the split; 'export/accuracy' of
        the exported model on them, 'export/model_accuracy' of the model itself;
        'export/max_difference' of a logit; 'export/converted_examples': the user's files that
        `as_decodable` had to convert.

    Raises: RunError if its outputs differ from the model's, or if the outputs or weights are not
        finite; `directory` is then left as it was.
    """
    _require_finite(session)
    with storage.atomic_directory(directory) as partial:
        with storage.one_line_errors(partial):
            _write_saved_model(session, partial)
        storage.write(
            os.path.join(partial, labels_file.NAME), labels_file.to_text(session.source.class_names)
        )
        return _verify(session, partial)


def _require_finite(session: Session) -> None:
    """Raises RunError if a weight that evaluation uses is not finite: the model has diverged."""
    variables = models.float_variables(session.state.model)
    for variable, value in zip(variables, steps.evaluated_weights(session.state), strict=True):
        if not np.isfinite(value.numpy()).all():
            raise RunError(
                f'some weights are not finite, such as {variable.path}', _divergence_fix(session)
            )


def _divergence_fix(session: Session) -> str:
    best = (
        'export its best checkpoint with --mode=export --checkpoint=best, or '
        if session.checkpoints.has_best()
        else ''
    )
    return (
        f'the model has diverged: {best}train anew with a lower config.schedule.peak_lr or '
        'with config.grad_clip_norm'
    )


@tf.autograph.experimental.do_not_convert
def _write_saved_model(session: Session, directory: str) -> None:
    """Rebuilds the model, with the weights that evaluation uses, and writes it.

    No strategy is involved.
    """
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

    images_spec = tf.TensorSpec([None, *model.input_shape[1:]], tf.float32, name='images')

    # A function, so that the model is traced and stored once, not for each signature.
    @tf.function(input_signature=[images_spec], autograph=False)
    def predict(images: tf.Tensor) -> tf.Tensor:
        return model(images, training=False)

    def answer(images: tf.Tensor) -> dict[str, tf.Tensor]:
        logits = predict(tf.cast(images, tf.float32))  # [batch, classes]
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
    archive.add_endpoint('logits', predict, [images_spec])
    archive.add_endpoint('label_names', lambda: names, [])
    archive.write_out(directory, verbose=False)


def _verify(session: Session, directory: str) -> dict[str, Any]:
    """Compares the SavedModel, run in another process, with the model here on evaluation examples.

    The SavedModel gets the user's original files, prepared as the documentation tells users to.
    """
    with tempfile.TemporaryDirectory() as folder:
        served, evaluated, decoded, answers = (
            os.path.join(folder, name)
            for name in ('served.tfrecord', 'evaluated.tfrecord', 'decoded.tfrecord', 'answers.npz')
        )
        labels, num_converted = _write_examples(session, served, evaluated, decoded)
        # No accelerators, because this process holds them. No PYTHONPATH, because the model must
        # need only TensorFlow.
        environment = {
            **os.environ,
            'CUDA_VISIBLE_DEVICES': '-1',
            'TPU_LOAD_LIBRARY': '0',
            'PYTHONPATH': '',
            'TF_CPP_MIN_LOG_LEVEL': '3',
        }
        reader = subprocess.run(
            [sys.executable, VERIFIER, directory, served, decoded, answers],
            env=environment,
            capture_output=True,
            text=True,
        )
        if reader.returncode:
            last_line = (
                reader.stderr.splitlines()
                or [f'exit status {reader.returncode}, perhaps out of memory']
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
        problem = f"the model's logits are not finite for {examples}"
        raise RunError(problem, _divergence_fix(session))

    tolerance = (
        TOLERANCE_TF32
        if (session.kind, session.dtype_policy) == ('GPU', 'float32')
        else TOLERANCE[session.dtype_policy]
    )
    allowed = tolerance * max(1.0, float(np.abs(expected).max()))
    largest = 0.0
    for name, logits in exported.items():
        difference = float(np.abs(logits - expected[: len(logits)]).max())
        if not difference <= allowed:  # also true for NaN
            raise RunError(
                f'the exported model disagrees with the trained model: a logit of {name} differs '
                f'by {difference:.3g} (allowed {allowed:.3g}); the export was left in {directory}'
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
        served: file to write: what the exported model gets; for a folder data set, the user's
            original files.
        evaluated: file to write: the same examples as evaluation reads them.
        decoded: file to write: the first MAX_DECODED of them as PNG without alpha, with the pixels
            that evaluation sees.

    Returns: labels, int64 [examples]; and how many of the user's files `as_decodable` had to
        convert.
    """
    labels: list[int] = []
    num_converted = 0
    white_level = session.config.dataset.white_level
    with (
        tf.io.TFRecordWriter(served) as requests,
        tf.io.TFRecordWriter(evaluated) as records,
        tf.io.TFRecordWriter(decoded) as pngs,
    ):
        for encoded, original, label in session.source.sample(
            session.source.eval_split, MAX_COMPARED
        ):
            request = encoded
            if original is not None and original != encoded:  # evaluation reads a converted copy
                request = image_validation.as_decodable(original)
                num_converted += 1
            requests.write(request)
            records.write(encoded)
            if len(labels) < MAX_DECODED:
                pngs.write(tf.io.encode_png(decode(encoded, white_level)).numpy())
            labels.append(label)
    return np.array(labels), num_converted


@tf.autograph.experimental.do_not_convert
def _expected_logits(session: Session, evaluated: str) -> np.ndarray:
    """Returns the trained model's logits, float32 [files, classes], for a TFRecord of images."""
    config, predict = session.config, steps.make_predict(session.state)

    def decode_file(file: tf.Tensor) -> tf.Tensor:
        image = decode(file, config.dataset.white_level)
        return center_crop_and_resize(image, config.image_size, config.eval_crop)

    images = tf.data.TFRecordDataset(evaluated).map(decode_file, tf.data.AUTOTUNE)
    return np.concatenate([predict(batch).numpy() for batch in images.batch(100)])
