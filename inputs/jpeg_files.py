"""Tells damage in a JPEG file from harmless stray bytes that its writer left.

Webcams write a zero before a marker, drones whole tables after the last block; decoders skip both,
and the image is intact. Damage often leaves extra bytes too, because the decoder loses its place.
libjpeg reports only the first fault, so each harmless one is removed and the rest decoded again.
"""

import collections
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf

STRAY_BYTES = re.compile(
    r'Corrupt JPEG data: ([0-9]+) extraneous bytes before marker 0x([0-9a-f]{2})'
)
DAMAGE = 'Corrupt JPEG data: '  # prefix of all warnings of damage
MARKER = re.compile(rb'\xff+[^\x00\xff]')
START_OF_IMAGE = b'\xff\xd8'
RESTARTS = range(0xD0, 0xD8)
START, END, SCAN_HEADER, JFIF, ADOBE = 0xD8, 0xD9, 0xDA, 0xE0, 0xEE
NO_LENGTH = (*RESTARTS, START, END, 0x01)
SCAN, STRAY = -1, -2  # kinds of parts that are not segments
MAX_REPAIRS = 64  # of a file: libjpeg reports one fault at a time
# Zeros after a byte 0xff, which libjpeg counts in some places and not in others.
MAX_STUFFED = 8
BIT_BUFFER = 8  # bytes that libjpeg reads ahead
MAX_UNREAD_BYTES = (
    8  # bytes of the image itself that it may count as stray, as it did not need them
)
MAX_INTERVALS = 16  # scans, or intervals between restart markers, that are tried one by one
MAX_DECODES = 256  # per file, not counting the first
MAX_BEFORE_MARKER = 1024  # bytes between the start of a file and its first marker
SHORTEST_FILL = 8  # equal non-zero bytes that are taken for filling, not coincidence


class CleanJpeg(NamedTuple):
    """The file to read in place of one about which libjpeg may warn.

    Attributes:
        content: a file with the same pixels about which libjpeg does not warn.
        damage: what is broken (there is no such file then), or ''.
        remark: the harmless warning, or ''.
        doubt: a warning that may mean damage or be a habit of the camera, or ''.
    """

    content: bytes
    damage: str = ''
    remark: str = ''
    doubt: str = ''


class _Repair(NamedTuple):
    content: bytes
    is_harmless: bool


def without_faults(content: bytes, decode: Callable[[bytes], tuple[np.ndarray, str]]) -> CleanJpeg:
    """Returns a file with the same pixels about which libjpeg does not warn.

    Args:
        content: a JPEG file.
        decode: returns the pixels of a file, uint8 [height, width, 3], and the warning or ''.
    """
    pixels, warning = decode(content)
    remark = doubt = ''
    tries = iter(range(MAX_DECODES))  # for all faults together
    for _ in range(MAX_REPAIRS):
        if not warning:
            return CleanJpeg(content, remark=remark, doubt=doubt)
        repair, next_warning = _repair(content, warning, pixels, decode, tries)
        if repair is None:
            break
        if repair.is_harmless:
            remark = remark or warning
        else:
            doubt = doubt or warning
        content, warning = repair.content, next_warning
    if warning.startswith(DAMAGE) and not STRAY_BYTES.match(warning):
        return CleanJpeg(content, damage=warning.removeprefix(DAMAGE))
    # A fault that cannot be removed may hide damage. As a PNG the image causes no warning.
    return CleanJpeg(tf.io.encode_png(pixels).numpy(), remark=remark, doubt=doubt or warning)


def has_end(content: bytes) -> bool:
    """Returns whether a JPEG file has the marker that ends its image."""
    return any(kind == END for kind, *_ in _parts(content))


def with_marker_first(content: bytes) -> bytes:
    """Returns a JPEG file without what lies between its start and the first marker.

    Decoders would not recognize a file with such bytes.
    """
    if not content.startswith(START_OF_IMAGE) or content[2:3] == b'\xff':
        return content
    marker = MARKER.search(content, 2, 2 + MAX_BEFORE_MARKER)
    return content[:2] + content[marker.start() :] if marker else content


def _repair(
    content: bytes,
    warning: str,
    pixels: np.ndarray,
    decode: Callable[[bytes], tuple[np.ndarray, str]],
    tries: Iterator[int],
) -> tuple[_Repair | None, str]:
    """Takes out the first fault; `tries` limits how many files are decoded.

    Returns: (`_Repair`, the warning that is left); (None, warning) if that is impossible.
    """
    last_resort: tuple[_Repair | None, str] = (None, warning)
    for repair, _ in zip(_repairs(content, warning), tries, strict=False):
        found, said = decode(repair.content)
        if said == warning or not np.array_equal(found, pixels):
            continue
        is_damaged = said.startswith(DAMAGE) and not STRAY_BYTES.match(said)
        if not is_damaged:
            return repair, said
        # Bytes of the image itself may have been cut. If no other repair works, the file was
        # damaged already.
        if last_resort[0] is None:
            last_resort = repair, said
    return last_resort


