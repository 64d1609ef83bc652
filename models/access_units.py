"""What can be told of a compressed picture without decoding it: may decoding start here, and may it be left out.

H.264 (ITU-T H.264, 7.3.1, 7.4.1) and H.265 (ITU-T H.265, 7.3.1, 7.4.2) say both in the first bytes of their
NAL units. Everything that this reader does not know for certain raises `UnsupportedStreamError`, so that a caller
decodes every picture instead.
"""

from collections.abc import Iterator
from dataclasses import dataclass

H264_HIGH_PROFILES = frozenset({100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135})
H264_PARAMETER_SETS = frozenset({7, 8, 13, 15})
H265_PARAMETER_SETS = frozenset({32, 33, 34})
H265_SUB_LAYER_NON_REFERENCE = frozenset({0, 2, 4, 6, 8, 10, 12, 14})


class UnsupportedStreamError(Exception):
    """The stream uses something that this reader cannot prove safe; decode every picture."""


@dataclass(frozen=True, slots=True)
class AccessUnit:
    """One compressed picture.

    Attributes:
        start: Decoding may start here: this picture and all that follow it in presentation order come out exact.
        disposable: No other picture is predicted from this one.
        bipredicted: Its first slice is a B slice.
        leaps: Pictures that precede it in presentation order but follow it in the stream can be left out even where
            they are references (true of H.265, where the decoder itself drops them after a random access).
    """

    start: bool
    disposable: bool
    bipredicted: bool
    leaps: bool = False


class BitReader:
    """Bits of a NAL unit's payload, most significant first, emulation prevention bytes taken out."""

    def __init__(self, payload: bytes) -> None:
        self._bytes = payload.replace(b"\0\0\3", b"\0\0")
        self._position = 0

    def read_bits(self, count: int) -> int:
        """Read an unsigned number of `count` bits; past the end is an `UnsupportedStreamError`."""
        end = self._position + count
        if end > 8 * len(self._bytes):
            raise UnsupportedStreamError(f"a header ends after {len(self._bytes)} bytes")
        first, last = self._position // 8, (end + 7) // 8
        self._position = end
        window = int.from_bytes(self._bytes[first:last], "big")
        return (window >> (8 * last - end)) & ((1 << count) - 1)

    def read_ue(self) -> int:
        """Read an unsigned Exp-Golomb number."""
        zeros = 0
        while self.read_bits(1) == 0:
            zeros += 1
            if zeros > 32:
                raise UnsupportedStreamError("an Exp-Golomb number is longer than 32 bits")
        return (1 << zeros) - 1 + self.read_bits(zeros)

    def read_se(self) -> int:
        """Read a signed Exp-Golomb number."""
        code = self.read_ue()
        return (code + 1) // 2 if code % 2 else -(code // 2)


class AccessUnitReader:
    """Reads the packets of one H.264 or H.265 stream in decoding order.

    Args:
        codec: `h264` or `hevc`; anything else raises.
        extradata: The container's decoder configuration (avcC, hvcC or Annex B parameter sets).

    Raises:
        UnsupportedStreamError: Another codec, or an H.264 stream that may hold single fields.
    """

    def __init__(self, codec: str, extradata: bytes) -> None:
        if codec not in ("h264", "hevc"):
            raise UnsupportedStreamError(f"codec {codec}")
        self._is_h264 = codec == "h264"
        self._length_bytes = 0
        if extradata[:1] == b"\1":
            try:
                self._length_bytes = 1 + (extradata[4 if self._is_h264 else 21] & 3)
                units = _split_avcc(extradata) if self._is_h264 else _split_hvcc(extradata)
            except IndexError as error:
                raise UnsupportedStreamError("a damaged decoder configuration") from error
        else:
            units = list(_split_annex_b(extradata))
        self._parameter_sets: set[bytes] = set()
        self._first = True
        for unit in units:
            self._note_parameter_set(unit, allow_new=True)

    def read(self, packet: bytes) -> AccessUnit:
        """Describe the next packet of the stream.

        Raises:
            UnsupportedStreamError: The packet is damaged, does not hold exactly one frame, or changes parameters.
        """
        split = _split_lengths(packet, self._length_bytes) if self._length_bytes else _split_annex_b(packet)
        units = list(split)
        described = self._read_h264(units) if self._is_h264 else self._read_h265(units)
        self._first = False
        return described

    def _read_h264(self, units: list[bytes]) -> AccessUnit:
        slices, has_parameters = [], False
        for unit in units:
            kind = unit[0] & 31
            if kind in (1, 5):
                slices.append(unit)
            elif kind in (2, 3, 4):
                raise UnsupportedStreamError("data partitions")
            elif kind in H264_PARAMETER_SETS:
                has_parameters = True
                self._note_parameter_set(unit, allow_new=self._first)
        if sum(unit[1] >> 7 for unit in slices if len(unit) > 1) != 1:
            raise UnsupportedStreamError("a packet that does not hold exactly one picture")
        header = BitReader(slices[0][1:16])
        header.read_ue()
        is_idr = all(unit[0] & 31 == 5 for unit in slices)
        disposable = not has_parameters and all(unit[0] & 0x60 == 0 for unit in slices)
        # A recovery point (open GOP) is no start: what follows may still name, if not use, pictures before it.
        return AccessUnit(is_idr, disposable, header.read_ue() % 5 == 1)

    def _read_h265(self, units: list[bytes]) -> AccessUnit:
        slices, has_parameters = [], False
        for unit in units:
            kind, layer = unit[0] >> 1 & 63, (unit[0] & 1) << 5 | unit[1] >> 3
            if kind in (36, 37) or 16 <= kind <= 18:
                raise UnsupportedStreamError("a broken link or an end of sequence")
            if kind in H265_PARAMETER_SETS:
                has_parameters = True
                self._note_parameter_set(unit, allow_new=self._first)
            elif kind < 32 and layer == 0:
                slices.append(unit)
            if unit[1] & 7 != 1:
                raise UnsupportedStreamError("temporal sub-layers")
        if sum(unit[2] >> 7 for unit in slices if len(unit) > 2) != 1:
            raise UnsupportedStreamError("a packet that does not hold exactly one picture")
        kinds = {unit[0] >> 1 & 63 for unit in slices}
        is_random_access = kinds <= {19, 20, 21}
        # The second bit of an IRAP slice header is no_output_of_prior_pics_flag: pictures would vanish unseen.
        if is_random_access and not self._first and slices[0][2] & 0x40:
            raise UnsupportedStreamError("pictures that are not to be shown")
        disposable = not has_parameters and kinds <= H265_SUB_LAYER_NON_REFERENCE
        return AccessUnit(is_random_access, disposable, disposable, leaps=True)

    def _note_parameter_set(self, unit: bytes, allow_new: bool) -> None:
        unit = unit.rstrip(b"\0")
        if unit in self._parameter_sets:
            return
        if not allow_new:
            raise UnsupportedStreamError("parameter sets that change within the stream")
        if self._is_h264 and unit[0] & 31 == 7 and not _holds_only_frames(unit[1:]):
            raise UnsupportedStreamError("interlaced coding")
        self._parameter_sets.add(unit)


