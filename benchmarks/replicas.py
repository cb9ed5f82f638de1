"""The first losses of one run on 1, 2 and 4 virtual CPU devices, with and without XLA: they should
be the same.

    python benchmarks/replicas.py [--model=EfficientNetV2B0] [--precision=float64] [--steps=20]
        [--output=benchmarks/results/replicas.json]

The run is configs/digits.py without augmentation, dropout and drop-path, with synchronized batch
normalisation, at the config's global batch. Each case is a process of its own; the table shows the
largest difference from the first case. A case is DEVICES JIT_COMPILE, as in --cases '1 false' '2
true', or DEVICES pjrt for JAX's runtime. A third word, `permuted`, is a control: one device without
XLA again, but the rows of each batch in another order. It changes nothing except the rounding of
sums.
"""

import argparse
import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CASES = [(devices, jit_compile) for jit_compile in ('false', 'true') for devices in ('1', '2', '4')]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--model', default='EfficientNetV2B0')
    parser.add_argument('--precision', default='float64')
    parser.add_argument('--steps', type=int, default=20)
    parser.add_argument('--output')
    parser.add_argument(
        '--cases', nargs='+', default=[f'{devices} {jit_compile}' for devices, jit_compile in CASES]
    )
    parser.add_argument('--case', help='one of them, in this process; prints its losses')
    options = parser.parse_args()
    if options.case:
        print(
            json.dumps(
                first_losses(options.model, options.precision, options.steps, *options.case.split())
            )
        )
        return
    losses = kept_losses(options)
    for case in options.cases:
        losses[case] = in_own_process(options, case)
        differences = [
            abs(loss - first)
            for loss, first in zip(losses[case], losses[options.cases[0]], strict=True)
        ]
        agreeing = next(
            (step for step, difference in enumerate(differences) if difference > 1e-4),
            options.steps,
        )
        devices, jit_compile, *order = case.split()
        print(
            f'{devices:>8} {jit_compile:5} {" ".join(order):8}  loss '
            f'{losses[case][0]:.6f} ... {losses[case][-1]:.6f}  '
            f'largest difference {max(differences):.1e}, within 1e-4 for {agreeing} steps',
            flush=True,
        )
        if options.output:
            with open(options.output, 'w') as file:
                json.dump(
                    {'model': options.model, 'precision': options.precision, 'losses': losses},
                    file,
                    indent=1,
                )


def kept_losses(options):
    """What the output file holds of the same model and precision: cases can be run one at a time,
    as XLA takes long.
    """
    if not options.output or not os.path.exists(options.output):
        return {}
    with open(options.output) as file:
        kept = json.load(file)
    return (
        kept['losses']
        if (kept['model'], kept['precision']) == (options.model, options.precision)
        else {}
    )


def in_own_process(options, case):
    """The losses of one case, a list of floats."""
    command = [
        sys.executable,
        __file__,
        f'--model={options.model}',
        f'--precision={options.precision}',
        f'--steps={options.steps}',
        '--case',
        case,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'{" ".join(command)} failed:\n{done.stderr[-3000:]}')
    return json.loads(done.stdout.splitlines()[-1])


def first_losses(model, precision, num_steps, devices, jit_compile, order=None):
    """The loss of each of the first steps of the run."""
    sys.path.insert(0, ROOT)
    os.environ.update(KERAS_BACKEND='tensorflow', TF_CPP_MIN_LOG_LEVEL='2')
    import tensorflow as tf

    from configs import digits
    from experiment.session import open_session
    from inputs import augment, pipeline
    from modeling import loops, steps

    config = digits.get_config()
    config.model.name, config.model.dropout, config.model.drop_path = model, 0.0, 0.0
    config.augment = {**config.augment.to_dict(), 'translate': 0.0, 'rotate': 0.0, 'zoom': 0.0}
    config.virtual_devices = int(devices)
    if jit_compile == 'pjrt':
        config.strategy = 'pjrt'
    else:
        config.jit_compile = jit_compile
    config.precision = precision
    session = open_session(config, '/nonexistent')
    train_step = steps.make_train_step(
        session.state,
        config,
        augment.make_device_augment(config.augment, session.plan.num_classes),
        num_classes=session.plan.num_classes,
        num_replicas=session.plan.num_replicas,
        jit_compile=session.jit_compile,
    )
    batches = pipeline.training_batches(
        session.source, config, session.plan, 0, session.plan.total_steps, session.strategy
    )
    if order == 'permuted':
        step = tf.function(train_step, autograph=False)
        orders = [
            tf.random.experimental.stateless_shuffle(tf.range(config.batch_size), seed=[0, index])
            for index in range(num_steps)
        ]
        return [
            float(step(tf.gather(images, rows), tf.gather(labels, rows), {})['loss'])
            for rows, (images, labels, _) in zip(orders, batches, strict=True)
        ]
    train_loop, batches = loops.make_train_loop(session.strategy, train_step), iter(batches)
    return [float(train_loop(batches, tf.constant(1))['loss']) for _ in range(num_steps)]


if __name__ == '__main__':
    main()
