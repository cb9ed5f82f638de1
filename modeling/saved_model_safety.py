"""Loads SavedModels from others only if they do no more than compute.

"TensorFlow models are programs, and need to be treated as such from a security perspective"
(TensorFlow's SECURITY.md, https://github.com/tensorflow/tensorflow/blob/master/SECURITY.md): a
graph can read and write files, use the network and call Python. The same text calls it a common
solution "to allow only a few safe Ops", and still recommends a sandbox. This is that solution, not
a sandbox: a graph can still use up all memory, never end, or trigger a bug in an operation.

An operation can reach outside the graph only if it keeps state, or if a string tells it where. So
stateless operations without strings are allowed without being listed, and so are those listed
below. TensorFlow's own `saved_model_cli scan` looks for only three names.
"""

import os
from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import op_def_registry

from common.errors import RunError, one_line

# Stateful, or with strings, and yet within the graph: calls, variables, tables, arrays, random
# numbers, checks.
WITHIN = """
StatefulPartitionedCall PartitionedCall If While Case Enter
VarHandleOp VarIsInitializedOp ReadVariableOp VariableShape ResourceGather ResourceGatherNd
AssignVariableOp AssignAddVariableOp AssignSubVariableOp
HashTableV2 AnonymousHashTable MutableHashTableV2 AnonymousMutableHashTable InitializeTableV2
LookupTableFindV2 LookupTableSizeV2 LookupTableInsertV2 LookupTableImportV2 LookupTableExportV2
TensorArrayV3 TensorArrayReadV3 TensorArrayWriteV3 TensorArrayGatherV3 TensorArrayScatterV3
TensorArraySizeV3 TensorArrayConcatV3 TensorArraySplitV3
RandomUniform RandomUniformInt RandomStandardNormal TruncatedNormal RandomShuffle Multinomial
StatelessRandomGetAlg RngReadAndSkip RngSkip
StatefulUniform StatefulUniformInt StatefulUniformFullInt StatefulStandardNormalV2
StatefulTruncatedNormal
Assert CheckNumerics GuaranteeConst PreventGradient
"""
# They take strings but only compute: the strings are the content of files, text, an equation or a
# policy.
STRINGS = """
DecodeAndCropJpeg DecodeBmp DecodeGif DecodeImage DecodeJpeg DecodePng DecodeWebP ExtractJpegShape
EncodeJpeg
DecodeBase64 EncodeBase64 DecodeRaw DecodePaddedRaw ParseExample ParseExampleV2
AsString ReduceJoin RegexFullMatch RegexReplace StaticRegexFullMatch StaticRegexReplace StringFormat
StringJoin StringLength StringLower
StringSplitV2 StringStrip StringToHashBucketFast StringToNumber StringUpper Substr
DataFormatDimMap DataFormatVecPermute Einsum GatherNd RaggedTensorToTensor ScatterNd
TensorScatterAdd TensorScatterMax TensorScatterMin TensorScatterSub TensorScatterUpdate
ImageProjectiveTransformV2 ImageProjectiveTransformV3 ScaleAndTranslate
"""
ALLOWED = frozenset((WITHIN + STRINGS).split())
# Every SavedModel has functions for a saver of TensorFlow 1, which nothing in it calls.
SAVER = frozenset(
    ['SaveV2', 'RestoreV2', 'MergeV2Checkpoints', 'ShardedFilename', 'DisableCopyOnRead']
)
TABLE_OF_A_FILE = 'InitializeTableFromTextFileV2'
STRING_KINDS = ('string', 'list(string)')
MAX_NAMED = 5


