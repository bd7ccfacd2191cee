"""The trees that other tools leave: --local links them, --status and --dry-run count them, the readers read them, and
they stay as they are."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import download_datasets
from tests import miniature, trees
from tests.loopback import Loopback
from trimodal import sets as all_sets
from trimodal.config import config_from_dict
from trimodal.download.http import Policy
from trimodal.sets import SOURCES, inventory
from trimodal.sets.base import Source

QUICK = Policy(failures=1, failures_to_connect=0, sleep=lambda seconds: None)


@dataclass(frozen=True)
class Made:
    """A miniature set in the official layout below `true`, what its server has, and its table."""

    name: str
    true: Path
    source: Source
    served: dict[str, bytes]


def move(tree: Path, places: dict[str, str]) -> Path:
    """Put `tree`/KEY to `tree`/VALUE; what is not named goes."""
    old = tree.rename(tree.with_name(f"{tree.name} official"))
    for before, after in places.items():
        for path in sorted(old.glob(before)):
            place = tree / (after.format(name=path.name, folder=path.parent.name))
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)
    shutil.rmtree(old)
    return tree


def flat(tree: Path) -> Path:
    return move(tree, {"annotations/*_*2017.json": "annotations/{name}", "train2017": "train2017",
                       "val2017": "val2017"})


def nested(tree: Path) -> Path:
    return move(tree, {"annotations": "COCO/coco2017/annotations", "train2017": "COCO/coco2017/train2017",
                       "val2017": "COCO/coco2017/val2017"})


def ultralytics(tree: Path) -> Path:
    return move(tree, {"annotations/instances_val2017.json": "annotations/{name}", "train2017": "images/train2017",
                       "val2017": "images/val2017"})


def upper(tree: Path) -> Path:
    """In other cases, unpacked into folders of their own names, by links, with shadows of macOS beside."""
    move(tree, {"annotations": "disk/Annotations", "train2017": "TRAIN2017/train2017", "val2017": "disk/v"})
    (tree / "Val2017").symlink_to("disk/v", target_is_directory=True)
    (tree / "around").symlink_to(tree, target_is_directory=True)
    trees.with_shadows(tree)
    return tree


def unpacked(tree: Path) -> Path:
    return tree


def aac_clotho(tree: Path) -> Path:
    return move(tree, {"*.csv": "data/CLOTHO_v2.1/clotho_csv_files/{name}",
                       **{split: f"data/CLOTHO_v2.1/clotho_audio_files/{split}" for split in trees.CLOTHO}})


def aac_audiocaps(tree: Path) -> Path:
    sounds(tree, "AUDIOCAPS/audio_32000Hz/{split}/{clip}")
    return move(tree, {"AUDIOCAPS": "AUDIOCAPS", "dataset/*.csv": "AUDIOCAPS/csv_files_v1/{name}",
                       "dataset2.0/*.csv": "AUDIOCAPS/csv_files_v2/{name}"})


def by_number(tree: Path) -> Path:
    """audiocaps-download's."""
    sounds(tree, "audiocaps/{split}/{number}")
    return move(tree, {"audiocaps": "audiocaps", "dataset": "dataset", "dataset2.0": "dataset2.0"})


def with_six_digits(tree: Path) -> Path:
    sounds(tree, "all/{video}_{start:06d}")
    return move(tree, {"all": "all", "dataset": "dataset", "dataset2.0": "dataset2.0"})


def with_thousandths(tree: Path) -> Path:
    sounds(tree, "{split}/Y{video}_{start}.000_{end}.000")
    return move(tree, {"t*": "{name}", "val": "val", "dataset": "dataset", "dataset2.0": "dataset2.0"})


def sounds(tree: Path, form: str) -> None:
    """Name all clips by `form`."""
    for split, clips in trees.AUDIOCAPS.items():
        for i, (video, start, name) in enumerate(clips):
            if name:
                number = {"train": 1000, "val": 2000, "test": 3000}[split] + i + 1
                place = tree / "new" / (form.format(split=split, clip=f"{video}_{start}", number=number, video=video,
                                                    start=start, end=start + 10) + Path(name).suffix)
                place.parent.mkdir(parents=True, exist_ok=True)
                (tree / name).rename(place)
    for split in trees.AUDIOCAPS:
        shutil.rmtree(tree / split)
    for path in (tree / "new").iterdir():
        path.rename(tree / path.name)


def speechbrain(tree: Path) -> Path:
    """wav/SPEAKER of both releases in one folder."""
    as_wav(tree)
    return move(tree, {"voxceleb1/wav/id*": "wav/{name}", "voxceleb2/dev/aac/id*": "wav/{name}",
                       "voxceleb2/aac/id*": "wav/{name}", "voxceleb*/*.*": "meta/{name}"})


def trainer(tree: Path) -> Path:
    """voxceleb_trainer's after --convert: wav beside m4a, of the second release without dev and test."""
    as_wav(tree, keep=True)
    return move(tree, {"voxceleb1/wav/id*": "voxceleb1/{name}", "voxceleb2/dev/aac/id*": "voxceleb2/{name}",
                       "voxceleb2/aac/id*": "voxceleb2/{name}", "voxceleb*/*.*": "{name}"})


