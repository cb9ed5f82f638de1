"""What others made is read as data: nothing in a SavedModel or in weights runs but arithmetic, and
nobody is listened to unasked.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time

import h5py
import keras
import numpy as np
import psutil
import pytest
import tensorflow as tf
from tensorflow.python.framework import op_def_registry

import predict
from common.errors import RunError
from modeling import distillation, models, pretrained, saved_model_safety
from outputs import checkpoints
from tests.conftest import refused
from tests.test_layout import CODE, ROOT

NAMES = [str(digit) for digit in range(10)]
PICTURES = np.random.RandomState(0).randint(0, 256, (2, 8, 8, 3)).astype(np.float32)


def python_writes(path):
    with open(path, 'wb') as file:
        file.write(b'written by Python')
    return np.float32(0)


# Operations that write the file or folder `path`, in a graph.
WRITERS = {
    'WriteFile': lambda path: tf.io.write_file(path, 'written'),
    'PrintV2': lambda path: tf.print('printed', output_stream=f'file://{path}'),
    'SaveV2': lambda path: tf.raw_ops.SaveV2(
        prefix=path, tensor_names=['number'], shape_and_slices=[''], tensors=[tf.constant(1.0)]
    ),
    'PyFunc': lambda path: tf.numpy_function(lambda: python_writes(path), [], tf.float32),
    'EagerPyFunc': lambda path: tf.py_function(lambda: python_writes(path), [], tf.float32),
}


class Teacher(tf.Module):
    """Takes images of 8 pixels, gives logits of ten classes, and does something else besides."""

    def __init__(self, besides=tf.no_op):
        super().__init__()
        self.kernel = tf.Variable(tf.random.stateless_normal([192, 10], [0, 1]))
        self._besides = besides

    @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 3], tf.float32, name='images')])
    def serve(self, images):
        with tf.control_dependencies([self._besides()]):
            return {'logits': tf.reshape(images, [-1, 192]) @ self.kernel}


class WhenLoaded(tf.saved_model.experimental.TrackableResource):
    """A resource, such as a table is, that does something when a model with it is loaded."""

    def __init__(self, besides):
        super().__init__()
        self._besides = besides

    def _create_resource(self):
        return tf.raw_ops.HashTableV2(
            key_dtype=tf.string, value_dtype=tf.int64, shared_name='resource'
        )

    def _initialize(self):
        with tf.control_dependencies([self._besides()]):
            return tf.constant(True)


def write(path, module):
    tf.saved_model.save(module, str(path), signatures={'serving_default': module.serve})
    return str(path)


def rewrite(path, change):
    """Changes the graph of a SavedModel, as somebody would who means harm."""
    model = tf.__internal__.saved_model.parse_saved_model(path)
    change(model.meta_graphs[0])
    with open(os.path.join(path, 'saved_model.pb'), 'wb') as file:
        file.write(model.SerializeToString())
    return path


def refusal(path):
    with refused(RunError, path) as raised:
        saved_model_safety.load(str(path))
    return str(raised.value)


@pytest.mark.parametrize(
    'when, operation',
    [
        ('loaded', 'WriteFile'),
        ('loaded', 'PrintV2'),
        ('loaded', 'PyFunc'),
        *(('called', operation) for operation in WRITERS),
    ],
)
def test_a_saved_model_that_would_write_a_file_is_refused_before(tiny, tmp_path, when, operation):
    target = str(tmp_path / 'written')

    def besides():
        return WRITERS[operation](target)

    module = Teacher(besides if when == 'called' else tf.no_op)
    if when == 'loaded':
        module.resource = WhenLoaded(besides)
    tiny.distill.teacher = write(tmp_path / 'model', module)
    for name in os.listdir(tmp_path):  # what tracing or saving it left
        if name != 'model':
            shutil.rmtree(tmp_path / name) if os.path.isdir(tmp_path / name) else os.remove(
                tmp_path / name
            )
    with refused(RunError, tiny.distill.teacher) as raised:
        distillation.make_teacher(tiny, NAMES)
    assert f'with {operation}' in str(raised.value)
    assert os.listdir(tmp_path) == ['model']
    loaded = tf.saved_model.load(tiny.distill.teacher)  # TensorFlow itself lets it
    if when == 'called':
        loaded.signatures['serving_default'](images=tf.constant(PICTURES))
    assert len(os.listdir(tmp_path)) > 1


def test_a_run_whose_model_would_write_a_file_is_not_tried(tmp_path, capsys, monkeypatch):
    for name in (
        'TPU_LOAD_LIBRARY',
        'TPU_SKIP_MDS_QUERY',
        'CUDA_VISIBLE_DEVICES',
        'TF_CPP_MIN_LOG_LEVEL',
    ):  # which `predict` sets
        monkeypatch.setenv(name, os.environ.get(name, '0'))
    target = tmp_path / 'written'
    write(tmp_path / 'run' / 'export', Teacher(lambda: tf.io.write_file(str(target), 'written')))
    (tmp_path / 'run' / 'export' / 'labels.txt').write_text('\n'.join(NAMES))
    assert predict.main([str(tmp_path / 'run'), str(tmp_path / 'image.png')]) == 1
    said = capsys.readouterr().err
    assert (
        said.startswith('error: ')
        and 'with WriteFile: ' in said
        and said.count('\n') == 1
        and not target.exists()
    )


def test_a_foreign_run_cannot_choose_code_for_tfds_to_download(tmp_path):
    (tmp_path / 'config.json').write_text(
        json.dumps({'dataset': {'name': 'somebody:digits', 'data_dir': ''}})
    )
    with refused(RunError, 'somebody:digits'):
        predict.evaluation_examples(str(tmp_path), NAMES)


def test_a_file_read_by_shape_inference_is_refused(tmp_path):
    secret = tmp_path / 'secret'
    secret.write_bytes(np.array([-1], np.int32).tobytes())
    module = Teacher(
        lambda: tf.reshape(tf.ones([3]), tf.io.decode_raw(tf.io.read_file(str(secret)), tf.int32))
    )
    assert 'with ReadFile: ' in refusal(write(tmp_path / 'model', module))


@pytest.mark.parametrize(
    'operation',
    [
        'ReadFile',
        'MatchingFiles',
        'WholeFileReaderV2',
        'ReaderReadV2',
        'TFRecordReaderV2',
        'ImmutableConst',
        'DecodeProtoV2',
        'EncodeProto',
        'GenerateVocabRemapping',
        'LoadAndRemapMatrix',
        'WriteFile',
        'PrintV2',
        'Print',
        'SaveV2',
        'Save',
        'SaveSlices',
        'RestoreV2',
        'Restore',
        'MergeV2Checkpoints',
        'InitializeTableFromTextFileV2',
        'WriteSummary',
        'CreateSummaryFileWriter',
        'TextLineDataset',
        'TFRecordDataset',
        'TFRecordDatasetV2',
        'LMDBDataset',
        'SqlDataset',
        'CacheDataset',
        'CacheDatasetV2',
        'SnapshotDataset',
        'SaveDatasetV2',
        'LoadDataset',
        'DatasetFromGraph',
        'DatasetToTFRecord',
        'DataServiceDataset',
        'DataServiceDatasetV4',
        'RegisterDataset',
        'RegisterDatasetV2',
        'IteratorV2',
        'IteratorGetNext',
        'PyFunc',
        'PyFuncStateless',
        'EagerPyFunc',
        'XlaCallModule',
        'XlaCustomCall',
        'XlaCustomCallV2',
        'DebugIdentity',
        'DebugIdentityV2',
        'DebugIdentityV3',
        'DumpTensor',
        'Copy',
        'CopyHost',
        'Send',
        'Recv',
        '_Send',
        '_Recv',
        '_HostSend',
        'RemoteCall',
        'RpcClient',
        'RpcCall',
        'RpcServer',
        'CollectiveReduceV2',
        'CollectiveGatherV2',
        'NcclAllReduce',
        'ConfigureDistributedTPU',
        'FileSystemSetConfiguration',
        'Abort',
        'NoSuchOperation',
    ],
)
def test_operations_that_reach_outside_do_not_pass_for_computing(operation):
    assert not saved_model_safety.only_computes(operation)


def test_no_op_that_takes_a_file_or_host_counts_as_computing():
    """The oracle is what TensorFlow calls the arguments; the rule looks at their types."""
    outward = re.compile(
        r'(^|_)(file|filename|files|url|urls|address|protocol|path|dir|token|memory_region|descriptor|graph_def)(_|$)'
    )
    told = passing = 0
    for name in dir(tf.raw_ops):
        definition = op_def_registry.get(name)
        if definition and any(
            outward.search(argument.name) for argument in (*definition.input_arg, *definition.attr)
        ):
            told += 1
            assert not saved_model_safety.only_computes(name), name
        passing += definition is not None and saved_model_safety.only_computes(name)
    assert told > 40 and passing > 700


def smuggle(meta):
    """Makes the function of the model's own saver callable, by an object of the model."""
    (saver,) = (
        function.signature.name
        for function in meta.graph_def.library.function
        if 'traced_save' in function.signature.name
    )
    added = meta.object_graph_def.nodes.add()
    added.function.concrete_functions.append(saver)
    meta.object_graph_def.nodes[0].children.add(
        node_id=len(meta.object_graph_def.nodes) - 1, local_name='smuggled'
    )


