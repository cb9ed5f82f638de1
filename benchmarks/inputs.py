"""Training pictures per second on the host: this pipeline beside the usual ones, from JPEG files.

    python benchmarks/inputs.py [--pictures=500x375,1600x1200] [--seconds=4] [--rounds=7]
        [--torch_python=PYTHON] [--output=benchmarks/results/inputs.json]

ours                  inputs/pipeline.py: random crop while decoding, uint8; flips are the device's
usual                 tf.data: decode all, crop, resize with antialiasing, flip, float32, normalise
usual, aliased        the same without antialiasing
keras                 image_dataset_from_directory: decode and resize all, without antialiasing,
                      float32; crops and flips are left to layers of the model
torchvision, PIL      ImageFolder and DataLoader, a worker for each core: RandomResizedCrop, flip,
                      normalise
torchvision, tensors  the same with torchvision's own decoder and transforms.v2 on uint8 tensors
decoding              decode whole pictures and do nothing with them: a bound for all who do that
kernels               TensorFlow's kernels that `ours` needs and nothing else: decode a window of a
                      file in memory, resize it by the box filter; a bound for `ours`

The pictures are made from scikit-learn's two sample photographs. Each peer has a process of its own
and all take turns: while one runs the others are stopped by a signal, workers and threads that read
ahead included. The figures are medians over the rounds: of the speeds, and of the ratio to `ours`
within a round, because a machine's speed drifts. torchvision need not be in the environment of this
program: --torch_python names an interpreter that has it.
"""

import argparse
import functools
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from benchmarks import turns  # noqa: E402

