"""The first losses of one run on 1, 2 and 4 virtual CPU devices, with and without XLA: they should be the same.

    python benchmarks/replicas.py [--model=EfficientNetV2B0] [--steps=20] [--output=benchmarks/results/replicas.json]

The run is configs/digits.py without augmentation, dropout and drop-path, with synchronized batch normalisation, at the
config's global batch. Each case is a process of its own; the table shows the largest difference from the first case.
"""
import argparse
import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CASES = [(devices, jit_compile) for jit_compile in ('false', 'true') for devices in (1, 2, 4)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--model', default='EfficientNetV2B0')
    parser.add_argument('--steps', type=int, default=20)
    parser.add_argument('--output')
    parser.add_argument('--case', nargs=2, help='devices and jit_compile of one case; prints its losses')
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(first_losses(arguments.model, arguments.steps, int(arguments.case[0]), arguments.case[1])))
        return
    losses = {}
    for devices, jit_compile in CASES:
        losses[devices, jit_compile] = in_own_process(arguments.model, arguments.steps, devices, jit_compile)
        difference = max(abs(loss - first) for loss, first in zip(losses[devices, jit_compile], losses[CASES[0]]))
        print(f'{devices} device{"s" * (devices > 1)}, jit_compile={jit_compile:5}  loss {losses[devices, jit_compile][0]:.6f} ... '
              f'{losses[devices, jit_compile][-1]:.6f}  largest difference {difference:.2g}', flush=True)
    if arguments.output:
        with open(arguments.output, 'w') as file:
            json.dump({'model': arguments.model, 'losses': {f'{devices} {jit}': values for (devices, jit), values in losses.items()}}, file, indent=1)


def in_own_process(model, steps, devices, jit_compile):
    """The losses of one case, a list of floats."""
    command = [sys.executable, __file__, f'--model={model}', f'--steps={steps}', '--case', str(devices), jit_compile]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'{" ".join(command)} failed:\n{done.stderr[-3000:]}')
    return json.loads(done.stdout.splitlines()[-1])


def first_losses(model, num_steps, devices, jit_compile):
    """The loss of each of the first steps of the run."""
    sys.path.insert(0, ROOT)
    os.environ.update(KERAS_BACKEND='tensorflow', TF_CPP_MIN_LOG_LEVEL='2')
    from configs import digits
    from inputs import pipeline
    from modeling import steps
    from session import open_session

    import tensorflow as tf

    config = digits.get_config()
    config.model.name, config.model.dropout, config.model.drop_path = model, 0.0, 0.0
    config.augment = {**config.augment.to_dict(), 'translate': 0.0, 'rotate': 0.0, 'zoom': 0.0}
    config.virtual_devices, config.jit_compile = devices, jit_compile
    session = open_session(config, '/nonexistent')
    train_step = steps.make_train_step(session.state, config, num_classes=session.plan.num_classes,
                                       num_replicas=session.plan.num_replicas, jit_compile=session.jit_compile)
    train_loop = steps.make_train_loop(session.strategy, train_step)
    batches = iter(pipeline.training_batches(session.source, config, session.plan, 0, session.strategy))
    return [float(train_loop(batches, tf.constant(1))['loss']) for _ in range(num_steps)]


if __name__ == '__main__':
    main()
