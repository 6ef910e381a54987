"""A decoded frame as it should look: turned and mirrored as its file says, in RGB over black."""

import struct
from typing import cast

import av
import torch
from av.filter import Graph
from av.sidedata.sidedata import SideDataContainer, Type
from av.video.reformatter import Colorspace, Interpolation
from torch import Tensor

_COLORSPACE_UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED
# Of FFmpeg's AVFrameSideDataType, EXIF among them: PyAV 18 has no names for these, and fails where a frame has any.
_NAMELESS_SIDE_DATA = range(28, 40)
_TO_RGB = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def upright(frame: av.VideoFrame) -> tuple[Tensor, bool]:
    """The picture, (h, w, 3) uint8, and whether x and y have changed places."""
    a, b, c, d = _display_matrix(frame)
    image, is_transposed = _rgb(frame), abs(b) > abs(a)
    if is_transposed:
        image, a, d = image.transpose(0, 1), c, b
    return image.flip([dim for dim, factor in ((1, a), (0, d)) if factor < 0]), is_transposed


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """Where the frame's pixels go: (x, y) to (a x + c y, b x + d y), but for its place (ISO 14496-12, 6.2.2)."""
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    drops = [graph.add("sidedata", f"mode=delete:type={kind}") for kind in _NAMELESS_SIDE_DATA]
    # a small copy: PyAV's side data and its frame hold each other until garbage is collected
    small = graph.add("crop", "w=1:h=1:exact=1"), graph.add("copy")
    graph.link_nodes(source, *drops, *small, graph.add("buffersink")).configure()
    graph.vpush(frame)
    side_data = cast(SideDataContainer, graph.vpull().side_data)  # which is not what PyAV declares
    if Type.DISPLAYMATRIX not in side_data:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(side_data[Type.DISPLAYMATRIX]))
    return a, b, c, d


def _rgb(frame: av.VideoFrame) -> Tensor:
    """The frame as stored, over black, as (h, w, 3)."""
    untagged = frame.colorspace == _COLORSPACE_UNSPECIFIED
    # what players assume of a video that does not name its matrix
    colorspace = Colorspace.ITU709 if untagged and frame.height >= 720 else None
    has_alpha = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
    converted = frame.reformat(
        format="rgba" if has_alpha else "rgb24", src_colorspace=colorspace, interpolation=_TO_RGB
    )
    # a copy: the decoder's memory goes with the frame
    image = torch.from_numpy(converted.to_ndarray().copy())
    if not has_alpha:
        return image
    colour, alpha = image[..., :3].to(torch.int32), image[..., 3:].to(torch.int32)
    return ((colour * alpha + 127) // 255).to(torch.uint8)
