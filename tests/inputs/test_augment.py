"""Augmentations do what the reference does: PIL for operations on one image, the formula for what
mixes a batch.
"""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from configs import default
from inputs import augment
from inputs.image_ops import center_crop_and_resize, decode, resize
from tests.conftest import slow

PICTURE = (
    np.random.RandomState(0).rand(24, 24, 3) * np.linspace(40, 200, 24)[:, None, None] + 20
).astype(np.uint8)
UPRIGHT = 1.0


def seeds(count):
    return [tf.constant([7, index * augment.SEEDS_PER_EXAMPLE], tf.int64) for index in range(count)]


@pytest.mark.parametrize(
    'name, amount, reference',
    [
        ('equalize', 0.0, ImageOps.equalize),
        ('autocontrast', 0.0, ImageOps.autocontrast),
        ('posterize', 4.0, lambda picture: ImageOps.posterize(picture, 4)),
        ('solarize', 0.5, lambda picture: ImageOps.solarize(picture, 128)),
        ('color', 0.6, lambda picture: ImageEnhance.Color(picture).enhance(1.6)),
        ('contrast', 0.6, lambda picture: ImageEnhance.Contrast(picture).enhance(1.6)),
        ('brightness', 0.6, lambda picture: ImageEnhance.Brightness(picture).enhance(1.6)),
        ('sharpness', 0.6, lambda picture: ImageEnhance.Sharpness(picture).enhance(1.6)),
        ('identity', 0.0, lambda picture: picture),
    ],
)
def test_an_operation_is_that_of_pil(name, amount, reference):
    ours = augment.apply_operation(name, tf.constant(PICTURE), amount, UPRIGHT).numpy().astype(int)
    theirs = np.array(reference(Image.fromarray(PICTURE))).astype(int)
    assert np.abs(ours - theirs).max() <= 2  # PIL rounds at each stage
    assert np.abs(ours - theirs).mean() < 0.7


@pytest.mark.parametrize(
    'name, amount, coefficients',
    [
        ('shear_x', 0.3, lambda c: (1, 0.3, -0.3 * c, 0, 1, 0)),
        ('shear_y', 0.3, lambda c: (1, 0, 0, 0.3, 1, -0.3 * c)),
        ('translate_x', 0.25, lambda c: (1, 0, 6, 0, 1, 0)),
        ('translate_y', 0.25, lambda c: (1, 0, 0, 0, 1, 6)),
        ('rotate', 90.0, lambda c: (0, -1, 2 * c, 1, 0, 0)),
    ],
)
def test_geometric_operations_sample_where_their_matrix_says(name, amount, coefficients):
    ours = (
        augment.apply_operation(name, tf.constant(PICTURE), amount, UPRIGHT).numpy().astype(float)
    )
    a, b, c, d, e, f = coefficients(11.5)
    for row, column in np.random.RandomState(1).randint(2, 22, (60, 2)):
        x, y = a * column + b * row + c, d * column + e * row + f
        if not (0 <= x <= 22.9 and 0 <= y <= 22.9):
            continue
        left, top = int(np.floor(x + 1e-6)), int(np.floor(y + 1e-6))
        fx, fy = x - left, y - top
        square = PICTURE[top : top + 2, left : left + 2].astype(float)
        expected = (
            square * np.array([1 - fy, fy])[:, None, None] * np.array([1 - fx, fx])[None, :, None]
        ).sum((0, 1))
        np.testing.assert_allclose(ours[row, column], expected, atol=1.01)


