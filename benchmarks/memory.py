"""Host memory of an ImageNet-shaped stream: one epoch of made-up JPEG pictures from TFRecord files,
as training reads it.

    python benchmarks/memory.py [--pictures=100000] [--memory_gib=1]
    [--output=benchmarks/results/memory.json]

The pictures are those of benchmarks/inputs.py, about 80 KB each, again and again: 8 GB on disk, in
a temporary folder. The figure is the largest resident memory of the process while it reads, less
what it had before its first batch.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time

import psutil

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.update(KERAS_BACKEND='tensorflow', TF_CPP_MIN_LOG_LEVEL='2')

SHARDS = 64


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--pictures', type=int, default=100_000)
    parser.add_argument('--memory_gib', type=float, default=1.0)
    parser.add_argument('--output')
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        num_bytes = write_records(folder, options.pictures)
        print(f'{options.pictures:,} pictures, {num_bytes / 1e9:.1f} GB', flush=True)
        report = {
            'pictures': options.pictures,
            'encoded_bytes': num_bytes,
            'budget_bytes': int(options.memory_gib * 2**30),
        }
        report.update(read_epoch(folder, options.memory_gib))
    print(json.dumps(report, indent=1))
    if options.output:
        with open(options.output, 'w') as file:
            json.dump(report, file, indent=1)
    sys.exit(report['peak_bytes_while_reading'] > report['budget_bytes'])


def write_records(folder, pictures):
    """The TFDS data set `made_up` in `folder`; returns the bytes of its training pictures."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    from benchmarks import inputs

    with tempfile.TemporaryDirectory() as jpegs:
        inputs.write_pictures(jpegs, count=256)
        encoded = [tf.io.gfile.GFile(path, 'rb').read() for path in inputs.paths_of(jpegs)]
    features = tfds.features.FeaturesDict(
        {
            'image': tfds.features.Image(encoding_format='jpeg'),
            'label': tfds.features.ClassLabel(num_classes=1000),
        }
    )
    directory = os.path.join(folder, 'made_up', '1.0.0')
    os.makedirs(directory)
    splits, num_bytes = [], {}
    for split, count, shards in (('train', pictures, SHARDS), ('test', 64, 1)):
        template = tfds.core.ShardedFileTemplate(
            data_dir=directory, dataset_name='made_up', split=split, filetype_suffix='tfrecord'
        )
        lengths = [
            count * (index + 1) // shards - count * index // shards for index in range(shards)
        ]
        number = num_bytes[split] = 0
        for index, length in enumerate(lengths):
            with tf.io.TFRecordWriter(
                os.path.join(directory, f'made_up-{split}.tfrecord-{index:05}-of-{shards:05}')
            ) as writer:
                for _ in range(length):
                    picture = encoded[number % len(encoded)]
                    writer.write(
                        features.serialize_example({'image': picture, 'label': number % 1000})
                    )
                    number, num_bytes[split] = number + 1, num_bytes[split] + len(picture)
        splits.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=lengths,
                num_bytes=num_bytes[split],
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features,
        split_infos=splits,
        supervised_keys=('image', 'label'),
    )
    return num_bytes['train']


def read_epoch(folder, memory_gib):
    """Reads one epoch of training batches of 128 at 224 pixels, and watches the memory of this
    process.
    """
    import tensorflow as tf

    from configs import imagenet
    from experiment import planning
    from inputs import datasets, pipeline

    config = imagenet.get_config()
    config.dataset.name = 'made_up'
    config.dataset.data_dir = folder
    config.dataset.eval_split = 'test'
    config.dataset.memory_gib, config.batch_size, config.image_size = memory_gib, 128, 224
    config.train_for, config.schedule.warmup = '1 epochs', '5%'
    source = datasets.load(config.dataset)
    plan = planning.make_plan(config, source.num_train, source.num_eval, len(source.class_names), 1)
    batches = pipeline.training_batches(
        source, config, plan, 0, plan.total_steps, tf.distribute.OneDeviceStrategy('CPU:0')
    )
    before, began, seen = psutil.Process().memory_info().rss, time.perf_counter(), 0
    for images, *_ in batches:
        seen += len(images)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return {
        'pictures_read': seen,
        'seconds': round(time.perf_counter() - began),
        'bytes_before': before,
        'peak_bytes': peak,
        'peak_bytes_while_reading': peak - before,
    }


if __name__ == '__main__':
    main()
