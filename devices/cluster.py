"""Finds the processes of a run on JAX's runtime: from flags, or from what launched them.

Whether there are several is decided here, without JAX, because a process of several starts a child
before it imports anything large; see devices/supervisor.py. JAX then finds the addresses.
"""

import dataclasses
import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping

from common import machine, tpu_environment
from common.errors import ConfigError, RunError, one_line
from devices import google_metadata

# What JAX's detection of Slurm reads; inside `srun` all of them are set.
SLURM = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID')
BY_HAND = 'write --coordinator, --num_processes and --process_id'


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a run, which meet at an address. JAX finds out what is None."""

    num_processes: int | None
    coordinator: str | None = None  # HOST:PORT of process 0
    process_id: int | None = None

    @property
    def has_peers(self) -> bool:
        return self.num_processes != 1

    @classmethod
    def from_flags(
        cls, coordinator: str | None, num_processes: int | None, process_id: int | None
    ) -> 'Cluster | None':
        """Returns what the flags say, None if they say nothing. Raises ConfigError."""
        if coordinator is None and num_processes is None and process_id is None:
            return None
        if coordinator is None and process_id is None and num_processes == 1:
            return cls(1)
        if coordinator is None or num_processes is None or process_id is None:
            raise ConfigError(
                '--coordinator, --num_processes and --process_id belong together',
                'write all three, or none where the launcher of the processes is known',
            )
        if not re.fullmatch(r'[^\s:]+:\d+|\[[^\s\]]+\]:\d+', coordinator):
            problem = f'--coordinator={coordinator!r} is not an address'
            raise ConfigError(problem, 'write HOST:PORT of process 0')
        if num_processes < 1:
            raise ConfigError(f'--num_processes={num_processes} is impossible', 'write 1 or more')
        if not 0 <= process_id < num_processes:
            problem = f'--process_id={process_id} is not one of {num_processes} processes'
            raise ConfigError(problem, f'write 0 to {num_processes - 1}')
        return cls(num_processes, coordinator, process_id)


ALONE = Cluster(1)


def find(
    environ: Mapping[str, str] = os.environ,
    root: str = '/',
    metadata: Callable[[str], str | None] = google_metadata.get,
) -> Cluster:
    """Returns the processes that a launcher has started: Slurm, Open MPI, a TPU slice, Kubernetes.

    TF_CONFIG, which names TensorFlow's workers, counts before all others.

    Raises: RunError in a pod of Kubernetes that cannot find the others, or for a wrong TF_CONFIG.
    """
    if environ.get('TF_CONFIG'):
        return _from_tf_config(environ['TF_CONFIG'])
    if all(name in environ for name in SLURM):
        return Cluster(int(environ['SLURM_NTASKS']))
    if 'OMPI_MCA_orte_hnp_uri' in environ:
        return Cluster(int(environ['OMPI_COMM_WORLD_SIZE']))
    if tpu_environment.is_tpu_expected(environ=environ, root=root):
        return Cluster(_num_tpu_hosts(environ, metadata))
    if 'JOB_COMPLETION_INDEX' in environ:
        if importlib.util.find_spec('kubernetes'):
            return Cluster(None)
        raise RunError(
            'this pod belongs to an indexed job of Kubernetes, and cannot ask for the other pods',
            f'{BY_HAND}; --num_processes=1 if it trains alone; or pip install kubernetes',
        )
    return ALONE


def _from_tf_config(text: str) -> Cluster:
    """Returns the cluster of workers, the chief first."""
    try:
        values = json.loads(text)
        jobs = values.get('cluster', {})
        chief, workers = jobs.get('chief', []), jobs.get('worker', [])
        if len(chief) + len(workers) < 2:
            return ALONE
        task = values['task']
        first = {'chief': 0, 'worker': len(chief)}[task['type']]
        process_id = first + int(task.get('index', 0))
        return Cluster.from_flags((chief + workers)[0], len(chief + workers), process_id) or ALONE
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        reason = one_line(f'{type(error).__name__}: {error}')
        problem = f'the environment variable TF_CONFIG names no place for this process ({reason})'
        raise RunError(problem, 'fix it or unset it') from None


def _num_tpu_hosts(environ: Mapping[str, str], metadata: Callable[[str], str | None]) -> int:
    """Returns how many hosts the slices have to which this host's TPU belongs.

    GKE and Kaggle set a variable; on a TPU VM the metadata server knows.
    """
    hosts = environ.get('TPU_PROCESS_ADDRESSES') or environ.get('TPU_WORKER_HOSTNAMES')
    slices = environ.get('MEGASCALE_NUM_SLICES')
    if not hosts and 'TPU_SKIP_MDS_QUERY' not in environ:
        hosts = metadata('instance/attributes/worker-network-endpoints')
        described = metadata('instance/attributes/tpu-env') if hosts and not slices else ''
        found = re.search(r"^MEGASCALE_NUM_SLICES: *'?(\d+)", described or '', re.MULTILINE)
        slices = found[1] if found else slices
    if not hosts or ' ' in hosts.strip():  # libtpu may have left a sentence there
        return 1
    return len(hosts.split(',')) * int(slices or 1)


def local_devices(environ: Mapping[str, str] = os.environ) -> list[int] | None:
    """Returns the numbers of the GPUs that this process uses; None leaves it to JAX.

    Under Slurm JAX takes one GPU a task. A task that has a machine for itself takes all.
    """
    tasks = environ.get('SLURM_STEP_TASKS_PER_NODE', '')
    if not re.fullmatch(r'1(\(x\d+\))?', tasks):
        return None
    visible = environ.get('CUDA_VISIBLE_DEVICES')
    count = len(machine.nvidia_smi()[0]) if visible is None else len(visible.split(','))
    return list(range(count)) or None
