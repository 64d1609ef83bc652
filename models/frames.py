"""Every n-th frame of a film, with the least decoding.

`read_frames` yields what decoding every frame and keeping each n-th would yield, bit for bit. Where the film's index
proves it safe, pictures that no wanted frame is predicted from are never decoded, nothing is decoded between the last
wanted frame of a stretch and the next seekable point, and stretches are decoded in parallel. Each promise of the index
is checked while decoding; where one does not hold, the rest of the film is read by decoding everything.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import av
import av.container
import av.error
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import Interpolation, VideoReformatter
from jaxtyping import UInt8

from models.video import Film, Segment, VideoError, demux_packets, open_container

QUEUED_PICTURES = 8


@dataclass(frozen=True, slots=True)
class Picture:
    """One decoded frame, upright and with square pixels.

    Attributes:
        frame_index: Position in presentation order, from 0.
        time_s: Presentation time after the first frame, in seconds.
        rgb: The picture, 0..255, perhaps scaled down.
        source_width_px: Width before scaling down.
        source_height_px: Height before scaling down.
    """

    frame_index: int
    time_s: float
    rgb: UInt8[np.ndarray, "height width 3"]
    source_width_px: int
    source_height_px: int


class _BrokenPromiseError(Exception):
    """Decoding did not bear out the film's index."""


def read_frames(
    film: Film, every_n_frames: int, max_side_px: int | None = None, threads: int = 1, decode_all: bool = False
) -> Iterator[Picture]:
    """Yield frames 0, n, 2n, ... by presentation order.

    Args:
        film: From `open_film`.
        every_n_frames: n.
        max_side_px: Longer side of the pictures at the most; None keeps their size.
        threads: Decoding threads; never changes the result.
        decode_all: Decode every frame even where fewer would do.

    Raises:
        VideoError: Nothing can be decoded, or the file is so damaged that the order of its frames is in doubt.
    """
    ways = [_read_all(film, every_n_frames, max_side_px, threads=1, strict=False)]
    if threads > 1:
        ways.insert(0, _read_all(film, every_n_frames, max_side_px, threads, strict=True))
    if film.obstacle is None and not decode_all:
        ways.insert(0, _read_needed(film, every_n_frames, max_side_px, threads))
    times: list[float] = []
    for way in ways:
        try:
            for number, picture in enumerate(way):
                if number == len(times):
                    times.append(picture.time_s)
                    yield picture
                elif picture.time_s != times[number]:
                    raise VideoError(
                        f"{film.path}: the file is damaged: it has lost frames before frame {picture.frame_index}; "
                        "get it again, or repair it with `ffmpeg -i FILE film.mp4`"
                    )
            return
        except _BrokenPromiseError:
            continue  # damage that the index cannot show: the frames so far are good, go on in a slower way


def _read_needed(film: Film, every_n_frames: int, max_side_px: int | None, threads: int) -> Iterator[Picture]:
    segments = film.plan_segments(every_n_frames)
    workers = min(threads, len(segments))
    if workers < 2:
        decoder = _SegmentDecoder(film, max_side_px, threads)
        with decoder.container:
            for segment in segments:
                yield from decoder.decode(segment)
        return
    yield from _read_parallel(film, segments, max_side_px, workers)


