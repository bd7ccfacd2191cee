#!/usr/bin/env bash
# PyAV cannot list a frame's side data where FFmpeg attaches a kind that PyAV does not know: one photograph's EXIF hides
# the display matrix beside it.
#
# Versions:  av 18.1.0 (FFmpeg 8 inside), Pillow 13.0.0.
# Expected:  frame.side_data holds what PyAV knows and passes over the rest; looking for one kind by name gives it or None.
# Behaviour: a JPEG with EXIF, decoded by FFmpeg: side_data raises ValueError ("31 is not a valid Type"), whatever is
#            asked of it. The matrix is there: frame.rotation reads it. Without EXIF side_data is empty.
# Why it matters: rotation alone does not tell a mirrored picture; whoever reads the matrix itself, to show it as
#            players do, gets an exception in place of it for frames whose pixels decode well.
# Output:
OUTPUT='without EXIF: 0 entries, rotation 0
with EXIF: ValueError, rotation -90'
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet av==18.1.0 pillow==13.0.0 numpy
cat > "$folder/side_data.py" <<'EOP'
import sys

import av
from PIL import Image

picture, exif = Image.new("RGB", (48, 32), (200, 30, 30)), Image.Exif()
exif[274] = 6
for name, given in (("without EXIF", {}), ("with EXIF", {"exif": exif})):
    path = f"{sys.argv[1]}/{name.replace(' ', '_')}.jpg"
    picture.save(path, **given)
    with av.open(path) as container:
        frame = next(container.decode(video=0))
        try:
            told = f"{len(list(frame.side_data))} entries"
        except ValueError:
            told = "ValueError"
        print(f"{name}: {told}, rotation {frame.rotation}")
EOP
found=$("$folder/venv/bin/python" "$folder/side_data.py" "$folder")
echo "$found"
[ "$found" = "$OUTPUT" ] || { echo "PyAV behaves otherwise now" >&2; exit 1; }
