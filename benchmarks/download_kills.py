"""Is a download that was killed as good as one that nobody stopped?

    python benchmarks/download_kills.py [--kills 100]

SIGKILL at random moments of `download_datasets.py --datasets all` on served miniatures of all four sets (zip, zip in
parts, 7z, parquet, lists), over and over until it is through; then every file, list and marker is compared, byte for
byte, with those of an undisturbed download. The table tells what was under way at the kills. The first difference ends
the benchmark.
"""

import argparse
import os
import sys
import tempfile
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from tests.download_killing import killed_downloads, serve, undisturbed
from tests.loopback import Loopback


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    args = parser.parse_args(argv)
    runs = done = 0
    with tempfile.TemporaryDirectory() as place, Loopback() as server, tqdm(total=args.kills, disable=None) as bar:
        server.slow_s = 0.03
        served = serve(Path(place, "true"), server)
        whole = undisturbed(served, Path(place, "whole"))
        for done in killed_downloads(served, whole, Path(place), args.kills):
            runs += 1
            bar.update(done - bar.n)
            print(f"download {runs}: the same bytes after {done} kills so far", flush=True)
    print(f"{date.today()}, {os.cpu_count()} cores; {len(whole):,} files")
    print(f"{'under way at the kill':<24}  kills")
    for moment, number in served.moments.most_common():
        print(f"{moment:<24}  {number:>5}")
    print(f"{done} kills over {runs} downloads, each ended with the same bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
