"""What is asked of an exported model is answered as evaluation answers it, whatever kind of file it
is.
"""

import contextlib
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import export
import predict
import train
from common import console, storage
from common.errors import RunError
from configs import default
from configs import folder as folder_config
from experiment import resume
from experiment import session as sessions
from inputs import image_folder, image_ops, image_validation, jpeg_files, pipeline
from modeling import steps
from tests import conftest, image_kinds
from tests.conftest import refused, slow
from tests.image_kinds import KINDS

EACH = 6  # files of each kind


def softmax(logits):
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """(config, workdir, {path below the data: kind}) of a small run on files of all kinds."""
    root = tmp_path_factory.mktemp('serving')
    kinds = {}
    for number, (name, kind) in enumerate(sorted(KINDS.items())):
        for copy in range(EACH):
            content, _ = kind.make(image_kinds.pixels_of(EACH * number + copy))
            path = os.path.join(
                'test' if copy else 'train',
                'odd' if copy % 2 else 'even',
                f'{number}_{copy}{kind.suffix}',
            )
            kinds[path] = name
            storage.make_folder(os.path.dirname(root / 'data' / path))
            (root / 'data' / path).write_bytes(content)
    (root / 'data' / 'train' / 'odd').mkdir()
    for number in range(3):
        pixels = image_kinds.pixels_of(9999 - number)
        (root / 'data' / 'train' / 'odd' / f'{number}.png').write_bytes(
            image_kinds.encoded(pixels, 'PNG')
        )
    config = folder_config.get_config()
    config.update(
        {
            'image_size': 32,
            'batch_size': 16,
            'eval_batch_size': 32,
            'train_for': '8 steps',
            'ema_decay': 0.0,
        }
    )
    config.model.update({'name': 'tiny', 'drop_path': 0.0})
    config.schedule.peak_lr = 1e-2
    config.dataset.data_dir = str(root / 'data')
    with pytest.MonkeyPatch.context() as patch, conftest.reading_here():
        patch.setattr(image_validation.tfds.core.constants, 'DATA_DIR', str(root / 'kept'))
        assert train.run(config, str(root / 'run')) == 0
        yield config, str(root / 'run'), kinds


@pytest.fixture(scope='module')
def evaluated(trained):
    """{path below the data: probabilities} as evaluation computes them: its batches, its
    weights.
    """
    config, workdir, _ = trained
    session = sessions.open_session(config, workdir, trains=False)
    session.checkpoints.restore(allow_extra=True)
    batches, _ = pipeline.evaluation_batches(session.source, config, session.plan, session.strategy)
    answer = steps.make_predict(session.state)
    logits = np.concatenate(
        [answer(images).numpy()[mask.numpy() == 1] for images, _, mask in batches]
    )
    in_order = image_folder.find(config.dataset).splits['test']
    paths = [
        os.path.relpath(in_order[number].original, config.dataset.data_dir)
        for number in session.source.split('test').ids.numpy()
    ]
    return dict(zip(paths, softmax(logits), strict=True))


def test_300_files_of_all_kinds_are_there(trained, evaluated):
    _, _, kinds = trained
    assert len(kinds) >= 300 and len(evaluated) == len(kinds) * (EACH - 1) / EACH
    assert (
        len(np.unique(np.round(list(evaluated.values()), 4), axis=0)) > 200
    )  # the answers tell files apart


def test_predict_answers_as_evaluation_does(trained, evaluated, capsys):
    config, workdir, _ = trained
    model, labels = predict.load(workdir)
    paths = [os.path.join(config.dataset.data_dir, path) for path in evaluated]
    images = list(predict.images_from_files(paths))
    for image, (path, expected) in zip(images, evaluated.items(), strict=True):
        encoded, _ = image.read()
        answer = predict.classify(model, labels, image.title, encoded)
        found = dict(answer.classes)
        np.testing.assert_allclose(
            [found[label] for label in labels], expected, atol=2e-5, err_msg=path
        )


def test_the_export_answers_as_evaluation_does(trained, evaluated):
    """It gets the file itself where its documentation says so, else what `as_decodable` makes of
    it.
    """
    config, workdir, kinds = trained
    model = tf.saved_model.load(os.path.join(workdir, 'export'))
    for path, expected in evaluated.items():
        content = storage.read(os.path.join(config.dataset.data_dir, path))
        asked = content if KINDS[kinds[path]].in_graph else image_validation.as_decodable(content)
        answer = model.signatures['classify_encoded'](encoded=tf.constant([asked]))[
            'probabilities'
        ][0]
        np.testing.assert_allclose(answer, expected, atol=2e-5, err_msg=f'{path}, {kinds[path]}')
        assert asked is content or asked != content


