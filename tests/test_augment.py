"""Augmentations do what the reference does: PIL for operations on one picture, the formula for what mixes a batch."""
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from configs import default
from inputs import augment
from inputs.pictures import resize_picture

PICTURE = (np.random.RandomState(0).rand(24, 24, 3) * np.linspace(40, 200, 24)[:, None, None] + 20).astype(np.uint8)
UPRIGHT = 1.0


def seeds(count):
    return [tf.constant([7, index * augment.SEEDS], tf.int64) for index in range(count)]


@pytest.mark.parametrize('name, amount, reference', [
    ('equalize', 0.0, ImageOps.equalize),
    ('autocontrast', 0.0, ImageOps.autocontrast),
    ('posterize', 4.0, lambda picture: ImageOps.posterize(picture, 4)),
    ('solarize', 0.5, lambda picture: ImageOps.solarize(picture, 128)),
    ('color', 0.6, lambda picture: ImageEnhance.Color(picture).enhance(1.6)),
    ('contrast', 0.6, lambda picture: ImageEnhance.Contrast(picture).enhance(1.6)),
    ('brightness', 0.6, lambda picture: ImageEnhance.Brightness(picture).enhance(1.6)),
    ('sharpness', 0.6, lambda picture: ImageEnhance.Sharpness(picture).enhance(1.6)),
    ('identity', 0.0, lambda picture: picture),
])
def test_an_operation_is_that_of_pil(name, amount, reference):
    ours = augment.apply_operation(name, tf.constant(PICTURE), amount, UPRIGHT).numpy().astype(int)
    theirs = np.array(reference(Image.fromarray(PICTURE))).astype(int)
    assert np.abs(ours - theirs).max() <= 2  # PIL rounds at each stage
    assert np.abs(ours - theirs).mean() < 0.7


@pytest.mark.parametrize('name, amount, coefficients', [
    ('shear_x', 0.3, lambda c: (1, 0.3, -0.3 * c, 0, 1, 0)),
    ('shear_y', 0.3, lambda c: (1, 0, 0, 0.3, 1, -0.3 * c)),
    ('translate_x', 0.25, lambda c: (1, 0, 6, 0, 1, 0)),
    ('translate_y', 0.25, lambda c: (1, 0, 0, 0, 1, 6)),
    ('rotate', 90.0, lambda c: (0, -1, 2 * c, 1, 0, 0)),
])
def test_a_geometric_operation_takes_each_pixel_from_where_its_matrix_says(name, amount, coefficients):
    ours = augment.apply_operation(name, tf.constant(PICTURE), amount, UPRIGHT).numpy().astype(float)
    a, b, c, d, e, f = coefficients(11.5)
    for row, column in np.random.RandomState(1).randint(2, 22, (60, 2)):
        x, y = a * column + b * row + c, d * column + e * row + f
        if not (0 <= x <= 22.9 and 0 <= y <= 22.9):
            continue
        left, top = int(np.floor(x + 1e-6)), int(np.floor(y + 1e-6))
        fx, fy = x - left, y - top
        square = PICTURE[top:top + 2, left:left + 2].astype(float)
        expected = (square * np.array([1 - fy, fy])[:, None, None] * np.array([1 - fx, fx])[None, :, None]).sum((0, 1))
        np.testing.assert_allclose(ours[row, column], expected, atol=1.01)


