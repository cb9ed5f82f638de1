"""Tries the exported model of a run on images.

    python predict.py RUN [IMAGE ...] [--output=FILE.png]

An IMAGE is a file or a folder of files in any format that training accepts, and is read exactly as
evaluation reads it. Without one, the first examples of the evaluation split are used. It runs on
the CPU, because the accelerator may be in use.
"""

import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from common import console, storage, tpu_environment
from common.commands import ArgumentParser
from common.console import discard_output, import_tensorflow_quietly, tolerate_any_terminal
from common.errors import RunError, UserError, one_line

EXAMPLES = 3  # taken from the evaluation split if no images are given
CLASSES = 5  # most likely classes to show
MAX_DRAWN = 40  # images in one drawing
TITLE_LENGTH = 40  # characters above a drawn image
DRAWN_SIZE = 500  # approximate longer side of a drawn image, in pixels


class Image(NamedTuple):
    """An image to try.

    Attributes:
        title: its name.
        read: returns its bytes as JPEG or PNG, and a warning about possible damage, or ''.
    """

    title: str
    read: Callable[[], tuple[bytes, str]]


class Prediction(NamedTuple):
    """A prediction: (label, probability) pairs, most likely first."""

    title: str
    classes: list[tuple[str, float]]
    pixels: Any  # uint8 [height, width, 3]