def _repairs(content: bytes, warning: str) -> Iterator[_Repair]:
    """Yields possible repairs of the fault, the likeliest first."""
    parts = list(_parts(content))
    stray = STRAY_BYTES.match(warning)
    if stray:
        if any(kind == STRAY for kind, *_ in parts):
            # libjpeg checks the lengths of all tables, so these bytes belong to none.
            yield _Repair(_joined(content, parts, {}), True)
        yield from _without_tails(content, parts, int(stray[1]), int(stray[2], 16))
    elif warning.startswith('Invalid SOS parameters'):
        yield _Repair(
            _edited(content, parts, SCAN_HEADER, lambda segment: segment[:-3] + b'\x00\x3f\x00'),
            True,
        )
    elif 'unknown JFIF revision' in warning:
        yield _Repair(
            _edited(content, parts, JFIF, lambda segment: segment[:9] + b'\x01\x01' + segment[11:]),
            True,
        )
    elif warning.startswith('Unknown Adobe color transform code'):
        for code in (b'\x01', b'\x02'):  # what libjpeg assumes, for three and for four channels

            def with_code(segment: bytes, code: bytes = code) -> bytes:
                return segment[:15] + code + segment[16:]

            yield _Repair(_edited(content, parts, ADOBE, with_code), True)


def _parts(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields (kind, begin, end) of each part up to the end of the image.

    The kind is a marker's number, SCAN, or STRAY.
    """
    place, in_scan = 0, False
    while marker := MARKER.search(content, place):
        if marker.start() > place:
            yield STRAY, place, marker.start()
        kind, end = content[marker.end() - 1], marker.end()
        if kind not in NO_LENGTH:
            end += int.from_bytes(content[end : end + 2], 'big')
        yield kind, marker.start(), end
        if kind == END:
            return
        place = end
        in_scan = kind == SCAN_HEADER or (in_scan and kind in RESTARTS)
        if in_scan:
            following = MARKER.search(content, place)
            end = following.start() if following else len(content)
            yield SCAN, place, end
            place = end


def _joined(content: bytes, parts: list, cuts: dict[int, int]) -> bytes:
    """Returns the file without stray parts and the last `cuts[index]` bytes of each part."""
    kept = [
        content[begin : end - cuts.get(index, 0)]
        for index, (kind, begin, end) in enumerate(parts)
        if kind != STRAY
    ]
    return b''.join(kept)


def _edited(content: bytes, parts: list, edited_kind: int, edit: Callable[[bytes], bytes]) -> bytes:
    """Returns the file with every segment of a kind edited."""
    segments = (
        content[begin:end] if kind != edited_kind else edit(content[begin:end])
        for kind, begin, end in parts
    )
    return b''.join(segments)


def _without_tails(content: bytes, parts: list, count: int, marker: int) -> Iterator[_Repair]:
    """Yields repairs that cut the last bytes of scans, or of their restart intervals."""
    scans = {
        index: content[begin:end] for index, (kind, begin, end) in enumerate(parts) if kind == SCAN
    }
    zeros = {index: _num_trailing_zeros(scan) for index, scan in scans.items()}
    fewer = range(count - 1, max(0, count - MAX_UNREAD_BYTES - 1), -1)
    kinds = RESTARTS if marker in RESTARTS else (marker,)
    named = [index for index in scans if index + 1 < len(parts) and parts[index + 1][0] in kinds]
    if any(zeros.values()):
        # An image's own last bytes may be zeros too, so no more are cut than libjpeg counted, and
        # only where there are that many. It does not count those already in its bit buffer. Only
        # scans before the kind of marker that it names are searched.
        for most in (*range(count, count + BIT_BUFFER), *fewer):
            cuts = {index: most for index in named if zeros[index] >= most}
            if cuts:
                yield _Repair(_joined(content, parts, cuts), True)
        yield _Repair(_joined(content, parts, zeros), True)
        candidates = [index for index in named if zeros[index] >= count][:MAX_INTERVALS]
        for index in candidates:
            yield _Repair(_joined(content, parts, {index: count}), True)
    runs = {index: _num_trailing_equal(scan) for index, scan in scans.items()}
    fills = {index: number for index, number in runs.items() if number >= SHORTEST_FILL}
    if fills:
        for kept in (0, 1):  # the image's last byte may equal the fill byte
            yield _Repair(
                _joined(content, parts, {index: number - kept for index, number in fills.items()}),
                True,
            )
    before_marker = [
        index for index in scans if index + 1 < len(parts) and parts[index + 1][0] == marker
    ]
    for length in range(count, count + MAX_STUFFED + 1):
        tails = {index: scans[index][-length:] for index in before_marker}
        for common, number in collections.Counter(tails.values()).most_common(1):
            cuts = {index: length for index in tails if tails[index] == common}
            if number > 1:
                yield _Repair(_joined(content, parts, cuts), False)
        for index in before_marker[:MAX_INTERVALS]:
            yield _Repair(_joined(content, parts, {index: length}), False)


def _num_trailing_zeros(scan: bytes) -> int:
    number = len(scan) - len(scan.rstrip(b'\x00'))
    is_stuffed = scan[: len(scan) - number].endswith(b'\xff')
    return number - 1 if number and is_stuffed else number


def _num_trailing_equal(scan: bytes) -> int:
    return len(scan) - len(scan.rstrip(scan[-1:]))