@pytest.mark.parametrize('encode', [tf.io.encode_jpeg, tf.io.encode_png])
def test_a_random_crop_is_a_window_of_the_picture(encode):
    rows, columns = np.mgrid[:80, :120].astype(np.uint8)
    encoded = encode(np.stack([rows * 2, columns * 2, rows * 0], -1))
    areas = []
    for seed in seeds(30):
        window = augment.random_crop(encoded, seed, (0.2, 0.6)).numpy().astype(int)
        height, width = window.shape[:2]
        np.testing.assert_allclose(np.diff(window[2:-2, width // 2, 0]).mean(), 2, atol=0.5)  # neither turned nor scaled
        areas.append(height * width / (80 * 120))
    assert 0.18 < min(areas) and max(areas) < 0.62 and np.std(areas) > 0.05


@pytest.mark.parametrize('name', ['rand_augment', 'trivial_augment'])
def test_a_policy_changes_the_chosen_share_of_pictures(name):
    policy = default.get_config().augment.policy
    policy.name = name
    for rate, low, high in ((0.0, 0, 0), (0.5, 25, 70), (1.0, 75, 100)):
        policy.rate = rate
        apply = tf.function(lambda seed: augment.apply_policy(tf.constant(PICTURE), seed, policy))
        changed = sum(bool((apply(seed).numpy() != PICTURE).any()) for seed in seeds(100))
        assert low <= changed <= high


def test_a_policy_is_a_function_of_its_seed():
    policy = default.get_config().augment.policy
    policy.name = 'rand_augment'
    apply = tf.function(lambda seed: augment.apply_policy(tf.constant(PICTURE), seed, policy))
    for seed in seeds(5):
        np.testing.assert_array_equal(apply(seed), apply(seed))
    assert len({apply(seed).numpy().tobytes() for seed in seeds(20)}) > 10


def batch_of(settings, size=12, count=64):
    """(images, labels, draws, images and labels as the device makes them)."""
    images = np.random.RandomState(1).randint(0, 256, (count, size, size, 3)).astype(np.uint8)
    labels = np.arange(count) % 10
    drawn = [augment.draws(settings, seed) for seed in seeds(count)]
    drawn = {name: tf.stack([one[name] for one in drawn]) for name in drawn[0]}
    changed, soft = tf.function(augment.on_device(settings, 10), jit_compile=True)(images, tf.constant(labels), drawn)
    return images, labels, {name: value.numpy() for name, value in drawn.items()}, changed.numpy(), soft.numpy()


@pytest.fixture
def settings():
    return default.get_config().augment


def test_a_flip_mirrors_half_of_the_pictures(settings):
    settings.flip = True
    images, _, _, changed, _ = batch_of(settings)
    mirrored = [(after == before[:, ::-1]).all() for before, after in zip(images, changed)]
    assert 18 <= sum(mirrored) <= 46
    assert all((after == before).all() for before, after, is_mirrored in zip(images, changed, mirrored) if not is_mirrored)


def test_erasing_fills_one_rectangle_with_one_colour(settings):
    settings.random_erasing = 0.5
    images, _, _, changed, _ = batch_of(settings)
    differ = (images != changed).any(-1)
    assert 16 <= differ.any((1, 2)).sum() <= 48
    for different, after in zip(differ, changed):
        if different.any():
            rows, columns = different.any(1), different.any(0)
            inside = after[rows][:, columns]
            assert 0.005 <= rows.sum() * columns.sum() / 144 <= 0.45 and (inside == inside[0, 0]).all()


def test_mixup_is_its_formula_and_a_pair_shares_its_draw(settings):
    settings.mixup = 0.4
    images, labels, drawn, changed, soft = batch_of(settings)
    share = np.repeat(drawn['mix'][::2, 3], 2)
    other = np.arange(64) ^ 1
    np.testing.assert_allclose(changed, share[:, None, None, None] * images + (1 - share)[:, None, None, None] * images[other], rtol=1e-4, atol=0.01)
    hard = np.eye(10)[labels]
    np.testing.assert_allclose(soft, share[:, None] * hard + (1 - share)[:, None] * hard[other], atol=1e-5)


def test_cutmix_labels_are_the_share_of_pixels(settings):
    settings.cutmix = 1.0
    images, labels, _, changed, soft = batch_of(settings)
    for index in range(64):
        own = (changed[index] == images[index]).all(-1)
        assert ((changed[index] == images[index ^ 1]).all(-1) | own).all()
        assert soft[index, labels[index]] == pytest.approx(own.mean(), abs=0.02)
        assert soft[index].sum() == pytest.approx(1, abs=1e-5)


def test_mixup_and_cutmix_share_the_pairs(settings):
    settings.mixup, settings.cutmix = 1.0, 1.0
    images, _, _, changed, _ = batch_of(settings)
    blended = [not ((after == images[index]).all(-1) | (after == images[index ^ 1]).all(-1)).all() for index, after in enumerate(changed)]
    assert blended[::2] == blended[1::2] and 8 <= sum(blended[::2]) <= 24


def test_the_draws_of_mixing_are_of_the_beta_distribution(settings):
    settings.mixup = 0.4
    drawn = np.array([augment.draws(settings, seed)['mix'][3] for seed in seeds(400)])
    assert drawn.mean() == pytest.approx(0.5, abs=0.06) and drawn.var() == pytest.approx(0.25 / 1.8, abs=0.02)  # 1 / (4 (2 alpha + 1))


def test_color_jitter_of_grey_changes_its_brightness_only(settings):
    settings.color_jitter = 0.4
    grey = np.full((4, 8, 8, 3), 100, np.float32)
    for factors in ([1.2, 0.7, 0.6], [0.8, 1.3, 1.4]):
        np.testing.assert_allclose(augment.jitter(tf.constant(grey), tf.constant([factors] * 4)), 100 * factors[0], rtol=1e-4)


def test_nothing_asked_for_is_nothing_changed(settings):
    untouched, hard = augment.on_device(settings, 10)(PICTURE[None], tf.constant([3]), {})
    np.testing.assert_array_equal(untouched, PICTURE[None])
    np.testing.assert_array_equal(hard, np.eye(10)[[3]])


def test_small_moves_keep_the_picture_where_it_is(settings):
    settings.translate, settings.rotate, settings.zoom = 0.04, 0.01, 0.03
    smooth = tf.io.encode_png(np.tile(np.linspace(0, 250, 32).astype(np.uint8), (32, 1))[..., None].repeat(3, -1))
    moved = augment.on_host(settings, 32)
    pictures = np.stack([moved(smooth, seed, 1.0) for seed in seeds(40)]).astype(float)
    assert pictures.std(0).max() > 1
    np.testing.assert_allclose(pictures.mean(0)[4:-4, 4:-4], resize_picture(tf.io.decode_png(smooth), 32)[4:-4, 4:-4], atol=6)


def test_evaluation_takes_the_central_square():
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, 30:70] = 200
    np.testing.assert_array_equal(resize_picture(picture, 8), np.full((8, 8, 3), 200))
    np.testing.assert_array_equal(resize_picture(picture[None].astype(np.float32), 8, 0.5), np.full((1, 8, 8, 3), 200))


def test_resizing_down_averages_instead_of_skipping():
    stripes = np.tile(np.array([[0], [240]], np.uint8), (64, 128))[..., None].repeat(3, -1)
    np.testing.assert_allclose(resize_picture(stripes, 16).numpy()[1:-1], 120, atol=2)
