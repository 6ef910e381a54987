"""What t2v_core.media writes is what players expect, and what it reads is what the sender meant."""

import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import wave
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor

from t2v_core import video_input
from t2v_core.errors import InvalidRequest, OutputError, UnreadableVideo
from t2v_core.media import VideoFormat, encode_video, save_video, video_format_of
from t2v_core.pictures import encode_spritesheet, encode_thumbnail
from t2v_core.video_input import VideoLimits, read_metadata, read_video

FORMATS: list[VideoFormat] = ["mp4", "webm", "gif"]
IN_PARTS = {"movflags": "frag_keyframe+empty_moov"}  # as streams are recorded
METADATA = {
    "prompt": 'Ein "Bär" – 熊 🐻\nsecond line\t\\ end',
    "Negative Prompt": "",
    "long": "字🎬x" * 1700,
    "odd": "nul \0 and half a surrogate \ud83d",
    "seed": "0",
}
# fmt: off
SATURATED = torch.tensor(
    [
        [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0],
        [0, 255, 255], [255, 0, 255], [255, 255, 255], [0, 0, 0],
        [255, 128, 0], [128, 0, 255], [0, 128, 64], [128, 128, 128],
        [64, 0, 0], [0, 64, 0], [0, 0, 64], [200, 180, 160],
    ],
    dtype=torch.uint8,
)
# fmt: on


def smooth_motion(num_frames: int = 16, height: int = 128, width: int = 192) -> Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    time = torch.arange(num_frames).view(-1, 1, 1) / 24
    waves = [torch.sin(5 * x + 4 * time), torch.sin(4 * y - 3 * time + 1), torch.cos(3 * (x + y) + 2 * time)]
    return ((torch.stack(waves, dim=-1) * 0.5 + 0.5) * 255).round().to(torch.uint8)


def patches(colours: Tensor = SATURATED, num_frames: int = 4, side: int = 64) -> Tensor:
    image = colours.view(4, 4, 3).repeat_interleave(side, 0).repeat_interleave(side, 1)
    return image.repeat(num_frames, 1, 1, 1)


def patch_means(frames: Tensor, side: int = 64) -> Tensor:
    """The mean colour of each patch, its edges left out: (16, 3)."""
    edge = side // 4
    tiles = frames.double().unflatten(1, (4, side)).unflatten(3, (4, side))
    return tiles[:, :, edge:-edge, :, edge:-edge].mean((0, 2, 4)).view(16, 3)


def counting(num_frames: int = 24, height: int = 64, width: int = 64) -> Tensor:
    """Frame i is grey of level 10 i, so that a frame tells its index."""
    levels = torch.arange(num_frames, dtype=torch.uint8).view(-1, 1, 1, 1) * 10
    return levels.expand(num_frames, height, width, 3).contiguous()


def indices(frames: Tensor) -> list[int]:
    return (frames.double().mean((1, 2, 3)) / 10).round().int().tolist()


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.double() - b.double()).square().mean()))


def decode(data: bytes) -> Tensor:
    """All frames, as PyAV alone shows them."""
    with av.open(BytesIO(data)) as container:
        images = [frame.to_ndarray(format="rgb24").copy() for frame in container.decode(video=0)]
    return torch.stack([torch.from_numpy(image) for image in images])


def mux(
    frames: Tensor,
    container_format: str,
    codec: str,
    pix_fmt: str,
    *,
    fps: int = 24,
    stamps_ms: list[int] | None = None,
    colorspace: Colorspace = Colorspace.ITU709,
    color_range: ColorRange = ColorRange.MPEG,
    pixel_aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    muxer_options: dict[str, str] | None = None,
) -> bytes:
    """A foreign video, made without the module under test."""
    buffer = BytesIO()
    with av.open(buffer, "w", format=container_format, container_options=muxer_options) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if "rgb" not in pix_fmt:
            stream.codec_context.colorspace, stream.codec_context.color_range = colorspace, color_range
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if stamps_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")
            if pix_fmt != "rgb24":
                tags = {"dst_colorspace": colorspace, "dst_color_range": color_range}
                picture = picture.reformat(format=pix_fmt, **tags)
            picture.time_base = Fraction(1, fps) if stamps_ms is None else Fraction(1, 1000)
            picture.pts = index if stamps_ms is None else stamps_ms[index]
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def png(pixels: Tensor, colour_type: int) -> bytes:
    """pixels: (h, w, c) uint8."""
    rows = b"".join(b"\0" + row.contiguous().numpy().tobytes() for row in pixels)
    return png_file(pixels.shape[1], pixels.shape[0], colour_type, zlib.compress(rows))


