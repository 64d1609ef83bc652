"""Films as files: opened with suspicion and indexed without decoding.

`open_film` checks a file and notes every packet of its video stream, from which follow the presentation order, whether
the file is whole, and which packets a wanted frame needs. `models.frames` decodes.
"""

from bisect import bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import av.container
import av.error

from models.access_units import AccessUnit, AccessUnitReader, UnsupportedStreamError

# Formats that hold films. Others that the library knows read text, pictures, playlists or other files.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,live_flv,mpegts,mpeg,mpegvideo,m4v,h264,hevc,obu,av1,ivf,ogg,asf,"
    "rm,mxf,gxf,nut,yuv4mpegpipe,wtv,dv,gif,nuv,vc1"
)
UNREAD = AccessUnit(start=False, disposable=False, bipredicted=False)


class VideoError(Exception):
    """A film cannot be used; the message names the file, what was found and what to do."""


@dataclass(frozen=True)
class Limits:
    """What a film may ask of this machine.

    Attributes:
        max_duration_s: Longest film, in seconds.
        max_pixels: Largest picture, width times height.
    """

    max_duration_s: float
    max_pixels: int


@dataclass(frozen=True, slots=True)
class PacketEntry:
    """One packet of the video stream, as the index pass saw it; `shown` is false where an edit list drops it."""

    pts: int | None
    duration: int
    size: int
    shown: bool
    unit: AccessUnit


@dataclass(slots=True)
class Segment:
    """Packets `begin` to `last` (both included, in stream order), and the wanted frames among them: pts to index."""

    begin: int
    last: int
    wanted: dict[int, int]


@dataclass(frozen=True)
class Film:
    """A film that has been checked and indexed. Made by `open_film`.

    Attributes:
        path: Absolute path of the file.
        limits: What it was checked against.
        stream_index: Position of its video stream in the file.
        time_base: Seconds in one unit of its timestamps.
        entries: Its packets, in stream order.
        obstacle: Why every frame must be decoded, or None where the index proves that some can be left out.
    """

    path: Path
    limits: Limits
    stream_index: int
    time_base: Fraction
    entries: list[PacketEntry]
    obstacle: str | None

    def plan_segments(self, every_n_frames: int) -> list[Segment]:
        """The stretches of the stream to decode for every n-th frame: in order, disjoint, each from a seekable point.

        Raises:
            ValueError: The film has an `obstacle`.
        """
        if self.obstacle:
            raise ValueError(f"{self.path}: every frame must be decoded: {self.obstacle}")
        position = {entry.pts: index for index, entry in enumerate(self.entries)}
        starts = [index for index, entry in enumerate(self.entries) if entry.unit.start]
        order = sorted(entry.pts for entry in self.entries if entry.shown)
        segments: list[Segment] = []
        for index in range(0, len(order), every_n_frames):
            pts, at = order[index], position[order[index]]
            start = bisect_right(starts, at) - 1
            while self.entries[starts[start]].pts > pts:  # a leading picture needs what came before this start
                start -= 1
            if segments and starts[start] <= segments[-1].last:
                segments[-1].last = max(segments[-1].last, at)
                segments[-1].wanted[pts] = index
            else:
                segments.append(Segment(starts[start], at, {pts: index}))
        return segments

    def is_needed(self, position: int, segment: Segment) -> bool:
        """Whether the packet at `position` must be decoded for the wanted frames of `segment`."""
        entry, first = self.entries[position], self.entries[segment.begin]
        if first.unit.leaps and entry.pts < first.pts:
            return False
        return entry.pts in segment.wanted or not entry.unit.disposable


def open_film(path: str | Path, limits: Limits) -> Film:
    """Check a film and index its video stream; nothing is decoded beyond what finds the stream's format.

    Args:
        path: A local file. Its name is never taken for an option, a protocol or a pattern.
        limits: What it may ask of this machine.

    Raises:
        VideoError: There is no such file, it is empty, no film, without video, truncated, damaged or beyond `limits`.
    """
    path = Path(path).absolute()
    if not path.is_file():
        raise VideoError(f"{path}: no such file (or not a regular file); give the path of a film")
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: the file is empty (0 bytes); copy or download the film again")
    with open_container(path, limits) as container:
        stream = _choose_stream(path, container)
        _check_header(path, container, stream, limits)
        entries, obstacle = _index_packets(path, container, stream)
        if not entries:
            raise VideoError(f"{path}: the video stream holds no frames; re-encode the film from its source")
        _check_duration(path, container, stream, entries, limits)
        return Film(path, limits, stream.index, stream.time_base, entries, obstacle)


def open_container(path: Path, limits: Limits) -> av.container.InputContainer:
    """Open a file as one of `FORMATS`, with no protocol but local files.

    Raises:
        VideoError: It is none of them.
    """
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file", "max_pixels": str(limits.max_pixels)}
    try:
        return av.open(str(path), options=options, metadata_errors="replace")
    except (av.error.FFmpegError, ValueError, UnicodeError) as error:
        raise VideoError(
            f"{path}: not a film that can be read, or cut off before its index ({_describe(error)}); "
            "check that the file is complete, or convert it with `ffmpeg -i FILE film.mp4`"
        ) from error