def main(arguments: Sequence[str] | None) -> int:
    """Prints the most likely classes of each image and draws them; returns the exit status."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        'run',
        metavar='RUN',
        help='folder of a run that has been exported; may be gs://BUCKET/FOLDER',
    )
    parser.add_argument('images', nargs='*', metavar='IMAGE', help='files, or folders of files')
    parser.add_argument(
        '--output',
        help='PNG file for the drawing; RUN/plots/predictions.png by default',
    )
    options = parser.parse_args(arguments)
    if options.output and not options.output.endswith('.png'):
        parser.error(f'--output={options.output}: write the name of a .png file')
    os.environ.update(tpu_environment.without_accelerators())
    import_tensorflow_quietly()
    try:
        run = (
            os.path.dirname(options.run.rstrip('/'))
            if storage.exists(os.path.join(options.run, 'saved_model.pb'))
            else options.run
        )
        model, labels = load(run)
        images = (
            list(images_from_files(options.images))
            if options.images
            else evaluation_examples(run, labels)
        )
        drawn, num_failed = predict_all(model, labels, images, find_white_level(run))
        if drawn:
            draw(
                options.output or os.path.join(run, 'plots', 'predictions.png'),
                drawn,
                len(images) - num_failed,
            )
    except BrokenPipeError:
        return discard_output()
    except (UserError, OSError) as error:
        console.error(str(error))
        return getattr(error, 'exit_status', 1)
    if num_failed and len(images) > 1:
        console.error(f'{num_failed:,} of {len(images):,} images could not be read')
    return 1 if num_failed else 0


def load(run: str) -> tuple[Any, list[str]]:
    """Returns the SavedModel of a run, and its labels.

    Raises: RunError if it is missing or damaged, or contains operations that do more than compute.
    """
    directory = os.path.join(run, 'export')
    if not storage.exists(run):
        raise RunError(f'{run} does not exist', 'name the folder of a run')
    if not storage.exists(os.path.join(directory, 'saved_model.pb')):
        raise RunError(
            f'{run} has no export',
            'finish training, or repeat its command with --mode=export',
        )
    from modeling import labels_file, saved_model_safety

    try:
        return saved_model_safety.load(directory), labels_file.from_text(
            storage.read(os.path.join(directory, labels_file.NAME)).decode()
        )
    except RunError:
        raise
    except Exception as error:  # the type depends on where it is damaged
        raise RunError(
            f'{directory} is damaged ({type(error).__name__}: {one_line(error, 200)})',
            'export it again',
        ) from error


def find_white_level(run: str) -> int:
    """Returns `config.dataset.white_level` of a run, for drawings.

    Falls back to the default if an export was copied without its config.
    """
    from inputs import image_ops

    has_config = storage.exists(os.path.join(run, 'config.json'))
    return dataset_config(run)['white_level'] if has_config else image_ops.WHITE_LEVEL


def dataset_config(run: str) -> dict:
    """Returns `config.dataset` of a run, with defaults for keys that an older run lacks.

    Raises: RunError if config.json is missing or was not written by a run.
    """
    from configs import default

    path = os.path.join(run, 'config.json')
    dataset = storage.read_json(path).get('dataset')
    if not isinstance(dataset, dict):
        raise RunError(f'{path} has no section dataset', 'copy it from the run again')
    defaults = default.get_config().dataset.to_dict()
    for key, value in defaults.items():
        kinds = (int, float) if isinstance(value, float) else type(value)
        if not isinstance(dataset.get(key, value), kinds):
            raise RunError(
                f'{path} has dataset.{key}={dataset[key]!r}', 'copy it from the run again'
            )
    return defaults | dataset


def images_from_files(paths: list[str]) -> Iterator[Image]:
    """Yields the given files, and those in the given folders that have an image extension."""
    from inputs import image_folder, image_validation

    def refuse_empty() -> NoReturn:
        raise RunError('the folder contains no file with an image extension, such as .jpg')

    def read(path: str) -> tuple[bytes, str]:
        found = image_validation.decodable(image_validation.read(path))
        return found.content, found.doubt

    for path in paths:
        if not storage.is_folder(path):
            yield Image(console.printable(path), functools.partial(read, path))
            continue
        below = list(image_folder.image_paths(path))
        if not below:
            yield Image(console.printable(path), refuse_empty)
        for name in below:
            yield Image(
                console.printable(os.path.join(path, name)),
                functools.partial(read, os.path.join(path, name)),
            )


def evaluation_examples(run: str, labels: Sequence[str]) -> list[Image]:
    """Returns the first examples of the run's evaluation split, as `Image`.

    Raises: RunError if TFDS would have to download and run third-party code for them, because the
        run may come from someone else.
    """
    from ml_collections import ConfigDict

    from inputs import datasets

    dataset = ConfigDict(dataset_config(run))
    has_namespace = re.match(r'[\w-]+:[a-zA-Z]', dataset.name)  # a version begins with a digit
    if has_namespace:
        raise RunError(
            f'{run} was evaluated on {dataset.name}, for which TFDS downloads and runs third-party '
            'code',
            'name image files to try instead',
        )
    source = datasets.load(dataset, needs_training=False)
    examples = source.examples(source.eval_split).take(EXAMPLES).as_numpy_iterator()
    return [
        Image(
            f'evaluation example {number} (true label {console.printable(labels[label])})',
            functools.partial(_unchanged, encoded),
        )
        for number, (encoded, label) in enumerate(examples)
    ]


def _unchanged(encoded: bytes) -> tuple[bytes, str]:
    return encoded, ''


def predict_all(
    model: Any, labels: list[str], images: list[Image], white_level: int
) -> tuple[list[Prediction], int]:
    """Prints a prediction for each image, or why it cannot be read.

    Returns: the predictions to draw (the first ones); the number of images that cannot be read.
    """
    from inputs import image_validation

    drawn: list[Prediction] = []
    num_failed = 0
    for image in images:
        try:
            encoded, doubt = image.read()
            answer = classify(model, labels, image.title, encoded, white_level)
        except (UserError, image_validation.Broken, OSError) as error:
            num_failed += 1
            console.error(f'{image.title}: {why_unreadable(error)}')
            continue
        if doubt:
            advice = 'check it, and copy it again from the original if part of it is grey'
            console.warning(f'warning: {image.title} may be damaged ({doubt}): {advice}')
        likely = ', '.join(
            f'{console.printable(label)} {probability:.1%}' for label, probability in answer.classes
        )
        console.line(f'{image.title}: {likely}')
        if len(drawn) < MAX_DRAWN:
            drawn.append(answer)
    return drawn, num_failed


def why_unreadable(error: Exception) -> str:
    """Returns why an image cannot be read, without the file name."""
    return one_line(getattr(error, 'strerror', None) or error)


def classify(
    model: Any, labels: list[str], title: str, encoded: bytes, white_level: int = 2**16 - 1
) -> Prediction:
    """Asks the model about a JPEG or PNG file.

    Args:
        white_level: white in 16-bit files, used for the drawing only; the model has its own.

    Raises: RunError if it cannot be decoded.
    """
    import tensorflow as tf

    from inputs import image_ops

    try:
        answer = model.signatures['classify_encoded'](encoded=tf.constant([encoded]))
        pixels = image_ops.decode(encoded, white_level).numpy()
    except tf.errors.OpError as error:
        raise RunError('the model cannot decode this file') from error
    probabilities = answer['probabilities'][0].numpy()  # [classes]
    likely = [
        (labels[index], float(probabilities[index]))
        for index in (-probabilities).argsort()[:CLASSES]
    ]
    stride = max(1, max(pixels.shape) // DRAWN_SIZE)
    return Prediction(title, likely, pixels[::stride, ::stride])


def draw(path: str, answers: list[Prediction], num_answers: int) -> None:
    """Draws images with their most likely classes, and prints the path of the drawing."""
    from outputs import plots

    titles = [shorten_left(plots.drawable(answer.title)) for answer in answers]
    plots.plot_predictions(
        path, [answer.pixels for answer in answers], titles, [answer.classes for answer in answers]
    )
    drawn = f'the first {len(answers)} of {num_answers:,}' if len(answers) < num_answers else 'them'
    console.line(f'drew {drawn} in {path}')


def shorten_left(title: str) -> str:
    """Shortens a title from the left: the end of a path says most."""
    return title if len(title) <= TITLE_LENGTH else '...' + title[3 - TITLE_LENGTH :]


if __name__ == '__main__':
    tolerate_any_terminal()
    sys.exit(main(sys.argv[1:]))