def png_file(width: int, height: int, colour_type: int, packed: bytes) -> bytes:
    """A PNG of 8 bits, written by hand."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


# --- writing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("video_format", FORMATS)
@pytest.mark.parametrize("fps", [8, 24])
def test_a_file_opens_with_its_frames_size_and_rate(video_format: VideoFormat, fps: int) -> None:
    data = encode_video(smooth_motion(16, 64, 96), fps=fps, format=video_format)
    with av.open(BytesIO(data)) as container:
        assert len(container.streams) == 1  # no sound
        stream = container.streams.video[0]
        assert float(stream.average_rate) == pytest.approx(fps, rel=0.05 if video_format == "gif" else 1e-6)
        frames = list(container.decode(stream))
    assert [(frame.width, frame.height) for frame in frames] == [(96, 64)] * 16
    # gif counts in 1/100 s, webm in 1/1000 s
    tick_s = {"mp4": 1e-6, "webm": 1e-3, "gif": 1e-2}[video_format]
    times = [i / fps for i in range(16)]
    assert [frame.time for frame in frames] == pytest.approx(times, abs=tick_s / 2 + 1e-9)


@pytest.mark.parametrize("video_format", ["mp4", "webm"])
def test_smooth_motion_survives_the_default_quality(video_format: VideoFormat) -> None:
    frames = smooth_motion()
    assert psnr(decode(encode_video(frames, fps=24, format=video_format)), frames) >= 38


@pytest.mark.parametrize("video_format", FORMATS)
def test_saturated_colours_come_back_as_they_were(video_format: VideoFormat) -> None:
    frames = patches()
    decoded = decode(encode_video(frames, fps=24, format=video_format))
    assert psnr(decoded, frames) >= 35
    assert (patch_means(decoded) - SATURATED).abs().max() <= 3


def test_mp4_is_what_browsers_play() -> None:
    data = encode_video(smooth_motion(), fps=24)
    with av.open(BytesIO(data)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert context.profile in ("Constrained Baseline", "Main", "High")
        tags = (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
        assert tags == (1, 1, 1, 1)  # BT.709 three times, limited range
    assert data.index(b"moov") < data.index(b"mdat")
    assert b"colrnclx" + struct.pack(">HHHB", 1, 1, 1, 0) in data


@pytest.mark.parametrize("crf", [1, 51])
def test_mp4_stays_within_the_high_profile_at_every_crf(crf: int) -> None:
    with av.open(BytesIO(encode_video(smooth_motion(4), fps=24, crf=crf))) as container:
        assert container.streams.video[0].codec_context.profile == "High"


def test_webm_is_vp9_with_its_colours_tagged() -> None:
    with av.open(BytesIO(encode_video(smooth_motion(4), fps=24, format="webm"))) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, context.profile) == ("vp9", "yuv420p", "Profile 0")
        assert (context.colorspace, context.color_range) == (1, 1)


def test_gif_loops_for_ever_and_its_still_parts_do_not_flicker() -> None:
    frames = smooth_motion(8)
    frames[:, :, :96] = frames[0, :, :96]
    data = encode_video(frames, fps=10, format="gif")
    assert b"NETSCAPE2.0\x03\x01\x00\x00\x00" in data
    decoded = decode(data)
    assert torch.equal(decoded[1:, :, :96], decoded[:1, :, :96].expand(7, -1, -1, -1))
    assert psnr(decoded, frames) >= 25


def test_a_lower_crf_gives_a_larger_and_better_file() -> None:
    frames = smooth_motion()
    fine, coarse = (encode_video(frames, fps=24, crf=crf) for crf in (5, 40))
    assert len(fine) > 2 * len(coarse)
    assert psnr(decode(fine), frames) > psnr(decode(coarse), frames) + 2


HASHES = """
import hashlib, os, sys
os.sched_setaffinity(0, {int(core) for core in sys.argv[1].split(",")})
import torch
torch.set_num_threads(int(sys.argv[2]))
from t2v_core.media import encode_video
from t2v_core.pictures import encode_spritesheet, encode_thumbnail
torch.manual_seed(0)
frames = torch.randint(256, (12, 18, 32, 3), dtype=torch.uint8)
frames = frames.repeat_interleave(32, 1).repeat_interleave(32, 2)
small = frames[:, ::4, ::4]
files = [encode_video(frames, fps=24, metadata={"seed": "1"}), encode_video(small, fps=24, format="webm")]
files += [encode_video(small, fps=8, format="gif"), encode_thumbnail(frames), encode_spritesheet(frames)]
files += [encode_thumbnail(small, format="jpeg"), encode_thumbnail(small, format="png")]
print(*[hashlib.sha256(data).hexdigest() for data in files])
"""


def test_the_bytes_depend_on_nothing_but_the_arguments() -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores to compare one with several")
    several = ",".join(str(core) for core in cores)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HASHES, affinity, threads],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for affinity, threads in [(str(cores[0]), "1"), (several, str(len(cores)))]
    ]
    one, many = (process.communicate(timeout=120)[0].split() for process in processes)
    assert len(one) == 7
    assert one == many


def test_settings_that_cannot_be_are_refused_with_their_name() -> None:
    frames = smooth_motion(2, 16, 16)
    for video_format, crf in [("mp4", 0), ("mp4", 52), ("mp4", -1), ("webm", 64), ("gif", 10)]:
        with pytest.raises(InvalidRequest, match=f"crf {crf}") as refusal:
            encode_video(frames, fps=8, format=video_format, crf=crf)  # type: ignore[arg-type]
        assert refusal.value.param == "crf"
    for video_format, fps in [("gif", 60), ("mp4", 0)]:
        with pytest.raises(InvalidRequest, match=f"fps {fps}") as refusal:
            encode_video(frames, fps=fps, format=video_format)  # type: ignore[arg-type]
        assert refusal.value.param == "fps"


def test_frames_of_the_wrong_kind_are_refused() -> None:
    for frames in [torch.zeros(2, 16, 16, 3), torch.zeros(2, 3, 16, 16, dtype=torch.uint8)]:
        with pytest.raises(ValueError, match="uint8"):
            encode_video(frames, fps=8)
    for shape in [(0, 16, 16, 3), (2, 15, 16, 3)]:
        with pytest.raises(ValueError, match="frames"):
            encode_video(torch.zeros(shape, dtype=torch.uint8), fps=8)


def test_frames_need_not_be_contiguous() -> None:
    frames = smooth_motion(4)
    planar = frames.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert encode_video(planar, fps=24) == encode_video(frames, fps=24)


# --- metadata --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("video_format", FORMATS)
def test_metadata_comes_back_exactly(video_format: VideoFormat, tmp_path: Path) -> None:
    frames = smooth_motion(4, 64, 64)
    data = encode_video(frames, fps=8, format=video_format, metadata=METADATA)
    path = tmp_path / f"clip.{video_format}"
    path.write_bytes(data)
    assert read_metadata(data) == METADATA
    assert read_metadata(path) == read_metadata(str(path)) == METADATA
    assert torch.equal(decode(data), decode(encode_video(frames, fps=8, format=video_format)))


@pytest.mark.parametrize("video_format", FORMATS)
def test_a_video_without_our_metadata_has_none(video_format: VideoFormat) -> None:
    assert read_metadata(encode_video(smooth_motion(2, 16, 16), fps=8, format=video_format)) == {}


def test_a_foreign_comment_is_not_taken_for_metadata() -> None:
    for comment in ["shot on a phone", "[1, 2]", '{"a": 1}', "[" * 50_000]:
        buffer = BytesIO()
        with av.open(buffer, "w", format="mp4") as container:
            container.metadata["comment"] = comment
            stream = container.add_stream("libx264", rate=8)
            stream.width = stream.height = 64
            container.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
            container.mux(stream.encode(None))
        assert read_metadata(buffer.getvalue()) == {}


def test_a_comment_that_is_not_text_spoils_nothing() -> None:
    data = encode_video(counting(2), fps=8, format="gif", metadata={"a": "text"})
    data = data.replace(b"text", b"\xff\xfe\xfd\xfc")
    assert read_metadata(data) == {"a": "\ufffd" * 4}
    assert len(read(data)) == 6


def test_metadata_of_something_else_is_an_error() -> None:
    with pytest.raises(UnreadableVideo):
        read_metadata(b"no video at all")


def gif_blocks(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The blocks of a gif as GIF89a lays them out; an assertion fails where the file does not follow it."""

    def sub_blocks(at: int) -> tuple[bytes, int]:
        parts = []
        while data[at]:
            assert at + 1 + data[at] < len(data)
            parts.append(data[at + 1 : at + 1 + data[at]])
            at += 1 + data[at]
        return b"".join(parts), at + 1

    assert data[:6] == b"GIF89a"
    at = 13 + (3 << ((data[10] & 7) + 1) if data[10] & 0x80 else 0)
    while data[at] != 0x3B:
        if data[at] == 0x21:
            label = data[at + 1]
            body, at = sub_blocks(at + 2)
            yield f"extension {label:02x}", body
        else:
            assert data[at] == 0x2C
            flags = data[at + 9]
            body, at = sub_blocks(at + 11 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0))
            yield "image", body
    assert at == len(data) - 1


