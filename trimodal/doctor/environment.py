"""Checks of the doctor: Python, packages, decoders and word vectors. Loads without torch, since it has to say so where
torch cannot be loaded."""

import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from trimodal.config import SAMPLE_RATE_HZ, Config
from trimodal.doctor.findings import Finding

if TYPE_CHECKING:
    import numpy as np
    from packaging.requirements import Requirement

SET_UP = "bash setup_environment.sh"
TORCH = ("torch", "torchvision", "torchaudio")
IMPORTED_AS = {"pyyaml": "yaml", "pillow": "PIL"}
NOT_BY_A_RUN = ("requests", "py7zr", "pyarrow", "transformers")  # of downloads, and of words of the hub
KINDS = ("png", "jpg", "wav", "flac", "mp4")


def python() -> Iterator[Finding]:
    is_tested = (3, 10) <= sys.version_info[:2] <= (3, 13)
    yield Finding("python", "ok" if is_tested else "warn", f"Python {platform.python_version()}",
                  "" if is_tested else f"tested with 3.10 to 3.13; PYTHON=python3.12 {SET_UP}")


def packages() -> Iterator[Finding]:
    """torch and what belongs to it, then all others that requirements.txt names: versions, and whether they load."""
    from packaging.requirements import Requirement

    text = (Path(__file__).resolve().parents[2] / "requirements.txt").read_text(encoding="utf-8")
    named = [Requirement(line) for raw in text.splitlines() if (line := raw.split("#")[0].strip())]
    for title in ("torch", "packages"):
        group = [one for one in named if (one.name in TORCH) == (title == "torch")]
        yield judged(title, group, {one.name: _version(one.name) for one in group})


def judged(title: str, group: "list[Requirement]", versions: dict[str, str]) -> Finding:
    """A group of packages, of which these versions are installed; "" of one that is not."""
    faults = [f"{name} is missing" for name, version in versions.items() if not version]
    if title == "torch" and not faults:
        faults = misfits(versions, {name: importlib.metadata.requires(name) or [] for name in TORCH[1:]})
    faults += [fault for name, version in versions.items() if version and (fault := _import_fault(name))]
    if faults:
        return Finding(title, "fail", "\n".join(faults), SET_UP)
    if other := [f"{name} {version}, not {one.specifier}" for one in group if (name := one.name)
                 and not one.specifier.contains(version := versions[name], prereleases=True)]:
        return Finding(title, "warn", f"other versions than were tested: {'; '.join(other)}", SET_UP)
    return Finding(title, "ok", ", ".join(f"{name} {version}" for name, version in versions.items())
                   if title == "torch" else f"{len(group)} in their tested ranges")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _import_fault(name: str) -> str | None:
    if name in NOT_BY_A_RUN:
        return None
    try:
        importlib.import_module(IMPORTED_AS.get(name, name))
    except Exception as error:  # a binary that does not fit raises nearly anything
        return f"{name} cannot be imported: {' '.join(str(error).split())[:120]}"
    return None


def misfits(versions: Mapping[str, str], requirements: Mapping[str, list[str]]) -> list[str]:
    """Why torch and its companions do not belong together: different builds, or another torch than they ask for in
    their `requirements`."""
    from packaging.requirements import Requirement

    builds = {version.partition("+")[2] for version in versions.values()}
    found = [f"of different builds: {', '.join(' '.join(one) for one in versions.items())}"] if len(builds) > 1 else []
    for name, lines in requirements.items():
        wanted = [one for one in map(Requirement, lines) if one.name == "torch"]
        found += [f"{name} {versions[name]} needs {one}, but torch {versions['torch']} is there" for one in wanted
                  if not one.specifier.contains(versions["torch"], prereleases=True)]
    return found


# ---- decoders ----------------------------------------------------------------------------------------------------


def decoders(folder: Path) -> Iterator[Finding]:
    """A file of each kind, written into `folder` and read by the project's own readers."""
    faults = []
    for kind in KINDS:
        try:
            faults += _read_back(folder / f"probe.{kind}")
        except Exception as error:  # each library raises its own
            faults.append(f"{kind}: {' '.join(str(error).split())[:120]}")
    yield Finding("decoders", "fail" if faults else "ok", "\n".join(faults) or f"{', '.join(KINDS)} are read right",
                  SET_UP if faults else "")


def _read_back(path: Path) -> list[str]:
    import numpy as np

    from trimodal.data.audio import decode_audio
    from trimodal.data.images import decode_image

    picture_HW3 = np.full((32, 32, 3), (200, 120, 40), np.uint8)
    tone_S = (0.25 * np.sin(np.arange(SAMPLE_RATE_HZ // 2) / 5)).astype(np.float32)
    kind, found = path.suffix[1:], []
    _write(path, picture_HW3, tone_S)
    if kind not in ("wav", "flac"):
        read_HW3 = decode_image(path).astype(int)
        found += [] if np.abs(read_HW3 - picture_HW3).max() < 24 else [f"{kind}: its picture has other colours"]
    if kind not in ("png", "jpg"):
        read_S, short = decode_audio(path), len(tone_S) // 2
        power = float((read_S[:short] ** 2).mean() / (tone_S ** 2).mean()) if len(read_S) >= short else 0.0
        found += [] if 0.5 < power < 2 else [f"{kind}: its sound is of another length or loudness"]
    return found


def _write(path: Path, picture_HW3: "np.ndarray", tone_S: "np.ndarray") -> None:
    """The picture, the sound, or a video of both, as the suffix says."""
    import soundfile
    from PIL import Image

    if path.suffix in (".png", ".jpg"):
        Image.fromarray(picture_HW3).save(path)
    elif path.suffix in (".wav", ".flac"):
        soundfile.write(path, tone_S, SAMPLE_RATE_HZ)
    else:
        _write_video(path, picture_HW3, tone_S)


def _write_video(path: Path, picture_HW3: "np.ndarray", tone_S: "np.ndarray") -> None:
    import av

    with av.open(str(path), "w") as container:
        pictures = container.add_stream("mpeg4", rate=10)
        pictures.height, pictures.width = picture_HW3.shape[:2]
        sound = container.add_stream("aac", rate=SAMPLE_RATE_HZ, layout="mono")
        for _ in range(5):
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(picture_HW3, format="rgb24")))
        frame = av.AudioFrame.from_ndarray(tone_S[None], format="fltp", layout="mono")
        frame.sample_rate = SAMPLE_RATE_HZ
        container.mux(sound.encode(frame))
        container.mux([*pictures.encode(None), *sound.encode(None)])


def word_vectors(config: Config) -> Iterator[Finding]:
    """Whether the source of the words is on this machine."""
    from trimodal.data.tokenizer import needs_network

    source = config.model.word_embeddings
    if needs_network(config.model):
        yield Finding("word vectors", "warn", f"{source} is not on this machine yet: it is fetched from the hub",
                      "reach the hub once (HF_ENDPOINT names a mirror), or model.word_embeddings=minilm")
    else:
        yield Finding("word vectors", "ok", f"{source} needs no network")