def test_the_export_was_checked_on_the_users_own_files(trained, evaluated):
    _, workdir, kinds = trained
    summary = storage.read_json(os.path.join(workdir, 'summary.json'))
    converted = sum(not KINDS[kinds[path]].in_graph or kinds[path] == 'BMP' for path in evaluated)
    assert (
        summary['export/examples'] == len(evaluated)
        and summary['export/converted_examples'] == converted
    )
    assert (
        summary['export/accuracy'] == summary['export/model_accuracy'] == summary['eval/accuracy']
    )


def test_an_export_that_reads_other_pictures_is_refused(trained, monkeypatch):
    """The check would see it if serving forgot what training does to a file."""
    config, workdir, _ = trained
    monkeypatch.setattr(
        export.image_validation,
        'as_decodable',
        lambda content: image_kinds.encoded(image_kinds.pixels_of(5), 'PNG'),
    )
    resume.require_same_config(config, workdir)
    with (
        conftest.reading_here(),
        refused(RunError, 'classify_encoded'),
    ):
        export.run(config, workdir)
    storage.delete(os.path.join(workdir, 'export.part'))


@pytest.mark.parametrize('name', KINDS)
def test_a_file_shows_what_a_viewer_shows(name):
    kind = KINDS[name]
    content, shown = kind.make(image_kinds.pixels_of(1))
    decodable = image_validation.as_decodable(content)
    found = image_ops.decode(decodable).numpy().astype(float)
    assert found.shape == shown.shape
    assert np.abs(found - shown).max() <= kind.tolerance
    assert image_validation.as_decodable(decodable) == decodable
    if kind.in_graph:
        np.testing.assert_array_equal(image_ops.decode(content), found)


def test_transparent_is_laid_over_white_as_pillow_does():
    color, alpha = np.mgrid[:256, :256].astype(np.uint8)
    image = np.dstack([color, color[::-1], color, alpha])
    white = Image.new('RGBA', (256, 256), 'white')
    expected = np.asarray(Image.alpha_composite(white, Image.fromarray(image)).convert('RGB'))
    np.testing.assert_array_equal(image_ops.decode(image_kinds.encoded(image, 'PNG')), expected)


def bmp_with_masks(pixels):
    """A BMP file of 32 bits whose masks say that a byte without meaning comes first, written by
    hand.
    """
    height, width, _ = pixels.shape
    rows = np.dstack([np.zeros([height, width], np.uint8), pixels[..., ::-1]])[::-1].tobytes()
    header = struct.pack('<IiiHHIIiiII', 40, width, height, 1, 32, 3, len(rows), 0, 0, 0, 0)
    masks = struct.pack('<III', 0xFF000000, 0xFF0000, 0xFF00)
    return b'BM' + struct.pack('<IHHI', 66 + len(rows), 0, 0, 66) + header + masks + rows, pixels


UNREADABLE = {
    'palette BMP': image_kinds.palette_bmp,
    'BMP with masks': bmp_with_masks,
    'WebP': KINDS['WebP with alpha'].make,
    'TIFF': KINDS['TIFF'].make,
    'text': lambda pixels: (b'<html>', None),
    'nothing': lambda pixels: (b'', None),
    'start of a BMP': lambda pixels: (b'BM', None),
}


@pytest.mark.parametrize('in_graph', [False, True])
@pytest.mark.parametrize('kind', UNREADABLE)
def test_what_a_graph_would_misread_is_refused(kind, in_graph):
    content, _ = UNREADABLE[kind](image_kinds.pixels_of(1))
    decode = tf.function(image_ops.decode) if in_graph else image_ops.decode
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode(tf.constant(content))


@pytest.mark.parametrize('content', [b'', b'\x89', b'BM\xff', b'GIF8', b'\xff\xd8'])
@pytest.mark.parametrize('in_graph', [False, True])
def test_a_beginning_of_a_file_is_refused(content, in_graph):
    decode = tf.function(image_ops.decode, autograph=False) if in_graph else image_ops.decode
    whole = content + b'\xfe' * 9
    for begun in (content, whole, image_ops.PNG_SIGNATURE + whole):
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode(tf.constant(begun))


def test_masks_of_a_bmp_are_followed():
    content, shown = bmp_with_masks(image_kinds.pixels_of(1))
    np.testing.assert_array_equal(image_ops.decode(image_validation.as_decodable(content)), shown)


# What libjpeg complains of.

PROGRESSIVE, INTERVALS = {'progressive': True}, {'restart_marker_blocks': 2}
MARKERS = {  # of files with these options
    'baseline': ({}, (0xE0, 0xDB, 0xC0, 0xC4, 0xDA, 0xD9)),
    'progressive': (PROGRESSIVE, (0xE0, 0xDB, 0xC2, 0xC4, 0xDA, 0xD9)),
    'intervals': (INTERVALS, (0xE0, 0xDB, 0xC0, 0xC4, 0xDD, 0xDA, 0xD0, 0xD1, 0xD2, 0xD9)),
}


