"""Memory that the codes of a lossless WebP take, told from the beginning of its stream.

A lossless WebP may have other prefix codes for each block of 4 x 4 pixels, up to 65,536 sets of them. Its decoder makes
tables of all of them at once, of up to 20 kB a set: 1.3 GB for a file of 300 kB. How large blocks are stands behind the
small images that say how pixels are predicted, so these are gone through here, without making a picture of them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from dermray.errors import ImageError

MAX_SETS = 1 << 16
SMALLEST_BLOCK_PIXELS = 16
# Of libwebp 1.x: entries of the tables of one set, of four bytes each, by bits of the colour cache; and its record.
TABLE_ENTRIES = [2300 + size for size in (654, 656, 658, 662, 670, 686, 718, 782, 912, 1168, 1680, 2704)]
ENTRY_BYTES, RECORD_BYTES = 4, 608
MAX_SET_BYTES = TABLE_ENTRIES[-1] * ENTRY_BYTES + RECORD_BYTES
# So much fits beside any picture that holds no more blocks.
UNSEEN_BYTES = 400 << 20
# Of the small images together: libwebp's have 16 thousand at most, those of its first releases some 100 thousand.
MAX_SYMBOLS = 1 << 18
MAX_STREAMS = 8
LITERALS, LENGTHS = 256, 24
LENGTHS_IN_ORDER = (17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
# Of lengths that are repeated: bits that say how often, and the fewest times.
REPEATS = {16: (2, 3), 17: (3, 3), 18: (7, 11)}
PREDICTOR, COLOUR, PALETTE = 0, 1, 3


class _DamagedError(Exception):
    """Something that no decoder takes."""


def code_bytes(data: bytes, num_pixels: int) -> int:
    """Most bytes that the tables of codes take which the decoder of a WebP makes; of an animation, for its first frame.

    Args:
        data: the file.
        num_pixels: of the picture; where it can hold few blocks only, no more of the file is looked at.

    Raises:
        ImageError: `truncated`, or `too_complex`: built as no encoder does.
    """
    most = min(MAX_SETS, num_pixels // SMALLEST_BLOCK_PIXELS + 1) * MAX_SET_BYTES
    if most <= UNSEEN_BYTES:
        return most
    needed = 0
    try:
        for number, (stream, width, height) in enumerate(_streams(data), 1):
            if number > MAX_STREAMS:
                raise ImageError("too_complex", f"a WebP with more than {MAX_STREAMS} pictures in one: save it anew")
            needed = max(needed, _Reader(stream).code_bytes(width, height))
    except (_DamagedError, struct.error, IndexError):
        raise ImageError("truncated", "the pixels of the WebP cannot all be decoded: copy or export it again") from None
    return needed


def _streams(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Lossless streams with the size of their pictures, those of transparency included; of frames the first one's."""
    alphas: list[bytes] = []
    seen_frame, place = False, 12
    while place + 8 <= len(data):
        kind, (size,) = data[place : place + 4], struct.unpack_from("<I", data, place + 4)
        body, place = place + 8, place + 8 + size + size % 2
        if kind == b"ANMF" and not seen_frame:
            seen_frame, place = True, body + 16
        elif kind == b"ANMF":
            return
        elif kind == b"VP8L":
            packed = int.from_bytes(data[body + 1 : body + 5], "little")
            yield data[body + 5 : body + size], (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
        elif kind == b"ALPH" and data[body] & 3 == 1:
            alphas.append(data[body + 1 : body + size])
        elif kind == b"VP8 ":
            width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, body + 6))
            yield from ((alpha, width, height) for alpha in alphas)