def test_gif_with_a_comment_follows_the_standard_block_by_block() -> None:
    blocks = list(gif_blocks(encode_video(smooth_motion(4, 64, 64), fps=8, format="gif", metadata=METADATA)))
    assert [kind for kind, _ in blocks].count("image") == 4
    comments = [body for kind, body in blocks if kind == "extension fe"]
    assert len(comments) == 1
    assert json.loads(comments[0]) == METADATA


# --- saving ----------------------------------------------------------------------------------------------


def test_save_takes_the_format_from_the_suffix(tmp_path: Path) -> None:
    frames = smooth_motion(2, 16, 16)
    for name in ["a.mp4", "b.WEBM", "c.gif"]:
        path = save_video(frames, tmp_path / name, fps=8)
        assert path.read_bytes() == encode_video(frames, fps=8, format=video_format_of(name))
    save_video(frames, str(tmp_path / "named.bin"), fps=8, format="gif")
    assert (tmp_path / "named.bin").read_bytes().startswith(b"GIF89a")
    assert len(list(tmp_path.iterdir())) == 4
    assert (tmp_path / "a.mp4").stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


@pytest.mark.parametrize("name", ["clip.avi", "clip", "mp4", ".mp4", "clip.mp4.txt"])
def test_an_unknown_suffix_is_refused_with_the_known_ones(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"clip|mp4") as refusal:
        save_video(smooth_motion(2, 16, 16), tmp_path / name, fps=8)
    assert refusal.value.param == "format"
    for known in [".mp4", ".webm", ".gif"]:
        assert known in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_an_error_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "absent" / "clip.mp4"
    with pytest.raises(OutputError, match=r"absent.*create the folder"):
        save_video(smooth_motion(2, 16, 16), path, fps=8)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_an_error_and_stays(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").mkdir()
    with pytest.raises(OutputError, match=r"clip\.mp4"):
        save_video(smooth_motion(2, 16, 16), tmp_path / "clip.mp4", fps=8)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_an_error_and_leaves_what_was_there(small_disk: Path) -> None:
    path = small_disk / "clip.gif"
    path.write_bytes(b"an older video")
    with pytest.raises(OutputError, match=r"clip.gif.*free some space"):
        save_video(smooth_motion(), path, fps=8)
    assert path.read_bytes() == b"an older video"
    assert list(small_disk.iterdir()) == [path]


def test_a_read_only_disk_is_an_error(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OutputError, match=r"clip.mp4.*may write"):
        save_video(smooth_motion(2, 16, 16), small_disk / "clip.mp4", fps=8)


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        assert len(list(tmp_path.iterdir())) == 1  # the temporary file is there, whole
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_video(smooth_motion(2, 16, 16), tmp_path / "clip.mp4", fps=8)
    assert list(tmp_path.iterdir()) == []


# --- pictures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["webp", "jpeg", "png"])
def test_a_thumbnail_is_the_middle_frame_no_larger_than_asked(image_format: str) -> None:
    frames = counting(5, 72, 128)
    data = encode_thumbnail(frames, format=image_format, max_side=64)  # type: ignore[arg-type]
    assert decode(data).shape == (1, 36, 64, 3)
    assert indices(decode(data)) == [2]
    assert data.startswith({"webp": b"RIFF", "jpeg": b"\xff\xd8\xff", "png": b"\x89PNG"}[image_format])
    whole = decode(encode_thumbnail(frames, format=image_format))  # type: ignore[arg-type]
    assert whole.shape == (1, 72, 128, 3)


@pytest.mark.parametrize(("image_format", "most_off"), [("webp", 5), ("jpeg", 5), ("png", 0)])
def test_a_thumbnail_keeps_saturated_colours(image_format: str, most_off: int) -> None:
    data = encode_thumbnail(patches(), format=image_format)  # type: ignore[arg-type]
    assert (patch_means(read_video(data, width=256, height=256, fps=1)) - SATURATED).abs().max() <= most_off


def test_a_png_holds_every_pixel_as_it_is() -> None:
    frames = smooth_motion(1, 64, 96)
    assert torch.equal(decode(encode_thumbnail(frames, format="png")), frames)


@pytest.mark.parametrize("image_format", ["webp", "jpeg", "png"])
def test_a_spritesheet_holds_the_frames_row_by_row(image_format: str) -> None:
    data = encode_spritesheet(counting(6, 32, 48), format=image_format, columns=4)  # type: ignore[arg-type]
    sheet = decode(data)[0]
    assert sheet.shape == (64, 192, 3)
    tiles = sheet.unflatten(0, (2, 32)).unflatten(2, (4, 48)).transpose(1, 2).flatten(0, 1)
    assert indices(tiles) == [0, 1, 2, 3, 4, 5, 0, 0]


def test_a_spritesheet_of_many_frames_takes_some_from_the_first_to_the_last() -> None:
    sheet = decode(encode_spritesheet(counting(25, 32, 32), max_frames=4, max_side=16))[0]
    assert sheet.shape == (32, 32, 3)
    assert indices(sheet.unflatten(0, (2, 16)).unflatten(2, (2, 16)).transpose(1, 2).flatten(0, 1)) == [
        0,
        8,
        16,
        24,
    ]


def test_a_spritesheet_of_nothing_is_refused() -> None:
    for name in ("columns", "max_frames", "max_side"):
        with pytest.raises(InvalidRequest, match=f"{name} 0") as refusal:
            encode_spritesheet(counting(2), **{name: 0})  # type: ignore[arg-type]
        assert refusal.value.param == name


@pytest.mark.parametrize(("image_format", "limit"), [("webp", 16383), ("jpeg", 65535), ("png", 65535)])
@pytest.mark.parametrize("columns", [1, 64])
def test_a_spritesheet_is_as_small_as_the_format_needs(image_format: str, limit: int, columns: int) -> None:
    frames = torch.zeros(64, *((1026, 16) if columns == 1 else (16, 1026)), 3, dtype=torch.uint8)
    data = encode_spritesheet(frames, format=image_format, columns=columns, max_side=2000)  # type: ignore[arg-type]
    with av.open(BytesIO(data)) as container:
        context = container.streams.video[0].codec_context
        assert limit - 64 <= max(context.width, context.height) <= limit


# --- reading: time ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("container_format", "codec"),
    [("mp4", "libx264"), ("webm", "libvpx-vp9"), ("gif", "gif"), ("avi", "mpeg4"), ("mpegts", "libx264")],
)
@pytest.mark.parametrize(
    ("fps_in", "fps_out", "expected"),
    [
        (24, 24, list(range(24))),
        (24, 8, list(range(0, 24, 3))),
        (8, 24, [i for i in range(24) for _ in range(3)]),
        (25, 10, [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]),
    ],
)
def test_the_rate_becomes_the_one_asked_for(
    container_format: str, codec: str, fps_in: int, fps_out: int, expected: list[int]
) -> None:
    pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
    options = {"deadline": "realtime", "cpu-used": "8"} if codec == "libvpx-vp9" else {}
    data = mux(counting(), container_format, codec, pix_fmt, fps=fps_in, options=options)
    shown = decode(data)[expected]  # gif rounds the grey levels
    frames = read_video(data, width=64, height=64, fps=fps_out)
    assert len(frames) == len(expected)
    assert (frames.double().mean((1, 2, 3)) - shown.double().mean((1, 2, 3))).abs().max() <= 3


