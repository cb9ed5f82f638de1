"""Every command in README.md and the pages that continue it runs here, or says why it does not."""

import os
import re
import subprocess
import sys
from typing import NamedTuple

import pytest

from tests import image_kinds
from tests.test_layout import ROOT

DIGITS = (
    '--config.model.name=tiny --config.image_size=16 --config.batch_size=16 '
    '--config.eval_batch_size=120 '
    "--config.train_for='4 steps' --config.checkpoint_every='4 steps'"
)
FOLDER = (
    '--config.model.name=tiny --config.model.drop_path=0.0 --config.image_size=16 '
    '--config.batch_size=8 '
    "--config.eval_batch_size=8 --config.train_for='4 steps' --config.checkpoint_every='4 steps'"
)
PYTHON = '.venv/bin/python'


class Runs(NamedTuple):
    """How a command runs here.

    Attributes:
        more: further arguments, which make it small; later ones count.
        whole: the whole command, where README leaves parts out.
        status: of its end.
        says: what its output has to contain.
    """

    more: str = ''
    whole: str = ''
    status: int = 0
    says: str = ''


class Not(NamedTuple):
    """Why a command does not run here."""

    reason: str


HOURS = Not(
    'measures something, for minutes to hours; its parts are tested by the tests that '
    'docs/architecture.md names'
)
OF_DIGITS = f'{PYTHON} main.py --config=configs/digits.py --workdir=runs/digits'
COMMANDS = {
    'make train': Not(
        'takes minutes; both commands of its recipe run here, one as the fixture, one as '
        '--mode=check'
    ),
    'make test': Not('runs this file'),
    f'{PYTHON} main.py --config=configs/folder.py --config.dataset.data_dir=DIR': Runs(
        FOLDER, says='report in runs/folder/report.md'
    ),
    f'{PYTHON} main.py --config=configs/finetune.py --config.dataset.name=folder '
    '--config.dataset.data_dir=DIR '
    '--config.dataset.train_split=train --config.dataset.eval_split=test': Runs(
        f"{FOLDER} --config.model.weights=''", says='report in runs/finetune/report.md'
    ),
    f'{PYTHON} main.py --config=configs/folder.py --config.dataset.data_dir=DIR '
    '--mode=preview': Runs(FOLDER, says='preview/batch_0.png'),
    ".venv/bin/python -m pip install -c requirements/cpu.txt '.[heif]'": Not(
        'installs; tests/inputs/test_file_signatures.py reads HEIC'
    ),
    '--config.dataset.name=cifar10': Not(
        'downloads the data set; tests/inputs/test_datasets.py reads made-up ones'
    ),
    f'{PYTHON} main.py --config=configs/imagenet.py': Runs(
        status=1, says='ILSVRC2012_img_train.tar'
    ),
    f'{PYTHON} main.py --config=configs/imagenet.py --config.progressive.stages=4 '
    '--config.progressive.image_size=128': Not(
        'needs ImageNet; tests/test_train.py trains in stages'
    ),
    f'{PYTHON} main.py --config=configs/imagenet_distill.py': Not(
        'needs ImageNet and weights; tests/modeling/test_pretrained.py'
    ),
    f"{PYTHON} main.py --config=configs/digits.py --workdir=runs/try --config.train_for='10 "
    "epochs' --config.schedule.name=trapezoid "
    '--config.optimizer.name=lion --config.schedule.peak_lr=3e-4': Runs(
        DIGITS, says='report in runs/try/report.md'
    ),
    'main.py --config=... [--workdir=DIR]': Runs(
        whole=f'{OF_DIGITS} {DIGITS}', says='runs/digits is finished'
    ),
    '... --mode=check [--json]': Runs(
        whole=f'{OF_DIGITS} --mode=check {DIGITS}', says='ready to train'
    ),
    '... --mode=evaluate [--checkpoint=best]': Not('tests/test_main.py runs it'),
    '... --mode=preview [--step=N]': Runs(
        whole=f'{OF_DIGITS} --mode=preview --step=2 {DIGITS}', says='preview/batch_2.png'
    ),
    '... --mode=export': Runs(
        whole=f'{OF_DIGITS} --mode=export {DIGITS}', says='"export/accuracy"'
    ),
    '... --mode=preflight --topology=v5e:2x2': Not(
        'installs a compiler; tests/diagnostics/test_preflight.py runs it with the tiny model'
    ),
    '--mode=preflight --topology=v5e:2x2': Not('the same'),
    'compare.py RUN [RUN ...]': Not('runs with the two runs that README compares'),
    'predict.py RUN [IMAGE ...]': Not('runs with files and a folder'),
    'predict.py RUN IMAGE_OR_FOLDER ...': Runs(
        whole=f'{PYTHON} predict.py runs/flowers picture.jpg picture.webp DIR',
        says='picture.webp: ',
    ),
    'python -m inputs.service --host=NAME': Not(
        'serves until it is stopped; tests/inputs/test_service.py trains with it'
    ),
    f'{PYTHON} -m inputs.service --port=5050 --host=MACHINE1': Not('the same'),
    f'{PYTHON} main.py ... --config.dataset.service=MACHINE1:5050,MACHINE2:5050': Not(
        'needs two machines; tests/inputs/test_service.py'
    ),
    '--config.virtual_devices=2': Not('tests/test_train.py trains with them'),
    f'{PYTHON} main.py --config=configs/folder.py --config.dataset.data_dir=DIR '
    '--config.model.weights=runs/flowers': Runs(
        f'{FOLDER} --workdir=runs/transfer', says='from runs/flowers/checkpoints/step-4'
    ),
    f'{PYTHON} main.py --config=configs/folder.py --config.dataset.data_dir=DIR '
    '--workdir=runs/large --config.model.name=EfficientNetV2S': Runs(
        FOLDER, says='report in runs/large/report.md'
    ),
    f'{PYTHON} main.py --config=configs/folder.py --config.dataset.data_dir=DIR '
    '--config.distill.teacher=runs/large': Runs(
        f'{FOLDER} --workdir=runs/taught', says='teacher   runs/large'
    ),
    f'{PYTHON} main.py --config=configs/digits.py --workdir=runs/without '
    '--config.schedule.warmup=0%': Runs(DIGITS, says='warmup 0'),
    f'{PYTHON} compare.py runs/digits runs/without': Runs(says='curves in comparison.png'),
    'make bench': Not('tests/benchmarks/test_bench.py runs one case of it'),
    'benchmarks/replicas.py': HOURS,
    'python benchmarks/seeds.py': HOURS,
    'python benchmarks/torture.py': Not(
        'tests/benchmarks/test_torture.py runs it with fewer kills'
    ),
    'python benchmarks/transfer.py --seeds 0': HOURS,
    'python benchmarks/inputs.py': HOURS,
    'python benchmarks/memory.py': HOURS,
    'python benchmarks/notebook.py': Not('tests/colab/test_notebook.py executes the notebook'),
}


