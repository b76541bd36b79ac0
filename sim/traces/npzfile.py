"""Read arrays from an npz file that may be hostile. Knows about files and headers, not about traces or traffic.

The zip directory and the NumPy headers are read first; data is read only once every declared type, shape and size has
been accepted. Pickles are never loaded.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

MAX_ARRAY_BYTES = 2 * 2**30  # 26 layers x 5 million tokens x 8 ids of int16
MAX_MEMBERS = 64
_TAIL_BYTES = 22 + 65535 + 20  # end-of-directory record, its longest comment, the zip64 locator before it


@dataclass(frozen=True, slots=True)
class Array:
    """What an array must be: ``kinds`` of dtype (NumPy's one-letter kinds) and number of dimensions."""

    kinds: str
    ndim: int
    optional: bool = False


_KINDS = {"iu": "integers", "f": "floats", "U": "text"}


def read_npz(
    path: str,
    expected: dict[str, Array],
    check_shapes: Callable[[dict[str, tuple[int, ...]]], None],
    max_array_bytes: int = MAX_ARRAY_BYTES,
) -> dict[str, npt.NDArray[Any]]:
    """Return the ``expected`` arrays of the npz at ``path``; other members are ignored and never opened.

    ``check_shapes`` receives the declared shapes before any data is read. Raises ValueError naming file, array,
    expected and found.
    """
    if not os.path.isfile(path):  # before opening: a pipe or a device would block
        raise ValueError(f"{path}: expected an npz file, found {'something else' if os.path.exists(path) else 'none'}")
    try:
        check_directory(path)
        with zipfile.ZipFile(path) as archive:
            members = {}
            for name, array in expected.items():
                found = [info for info in archive.filelist if info.filename == f"{name}.npy"]
                if len(found) > 1:
                    raise ValueError(f"{path}: {name}: expected one array, found {len(found)}")
                if found:
                    members[name] = found[0]
                elif not array.optional:
                    raise ValueError(
                        f"{path}: {name}: expected an array, found none (the file holds "
                        f"{', '.join(sorted(info.filename for info in archive.filelist)) or 'nothing'})"
                    )
            headers = {
                name: _header(archive, info, f"{path}: {name}", expected[name], max_array_bytes)
                for name, info in members.items()
            }
            check_shapes({name: header.shape for name, header in headers.items()})
            return {name: _data(archive, members[name], f"{path}: {name}", header) for name, header in headers.items()}
    except OSError as error:
        raise ValueError(f"{path}: expected a readable npz file, found {error.strerror or error}") from None
    except (zipfile.BadZipFile, NotImplementedError, struct.error, UnicodeError) as error:
        raise ValueError(f"{path}: expected an npz (zip) file, found {str(error).lower()}") from None


def check_directory(path: str) -> None:
    """Bound the number of members before zipfile reads the directory, which it does at once and whole."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        tail = file.read(_TAIL_BYTES)
    end = tail.rfind(b"PK\5\6")
    if end < 0 or end + 22 > len(tail):
        raise ValueError(f"{path}: expected an npz (zip) file, found no zip directory (truncated or another format)")
    n_members, directory_bytes = struct.unpack_from("<HL", tail, end + 10)
    if tail.rfind(b"PK\6\7", 0, end) == end - 20 >= 0:
        raise ValueError(f"{path}: expected a zip file below 4 GiB, found a zip64 directory")
    if n_members > MAX_MEMBERS or directory_bytes > MAX_MEMBERS * 2**10:
        raise ValueError(f"{path}: expected at most {MAX_MEMBERS} arrays, found {n_members} in {directory_bytes} bytes")


@dataclass(frozen=True, slots=True)
class _Header:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    start: int
    """Bytes before the data."""


def _open(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> IO[bytes]:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{where}: expected a stored or deflated member, found compression {info.compress_type}")
    try:
        return archive.open(info)
    except zipfile.BadZipFile as error:  # the member's own header disagrees with the directory
        raise ValueError(f"{where}: expected a whole member, found {error}") from None
    except (NotImplementedError, RuntimeError) as error:  # unknown compression; encrypted
        raise ValueError(f"{where}: expected a stored or deflated member, found {error}") from None


def _header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str, expected: Array, max_bytes: int) -> _Header:
    if info.file_size > max_bytes:
        raise ValueError(f"{where}: expected at most {max_bytes} bytes, found {info.file_size} declared")
    with _open(archive, info, where) as file:
        try:
            version = npy.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"npy version {version}")
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = read(file)
        except (zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{where}: expected a whole member, found a damaged member ({error})") from None
        except (ValueError, TypeError, SyntaxError, EOFError, RecursionError, MemoryError) as error:
            # NumPy's own message can run over several lines.
            raise ValueError(
                f"{where}: expected a NumPy header, found {(str(error) or 'nothing').splitlines()[0]}"
            ) from None
        start = file.tell()
    if dtype.hasobject or dtype.kind not in expected.kinds:
        raise ValueError(f"{where}: expected {_KINDS[expected.kinds]}, found dtype {dtype}")
    if len(shape) != expected.ndim or any(n < 0 for n in shape):
        raise ValueError(f"{where}: expected {expected.ndim} dimensions, found shape {shape}")
    size = start + math.prod(shape) * dtype.itemsize
    if size != info.file_size:
        raise ValueError(f"{where}: expected {size} bytes for shape {shape}, found {info.file_size} declared")
    return _Header(shape, dtype, fortran, start)


def _data(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str, header: _Header) -> npt.NDArray[Any]:
    """Read the data; the zip layer checks the length against the directory and the CRC."""
    data = bytearray(info.file_size)
    filled = 0
    with _open(archive, info, where) as file:
        view = memoryview(data)
        try:
            while filled < len(data):
                got = file.readinto(view[filled : filled + 2**20])  # type: ignore[attr-defined]
                if not got:
                    break
                filled += got
        except (EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise ValueError(f"{where}: expected {len(data)} bytes, found a damaged member ({error})") from None
    if filled != len(data):
        raise ValueError(f"{where}: expected {len(data)} bytes, found {filled} (truncated)")
    values = np.frombuffer(data, dtype=header.dtype, offset=header.start)
    return values.reshape(header.shape, order="F" if header.fortran else "C")
