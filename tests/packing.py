"""Makes archives for tests: good ones, and those that no unpacker should follow."""

import io
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path


def zip_of(files: Mapping[str, bytes], *, links: Mapping[str, str] | None = None,
           compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = compression
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(info, data)
        for name, target in (links or {}).items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, target)
    return out.getvalue()


def tar_of(files: Mapping[str, bytes], *, links: Mapping[str, tuple[bytes, str]] | None = None,
           compression: str = "gz") -> bytes:
    """`links` maps a name to (type of tar entry, target)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{compression}") as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, (kind, target) in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    return out.getvalue()


def deb_of(files: Mapping[str, bytes], compression: str = "xz") -> bytes:
    """A Debian package: an `ar` of a version, a control tarball and the data, the first two with odd lengths."""
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": lzma.compress(b"control"),
             f"data.tar.{compression}": tar_of(files, compression=compression)}
    parts["control.tar.xz"] += b"x" * (1 - len(parts["control.tar.xz"]) % 2)
    out = b"!<arch>\n"
    for name, data in parts.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n"
        out += header.encode() + data + b"\n" * (len(data) % 2)
    return out


def seven_zip_of(folder: Path, path: Path) -> bytes:
    """A 7z archive, written to `path`, of what is in `folder`, links as links."""
    import py7zr

    with py7zr.SevenZipFile(path, "w") as archive:
        for source in sorted(folder.rglob("*")):
            archive.write(source, source.relative_to(folder).as_posix())
    return path.read_bytes()


def seven_zip_with_name(written: str, shown: str, path: Path) -> None:
    """A 7z archive of one file, whose name is then patched in the (plain) header to one that no packer would write."""
    import py7zr

    assert len(written) == len(shown)
    with py7zr.SevenZipFile(path, "w") as archive:
        archive.set_encoded_header_mode(False)
        archive.writestr(b"data", written)
    data = path.read_bytes().replace(written.encode("utf-16-le"), shown.encode("utf-16-le"))
    offset, size = struct.unpack_from("<QQ", data, 12)
    start = struct.pack("<QQI", offset, size, zlib.crc32(data[32 + offset: 32 + offset + size]))
    path.write_bytes(data[:8] + struct.pack("<I", zlib.crc32(start)) + start + data[32:])
