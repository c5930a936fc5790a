"""Read compressed text files as streams."""

from __future__ import annotations

import bz2
import io
import lzma
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_READ_BYTES = 2**14
_MAGIC_BYTES = 8  # At least as many as any format needs to be recognized.


class _Format(NamedTuple):
    """How the streams of a format begin, and a function that returns a decompressor for one of them."""

    magic: re.Pattern[bytes]
    decompressor: Callable[[], Any]


def _zstd_decompressor() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    # The largest window that `zstd --long=31` writes; the default limit is 2**27 bytes.
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: 31})


_FORMATS = {
    ".gz": _Format(re.compile(rb"\x1f\x8b"), lambda: zlib.decompressobj(wbits=31)),
    ".bz2": _Format(re.compile(rb"BZh"), bz2.BZ2Decompressor),
    ".xz": _Format(re.compile(rb"\xfd7zXZ\x00"), lzma.LZMADecompressor),
    # The second alternative is a skippable frame, RFC 8878.
    ".zst": _Format(re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), _zstd_decompressor),
}
COMPRESSED_ENDINGS = tuple(_FORMATS)


class DecompressedFile(io.RawIOBase):
    """The decompressed bytes of one or several concatenated streams.

    Data that follow the last stream and belong to none, other than zeros, are not read, as by the command-line tools.

    Args:
      path: a file with one of the `COMPRESSED_ENDINGS`.

    Attributes:
      trailing_bytes: size of the data after the last stream; set when the end is reached.
      produced_bytes: size of the data that were decompressed so far, in part ahead of what was read.

    Raises, when it is read: ValueError, EOFError or the library's own error, if the file is damaged or truncated.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.trailing_bytes = 0
        self.produced_bytes = 0
        self._ending = path.suffix.lower()
        self._format = _FORMATS[self._ending]
        self._size = path.stat().st_size
        self._file = path.open("rb")
        self._decompressor: Any = None
        self._input = b""
        self._output = memoryview(b"")
        self._at_end = False

    @property
    def consumed_bytes(self) -> int:
        """Size of the compressed data that `produced_bytes` are from."""
        return self._file.tell() - len(self._input)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output and not self._at_end:
            self._output = memoryview(self._decompress_some())
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _decompress_some(self) -> bytes:
        """Return the next decompressed bytes, which may be none before the end too."""
        data = self._input or self._file.read(_READ_BYTES)
        if self._is_between_streams():
            data = self._start_stream(data)
            self._at_end = not data
        elif not data:
            raise EOFError("the compressed data are truncated")
        if self._at_end:
            return b""
        output = self._decompressor.decompress(data)
        self._input = self._decompressor.unused_data
        self.produced_bytes += len(output)
        return output

    def _is_between_streams(self) -> bool:
        return self._decompressor is None or self._decompressor.eof

    def _start_stream(self, data: bytes) -> bytes:
        """Make the decompressor of the next stream and return its first bytes; b"" if there is none."""
        is_first = self._decompressor is None
        while not is_first and data and not (data := data.lstrip(b"\0")):
            data = self._file.read(_READ_BYTES)
        data += self._file.read(max(0, _MAGIC_BYTES - len(data)))
        if self._format.magic.match(data):
            self._decompressor = self._format.decompressor()
            return data
        if is_first:
            raise ValueError(f"it is not a {self._ending} file, or is damaged")
        self.trailing_bytes = len(data) + self._size - self._file.tell()
        return b""

    def close(self) -> None:
        self._file.close()
        super().close()


def open_binary(path: Path) -> io.BufferedReader:
    """Open a file for reading its bytes, decompressed if its ending says that it is compressed."""
    if path.suffix.lower() in COMPRESSED_ENDINGS:
        return io.BufferedReader(DecompressedFile(path), 2**20)
    return path.open("rb")