@pytest.mark.parametrize('junk', image_kinds.JUNK)
@pytest.mark.parametrize(
    'kind, marker', [(kind, marker) for kind, (_, markers) in MARKERS.items() for marker in markers]
)
def test_filling_before_any_marker_is_no_damage(kind, marker, junk, capfd):
    options, _ = MARKERS[kind]
    content, _ = image_kinds.with_junk(image_kinds.JUNK[junk], {marker}, **options)(
        image_kinds.pixels_of(2)
    )
    whole, _ = image_kinds.with_junk(b'', **options)(image_kinds.pixels_of(2))
    assert content != whole
    capfd.readouterr()
    read = image_validation.as_decodable(content)
    np.testing.assert_array_equal(image_ops.decode(read), image_ops.decode(whole))
    assert capfd.readouterr().err == ''  # nor does TensorFlow complain of what is read
    quiet = jpeg_files.without_faults(
        jpeg_files.with_marker_first(content), image_validation._decode_with_warning
    )
    assert quiet.damage == quiet.doubt == ''


ENDS_OF_SCANS = {
    'baseline': ({}, {0xD9}),
    'restarts': ({'restart_marker_rows': 1}, {*range(0xD0, 0xD8)}),
    'short intervals': ({'restart_marker_blocks': 1}, {*range(0xD0, 0xD8), 0xD9}),
    'progressive': ({'progressive': True}, {0xC4, 0xD9}),
}


@pytest.mark.parametrize('kind', ENDS_OF_SCANS)
def test_zeros_before_a_marker_are_no_damage_however_many(kind):
    """A scan may end with a zero of its own, which must stay."""
    options, markers = ENDS_OF_SCANS[kind]
    random = np.random.RandomState(0)
    own_zeros = 0
    for number in range(1, 41):
        pixels = random.randint(0, 30, (160, 240, 3)).astype(np.uint8)
        whole = image_kinds.encoded(pixels, 'JPEG', quality=75, **options)
        own_zeros += len(re.findall(rb'[^\xff]\0\xff[\xd0-\xd9]', whole))
        content = image_kinds.put_before_markers(whole, bytes(number), markers)
        quiet = jpeg_files.without_faults(content, image_validation._decode_with_warning)
        assert not quiet.damage and not quiet.doubt, number
        found, said = image_validation._decode_with_warning(quiet.content)
        assert said == ''
        np.testing.assert_array_equal(found, image_ops.decode(whole))
    assert own_zeros or kind in ('baseline', 'progressive')


def stray_bytes(number):
    """Returns bytes that hold no marker."""
    return np.random.RandomState(number).randint(0, 0xFF, number).astype(np.uint8).tobytes()


@pytest.mark.parametrize('junk_of', [bytes, stray_bytes], ids=['zeros', 'random'])
def test_stray_bytes_in_a_progressive_file_take_few_decodes(junk_of):
    """Its scans before other markers end with zeros of their own."""
    options = {'progressive': True, 'restart_marker_rows': 1}
    random = np.random.RandomState(4)
    most_decodes = 0
    for number in range(1, 41):
        pixels = random.randint(0, 30, (120, 160, 3)).astype(np.uint8)
        whole = image_kinds.encoded(pixels, 'JPEG', quality=75, **options)
        content = image_kinds.put_before_markers(whole, junk_of(number), {*range(0xD0, 0xD8)})
        decoded = []

        def decode(file, decoded=decoded):
            decoded.append(file)
            return image_validation._decode_with_warning(file)

        quiet = jpeg_files.without_faults(content, decode)
        assert not quiet.damage, number
        assert junk_of is not bytes or not quiet.doubt, number
        most_decodes = max(most_decodes, len(decoded))
        np.testing.assert_array_equal(image_ops.decode(quiet.content), image_ops.decode(content))
    assert most_decodes <= 257


def test_damage_behind_stray_bytes_is_damage():
    """Taking out what lies before a marker shows that data are missing elsewhere."""
    random = np.random.RandomState(3)
    num_refused = num_doubted = 0
    for number in range(150):
        options = [{}, {'restart_marker_rows': 1}, {'restart_marker_blocks': 3}][number % 3]
        pixels = np.asarray(Image.fromarray(image_kinds.pixels_of(number)).resize((160, 120)))
        whole = image_kinds.encoded(pixels, 'JPEG', quality=92, **options)
        scan = whole.index(b'\xff\xda') + 12
        begin = random.randint(scan, len(whole) - 300)
        length = random.randint(1, 200)
        content = whole[:begin] + bytes(length) + whole[begin + length :]
        try:
            _, complaint = image_validation._decode_with_warning(content)
        except tf.errors.InvalidArgumentError:
            continue
        if complaint:
            quiet = jpeg_files.without_faults(content, image_validation._decode_with_warning)
            num_refused += bool(quiet.damage)
            num_doubted += bool(quiet.doubt)
    assert num_refused >= 10 * num_doubted