@pytest.mark.parametrize("container_format", ["matroska", "mp4"])
def test_uneven_times_show_what_was_on_screen_then(container_format: str) -> None:
    stamps_ms = [5000, 5100, 5150, 6000, 6010, 6400]
    data = mux(counting(6), container_format, "libx264", "yuv420p", stamps_ms=stamps_ms)
    frames = read_video(data, width=64, height=64, fps=10, num_frames=15)
    # at 0.0 0.1 0.2 ... s after the first frame, which is itself 5 s into the file
    assert indices(frames) == [0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 4, 4, 4, 5]


def test_num_frames_is_exact_or_an_error_with_what_there_is() -> None:
    data = encode_video(counting(24), fps=24)
    assert indices(read_video(data, width=64, height=64, fps=24, num_frames=5)) == [0, 1, 2, 3, 4]
    assert len(read_video(data, width=64, height=64, fps=24, num_frames=24)) == 24
    with pytest.raises(UnreadableVideo, match=r"8 frames at 8 fps and 9 are needed: .*longer"):
        read_video(data, width=64, height=64, fps=8, num_frames=9)


def test_fractional_rates_do_not_drift() -> None:
    data = encode_video(counting(24), fps=24)
    assert indices(read_video(data, width=64, height=64, fps=23.976)) == list(range(24))


