"""H.264 films that every browser plays: written frame by frame, joined without encoding again.

The same frames and settings give the same bytes.
"""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from jaxtyping import UInt8

BT709 = 1  # the number of BT.709 for matrix, primaries and transfer alike (ITU-T H.273)
CONTAINER_OPTIONS = {"movflags": "+faststart", "fflags": "+bitexact"}  # index first; no encoder version in the file


class VideoWriter:
    """Encodes RGB frames into an MP4 file: H.264, yuv420p, BT.709, index at the front.

    Use as a context manager; the file is complete when the block ends without an error.

    Args:
        path: File to write; its folder exists.
        width_px: Even width of every frame.
        height_px: Even height of every frame.
        fps: Frames a second.
        crf: Constant rate factor of x264, 0 (lossless) to 51 (worst).

    Raises:
        ValueError: A side is odd, which yuv420p cannot hold.
        av.FFmpegError: The file cannot be written.
    """

    def __init__(self, path: Path, *, width_px: int, height_px: int, fps: Fraction, crf: int):
        if width_px % 2 or height_px % 2 or width_px < 2 or height_px < 2:
            raise ValueError(f"film is {width_px}x{height_px}: both sides must be even and at least 2")
        self._shape = (height_px, width_px, 3)
        self._container = av.open(str(path), "w", format="mp4", container_options=CONTAINER_OPTIONS)
        self._stream = self._container.add_stream("libx264", rate=fps)
        self._configure(width_px, height_px, fps, crf)

    def _configure(self, width_px: int, height_px: int, fps: Fraction, crf: int) -> None:
        stream = self._stream
        stream.width, stream.height, stream.pix_fmt, stream.time_base = width_px, height_px, "yuv420p", 1 / fps
        context = stream.codec_context
        context.gop_size = max(1, round(2 * fps))  # a point to seek to every two seconds
        context.max_b_frames = 0  # decoding order is display order: clips join without gaps
        context.thread_count = 1  # x264's decisions depend on the number of its threads
        context.color_range, context.colorspace = ColorRange.MPEG, BT709
        context.color_primaries = context.color_trc = BT709
        # Its macroblock tree gives other bytes once in thousands of films (vector code that is not repeatable).
        context.options = {"crf": str(crf), "preset": "medium", "x264-params": "mbtree=0"}

    def write(self, frame: UInt8[np.ndarray, "height width 3"]) -> None:
        """Append one RGB frame.

        Raises:
            ValueError: The frame is not of the film's size.
            av.FFmpegError: The file cannot be written.
        """
        if frame.shape != self._shape:
            raise ValueError(f"frame is {frame.shape}: expected height, width, channels {self._shape}")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT,
            threads=1,
        )
        self._container.mux(self._stream.encode(picture))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()


def write_film(
    frames: Iterable[UInt8[np.ndarray, "height width 3"]],
    path: Path,
    *,
    width_px: int,
    height_px: int,
    fps: Fraction,
    crf: int,
) -> None:
    """Write a film under a temporary name and rename it when it is complete; arguments and errors of `VideoWriter`."""
    temporary = path.with_suffix(".part")
    with VideoWriter(temporary, width_px=width_px, height_px=height_px, fps=fps, crf=crf) as writer:
        for frame in frames:
            writer.write(frame)
    temporary.replace(path)


def join_films(paths: list[Path], out: Path) -> None:
    """Put films of one size, rate and encoding behind one another without encoding again.

    Args:
        paths: Films by `VideoWriter`, in order.
        out: File to write.

    Raises:
        ValueError: No film was given, or two were encoded differently.
        av.FFmpegError: A film cannot be read, or the result cannot be written.
    """
    if not paths:
        raise ValueError("no films to join: at least one is needed")
    with av.open(str(out), "w", format="mp4", container_options=CONTAINER_OPTIONS) as container:
        stream, header, offset = None, b"", 0
        for path in paths:
            with av.open(str(path)) as film:
                source = film.streams.video[0]
                if stream is None:
                    stream = container.add_stream_from_template(source)
                    stream.time_base, header = source.time_base, source.codec_context.extradata
                if source.codec_context.extradata != header or source.time_base != stream.time_base:
                    raise ValueError(f"{path.name} was encoded otherwise than {paths[0].name}: write both alike")
                for packet in film.demux(source):
                    if packet.dts is None:  # the empty packet at the end
                        continue
                    packet.pts, packet.dts, packet.stream = packet.pts + offset, packet.dts + offset, stream
                    container.mux(packet)
                offset += source.duration
