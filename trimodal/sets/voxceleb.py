"""VoxCeleb 1 and 2: speech by speaker, without captions.

On the disk SPEAKER/VIDEO/UTTERANCE, of VoxCeleb 1 as wav, of VoxCeleb 2 as m4a, wav and video, one form or several.
"""

import heapq
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from trimodal.config import Config
from trimodal.data.samples import SPLITS, Sample, stable_hash
from trimodal.errors import UserError, counted
from trimodal.sets import inventory
from trimodal.sets.base import GB, HF_HOST, Choose, Copies, Count, DataSet, File, FileList, Item, Source, Trials, rank
from trimodal.sets.reading import download_command, folders_in, rows

FORMS = {"mp4": (".mp4",), "aac": (".m4a", ".wav"), "wav": (".wav", ".m4a")}  # of VoxCeleb 2: what each folder holds
TEST_SPEAKERS = frozenset(f"id{number}" for number in range(10270, 10310))  # of VoxCeleb 1
SIDES = {"1": "train", "2": "val"}  # of iden_split.txt; "3" tests identification of known speakers: on no side here
BY_SPEAKER = 10  # recordings of a speaker at most in a small start, so that there are several

_log = logging.getLogger(__name__)


# ---- where it comes from -----------------------------------------------------------------------------------------

_KEYED = "https://cn01.mmai.io/download/voxceleb?key={key}&file="
_HF = HF_HOST + "/datasets/ProgramComputer/voxceleb/resolve/b8a8825c87582831cc217b6ff84a36558ced84d6"
_LISTS = "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/meta/"
_KAIST = "https://mm.kaist.ac.kr/datasets/voxceleb/"
_PART_SIZE = 10_737_418_240


def _file(generation: int, name: str, size: int = 0, md5: str = "", sha256: str = "") -> File:
    return File(name=name, size=size, md5=md5, sha256=sha256, urls=(
        ("official", _KEYED + name), ("hf", f"{_HF}/vox{generation}/{name}")))


def _list(file: File, generation: int = 1, subset: str = "vox1", with_links_to: str = "") -> Item:
    return Item(name=file.name, kind="plain", into=f"voxceleb{generation}/{file.name}", files=(file,), subset=subset,
                unpacked=file.size, with_links_to=with_links_to)


def _trials(name: str, lines: int, md5: str = "", subset: str = "vox1") -> Item:
    return _list(File(name=name, urls=(("official", _LISTS + name),), lines=lines, md5=md5), subset=subset)


def _is_test(path: str) -> bool:
    return path.split("/")[0] in TEST_SPEAKERS


def _is_training(path: str) -> bool:
    return not _is_test(path)


_VOX1_PARTS = (
    ("aa", "e395d020928bc15670b570a21695ed96", "21ec6ca843659ebc2fdbe04b530baa4f191ad4b0971912672d92c158f32226a0"),
    ("ab", "bbfaaccefab65d82b21903e81a8a8020", "311d21e0c8cbf33573a4fce6c80e5a279d80736274b381c394319fc557159a04"),
    ("ac", "017d579a2a96a077f40042ec33e51512", "92b64465f2b2a3dc0e4196ae8dd6828cbe9ddd1f089419a11e4cbfe2e1750df0"),
    ("ad", "7bb1e9f70fddc7a678fa998ea8b3ba19", "00e6190c770b27f27d2a3dd26ee15596b17066b715ac111906861a7d09a211a5"))
_VOX2_PARTS = (
    ("aa", _PART_SIZE, "da070494c573e5c0564b1d11c3b20577"), ("ab", _PART_SIZE, "17fe6dab2b32b48abaf1676429cdd06f"),
    ("ac", _PART_SIZE, "1de58e086c5edf63625af1cb6d831528"), ("ad", _PART_SIZE, "5a043eb03e15c5a918ee6a52aad477f9"),
    ("ae", _PART_SIZE, "cea401b624983e2d0b2a87fb5d59aa60"), ("af", _PART_SIZE, "fc886d9ba90ab88e7880ee98effd6ae9"),
    ("ag", _PART_SIZE, "d160ecc3f6ee3eed54d55349531cb42e"), ("ah", 2_315_355_528, "6b84a81b9af72a9d9eecbb3b1f602e65"))

