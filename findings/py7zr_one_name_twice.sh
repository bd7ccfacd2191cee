#!/usr/bin/env bash
# py7zr gives a second member of the same name another name on the disk, and a suffix that no reader knows.
#
# Versions:  py7zr 1.1.4; beside it zipfile and tarfile of the standard library.
# Expected:  an archive to which a file was added twice, as when a recording is replaced, leaves one file: the later one,
#            as zipfile and tarfile leave it; and asking for one name gives files of that name alone.
# Behaviour: clip.wav holds the earlier bytes, the later ones are in clip.wav_0, though the archive names clip.wav twice
#            and clip.wav_0 never. No warning, no exception; `targets=["clip.wav"]` writes both as well.
# Why it matters: data sets of sounds are published as 7z. A list that names clip.wav trains on the take that was replaced,
#            the mended one is left out by its suffix, and a check that all names of the archive exist passes.
# Output:
OUTPUT='zip: clip.wav=second take
tar: clip.wav=second take
7z, all: clip.wav=first, clip.wav_0=second take
7z, one name: clip.wav=first, clip.wav_0=second take'
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet py7zr==1.1.4
cat > "$folder/twice.py" <<'EOP'
import io, pathlib, sys, tarfile, warnings, zipfile

import py7zr

root, takes = pathlib.Path(sys.argv[1]), (b"first", b"second take")
warnings.simplefilter("ignore")  # zipfile warns of the second name while it writes
with zipfile.ZipFile(root / "a.zip", "w") as archive:
    for take in takes:
        archive.writestr("clip.wav", take)
with tarfile.open(root / "a.tar", "w") as archive:
    for take in takes:
        member = tarfile.TarInfo("clip.wav")
        member.size = len(take)
        archive.addfile(member, io.BytesIO(take))
with py7zr.SevenZipFile(root / "a.7z", "w") as archive:
    for take in takes:
        archive.writestr(take, "clip.wav")


def show(name):
    found = sorted((root / name).iterdir())
    print(f"{name}: " + ", ".join(f"{path.name}={path.read_text()}" for path in found))


zipfile.ZipFile(root / "a.zip").extractall(root / "zip")
tarfile.open(root / "a.tar").extractall(root / "tar", filter="data")
py7zr.SevenZipFile(root / "a.7z").extractall(root / "7z, all")
py7zr.SevenZipFile(root / "a.7z").extract(root / "7z, one name", targets=["clip.wav"])
for name in ("zip", "tar", "7z, all", "7z, one name"):
    show(name)
EOP
found=$("$folder/venv/bin/python" "$folder/twice.py" "$folder")
echo "$found"
[ "$found" = "$OUTPUT" ] || { echo "py7zr behaves otherwise now" >&2; exit 1; }