def _split_lengths(packet: bytes, length_bytes: int) -> Iterator[bytes]:
    position = 0
    while position < len(packet):
        start = position + length_bytes
        position = start + int.from_bytes(packet[position:start], "big")
        if position > len(packet) or position < start + 2:
            raise UnsupportedStreamError("a damaged packet")
        yield packet[start:position]


def _split_annex_b(data: bytes) -> Iterator[bytes]:
    start = data.find(b"\0\0\1")
    while start >= 0:
        end = data.find(b"\0\0\1", start + 3)
        unit = data[start + 3 : end if end >= 0 else len(data)]
        if len(unit) < 2:
            raise UnsupportedStreamError("a damaged packet")
        yield unit
        start = end


def _split_avcc(extradata: bytes) -> list[bytes]:
    """Parameter sets of an AVCDecoderConfigurationRecord. Source: ISO/IEC 14496-15, 5.3.3.1."""
    units, position = [], 5
    for mask in (31, 255):
        count, position = extradata[position] & mask, position + 1
        for _ in range(count):
            end = position + 2 + int.from_bytes(extradata[position : position + 2], "big")
            units.append(extradata[position + 2 : end])
            position = end
    return [unit for unit in units if unit]


def _split_hvcc(extradata: bytes) -> list[bytes]:
    """Parameter sets of an HEVCDecoderConfigurationRecord. Source: ISO/IEC 14496-15, 8.3.3.1."""
    units, position = [], 23
    for _ in range(extradata[22]):
        count, position = int.from_bytes(extradata[position + 1 : position + 3], "big"), position + 3
        for _ in range(count):
            end = position + 2 + int.from_bytes(extradata[position : position + 2], "big")
            units.append(extradata[position + 2 : end])
            position = end
    return [unit for unit in units if unit and unit[0] >> 1 & 63 in H265_PARAMETER_SETS]


def _holds_only_frames(payload: bytes) -> bool:
    """frame_mbs_only_flag of an H.264 sequence parameter set. Source: ITU-T H.264, 7.3.2.1.1."""
    reader = BitReader(payload)
    profile = reader.read_bits(8)
    reader.read_bits(16)
    reader.read_ue()
    if profile in H264_HIGH_PROFILES:
        _skip_high_profile_fields(reader)
    reader.read_ue()
    order_type = reader.read_ue()
    if order_type == 0:
        reader.read_ue()
    elif order_type == 1:
        reader.read_bits(1)
        reader.read_se()
        reader.read_se()
        for _ in range(min(reader.read_ue(), 255)):
            reader.read_se()
    reader.read_ue()
    reader.read_bits(1)
    reader.read_ue()
    reader.read_ue()
    return bool(reader.read_bits(1))


def _skip_high_profile_fields(reader: BitReader) -> None:
    chroma_format = reader.read_ue()
    if chroma_format == 3:
        reader.read_bits(1)
    reader.read_ue()
    reader.read_ue()
    reader.read_bits(1)
    if reader.read_bits(1):
        for index in range(12 if chroma_format == 3 else 8):
            if reader.read_bits(1):
                _skip_scaling_list(reader, 16 if index < 6 else 64)


def _skip_scaling_list(reader: BitReader, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + reader.read_se()) % 256
        last = following or last
