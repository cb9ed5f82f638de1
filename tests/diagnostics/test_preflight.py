"""Preflight compiles the step that trains with the real TPU compiler, and says what that says. The
compiler is installed on the first use.
"""

import concurrent.futures
import gzip
import os
import re
import sys
import threading

import pytest

from common.errors import ConfigError, RunError
from diagnostics import hlo_cost, preflight, tpu_compiler
from diagnostics.tpu_compiler import DoesNotFit, Topology
from experiment import planning
from tests.conftest import refused, slow

TEXT = """HloModule step

%fused_computation (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %big = bf16[8,128]{1,0} fusion(%p), backend_config={"estimated_cycles":"999"}
}

%body (q: (s32[], f32[128])) -> (s32[], f32[128]) {
  %q = (s32[], f32[128]{0:T(128)}) parameter(0)
  %element.1 = f32[128]{0:T(128)} get-tuple-element(%q), index=1
  ROOT %turn = (s32[], f32[128]{0:T(128)}) fusion(%element.1), kind=kLoop, backend_config={"estimated_cycles":"10"}
}

%condition (q.1: (s32[], f32[128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(8)
  %q.1 = (s32[], f32[128]{0:T(128)}) parameter(0)
  %number = s32[]{:T(128)} get-tuple-element(%q.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%number, %limit), direction=LT
}

ENTRY %main (a: bf16[8,128], b: f32[128]) -> f32[128] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[128]{0:T(128)} parameter(1)
  %copy-start.1 = (f32[128]{0:T(128)S(1)}, f32[128]{0:T(128)}, u32[]{:S(2)}) copy-start(%b)
  %copy-done.1 = f32[128]{0:T(128)S(1)} copy-done(%copy-start.1)
  %convolution.5 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%a, %copy-done.1), kind=kOutput, metadata={op_name="gradient_tape/Net_1/backbone_1/block1a_conv_1/convolution/Conv2DBackpropInput"}, backend_config={"window_config":{"estimated_cycles":"700"}}
  %all-reduce.3 = f32[128]{0:T(128)} all-reduce(%convolution.5), replica_groups={{0,1,2,3}}
  ROOT %loss.2 = (f32[128]{0:T(128)}, s32[]{:T(128)}) fusion(%all-reduce.3, %convolution.5), kind=kLoop, metadata={op_name="mul_2"}, backend_config={"estimated_cycles":"42"}
}
"""  # noqa: E501 - a line of HLO is as long as it is


def test_what_a_program_says_is_read():
    memory = {'argument': 1000, 'output': 300, 'alias': 200, 'temp': 50, 'generated_code': 7}
    program = hlo_cost.read_program(
        {'compiler': 'libtpu', 'seconds': 1.0, 'flops': 5.0, 'memory': memory, 'text': TEXT},
        tpu_compiler.CHIPS['v3'],
    )
    assert program.cycles == 742  # of the entry computation only
    assert (
        program.memory_bytes == 1157 and program.memory_available == 16 * 2**30
    )  # a chip of v3 has two replicas
    first, second = program.instructions
    assert first == hlo_cost.Instruction(
        700, 'block1a_conv', 'convolution/Conv2DBackpropInput', True, 'bf16[8,128]'
    )
    assert second == hlo_cost.Instruction(42, '', 'mul', False, 'f32[128]')
    assert program.all_reduce_bytes == (512,)
    # The copy's 512 bytes once; the convolution reads a and its copy is not in HBM; the sum writes
    # what the last one reads, which writes 512 + 4 more.
    assert program.hbm_traffic == 512 + 2048 + 512 + (512 + 512 + 4)