def as_wav(tree: Path, keep: bool = False) -> None:
    for path in list(tree.rglob("*.m4a")):
        trees.sound(path.with_suffix(".wav"), trees.tone(0.5))
        if not keep:
            path.unlink()


KNOWN: dict[str, tuple[str, Callable[[Path], Path], int]] = {  # name of the tree: set, maker, exit code
    "coco": ("coco", flat, 0), "coco two folders down": ("coco", nested, 0), "ultralytics": ("coco", ultralytics, 0),
    "coco in other cases": ("coco", upper, 0), "clotho": ("clotho", unpacked, 0),
    "aac-datasets clotho": ("clotho", aac_clotho, 0), "aac-datasets audiocaps": ("audiocaps", aac_audiocaps, 3),
    "audiocaps-download": ("audiocaps", by_number, 3), "six digits": ("audiocaps", with_six_digits, 3),
    "thousandths": ("audiocaps", with_thousandths, 3), "speechbrain": ("voxceleb", speechbrain, 0),
    "voxceleb_trainer": ("voxceleb", trainer, 0)}
MAKERS: dict[str, Callable[[Path], tuple[Source, dict[str, bytes]]]] = {
    "coco": miniature.coco, "clotho": miniature.clotho,
    "audiocaps": lambda folder: miniature.audiocaps(folder, shards=True),
    "voxceleb": miniature.voxceleb}
FETCHED = {"coco": ["caption_datasets.zip"], "ultralytics": ["annotations_trainval2017.zip", "caption_datasets.zip"]}


@pytest.fixture(scope="module")
def makes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    found = {}
    for name, make in MAKERS.items():
        folder = tmp_path_factory.mktemp(name)
        source, served = make(folder)
        if name == "voxceleb":
            (folder / "voxceleb/voxceleb1/veri_test2.txt").write_bytes(served["veri_test2.txt"])
        found[name] = Made(name, folder / name, source, served)
    return found


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback() as loopback:
        yield loopback


def state_of(folder: Path) -> dict[str, bytes | str]:
    """All that is below `folder`: bytes of files, targets of links."""
    return {path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else
            path.read_bytes() if path.is_file() else "folder" for path in sorted(folder.rglob("*"))}


def samples(root: Path, name: str) -> dict[str, list[tuple[object, ...]]]:
    config = config_from_dict({"paths": {"data_root": str(root)}})
    return {split: sorted((s.key, s.captions, s.labels, s.speaker, bool(s.image), bool(s.audio))
                          for s in all_sets.read_split(name, split, config)) for split in ("train", "val", "test")}


class Run:
    """The command with --local `own`, on a server that has what is named."""

    def __init__(self, made: Made, server: Loopback, folder: Path) -> None:
        self.made, self.server, self.root = made, server, folder / "my data"
        self.words = ["--datasets", made.name, "--data-root", str(self.root), "--base-url",
                      f"{made.name}={server.url(f'/{made.name}')}"]

    def __call__(self, *words: str) -> int:
        return download_datasets.main([*self.words, *words], table={**SOURCES, self.made.name: self.made.source},
                                      policy=QUICK)

    def serve(self, *names: str) -> None:
        self.server.files = {f"/{self.made.name}/{name}": self.made.served[name] for name in names}

    def asked_for(self) -> list[str]:
        return sorted({name.rpartition("/")[2] for name, _ in self.server.requests})


@pytest.mark.parametrize("tree", KNOWN)
def test_a_known_tree_is_linked_and_read(makes: dict[str, Made], server: Loopback, tmp_path: Path, tree: str,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    name, make, code = KNOWN[tree]
    made = makes[name]
    shutil.copytree(made.true, tmp_path / "disk" / "my copies")
    own = make(tmp_path / "disk" / "my copies")
    before = state_of(own)
    run = Run(made, server, tmp_path)
    fetched = FETCHED.get(tree, [])
    run.serve(*fetched)
    local = ["--local", f"{own}/"]

    for look in ("--status", "--dry-run"):
        assert run(*local, look, "--json") == 0
        (told,) = json.loads(capsys.readouterr().out)["sets"]
        assert told["bytes_to_fetch"] == sum(len(made.served[one]) for one in fetched)
        assert not (run.root / name).exists() and server.requests == []
    assert run(*local) == code, capsys.readouterr()
    assert run.asked_for() == sorted(fetched)
    assert samples(run.root, name) == samples(made.true.parent, name)
    assert state_of(own) == before
    marker = inventory.read_marker(run.root / name)
    assert marker["linked"] and str(own) in marker["linked_from"]
    assert all((run.root / name / place).exists() for place in marker["linked"])

    for again in ([], local, ["--skip-existing"]):
        was = state_of(run.root)
        assert run(*again) == code
        assert state_of(run.root) == was and state_of(own) == before
    assert run.asked_for() == sorted(fetched)
    assert run("--status", "--json") == 0
    (told,) = json.loads(capsys.readouterr().out.splitlines()[-1])["sets"]
    assert told["bytes_to_fetch"] == 0 and told["files"] > 10