def load(path: str) -> Any:
    """Returns `tf.saved_model.load(path)` of a model that only computes.

    Nothing in it runs before that is known.

    Raises: RunError for one that can do more, that has files outside its folder, or is of
        TensorFlow 1; what TensorFlow raises for a damaged one.
    """
    model = tf.__internal__.saved_model.parse_saved_model(path)
    if len(model.meta_graphs) != 1 or not model.meta_graphs[0].HasField('object_graph_def'):
        raise RunError(
            f'{path} is not loaded: it is a TensorFlow 1 model, whose graph runs as a whole, so '
            'that it cannot be checked function by function',
            'export it with tf.saved_model.save of TensorFlow 2',
        )
    (graph,) = model.meta_graphs
    found = sorted(_beyond_computing(graph))
    if found:
        names = one_line(', '.join(found[:MAX_NAMED]), 200)
        if len(found) > MAX_NAMED:
            names += f' and {len(found) - MAX_NAMED} more'
        raise RunError(
            f'{path} is not loaded: its graph can do more than compute, with {names}',
            'export it without them, or use a model trained here',
        )
    for asset in graph.asset_file_def:
        if not _is_inside(path, asset.filename):
            name = one_line(repr(asset.filename), 200)
            raise RunError(
                f'{path} is not loaded: its asset {name} is outside its folder', 'export it again'
            )
    return tf.saved_model.load(path)


def only_computes(operation: str) -> bool:
    """Returns whether the TensorFlow operation of this name stays within the graph."""
    definition = op_def_registry.get(operation)
    if definition is None or operation.startswith('_') or operation in ALLOWED:
        return operation in ALLOWED
    string = tf.string.as_datatype_enum
    takes_strings = any(argument.type == string for argument in definition.input_arg)
    has_string_attribute = any(
        attribute.type in STRING_KINDS and not attribute.HasField('allowed_values')
        for attribute in definition.attr
    )
    return not (definition.is_stateful or takes_strings or has_string_attribute)


def _beyond_computing(graph: Any) -> set[str]:
    """Returns names of unsafe operations, and of called functions that are not in the graph."""
    library, objects = graph.graph_def.library, graph.object_graph_def
    functions = library.function
    bodies = [node for function in functions for node in function.node_def]
    own = {function.signature.name for function in functions}
    named = {name for node in bodies for name in _functions_in(node.attr)}
    called = named | {node.op for node in bodies}
    gradients = [*library.gradient, *library.registered_gradients]
    loaded = called | set(objects.concrete_functions)
    loaded |= {name for node in objects.nodes for name in _functions_of(node)}
    loaded |= {gradient.gradient_func for gradient in gradients}

    def is_unsafe(operation: str) -> bool:
        is_own_function = operation in own and op_def_registry.get(operation) is None
        return not only_computes(operation) and not is_own_function

    def check(nodes: Iterable[Any], allowed: frozenset[str]) -> set[str]:
        return {node.op for node in nodes if node.op not in allowed and is_unsafe(node.op)}

    # These nodes are not loaded, but the values of constants among them may be.
    found = (named - own) | check(graph.graph_def.node, SAVER | {TABLE_OF_A_FILE})
    for function in functions:
        name = function.signature.name
        allowed = frozenset() if name in loaded else SAVER
        if name not in called and _reads_only_assets(function, objects):
            allowed |= {TABLE_OF_A_FILE}
        found |= check(function.node_def, allowed)
    return found


def _functions_in(attributes: Any) -> Iterator[str]:
    """Yields names of the functions that a node calls."""
    for value in attributes.values():
        functions = [value.func] if value.HasField('func') else value.list.func
        for function in functions:
            yield function.name
            yield from _functions_in(function.attr)


def _functions_of(node: Any) -> list[str]:
    """Returns names of the functions of a saved object."""
    return [
        *node.function.concrete_functions,
        node.bare_concrete_function.concrete_function_name,
        node.captured_tensor.concrete_function,
    ]


def _reads_only_assets(function: Any, objects: Any) -> bool:
    """Returns whether a function fills tables only from files that are assets of the model.

    Loading binds the model's assets to the last arguments of the function.
    """
    name = function.signature.name
    bound = []
    if name in objects.concrete_functions:
        bound = objects.concrete_functions[name].bound_inputs
    # The first arguments are not bound.
    pairs = zip(reversed(function.signature.input_arg), reversed(bound), strict=False)
    assets = {
        argument.name
        for argument, number in pairs
        if objects.nodes[number].HasField('asset') and not objects.nodes[number].registered_name
    }
    return all(node.input[1] in assets for node in function.node_def if node.op == TABLE_OF_A_FILE)


def _is_inside(path: str, asset: str) -> bool:
    folder = os.path.join(os.path.realpath(path), 'assets', '')
    return '://' not in asset and os.path.realpath(os.path.join(folder, asset)).startswith(folder)