ITEMS = (
    _list(File(
        name="vox1_meta.csv", lines=1_251, sha256="48bcb2f0024cae5d4ccf37e4480f686afb1161c5793a2a9a4c670c0e8dab0892",
        also_good=("md5:f5067cae5157ca27904c4b0a926e2661",),
        urls=(("hf", f"{_HF}/vox1/vox1_meta.csv"),
              ("official", "https://www.openslr.org/resources/49/vox1_meta.csv"),
              ("official", f"{_KAIST}meta/vox1_meta.csv")))),
    _trials("iden_split.txt", 153_516),
    _list(File(
        name="veri_test.txt", size=2_338_640, lines=37_720, md5="29fc7cc1c5d59f0816dc15d6e8be60f7",
        sha256="303b2b657042a27bf465d4c8aa84e12765373cdc01046665241ccd5783bd5976",
        urls=(("official", _LISTS + "veri_test.txt"),  # OpenSLR's "v2" is this list, not the cleaned one
              ("official", "https://www.openslr.org/resources/49/voxceleb1_test_v2.txt")))),
    _trials("veri_test2.txt", 37_611, "b73110731c9223c1461fe49cb48dddfc"),
    _trials("list_test_hard.txt", 552_536, "21c341b6b2168eea2634df0fb4b8fff1", "vox1-trials"),
    _trials("list_test_hard2.txt", 550_894, "857790e09d579a68eb2e339a090343c8", "vox1-trials"),
    _trials("list_test_all.txt", 581_480, "b9ecf7aa49d4b656aa927a8092844e4a", "vox1-trials"),
    _trials("list_test_all2.txt", 579_818, "a53e059deb562ffcfc092bf5d90d9f3a", "vox1-trials"),
    Item(name="vox1_test_wav.zip", kind="zip", into="voxceleb1", subset="vox1", unpacked=1_100_000_000,
         splits=("test",), files=(_file(1, "vox1_test_wav.zip", 1_072_793_438, "185fdc63c3c739954633d50379a3d102",
                                        "8de57f347fe22b2c24526e9f444f689ecf5096fc2a92018cf420ff6b5b15eaea"),),
         counts=(Count(folder="voxceleb1/wav", suffix=".wav", number=4_874, holds=_is_test),)),
    Item(name="vox1_dev_wav.zip", kind="zip", into="voxceleb1", subset="vox1", unpacked=34 * GB,
         splits=("train", "val"), whole_md5="ae63e55b951748cc486645f532ba230b",
         files=tuple(_file(1, f"vox1_dev_wav_part{part}", 0, md5, sha) for part, md5, sha in _VOX1_PARTS),
         counts=(Count(folder="voxceleb1/wav", suffix=".wav", number=148_642,
                       holds=_is_training),)),
    _list(File(
        name="vox2_meta.csv", size=159_126, lines=6_114,
        sha256="9a4f437fcf78b8030e597941703ab82a4d1af314f6eba3952afafe8a3664bd1b",
        urls=(("hf", f"{_HF}/vox2/vox2_meta.csv"), ("official", f"{_KAIST}meta/vox2_meta.csv"))), 2, "vox2-aac",
        with_links_to="voxceleb2"),
    Item(name="vox2_test_aac.zip", kind="zip", into="voxceleb2/test", subset="vox2-aac", unpacked=2_600_000_000,
         splits=("test",), files=(_file(2, "vox2_test_aac.zip", 2_594_018_146, "0d2b3ea430a821c33263b5ea37ede312",
                                        "e4d9200107a7bc60f0b620d5dc04c3aab66681b649f9c218380ac43c6c722079"),),
         counts=(Count(folder="voxceleb2/test/aac", suffix=".m4a", number=36_237,
                       instead=(("voxceleb2/test/wav", ".wav"),)),)),
    Item(name="vox2_dev_aac.zip", kind="zip", into="voxceleb2", subset="vox2-aac", unpacked=80 * GB,
         splits=("train", "val"), whole_md5="bbc063c46078a602ca71605645c2a402",
         files=tuple(_file(2, f"vox2_dev_aac_part{part}", size, md5) for part, size, md5 in _VOX2_PARTS),
         counts=(Count(folder="voxceleb2/dev/aac", suffix=".m4a", number=1_092_009,
                       instead=(("voxceleb2/dev/wav", ".wav"),)),)),
    # No digest of the video parts is published: the CRC of every member of the zip is what can be checked.
    Item(name="vox2_test_mp4.zip", kind="zip", into="voxceleb2/test", subset="vox2-mp4", unpacked=9 * GB,
         splits=("test",), files=(_file(2, "vox2_test_mp4.zip"),),
         counts=(Count(folder="voxceleb2/test/mp4", suffix=".mp4"),)),
    Item(name="vox2_dev_mp4.zip", kind="zip", into="voxceleb2", subset="vox2-mp4", unpacked=255 * GB,
         splits=("train", "val"), counts=(Count(folder="voxceleb2/dev/mp4", suffix=".mp4"),),
         files=tuple(_file(2, f"vox2_dev_mp4_parta{letter}") for letter in "abcdefghi")),
)
TRIALS = Trials(  # cleaned Vox1-O first; the figures of papers are on either. The others are of all speakers
    lists=tuple(f"{folder}/{name}" for name in (
        "veri_test2.txt", "veri_test.txt", "voxceleb1_test_v2.txt", "list_test_all2.txt", "list_test_all.txt",
        "list_test_hard2.txt", "list_test_hard.txt")
        for folder in ("voxceleb1", ".", "voxceleb2", "meta", "metadata", "voxceleb1/meta", "voxceleb1/metadata")),
    key=lambda name: f"vox1/{os.path.splitext(name)[0]}")