def call(meta, name):
    """Lets a function of the model call another one."""
    body = next(
        function
        for function in meta.graph_def.library.function
        if 'serve' in function.signature.name
    )
    body.node_def.add(name='called', op='StatefulPartitionedCall').attr['f'].func.name = name


def name_saver(meta):
    call(
        meta,
        next(
            function.signature.name
            for function in meta.graph_def.library.function
            if 'traced_save' in function.signature.name
        ),
    )


def custom_operation(meta):
    body = next(
        function
        for function in meta.graph_def.library.function
        if 'serve' in function.signature.name
    )
    body.node_def.add(name='own', op='OperationOfALibrary\nto load')


def hidden_in_the_main_graph(meta):
    meta.graph_def.node.add(name='hidden', op='WriteFile')


@pytest.mark.parametrize(
    'change, says',
    [
        (smuggle, 'MergeV2Checkpoints, SaveV2, ShardedFilename'),
        (name_saver, 'MergeV2Checkpoints, SaveV2, ShardedFilename'),
        (
            lambda meta: call(meta, '__inference_of_this_process_7'),
            'with __inference_of_this_process_7: ',
        ),
        (custom_operation, 'with OperationOfALibrary to load: '),
        (hidden_in_the_main_graph, 'with WriteFile: '),
        (lambda meta: meta.ClearField('object_graph_def'), 'TensorFlow 1'),
    ],
)
def test_a_graph_that_was_changed_to_do_more_is_refused(tmp_path, change, says):
    assert says in refusal(rewrite(write(tmp_path / 'model', Teacher()), change))


