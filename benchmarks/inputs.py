"""Training pictures per second on the host: this pipeline beside the usual ones, from JPEG files of 500x375 pixels.

    python benchmarks/inputs.py [--seconds=4] [--rounds=7] [--output=benchmarks/results/inputs.json]

ours           inputs/pipeline.py: random crop while decoding, uint8; flips wait for the device
usual          tf.data: decode all, crop, resize, flip, float32, normalise
torchvision    DataLoader with RandomResizedCrop, a flip and normalisation, one worker for each core; where it is installed
decoding       decode each whole picture and do nothing with it: what no pipeline of whole pictures can pass

The pictures are made from scikit-learn's two sample photographs. All take turns in one process, and the figures are
medians over the rounds: of the speeds, and of the ratio to `ours` within a round, because a machine's speed drifts.
"""
import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SIZE, BATCH_SIZE, PICTURES = 224, 64, 1024
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--seconds', type=float, default=4.0)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--output')
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mean_bytes = write_pictures(folder)
        print(f'{PICTURES} JPEG files of 500x375 pixels, {mean_bytes / 1000:.0f} KB on average', flush=True)
        streams = {'ours': ours(folder), 'usual': usual(folder), 'decoding': decoding(folder)}
        try:
            streams['torchvision'] = torchvision(folder)
        except ImportError:
            print('torchvision is not installed: left out')
        speeds = {name: [] for name in streams}
        for _ in range(options.rounds + 1):  # the first one warms up
            for name, stream in streams.items():
                speeds[name].append(pictures_per_second(stream, options.seconds))
    report = {}
    for name, measured in speeds.items():
        ratios = [other / one for one, other in zip(measured[1:], speeds['ours'][1:])]
        report[name] = {'pictures_per_second': round(statistics.median(measured[1:])), 'ours_divided_by_it': round(statistics.median(ratios), 3)}
        print(f'{name:12} {report[name]["pictures_per_second"]:6,} pictures/s   ours / it {report[name]["ours_divided_by_it"]:.2f}')
    if options.output:
        with open(options.output, 'w') as file:
            json.dump({'cpu_cores': os.cpu_count(), 'mean_bytes': round(mean_bytes), 'rounds': options.rounds, 'streams': report}, file, indent=1)


def write_pictures(folder, count=PICTURES):
    """FOLDER/train/CLASS/*.jpg and one test picture for each class; returns their mean size in bytes."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    random, sizes = np.random.RandomState(0), []
    for index in range(count + 2):
        photograph = photographs[index % 2]
        width = random.randint(400, photograph.height * 4 // 3)
        height = width * 3 // 4
        left, top = random.randint(photograph.width - width + 1), random.randint(photograph.height - height + 1)
        buffer = io.BytesIO()
        photograph.crop((left, top, left + width, top + height)).resize((500, 375), Image.LANCZOS).save(buffer, 'JPEG', quality=95)
        path = os.path.join(folder, 'train' if index < count else 'test', f'class{index % 2}', f'{index}.jpg')
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as file:
            file.write(buffer.getvalue())
        sizes.append(len(buffer.getvalue()))
    return float(np.mean(sizes))


def paths_of(folder):
    return sorted(os.path.join(root, name) for root, _, names in os.walk(os.path.join(folder, 'train')) for name in names)


def pictures_per_second(stream, seconds):
    """Of one of the endless streams of (number of pictures), over `seconds`."""
    next(stream)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        count += next(stream)
    return count / (time.perf_counter() - began)


def ours(folder):
    sys.path.insert(0, ROOT)
    os.environ.update(KERAS_BACKEND='tensorflow', TF_CPP_MIN_LOG_LEVEL='2')
    import tensorflow as tf

    import plan as planning
    from configs import folder as config_file
    from inputs import datasets, pipeline

    config = config_file.get_config()
    config.dataset.data_dir, config.image_size, config.batch_size = folder, SIZE, BATCH_SIZE
    config.train_for, config.augment.crop_area = '100_000 epochs', (0.08, 1.0)
    source = datasets.load(config.dataset)
    plan = planning.make_plan(config, source.num_train, source.num_eval, len(source.class_names), 1)
    for images, *_ in pipeline.training_batches(source, config, plan, 0, plan.total_steps, tf.distribute.OneDeviceStrategy('CPU:0')):
        yield len(images)


def usual(folder):
    import tensorflow as tf

    def picture(path):
        image = tf.image.decode_jpeg(tf.io.read_file(path), channels=3)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.shape(image), tf.constant([[[0.0, 0.0, 1.0, 1.0]]]), min_object_covered=0.0, aspect_ratio_range=(3 / 4, 4 / 3), area_range=(0.08, 1.0))
        image = tf.image.resize(tf.slice(image, begin, extent), (SIZE, SIZE))
        return (tf.image.random_flip_left_right(tf.ensure_shape(image, (SIZE, SIZE, 3))) / 255 - MEAN) / DEVIATION

    paths = tf.data.Dataset.from_tensor_slices(paths_of(folder)).shuffle(PICTURES).repeat()
    for images in paths.map(picture, tf.data.AUTOTUNE).batch(BATCH_SIZE).prefetch(tf.data.AUTOTUNE):
        yield len(images)


def decoding(folder):
    import tensorflow as tf

    paths = tf.data.Dataset.from_tensor_slices(paths_of(folder)).shuffle(PICTURES).repeat()
    corners = paths.map(lambda path: tf.image.decode_jpeg(tf.io.read_file(path), channels=3)[0, 0], tf.data.AUTOTUNE)
    for corner in corners.batch(BATCH_SIZE).prefetch(tf.data.AUTOTUNE):
        yield len(corner)


def torchvision(folder):
    import torch
    from torchvision import datasets, transforms

    change = transforms.Compose([transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                                 transforms.Normalize(MEAN, DEVIATION)])
    loader = torch.utils.data.DataLoader(datasets.ImageFolder(os.path.join(folder, 'train'), change), BATCH_SIZE, shuffle=True,
                                         num_workers=os.cpu_count(), persistent_workers=True, drop_last=True)

    def batches():
        while True:
            for images, _ in loader:
                yield len(images)

    return batches()


if __name__ == '__main__':
    main()