class _Reader:
    """A lossless stream, from its transforms on; bits come from the lowest one up."""

    def __init__(self, stream: bytes) -> None:
        self._data = stream
        self._bit = 0
        self._num_symbols = 0

    def code_bytes(self, width: int, height: int) -> int:
        """Bytes of the tables of the codes of its picture.

        Raises:
            _DamagedError: no decoder takes it.
            ImageError: `too_complex`.
        """
        while self._take(1):
            kind = self._take(2)
            if kind in (PREDICTOR, COLOUR):
                self._pass_image(_blocks(width, height, self._take(3) + 2))
            elif kind == PALETTE:
                num_colours = self._take(8) + 1
                self._pass_image(num_colours)
                width = -(-width >> (0 if num_colours > 16 else 1 if num_colours > 4 else 2 if num_colours > 2 else 3))
        cache_bits = self._take(4) if self._take(1) else 0
        blocks = _blocks(width, height, self._take(3) + 2) if self._take(1) else 1
        return min(MAX_SETS, blocks) * (TABLE_ENTRIES[cache_bits] * ENTRY_BYTES + RECORD_BYTES)

    def _take(self, number: int) -> int:
        at, self._bit = self._bit, self._bit + number
        if at >= 8 * len(self._data):
            raise _DamagedError
        return int.from_bytes(self._data[at >> 3 : (at >> 3) + 5], "little") >> (at & 7) & (1 << number) - 1

    def _pass_image(self, num_pixels: int) -> None:
        """Go through a small image, whose pixels all have the same codes."""
        cache_bits = self._take(4) if self._take(1) else 0
        green = self._codes(LITERALS + LENGTHS + (1 << cache_bits if cache_bits else 0))
        others, distance = [self._codes(LITERALS) for _ in range(3)], self._codes(40)
        if not green.bits and green.only < LITERALS and not any(codes.bits for codes in others):
            return
        while num_pixels > 0:
            self._num_symbols += 1
            if self._num_symbols > MAX_SYMBOLS:
                raise ImageError("too_complex", "a WebP whose pixels are predicted as no encoder does: save it anew")
            symbol, run = self._symbol(green), 1
            if symbol < LITERALS:
                for codes in others:
                    self._symbol(codes)
            elif symbol < LITERALS + LENGTHS:
                run = self._prefixed(symbol - LITERALS)
                self._prefixed(self._symbol(distance))
            num_pixels -= run

    def _symbol(self, codes: _Codes) -> int:
        if not codes.bits:
            return codes.only
        at = self._bit
        if at >= 8 * len(self._data):
            raise _DamagedError
        ahead = int.from_bytes(self._data[at >> 3 : (at >> 3) + 3], "little") >> (at & 7)
        length, symbol = codes.table[ahead & codes.mask]
        self._bit = at + length
        return symbol

    def _prefixed(self, symbol: int) -> int:
        if symbol < 4:
            return symbol + 1
        extra = symbol - 2 >> 1
        return (2 + (symbol & 1) << extra) + self._take(extra) + 1

    def _codes(self, num_symbols: int) -> _Codes:
        lengths = [0] * num_symbols
        if self._take(1):
            second = self._take(1)
            lengths[self._take(8 if self._take(1) else 1)] = 1
            if second:
                lengths[self._take(8)] = 1
        else:
            self._read_lengths(lengths)
        return _Codes(lengths)

    def _read_lengths(self, lengths: list[int]) -> None:
        of_lengths, num_symbols = [0] * 19, len(lengths)
        for symbol in LENGTHS_IN_ORDER[: self._take(4) + 4]:
            of_lengths[symbol] = self._take(3)
        codes, place, before = _Codes(of_lengths), 0, 8
        left = 2 + self._take(2 + 2 * self._take(3)) if self._take(1) else num_symbols
        while place < num_symbols and left:
            left -= 1
            length, times = self._symbol(codes), 1
            if length in REPEATS:
                bits, fewest = REPEATS[length]
                length, times = before if length == 16 else 0, fewest + self._take(bits)
            lengths[place : place + times] = [length] * times
            before, place = length or before, place + times
        if place > num_symbols:
            raise _DamagedError


class _Codes:
    """A prefix code: what the next bits mean, by its lengths; or the only symbol that it has, which takes no bits."""

    def __init__(self, lengths: list[int]) -> None:
        ordered = sorted((length, symbol) for symbol, length in enumerate(lengths) if length)
        if not ordered:
            raise _DamagedError
        self.only = ordered[0][1]
        self.bits = ordered[-1][0] if len(ordered) > 1 else 0
        self.mask = (1 << self.bits) - 1
        self.table = [(0, self.only)] * (1 << self.bits)
        code = 0
        for length, symbol in ordered if self.bits else ():
            share = 1 << self.bits - length
            # The first bit of a code is the lowest of those ahead.
            reversed_code = int(f"{code:0{self.bits}b}"[::-1], 2)
            self.table[reversed_code :: 1 << length] = [(length, symbol)] * share
            code += share
            if code > 1 << self.bits:
                raise _DamagedError
        if self.bits and code != 1 << self.bits:
            raise _DamagedError


def _blocks(width: int, height: int, bits: int) -> int:
    return -(-width >> bits) * -(-height >> bits)