def _describe(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _choose_stream(path: Path, container: av.container.InputContainer) -> av.VideoStream:
    """The first video stream with a known format that is not a cover picture."""
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        kinds = ", ".join(sorted({s.type for s in container.streams})) or "none"
        raise VideoError(f"{path}: no video stream (streams found: {kinds}); give a file that has pictures")
    return next((s for s in streams if s.codec_context and s.codec_context.width), streams[0])


def _check_header(path: Path, container: av.container.InputContainer, stream: av.VideoStream, limits: Limits) -> None:
    codec = stream.codec_context
    if codec is None:
        raise VideoError(f"{path}: no decoder for its video; convert it with `ffmpeg -i FILE film.mp4`")
    if codec.width <= 0 or codec.height <= 0:
        raise VideoError(f"{path}: the video stream holds no frames (its size is unknown); use another copy")
    if codec.width * codec.height > limits.max_pixels:
        raise VideoError(
            f"{path}: pictures of {codec.width} x {codec.height} are more than {limits.max_pixels} pixels; "
            "scale the film down, or raise max_pixels if that is its true size"
        )
    _check_length(path, (container.duration or 0) / av.time_base, limits)


def _check_length(path: Path, duration_s: float, limits: Limits) -> None:
    if duration_s > limits.max_duration_s:
        raise VideoError(
            f"{path}: a duration of {duration_s:.0f} s is more than {limits.max_duration_s:.0f} s; cut the film, raise "
            "max_duration_s if it is that long, or repair its timestamps with `ffmpeg -i FILE -c copy film.mp4`"
        )


def _index_packets(
    path: Path, container: av.container.InputContainer, stream: av.VideoStream
) -> tuple[list[PacketEntry], str | None]:
    """All packets in stream order, and the obstacle to decoding only some of them, if any."""
    entries: list[PacketEntry] = []
    obstacle, reader = None, None
    try:
        reader = AccessUnitReader(stream.codec_context.name, stream.codec_context.extradata or b"")
    except UnsupportedStreamError as error:
        obstacle = str(error)
    for packet in demux_packets(path, container, stream):
        unit = UNREAD
        if obstacle is None:
            try:
                unit = reader.read(bytes(packet))
            except UnsupportedStreamError as error:
                obstacle = f"{error} at packet {len(entries)}"
            if packet.is_corrupt or packet.has_sidedata("new_extradata"):
                obstacle = f"damage or a new configuration at packet {len(entries)}"
        entries.append(PacketEntry(packet.pts, packet.duration or 0, packet.size, not packet.is_discard, unit))
    if obstacle is None:
        entries, obstacle = _check_order(entries, stream.codec_context.reorder_depth)
    return entries, obstacle


def demux_packets(path: Path, container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """The packets of a stream that hold data, in stream order.

    Raises:
        VideoError: The container is damaged.
    """
    last_s = 0.0
    try:
        for packet in container.demux(stream):
            if packet.size:
                last_s = float(packet.dts * packet.time_base) if packet.dts is not None else last_s
                yield packet
    except av.error.FFmpegError as error:
        raise VideoError(
            f"{path}: the file is damaged after {last_s:.1f} s ({_describe(error)}); get it again, or keep what "
            "can be read with `ffmpeg -i FILE -c copy film.mp4`"
        ) from error


def _check_order(entries: list[PacketEntry], reorder_depth: int) -> tuple[list[PacketEntry], str | None]:
    """Confirm that presentation order follows from the timestamps alone; drop starts that are not safe.

    A decoder puts frames in order by itself and may lose one where its delay is too small, so the delay that the
    timestamps ask for must be one that it already knows.
    """
    earlier: list[int] = []
    checked: list[PacketEntry] = []
    for entry in entries:
        if entry.pts is None:
            return entries, f"packet {len(checked)} has no timestamp"
        unit = entry.unit
        if unit.start and earlier and entry.pts < earlier[-1]:
            unit = replace(unit, start=False)
        if len(earlier) - bisect_right(earlier, entry.pts) > reorder_depth:
            return entries, f"packet {len(checked)} is out of order by more than {reorder_depth} frames"
        insort(earlier, entry.pts)
        checked.append(replace(entry, unit=unit))
    if any(before == after for before, after in pairwise(earlier)):
        return entries, "two packets have the same timestamp"
    if checked and (not checked[0].unit.start or checked[0].pts != earlier[0]):
        return entries, "the stream does not begin at a seekable point"
    return checked, None


def _check_duration(
    path: Path,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    entries: list[PacketEntry],
    limits: Limits,
) -> None:
    """Compare the duration that the header promises with the packets that are there."""
    order = sorted(entry.pts for entry in entries if entry.pts is not None)
    if not order:
        return
    # A packet's own duration may be unknown, so the longest gap stands in for that of the last.
    longest_gap = max((after - before for before, after in pairwise(order)), default=0)
    end = max(longest_gap + order[-1], *(e.pts + e.duration for e in entries if e.pts is not None))
    found_s = float((end - order[0]) * stream.time_base)
    _check_length(path, found_s, limits)
    if stream.duration is not None:
        declared_s = float(stream.duration * stream.time_base)
    else:
        declared_s = (container.duration or 0) / av.time_base
        found_s = max(found_s, float(end * stream.time_base))  # some formats count from zero, not from the first frame
    if found_s >= 0.9 * declared_s:
        return
    if stream.duration is None and _measure_end_s(path, limits) >= 0.9 * declared_s:
        return  # the header's duration is that of a longer sound track
    raise VideoError(
        f"{path}: the file is truncated: its header promises {declared_s:.1f} s of video, its packets end after "
        f"{found_s:.1f} s; get the whole file, or keep what is there with `ffmpeg -i FILE -c copy film.mp4`"
    )


def _measure_end_s(path: Path, limits: Limits) -> float:
    """When the last packet of any stream ends, in seconds."""
    end_s = 0.0
    with open_container(path, limits) as container:
        for packet in container.demux():
            if packet.size and packet.pts is not None:
                end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    return end_s