@pytest.mark.parametrize('kind', MARKERS)
def test_bytes_in_the_header_are_no_damage_whatever_they_are(kind):
    options, markers = MARKERS[kind]
    for marker in (0xDB, 0xC0, 0xC2, 0xDA):
        if marker not in markers or (marker == 0xDA and kind == 'progressive'):
            continue
        content, _ = image_kinds.with_junk(b'\x12\xff\x00\x34', {marker}, **options)(
            image_kinds.pixels_of(2)
        )
        quiet = jpeg_files.without_faults(content, image_validation._decode_with_warning)
        assert quiet.remark and not quiet.damage and not quiet.doubt
        np.testing.assert_array_equal(image_ops.decode(quiet.content), image_ops.decode(content))


def test_exif_data_of_a_wrong_length_are_no_damage():
    """What is left over may hold what looks like a marker."""
    whole = image_kinds.encoded(image_kinds.pixels_of(2), 'JPEG', quality=95)
    content = image_kinds.put_before_markers(whole, b'\x12\x34\xff\xd0\x56\xff\xd1\x78', {0xC0})
    quiet = jpeg_files.without_faults(content, image_validation._decode_with_warning)
    assert quiet.remark and not quiet.damage and not quiet.doubt
    np.testing.assert_array_equal(image_ops.decode(quiet.content), image_ops.decode(whole))


def edited(marker, edit):
    file = image_kinds.encoded(image_kinds.pixels_of(2), 'JPEG', quality=95)
    return b''.join(
        edit(part) if kind == marker else part for kind, part in image_kinds.jpeg_parts(file)
    )


@pytest.mark.parametrize(
    'content, says',
    [
        (edited(0xDA, lambda part: part[:-3] + b'\x00\x00\x00'), 'Invalid SOS parameters'),
        (edited(0xE0, lambda part: part[:9] + b'\x03\x07' + part[11:]), 'unknown JFIF revision'),
    ],
)
def test_odd_headers_are_read_without_a_warning(content, says, capfd):
    _, complaint = image_validation._decode_with_warning(content)
    assert says in complaint
    capfd.readouterr()
    read = image_validation.as_decodable(content)
    np.testing.assert_array_equal(
        image_ops.decode(read),
        image_ops.decode(image_kinds.encoded(image_kinds.pixels_of(2), 'JPEG', quality=95)),
    )
    assert capfd.readouterr().err == ''


@pytest.fixture
def examine(tmp_path, monkeypatch):
    """Examines files, {name: content}."""
    monkeypatch.setattr(image_validation.tfds.core.constants, 'DATA_DIR', str(tmp_path / 'kept'))

    def examine_files(contents, **values):
        (tmp_path / 'data').mkdir(exist_ok=True)
        for name, content in contents.items():
            (tmp_path / 'data' / name).write_bytes(content)
        return image_validation.examine(str(tmp_path / 'data'), sorted(contents), **values)

    return examine_files


def drone_file(number):
    """Bytes of any value between the last block and the end of the image."""
    pixels = np.random.RandomState(number).randint(0, 256, (48, 64, 3)).astype(np.uint8)
    junk = b'\x31\x41\x59\x26\x53\x58\x97\x93\x23\x84'
    return image_kinds.put_before_markers(
        image_kinds.encoded(pixels, 'JPEG', quality=90), junk, {0xD9}
    )


def test_an_odd_end_is_accepted_where_nearly_all_files_have_it(examine, capfd):
    odd = {f'{number}.jpg': drone_file(number) for number in range(36)}
    plain = {
        f'plain{number}.jpg': image_kinds.encoded(image_kinds.pixels_of(number), 'JPEG')
        for number in range(3)
    }
    verdicts = examine(
        odd | plain | {'other.png': image_kinds.encoded(image_kinds.pixels_of(1), 'PNG')}
    )
    assert not any(verdict.broken for verdict in verdicts.values())
    assert all(verdicts[name].doubt for name in odd) and not any(
        verdicts[name].doubt for name in plain
    )
    capfd.readouterr()
    for name, content in odd.items():
        np.testing.assert_array_equal(
            image_ops.decode(storage.read(verdicts[name].copy)), image_ops.decode(content)
        )
    assert capfd.readouterr().err.count('extraneous') == len(odd)  # of the originals alone


def test_three_files_are_enough_for_a_habit(examine):
    odd = {f'{number}.jpg': drone_file(number) for number in range(3)}
    assert not any(verdict.broken for verdict in examine(odd).values())
    two = examine({name: odd[name] for name in ('0.jpg', '1.jpg')})
    assert all(verdict.broken for verdict in two.values())