SIZE, BATCH_SIZE, PICTURES = 224, 64, 1024
PIXELS = (500, 375)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--pictures', type=sizes, default='500x375,1600x1200', help='sizes')
    parser.add_argument('--seconds', type=float, default=4.0)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--torch_python', help='an interpreter with torchvision; default: this one')
    parser.add_argument('--output')
    parser.add_argument('--peer', choices=PEERS, help=argparse.SUPPRESS)  # how one is started
    parser.add_argument('--folder', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        turns.take(PEERS[options.peer](options.folder))
        return
    pythons = interpreters(options.torch_python)
    report = {'cpu_cores': os.cpu_count(), 'rounds': options.rounds, 'seconds': options.seconds}
    report['image_size'] = SIZE
    report['pictures'] = {}
    for width, height in options.pictures:
        with tempfile.TemporaryDirectory() as folder:
            measured = measure((width, height), pythons, options.rounds, options.seconds, folder)
        report['pictures'][f'{width}x{height}'] = measured
    if options.output:
        with open(options.output, 'w') as file:
            json.dump(report, file, indent=1)


def sizes(text: str) -> list[tuple[int, int]]:
    """Returns [(width, height)] of '500x375,1600x1200'."""
    return [tuple(int(side) for side in pixels.split('x')) for pixels in text.split(',')]


def interpreters(torch_python: str | None) -> dict[str, str]:
    """Returns {peer: the Python that runs it}, without torchvision's where no Python has it."""
    python = torch_python or sys.executable
    tried = subprocess.run([python, '-c', 'import torchvision'], capture_output=True)
    found = tried.returncode == 0
    if torch_python and not found:
        sys.exit(f'error: {torch_python} cannot import torchvision')
    if not found:
        print(
            'torchvision is not installed: left out; '
            '--torch_python names an interpreter that has it'
        )
    pythons = {}
    for name in PEERS:
        if not name.startswith('torchvision'):
            pythons[name] = sys.executable
        elif found:
            pythons[name] = python
    return pythons


def measure(
    pixels: tuple[int, int], pythons: dict[str, str], rounds: int, seconds: float, folder: str
) -> dict:
    """Lets all peers take turns on pictures of one size, (width, height), made in `folder`.

    Returns: what the report says of them.
    """
    as_large = PIXELS[0] * PIXELS[1] / (pixels[0] * pixels[1])
    count = round(PICTURES * min(1.0, as_large))
    mean_bytes = write_pictures(os.path.join(folder, 'pictures'), count, pixels)
    kilobytes = mean_bytes / 1000
    print(f'{count} JPEG files of {pixels[0]}x{pixels[1]} pixels, {kilobytes:.0f} KB on average')
    found = turns.measure(
        {name: command_of(name, python, folder) for name, python in pythons.items()},
        rounds,
        seconds,
        environment(folder),
    )
    streams = {}
    for name, measured in found.items():
        speed = statistics.median(measured.speeds)
        ratio, *_ = turns.ratio(found['ours'].speeds, measured.speeds)
        streams[name] = {'pictures_per_second': round(speed), 'ours_divided_by_it': round(ratio, 3)}
        print(f'{name:21} {speed:6,.0f} pictures/s   ours / it {ratio:.2f}', flush=True)
    return {'files': count, 'mean_bytes': round(mean_bytes), 'streams': streams}


def command_of(name: str, python: str, folder: str) -> list[str]:
    pictures = os.path.join(folder, 'pictures')
    return [python, os.path.abspath(__file__), f'--peer={name}', f'--folder={pictures}']


def environment(folder: str) -> dict[str, str]:
    return turns.ENVIRONMENT | {'TFDS_DATA_DIR': os.path.join(folder, 'tfds')}


def write_pictures(folder, count=PICTURES, pixels=PIXELS):
    """Writes FOLDER/train/CLASS/*.jpg and one test picture for each class.

    Those wider than 500 pixels are put together from several, for the detail of a photograph.

    Returns: their mean size in bytes.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    random, num_bytes = np.random.RandomState(0), []
    parts = -(-pixels[0] // PIXELS[0])  # along each side
    width, height = pixels[0] // parts, pixels[1] // parts
    for index in range(count + 2):
        picture = Image.new('RGB', (parts * width, parts * height))
        for place in range(parts**2):
            part = random_part(photographs[(index + place) % 2], random)
            part = part.resize((width, height), Image.LANCZOS)
            picture.paste(part, (place % parts * width, place // parts * height))
        buffer = io.BytesIO()
        picture.save(buffer, 'JPEG', quality=95)
        split = 'train' if index < count else 'test'
        path = os.path.join(folder, split, f'class{index % 2}', f'{index}.jpg')
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as file:
            file.write(buffer.getvalue())
        num_bytes.append(len(buffer.getvalue()))
    return float(np.mean(num_bytes))


def random_part(photograph, random):
    """Cuts a window of aspect 4:3, at least 400 pixels wide, out of a PIL image."""
    width = random.randint(400, photograph.height * 4 // 3)
    height = width * 3 // 4
    left = random.randint(photograph.width - width + 1)
    top = random.randint(photograph.height - height + 1)
    return photograph.crop((left, top, left + width, top + height))


def paths_of(folder):
    return sorted(
        os.path.join(root, name)
        for root, _, names in os.walk(os.path.join(folder, 'train'))
        for name in names
    )


def ours(folder):
    sys.path.insert(0, ROOT)
    import tensorflow as tf

    from configs import folder as config_file
    from experiment import planning
    from inputs import datasets, pipeline

    config = config_file.get_config()
    config.dataset.data_dir, config.image_size, config.batch_size = folder, SIZE, BATCH_SIZE
    config.train_for, config.augment.crop_area = '100_000 epochs', (0.08, 1.0)
    source = datasets.load(config.dataset)
    plan = planning.make_plan(config, source.num_train, source.num_eval, len(source.class_names), 1)
    for images, *_ in pipeline.training_batches(
        source, config, plan, 0, plan.total_steps, tf.distribute.OneDeviceStrategy('CPU:0')
    ):
        yield len(images)


def usual(folder, antialias=True):
    import tensorflow as tf

    def picture(path):
        image = tf.image.decode_jpeg(tf.io.read_file(path), channels=3)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.shape(image),
            tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
        )
        image = tf.image.resize(tf.slice(image, begin, extent), (SIZE, SIZE), antialias=antialias)
        return (
            tf.image.random_flip_left_right(tf.ensure_shape(image, (SIZE, SIZE, 3))) / 255 - MEAN
        ) / DEVIATION

    paths = tf.data.Dataset.from_tensor_slices(paths_of(folder)).shuffle(PICTURES).repeat()
    for images in paths.map(picture, tf.data.AUTOTUNE).batch(BATCH_SIZE).prefetch(tf.data.AUTOTUNE):
        yield len(images)


def keras_directory(folder):
    import keras
    import tensorflow as tf

    pictures = keras.utils.image_dataset_from_directory(
        os.path.join(folder, 'train'),
        image_size=(SIZE, SIZE),
        batch_size=BATCH_SIZE,
        verbose=False,
    )
    for images, _ in pictures.repeat().prefetch(tf.data.AUTOTUNE):
        yield len(images)


def decoding(folder):
    import tensorflow as tf

    paths = tf.data.Dataset.from_tensor_slices(paths_of(folder)).shuffle(PICTURES).repeat()
    corners = paths.map(
        lambda path: tf.image.decode_jpeg(tf.io.read_file(path), channels=3)[0, 0], tf.data.AUTOTUNE
    )
    for corner in corners.batch(BATCH_SIZE).prefetch(tf.data.AUTOTUNE):
        yield len(corner)


def kernels(folder):
    """A thread for each core computes pictures of random windows, and throws them away."""
    import concurrent.futures

    import tensorflow as tf

    sys.path.insert(0, ROOT)
    from inputs import augment

    files = []
    for path in paths_of(folder):
        with open(path, 'rb') as file:
            files.append(file.read())
    encoded = tf.constant(files)

    def picture(index):
        content = tf.gather(encoded, index)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(content),
            tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
        )
        window = augment.decode_jpeg_window(content, begin[:2], extent[:2], SIZE)
        return tf.image.resize(window, (SIZE, SIZE), method='area')[0, 0]

    @tf.function
    def batch():
        indices = tf.random.uniform([BATCH_SIZE], maxval=len(files), dtype=tf.int32)
        corners = tf.map_fn(picture, indices, fn_output_signature=tf.float32, parallel_iterations=1)
        return tf.reduce_sum(corners)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        running = [pool.submit(batch) for _ in range(2 * os.cpu_count())]
        while True:
            running.pop(0).result().numpy()
            running.append(pool.submit(batch))
            yield BATCH_SIZE


def torchvision_pil(folder):
    from torchvision import datasets, transforms

    change = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, DEVIATION),
        ]
    )
    return torch_batches(datasets.ImageFolder(os.path.join(folder, 'train'), change))


def torchvision_tensors(folder):
    import torch
    from torchvision import datasets, io
    from torchvision.transforms import v2

    change = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, DEVIATION),
        ]
    )

    def load(path):
        return io.decode_image(path, io.ImageReadMode.RGB)

    return torch_batches(datasets.ImageFolder(os.path.join(folder, 'train'), change, loader=load))


def torch_batches(dataset) -> Iterator[int]:
    """Reads a torchvision data set with a worker for each core.

    The sampler knows no epochs: workers would wait for each other at the end of each.
    """
    from torch.utils import data

    sampler = data.RandomSampler(dataset, replacement=True, num_samples=10**9)
    loader = data.DataLoader(dataset, BATCH_SIZE, sampler=sampler, num_workers=os.cpu_count())
    for images, _ in loader:
        yield len(images)


PEERS = {
    'ours': ours,
    'usual': usual,
    'usual, aliased': functools.partial(usual, antialias=False),
    'keras': keras_directory,
    'torchvision, PIL': torchvision_pil,
    'torchvision, tensors': torchvision_tensors,
    'decoding': decoding,
    'kernels': kernels,
}


if __name__ == '__main__':
    main()