# --- reading: pixels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("video_format", ["mp4", "webm"])
def test_our_own_videos_come_back(video_format: VideoFormat) -> None:
    frames = smooth_motion()
    data = encode_video(frames, fps=24, format=video_format)
    again = read_video(data, width=192, height=128, fps=24)
    assert again.shape == frames.shape
    assert again.dtype == torch.uint8
    assert psnr(again, frames) >= 40
    assert (again.double() - frames.double()).mean((0, 1, 2)).abs().max() <= 0.5


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "colorspace", "color_range"),
    [
        ("libx264", "yuv420p", Colorspace.ITU709, ColorRange.MPEG),
        ("libx264", "yuv420p", Colorspace.ITU601, ColorRange.MPEG),
        ("libx264", "yuv444p", Colorspace.ITU709, ColorRange.JPEG),
        ("libx264", "yuv420p10le", Colorspace.ITU709, ColorRange.MPEG),
        ("ffv1", "yuv422p10le", Colorspace.BT2020, ColorRange.MPEG),
        ("mjpeg", "yuvj420p", Colorspace.ITU601, ColorRange.JPEG),
        ("png", "rgb24", Colorspace.ITU709, ColorRange.JPEG),
        ("libx264rgb", "rgb24", Colorspace.ITU709, ColorRange.JPEG),
    ],
)
def test_every_way_to_store_colours_shows_the_same_colours(
    codec: str, pix_fmt: str, colorspace: Colorspace, color_range: ColorRange
) -> None:
    container_format = "mov" if codec == "png" else "matroska"
    frames = patches(num_frames=2)
    data = mux(frames, container_format, codec, pix_fmt, colorspace=colorspace, color_range=color_range)
    assert (patch_means(read_video(data, width=256, height=256, fps=24)) - SATURATED).abs().max() <= 4


@pytest.mark.parametrize("height", [480, 720])
def test_a_video_without_a_colour_tag_is_taken_as_players_take_it(height: int) -> None:
    green = torch.tensor([0, 255, 0], dtype=torch.uint8).expand(1, height, 64, 3).contiguous()
    matrix = Colorspace.ITU709 if height >= 720 else Colorspace.ITU601
    data = mux(green, "avi", "mpeg4", "yuv420p", colorspace=matrix)
    with av.open(BytesIO(data)) as container:
        assert container.streams.video[0].codec_context.colorspace == 2  # the tag did not get in
    colour = read_video(data, width=64, height=64, fps=24)[0].double().mean((0, 1))
    assert (colour - torch.tensor([0, 255, 0])).abs().max() <= 4


def test_a_video_is_cropped_around_its_centre_to_cover_the_size() -> None:
    stripes = torch.zeros(1, 96, 288, 3, dtype=torch.uint8)
    for stripe in range(3):
        stripes[:, :, stripe * 96 : (stripe + 1) * 96, stripe] = 255
    wide = mux(stripes, "mov", "png", "rgb24")
    tall = mux(stripes.transpose(1, 2).contiguous(), "mov", "png", "rgb24")
    green = torch.tensor([0, 255, 0], dtype=torch.uint8).expand(48, 48, 3)
    for data in (wide, tall):
        assert torch.equal(read_video(data, width=48, height=48, fps=24)[0], green)
    whole = read_video(wide, width=576, height=192, fps=24)[0]
    assert whole[96, 8].tolist() == [255, 0, 0]
    assert whole[96, -8].tolist() == [0, 0, 255]


def test_scaling_down_averages_instead_of_skipping_pixels() -> None:
    board = (torch.arange(256).view(-1, 1) + torch.arange(256)).remainder(2).mul(255).to(torch.uint8)
    data = mux(board.view(1, 256, 256, 1).repeat(1, 1, 1, 3), "mov", "png", "rgb24")
    small = read_video(data, width=40, height=40, fps=24)
    assert (small.double() - 127.5).abs().max() <= 12


def test_pixels_that_are_not_square_are_shown_as_they_should_look() -> None:
    # 96 pixels, each twice as wide as high: 192 x 96 on screen, of which the middle half is kept
    stripes = torch.zeros(1, 96, 96, 3, dtype=torch.uint8)
    stripes[:, :, 24:72, 1] = 255
    data = mux(stripes, "mov", "png", "rgb24", pixel_aspect=Fraction(2))
    for turned in (data, shown_through(data, (0, 1, -1, 0)), shown_through(data, (0, 1, 1, 0))):
        assert read_video(turned, width=96, height=96, fps=24)[0].double().mean((0, 1)).tolist() == [0, 255, 0]


@pytest.mark.parametrize(
    ("matrix", "corner"),
    [
        ((1, 0, 0, 1), (0, 0)),
        ((0, 1, -1, 0), (0, -1)),  # a phone held upright: shown turned by 90 degrees clockwise
        ((-1, 0, 0, -1), (-1, -1)),
        ((0, -1, 1, 0), (-1, 0)),
        ((-1, 0, 0, 1), (0, -1)),  # these are mirrored, as some phones store selfies
        ((1, 0, 0, -1), (-1, 0)),
        ((0, 1, 1, 0), (0, 0)),
        ((0, -1, -1, 0), (-1, -1)),
    ],
)
def test_a_phone_video_is_upright(matrix: tuple[int, int, int, int], corner: tuple[int, int]) -> None:
    data = shown_through(encode_video(white_corner(2), fps=24), matrix)
    upright = (64, 128) if matrix[0] else (128, 64)
    assert white_corners(read_video(data, height=upright[0], width=upright[1], fps=24)[0]) == [corner]


@pytest.mark.parametrize(
    ("orientation", "corner"),
    [(1, (0, 0)), (2, (0, -1)), (3, (-1, -1)), (4, (-1, 0)), (5, (0, 0)), (6, (0, -1)), (7, (-1, -1)), (8, (-1, 0))],
)
@pytest.mark.parametrize("image_format", ["jpeg", "png"])
def test_a_photo_is_upright(image_format: str, orientation: int, corner: tuple[int, int]) -> None:
    # Exif 2.32, 4.6: a TIFF header, and a directory of the one tag 0x0112
    exif = b"II*\0" + struct.pack("<IHHHII", 8, 1, 0x0112, 3, 1, orientation) + bytes(4)
    data = encode_thumbnail(white_corner(1), format=image_format)  # type: ignore[arg-type]
    if image_format == "jpeg":
        begin, segment = 2, b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif
    else:
        checksum = zlib.crc32(b"eXIf" + exif)
        begin, segment = 33, struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", checksum)
    photo = data[:begin] + segment + data[begin:]
    upright = (64, 128) if orientation < 5 else (128, 64)
    assert white_corners(read_video(photo, height=upright[0], width=upright[1], fps=24)[0]) == [corner]


