"""Compares two configs, and decides whether a run may continue with the difference."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from common import storage
from common.storage import flatten
from configs import default
from outputs.train_progress import ANY_KEY

# Keys that may change when a run is resumed: they affect where and how fast it runs and when it
# logs, evaluates and saves, not what it computes (except that without model.sync_batch_norm each
# replica has its own statistics).
RESUMABLE_KEYS = (
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
# Optimizers that keep the same two moments per variable. Others' slots differ in meaning even where
# the shapes match.
SAME_MOMENTS = ('adam', 'adamw', 'lamb')
# Keys that decide whether an average or moment exists at all.
SLOT_SWITCHES = ('ema_decay', 'optimizer.momentum', 'optimizer.centered', 'optimizer.amsgrad')
# Keys that select the variables Muon leaves to AdamW, whose moments differ.
MUON_SELECTION_KEYS = ('optimizer.exclude_layers', 'optimizer.exclude_embeddings')


class ConfigChange(NamedTuple):
    """A config key whose value differs from that of the run being resumed."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        if self.key == ANY_KEY:
            return 'config.json is missing'
        return f'{self.key} was {self.before!r}, is now {self.after!r}'


def format_changes(changes: Sequence[ConfigChange]) -> str:
    return '; '.join(map(str, changes))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[ConfigChange]:
    """Returns the changes between two configs, {key: value}, sorted by key."""
    keys = sorted(before.keys() | now.keys())
    changes = [ConfigChange(key, before.get(key), now.get(key)) for key in keys]
    return [change for change in changes if change.before != change.after]


def changes_since(config: ConfigDict, path: str, free_keys: Collection[str] | None = None) -> list:
    """Returns how `config` differs from the config.json at `path`.

    Differences in `free_keys`, by default `resumable_keys(config)`, do not count.
    """
    free_keys = resumable_keys(config) if free_keys is None else free_keys
    changes = differences(flatten(read_config(path)), as_read_back(config))
    return [change for change in changes if change.key not in free_keys]


def resumable_keys(config: ConfigDict) -> Collection[str]:
    """Returns the keys that may change when a run of this config is resumed."""
    if config.dataset.name == 'folder':  # data_dir decides which images these are
        return [key for key in RESUMABLE_KEYS if key != 'dataset.data_dir']
    return RESUMABLE_KEYS


def fixed_values(config: ConfigDict) -> dict[str, Any]:
    """Returns {key: value} of the keys that may not change when a run is resumed."""
    free_keys = resumable_keys(config)
    return {key: value for key, value in as_read_back(config).items() if key not in free_keys}


def as_read_back(config: ConfigDict) -> dict[str, Any]:
    """Returns {key: value} of a config as read back from config.json."""
    return flatten(json.loads(storage.as_json(json.loads(config.to_json()))))


def read_config(path: str) -> dict[str, Any]:
    """Reads a config.json as nested dicts; keys newer than the run get their defaults."""
    defaults = json.loads(default.get_config().to_json())
    return _merged(defaults, storage.read_json(path))


def _merged(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    merged = dict(defaults)
    for key, value in values.items():
        merged[key] = _merged(defaults.get(key, {}), value) if isinstance(value, dict) else value
    return merged


def incompatible_changes(config: ConfigDict, changes: Sequence[ConfigChange]) -> list[ConfigChange]:
    """Returns the changes that make the checkpoints' variables incompatible with `config`.

    Other mismatches, such as the number of classes, show up when the checkpoint is read.
    """
    return [change for change in changes if not _is_compatible(config, change)]


def _is_compatible(config: ConfigDict, change: ConfigChange) -> bool:
    key, before, after = change
    if key == 'model.name' or key in MUON_SELECTION_KEYS:
        return False
    if key == 'model.freeze':  # an optimizer has moments only for trained variables
        return config.optimizer.name == 'sgd' and not config.optimizer.get('momentum')
    if key == 'optimizer.name':
        return before in SAME_MOMENTS and after in SAME_MOMENTS
    if key == 'optimizer.momentum' and config.optimizer.name == 'muon':
        return True
    if key in SLOT_SWITCHES:
        return bool(before) == bool(after)
    if key == 'precision':
        return not {before, after} & {'float16', 'float64'}
    return True
