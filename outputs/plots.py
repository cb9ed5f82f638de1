"""Plots learning rates, batches, predictions and the curves of one or several runs."""

import functools
import io
import os
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib import font_manager, ticker

from common import storage

plt.rcParams.update(
    {
        'figure.dpi': 110,
        'axes.grid': True,
        'grid.alpha': 0.3,
        'axes.spines.top': False,
        'axes.spines.right': False,
        'legend.frameon': False,
        'axes.axisbelow': True,
    }
)


# Fonts with characters that matplotlib's DejaVu lacks; the installed ones are used.
FALLBACK_FONTS = (
    'Noto Sans CJK JP',
    'Noto Sans CJK SC',
    'Source Han Sans',
    'WenQuanYi Zen Hei',
    'IPAGothic',
    'Droid Sans Fallback',
    'Hiragino Sans',
    'PingFang SC',
    'Apple SD Gothic Neo',
    'Microsoft YaHei',
    'Yu Gothic',
    'Malgun Gothic',
    'Arial Unicode MS',
    'Noto Sans',
    'Unifont',
)


@functools.cache
def _drawable_letters() -> frozenset[int]:
    """Makes matplotlib use the installed fonts; returns the code points they cover."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    families = ['DejaVu Sans', *(name for name in FALLBACK_FONTS if name in installed)]
    plt.rcParams['font.family'] = families
    charmaps = (
        font_manager.get_font(font_manager.findfont(name)).get_charmap() for name in families
    )
    return frozenset().union(*charmaps)


def drawable(text: str) -> str:
    r"""Returns text with characters that no font has escaped as in Python, such as \u732b."""
    if text.isascii():
        return text
    letters = _drawable_letters()
    return ''.join(
        letter if ord(letter) in letters else letter.encode('unicode_escape').decode()
        for letter in text
    )


def plot_learning_rate(
    path: str,
    planned_steps: Sequence[int],
    planned: Sequence[float] | np.ndarray,
    rows: list[dict],
    warmup_steps: int,
    hold_steps: int,
    begin: int = 0,
) -> None:
    """Plots the planned rate of every step, and the rates that the optimizer used.

    Args:
        path: path of the PNG.
        planned_steps, planned: steps and their rates.
        rows: of metrics.jsonl; `train/learning_rate` is the rate of the update before `step`.
        warmup_steps, hold_steps: lengths, shaded in the plot.
        begin: the update at which the schedule begins; negative if before the first update.
    """
    figure, axes = plt.subplots(figsize=(8, 4.5), layout='constrained')
    warmup_end = begin + warmup_steps
    hold_end = warmup_end + hold_steps
    corners = [max(0, corner) for corner in (begin, warmup_end, hold_end)]
    shade = {'alpha': 0.12, 'linewidth': 0}
    axes.axvspan(*corners[:2], color='C1', label=f'warmup, {warmup_steps:,} steps', **shade)
    axes.axvspan(*corners[1:], color='C2', label=f'hold, {hold_steps:,} steps', **shade)
    axes.plot(planned_steps, planned, color='C0', linewidth=2, label='planned')
    used = [
        (row['step'] - 1, row['train/learning_rate'])
        for row in rows
        if 'train/learning_rate' in row
    ]
    axes.plot(
        *zip(*used, strict=True), '.', color='C3', markersize=5, label='used'
    ) if used else None
    axes.set(xlabel='update', ylabel='learning rate', title='Learning rate', ylim=(0, None))
    axes.ticklabel_format(axis='y', style='sci', scilimits=(-2, 3))
    axes.legend()
    _save(figure, path)


def plot_batch(path: str, images: np.ndarray, captions: Sequence[str], title: str) -> None:
    """Plots the images of a batch in rows of eight.

    Args:
        path: of the PNG.
        images: float [n, size, size, 3] in 0..255.
        captions: n strings.
        title: heading of the figure.
    """
    rows = -(-len(images) // 8)
    figure, grid = plt.subplots(
        rows, 8, figsize=(14, 0.7 + 1.95 * rows), layout='constrained', squeeze=False
    )
    for axes in grid.flat:
        axes.axis('off')
    for axes, image, text in zip(grid.flat, images, captions, strict=False):
        axes.imshow(image.clip(0, 255).round().astype('uint8'), interpolation='nearest')
        # Up to three lines; parse_math off because a name may contain $.
        axes.set_title(textwrap.fill(drawable(text)[:78], 26), fontsize=7, parse_math=False)
    figure.suptitle(drawable(title), parse_math=False)
    _save(figure, path)


def plot_predictions(
    path: str,
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    answers: Sequence[Sequence[tuple[str, float]]],
) -> None:
    """Plots images, each beside its predicted classes.

    Args:
        path: of the PNG.
        images: uint8 [height, width, 3] each, of any sizes.
        titles: one for each image.
        answers: [(label, probability)] each, the most likely first.
    """
    row_height, margin = 2.5, 0.6  # inches
    height = row_height * len(images)
    # Fixed positions, because constrained layout takes quadratic time.
    figure = plt.figure(figsize=(9, height))
    for row, (image, title, answer) in enumerate(zip(images, titles, answers, strict=True)):
        bottom, share = 1 - (row + 1) * row_height / height, (row_height - margin) / height
        left = figure.add_axes((0.02, bottom + 0.2 / height, 0.34, share))
        left.imshow(image, interpolation='nearest')
        left.axis('off')
        left.set_title(
            textwrap.shorten(drawable(title), 40, placeholder='...'), fontsize=9, parse_math=False
        )
        right = figure.add_axes((0.62, bottom + 0.45 / height, 0.36, share - 0.25 / height))
        places = range(len(answer))
        right.barh(places, [probability for _, probability in answer])
        right.set(xlim=(0, 1), xlabel='probability')
        names = [textwrap.shorten(drawable(label), 30, placeholder='...') for label, _ in answer]
        right.set_yticks(places, names, parse_math=False)
        right.invert_yaxis()
    _save(figure, path)


def plot_curves(path: str, runs: Mapping[str, list[dict]]) -> None:
    """Plots loss, accuracy, learning rate and throughput of one or more runs.

    Args:
        path: of the PNG.
        runs: {name: rows of metrics.jsonl}.
    """
    figure, grid = plt.subplots(2, 2, figsize=(11, 7), layout='constrained')
    panels = (
        (grid[0, 0], 'Loss', ('train/loss', 'eval/loss')),
        (grid[0, 1], 'Accuracy', ('train/accuracy', 'eval/accuracy')),
        (grid[1, 0], 'Learning rate', ('train/learning_rate',)),
        (grid[1, 1], 'Training examples per second', ('train/examples_per_second',)),
    )
    for axes, title, names in panels:
        for color, (run, rows) in enumerate(runs.items()):
            for name in names:
                points = [(row['step'], row[name]) for row in rows if name in row]
                label = ' '.join(
                    part
                    for part in (
                        drawable(run) if len(runs) > 1 else '',
                        name.split('/')[0] if len(names) > 1 else '',
                    )
                    if part
                )
                style = (
                    {'color': f'C{color}', 'linestyle': '--'}
                    if name.startswith('train') and len(names) > 1
                    else {'color': f'C{color}'}
                )
                if points:
                    axes.plot(
                        *zip(*points, strict=True),
                        label=label,
                        marker='.' if len(points) < 30 else None,
                        **style,
                    )
        axes.set(title=title, xlabel='update')
        if title == 'Accuracy':
            axes.yaxis.set_major_formatter(ticker.PercentFormatter(1))
        if axes.get_legend_handles_labels()[1] != [''] * len(axes.lines) and any(
            axes.get_legend_handles_labels()[1]
        ):
            for text in axes.legend().get_texts():
                text.set_parse_math(False)  # a run may be called $x
    grid[1, 1].set_ylim(0, None)
    _save(figure, path)


def _save(figure: Figure, path: str) -> None:
    encoded = io.BytesIO()
    figure.savefig(encoded, format=os.path.splitext(path)[1][1:])
    storage.make_folder(os.path.dirname(path))
    storage.write(path, encoded.getvalue())
    plt.close(figure)