def test_an_odd_end_is_damage_where_few_files_have_it(examine):
    odd = {f'{number}.jpg': drone_file(number) for number in range(12)}
    plain = {
        f'plain{number}.jpg': image_kinds.encoded(image_kinds.pixels_of(number), 'JPEG')
        for number in range(3)
    }
    verdicts = examine(odd | plain)
    assert all(verdicts[name].broken.startswith('damaged: ') for name in odd)
    assert not any(verdicts[name].broken for name in plain)


# Images of 16 bits that use fewer of them.


def twelve_bits(number):
    return image_kinds.pixels_of(number)[..., 0].astype(np.uint16) * 16 + 15  # up to 4,095


DEEP = {
    'grey PNG': lambda values: tf.io.encode_png(values[..., None]).numpy(),
    'RGB PNG': lambda values: tf.io.encode_png(np.repeat(values[..., None], 3, -1)).numpy(),
    'grey TIFF': lambda values: image_kinds.encoded(values, 'TIFF'),
    'PGM': lambda values: image_kinds.encoded(values, 'PPM'),
}


@pytest.mark.parametrize('kind', DEEP)
def test_a_white_level_makes_twelve_bits_bright(kind):
    values = twelve_bits(3)
    content = DEEP[kind](values)
    dark, bright = (
        image_ops.decode(image_validation.as_decodable(content), white).numpy()
        for white in (65535, 4095)
    )
    assert dark.max() <= 16
    np.testing.assert_allclose(bright, np.repeat(values[..., None] / 4095 * 255, 3, -1), atol=0.51)


def portable(values, white, magic=b'P5'):
    """A PGM or PPM file that says which value is white."""
    size = f'{values.shape[1]} {values.shape[0]}'.encode()
    return (
        magic + b'\n# a comment\n' + size + f'\n{white}\n'.encode() + values.astype('>u2').tobytes()
    )


@pytest.mark.parametrize('white', [1023, 4095, 40_000, 65_534])
def test_a_white_level_is_nothing_to_files_that_name_their_white(white):
    greys = np.linspace(0, white, 24 * 32).reshape(24, 32).astype(np.uint16)
    expected = np.repeat(greys[..., None] / white * 255, 3, -1)
    colors = np.stack([greys] * 3, -1)
    for content in (portable(greys, white), portable(colors, white, b'P6')):
        for white_level in (65535, 4095):
            found = image_ops.decode(image_validation.as_decodable(content), white_level)
            np.testing.assert_allclose(found, expected, atol=1.01)


def test_dark_colors_of_a_portable_file_are_noted_and_refused(examine):
    values = np.stack([twelve_bits(1)] * 3, -1)
    content = portable(values, 65535, b'P6')
    verdict = examine({'x.ppm': content})['x.ppm']
    assert 2047 < verdict.peak <= 4095 and verdict.has_upper_bits_only
    assert examine({'x.ppm': content}, white_level=4095)['x.ppm'].broken.startswith(
        '16-bit colours'
    )


def little_tiff(greys, photometric):
    """A TIFF file, uint16 [height, width]."""
    height, width = greys.shape
    data = greys.astype('<u2').tobytes()
    entries = [
        (256, width),
        (257, height),
        (258, 16),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, height),
        (279, len(data)),
    ]
    directory = (
        struct.pack('<H', len(entries))
        + b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in entries)
        + bytes(4)
    )
    return b'II*\0' + struct.pack('<I', 8 + len(data)) + data + directory


def test_white_may_be_zero_in_a_tiff_file_of_16_bits():
    greys = np.linspace(0, 65535, 24 * 32).reshape(24, 32).astype(np.uint16)
    found = [
        image_ops.decode(image_validation.as_decodable(content))
        for content in (little_tiff(greys, 1), little_tiff(65535 - greys, 0))
    ]
    np.testing.assert_array_equal(*found)
    assert found[0].numpy()[0, 0, 0] == 0 and found[0].numpy()[-1, -1, 0] == 255


def test_a_white_level_is_nothing_to_files_of_eight_bits():
    for name in ('PNG', 'JPEG', '8-bit RGBA PNG', 'TIFF'):
        content, _ = KINDS[name].make(image_kinds.pixels_of(1))
        decodable = image_validation.as_decodable(content)
        np.testing.assert_array_equal(
            image_ops.decode(decodable, 4095), image_ops.decode(decodable)
        )