def test_what_a_loop_repeats_counts_each_time():
    loop = '  %while.2 = (s32[], f32[128]) while(%b), condition=%condition, body=%body\n'
    text = TEXT.replace('  %copy-start.1', loop + '  %copy-start.1')
    memory = dict.fromkeys(('argument', 'output', 'alias', 'temp', 'generated_code'), 0)
    answer = {'compiler': '', 'seconds': 1.0, 'flops': 5.0, 'memory': memory}
    once = hlo_cost.read_program({**answer, 'text': TEXT}, tpu_compiler.CHIPS['v5e'])
    looped = hlo_cost.read_program({**answer, 'text': text}, tpu_compiler.CHIPS['v5e'])
    assert looped.cycles == once.cycles + 8 * 10 and looped.flops == 8 * once.flops
    assert looped.hbm_traffic == once.hbm_traffic + 8 * (512 + 512 + 4)
    endless = text.replace('direction=LT', 'direction=NE')  # who knows how often
    assert hlo_cost.read_program({**answer, 'text': endless}, tpu_compiler.CHIPS['v5e']).flops == 5


@pytest.mark.parametrize('fits', [True, False])
def test_numbers_of_micro_batches_are_compared(tiny, memory_for, capsys, fits):
    tiny.batch_size, tiny.accumulate_steps = 512, 'auto'
    memory_for(10**6 if fits else 1)
    preflight.tune_micro_batches(
        tiny,
        preflight.plan_for(tiny, preflight.known_data(tiny), Topology.parse('v5e')),
        Topology.parse('v5e'),
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(('does not fit' in line) != fits for line in lines)
    assert ('which this config has' in lines[0]) == fits and '1 micro-batch of 512' in lines[0]


@pytest.mark.parametrize(
    'text, chips, replicas, name, accelerator',
    [
        ('v5e:2x2', 4, 4, 'v5e:2x2', 'v5litepod-4'),
        ('v5e', 1, 1, 'v5e:2x2', 'v5litepod-4'),
        ('v5e:4x4', 16, 16, 'v5e:4x4', 'v5litepod-16'),
        ('v2:2x2', 4, 8, 'v2:2x2', 'v2-8'),
        ('v4:2x2x1', 4, 4, 'v4:2x2x1', 'v4-8'),
        ('v7x:2x2x1', 4, 8, 'tpu7x:2x2x1', 'v7x-8'),
        ('v6e', 1, 1, 'v6e:2x2', 'v6e-4'),
    ],
)
def test_a_topology_is_so_many_chips(text, chips, replicas, name, accelerator):
    topology = Topology.parse(text)
    assert (topology.num_chips, topology.num_replicas, topology.for_compiler()) == (
        chips,
        replicas,
        (name, accelerator),
    )
    assert Topology.parse(str(topology)) == Topology.parse(f' {text.upper()}') == topology


@pytest.mark.parametrize(
    'text',
    [
        '',
        'v9',
        'v5e:',
        'v5e:2',
        'v4:2x2',
        'v5e:0x2',
        'h100:8',
        'v5e:3x5',
        'v5e:100x100',
        'v5litepod-8',
    ],
)
def test_what_is_no_topology_is_one_line(text):
    with refused(ConfigError):
        Topology.parse(text)


@pytest.mark.parametrize('text, sums', [slow('v5e:2x2', True)])
def test_a_config_is_compiled_once_with_its_all_reduces(tiny, text, sums, capsys, monkeypatch):
    tiny.model.sync_batch_norm = False  # what is left to sum are the gradients
    preflight.run(tiny, '', text)
    said = capsys.readouterr().out
    assert (
        'compiles' in said
        and 'bottleneck' in said
        and 'chip-hours' in said
        and re.search(r' (conv|block2_\w+|predictions) ', said)
    )
    monkeypatch.setattr(tpu_compiler, '_compile', lambda *arguments: pytest.fail('compiled again'))
    topology, data = Topology.parse(text), preflight.known_data(tiny)
    plan = planning.make_plan(tiny, data.num_train, data.num_eval, 10, topology.num_replicas)
    training, evaluation = preflight.compile_steps(tiny, plan, topology)
    weights = 4 * (9 * 3 * 16 + 2 * 16 + 9 * 16 * 32 + 2 * 32 + 33 * 10)  # bytes of all gradients
    assert (
        sum(training.program.all_reduce_bytes) == (weights if sums else 0)
        and not evaluation.program.all_reduce_bytes
    )
    # Two convolutions of 3 x 3, with stride 2, from 16 px; forward, and backward to both inputs but
    # the images.
    forward = 2 * 9 * (8 * 8 * 3 * 16 + 4 * 4 * 16 * 32) * evaluation.batch
    assert (
        evaluation.program.flops == pytest.approx(forward, rel=0.5)
        and forward < training.program.flops / training.batch * evaluation.batch < 6 * forward
    )
    figures = preflight.figures(training, topology)
    assert figures['images_per_second_per_chip']["compiler's estimate"] == pytest.approx(
        training.batch * topology.chip.clock / training.program.cycles
    )
    assert figures['hours'] == pytest.approx(
        plan.total_steps * training.program.cycles / topology.chip.clock / 3600
    )


@pytest.mark.slow
def test_a_batch_too_large_is_an_error_with_one_that_fits(tiny):
    tiny.batch_size, tiny.dataset.train_split = 2**22, 'train'
    with refused(RunError, '4,194,304 images', 'v5e:1x1', ' of 15.75 GiB') as error:
        preflight.run(tiny, '', 'v5e')
    suggested = int(error.value.fix.split('--config.batch_size=')[1].split()[0])
    assert 2**19 < suggested < 2**22


@pytest.mark.slow
def test_an_evaluation_too_large_names_eval_batch_size(tiny):
    tiny.eval_batch_size = 2**22
    with refused(RunError, '4,194,304 images', 'v5e:1x1', fix='--config.eval_batch_size='):
        preflight.run(tiny, '', 'v5e')


@pytest.fixture
def memory_for(monkeypatch):
    """A compiler for which a replica has memory for so many images in a batch; it keeps what was
    tried.
    """

    def of(limit):
        def compile_training(config, plan, topology):
            tried.append(plan.batch_size // plan.num_replicas)
            if tried[-1] > limit:
                raise DoesNotFit(tried[-1], limit)
            memory = tried[-1] + 500, limit + 500
            return hlo_cost.Program('libtpu', 1.0, 1.0, *memory, 1, (), (instruction,))

        tried, instruction = [], hlo_cost.Instruction(1000, '', 'mul', False, 'f32[]')
        monkeypatch.setattr(preflight, 'compile_training', compile_training)
        return tried

    return of


@pytest.mark.parametrize('limit, fits', [(3, 3), (2, 0), (500, 456)])
def test_a_batch_that_fits_keeps_the_shares_of_a_replica(tiny, memory_for, limit, fits):
    """A multiple of 3, and of 8 where it can be."""
    tiny.batch_size, tiny.accumulate_steps = 960, 3
    tried = memory_for(limit)
    sentence = preflight.batch_that_fits(
        tiny,
        preflight.known_data(tiny),
        Topology.parse('v5e'),
        DoesNotFit(960, limit),
        'batch_size',
    )
    assert not any(batch % 3 for batch in tried)
    assert sentence.startswith(
        f'--config.batch_size={fits} fits' if fits else 'nor does the smallest batch'
    ) and (tried[-1] == fits or not fits)


def test_the_largest_batch_keeps_multiples_and_ends_with_data(tiny, memory_for, capsys):
    tiny.batch_size, tiny.augment.repeats, tiny.train_for = 48, 3, '1 epochs'
    tried = memory_for(10**6)
    compiled_step = preflight.CompiledStep(
        'training', 48, 16, 30, hlo_cost.Program('libtpu', 1.0, 1.0, 548, 10**6, 1, (), ())
    )
    found, _ = preflight.search_largest(
        tiny, preflight.known_data(tiny), Topology.parse('v5e'), compiled_step
    )
    assert (
        not any(batch % 24 for batch in tried) and 0.9 * 1437 < found <= 1437
    )  # an epoch is one step then
    assert 'less than one step' in capsys.readouterr().out


def test_the_largest_batch_is_found_to_within_a_few_percent(tiny, memory_for):
    limit = 3000
    memory_for(limit)
    topology, data = Topology.parse('v5e'), preflight.known_data(tiny)
    compiled_step = preflight.CompiledStep(
        'training', 32, 16, 30, hlo_cost.Program('libtpu', 1.0, 1.0, 532, limit + 500, 1, (), ())
    )
    found, program = preflight.search_largest(tiny, data, topology, compiled_step)
    assert 0.96 * limit <= found <= limit and program.memory_bytes == found + 500


@pytest.mark.parametrize('damage', [b'', b'{}', gzip.compress(b'{}'), None])
def test_what_was_kept_and_is_damaged_is_compiled_again(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(tpu_compiler, 'cache_folder', lambda: str(tmp_path))
    monkeypatch.setattr(tpu_compiler, 'environment', lambda: 'python')
    compiled = []
    answer = {
        'compiler': 'libtpu',
        'seconds': 1.0,
        'flops': 5.0,
        'text': TEXT,
        'memory': dict.fromkeys(('argument', 'output', 'alias', 'temp', 'generated_code'), 1),
    }
    monkeypatch.setattr(
        tpu_compiler, '_compile', lambda *arguments: compiled.append(arguments) or answer
    )
    for times in (1, 2, 2):
        tpu_compiler.compile_program(lambda: b'program', Topology.parse('v5e'), 'a text')
        (kept,) = (tmp_path / 'compiled').iterdir()
        if len(compiled) == 1:
            kept.write_bytes(kept.read_bytes()[:100] if damage is None else damage)
        assert len(compiled) == times


@pytest.mark.parametrize(
    'error, kind, times',
    [
        ('the disk is full', RunError, 2),
        ('Used 20.0G of 15.75G hbm', tpu_compiler.DoesNotFit, 1),
    ],
)
def test_only_what_the_program_is_to_blame_for_is_kept(tmp_path, monkeypatch, error, kind, times):
    monkeypatch.setattr(tpu_compiler, 'cache_folder', lambda: str(tmp_path))
    monkeypatch.setattr(tpu_compiler, 'environment', lambda: 'python')
    compiled = []
    monkeypatch.setattr(
        tpu_compiler, '_compile', lambda *arguments: compiled.append(arguments) or {'error': error}
    )
    for _ in range(2):
        with pytest.raises(kind):
            tpu_compiler.compile_program(lambda: b'program', Topology.parse('v5e'), 'a text')
    assert len(compiled) == times


@pytest.mark.slow
def test_what_the_compiler_cannot_read_is_one_line():
    with refused(RunError, 'HloModuleProto', fix='rm -r '):
        tpu_compiler.compile_program(lambda: b'no program', Topology.parse('v5e'))


@pytest.fixture
def without_compiler(monkeypatch, tmp_path):
    """The compiler is not installed here, and its environment will be in `tmp_path`."""
    monkeypatch.setattr(tpu_compiler.installation, 'missing_of', lambda wanted: ['libtpu==1'])
    monkeypatch.setattr(tpu_compiler, 'cache_folder', lambda: str(tmp_path))


def test_the_compiler_that_a_tpu_runs_with_is_used_where_it_is(monkeypatch):
    monkeypatch.setattr(tpu_compiler.installation, 'missing_of', lambda wanted: [])
    assert tpu_compiler.environment() == sys.executable


def test_an_environment_whose_python_has_gone_is_made_again(without_compiler, monkeypatch):
    made = []

    def install(folder, python, pins):
        made.append(folder)
        os.makedirs(os.path.dirname(python), exist_ok=True)
        os.symlink(os.devnull, python)

    monkeypatch.setattr(tpu_compiler, '_install', install)
    python = tpu_compiler.environment()
    assert tpu_compiler.environment() == python and len(made) == 1
    os.remove(python)
    assert tpu_compiler.environment() == python and len(made) == 2


def test_two_preflights_at_once_install_the_compiler_once(without_compiler, monkeypatch):
    installed, begun, go_on = [], threading.Event(), threading.Event()

    def install(folder, python, pins):
        begun.set()
        assert go_on.wait(30)
        os.makedirs(os.path.dirname(python))
        os.symlink(os.devnull, python)
        installed.append(python)

    monkeypatch.setattr(tpu_compiler, '_install', install)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(tpu_compiler.environment)
        assert begun.wait(30)
        second = pool.submit(tpu_compiler.environment)
        assert not concurrent.futures.wait([second], 0.5).done  # it waits
        go_on.set()
        assert [first.result()] == [second.result()] == installed
