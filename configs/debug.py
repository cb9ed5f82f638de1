"""Overfits one batch with the tiny model: if this does not reach 100 % in a minute, something is broken."""
from configs import default


def get_config():
    config = default.get_config()
    config.dataset.train_split = 'train[:64]'
    config.dataset.eval_split = 'train[:64]'
    config.image_size = 32
    config.batch_size = 64
    config.eval_batch_size = 64
    config.train_for = '200 steps'
    config.schedule.peak_lr = 1e-2
    config.model.name = 'tiny'
    config.model.dropout = 0.0
    config.eval_every = '50%'
    return config
