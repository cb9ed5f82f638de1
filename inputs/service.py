"""Training pictures prepared by other machines: tf.data service, in the order and with the bytes of the local pipeline.

    python -m inputs.service --port=5050                                        on each machine that helps
    python main.py ... --config.dataset.service=MACHINE1:5050,MACHINE2:5050     on the one that trains

Of n services each decodes every n-th batch. All of them read the encoded examples, from the same paths as here. Anyone who
reaches the port can use it, as tf.data service knows no passwords: keep it inside of a private network.
"""

import argparse
import contextlib
import os
import socket
import sys
import threading
import time

import tensorflow as tf

from common.errors import RunError

PATIENCE = 60  # seconds
MOST_IN_GROUP = 8  # images that one call prepares


def prepare(examples, picture, batch_size, addresses, parallel_calls):
    """Batches of `picture(*example)`, made here, or by tf.data services.

    Args:
        examples: an endless tf.data.Dataset, the same each time it is read.
        picture: a function of an example that can be serialized.
        batch_size: of each batch.
        addresses: 'HOST:PORT,HOST:PORT' of dispatchers, or '' for here. One that has several workers can be named as often.
        parallel_calls: of `picture`.

    Returns: an endless tf.data.Dataset.

    Raises: RunError: nothing answers at an address.
    """

    def batches(chosen):
        return chosen.map(picture, parallel_calls).batch(
            batch_size, drop_remainder=True, num_parallel_calls=parallel_calls
        )

    if not addresses:
        return _in_groups(examples, picture, batch_size, parallel_calls)
    addresses = addresses.split(',')

    def every_nth(index):
        own = examples.enumerate().filter(
            lambda number, example: number // batch_size % len(addresses) == index
        )
        return batches(own.map(lambda number, example: example))

    def remote(index, address):
        _require_dispatcher(address)
        distribute = tf.data.experimental.service.distribute(
            tf.data.experimental.service.ShardingPolicy.DYNAMIC, f'grpc://{address}'
        )
        # What is handed out is one split, so a single worker takes it whole and the order stays.
        return (
            tf.data.Dataset.range(1)
            .flat_map(lambda _: every_nth(index))
            .apply(distribute)
            .prefetch(2)
        )

    streams = [remote(index, address) for index, address in enumerate(addresses)]
    return tf.data.Dataset.choose_from_datasets(
        streams, tf.data.Dataset.range(len(streams)).repeat()
    )


def _in_groups(examples, picture, batch_size, parallel_calls):
    """Returns the batches of `prepare`, made of groups of examples that one call prepares, one after the other.

    It saves calls: each takes tf.data a tenth of the time that an image of 500x375 pixels takes.
    """
    size = max(size for size in range(1, MOST_IN_GROUP + 1) if batch_size % size == 0)
    signature = examples.map(picture).element_spec

    def prepare_group(*columns):
        return tf.map_fn(
            lambda example: picture(*example),
            columns,
            fn_output_signature=signature,
            parallel_iterations=1,
        )

    def join(*structure):  # [batch / size, size, ...] each
        return tf.nest.map_structure(
            lambda part: tf.reshape(part, [batch_size, *part.shape[2:]]), structure
        )

    groups = examples.batch(size, drop_remainder=True).map(prepare_group, parallel_calls)
    return groups.batch(
        batch_size // size, drop_remainder=True, num_parallel_calls=parallel_calls
    ).map(join)


@contextlib.contextmanager
def watch(addresses):
    """Ends this process with one line when a service has not answered for `PATIENCE` seconds: tf.data itself would wait for an hour.

    What waits is TensorFlow's, in the main thread, so neither an exception nor a signal would be noticed there.
    """
    ended = threading.Event()

    def ask():
        answered = dict.fromkeys(addresses.split(','), time.monotonic())
        while not ended.wait(PATIENCE / 6):
            for address, last in answered.items():
                try:
                    _require_dispatcher(address)
                    answered[address] = time.monotonic()
                except RunError as error:
                    if time.monotonic() - last > PATIENCE and not ended.is_set():
                        print(
                            f'error: {error}; it has been silent for {PATIENCE} s. The same command continues at the last checkpoint',
                            file=sys.stderr,
                            flush=True,
                        )
                        os._exit(1)

    if addresses:
        threading.Thread(target=ask, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _require_dispatcher(address):
    host, _, port = address.rpartition(':')
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:  # a port above 65535
        raise RunError(
            f'nothing answers at {address!r} of config.dataset.service ({error}): write HOST:PORT of a service that was started '
            'with python -m inputs.service'
        ) from error


def main():
    parser = argparse.ArgumentParser(
        description='A tf.data service of a dispatcher and its workers, until it is stopped.'
    )
    parser.add_argument(
        '--port', type=int, default=0, help='of the dispatcher; 0: any that is free'
    )
    parser.add_argument(
        '--host', default='localhost', help='the name under which the others reach this machine'
    )
    parser.add_argument(
        '--workers', type=int, default=1, help='how many streams it can serve at a time'
    )
    options = parser.parse_args()
    api = tf.data.experimental.service
    dispatcher = api.DispatchServer(api.DispatcherConfig(port=options.port))
    _, _, port = dispatcher.target.rpartition(':')
    workers = [
        api.WorkerServer(
            api.WorkerConfig(f'localhost:{port}', worker_address=f'{options.host}:%port%')
        )
        for _ in range(options.workers)
    ]
    print(
        f'serves at {options.host}:{port} with {len(workers)} worker{"s" * (len(workers) > 1)}',
        flush=True,
    )
    dispatcher.join()


if __name__ == '__main__':
    main()
