"""What the TPU compiler estimates for the shipped configs, on four chips of v5e, on four of v6e,
and on two hosts of v5e.

    python benchmarks/preflight.py [--configs imagenet digits] [--topologies v5e:2x2]
    [--output=benchmarks/results/preflight.json]

A config takes 2 to 15 minutes for each topology; what was compiled before is not compiled again.
configs/folder.py is of data that is not here.
"""

import argparse
import importlib
import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.update(KERAS_BACKEND='tensorflow', CUDA_VISIBLE_DEVICES='-1')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

from diagnostics import preflight  # noqa: E402
from diagnostics.tpu_compiler import DoesNotFit, Topology  # noqa: E402
from experiment import planning  # noqa: E402

CONFIGS = (
    'digits',
    'cifar10',
    'imagenette',
    'finetune',
    'imagenet',
    'imagenet_strong',
    'imagenet_distill',
)


def estimate(name, topology):
    """The figures of a config's last training stage and of its evaluation, and the time of the
    whole run; or what it needs.
    """
    config = importlib.import_module(f'configs.{name}').get_config()
    data = preflight.known_data(config)
    plan = planning.make_plan(
        config, data.num_train, data.num_eval, data.num_classes, topology.num_replicas
    )
    try:
        compiled_steps = preflight.compile_steps(config, plan, topology)
    except DoesNotFit as error:
        return {
            'fits': False,
            'batch_size': config.batch_size,
            'needed_gib': error.needed / 2**30,
            'available_gib': error.available / 2**30,
        }
    figures = [preflight.figures(compiled_step, topology) for compiled_step in compiled_steps]
    return {
        'fits': True,
        'batch_size': config.batch_size,
        'hours': sum(figure['hours'] for figure in figures),
        'compiler': compiled_steps[0].program.compiler,
        'chip_hours': sum(figure['hours'] for figure in figures) * topology.num_chips,
        'training': figures[-2],
        'evaluation': figures[-1],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--configs', nargs='+', default=CONFIGS, choices=CONFIGS)
    parser.add_argument('--topologies', nargs='+', default=('v5e:2x2', 'v6e:2x2', 'v5e:4x4'))
    parser.add_argument('--output')
    arguments = parser.parse_args()
    results = {}
    if arguments.output and os.path.exists(arguments.output):
        with open(arguments.output) as file:
            results = json.load(file)
    for name in arguments.configs:
        for text in arguments.topologies:
            result = results[f'{name} {text}'] = estimate(name, Topology.parse(text))
            if result['fits']:
                training = result['training']
                rate = training['images_per_second_per_chip'][training['binds']]
                print(
                    f'{name:16} {text}: {training["batch_per_replica"]:,} of '
                    f'{training["image_size"]} px, {training["memory_gib"]:.3g} GiB, '
                    f'{rate:,.0f} pictures/s a chip, '
                    f'{training["binds"]} binds, {result["chip_hours"]:.3g} chip-hours',
                    flush=True,
                )
            else:
                print(
                    f'{name:16} {text}: does not fit, {result["needed_gib"]:.3g} of '
                    f'{result["available_gib"]:.4g} GiB',
                    flush=True,
                )
            if arguments.output:
                with open(arguments.output, 'w') as file:
                    json.dump(results, file, indent=1)


if __name__ == '__main__':
    main()
