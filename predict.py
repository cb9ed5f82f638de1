"""Tries the exported model of a run on pictures: python predict.py RUN [PICTURE ...] [--output=FILE.png]

Without PICTURE it takes the first of the evaluation split. It computes on the processor: an accelerator may be in use.
"""
import argparse
import os
import re
import sys

from devices import tpu_environment
from errors import RunError, UserError, one_line
from main import import_tensorflow_quietly
from outputs import files

EXAMPLES = 3  # of the evaluation split
CLASSES = 5  # the most likely of them are shown


def main(arguments):
    """Prints the most likely classes of each picture and draws them; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('run', metavar='RUN', help='folder of a run with its export, or gs://BUCKET/FOLDER')
    parser.add_argument('pictures', nargs='*', metavar='PICTURE', help='JPEG or PNG files')
    parser.add_argument('--output', help='where the pictures and their classes are drawn; RUN/plots/predictions.png by default')
    options = parser.parse_args(arguments)
    if options.output and not options.output.endswith('.png'):
        parser.error(f'--output={options.output}: write the name of a .png file')
    os.environ.update(tpu_environment.without_accelerators())
    import_tensorflow_quietly()
    try:
        run = os.path.dirname(options.run.rstrip('/')) if files.exists(os.path.join(options.run, 'saved_model.pb')) else options.run
        model, labels = load(run)
        examples = read(options.pictures) if options.pictures else evaluation_examples(run, labels)
        answers, images = zip(*(classify(model, labels, title, encoded) for title, encoded in examples))
        for (title, _), answer in zip(examples, answers):
            print(f'{title}: {", ".join(f"{label} {probability:.1%}" for label, probability in answer)}')
        from outputs.plots import plot_answers

        output = options.output or os.path.join(run, 'plots', 'predictions.png')
        plot_answers(output, images, [title for title, _ in examples], answers)
        print(f'drawn in {output}')
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


def load(run):
    """(the SavedModel of a run, its labels). Raises RunError if there is none, it is damaged, or it can do more than compute."""
    directory = os.path.join(run, 'export')
    if not files.exists(os.path.join(directory, 'saved_model.pb')):
        raise RunError(f'{run} has no export: train it to its end, or python main.py --config=... --workdir={run} --mode=export')
    from modeling import labels_file, saved_model

    try:
        return saved_model.load(directory), labels_file.from_text(files.read(os.path.join(directory, labels_file.NAME)).decode())
    except RunError:
        raise
    except Exception as error:  # of many kinds, by where it is damaged
        raise RunError(f'{directory} is damaged ({type(error).__name__}: {one_line(error, 200)}): export it again') from error


def read(paths):
    """[(name, content)] of files."""
    return [(os.path.basename(path), files.read(path)) for path in paths]


def evaluation_examples(run, labels):
    """[(what is right, encoded picture)] of the first examples of the run's evaluation split.

    Raises: RunError if TFDS would have to run code for them that is not its own: a run can be somebody else's.
    """
    from ml_collections import ConfigDict

    from inputs import datasets

    dataset = ConfigDict(files.read_json(os.path.join(run, 'config.json'))).dataset
    if re.match(r'[\w-]+:[a-zA-Z]', dataset.name):  # a namespace of TFDS; a version begins with a digit
        raise RunError(f'{run} was evaluated on {dataset.name}, for which TFDS downloads code and runs it: give the pictures to try')
    source = datasets.load(dataset, needs_training=False)
    examples = source.examples(source.eval_split).take(EXAMPLES).as_numpy_iterator()
    return [(f'evaluation example {number}, which is {labels[label]}', encoded) for number, (encoded, label) in enumerate(examples)]


def classify(model, labels, title, encoded):
    """([(label, probability)], the most likely first; the picture, uint8 [height, width, 3]). Raises RunError if it cannot be decoded."""
    import tensorflow as tf

    try:
        answer = model.signatures['classify_encoded'](encoded=tf.constant([encoded]))
        image = tf.io.decode_image(encoded, channels=3, expand_animations=False).numpy()
    except tf.errors.OpError as error:
        raise RunError(f'{title} is no picture that the model can decode: give it JPEG or PNG files') from error
    probabilities = answer['probabilities'][0].numpy()  # [classes]
    return [(labels[index], float(probabilities[index])) for index in (-probabilities).argsort()[:CLASSES]], image


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