def test_white_level_is_not_guessed_from_upper_bits(examine):
    rgb = struct.pack(
        '<4H', *[16] * 4
    )  # a TIFF file of 2 x 2 pixels, three channels of 16 bits, written by hand
    tags = [
        (256, 3, 1, 2),
        (257, 3, 1, 2),
        (258, 3, 3, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 16),
        (277, 3, 1, 3),
        (278, 3, 1, 2),
        (279, 4, 1, 24),
    ]
    directory = (
        struct.pack('<H', len(tags))
        + b''.join(struct.pack('<HHII', *tag) for tag in tags)
        + bytes(4)
    )
    content = b'II*\0' + struct.pack('<I', 40) + rgb + struct.pack('<12H', *[1000] * 12) + directory
    assert Image.open(io.BytesIO(content)).mode == 'RGB'
    assert image_ops.decode(image_validation.as_decodable(content)).numpy().max() == 3
    assert not examine({'x.tiff': content})['x.tiff'].broken
    reason = examine({'x.tiff': content}, white_level=4095)['x.tiff'].broken
    assert reason.startswith('16-bit colours') and 'save it as a 16-bit PNG' in reason
    # Serving has no second look: the brightness is right then, if not each shade.
    bright = image_ops.decode(image_validation.as_decodable(content), 4095).numpy()
    np.testing.assert_allclose(bright, 1000 / 4095 * 255, atol=16)


@pytest.mark.parametrize('turn', [None, 6])
def test_rotated_and_transparent_deep_files_keep_their_bits(turn):
    image = np.random.RandomState(0).randint(0, 4096, (6, 9, 4)).astype(np.uint16)
    image[..., 3] = np.random.RandomState(1).randint(0, 2**16, (6, 9))
    content = with_orientation(tf.io.encode_png(image).numpy(), turn)
    colors, opacity = image[..., :3] / 4095 * 255, image[..., 3:] / 65535
    expected = colors * opacity + 255 * (1 - opacity)
    if turn == 6:
        expected = np.rot90(expected, -1)
    found = image_ops.decode(image_validation.as_decodable(content), 4095)
    np.testing.assert_allclose(found, expected, atol=1.01)


def with_orientation(png, orientation):
    """A PNG file with an eXIf chunk behind its header."""
    if orientation is None:
        return png
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = exif.tobytes().removeprefix(b'Exif\0\0')
    chunk = struct.pack('>I', len(data)) + b'eXIf' + data
    return png[:33] + chunk + struct.pack('>I', zlib.crc32(chunk[4:])) + png[33:]


@pytest.fixture(scope='module')
def of_twelve_bits(tmp_path_factory):
    """(config, workdir) of a finished run on images of 12 bits in 16, of several formats."""
    root = tmp_path_factory.mktemp('twelve')
    for number in range(40):
        kind, ending = [('grey PNG', 'png'), ('RGB PNG', 'png'), ('grey TIFF', 'tiff')][number % 3]
        values = twelve_bits(number)
        values = values if number % 2 else 4095 - values
        folder_of_class = root / 'data' / ('light', 'dark')[number % 2]
        folder_of_class.mkdir(parents=True, exist_ok=True)
        (folder_of_class / f'{number}.{ending}').write_bytes(DEEP[kind](values))
    config = folder_config.get_config()
    config.update(
        {'image_size': 32, 'batch_size': 16, 'eval_batch_size': 32, 'train_for': '8 steps'}
    )
    config.model.update({'name': 'tiny', 'drop_path': 0.0})
    config.dataset.update({'data_dir': str(root / 'data'), 'white_level': 4095})
    with pytest.MonkeyPatch.context() as patch, conftest.reading_here():
        patch.setattr(image_validation.tfds.core.constants, 'DATA_DIR', str(root / 'kept'))
        assert train.run(config, str(root / 'run')) == 0
        yield config, str(root / 'run')


@pytest.mark.slow
def test_the_export_knows_the_white_level(of_twelve_bits, tmp_path):
    """Also one that was copied without its config, and for files that only `as_decodable` can
    read.
    """
    config, workdir = of_twelve_bits
    summary = storage.read_json(os.path.join(workdir, 'summary.json'))
    assert summary['export/accuracy'] == summary['export/model_accuracy']
    shutil.copytree(os.path.join(workdir, 'export'), tmp_path / 'export')
    model, labels = predict.load(str(tmp_path))
    values = twelve_bits(77)
    bright = np.repeat(np.rint(values / 4095 * 255).astype(np.uint8)[..., None], 3, -1)
    expected = model.signatures['serving_default'](images=bright[None])['probabilities'][0]
    raw = model.signatures['classify_encoded'](encoded=[DEEP['RGB PNG'](values)])['probabilities'][
        0
    ]
    np.testing.assert_allclose(raw, expected, atol=2e-5)
    for kind, make in DEEP.items():
        path = tmp_path / f'{kind}.bin'
        path.write_bytes(make(values))
        (image,) = predict.images_from_files([str(path)])
        encoded, _ = image.read()
        answer = dict(predict.classify(model, labels, image.title, encoded).classes)
        np.testing.assert_allclose(
            [answer[label] for label in labels], expected, atol=2e-5, err_msg=kind
        )