class Labelled(Teacher):
    """A classifier with the tables that classifiers have: names from a file of the model, numbers
    from its graph, others from its checkpoint.
    """

    def __init__(self, names_file):
        super().__init__()
        self.names = tf.lookup.StaticHashTable(
            tf.lookup.TextFileInitializer(
                str(names_file),
                tf.int64,
                tf.lookup.TextFileIndex.LINE_NUMBER,
                tf.string,
                tf.lookup.TextFileIndex.WHOLE_LINE,
            ),
            'unknown',
        )
        self.numbers = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(NAMES, list(range(10))), -1
        )
        self.counts = tf.lookup.experimental.MutableHashTable(tf.int64, tf.int64, -1)
        self.counts.insert(tf.range(10, dtype=tf.int64), tf.range(10, dtype=tf.int64) * 2)

    @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 3], tf.float32, name='images')])
    def serve(self, images):
        best = tf.argmax(tf.reshape(images, [-1, 192]) @ self.kernel, -1)
        return {
            'label': self.names.lookup(best),
            'number': self.numbers.lookup(self.names.lookup(best)),
            'count': self.counts.lookup(best),
        }


@pytest.fixture
def names_file(tmp_path):
    path = tmp_path / 'names.txt'
    path.write_text('\n'.join(NAMES) + '\n')
    return path


def test_a_classifier_with_tables_of_names_is_loaded(tmp_path, names_file):
    module = Labelled(names_file)
    loaded = saved_model_safety.load(write(tmp_path / 'model', module))
    names_file.unlink()
    answer = loaded.signatures['serving_default'](images=tf.constant(PICTURES))
    expected = module.serve(PICTURES)
    for key in ('label', 'number', 'count'):
        np.testing.assert_array_equal(answer[key], expected[key])


