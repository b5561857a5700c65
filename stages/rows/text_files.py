"""Open text files: decompress and decode them."""

import codecs
import io
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

import pyarrow as pa

from stages.runtime.errors import UserError, user_errors

TEXT_FORMATS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}  # the names that pyarrow knows, except xz


def file_format(path: Path) -> str:
    """The suffix of a file's name without that of its compression, such as `.jsonl`; for an archive, of its content."""
    name = Path(path.name.lower())
    if name.suffix == ".zip":
        return Path(zipped_file(path) or name).suffix.lower()
    return Path(name.stem if name.suffix in COMPRESSED else name).suffix


def zipped_file(path: Path) -> str | None:
    """The name of the only text file in a zip archive; None if it has none, several or an encrypted one."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        files = [file for file in archive.infolist() if Path(file.filename.lower()).suffix in TEXT_FORMATS]
    files = [file for file in files if not file.filename.startswith("__MACOSX/")]
    return files[0].filename if len(files) == 1 and not files[0].flag_bits & 1 else None


@contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """Open a file that may be compressed.

    Raises:
        UserError: the compressed data is damaged or incomplete.
    """
    suffix = path.suffix.lower()
    if suffix not in (*COMPRESSED, ".zip"):
        with path.open("rb") as file:
            yield file
        return
    try:
        # pyarrow, because zstandard ends without an error where a file is cut off. pyarrow does not read xz.
        if suffix == ".xz":
            with lzma.open(path) as xz, io.BufferedReader(xz) as file:
                yield file
        elif suffix == ".zip":
            with zipfile.ZipFile(path) as archive, archive.open(zipped_file(path) or "") as file:
                yield file  # type: ignore[misc]  # it has all methods that are used here
        else:
            with (
                pa.input_stream(str(path), compression=COMPRESSED[suffix]) as stream,
                io.BufferedReader(stream) as file,
            ):
                yield file
    except (OSError, EOFError, lzma.LZMAError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise UserError(f"{path}: can't be decompressed: {error}; copy or download it again") from None


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 file, or a UTF-16 file with its byte order mark. Line ends are not changed."""
    with open_binary(path) as file:
        head = file.peek(2)[:2]  # type: ignore[attr-defined]
        encoding = "utf-16" if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
        yield io.TextIOWrapper(file, encoding, newline="\n")


def decoded_lines(path: Path, file: BinaryIO) -> Iterator[str]:
    """Decode the lines of a UTF-8 file, or of a UTF-16 file with a byte order mark; without these marks."""
    if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # type: ignore[attr-defined]
        with user_errors(path, "save the file as UTF-8 and run again"):
            yield from io.TextIOWrapper(file, "utf-16", newline="\n")
        return
    for number, line in enumerate(file, 1):
        if number == 1 and b"\0" in line:
            raise UserError(f"{path}:1: has a zero byte, as in UTF-16; save the file as UTF-8 and run again")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            message = f"{path}:{number}: not UTF-8: found byte 0x{byte:02x}; save the file as UTF-8 and run again"
            raise UserError(message) from None
