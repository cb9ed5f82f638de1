"""Runs replicas' steps on JAX's runtime: TensorFlow reads, traces, lowers and exports.

JAX drives TPUs on which no build of TensorFlow starts. What it runs here is the program that
TensorFlow's own compiler bridge makes of the step; no step is written twice. The state of training
lives on the devices, as JAX's arrays, and comes back into TensorFlow's variables when asked for.

The docs of what is used: docs.jax.dev (arrays, jax.distributed, persistent compilation cache). What
JAX does not publish is in devices/stable_hlo.py and `Program`.
"""

import concurrent.futures
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tensorflow as tf
from jax._src import compiler
from jax._src.interpreters import mlir, pxla
from jax._src.lib import xla_client
from jax.experimental import multihost_utils

from devices import stable_hlo
from devices.lowering import Lowered, OneOfMany, OneOfManyExtended, lower


class Placement:
    """Places arrays on the devices: split along the first axis, or one copy each.

    Copies need not stay equal: unsynchronized statistics are each replica's own.
    """

    def __init__(self, devices: Sequence[Any]) -> None:
        mesh = jax.sharding.Mesh(np.array(devices), ('replica',))
        self.devices = list(devices)
        own = jax.process_index()
        self.local_devices = [device for device in devices if device.process_index == own]
        self.same = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self.split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('replica'))

    def copy(self, value: np.ndarray) -> jax.Array:
        """Returns a value on all devices."""
        return jax.make_array_from_callback(value.shape, self.same, lambda _: value)

    def join(self, parts: Sequence[jax.Array]) -> jax.Array:
        """Returns one array of the parts, [n, ...], that lie on this process's devices."""
        length, *shape = parts[0].shape
        whole = (length * len(self.devices), *shape)
        return jax.make_array_from_single_device_arrays(whole, self.split, list(parts))

    def handler(self, spec: tf.TensorSpec | tf.Variable) -> Any:
        """Returns what makes an array of the results of all devices."""
        aval = jax.core.ShapedArray(spec.shape.as_list(), spec.dtype.as_numpy_dtype)
        return pxla.global_aval_to_result_handler(aval, self.same, committed=True)


class DeviceBatches:
    """A data set of a replica's batches, dealt out to this process's devices in turn."""

    def __init__(self, dataset: tf.data.Dataset, placement: Placement) -> None:
        self.element_spec = dataset.element_spec
        self._dataset, self._placement = dataset, placement

    def __iter__(self) -> 'BatchesAhead':
        return BatchesAhead(self._on_devices(), self.element_spec)

    def _on_devices(self) -> Iterator[list[jax.Array]]:
        """Yields a batch of all devices: an array for each tensor of an element."""
        batches = self._dataset.as_numpy_iterator()
        while True:
            try:
                parts = [
                    jax.device_put(tf.nest.flatten(next(batches)), device)
                    for device in self._placement.local_devices
                ]
            except StopIteration:
                return
            yield [self._placement.join(tensors) for tensors in zip(*parts, strict=True)]


class BatchesAhead:
    """Fetches the next batch in a thread while the caller does something else."""

    def __init__(self, batches: Iterator[list[jax.Array]], element_spec: Any) -> None:
        self.element_spec = element_spec
        self._batches = batches
        self._thread = concurrent.futures.ThreadPoolExecutor(1, 'batches')
        self._following = self._thread.submit(next, batches, None)

    def __iter__(self) -> 'BatchesAhead':
        return self

    def __next__(self) -> list[jax.Array]:
        batch = self._following.result()
        if batch is None:
            raise StopIteration
        self._following = self._thread.submit(next, self._batches, None)
        return batch

    def is_ready(self) -> bool:
        """Returns whether the next batch has come, so that asking for it takes no time."""
        return self._following.done()


class DeviceState:
    """TensorFlow variables as arrays on the devices.

    A variable is copied to the devices when a program needs it for the first time. From then on its
    value is on the devices, and the variable's own is old until `read_back`.
    """

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._arrays: dict[int, jax.Array] = {}
        self._variables: dict[int, tf.Variable] = {}
        self._changed: set[int] = set()

    def add(self, variable: tf.Variable) -> int:
        """Returns the key of a variable."""
        self._variables[id(variable)] = variable
        return id(variable)

    def __getitem__(self, key: int) -> jax.Array:
        if key not in self._arrays:
            self._arrays[key] = self._placement.copy(self._variables[key].numpy())
        return self._arrays[key]

    def __setitem__(self, key: int, array: jax.Array) -> None:
        self._arrays[key] = array
        self._changed.add(key)

    def read_back(self) -> None:
        """Assigns the variables what the programs have computed, from the first device."""
        for key in self._changed:
            self._variables[key].assign(np.asarray(self._arrays[key].addressable_data(0)))
        self._changed.clear()

    def forget(self) -> None:
        """Drops what is on the devices: the variables have been assigned other values."""
        self._arrays.clear()
        self._changed.clear()


