"""Telling a media file that was cut off from a whole one by its headers, where FFmpeg's demuxers keep silent."""

import os
from typing import BinaryIO

_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"  # Matroska's outer elements
_ISO_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")  # what an mp4 or mov file may begin with
_LATER_ISO_BOXES = (b"styp", b"moof", b"mfra", b"sidx", b"ssix", b"emsg", b"prft", b"meta", b"udta", b"uuid", b"pdin")
_MAX_ISO_BOXES = 100_000


def is_cut_off(file: BinaryIO) -> bool:
    """Whether the file is shorter than its headers say: gif, avi, webp, Matroska, mp4. Leaves it at its start."""
    num_bytes = file.seek(0, os.SEEK_END)
    head = _bytes_at(file, 0, 4096)
    if head.startswith(b"GIF8"):
        return not _bytes_at(file, max(0, num_bytes - 64), 64).rstrip(b"\0\r\n").endswith(b"\x3b")
    if head.startswith(b"RIFF"):  # avi and webp; some writers leave out the last padding byte
        return int.from_bytes(head[4:8], "little") + 7 > num_bytes
    if head.startswith(_EBML):
        return _matroska_bytes(head) > num_bytes
    if head[4:8] in _ISO_BOXES:
        return _iso_bytes(file, num_bytes) > num_bytes
    return False


def _bytes_at(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    data = file.read(count)
    file.seek(0)
    return data


def _matroska_bytes(head: bytes) -> int:
    """Where the segment ends, as far as its header says."""
    header_bytes, at = _ebml_size(head, len(_EBML))
    at += header_bytes
    if head[at : at + 4] != _SEGMENT:
        return 0
    segment_bytes, at = _ebml_size(head, at + 4)
    return at + segment_bytes


def _ebml_size(head: bytes, at: int) -> tuple[int, int]:
    """An element's size, 0 where it is left open, and where its content begins (RFC 8794, section 4)."""
    width = 9 - int.from_bytes(head[at : at + 1], "big").bit_length()
    is_open = (1 << 7 * width) - 1
    size = int.from_bytes(head[at : at + width], "big") & is_open
    return 0 if size == is_open else size, at + width


def _iso_bytes(file: BinaryIO, num_bytes: int) -> int:
    """Where the outermost boxes of an mp4 or mov file end (ISO 14496-12, 4.2).

    Cameras append what is no box: a whole film ends where, after its header and its data, no known box begins.
    """
    at = 0
    missing = {b"moov", b"mdat"}
    for _ in range(_MAX_ISO_BOXES):
        header = _bytes_at(file, at, 16)
        kind = header[4:8]
        is_known = any(known.startswith(kind) for known in (*_ISO_BOXES, *_LATER_ISO_BOXES))  # a cut one as well
        if not missing and not is_known:
            break
        missing.discard(kind)
        size = int.from_bytes(header[:4], "big")
        if size == 1:
            size = int.from_bytes(header[8:16], "big")
        if size < 8 or at >= num_bytes:  # 0: up to the end
            break
        at += size
    return at