PAGES = ('README.md', *(f'docs/{name}.md' for name in ('training', 'data', 'resuming', 'transfer')))


def readme():
    """README and the pages that continue it, one after the other."""
    texts = []
    for page in PAGES:
        with open(os.path.join(ROOT, page)) as file:
            texts.append(file.read())
    return '\n'.join(texts)


def blocks(text):
    """(language, content) of the fenced blocks."""
    return re.findall(r'^```(\w*)\n(.*?)^```', text, re.DOTALL | re.MULTILINE)


def commands_in(text):
    """The commands that a reader could type: lines of fenced blocks, and what stands between
    backticks.
    """
    for language, content in blocks(text):
        if language != 'python':
            lines = re.sub(r'\s*\\\n\s*', ' ', content).splitlines()
            yield from (
                re.sub(r'\s+#.*', '', line)
                for line in lines
                if line.startswith(('make ', '.venv/bin/python '))
            )
    prose = re.sub(r'^```.*?^```', '', text, flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r'`([^`\n]+)`', prose):
        is_command = re.match(r'(python|make|\.\.\.|\.venv/bin/python) ', span) or re.match(
            r'(main|compare|predict)\.py ', span
        )
        is_benchmark = re.fullmatch(r'benchmarks/\w+\.py.*', span)
        if is_command or is_benchmark or span in COMMANDS:
            yield span


def test_every_command_is_run_or_has_a_reason():
    assert set(commands_in(readme())) == set(COMMANDS)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder that looks like a checkout, with data to train on, images to try, and two runs."""
    place = tmp_path_factory.mktemp('readme')
    for name in os.listdir(ROOT):
        if name not in ('.venv', 'runs', '.git'):
            os.symlink(os.path.join(ROOT, name), place / name)
    (place / '.venv' / 'bin').mkdir(parents=True)
    (place / '.venv' / 'bin' / 'python').write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (place / '.venv' / 'bin' / 'python').chmod(0o755)
    for split, count in (('train', 6), ('test', 2)):
        for label, name in enumerate(('cat', 'dog')):
            (place / 'DIR' / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = image_kinds.pixels_of(number + 10 * label + 100 * (split == 'test'))
                (place / 'DIR' / split / name / f'{number}.png').write_bytes(
                    image_kinds.encoded(pixels, 'PNG')
                )
    for name, file_format in (('picture.jpg', 'JPEG'), ('picture.webp', 'WEBP')):
        (place / name).write_bytes(image_kinds.encoded(image_kinds.pixels_of(3), file_format))
    for command in (
        f'{OF_DIGITS} {DIGITS}',
        f'{PYTHON} main.py --config=configs/folder.py --config.dataset.data_dir=DIR '
        f'--workdir=runs/flowers {FOLDER}',
    ):
        done = run(place, command)
        assert done.returncode == 0, done.stdout
    return place


def run(place, command):
    environment = {**os.environ, 'TFDS_DATA_DIR': str(place / 'kept'), 'PYTHONPATH': ''}
    return subprocess.run(
        ['bash', '-c', command],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    'command', [command for command, how in COMMANDS.items() if isinstance(how, Runs)]
)
def test_a_command_does_what_readme_says(place, command):
    how = COMMANDS[command]
    done = run(place, how.whole or f'{command} {how.more}')
    assert done.returncode == how.status, done.stdout
    assert how.says in done.stdout and 'Traceback' not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    'number', range(sum(language == 'python' for language, _ in blocks(readme())))
)
def test_python_of_readme_runs(place, number):
    code = [content for language, content in blocks(readme()) if language == 'python'][number]
    (place / f'block{number}.py').write_text(f'import sys\nsys.path.insert(0, {ROOT!r})\n{code}')
    done = run(place, f'{PYTHON} block{number}.py')
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('command', [command for command, how in COMMANDS.items() if how is HOURS])
def test_what_is_not_run_is_there(command):
    assert os.path.exists(os.path.join(ROOT, re.search(r'benchmarks/\w+\.py', command)[0]))