class Program:
    """A lowered step, compiled for all replicas."""

    def __init__(self, lowered: Lowered, placement: Placement, state: DeviceState) -> None:
        variables = {id(variable.handle): variable for variable in lowered.variables}
        captured = [variables.get(id(tensor)) for tensor in lowered.captured]
        self._state = state
        self._captured = [
            placement.copy(tensor.numpy()) if variable is None else state.add(variable)
            for variable, tensor in zip(captured, lowered.captured, strict=True)
        ]
        with mlir.make_ir_context():
            module = stable_hlo.read_module(lowered.hlo)
            updated = stable_hlo.updated_parameters(module)
            self._executable = compiler.compile_or_get_cached(
                placement.local_devices[0].client,
                module,
                np.array(placement.devices),
                stable_hlo.replicated_on(placement.devices),
                [],
                xla_client.DeviceList(tuple(placement.devices)),
            )
        # After the step's own results come the new values of variables.
        self._num_results = len(lowered.results)
        first = lowered.num_arguments
        self._updated = [
            captured[updated[result] - first]
            for result in range(self._num_results, self._num_results + len(updated))
        ]
        self._handlers = [placement.handler(spec) for spec in (*lowered.results, *self._updated)]

    def __call__(self, arguments: Sequence[jax.Array]) -> list[jax.Array]:
        """Starts the program on this process's devices, and updates the state.

        Returns: the step's results, without waiting for them.
        """
        captured = [self._state[key] if isinstance(key, int) else key for key in self._captured]
        execution = self._executable.execute_sharded([*arguments, *captured])
        results = execution.consume_with_handlers(self._handlers)
        for variable, value in zip(self._updated, results[self._num_results :], strict=True):
            self._state[id(variable)] = value
        return results[: self._num_results]


class PjrtStrategy(OneOfMany):
    """One replica of a step that JAX runs on every device of every process.

    `jax.devices()` are ordered by process, so a replica has the same number wherever it runs.

    It runs steps itself: see modeling.loops.RunsSteps, which has the docstrings.

    Args:
        devices: of all processes, by default all that there are.
    """

    runtime = f'JAX {jax.__version__}'

    def __init__(self, devices: Sequence[Any] | None = None) -> None:
        self.placement = Placement(devices or jax.devices())
        self.kind = self.placement.devices[0].platform.upper()
        self._state = DeviceState(self.placement)
        num_replicas = len(self.placement.devices)
        super().__init__(num_replicas, _Pjrt(self, num_replicas))

    def make_loop(
        self, step: Callable[..., dict[str, tf.Tensor]], sums: Sequence[str], last: Sequence[str]
    ) -> Callable[[BatchesAhead, tf.Tensor], dict[str, float]]:
        """Makes a function that runs several steps without waiting for each.

        A step is started while the one before it runs, and the next batch is put onto the devices
        meanwhile. At most two steps are under way, because each holds a batch in the devices'
        memory.

        Returns: a function of batches and a number of steps; it returns the sums of `sums` over
            these steps and replicas, `last` of the last step, and 'input_seconds', for which the
            devices had nothing to do because the next batch was not there.
        """
        keys = [*sums, *last]
        with self.scope():
            totals = tf.Variable(tf.zeros([len(keys)]), trainable=False)
        key = self._state.add(totals)
        program: Program | None = None

        def step_with_totals(*batch: Any) -> tf.Tensor:
            results = step(*batch)
            new = tf.stack([tf.cast(results[name], tf.float32) for name in keys])
            totals.assign(
                tf.concat([totals[: len(sums)] + new[: len(sums)], new[len(sums) :]], axis=0)
            )
            return new[0]

        def loop(batches: BatchesAhead, num_steps: tf.Tensor) -> dict[str, float]:
            nonlocal program
            if program is None:
                program = self._program(step_with_totals, batches.element_spec)
            self._state[key] = self.placement.copy(np.zeros(len(keys), np.float32))
            input_seconds, running = 0.0, None
            for _ in range(int(num_steps)):
                if running is not None and not batches.is_ready():
                    jax.block_until_ready(running)
                begin = time.monotonic()
                batch = next(batches)
                input_seconds += time.monotonic() - begin
                before, running = running, program(batch)
                if before is not None:
                    jax.block_until_ready(before)
            shares = [np.asarray(shard.data) for shard in self._state[key].addressable_shards]
            total = sum_over_processes(np.sum(shares, axis=0, dtype=np.float64))
            return {**dict(zip(keys, total, strict=True)), 'input_seconds': input_seconds}

        return loop

    def make_call(self, step: Callable[[], None]) -> Callable[[], None]:
        """Makes a function that runs a step without arguments or results on all replicas."""
        program: Program | None = None

        def call() -> None:
            nonlocal program
            program = program or self._program(step, ())
            program([])

        return call

    def describe_devices(self) -> list[str]:
        return [
            f'{device.device_kind}, process {device.process_index}'
            for device in self.placement.devices
        ]

    def read_back(self) -> None:
        """Brings the state into TensorFlow's variables."""
        self._state.read_back()

    def forget(self) -> None:
        """Takes the state from TensorFlow's variables again."""
        self._state.forget()

    def _program(self, step: Callable[..., Any], specs: Any) -> Program:
        return Program(lower(self, step, specs), self.placement, self._state)


class _Pjrt(OneOfManyExtended):
    def _distribute_datasets_from_function(
        self, dataset_fn: Callable[..., tf.data.Dataset], options: Any
    ) -> DeviceBatches:
        context = tf.distribute.InputContext(
            num_input_pipelines=jax.process_count(),
            input_pipeline_id=jax.process_index(),
            num_replicas_in_sync=self._num_replicas,
        )
        return DeviceBatches(dataset_fn(context), self._container_strategy().placement)


def sum_over_processes(numbers: Sequence[float]) -> list[float]:
    """Sums numbers over all processes; each must call it at the same point."""
    if jax.process_count() == 1:
        return [float(number) for number in numbers]
    gathered = multihost_utils.process_allgather(np.array(numbers, np.float64))
    return gathered.sum(axis=0).tolist()


def is_first_process() -> bool:
    """Returns whether this process is the one that writes."""
    return jax.process_index() == 0