# ---- on the disk -------------------------------------------------------------------------------------------------


def recordings(part: Path) -> Iterator[tuple[str, str, str, str]]:
    """(speaker, "speaker/video/utterance", path of the video or "", path of the sound) of each utterance below one or
    more of `part`/{mp4,aac,wav}, once. The sound is wav where there is one, else m4a, else that of the video."""
    folders = [(os.path.join(part, form, ""), suffixes) for form, suffixes in FORMS.items() if (part / form).is_dir()]
    for place, (folder, suffixes) in enumerate(folders):
        for speaker, name in utterances(Path(folder), suffixes):
            stem, suffix = os.path.splitext(name)
            if not _first(folders[:place], stem):
                video = folder + name if suffix == ".mp4" else ""
                yield speaker, stem, video, _first(folders[:place:-1], stem) or folder + name


def utterances(folder: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(speaker, "speaker/video/utterance.suffix") in order, one speaker's folder in memory at a time. Of files that
    differ in their suffix alone the one whose suffix stands first in `suffixes` is taken."""
    for speaker in _names(folder):
        for video in _names(folder / speaker):
            there = set(_names(folder / speaker / video))
            for name in sorted(there):
                stem, suffix = os.path.splitext(name)
                if suffix in suffixes and not any(stem + other in there for other in suffixes[:suffixes.index(suffix)]):
                    yield speaker, f"{speaker}/{video}/{name}"


def _first(folders: Iterable[tuple[str, tuple[str, ...]]], stem: str) -> str:
    paths = (folder + stem + suffix for folder, suffixes in folders for suffix in suffixes)
    return next(filter(os.path.exists, paths), "")


def _names(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not inventory.is_hidden(name)) if folder.is_dir() else []


def _sides(path: Path) -> dict[str, str]:
    """Name of each recording -> its side in iden_split.txt, "" for none here."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {name: SIDES.get(number, "") for number, _, name in (line.partition(" ") for line in lines)}


def _lists(splits: Collection[str]) -> list[FileList]:
    if not set(SPLITS) <= set(splits):
        return []
    return [FileList(place="voxceleb1/wav", path="voxceleb1/iden_split.txt", names=_sides)]


def training_files(folder: Path) -> Iterator[str]:
    """Recordings of training speakers, without a look into the metadata."""
    first = folder / "voxceleb1"
    if (first / "iden_split.txt").is_file():
        names: Iterable[str] = (name for name, side in _sides(first / "iden_split.txt").items() if side == "train")
    else:
        names = (name for _, name in utterances(first / "wav", (".wav",)))
    if (first / "wav").is_dir():
        yield from (name for name in names if not _is_test(name) and (first / "wav" / name).is_file())
    yield from (stem for _, stem, _, _ in recordings(folder / "voxceleb2/dev"))


def _sample(folder: Path, number: int) -> Choose:
    """`number` recordings of as few speakers as BY_SPEAKER allows."""
    def choose(names: Iterable[str]) -> set[str]:
        speakers: dict[str, list[str]] = {}
        for name in names:
            speakers.setdefault(name.rsplit("/", 2)[0], []).append(name)
        few = (name for speaker in sorted(speakers, key=rank)
               for name in heapq.nsmallest(BY_SPEAKER, speakers[speaker]))
        return set(itertools.islice(few, number))

    return choose


# ---- copies of other tools ---------------------------------------------------------------------------------------

SPEAKER = re.compile(r"id(\d{5})")
DEEPEST = 4  # folders between the given one and those of speakers
_TEST_FOLDER = re.compile(r"(^|[_-])test([_-]|$)")
_FORM_OF = {".wav": "wav", ".m4a": "aac", ".mp4": "mp4"}


def _find_copies(local: Path, lists: Sequence[tuple[str, Path]]) -> Copies:
    """Each speaker's folder below `local`, to voxceleb1/wav or voxceleb2/{dev,test}/{aac,wav,mp4}; the number of
    speakers by place. Generation and part follow from the number and what the folders are called."""
    links: dict[str, Path] = {}
    without: dict[str, list[Path]] = {}
    unread: list[str] = []
    for speaker in _speaker_folders(local, DEEPEST, unread):
        place, why = _place_of(speaker, local)
        if place:
            links.setdefault(f"{place}/{speaker.name}", speaker)
        else:
            without.setdefault(why, []).append(speaker)
    numbers = sorted(Counter(place.rpartition("/")[0] for place in links).items())
    return Copies(links=tuple((source, place) for place, source in links.items()), numbers=dict(numbers),
                  left_out=(*(f"{counted(len(found), 'speaker')}, as {found[0]}: {why}"
                              for why, found in without.items()),
                            *unread))


def _speaker_folders(folder: Path, depth: int, unread: list[str]) -> Iterator[Path]:
    below = folders_in(folder, None if depth == DEEPEST else unread)
    speakers = [entry for entry in below if SPEAKER.fullmatch(entry.name)]
    yield from speakers
    for entry in below if depth and not speakers else ():
        yield from _speaker_folders(entry, depth - 1, unread)


def _place_of(speaker: Path, local: Path) -> tuple[str, str]:
    """(place of the speaker's folder, ""), or ("", why it is left out), by the first video that has any sound."""
    is_first = int(speaker.name[2:]) > 10_000  # VoxCeleb 1 is id10001 to id11251, VoxCeleb 2 ends at id09272
    suffixes = next((found for video in folders_in(speaker) if (found := _suffixes(video))), Counter[str]())
    if is_first:
        return ("voxceleb1/wav", "") if suffixes[".wav"] else ("", "of VoxCeleb 1 only SPEAKER/VIDEO/FILE.wav is read")
    if not suffixes:
        return "", "no SPEAKER/VIDEO/FILE that ends in .wav, .m4a or .mp4"
    form = max(_FORM_OF, key=lambda suffix: suffixes[suffix])  # of equally many the first: wav
    part = "test" if any(_TEST_FOLDER.search(step) for step in speaker.relative_to(local.parent).parts) else "dev"
    return f"voxceleb2/{part}/{_FORM_OF[form]}", ""


def _suffixes(video: Path) -> Counter[str]:
    return Counter(suffix for name in _names(video) if (suffix := os.path.splitext(name)[1]) in _FORM_OF)


# ---- reading -----------------------------------------------------------------------------------------------------


def _read(root: Path, splits: Sequence[str], config: Config) -> Iterator[Sample]:
    """Test is every recording of the test speakers (verification: Vox1-O of VoxCeleb 1, the test set of VoxCeleb 2),
    whom train and val never hear. Val is the second part of iden_split.txt (VoxCeleb 1) or 5 % of the videos (VoxCeleb
    2, or where that list is missing), of speakers known from train. Video gives a picture as well as the sound; of what
    is there the sound is taken from wav, else m4a, else mp4."""
    for split in splits:
        samples = itertools.chain(_read_vox1(root / "voxceleb1", split), _read_vox2(root / "voxceleb2", split))
        first = next(samples, None)
        if first is None and split == "train":
            raise UserError(f"{root}: no voxceleb1/wav/ID/VIDEO/*.wav nor voxceleb2/dev/{{aac,wav,mp4}}/ID/VIDEO/* of "
                            f"training speakers; get them with: {download_command('voxceleb', config)}")
        yield from itertools.chain([first] if first else [], samples)


def _read_vox1(root: Path, split: str) -> Iterator[Sample]:
    if not (root / "wav").is_dir():
        return
    listed: dict[str, str] = {}
    if (root / "iden_split.txt").is_file():
        listed = _sides(root / "iden_split.txt")
    else:
        _log.warning("voxceleb: %s is not there; 5 %% of the videos are val instead", root / "iden_split.txt")
    testers = TEST_SPEAKERS | _test_speakers(root / "vox1_meta.csv", "\t")
    for speaker, name in utterances(root / "wav", (".wav",)):
        side = "test" if speaker in testers else listed.get(name, "") if listed else _side_of_video(name)
        if side == split:
            yield Sample(key=f"vox1/{os.path.splitext(name)[0]}", source="voxceleb", split=split, speaker=speaker,
                         audio=os.path.join(root, "wav", name))


def _read_vox2(root: Path, split: str) -> Iterator[Sample]:
    testers = _test_speakers(root / "vox2_meta.csv", ",")
    for part in ("dev", "test" if (root / "test").is_dir() else ""):  # the test archives lack a folder test/
        for speaker, stem, image, audio in recordings(root / part):
            side = "test" if part != "dev" or speaker in testers else _side_of_video(stem)
            if side == split:
                yield Sample(key=f"vox2/{stem}", source="voxceleb", split=split, image=image, audio=audio,
                             speaker=speaker)


def _side_of_video(name: str) -> str:
    return "val" if stable_hash(name.rpartition("/")[0]) % 20 == 0 else "train"


def _test_speakers(path: Path, delimiter: str) -> frozenset[str]:
    """Speakers (first column) whose set is test. Values are padded in one edition, and one copy says "testo"."""
    if not path.is_file():
        return frozenset()
    return frozenset(next(iter(row.values())).strip() for row in rows(path, ("Set",), delimiter=delimiter)
                     if row["Set"].strip().startswith("test"))


_LICENCE = "metadata CC BY-SA 4.0, recordings CC BY 4.0; their copyright stays with the owners of the videos"
SET = DataSet(
    name="voxceleb", order=4, licence=_LICENCE, read=_read, english=False, trials=TRIALS,
    speakers=7_205,  # training speakers of both releases
    splits="development speakers, recordings of the same speakers kept back, test speakers",
    source=Source(
        name="voxceleb", title="VoxCeleb 1 and 2", page=_KAIST, licence=_LICENCE, items=ITEMS, defaults=("vox1",),
        needs_key="VOXCELEB_KEY", auto_mirrors=("official",), recipe="recipes/speakers.yaml",
        key_help="ask for a personal key at https://cn01.mmai.io/keyreq/voxceleb, then set the environment variable "
                 "VOXCELEB_KEY; or name what you already have: --local FOLDER",
        note="default: VoxCeleb 1 (sound only, 34 GB). --also voxceleb:vox2-aac adds 80 GB of sound, voxceleb:vox2-mp4 "
             "255 GB of video. --mirror hf is a third party's copy with the official digests: its lawfulness is yours "
             "to judge",
        lists=_lists, training_files=training_files, sample=_sample, find_copies=_find_copies))
