"""Machines, packages and programs that are not there, for the checks to look at."""

import os
import textwrap


def assert_mended(result, status, found, mend):
    assert result.status == status, result
    assert found in result.message and mend in result.fix, result
    assert '\n' not in result.message + result.fix


def installed(folder, **versions):
    """A folder of installed packages that have metadata and nothing else, to look for distributions
    in.
    """
    for name, version in versions.items():
        info = folder / f'{name}-{version}.dist-info'
        info.mkdir(parents=True)
        (info / 'METADATA').write_text(
            f'Metadata-Version: 2.1\nName: {name.replace("_", "-")}\nVersion: {version}\n'
        )
    return [str(folder)]


def fake_machine(folder, **devices):
    """A /sys with PCI devices: name=(vendor, device, class)."""
    for name, values in devices.items():
        place = folder / 'sys' / 'bus' / 'pci' / 'devices' / name
        place.mkdir(parents=True)
        for file, value in zip(('vendor', 'device', 'class'), values, strict=False):
            (place / file).write_text(f'{value}\n')
    return str(folder)


def fake_tensorflow(folder, text):
    """A folder whose `tensorflow` is this text; returns an environment that takes it from there."""
    (folder / 'fake' / 'tensorflow').mkdir(parents=True)
    (folder / 'fake' / 'tensorflow' / '__init__.py').write_text(textwrap.dedent(text))
    environ = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(('TPU_', 'PJRT_', 'TF_CONFIG'))
    }
    return {**environ, 'PYTHONPATH': str(folder / 'fake')}


def program(folder, monkeypatch, name, text):
    """A shell script on the PATH."""
    (folder / 'bin').mkdir(exist_ok=True)
    (folder / 'bin' / name).write_text(f'#!/bin/sh\n{text}\n')
    (folder / 'bin' / name).chmod(0o755)
    monkeypatch.setenv('PATH', f'{folder / "bin"}{os.pathsep}{os.environ["PATH"]}')


V5E = {'chip0': ('0x1ae0', '0x0063', '0x088000')}
NVIDIA = {'card': ('0x10de', '0x2330', '0x030200')}