def notes_of(tmp_path, monkeypatch, values_of, **values):
    monkeypatch.setattr(image_validation.tfds.core.constants, 'DATA_DIR', str(tmp_path / 'kept'))
    for label in ('cat', 'dog'):
        (tmp_path / 'data' / label).mkdir(parents=True, exist_ok=True)
        for number in range(3):
            content = DEEP['grey PNG'](values_of(number + 10 * (label == 'dog')))
            (tmp_path / 'data' / label / f'{number}.png').write_bytes(content)
    config = default.get_config().dataset
    config.update({'name': 'folder', 'data_dir': str(tmp_path / 'data'), **values})
    found = image_folder.find(config)
    return [note for note in found.notes if 'white' in note], found


def test_nearly_black_files_are_noted_with_what_to_write(tmp_path, monkeypatch):
    (note,), _ = notes_of(tmp_path, monkeypatch, twelve_bits)
    assert '6 images of 16 bits' in note and note.endswith('--config.dataset.white_level=4095')
    notes, found = notes_of(tmp_path, monkeypatch, twelve_bits, white_level=4095)
    assert notes == []
    contents = [storage.read(picture.path) for split in found.splits.values() for picture in split]
    assert max(image_ops.decode(content, 4095).numpy().max() for content in contents) > 200
    assert max(image_ops.decode(content).numpy().max() for content in contents) <= 16
    (note,), _ = notes_of(tmp_path, monkeypatch, twelve_bits, white_level=1023)
    assert 'cut off at config.dataset.white_level=1023' in note


def test_files_that_use_their_range_are_not_noted(tmp_path, monkeypatch):
    assert (
        notes_of(
            tmp_path,
            monkeypatch,
            lambda number: image_kinds.pixels_of(number)[..., 0].astype(np.uint16) * 257,
        )[0]
        == []
    )


# predict.py on what people have.


def run_predict(trained, *paths):
    _, workdir, _ = trained
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
    ):
        for name in (
            'TPU_LOAD_LIBRARY',
            'TPU_SKIP_MDS_QUERY',
            'CUDA_VISIBLE_DEVICES',
            'TF_CPP_MIN_LOG_LEVEL',
        ):
            patch.setenv(name, os.environ.get(name, '0'))
        status = predict.main([workdir, *map(str, paths)])
    return status, out.getvalue().splitlines(), err.getvalue().splitlines()


def test_a_broken_file_is_named_and_the_others_are_answered(trained, tmp_path):
    good = image_kinds.encoded(image_kinds.pixels_of(1), 'PNG')
    for name, content in {'a.png': good, 'b.jpg': b'<html>', 'c.jpg': b'', 'd.png': good}.items():
        (tmp_path / name).write_bytes(content)
    status, out, err = run_predict(
        trained, *(tmp_path / name for name in ('a.png', 'b.jpg', 'absent.jpg', 'c.jpg', 'd.png'))
    )
    assert status == 1
    assert [line.split(': ')[0] for line in out[:-1]] == [
        f'{tmp_path}/a.png',
        f'{tmp_path}/d.png',
    ] and out[-1].startswith('drew them in')
    assert [line.split(': ')[1] for line in err[:-1]] == [
        f'{tmp_path}/{name}' for name in ('b.jpg', 'absent.jpg', 'c.jpg')
    ]
    assert 'not a readable image' in err[0] and 'No such file' in err[1] and 'empty' in err[2]
    assert err[-1] == 'error: 3 of 5 images could not be read'


def test_what_may_be_damaged_is_answered_and_noted(trained, tmp_path):
    (tmp_path / 'a.jpg').write_bytes(drone_file(1))
    (tmp_path / 'b.jpg').write_bytes(image_kinds.encoded(image_kinds.pixels_of(1), 'JPEG'))
    status, out, err = run_predict(trained, tmp_path / 'a.jpg', tmp_path / 'b.jpg')
    assert status == 0 and len(out) == 3
    assert len(err) == 1 and err[0].startswith(
        f'warning: {tmp_path}/a.jpg may be damaged (Corrupt JPEG data: '
    )


def test_a_folder_is_all_the_files_below_it(trained, tmp_path):
    good = image_kinds.encoded(image_kinds.pixels_of(1), 'PNG')
    (tmp_path / 'more').mkdir()
    for name in ('b.png', 'notes.txt', '.hidden.png', 'more/c.png'):
        (tmp_path / name).write_bytes(good)
    status, out, _ = run_predict(trained, tmp_path)
    assert status == 0 and [line.split(': ')[0] for line in out[:-1]] == [
        f'{tmp_path}/b.png',
        f'{tmp_path}/more/c.png',
    ]
    (tmp_path / 'empty').mkdir()
    status, out, err = run_predict(trained, tmp_path / 'empty')
    assert (status, out) == (1, []) and len(err) == 1 and str(tmp_path / 'empty') in err[0]