def white_corner(num_frames: int) -> Tensor:
    """Black, but for the corner where the stored picture begins."""
    frames = torch.zeros(num_frames, 64, 128, 3, dtype=torch.uint8)
    frames[:, :16, :16] = 255
    return frames


def white_corners(image: Tensor) -> list[tuple[int, int]]:
    return [(y, x) for y in (0, -1) for x in (0, -1) if image[y * 8 or 4, x * 8 or 4, 0] > 200]


def shown_through(data: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """The mp4 or mov file with another display matrix."""
    # ISO 14496-12, 8.3.2: the matrix begins 40 bytes into the track header, rows of (a, b, u), 16.16 and 2.30
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value * 65536 for value in matrix)
    return data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]


def test_a_gif_and_pictures_are_videos_too() -> None:
    frames = counting(6)
    gif = encode_video(frames, fps=10, format="gif")
    assert indices(read_video(gif, width=64, height=64, fps=10)) == [0, 1, 2, 3, 4, 5]
    for picture in [
        png(frames[3], 2),
        encode_thumbnail(frames[3:4], format="jpeg"),
        encode_thumbnail(frames[3:4], format="png"),
        encode_thumbnail(frames[3:4]),
    ]:
        for fps in (1, 24, 60):
            assert indices(read_video(picture, width=64, height=64, fps=fps)) == [3]
    with pytest.raises(UnreadableVideo, match="1 frames"):
        read_video(png(frames[3], 2), width=64, height=64, fps=24, num_frames=2)


def test_grey_is_exact_and_what_is_transparent_is_black() -> None:
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).repeat(64, 1, 1)
    grey = read_video(png(ramp, 0), width=256, height=64, fps=24)
    assert torch.equal(grey[0], ramp.expand(64, 256, 3))
    colour = torch.tensor([200, 100, 50], dtype=torch.uint8).expand(64, 256, 3)
    shown = read_video(png(torch.cat([colour, ramp], dim=-1), 6), width=256, height=64, fps=24)
    assert (shown[0].double() - colour.double() * ramp / 255).abs().max() <= 0.51


def test_a_picture_in_tiles_is_refused_and_not_taken_for_its_first_tile() -> None:
    with pytest.raises(UnreadableVideo, match="picture in tiles, as phones store HEIC: save it as JPEG or PNG"):
        read_video(tiled_heic(), width=128, height=64, fps=24)


def tiled_heic() -> bytes:
    """Two pictures of 64x64 side by side (ISO 23008-12, 6.6.2.3), of JPEG, which FFmpeg reads there as well."""
    tiles = [encode_thumbnail(counting(24)[level : level + 1], format="jpeg") for level in (4, 20)]

    def box(kind: bytes, *parts: bytes) -> bytes:
        return struct.pack(">I", 8 + sum(map(len, parts))) + kind + b"".join(parts)

    def full(kind: bytes, version: int, *parts: bytes) -> bytes:
        return box(kind, struct.pack(">I", version << 24), *parts)

    def entry(item: int, kind: bytes) -> bytes:
        return full(b"infe", 2, struct.pack(">HH4sx", item, 0, kind))

    def meta(begin: int) -> bytes:
        """Item 1 is the grid, kept in idat; 2 and 3 are the tiles, from `begin` on in the file."""
        places = [(1, 1, 0, 8), (2, 0, begin, len(tiles[0])), (3, 0, begin + len(tiles[0]), len(tiles[1]))]
        extents = [struct.pack(">HHHHII", item, method, 0, 1, at, size) for item, method, at, size in places]
        sizes = [full(b"ispe", 0, struct.pack(">II", w, 64)) for w in (64, 128)]
        return full(
            b"meta",
            0,
            full(b"hdlr", 0, b"\0\0\0\0pict", bytes(13)),
            full(b"pitm", 0, struct.pack(">H", 1)),
            full(b"iloc", 1, struct.pack(">HH", 0x4400, 3), *extents),
            full(b"iinf", 0, struct.pack(">H", 3), entry(1, b"grid"), entry(2, b"jpeg"), entry(3, b"jpeg")),
            full(b"iref", 0, box(b"dimg", struct.pack(">HHHH", 1, 2, 2, 3))),
            box(
                b"iprp",
                box(b"ipco", *sizes),
                full(b"ipma", 0, struct.pack(">IHBBHBBHBB", 3, 1, 1, 2, 2, 1, 1, 3, 1, 1)),
            ),
            box(b"idat", struct.pack(">BBBBHH", 0, 0, 0, 1, 128, 64)),
        )

    head = box(b"ftyp", b"heic\0\0\0\0mif1heic")
    return head + meta(len(head) + len(meta(0)) + 8) + box(b"mdat", *tiles)


def test_odd_sizes_are_read() -> None:
    frames = smooth_motion(2, 63, 97)
    data = mux(frames, "matroska", "ffv1", "yuv420p")
    assert psnr(read_video(data, width=96, height=62, fps=24), frames[:, :62, :96]) >= 28


def memory_growth_mib(action: Callable[[], object]) -> float:
    """How much more memory the process held at once while it acted than before."""

    def status(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith(field))
        return int(line.split()[1]) / 1024

    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the highest use so far
    except OSError:
        pytest.skip("needs Linux, and the right to reset this process's peak memory")
    before = status("VmRSS")
    action()
    return status("VmHWM") - before


def test_frames_are_not_kept_at_their_stored_size() -> None:
    frames = torch.zeros(1, 1080, 1920, 3, dtype=torch.uint8).expand(48, -1, -1, -1)
    data = mux(frames, "mp4", "libx264", "yuv420p", options={"preset": "ultrafast"})
    # 48 decoded frames would be 142 MiB as yuv420p and 285 MiB as RGB
    assert memory_growth_mib(lambda: read(data, num_frames=48)) < 70