@pytest.mark.parametrize(
    'filename',
    ['../names.txt', '../../secret.txt', '/etc/hostname', 'gs://bucket/names.txt', 'link.txt', ''],
)
def test_an_asset_lies_in_the_folder_of_the_model(tmp_path, names_file, filename):
    path = write(tmp_path / 'model', Labelled(names_file))
    os.symlink('/etc/hostname', os.path.join(path, 'assets', 'link.txt'))

    def change(meta):
        meta.asset_file_def[0].filename = filename

    assert f'its asset {filename!r} is outside its folder' in refusal(rewrite(path, change))


def initializer(meta):
    """The function that fills a table from a file."""
    return next(
        function
        for function in meta.graph_def.library.function
        if any(node.op == 'InitializeTableFromTextFileV2' for node in function.node_def)
    )


def table_of_a_constant(meta):
    """Makes the initializer of a table read another file than the asset."""
    body = initializer(meta)
    constant = body.node_def.add(name='elsewhere', op='Const')
    constant.attr['dtype'].type = tf.string.as_datatype_enum
    constant.attr['value'].tensor.CopyFrom(tf.make_tensor_proto('/etc/hostname'))
    next(node for node in body.node_def if node.op == 'InitializeTableFromTextFileV2').input[1] = (
        'elsewhere:output:0'
    )


def called_initializer(meta):
    call(meta, initializer(meta).signature.name)


def asset_that_is_none(meta):
    for node in meta.object_graph_def.nodes:
        if node.HasField('asset'):
            node.registered_name = 'tf.TrackableConstant'


@pytest.mark.parametrize('change', [table_of_a_constant, called_initializer, asset_that_is_none])
def test_a_table_is_read_from_an_asset_alone(tmp_path, names_file, change):
    assert 'with InitializeTableFromTextFileV2: ' in refusal(
        rewrite(write(tmp_path / 'model', Labelled(names_file)), change)
    )


def exported(model, path):
    model.export(path, verbose=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, write_out',
    [('MobileNetV3Small', tf.saved_model.save), ('MobileNetV2', exported)],
)
def test_what_keras_exports_is_loaded(tmp_path, name, write_out):
    model = getattr(keras.applications, name)(weights=None, classes=10, input_shape=(32, 32, 3))
    write_out(model, str(tmp_path / 'model'))
    pictures = np.random.RandomState(1).uniform(0, 255, (2, 32, 32, 3)).astype(np.float32)
    (answer,) = (
        saved_model_safety.load(str(tmp_path / 'model'))
        .signatures['serving_default'](tf.constant(pictures))
        .values()
    )
    np.testing.assert_allclose(answer, model(pictures, training=False), rtol=1e-4, atol=1e-4)


def test_dropout_that_draws_is_loaded(tmp_path):
    module = Teacher(lambda: tf.nn.dropout(tf.random.uniform([3]), 0.5))
    module.generator = tf.random.Generator.from_seed(1)
    assert saved_model_safety.load(write(tmp_path / 'model', module)).signatures['serving_default'](
        images=tf.constant(PICTURES)
    )['logits'].shape == (2, 10)


def backbone():
    return keras.applications.MobileNetV2(
        include_top=False, weights=None, input_shape=(32, 32, 3), pooling='avg'
    )


