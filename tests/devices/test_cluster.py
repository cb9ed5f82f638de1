"""The other processes of a run are found by flags, or by what launched them."""

import http.server
import threading

import pytest

from common.errors import ConfigError, RunError
from devices import cluster, google_metadata
from devices.cluster import ALONE, Cluster
from tests.conftest import refused

SLURM = dict.fromkeys(cluster.SLURM, '0')
TPU = {'TPU_ACCELERATOR_TYPE': 'v5litepod-16'}


@pytest.mark.parametrize(
    'flags, about',
    [
        (('host:1', 2, None), '--process_id'),
        ((None, 2, 0), '--coordinator'),
        (('host', 2, 0), "--coordinator='host'"),
        (('host:port', 2, 0), "--coordinator='host:port'"),
        (('host:1', 2, 2), '--process_id=2'),
        (('host:1', 2, -1), '--process_id=-1'),
        (('host:1', 0, 0), '--num_processes=0'),
    ],
)
def test_flags_that_name_no_process_are_refused(flags, about):
    with refused(ConfigError, about):
        Cluster.from_flags(*flags)


def test_flags_name_a_process_or_none():
    assert Cluster.from_flags(None, None, None) is None
    assert Cluster.from_flags('host:1', 2, 0) == Cluster(2, 'host:1', 0)
    assert Cluster.from_flags('[::1]:80', 2, 1).process_id == 1
    assert not Cluster.from_flags(None, 1, None).has_peers


@pytest.mark.parametrize(
    'environ, num_processes',
    [
        ({}, 1),
        ({'KUBERNETES_SERVICE_HOST': '10.0.0.1'}, 1),
        ({'SLURM_NTASKS': '4'}, 1),  # of an allocation, outside of srun
        (SLURM | {'SLURM_NTASKS': '1'}, 1),
        (SLURM | {'SLURM_NTASKS': '4'}, 4),
        ({'OMPI_MCA_orte_hnp_uri': 'x', 'OMPI_COMM_WORLD_SIZE': '2'}, 2),
        (TPU | {'TPU_WORKER_HOSTNAMES': 'a,b,c,d'}, 4),
        (TPU | {'TPU_WORKER_HOSTNAMES': 'a,b', 'MEGASCALE_NUM_SLICES': '2'}, 4),
        (TPU | {'TPU_PROCESS_ADDRESSES': 'local'}, 1),  # Kaggle
        (TPU | {'TPU_WORKER_HOSTNAMES': 'WARNING: could not determine hosts, please set'}, 1),
        (TPU, 1),
    ],
)
def test_a_launcher_says_how_many_there_are(tmp_path, environ, num_processes):
    found = cluster.find(environ, str(tmp_path), lambda path: None)
    assert found == Cluster(num_processes)
    assert found.has_peers == (num_processes > 1)


@pytest.mark.parametrize(
    'answers, num_processes',
    [
        ({'worker-network-endpoints': 'h0,h1'}, 2),
        ({'worker-network-endpoints': 'x:1:10.0.0.1,x:2:10.0.0.2'}, 2),
        ({'worker-network-endpoints': 'h0'}, 1),
        ({'worker-network-endpoints': 'h0,h1', 'tpu-env': "A: 'b'\nMEGASCALE_NUM_SLICES: '3'"}, 6),
    ],
)
def test_the_metadata_server_knows_the_hosts_of_a_tpu_vm(tmp_path, answers, num_processes):
    def metadata(path):
        return answers.get(path.removeprefix('instance/attributes/'))

    assert cluster.find(TPU, str(tmp_path), metadata) == Cluster(num_processes)
    alone = TPU | {'TPU_SKIP_MDS_QUERY': '1'}
    assert cluster.find(alone, str(tmp_path), metadata) == ALONE


def test_a_pod_that_cannot_find_the_others_does_not_train_alone(tmp_path, monkeypatch):
    pod = {'JOB_COMPLETION_INDEX': '1'}
    monkeypatch.setattr(cluster.importlib.util, 'find_spec', lambda name: None)
    with refused(RunError, 'indexed job of Kubernetes', fix='--num_processes=1'):
        cluster.find(pod, str(tmp_path))
    monkeypatch.setattr(cluster.importlib.util, 'find_spec', lambda name: 'found')
    assert cluster.find(pod, str(tmp_path)).has_peers


@pytest.mark.parametrize(
    'environ, devices',
    [
        ({}, None),
        ({'SLURM_STEP_TASKS_PER_NODE': '4(x2)'}, None),
        ({'SLURM_STEP_TASKS_PER_NODE': '1(x2)', 'CUDA_VISIBLE_DEVICES': '4,5,6'}, [0, 1, 2]),
        ({'SLURM_STEP_TASKS_PER_NODE': '1'}, [0, 1]),
    ],
)
def test_a_task_with_a_machine_for_itself_takes_all_gpus(monkeypatch, environ, devices):
    monkeypatch.setattr(cluster.machine, 'nvidia_smi', lambda: (['a GPU', 'a GPU'], ''))
    assert cluster.local_devices(environ) == devices


def test_the_metadata_server_is_asked_for_a_path(monkeypatch):
    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            is_right = self.path == '/computeMetadata/v1/instance/attributes/tpu-env'
            self.send_response(200 if is_right and self.headers['Metadata-Flavor'] else 404)
            self.end_headers()
            self.wfile.write(b'A: 1\n')

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(('localhost', 0), Server)
    threading.Thread(target=server.handle_request, daemon=True).start()
    monkeypatch.setenv('GCE_METADATA_HOST', f'localhost:{server.server_port}')
    assert google_metadata.get('instance/attributes/tpu-env') == 'A: 1'
    server.server_close()
    assert google_metadata.get('instance/attributes/tpu-env') is None


@pytest.mark.parametrize(
    'text, found',
    [
        ('{}', ALONE),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}', ALONE),
        (
            '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}',
            Cluster(2, 'a:1', 1),
        ),
        (
            '{"cluster": {"chief": ["a:1"], "worker": ["b:1"]}, "task": {"type": "worker"}}',
            Cluster(2, 'a:1', 1),
        ),
    ],
)
def test_tensorflows_workers_are_processes_too(text, found):
    assert cluster.find({'TF_CONFIG': text, **SLURM, 'SLURM_NTASKS': '4'}) == found


@pytest.mark.parametrize(
    'text',
    [
        '{"cluster": ',
        '[]',
        '{"cluster": {"worker": ["a:1", "b:1"]}}',
        '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "ps", "index": 0}}',
        '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}',
        '{"cluster": {"worker": ["a", "b"]}, "task": {"type": "worker", "index": 0}}',
    ],
)
def test_a_cluster_without_a_place_for_this_process_is_one_line(text):
    with refused(RunError, 'TF_CONFIG', fix='unset it'):
        cluster.find({'TF_CONFIG': text})
