"""Each way in which JAX's runtime may be installed wrongly is named, with what mends it."""

import sys

import pytest

from common.errors import RunError
from devices import jax_packages
from tests.conftest import refused
from tests.diagnostics.machines import installed

VERSION = jax_packages.VERSION
# What `.[tpu]` installs, and `.[gpu-jax]`.
PACKAGES = {'jax': VERSION, 'jaxlib': VERSION, 'libtpu': '0.0.42.1'}
CUDA_PACKAGES = {
    'jax': VERSION,
    'jaxlib': VERSION,
    'jax_cuda13_plugin': VERSION,
    'jax_cuda13_pjrt': VERSION,
}
FOR_TPU, FOR_GPU, FOR_CPU = "'.[tpu]'", "'.[gpu-jax]'", f'jax=={VERSION}'
NEEDS_JAX = pytest.mark.skipif(
    sys.version_info < jax_packages.OLDEST_PYTHON, reason='JAX 0.10 is for Python 3.11 and later'
)


def without(name, packages=PACKAGES):
    return {key: version for key, version in packages.items() if key != name}


def ask_for_libtpu(folder):
    """Writes into jax's metadata which libtpu it asks for."""
    metadata = folder / f'jax-{VERSION}.dist-info' / 'METADATA'
    if metadata.exists():
        asked = 'Requires-Dist: libtpu==0.0.42.*; extra == "tpu"\n'
        metadata.write_text(metadata.read_text() + asked)


def check(folder, platform, packages, environ=None, python=(3, 12, 1)):
    path = installed(folder, **packages)
    ask_for_libtpu(folder)
    return jax_packages.check(platform, environ or {}, path, python)


@pytest.mark.parametrize(
    'platform, packages, problem, fix',
    [
        ('tpu', {}, 'not installed: jax and jaxlib', FOR_TPU),
        ('cpu', {}, 'not installed: jax and jaxlib', FOR_CPU),
        ('tpu', without('jax'), 'not installed: jax', FOR_TPU),
        ('tpu', without('jaxlib'), 'not installed: jaxlib', FOR_TPU),
        ('tpu', PACKAGES | {'jax': '0.7.2'}, 'jax 0.7.2 is installed, and 0.10.2', FOR_TPU),
        ('tpu', PACKAGES | {'jaxlib': '0.9.0'}, 'jaxlib 0.9.0 is installed', FOR_TPU),
        ('tpu', without('libtpu'), 'libtpu is not installed', FOR_TPU),
        (
            'tpu',
            PACKAGES | {'libtpu': '0.0.21.1'},
            'libtpu 0.0.21.1 is installed, and JAX 0.10.2 needs libtpu 0.0.42.*',
            'pip uninstall -y libtpu && ',
        ),
        (
            'tpu',
            PACKAGES | {'libtpu_nightly': '0.1'},
            'libtpu 0.0.42.1 and libtpu-nightly 0.1 are installed',
            'pip uninstall -y libtpu libtpu-nightly && ',
        ),
        (
            'tpu',
            without('libtpu') | {'libtpu_nightly': '0.1'},
            'libtpu-nightly 0.1 is installed',
            'pip uninstall -y libtpu-nightly && ',
        ),
        (
            'tpu',
            PACKAGES | {'tensorflow_tpu': '2.19.1'},
            'tensorflow-tpu and JAX are both installed',
            'pip uninstall -y tensorflow-tpu libtpu && ',
        ),
        ('cuda', PACKAGES, 'no jax-cuda13-plugin is installed', FOR_GPU),
        ('cuda', without('jax_cuda13_pjrt', CUDA_PACKAGES), 'jax-cuda13-pjrt is not', FOR_GPU),
        (
            'cuda',
            CUDA_PACKAGES | {'jax_cuda13_plugin': '0.9.0'},
            'jax-cuda13-plugin 0.9.0 is installed, and 0.10.2 is needed',
            FOR_GPU,
        ),
        (
            'cuda',
            CUDA_PACKAGES | {'jax_cuda12_plugin': VERSION},
            'jax-cuda12-plugin and jax-cuda13-plugin are installed',
            'pip uninstall -y jax-cuda12-plugin jax-cuda12-pjrt',
        ),
    ],
)
def test_packages_that_do_not_fit_are_named(tmp_path, platform, packages, problem, fix):
    with refused(RunError, problem, key='strategy', fix=fix):
        check(tmp_path, platform, packages)


@pytest.mark.parametrize(
    'platform, packages, environ, found',
    [
        ('tpu', PACKAGES, {}, 'JAX 0.10.2 with libtpu 0.0.42.1'),
        ('tpu', PACKAGES, {'JAX_PLATFORMS': 'tpu,cpu'}, 'JAX 0.10.2 with libtpu 0.0.42.1'),
        ('tpu', PACKAGES, {'JAX_PLATFORMS': ''}, 'JAX 0.10.2 with libtpu 0.0.42.1'),
        ('cuda', CUDA_PACKAGES, {'JAX_PLATFORMS': 'gpu'}, 'JAX 0.10.2 with jax-cuda13-plugin'),
        ('cpu', PACKAGES, {'JAX_PLATFORMS': 'tpu'}, 'JAX 0.10.2'),
    ],
)
def test_packages_that_fit_are_told(tmp_path, platform, packages, environ, found):
    assert check(tmp_path, platform, packages, environ).startswith(found)


@pytest.mark.parametrize(
    'platform, packages, hidden', [('tpu', PACKAGES, 'TPU'), ('cuda', CUDA_PACKAGES, 'GPU')]
)
def test_a_variable_that_hides_the_accelerator_is_named(tmp_path, platform, packages, hidden):
    about = f'JAX_PLATFORMS=cpu hides the {hidden} of this machine'
    with refused(RunError, about, key='strategy', fix='unset JAX_PLATFORMS'):
        check(tmp_path, platform, packages, {'JAX_PLATFORMS': 'cpu'})


@pytest.mark.parametrize(
    'content, problem',
    [
        (None, 'does not exist'),
        (b'', 'cannot be read'),
        (b'\x7fELF TfTpu_Initialize', 'GetPjrtApi'),
    ],
)
def test_a_library_that_is_none_is_named(tmp_path, content, problem):
    path = tmp_path / 'libtpu.so'
    if content is not None:
        path.write_bytes(content)
    with refused(RunError, str(path), problem, key='strategy', fix='unset TPU_LIBRARY_PATH'):
        check(tmp_path, 'tpu', PACKAGES, {'TPU_LIBRARY_PATH': str(path)})


def test_an_own_library_is_taken(tmp_path):
    (tmp_path / 'libtpu.so').write_bytes(b'\x7fELF GetPjrtApi')
    environ = {'TPU_LIBRARY_PATH': str(tmp_path / 'libtpu.so')}
    assert str(tmp_path) in check(tmp_path, 'tpu', PACKAGES, environ)


def test_a_python_that_jax_is_not_made_for_is_named(tmp_path):
    with refused(RunError, 'Python 3.11 or later', '3.10', key='strategy', fix='ACCELERATOR=tpu'):
        check(tmp_path, 'tpu', PACKAGES, python=(3, 10, 4))


def test_the_fix_removes_a_build_that_shares_the_folder(monkeypatch):
    monkeypatch.setattr(jax_packages, 'installed', lambda names: {'tensorflow': '2.21.0'})
    assert 'pip uninstall -y tensorflow && ' in jax_packages.install('cuda')
    assert 'uninstall' not in jax_packages.install('cpu')