def test_a_keras_file_gives_weights_and_runs_no_layer(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target, theirs = tmp_path / 'written', backbone()
    writes = keras.layers.Lambda(
        lambda features: (__import__('pathlib').Path('written').touch(), features)[1]
    )
    whole = keras.Model(theirs.input, writes(theirs.output))
    tiny.model.name = 'MobileNetV2'
    tiny.model.weights = str(tmp_path / 'theirs.keras')
    tiny.image_size = 32
    whole.save(tiny.model.weights)
    target.unlink()
    model = models.build_model(tiny, 10)
    pretrained.load_weights(model, tiny, NAMES, checkpoints.find_checkpoint)
    for ours, original in zip(
        models.float_variables(model), models.float_variables(theirs), strict=False
    ):
        np.testing.assert_array_equal(ours, original)
    assert not target.exists()
    keras.saving.load_model(tiny.model.weights, safe_mode=False)  # what must not happen
    assert target.exists()


def test_weights_that_refer_to_another_file_are_refused(tmp_path, tiny):
    tiny.model.name = 'MobileNetV2'
    tiny.model.weights = str(tmp_path / 'theirs.weights.h5')
    tiny.image_size = 32
    backbone().save_weights(tiny.model.weights)
    secret = tmp_path / 'secret'
    secret.write_bytes(bytes(4 * 3 * 3 * 3 * 32))
    with h5py.File(tiny.model.weights, 'r+') as file:
        first = file['layers/conv2d/vars']
        shape = first['0'].shape
        del first['0']
        first.create_dataset(
            '0', shape, np.float32, external=[(str(secret), 0, h5py.h5f.UNLIMITED)]
        )
    with refused(RunError, 'external'):
        pretrained.load_weights(
            models.build_model(tiny, 10), tiny, NAMES, checkpoints.find_checkpoint
        )


# What makes a program of data, and the files that may: what they read was made by their own
# process, or one that it started.
MODULES = {
    'pickle': ('diagnostics/worker_process.py',),
    **dict.fromkeys(('cloudpickle', 'dill', 'joblib', 'marshal', 'shelve', 'yaml'), ()),
}
FUNCTIONS = {
    **dict.fromkeys(('eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen'), ()),
    **dict.fromkeys(('tf.import_graph_def', 'tf.load_op_library', 'tf.load_library'), ()),
    **dict.fromkeys(
        (
            'keras.models.load_model',
            'keras.saving.load_model',
            'keras.config.enable_unsafe_deserialization',
        ),
        (),
    ),
    'keras.saving.deserialize_keras_object': ('modeling/fused_layers.py',),
    'tf.saved_model.load': ('modeling/saved_model_safety.py', 'outputs/read_saved_model.py'),
}


@pytest.mark.parametrize('name', CODE)
def test_nothing_that_is_read_becomes_a_program(name):
    with open(os.path.join(ROOT, name)) as file:
        nodes = list(ast.walk(ast.parse(file.read())))
    imported = [
        alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
    ] + [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    for module in imported:
        assert name in MODULES.get(module.split('.')[0], (name,)), module
    for node in nodes:
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert name in FUNCTIONS.get(function, (name,)), f'{function}, line {node.lineno}'
            for keyword, harmless in (
                ('shell', 'False'),
                ('allow_pickle', 'False'),
                ('safe_mode', 'True'),
            ):
                assert keywords.get(keyword, harmless) == harmless, f'{keyword}, line {node.lineno}'


def listening(process):
    """Local addresses of TCP sockets on which a process or one it started waits for others, as
    /proc/net/tcp writes them.
    """
    found = set()
    for one in [process, *process.children(recursive=True)]:
        try:
            folder = f'/proc/{one.pid}'
            held = {os.readlink(f'{folder}/fd/{number}') for number in os.listdir(f'{folder}/fd')}
            for table in ('tcp', 'tcp6'):
                with open(f'{folder}/net/{table}') as lines:
                    rows = [line.split() for line in list(lines)[1:]]
                found |= {
                    row[1] for row in rows if row[3] == '0A' and f'socket:[{row[9]}]' in held
                }  # 0A is TCP_LISTEN
        except (OSError, psutil.Error):  # it has ended, or has closed what was listed
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/net/tcp'), reason='Linux says in /proc who listens')
def test_a_run_listens_on_no_port(tmp_path):
    command = [
        sys.executable,
        'main.py',
        '--config=configs/digits.py',
        f'--workdir={tmp_path}',
        '--config.model.name=tiny',
        '--config.image_size=16',
        '--config.train_for=20 steps',
        '--config.eval_every=10 steps',
        '--config.checkpoint_every=10 steps',
    ]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        looks, children, process = 0, set(), psutil.Process(run.pid)
        while run.poll() is None:
            assert listening(process) == set()
            children |= {child.pid for child in process.children(recursive=True)}
            looks += 1
            time.sleep(0.2)
        assert run.returncode == 0, run.stderr.read()
    assert (
        os.path.exists(tmp_path / 'summary.json') and looks > 20 and children
    )  # the exported model is tried in a process of its own


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/net/tcp'), reason='Linux says in /proc who listens')
def test_the_service_listens_because_it_was_asked_to():
    with subprocess.Popen(
        [sys.executable, '-m', 'inputs.service'], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as service:
        try:
            port = int(service.stdout.readline().split()[2].rpartition(':')[2])
            assert f'{port:04X}' in {
                address.rpartition(':')[2] for address in listening(psutil.Process(service.pid))
            }
        finally:
            service.kill()
