"""The pictures of the manuals: TensorBoard, the report's page and the search page of a run of recipes/synthetic.yaml.

    python benchmarks/screenshots.py [--out docs/pictures] [--browser /usr/bin/chromium]

The run is that of outputs/synthetic; where it is missing, the recipe is trained first (5 minutes on two cores). All
that is to be seen is generated data. Needs playwright and Chromium.
"""

import argparse
import contextlib
import io
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import soundfile
from PIL import Image

from trimodal.config import SAMPLE_RATE_HZ
from trimodal.data.generated import combination_of, generate_image, generate_sound
from trimodal.sets import synthetic

ROOT = Path(__file__).resolve().parent.parent
RUN = Path("outputs", "synthetic")  # where the recipe writes
MAP = "#map"  # of the report's page
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")
WIDTH, HEIGHT = 1280, 800
MOST_BYTES = 200_000
QUERY = "a large red circle at the center on a white background"
WAIT_S = 60


def command(*words: str | Path) -> None:
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)


@contextlib.contextmanager
def serving(*words: str | Path) -> Iterator[str]:
    """The address that a server prints, until the end of the block."""
    with tempfile.TemporaryFile("w+") as told:
        server = subprocess.Popen([sys.executable, "-u", *map(str, words)], cwd=ROOT, stdout=told, stderr=told)
        try:
            for _ in range(10 * WAIT_S):
                told.seek(0)
                if found := re.search(r"http://(127\.0\.0\.1|localhost):\d+/", text := told.read()):
                    yield found[0]
                    return
                if server.poll() is not None:
                    raise RuntimeError(text)
                time.sleep(0.1)
            raise RuntimeError(f"no address within {WAIT_S} s: {text}")
        finally:
            server.terminate()
            server.wait()


def write_files(folder: Path) -> None:
    """The generated test samples as files, for the search page."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for sample in synthetic.read("test"):
        if sample.image:
            pixels = generate_image(combination_of(sample.image), 192, rng)
            Image.fromarray(pixels).save(folder / f"{sample.captions[0]}.png")
        elif sample.audio:
            soundfile.write(folder / f"{sample.captions[0]}.wav", generate_sound(combination_of(sample.audio), rng),
                            SAMPLE_RATE_HZ)


class Camera:
    """Pictures of what a browser shows, as WebP."""

    def __init__(self, browser: Any, out: Path):
        self.out = out
        self.page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light", locale="en-US")

    def shoot(self, name: str, address: str, ready: str, before: Callable[[Any], Any] = lambda page: None,
              settle_s: float = 1.0) -> None:
        """Open an address, wait until `ready` (a selector) is shown, do what is asked, and keep what is to be seen."""
        self.page.goto(address)
        before(self.page)
        self.page.locator(ready).first.wait_for(timeout=1e3 * WAIT_S)
        time.sleep(settle_s)
        picture = Image.open(io.BytesIO(self.page.screenshot()))
        path = self.out / f"{name}.webp"
        picture.save(path, "WEBP", quality=80, method=6)
        if path.stat().st_size > MOST_BYTES:
            raise RuntimeError(f"{path}: {path.stat().st_size:,} bytes, over {MOST_BYTES:,}")
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB", flush=True)


def shoot_all(camera: Camera, work: Path) -> None:
    """All pictures; paths are named from the project's folder, since some are to be seen."""
    report = max((ROOT / RUN / "reports").glob("report_*.html")).as_uri()
    camera.shoot("report", report, "svg", lambda page: page.locator(MAP).first.evaluate(
        "element => element.scrollIntoView()"))
    with serving("-m", "tensorboard.main", "--logdir", RUN / "logs" / "tensorboard", "--port", "0", "--host",
                 "127.0.0.1") as address:
        light = f"{address}?darkMode=false"
        camera.shoot("tensorboard_charts", f"{light}#custom_scalars", "tf-custom-scalar-multi-line-chart-card svg",
                     settle_s=6)
        camera.shoot("tensorboard_projector", f"{light}#projector", "iframe", lambda page: page.reload(), settle_s=20)
    write_files(work / "files")
    command("search.py", "index", work / "files", "--checkpoint", RUN, "--index", work / "index")
    with serving("search.py", "serve", "--index", work / "index", "--port", "0") as address:
        def ask(page: Any) -> None:
            page.fill("#text", QUERY)
            page.press("#text", "Enter")

        camera.shoot("search", address, "#image img", ask, settle_s=3)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures")
    parser.add_argument("--browser", default="/usr/bin/chromium", help="program of Chromium")
    options = parser.parse_args(argv)
    from playwright.sync_api import sync_playwright

    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        if not any((ROOT / RUN / "reports").glob("report_*.html")):
            command("run_training.py", "--config", "recipes/synthetic.yaml")
        browser = playwright.chromium.launch(executable_path=options.browser, args=FLAGS)
        shoot_all(Camera(browser, options.out), Path(folder))
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