@pytest.mark.parametrize('encode', [tf.io.encode_jpeg, tf.io.encode_png])
def test_a_random_crop_is_a_window_of_the_picture(encode):
    rows, columns = np.mgrid[:80, :120].astype(np.uint8)
    encoded = encode(np.stack([rows * 2, columns * 2, rows * 0], -1))
    areas = []
    for seed in seeds(30):
        window = augment.random_crop(encoded, seed, (0.2, 0.6), 120).numpy().astype(int)
        height, width = window.shape[:2]
        np.testing.assert_allclose(
            np.diff(window[2:-2, width // 2, 0]).mean(), 2, atol=0.5
        )  # neither turned nor scaled
        areas.append(height * width / (80 * 120))
    assert min(areas) > 0.18 and max(areas) < 0.62 and np.std(areas) > 0.05


@pytest.mark.parametrize('name', ['rand_augment', slow('trivial_augment')])
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
    drawn = [augment.draw_numbers(settings, seed) for seed in seeds(count)]
    drawn = {name: tf.stack([one[name] for one in drawn]) for name in drawn[0]}
    changed, soft = tf.function(augment.make_device_augment(settings, 10), jit_compile=True)(
        images, tf.constant(labels), drawn
    )
    return (
        images,
        labels,
        {name: value.numpy() for name, value in drawn.items()},
        changed.numpy(),
        soft.numpy(),
    )


@pytest.fixture
def settings():
    return default.get_config().augment


def test_a_flip_mirrors_half_of_the_pictures(settings):
    settings.flip = True
    images, _, _, changed, _ = batch_of(settings)
    mirrored = [
        (after == before[:, ::-1]).all() for before, after in zip(images, changed, strict=True)
    ]
    assert 18 <= sum(mirrored) <= 46
    assert all(
        (after == before).all()
        for before, after, is_mirrored in zip(images, changed, mirrored, strict=True)
        if not is_mirrored
    )


def test_erasing_fills_one_rectangle_with_one_colour(settings):
    settings.random_erasing = 0.5
    images, _, _, changed, _ = batch_of(settings)
    differ = (images != changed).any(-1)
    assert 16 <= differ.any((1, 2)).sum() <= 48
    for different, after in zip(differ, changed, strict=True):
        if different.any():
            rows, columns = different.any(1), different.any(0)
            inside = after[rows][:, columns]
            assert (
                0.005 <= rows.sum() * columns.sum() / 144 <= 0.45 and (inside == inside[0, 0]).all()
            )


def test_mixup_is_its_formula_and_a_pair_shares_its_draw(settings):
    settings.mixup = 0.4
    images, labels, drawn, changed, soft = batch_of(settings)
    share = np.repeat(drawn['mix'][::2, 3], 2)
    other = np.arange(64) ^ 1
    np.testing.assert_allclose(
        changed,
        share[:, None, None, None] * images + (1 - share)[:, None, None, None] * images[other],
        rtol=1e-4,
        atol=0.01,
    )
    hard = np.eye(10)[labels]
    np.testing.assert_allclose(
        soft, share[:, None] * hard + (1 - share)[:, None] * hard[other], atol=1e-5
    )


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
    blended = [
        not ((after == images[index]).all(-1) | (after == images[index ^ 1]).all(-1)).all()
        for index, after in enumerate(changed)
    ]
    assert blended[::2] == blended[1::2] and 8 <= sum(blended[::2]) <= 24


def test_the_draws_of_mixing_are_of_the_beta_distribution(settings):
    settings.mixup = 0.4
    drawn = np.array([augment.draw_numbers(settings, seed)['mix'][3] for seed in seeds(400)])
    assert drawn.mean() == pytest.approx(0.5, abs=0.06) and drawn.var() == pytest.approx(
        0.25 / 1.8, abs=0.02
    )  # 1 / (4 (2 alpha + 1))


def test_color_jitter_of_grey_changes_its_brightness_only(settings):
    settings.color_jitter = 0.4
    grey = np.full((4, 8, 8, 3), 100, np.float32)
    for factors in ([1.2, 0.7, 0.6], [0.8, 1.3, 1.4]):
        np.testing.assert_allclose(
            augment.jitter(tf.constant(grey), tf.constant([factors] * 4)),
            100 * factors[0],
            rtol=1e-4,
        )


def test_nothing_asked_for_is_nothing_changed(settings):
    untouched, hard = augment.make_device_augment(settings, 10)(PICTURE[None], tf.constant([3]), {})
    np.testing.assert_array_equal(untouched, PICTURE[None])
    np.testing.assert_array_equal(hard, np.eye(10)[[3]])


def test_small_moves_keep_the_picture_where_it_is(settings):
    settings.translate, settings.rotate, settings.zoom = 0.04, 0.01, 0.03
    smooth = tf.io.encode_png(
        np.tile(np.linspace(0, 250, 32).astype(np.uint8), (32, 1))[..., None].repeat(3, -1)
    )
    moved = augment.make_host_augment(settings, 32)
    pictures = np.stack([moved(smooth, seed, 1.0) for seed in seeds(40)]).astype(float)
    assert pictures.std(0).max() > 1
    np.testing.assert_allclose(
        pictures.mean(0)[4:-4, 4:-4],
        center_crop_and_resize(tf.io.decode_png(smooth), 32)[4:-4, 4:-4],
        atol=6,
    )


def test_evaluation_takes_the_central_square():
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, 30:70] = 200
    np.testing.assert_array_equal(center_crop_and_resize(picture, 8), np.full((8, 8, 3), 200))
    np.testing.assert_array_equal(
        center_crop_and_resize(picture[None].astype(np.float32), 8, 0.5), np.full((1, 8, 8, 3), 200)
    )


def test_resizing_down_averages_instead_of_skipping():
    stripes = np.tile(np.array([[0], [240]], np.uint8), (64, 128))[..., None].repeat(3, -1)
    np.testing.assert_allclose(center_crop_and_resize(stripes, 16).numpy()[1:-1], 120, atol=2)


def encode(image, file_format='PNG', **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, file_format, **options)
    return buffer.getvalue()


def jpeg(image, **options):
    return encode(image, 'JPEG', **{'quality': 98, **options})


def pattern(function, height, width):
    """Draws a grey image of `function(y, x)` in -1..1."""
    y, x = np.mgrid[:height, :width]
    grey = np.round(127.5 + 100 * function(y, x)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def checkerboard(height, width):
    return pattern(lambda y, x: 2.0 * ((x + y) % 2) - 1, height, width)


def photograph():
    from sklearn.datasets import load_sample_images

    return load_sample_images().images[0]  # uint8 [427, 640, 3]


def box_filtered(image, shape):
    """Returns means over exact areas, from the integral of the image: float64 [*shape, 3]."""
    integral = np.pad(image.astype(float).cumsum(0).cumsum(1), ((1, 0), (1, 0), (0, 0)))
    for axis, wanted in enumerate(shape):
        edges = np.arange(wanted + 1) * image.shape[axis] / wanted
        below = np.minimum(edges.astype(int), image.shape[axis] - 1)
        share = np.expand_dims(edges - below, (1, 2) if axis == 0 else (0, 2))
        before, after = (np.take(integral, index, axis) for index in (below, below + 1))
        integral = before + share * (after - before)
    sums = np.diff(np.diff(integral, axis=0), axis=1)
    return sums * np.prod(shape) / np.prod(image.shape[:2])


@pytest.fixture
def random_crops(settings):
    """A function of (encoded, size, crop_area, number) to float64 [number, size, size, 3]."""

    def crops(encoded, size, crop_area=(0.08, 1.0), number=20):
        settings.crop, settings.crop_area = 'random', crop_area
        prepare = tf.function(augment.make_host_augment(settings, size), autograph=False)
        encoded = tf.constant(encoded)
        return np.stack([prepare(encoded, seed, 1.0) for seed in seeds(number)]).astype(float)

    return crops


@pytest.mark.parametrize(
    'height, width, shape',
    [
        (427, 640, (32, 32)),
        (427, 640, (224, 224)),
        (100, 100, (99, 98)),
        (50, 640, (8, 8)),
        (9, 7, (1, 1)),
    ],
)
def test_shrinking_takes_the_mean_of_what_a_pixel_covers(height, width, shape):
    image = photograph()[:height, :width]
    np.testing.assert_allclose(resize(image, shape), box_filtered(image, shape), atol=0.02)


@pytest.mark.parametrize('ratio', [2, 3, 7])
def test_shrinking_by_a_whole_ratio_is_the_box_filter_of_pil(ratio):
    image = photograph()[:420, :630]
    theirs = np.asarray(Image.fromarray(image).reduce(ratio)).astype(float)
    ours = resize(image, (420 // ratio, 630 // ratio))
    np.testing.assert_allclose(ours, theirs, atol=0.6)  # PIL rounds


@pytest.mark.parametrize('height, width', [(30, 40), (64, 64), (1, 1), (1, 50)])
def test_enlarging_is_bilinear_as_in_pil(height, width):
    image = photograph()[100 : 100 + height, 200 : 200 + width]
    theirs = np.asarray(Image.fromarray(image).resize((64, 64), Image.BILINEAR)).astype(float)
    np.testing.assert_allclose(resize(image, (64, 64)), theirs, atol=1.01)  # PIL rounds twice


@pytest.mark.parametrize('height, width', [(300, 20), (20, 300)])
def test_a_side_that_grows_is_bilinear_beside_one_that_shrinks(height, width):
    image = photograph()[:height, :width]
    shrunk = box_filtered(image, (min(height, 64), min(width, 64)))
    bands = [Image.fromarray(shrunk[..., band].astype(np.float32)) for band in range(3)]
    theirs = np.stack([band.resize((64, 64), Image.BILINEAR) for band in bands], axis=-1)
    np.testing.assert_allclose(resize(image, (64, 64)), theirs, atol=0.05)


def test_resizing_keeps_the_mean_of_a_picture():
    image = photograph()
    for shape in ((8, 8), (100, 37), (224, 224), (426, 639)):
        mean = np.mean(resize(image, shape), (0, 1))
        np.testing.assert_allclose(mean, image.mean((0, 1)), atol=0.01)


def test_a_batch_is_resized_as_its_pictures_are():
    images = photograph()[:400, :600].reshape(2, 200, 600, 3)
    batch = resize(images, (32, 48)).numpy()
    np.testing.assert_array_equal(batch, np.stack([resize(image, (32, 48)) for image in images]))


@pytest.mark.parametrize('size, height, width', [(8, 200, 300), (32, 400, 400), (512, 1900, 1500)])
@pytest.mark.parametrize('encode_as', [jpeg, encode])
def test_what_is_too_fine_for_a_crop_becomes_grey(random_crops, encode_as, size, height, width):
    crops = random_crops(encode_as(checkerboard(height, width)), size, (0.7, 1.0), number=5)
    # A pixel covers at least 2.5 x 2.5 fields: what one colour has more than the other is little.
    assert np.abs(crops - 127.5).mean() < 12 and crops.std() < 15  # without averaging: 100


@pytest.mark.parametrize('encode_as', [jpeg, encode])
def test_stripes_above_the_nyquist_rate_vanish_and_others_stay(random_crops, encode_as):
    def contrast(period):
        stripes = pattern(lambda y, x: np.sin(2 * np.pi * x / period), 640, 640)
        crops = random_crops(encode_as(stripes), 32, (0.9, 1.0), number=5)
        return crops.std() * 2**0.5 / 100

    pixel = 20  # of the result, in pixels of the image
    for period in (2.2, 3.1, 5.3, 9.8):
        assert contrast(period) < 0.15
    assert contrast(4 * pixel) > 0.8
    assert contrast(10 * pixel) > 0.95


@pytest.mark.parametrize('size', [32, 100, 224])
@pytest.mark.parametrize('encode_as', [jpeg, encode])
def test_a_random_crop_looks_as_pil_would_resize_its_window(random_crops, encode_as, size):
    encoded = encode_as(photograph())
    image = Image.fromarray(decode(encoded).numpy())
    crops = random_crops(encoded, size, (0.5, 1.0), number=6)
    for crop, seed in zip(crops, seeds(6), strict=True):
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            (427, 640, 3),
            [[[0.0, 0.0, 1.0, 1.0]]],
            seed,
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.5, 1.0),
            max_attempts=10,
        )
        (top, left), (height, width) = begin.numpy()[:2], extent.numpy()[:2]
        window = (left, top, left + width, top + height)
        theirs = np.asarray(image.resize((size, size), Image.HAMMING, box=window)).astype(float)
        inside = np.asarray(image)[top : top + height, left : left + width]
        plain = tf.image.resize(inside, (size, size))
        assert np.abs(crop - theirs).mean() < 0.6 * np.abs(plain - theirs).mean()
        # TensorFlow's decoder is nearly a level too dark where it does not shrink.
        np.testing.assert_allclose(crop.mean((0, 1)), theirs.mean((0, 1)), atol=2)


@pytest.mark.parametrize('ratio', [1, 2, 4, 8])
@pytest.mark.parametrize('begin', [(0, 0), (3, 5), (12, 1)])
@pytest.mark.parametrize('subsampling', ['4:4:4', '4:2:0'])
def test_a_window_of_a_shrunk_jpeg_is_in_its_place(ratio, begin, subsampling):
    """To half a pixel of the result, up to the end of an image whose sides no ratio divides."""
    extent = (509 - begin[0], 515 - begin[1])
    size = min(extent) // ratio
    for axis in (0, 1):
        pixel = extent[axis] / size
        period = 8 * pixel

        def wave(*place, axis=axis, period=period):
            return np.sin(2 * np.pi * (place[axis] + 0.5) / period)

        waves = pattern(wave, 509, 515)
        encoded = jpeg(waves, subsampling=subsampling)
        window = augment.decode_jpeg_window(encoded, tf.constant(begin), tf.constant(extent), size)
        assert size <= min(window.shape[:2]) and max(window.shape[:2]) <= 515 / ratio + 1
        crop = resize(window, (size, size)).numpy().mean((1 - axis, 2))
        phase = 2 * np.pi * (begin[axis] + (np.arange(size) + 0.5) * pixel) / period
        for part in (slice(0, 16), slice(size - 16, size)):  # two periods at either end
            waves = np.stack([np.sin(phase[part]), np.cos(phase[part]), np.ones(16)], axis=-1)
            sine, cosine, _ = np.linalg.lstsq(waves, crop[part], rcond=None)[0]
            moved_by = np.arctan2(cosine, sine) / (2 * np.pi) * 8  # pixels of the result
            assert abs(moved_by) < (0.51 if ratio > 1 else 0.05)


def test_a_jpeg_shrinks_only_while_both_sides_stay_large():
    encoded = jpeg(photograph())
    cases = [
        ((200, 400), 100, (100, 200)),
        ((199, 400), 100, (199, 400)),
        ((400, 200), 101, (400, 200)),
        ((407, 400), 100, (101, 100)),
        ((8, 8), 1, (1, 1)),
        ((1, 1), 1, (1, 1)),
        ((1, 600), 1, (1, 600)),
    ]
    for extent, size, shape in cases:
        window = augment.decode_jpeg_window(encoded, tf.constant([2, 2]), tf.constant(extent), size)
        assert window.shape == (*shape, 3)


def test_a_window_that_rounding_makes_no_smaller_than_the_size():
    encoded = jpeg(photograph())
    for begin in range(16):
        for extent in range(32, 80):
            place = tf.constant([begin, begin]), tf.constant([extent, extent])
            window = augment.decode_jpeg_window(encoded, *place, 8)
            assert 8 <= min(window.shape[:2]) < 17


@pytest.mark.parametrize(
    'encode_as, size, tolerance',
    [
        (encode, 16, 0),
        (encode, 300, 0),
        (jpeg, 300, 0),
        (jpeg, 100, 2),
        (jpeg, 50, 2),
        (jpeg, 16, 2),
    ],
)
def test_a_crop_of_the_whole_is_the_evaluation_picture(random_crops, encode_as, size, tolerance):
    """Exactly, and within rounding where the JPEG decoder shrinks."""
    encoded = encode_as(photograph()[:400, :400])
    crops = random_crops(encoded, size, (1.0, 1.0), number=2)  # nothing smaller fits: the whole
    expected = center_crop_and_resize(decode(encoded), size).numpy().astype(float)
    assert np.abs(crops - expected).mean() <= tolerance


@pytest.mark.parametrize('file_format', ['JPEG', 'PNG', slow('GIF'), slow('BMP')])
@pytest.mark.parametrize('height, width', [(1, 1), (1, 9), (3, 2), (2, 900), (900, 3), (17, 33)])
def test_tiny_and_narrow_pictures_can_be_cropped(random_crops, file_format, height, width):
    encoded = encode(np.full((height, width, 3), 180, np.uint8), file_format)
    for size in (8, 40):
        crops = random_crops(encoded, size, number=4)
        np.testing.assert_allclose(crops, 180, atol=2)


def test_a_crop_shows_the_same_window_at_every_size(random_crops):
    """The stages of a progressive run: the window follows from the seed alone."""
    encoded = jpeg(photograph())
    largest = random_crops(encoded, 256, (0.3, 1.0), number=6)
    for size in (32, 64, 128):
        crops = random_crops(encoded, size, (0.3, 1.0), number=6)
        shrunk = largest.reshape(6, size, 256 // size, size, 256 // size, 3).mean((2, 4))
        assert np.abs(crops - shrunk).mean((1, 2, 3)).max() < 9
        others = np.roll(shrunk, 1, axis=0)
        assert np.abs(crops - others).mean((1, 2, 3)).min() > 20


def test_a_grey_jpeg_is_shrunk_while_it_is_decoded():
    grey = photograph()[:, :, 0]
    place = tf.constant([0, 0]), tf.constant([424, 640])
    window = augment.decode_jpeg_window(jpeg(grey), *place, 100)
    expected = box_filtered(grey[:424, :, None], (106, 160))
    np.testing.assert_allclose(window, np.repeat(expected, 3, axis=-1), atol=12)


def test_what_a_zoom_makes_much_smaller_is_averaged(settings):
    settings.zoom = 0.97
    moved = tf.function(augment.make_host_augment(settings, 128), autograph=False)
    encoded = tf.constant(encode(checkerboard(128, 128)))
    checked = 0
    for seed in seeds(200):
        by = tf.random.stateless_uniform([5], seed + (0, 1), -1.0, 1.0).numpy()
        height, width = 128 * (1 + settings.zoom * by[4]), 128 * (1 + settings.zoom * by[3])
        if not 10 < min(height, width) <= max(height, width) < 55:
            continue
        rows, columns = (slice(int(66 - side / 2), int(62 + side / 2)) for side in (height, width))
        inside = moved(encoded, seed, 1.0).numpy()[rows, columns]
        assert np.abs(inside.astype(float) - 127.5).max() < 60  # sampled: 100, black and white
        checked += 1
    assert checked >= 3
