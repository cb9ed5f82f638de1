"""How two configs differ, and whether a run may continue with the difference."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from common import storage
from common.storage import flatten
from configs import default
from outputs.train_progress import ANY_KEY

# Keys that may differ between the starts of one run: they change where and how fast it goes and
# when it looks, not what is computed (except that without model.sync_batch_norm each replica has
# statistics of its own).
FREE_KEYS = (
    'dataset.data_dir',
    'dataset.service',
    'dataset.max_broken',
    'eval_batch_size',
    'jit_compile',
    'strategy',
    'virtual_devices',
    'tpu',
    'steps_per_loop',
    'log_every',
    'eval_every',
    'checkpoint_every',
    'keep_checkpoints',
    'max_skipped_updates',
)
# Optimizers that keep the same two averages of each variable. Those of others mean something else,
# even where they have the same shapes.
SAME_AVERAGES = ('adam', 'adamw', 'lamb')
# Keys with which averages exist or not.
SWITCHES = ('ema_decay', 'optimizer.momentum', 'optimizer.centered', 'optimizer.amsgrad')
# Keys that say which variables Muon leaves to AdamW, which has other averages.
MUONS_CHOICE = ('optimizer.exclude_layers', 'optimizer.exclude_embeddings')


class ConfigChange(NamedTuple):
    """A key of the config whose value differs from that of the run that continues."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        if self.key == ANY_KEY:
            return 'config.json is missing'
        return f'{self.key} was {self.before!r}, is {self.after!r}'


def listed(changes: Sequence[ConfigChange]) -> str:
    return '; '.join(map(str, changes))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[ConfigChange]:
    """Returns the changes between two configs, {key: value}, sorted by key."""
    keys = sorted(before.keys() | now.keys())
    changes = [ConfigChange(key, before.get(key), now.get(key)) for key in keys]
    return [change for change in changes if change.before != change.after]


def changes_since(config: ConfigDict, path: str, free_keys: Collection[str] | None = None) -> list:
    """Returns the changes of `config` from the config.json at `path`.

    `free_keys` may differ; by default they are those of `free_keys_of`.
    """
    free_keys = free_keys_of(config) if free_keys is None else free_keys
    changes = differences(flatten(stored(path)), as_stored(config))
    return [change for change in changes if change.key not in free_keys]


def free_keys_of(config: ConfigDict) -> Collection[str]:
    """Returns the keys that may differ between the starts of a run of this config."""
    if config.dataset.name == 'folder':  # its data_dir decides what the images are
        return [key for key in FREE_KEYS if key != 'dataset.data_dir']
    return FREE_KEYS


def fixed_values(config: ConfigDict) -> dict[str, Any]:
    """Returns {key: value} of the keys that may not differ between the starts of a run."""
    free_keys = free_keys_of(config)
    return {key: value for key, value in as_stored(config).items() if key not in free_keys}


def as_stored(config: ConfigDict) -> dict[str, Any]:
    """Returns {key: value} of a config as they are after being written and read again."""
    return flatten(json.loads(storage.as_json(json.loads(config.to_json()))))


def stored(path: str) -> dict[str, Any]:
    """Returns a config.json, nested dicts; a key newer than the run has its default."""
    defaults = json.loads(default.get_config().to_json())
    return _merged(defaults, storage.read_json(path))


def _merged(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    merged = dict(defaults)
    for key, value in values.items():
        merged[key] = _merged(defaults.get(key, {}), value) if isinstance(value, dict) else value
    return merged


def misfits(config: ConfigDict, changes: Sequence[ConfigChange]) -> list[ConfigChange]:
    """Returns the changes to `config` with which the variables of the checkpoints do not fit.

    What is not in the config, such as the number of classes, shows when the checkpoint is read.
    """
    return [change for change in changes if not _fits(config, change)]


def _fits(config: ConfigDict, change: ConfigChange) -> bool:
    key, before, after = change
    if key == 'model.name' or key in MUONS_CHOICE:
        return False
    if key == 'model.freeze':  # an optimizer has averages of the variables that are trained
        return config.optimizer.name == 'sgd' and not config.optimizer.get('momentum')
    if key == 'optimizer.name':
        return before in SAME_AVERAGES and after in SAME_AVERAGES
    if key == 'optimizer.momentum' and config.optimizer.name == 'muon':
        return True
    if key in SWITCHES:
        return bool(before) == bool(after)
    if key == 'precision':
        return not {before, after} & {'float16', 'float64'}
    return True