def _read_parallel(film: Film, segments: list[Segment], max_side_px: int | None, workers: int) -> Iterator[Picture]:
    """Segments dealt in order to threads, each with its own file handle and decoder; pictures come out in order."""
    results = [queue.Queue(QUEUED_PICTURES) for _ in segments]
    todo, stop = iter(range(len(segments))), threading.Event()
    lock = threading.Lock()

    def put(number: int, item: Picture | Exception | None) -> None:
        while not stop.is_set():
            try:
                results[number].put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        decoder = _SegmentDecoder(film, max_side_px, threads=1)
        with decoder.container:
            while not stop.is_set():
                with lock:
                    number = next(todo, None)
                if number is None:
                    return
                try:
                    for picture in decoder.decode(segments[number]):
                        put(number, picture)
                        if stop.is_set():
                            return
                    put(number, None)
                except Exception as error:  # handed to the consumer, which raises it
                    put(number, error)
                    return

    pool = [threading.Thread(target=work, daemon=True, name=f"decode-{n}") for n in range(workers)]
    for thread in pool:
        thread.start()
    try:
        for result in results:
            while (item := result.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
    finally:
        stop.set()
        for thread in pool:
            thread.join()


class _SegmentDecoder:
    """Decodes segments of a film in ascending order, each from a fresh decoder state."""

    def __init__(self, film: Film, max_side_px: int | None, threads: int) -> None:
        self.container = open_container(film.path, film.limits)
        self._film = film
        self._codec = _configure_codec(self.container, film, threads, strict=True)
        self._depth = self._codec.reorder_depth
        self._packets = demux_packets(film.path, self.container, self.container.streams[film.stream_index])
        self._position = 0
        first_pts = min(entry.pts for entry in film.entries if entry.shown)
        self._developer = _Developer(film, self.container, max_side_px, first_pts)

    def decode(self, segment: Segment) -> Iterator[Picture]:
        """Yield the wanted frames of a segment.

        Raises:
            _BrokenPromiseError: A packet is not the one indexed, or it did not yield exactly its own frame, in order.
        """
        due: set[int] = set()
        latest = self._film.entries[segment.begin].pts - 1
        for frame in self._decode_packets(segment, due):
            if frame.pts is None or frame.pts <= latest or frame.pts not in due:
                raise _BrokenPromiseError(f"unexpected frame at {frame.pts}")
            latest = frame.pts
            due.remove(latest)
            if latest in segment.wanted:
                yield self._developer.develop(frame, segment.wanted[latest])
        if due:
            raise _BrokenPromiseError(f"{len(due)} frames did not come out")

    def _decode_packets(self, segment: Segment, due: set[int]) -> Iterator[av.VideoFrame]:
        self._codec.flush_buffers()
        self._codec.reorder_depth = self._depth
        try:
            for position, packet in self._take_packets(segment):
                entry = self._film.entries[position]
                if packet.pts != entry.pts or packet.size != entry.size:
                    raise _BrokenPromiseError(f"packet {position} is not the one indexed")
                if self._film.is_needed(position, segment):
                    if entry.shown:
                        due.add(entry.pts)
                    yield from self._codec.decode(packet)
            yield from self._codec.decode(None)
        except av.error.FFmpegError as error:
            raise _BrokenPromiseError(str(error)) from error

    def _take_packets(self, segment: Segment) -> Iterator[tuple[int, av.Packet]]:
        while self._position <= segment.last:
            packet = next(self._packets, None)
            if packet is None:
                raise _BrokenPromiseError("the file became shorter")
            self._position += 1
            if self._position > segment.begin:
                yield self._position - 1, packet


def _read_all(
    film: Film, every_n_frames: int, max_side_px: int | None, threads: int, strict: bool
) -> Iterator[Picture]:
    """Decode every frame. Damage either stops it (`strict`) or costs the frames it hits, as in any player."""
    index, problem = 0, "no frames came out"
    with open_container(film.path, film.limits) as container:
        codec = _configure_codec(container, film, threads, strict)
        developer = _Developer(film, container, max_side_px)
        packets = demux_packets(film.path, container, container.streams[film.stream_index])
        for packet in chain(packets, [None]):
            try:
                frames = codec.decode(packet)
            except av.error.FFmpegError as error:
                if strict:
                    raise _BrokenPromiseError(str(error)) from error
                problem = str(error)
                continue
            for frame in frames:
                if index % every_n_frames == 0:
                    yield developer.develop(frame, index)
                index += 1
    if index == 0:
        raise VideoError(
            f"{film.path}: none of its {len(film.entries)} packets can be decoded ({problem}); the film is damaged, "
            "encrypted, or beyond max_pixels: get it again or convert it with `ffmpeg -i FILE film.mp4`"
        )


def _configure_codec(
    container: av.container.InputContainer, film: Film, threads: int, strict: bool
) -> av.VideoCodecContext:
    codec = container.streams[film.stream_index].codec_context
    codec.thread_count = threads
    codec.thread_type = "AUTO"
    codec.options = {"max_pixels": str(film.limits.max_pixels)} | ({"err_detect": "explode"} if strict else {})
    return codec


class _Developer:
    """Turns decoded frames into pictures. The first frame it sees, or `first_pts`, is the film's time 0."""

    def __init__(
        self,
        film: Film,
        container: av.container.InputContainer,
        max_side_px: int | None,
        first_pts: int | None = None,
    ) -> None:
        stream = container.streams[film.stream_index]
        self._film, self._max_side_px, self._first_pts = film, max_side_px, first_pts
        self._frame_s = float(1 / (stream.average_rate or stream.guessed_rate or 25))
        self._pixel_aspect = float(stream.sample_aspect_ratio or 1)
        self._reformatter = VideoReformatter()

    def develop(self, frame: av.VideoFrame, index: int) -> Picture:
        """Convert to upright RGB with square pixels, honouring the frame's colour matrix and range.

        Raises:
            VideoError: The frame's pixels cannot be converted.
        """
        if self._first_pts is None:
            self._first_pts = frame.pts
        width, height = square_size(frame.width, frame.height, self._pixel_aspect)
        scale = min(1.0, (self._max_side_px or max(width, height)) / max(width, height))
        size = {"width": max(1, round(width * scale)), "height": max(1, round(height * scale))}
        try:
            converted = self._reformatter.reformat(
                frame, **size, format="rgb24", interpolation=Interpolation.BICUBIC, threads=1
            )
        except av.error.FFmpegError as error:
            raise VideoError(
                f"{self._film.path}: frame {index} has pixels ({frame.format.name}) that cannot be converted to RGB "
                f"({error}); convert the film with `ffmpeg -i FILE -pix_fmt yuv420p film.mp4`"
            ) from error
        rgb, is_turned = turn_upright(converted.to_ndarray(), _read_display_matrix(frame))
        if is_turned:
            width, height = height, width
        return Picture(index, self._measure_time_s(frame, index), rgb, width, height)

    def _measure_time_s(self, frame: av.VideoFrame, index: int) -> float:
        if frame.pts is None or self._first_pts is None:
            return index * self._frame_s
        return float((frame.pts - self._first_pts) * self._film.time_base)


def square_size(width_px: int, height_px: int, pixel_aspect: float) -> tuple[int, int]:
    """Size of a picture with square pixels; the side that is too short grows, so that no detail is lost."""
    if not 0.1 <= pixel_aspect <= 10.0:
        return width_px, height_px
    if pixel_aspect >= 1:
        return round(width_px * pixel_aspect), height_px
    return width_px, round(height_px / pixel_aspect)


def _read_display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """The upper left 2 x 2 of the frame's display matrix (a, b, c, d); the identity where it has none."""
    data = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5].tolist()
    return a, b, c, d


def turn_upright(
    rgb: UInt8[np.ndarray, "height width 3"], matrix: tuple[int, int, int, int]
) -> tuple[UInt8[np.ndarray, "upright_height upright_width 3"], bool]:
    """Apply a display matrix: the nearest quarter turn and mirroring.

    Args:
        rgb: A picture as decoded.
        matrix: a, b, c, d, where a point (x, y) is shown at (a x + c y, b x + d y).

    Returns:
        The upright picture, and whether its width and height changed places.

    Source: ISO/IEC 14496-12, 6.2.2.
    """
    a, b, c, d = matrix
    is_turned = abs(b) > abs(a)
    if is_turned:
        rgb = rgb.transpose(1, 0, 2)
    horizontal, vertical = (c, b) if is_turned else (a, d)
    rgb = rgb[:: -1 if vertical < 0 else 1, :: -1 if horizontal < 0 else 1]
    return np.ascontiguousarray(rgb), is_turned
