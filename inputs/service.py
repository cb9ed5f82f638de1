"""Training images prepared by other machines, with tf.data service.

Order and bytes are those of the local pipeline. On each machine that helps:

    python -m inputs.service --port=5050 --host=MACHINE1

and on the one that trains:

    python main.py ... --config.dataset.service=MACHINE1:5050,MACHINE2:5050

Each of n services decodes every n-th batch. All of them read all encoded examples, from the same
paths as the training machine. Anyone who reaches the port can use it, as tf.data service has no
passwords: keep it inside a private network.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import tensorflow as tf

from common import console
from common.commands import ArgumentParser
from common.errors import RunError, counted

PATIENCE = 60  # seconds
MAX_IN_GROUP = 8  # images that one call prepares


def prepare(
    examples: tf.data.Dataset,
    prepare_image: Callable[..., tuple],
    batch_size: int,
    addresses: str,
    parallel_calls: int,
) -> tf.data.Dataset:
    """Returns batches of `prepare_image(*example)`, made here or by tf.data services.

    Args:
        examples: endless, and the same each time it is read.
        prepare_image: a function of an example that can be serialized.
        batch_size: of each batch.
        addresses: 'HOST:PORT,HOST:PORT' of dispatchers, or '' for this process. Name a dispatcher
            that has several workers once per worker.
        parallel_calls: of `prepare_image`.

    Returns: an endless tf.data.Dataset.

    Raises: RunError: nothing answers at an address.
    """
    if not addresses:
        return _in_groups(examples, prepare_image, batch_size, parallel_calls)
    targets = addresses.split(',')

    def every_nth(index: int) -> tf.data.Dataset:
        own = examples.enumerate().filter(
            lambda number, example: number // batch_size % len(targets) == index
        )
        prepared = own.map(lambda number, example: example).map(prepare_image, parallel_calls)
        return prepared.batch(batch_size, drop_remainder=True, num_parallel_calls=parallel_calls)

    def remote(index: int, address: str) -> tf.data.Dataset:
        _require_dispatcher(address)
        distribute = tf.data.experimental.service.distribute(
            tf.data.experimental.service.ShardingPolicy.DYNAMIC, f'grpc://{address}'
        )
        # There is one split to hand out, so a single worker takes it whole and keeps the order.
        batches = tf.data.Dataset.range(1).flat_map(lambda _: every_nth(index))
        return batches.apply(distribute).prefetch(2)

    streams = [remote(index, address) for index, address in enumerate(targets)]
    turns = tf.data.Dataset.range(len(streams)).repeat()
    return tf.data.Dataset.choose_from_datasets(streams, turns)


def _in_groups(
    examples: tf.data.Dataset,
    prepare_image: Callable[..., tuple],
    batch_size: int,
    parallel_calls: int,
) -> tf.data.Dataset:
    """Returns the batches of `prepare`; each call prepares a group of examples, one by one.

    That saves calls: each costs tf.data a tenth of the time that it takes to prepare an image of
    500x375 pixels.
    """
    size = max(size for size in range(1, MAX_IN_GROUP + 1) if batch_size % size == 0)
    signature = examples.map(prepare_image).element_spec

    def prepare_group(*columns: tf.Tensor) -> tuple:
        return tf.map_fn(
            lambda example: prepare_image(*example),
            columns,
            fn_output_signature=signature,
            parallel_iterations=1,
        )

    def join(*structure: tf.Tensor) -> tuple:  # [batch / size, size, ...] each
        return tf.nest.map_structure(
            lambda part: tf.reshape(part, [batch_size, *part.shape[2:]]), structure
        )

    groups = examples.batch(size, drop_remainder=True).map(prepare_group, parallel_calls)
    return groups.batch(
        batch_size // size, drop_remainder=True, num_parallel_calls=parallel_calls
    ).map(join)


@contextlib.contextmanager
def watch(addresses: str) -> Iterator[None]:
    """Ends this process with one line when a service has not answered for `PATIENCE` seconds.

    tf.data itself would wait for an hour. The main thread waits inside TensorFlow, where it notices
    neither an exception nor a signal.
    """
    ended = threading.Event()

    def ask() -> None:
        answered = dict.fromkeys(addresses.split(','), time.monotonic())
        while not ended.wait(PATIENCE / 6):
            for address, last in answered.items():
                try:
                    _require_dispatcher(address)
                    answered[address] = time.monotonic()
                except RunError as error:
                    if time.monotonic() - last > PATIENCE and not ended.is_set():
                        _stop(error)

    if addresses:
        threading.Thread(target=ask, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _stop(error: RunError) -> None:
    silence = f'it has been silent for {PATIENCE} s'
    console.warning(
        f'error: {error}; {silence}. The same command continues from the last checkpoint'
    )
    os._exit(1)


def _require_dispatcher(address: str) -> None:
    host, _, port = address.rpartition(':')
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:  # OverflowError: a port above 65535
        raise RunError(
            f'nothing answers at {address!r} of config.dataset.service ({error})',
            'write HOST:PORT of a service that was started with python -m inputs.service',
            'dataset.service',
        ) from error


def main() -> None:
    parser = ArgumentParser(
        description='Runs a tf.data service, a dispatcher and its workers, until it is stopped.'
    )
    parser.add_argument(
        '--port', type=int, default=0, help='port of the dispatcher; 0 picks a free one'
    )
    parser.add_argument(
        '--host', default='localhost', help='the name by which other machines reach this one'
    )
    parser.add_argument(
        '--workers', type=int, default=1, help='how many streams it can serve at a time'
    )
    options = parser.parse_args()
    api = tf.data.experimental.service
    dispatcher = api.DispatchServer(api.DispatcherConfig(port=options.port))
    _, _, port = dispatcher.target.rpartition(':')
    worker_config = api.WorkerConfig(f'localhost:{port}', worker_address=f'{options.host}:%port%')
    workers = [api.WorkerServer(worker_config) for _ in range(options.workers)]
    console.line(f'serving at {options.host}:{port} with {counted(len(workers), "worker")}')
    dispatcher.join()


if __name__ == '__main__':
    main()