def test_what_is_no_file_is_named_without_waiting(trained, tmp_path):
    os.mkfifo(tmp_path / 'pipe.png')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'good.png').write_bytes(image_kinds.encoded(image_kinds.pixels_of(1), 'PNG'))
    paths = [tmp_path / 'pipe.png', '/dev/zero', tmp_path / 'empty', tmp_path / 'good.png']
    status, out, err = run_predict(trained, *paths)
    assert status == 1 and out[0].startswith(f'{tmp_path}/good.png: ') and len(out) == 2
    assert err == [
        f'error: {tmp_path}/pipe.png: not a regular file',
        'error: /dev/zero: not a regular file',
        f'error: {tmp_path}/empty: the folder contains no file with an image extension, such as '
        '.jpg',
        'error: 3 of 4 images could not be read',
    ]


@pytest.mark.parametrize(
    'config, says',
    [
        ('[]', 'is damaged'),
        ('"x"', 'is damaged'),
        ('{}', 'has no section dataset'),
        ('{"dataset": 3}', 'has no section dataset'),
        ('{"dataset": {"white_level": "bright"}}', "has dataset.white_level='bright'"),
        ('{"dataset": {"name": null}}', 'has dataset.name=None'),
    ],
)
def test_a_config_that_no_run_has_written_is_named(trained, tmp_path, config, says):
    _, workdir, kinds = trained
    os.symlink(os.path.join(workdir, 'export'), tmp_path / 'export')
    (tmp_path / 'config.json').write_text(config)
    (tmp_path / 'good.png').write_bytes(image_kinds.encoded(image_kinds.pixels_of(1), 'PNG'))
    for paths in ([], [tmp_path / 'good.png']):
        status, out, err = run_predict((None, str(tmp_path), kinds), *paths)
        assert status == 1 and len(err) == 1 and says in err[0], err


@pytest.mark.parametrize('program', [slow('predict'), 'compare'])
def test_who_stops_reading_sees_no_error(trained, tmp_path, program):
    _, workdir, _ = trained
    for number in range(3):
        (tmp_path / f'{number}.png').write_bytes(
            image_kinds.encoded(image_kinds.pixels_of(number), 'PNG')
        )
    arguments = {
        'predict': [workdir, tmp_path],
        'compare': [workdir, f'--output={tmp_path}/x.png'],
    }[program]
    reading, writing = os.pipe()
    os.close(reading)
    root = os.path.dirname(os.path.abspath(predict.__file__))
    ended = subprocess.run(
        [sys.executable, os.path.join(root, f'{program}.py'), *arguments],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, '')


@pytest.mark.parametrize(
    'name, printed',
    [
        ('line\u2028end', True),
        ('gnp.\u202ex', True),
        ('\u2066x', True),
        ('\ufeffx', True),
        ('so\u00adft', True),
        ('tab\t', True),
        ('می\u200cخواهم', False),
        ('👩\u200d🚀', False),
        ('é', False),
        ('e\u0301', False),
    ],
)
def test_a_name_is_printed_as_it_is_unless_it_disturbs_the_line(name, printed):
    assert console.printable(name) == (ascii(name) if printed else name)


def test_titles_are_shortened_as_they_are_drawn(trained, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        'outputs.plots.plot_predictions', lambda path, pixels, titles, classes: drawn.extend(titles)
    )
    answer = predict.Prediction('\U00012000' * 30 + '.png', [], None)
    predict.draw('x.png', [answer], 1)
    assert len(drawn[0]) == predict.TITLE_LENGTH and drawn[0].endswith('\\U00012000.png')


NAMES = {
    b'latin-\xe4.png': r"'latin-\udce4.png'",
    'two\nlines.png': r"'two\nlines.png'",
    '猫 dog.png': '猫 dog.png',
    '$x$ \\alpha.png': '$x$ \\alpha.png',
}


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name', NAMES)
def test_a_file_may_have_any_name(trained, tmp_path, name):
    path = os.path.join(os.fsencode(tmp_path), os.fsencode(name))
    with open(path, 'wb') as file:
        file.write(image_kinds.encoded(image_kinds.pixels_of(1), 'PNG'))
    status, out, err = run_predict(trained, os.fsdecode(path))
    assert (status, err, len(out)) == (0, [], 2)
    assert NAMES[name].strip("'") in out[0]


def test_many_answers_are_drawn_in_part(trained, tmp_path):
    for number in range(predict.MAX_DRAWN + 5):
        (tmp_path / f'{number:03}.png').write_bytes(
            image_kinds.encoded(image_kinds.pixels_of(number), 'PNG')
        )
    status, out, _ = run_predict(trained, tmp_path)
    assert status == 0 and len(out) == predict.MAX_DRAWN + 6
    assert out[-1].startswith(f'drew the first {predict.MAX_DRAWN} of {predict.MAX_DRAWN + 5} in ')