# --- reading: damage -------------------------------------------------------------------------------------


def read(source: Path | str | bytes, **settings: object) -> Tensor:
    return read_video(source, width=64, height=64, fps=24, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("video_format", [*FORMATS, "png", "jpeg", "webp"])
def test_a_cut_off_file_is_an_error(video_format: str) -> None:
    frames = smooth_motion(8, 64, 64)
    if video_format in FORMATS:
        data = encode_video(frames, fps=24, format=video_format)  # type: ignore[arg-type]
    else:
        data = encode_thumbnail(frames, format=video_format)  # type: ignore[arg-type]
    assert len(read(data)) in (1, 8)
    # a decoder fills in the last few bytes of a jpeg
    ends = range(0, len(data) - 40 if video_format == "jpeg" else len(data), 1 + len(data) // 40)
    for end in ends:
        with pytest.raises(UnreadableVideo, match=r": .*: "):
            read(data[:end])


def test_an_mp4_cut_between_two_frames_is_an_error() -> None:
    data = encode_video(smooth_motion(8, 64, 64), fps=24)
    with av.open(BytesIO(data)) as container:
        begins = [packet.pos for packet in container.demux(video=0) if packet.pos is not None]
    assert len(begins) == 8
    for begin in begins:
        with pytest.raises(UnreadableVideo):
            read(data[:begin])


@pytest.mark.parametrize("tail", [b"GPS 52.5N 13.4E " * 40, b"\xff" * 70_000])
def test_what_a_camera_appends_to_an_mp4_is_no_damage(tail: bytes) -> None:
    data = encode_video(smooth_motion(8, 64, 64), fps=24)
    whole_in_parts = mux(counting(24), "mp4", "libx264", "yuv420p", options={"g": "6"}, muxer_options=IN_PARTS)
    assert len(read(data + tail)) == 8
    assert len(read(whole_in_parts + tail)) == 24


def test_an_mp4_in_parts_that_is_cut_off_is_an_error() -> None:
    data = mux(counting(24), "mp4", "libx264", "yuv420p", options={"g": "6"}, muxer_options=IN_PARTS)
    parts = [found.start() - 4 for found in re.finditer(b"moof|mdat", data)]
    assert len(parts) == 8
    for begin in parts:
        for end in (begin + 5, begin + 8, begin + 20):
            with pytest.raises(UnreadableVideo):
                read(data[:end])


def test_a_packet_lost_on_the_way_is_an_error() -> None:
    data = mux(smooth_motion(12, 64, 64), "mpegts", "libx264", "yuv420p")
    begins = range(0, len(data), 188)
    refused = 0
    for begin in begins:
        try:
            read(data[:begin] + data[begin + 188 :])
        except UnreadableVideo:
            refused += 1
    assert refused > len(begins) / 2  # the others carry tables and padding


def test_damage_matters_only_where_frames_are_needed() -> None:
    data = bytearray(encode_video(smooth_motion(24, 128, 128), fps=24))
    middle = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2
    data[middle : middle + 1000] = bytes(1000)  # several frames
    assert len(read(bytes(data), num_frames=6)) == 6
    for num_frames in (24, None):
        with pytest.raises(UnreadableVideo, match=r"damaged or cut off after 0\.\d+ s"):
            read(bytes(data), num_frames=num_frames)


def test_what_is_not_a_video_is_an_error(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (70_000,), dtype=torch.uint8, generator=generator).numpy().tobytes()
    sound = BytesIO()
    with wave.open(sound, "wb") as wav:
        wav.setparams((1, 2, 8000, 0, "NONE", ""))
        wav.writeframes(bytes(16000))
    things = {
        "empty": b"",
        "one byte": b"\0",
        "zeros": bytes(70_000),
        "noise": noise,
        "text": b"hello " * 5000,
        "wav": sound.getvalue(),
        "zip": b"PK\x03\x04" + noise,
        "mp4 head with noise": encode_video(smooth_motion(4), fps=24)[:40] + noise,
        "webm head with noise": encode_video(smooth_motion(4), fps=24, format="webm")[:200] + noise,
    }
    for name, data in things.items():
        path = tmp_path / name
        path.write_bytes(data)
        for source in (data, path, str(path)):
            with pytest.raises(UnreadableVideo, match=r": .*: ") as error:
                read(source)
            assert error.value.param == "video"


def test_a_file_with_only_sound_is_an_error_that_says_so() -> None:
    buffer = BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame(format="fltp", layout="mono", samples=1024)
        frame.sample_rate, frame.pts = 8000, 0
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(UnreadableVideo, match="no video stream"):
        read(buffer.getvalue())


def test_paths_that_are_not_files_are_errors_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in [tmp_path / "absent.mp4", tmp_path, tmp_path / "pipe.mp4", Path("/dev/zero"), "a\0b"]:
        with pytest.raises(UnreadableVideo, match=re.escape(repr(str(path)))):
            read(path)


def test_limits_are_named_with_the_value_that_broke_them() -> None:
    data = encode_video(smooth_motion(24, 64, 96), fps=24)
    cases = [
        (VideoLimits(max_bytes=1000), f"{len(data)} bytes .* 1000"),
        (VideoLimits(max_pixels=96 * 64 - 1), f"96x64 .* {96 * 64 - 1}"),
        (VideoLimits(max_duration_s=0.9), r"1\.00 s .* 0\.9 s"),
        (VideoLimits(max_decoded_frames=20), "more frames than the limit of 20"),
    ]
    for limits, message in cases:
        with pytest.raises(UnreadableVideo, match=message):
            read(data, limits=limits)
    assert len(read(data, limits=VideoLimits(len(data), 96 * 64, 1.0, 24, 24))) == 24
    assert len(read(data, limits=VideoLimits(max_frames=7))) == 7
    with pytest.raises(InvalidRequest, match=r"num_frames 8: .* 7") as refusal:
        read(data, num_frames=8, limits=VideoLimits(max_frames=7))
    assert refusal.value.param == "num_frames"


def test_a_duration_that_the_header_hides_is_found_while_decoding() -> None:
    data = mux(counting(4), "mpegts", "libx264", "yuv420p", stamps_ms=[0, 500, 1000, 3000])
    with pytest.raises(UnreadableVideo, match=r"3\.\d\d s .* 2 s"):
        read(data, limits=VideoLimits(max_duration_s=2))
    live = mux(counting(24), "matroska", "libx264", "yuv420p", muxer_options={"live": "1"})
    with av.open(BytesIO(live)) as container:
        assert container.duration is None
    with pytest.raises(UnreadableVideo, match=r"0\.54 s are above the limit of 0\.5 s"):
        read(live, limits=VideoLimits(max_duration_s=0.5))


def test_a_picture_that_unpacks_to_gigabytes_is_refused_before_that() -> None:
    row = b"\0" + bytes(16_000)
    packer = zlib.compressobj()
    pixels = b"".join(packer.compress(row) for _ in range(16_000)) + packer.flush()
    bomb = png_file(16_000, 16_000, 0, pixels)
    assert len(bomb) < 300_000

    def refused() -> None:
        with pytest.raises(UnreadableVideo, match="limit of 33177600 pixels"):
            read(bomb)

    assert memory_growth_mib(refused) < 50
    with pytest.raises(UnreadableVideo, match="8x8 are above the limit of 63 pixels"):
        read(png(torch.zeros(8, 8, 3, dtype=torch.uint8), 2), limits=VideoLimits(max_pixels=63))


def test_rates_that_cannot_be_are_refused() -> None:
    for fps in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidRequest, match="fps") as refusal:
            read_video(b"", width=64, height=64, fps=fps)
        assert refusal.value.param == "fps"


# --- reading: security -----------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.ts"
    path.write_bytes(mux(counting(6), "mpegts", "libx264", "yuv420p"))
    return path


def playlists(secret: Path) -> dict[str, str]:
    return {
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n",
        "list.ffconcat": f"ffconcat version 1.0\nfile '{secret.name}'\n",
        "list.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"'
        ' mediaPresentationDuration="PT1S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period>'
        '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1">'
        f"<BaseURL>file://{secret}</BaseURL></Representation></AdaptationSet></Period></MPD>",
        "list.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
        "image.svg": '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' width="64" height="64"><image xlink:href="file://{secret}" width="64" height="64"/></svg>',
    }


@pytest.mark.parametrize("name", ["list.m3u8", "list.ffconcat", "list.mpd", "list.sdp", "image.svg"])
def test_a_file_that_names_another_file_opens_nothing(name: str, secret: Path) -> None:
    text = playlists(secret)[name]
    path = secret.parent / name
    path.write_text(text)
    for source in (path, str(path), text.encode()):
        with pytest.raises(UnreadableVideo):
            read(source)
        with pytest.raises(UnreadableVideo):
            read_metadata(source)


@pytest.mark.parametrize("name", ["list.m3u8", "list.ffconcat"])
def test_the_playlists_here_do_work_in_a_reader_without_guards(name: str, secret: Path) -> None:
    path = secret.parent / name
    path.write_text(playlists(secret)[name])
    with av.open(str(path)) as container:
        assert len(list(container.decode(video=0))) == 6


@pytest.mark.parametrize(("name", "demuxer"), [("list.m3u8", "hls"), ("list.ffconcat", "concat")])
def test_a_demuxer_that_follows_names_is_refused_a_second_time(
    name: str, demuxer: str, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = secret.parent / name
    path.write_text(playlists(secret)[name])
    monkeypatch.setattr(video_input, "_DEMUXERS", f"{demuxer},mpegts")
    monkeypatch.chdir(secret.parent)
    with pytest.raises(UnreadableVideo):
        read(path)
    monkeypatch.undo()
    assert indices(read(secret)) == [0, 1, 2, 3, 4, 5]  # and the refusal does not linger


def test_a_name_with_a_pattern_means_the_file_of_that_name(tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"frame{index}.png").write_bytes(png(counting(24)[9], 2))
    (tmp_path / "frame%d.png").write_bytes(png(counting(24)[4], 2))
    assert indices(read(tmp_path / "frame%d.png")) == [4]


def test_an_address_is_a_file_name_and_nobody_is_called() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        host, port = server.getsockname()
        for scheme in ("http", "tcp", "rtmp"):
            with pytest.raises(UnreadableVideo, match="No such file"):
                read(f"{scheme}://{host}:{port}/video.mp4")
        with pytest.raises(TimeoutError):
            server.accept()


def test_ffmpegs_own_sources_and_protocols_are_not_names(secret: Path) -> None:
    for name in [
        f"file:{secret}",
        f"concat:{secret}|{secret}",
        f"subfile,,start,0,end,0,,:{secret}",
        "pipe:0",
    ]:
        with pytest.raises(UnreadableVideo, match="No such file"):
            read(name)


def test_the_file_given_is_not_changed(secret: Path) -> None:
    before = hashlib.sha256(secret.read_bytes()).hexdigest()
    read(secret)
    assert hashlib.sha256(secret.read_bytes()).hexdigest() == before


def test_flat_colours_stay_flat_in_a_gif() -> None:
    frames = torch.zeros(3, 32, 32, 3, dtype=torch.uint8)
    frames[:, :16], frames[:, 16:] = torch.tensor([244, 222, 40]).byte(), torch.tensor([36, 76, 222]).byte()
    with av.open(BytesIO(encode_video(frames, fps=8, format="gif"))) as container:
        decoded = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert torch.equal(torch.stack(decoded), frames)
