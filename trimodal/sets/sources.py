"""Where each data set comes from, as data: addresses in order, bytes, digests, licence, contents, expected counts.

Nothing here touches a network or a disk. Sizes are bytes, 0 where none is published; digests are lower-case hex. An
address is a pair (mirror, URL); URLs of the mirror "hf" follow HF_ENDPOINT, "{key}" stands for the user's key, and
"apt:PACKAGE=VERSION" is fetched by the system's package tool.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

MIRRORS = ("auto", "official", "hf", "hf-mirror", "modelscope")
HF_HOST = "https://huggingface.co"
NEEDS_NOTHING = {
    "synthetic": "drawn while training; there is nothing to download",
    "manifest": "your own files, listed in data.manifest; there is nothing to download",
}
ALL = ("coco", "clotho", "audiocaps", "voxceleb")  # what `--datasets all` means

GB = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file on one or more servers. `md5` stands in where no `sha256` is published."""

    name: str
    urls: tuple[tuple[str, str], ...]
    size: int = 0
    sha256: str = ""
    md5: str = ""
    also_good: tuple[str, ...] = ()  # "md5:..." or "sha256:..." of other editions of the same list
    lines: int = 0  # rows of a list, less the header of a csv file; looked at where no digest is known


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """After unpacking, `folder` (and what is below it) holds `number` files that end in `suffix` (0: not published).
    `instead`: (folder, suffix) of the same files in another form, which other tools make of them."""

    folder: str
    suffix: str
    number: int = 0
    instead: tuple[tuple[str, str], ...] = ()

    @property
    def places(self) -> tuple[tuple[str, str], ...]:
        """(folder, suffix) of each form."""
        return ((self.folder, self.suffix), *self.instead)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """How the rows of a parquet table hold files: the columns to read, and what gives the (name, bytes) of a row's."""

    columns: tuple[str, ...]
    file_of: Callable[[dict[str, Any]], tuple[str, bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One thing to have: a plain file, or an archive (in one or more parts) and what becomes of it.

    `into` is the path of a plain file, or the folder that an archive is unpacked into, below the set's folder.
    `rules` name what is taken out of the archive: (leading folders or file name, where it goes below `into`), with
    `*` for any one folder. No rules: everything, as it stands.
    """

    name: str
    kind: str  # plain, zip, tar, deb, 7z or parquet
    into: str
    files: tuple[File, ...]
    subset: str = ""
    splits: tuple[str, ...] = ()  # whose samples it holds; () for what all need
    rules: tuple[tuple[str, str], ...] = ()
    rows: Rows | None = None  # of a parquet table
    counts: tuple[Count, ...] = ()
    unpacked: int = 0  # bytes, estimated where no figure is known
    needed: tuple[str, ...] = ()  # files below the set's folder that are enough, where somebody else unpacked it
    whole_md5: str = ""  # of the parts put together, as some people keep them

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A data set. `defaults` are the subsets fetched unless `--also NAME:SUBSET` adds others."""

    name: str
    title: str
    page: str
    licence: str
    items: tuple[Item, ...]
    defaults: tuple[str, ...]
    one_of: bool = False  # the items are alternatives: the first that can be had is enough
    partly: tuple[Count, ...] = ()  # what would be complete; a set that falls short of these is of use all the same
    needs_key: str = ""  # environment variable that holds the user's key
    key_help: str = ""
    auto_mirrors: tuple[str, ...] = ("official", "hf", "modelscope")  # third-party copies can be left out here
    at_once: int = 4  # transfers at a time that the servers bear
    note: str = ""

    @property
    def subsets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(item.subset for item in self.items))

    def select(self, also: Iterable[str] = ()) -> tuple[Item, ...]:
        """The items of the default subsets and of those named in `also`, in the order of the table."""
        wanted = {*self.defaults, *also}
        return tuple(item for item in self.items if item.subset in wanted)


# --- COCO ------------------------------------------------------------------------------------------------------------
# The official host answers https with another host's certificate: plain http plus a pinned digest is the official form.

_COCO_MODELSCOPE = "https://www.modelscope.cn/datasets/PAI/COCO2017/resolve/5466a7f1944225fcddb1896006508cad5be27b5b"
_COCO_HF = HF_HOST + "/datasets/pcuenq/coco-2017-mirror/resolve/main"
_MIRRORED = ("train2017.zip", "val2017.zip", "annotations_trainval2017.zip")


def _coco(path: str, subset: str, size: int, sha256: str, md5: str, *counts: tuple[str, str, int],
          unpacked: int = 0) -> Item:
    name = path.rsplit("/", 1)[-1]
    urls = [("official", f"http://images.cocodataset.org/{path}"),
            ("official", f"https://s3.amazonaws.com/images.cocodataset.org/{path}")]
    if name in _MIRRORED:
        urls += [("hf", f"{_COCO_HF}/{name}"), ("modelscope", f"{_COCO_MODELSCOPE}/{name}")]
    if name == "train2017.zip":
        urls.append(("hf", f"{HF_HOST}/datasets/BoyangZ/coco_train_2017/resolve/main/{name}"))
    file = File(name=name, urls=tuple(urls), size=size, sha256=sha256, md5=md5)
    return Item(name=name, kind="zip", into="", files=(file,), subset=subset, unpacked=unpacked or size,
                counts=tuple(Count(folder=f, suffix=s, number=n) for f, s, n in counts))


_KARPATHY = Item(
    name="caption_datasets.zip", kind="zip", into="annotations", subset="karpathy", unpacked=150_000_000,
    needed=("annotations/dataset_coco.json",),
    rules=(("dataset_coco.json", "dataset_coco.json"), ("*/dataset_coco.json", "dataset_coco.json")),
    files=(File(
        name="caption_datasets.zip", size=36_745_453,
        sha256="4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817",
        urls=(("official", "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"),
              ("hf", HF_HOST + "/datasets/gpantaz/karpathy_split/resolve/main/caption_datasets.zip"))),))

COCO = Source(
    name="coco", title="MS-COCO 2017", page="https://cocodataset.org",
    licence="annotations CC BY 4.0; each picture keeps its own Flickr licence (named in the annotations)",
    defaults=("2017", "karpathy"),
    note="the 2017 zips hold every picture of 2014 as well, so the Karpathy split needs no other",
    items=(
        replace(_coco(
            "annotations/annotations_trainval2017.zip", "2017", 252_907_541,
            "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268", "f4bbac642086de4f52a3fdda2de5fa2c",
            ("annotations", "_train2017.json", 3), ("annotations", "_val2017.json", 3), unpacked=850_000_000),
            needed=tuple(f"annotations/{kind}_{part}.json" for kind in ("captions", "instances")
                         for part in ("train2017", "val2017"))),
        _KARPATHY,
        _coco("zips/val2017.zip", "2017", 815_585_330,
              "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05", "442b8da7639aecaf257c1dceb8ba8c80",
              ("val2017", ".jpg", 5_000)),
        _coco("zips/train2017.zip", "2017", 19_336_861_798,
              "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929", "cced6f7f71b7629ddf16f17bbcfab6b2",
              ("train2017", ".jpg", 118_287)),
        _coco("zips/test2017.zip", "test2017", 6_646_970_404,
              "c7908c3c9f94ba2f3340ebbeec58c25db6be8774f18d68c2f15d0e369d95baba", "77ad2c53ac5d0aea611d422c0938fb35"),
        _coco("annotations/image_info_test2017.zip", "test2017", 1_144_034,
              "e52f412dd7195ac8f98d782b44c6dd30ea10241e9f42521f67610fbe055a74f8", "85da7065e5e600ebfee8af1edb634eb5",
              unpacked=10_000_000),
        _coco("zips/unlabeled2017.zip", "unlabeled2017", 0, "", "7ebc562819fdb32847aab79530457326",
              unpacked=20 * GB),
        _coco("annotations/panoptic_annotations_trainval2017.zip", "panoptic", 860_725_834,
              "c05f76d2129b6b561eb70efe16e7006df62f73fb92889132d373b9d90e31a370", "", unpacked=1_500_000_000),
        _coco("annotations/annotations_trainval2014.zip", "2014", 252_872_794,
              "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009", "0a379cfc70b0e71301e0f377548639bd",
              unpacked=850_000_000),
        _coco("zips/val2014.zip", "2014", 6_645_013_297,
              "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0", "a3d79f5ed8d289b7a7554ce06a5782b3"),
        _coco("zips/train2014.zip", "2014", 13_510_573_713,
              "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775", "0da8c0bd3d6becc4dcb32757491aca88"),
        _coco("zips/test2014.zip", "2014", 6_660_437_059,
              "ead40c62230cb2cf70ff4c8b4c70abdc260a7556e77b3282621d06d8e2e35bdf", "04127eef689ceac55e3a572c2c92f264"),
    ))

# --- Clotho ----------------------------------------------------------------------------------------------------------
# Names with leading blanks are real (" Ambience Birds.wav"); the metadata csv files are ISO-8859-1.


def _zenodo(record: int, name: str, size: int, md5: str, sha256: str = "") -> File:
    base = "https://zenodo.org"
    return File(name=name, size=size, md5=md5, sha256=sha256, urls=(
        ("official", f"{base}/records/{record}/files/{name}?download=1"),
        ("official", f"{base}/api/records/{record}/files/{name}/content")))


def _clotho_audio(split: str, number: int, size: int, md5: str, unpacked: int) -> Item:
    ours = {"development": "train", "validation": "val", "evaluation": "test"}[split]
    file = _zenodo(4783391, f"clotho_audio_{split}.7z", size, md5)
    return Item(name=file.name, kind="7z", into="", files=(file,), subset="v2.1", splits=(ours,), unpacked=unpacked,
                counts=(Count(folder=split, suffix=".wav", number=number),))


def _clotho_list(name: str, size: int, md5: str, sha256: str = "", *, record: int = 4783391,
                 subset: str = "v2.1") -> Item:
    return Item(name=name, kind="plain", into=name, subset=subset, unpacked=size,
                files=(_zenodo(record, name, size, md5, sha256),))


CLOTHO = Source(
    name="clotho", title="Clotho v2.1", page="https://zenodo.org/records/4783391",
    licence="captions: Tampere University licence (non-commercial, attribution); each sound keeps its Freesound "
            "licence (named in the metadata)",
    defaults=("v2.1",), at_once=1,  # the host counts requests, and turns away who asks too often
    items=(
        _clotho_list("clotho_captions_development.csv", 1_336_762, "d4090b39ce9f2491908eebf4d5b09bae",
                     "df2e5b92060b4bb23311f8b3a7f82241d900b9c4f62b0cc467ac2ce5e9c52886"),
        _clotho_list("clotho_captions_validation.csv", 367_649, "5879e023032b22a2c930aaa0528bead4",
                     "fb0365506fe2dfcba9b7299daf7623a795abbd6ab9997a88ab0308e2fdfdbb88"),
        _clotho_list("clotho_captions_evaluation.csv", 361_995, "1b16b9e57cf7bdb7f13a13802aeb57e2",
                     "0e116233909a57449572b2d67d4c7a2f7df5b7a88c918f3697e61f684e664e84"),
        _clotho_list("clotho_metadata_development.csv", 830_797, "170d20935ecfdf161ce1bb154118cda5",
                     "b054a8d9d0f88436e7cf6341c82a70e9e975c3b3ddd560d9b04f2cd5fdc75949"),
        _clotho_list("clotho_metadata_validation.csv", 224_803, "2e010427c56b1ce6008b0f03f41048ce",
                     "066026ae1bc20277614ae9d4fffea085d959f0b5e40120751b8d3e717f5faa97"),
        _clotho_list("clotho_metadata_evaluation.csv", 0, "13946f054d4e1bf48079813aac61bf77"),
        _clotho_audio("validation", 1_045, 1_260_701_425, "7dba730be08bada48bd15dc4e668df59", 2_100_000_000),
        _clotho_audio("evaluation", 1_045, 0, "4569624ccadf96223f19cb59fe4f849f", 2_100_000_000),
        _clotho_audio("development", 3_839, 4_541_582_263, "c8b05bc7acdb13895bb3c6a29608667e", 7_600_000_000),
        _clotho_list("clotho_metadata_test.csv", 0, "52f8ad01c229a310a0ff8043df480e21", record=3865658, subset="test"),
        Item(name="clotho_audio_test.7z", kind="7z", into="", subset="test", unpacked=2_100_000_000,
             files=(_zenodo(3865658, "clotho_audio_test.7z", 0, "9b3fe72560a621641ff4351ba1154349"),)),
    ))

# --- AudioCaps -------------------------------------------------------------------------------------------------------

_AUDIOCAPS_RAW = "https://raw.githubusercontent.com/cdjkim/audiocaps/d004db3ea1b01cf4fd0347dd8d27db90cadc8809"
_AUDIOCAPS_HF = HF_HOST + "/datasets/OpenSound/AudioCaps/resolve/b29b3243d6ce49c2cd0d48d4b5f0701ae7969ded/data"
AUDIOCAPS_SOUNDS_BYTES = 41 * GB  # all 473 shards; the sounds are FLAC, so they unpack to about as much


def _audiocaps_list(name: str, size: int, sha256: str, md5: str, lines: int) -> Item:
    file = File(name=name, urls=(("official", f"{_AUDIOCAPS_RAW}/{name}"),), size=size, sha256=sha256, md5=md5,
                lines=lines)
    return Item(name=name, kind="plain", into=name, files=(file,), subset="v1" if name.startswith("dataset/") else "v2",
                unpacked=size)


_SOUND_SUFFIXES = {b"fLaC": "flac", b"RIFF": "wav", b"OggS": "ogg"}  # by the first bytes


def _sound_of_row(row: dict[str, Any]) -> tuple[str, bytes]:
    """(YOUTUBEID_START.SUFFIX, bytes) of the sound; the mirror has each clip of val and test in five rows."""
    data = row["audio"]["bytes"]
    name = f"{row['youtube_id']}_{int(float(row['start_time']))}"
    if data[:4] not in _SOUND_SUFFIXES:
        raise ValueError(f"a sound of an unknown format, {name!r}")
    return f"{name}.{_SOUND_SUFFIXES[data[:4]]}", data


AUDIOCAPS_ROWS = Rows(columns=("youtube_id", "start_time", "audio.bytes"), file_of=_sound_of_row)


def _audiocaps_shards(ours: str, theirs: str, number: int) -> Iterable[Item]:
    """Parquet shards with the bytes of each sound, unpacked to OURS/YOUTUBEID_START.flac; the server names digests."""
    for index in range(number):
        name = f"{theirs}-{index:05d}-of-{number:05d}.parquet"
        yield Item(name=name, kind="parquet", into=ours, subset="sounds", splits=(ours,), rows=AUDIOCAPS_ROWS,
                   unpacked=AUDIOCAPS_SOUNDS_BYTES // 473,
                   files=(File(name=name, urls=(("hf", f"{_AUDIOCAPS_HF}/{name}"),)),))


AUDIOCAPS = Source(
    name="audiocaps", title="AudioCaps", page="https://github.com/cdjkim/audiocaps",
    licence="captions for academic use (MIT in the upstream repository); the mirrored sounds CC BY-NC 4.0, their "
            "copyright stays with the uploaders",
    defaults=("v1", "v2", "sounds"),
    partly=tuple(Count(folder=split, suffix="", number=clips)  # the unique clips that the captions of version 1 name
                 for split, clips in (("train", 49_838), ("val", 495), ("test", 975))),
    note="the sounds are those that still exist: about 92 % of train and 883 of 975 test clips in the pinned mirror; "
         "the complete set is granted by hand at https://forms.gle/2wF54Y1Ft2LtPdhW8 (then --local FOLDER)",
    items=(
        _audiocaps_list("dataset/train.csv", 3_576_723,
                        "c0c5223db682b3bf724ce7e7ce58d5b36929f74572e8526a7211f92d2eef7c8e",
                        "be909c34c4aa154f53acab960a1e998b", 49_838),
        _audiocaps_list("dataset/val.csv", 171_918,
                        "dab1c96641d5f3053ddb99dca3949450da9a75737bda53e11cc0aa8b102be0c3",
                        "29adf3a58afc406fa3a9bd785e20db51", 2_475),
        _audiocaps_list("dataset/test.csv", 402_246,
                        "b91c4b7ded2f4f6e7db5b9c4983dc1e1dca3d556f505b61e3fd65cac7e1c638a",
                        "9775aec3f52037d12cacda132dd5316d", 4_875),
        _audiocaps_list("dataset2.0/train.csv", 0, "", "", 91_256),
        _audiocaps_list("dataset2.0/val.csv", 169_508,
                        "dfdd0f83c70fb818fbb86dcba42754abfb97f7774d811fff91a1c89d84d868c5",
                        "b319beea34769896c80399b14befdf8a", 2_475),
        _audiocaps_list("dataset2.0/test.csv", 397_498,
                        "365c8a8a71c9070a8d5dba5dd44f3a781f906632a49cb82b38bebaaa8f3c5ccb",
                        "11f06bd97a512e62d7907d724c76e7c3", 4_875),
        *_audiocaps_shards("test", "test", 41),
        *_audiocaps_shards("val", "validation", 20),
        *_audiocaps_shards("train", "train", 412),
    ))

# --- VoxCeleb --------------------------------------------------------------------------------------------------------

_VOX_KEYED = "https://cn01.mmai.io/download/voxceleb?key={key}&file="
_VOX_HF = HF_HOST + "/datasets/ProgramComputer/voxceleb/resolve/b8a8825c87582831cc217b6ff84a36558ced84d6"
_VOX_LISTS = "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/meta/"


def _vox(generation: int, name: str, size: int = 0, md5: str = "", sha256: str = "") -> File:
    return File(name=name, size=size, md5=md5, sha256=sha256, urls=(
        ("official", _VOX_KEYED + name), ("hf", f"{_VOX_HF}/vox{generation}/{name}")))


def _vox_list(file: File, generation: int = 1, subset: str = "vox1") -> Item:
    return Item(name=file.name, kind="plain", into=f"voxceleb{generation}/{file.name}", files=(file,), subset=subset,
                unpacked=file.size)


def _vox_trials(name: str, lines: int, md5: str = "") -> File:
    return File(name=name, urls=(("official", _VOX_LISTS + name),), lines=lines, md5=md5)


_VOX1_PARTS = (
    ("aa", "e395d020928bc15670b570a21695ed96", "21ec6ca843659ebc2fdbe04b530baa4f191ad4b0971912672d92c158f32226a0"),
    ("ab", "bbfaaccefab65d82b21903e81a8a8020", "311d21e0c8cbf33573a4fce6c80e5a279d80736274b381c394319fc557159a04"),
    ("ac", "017d579a2a96a077f40042ec33e51512", "92b64465f2b2a3dc0e4196ae8dd6828cbe9ddd1f089419a11e4cbfe2e1750df0"),
    ("ad", "7bb1e9f70fddc7a678fa998ea8b3ba19", "00e6190c770b27f27d2a3dd26ee15596b17066b715ac111906861a7d09a211a5"),
)
_VOX2_PARTS = (
    ("aa", 10_737_418_240, "da070494c573e5c0564b1d11c3b20577"),
    ("ab", 10_737_418_240, "17fe6dab2b32b48abaf1676429cdd06f"),
    ("ac", 10_737_418_240, "1de58e086c5edf63625af1cb6d831528"),
    ("ad", 10_737_418_240, "5a043eb03e15c5a918ee6a52aad477f9"),
    ("ae", 10_737_418_240, "cea401b624983e2d0b2a87fb5d59aa60"),
    ("af", 10_737_418_240, "fc886d9ba90ab88e7880ee98effd6ae9"),
    ("ag", 10_737_418_240, "d160ecc3f6ee3eed54d55349531cb42e"),
    ("ah", 2_315_355_528, "6b84a81b9af72a9d9eecbb3b1f602e65"),
)

VOXCELEB = Source(
    name="voxceleb", title="VoxCeleb 1 and 2", page="https://mm.kaist.ac.kr/datasets/voxceleb/",
    licence="metadata CC BY-SA 4.0, recordings CC BY 4.0; their copyright stays with the owners of the videos",
    defaults=("vox1",), needs_key="VOXCELEB_KEY", auto_mirrors=("official",),
    key_help="ask for a personal key at https://cn01.mmai.io/keyreq/voxceleb, then set the environment variable "
             "VOXCELEB_KEY; or name what you already have: --local FOLDER",
    note="default: VoxCeleb 1 (sound only, 34 GB). --also voxceleb:vox2-aac adds 80 GB of sound, voxceleb:vox2-mp4 "
         "255 GB of video. --mirror hf is a third party's copy with the official digests: its lawfulness is yours "
         "to judge",
    items=(
        _vox_list(File(
            name="vox1_meta.csv", lines=1_251,
            sha256="48bcb2f0024cae5d4ccf37e4480f686afb1161c5793a2a9a4c670c0e8dab0892",
            also_good=("md5:f5067cae5157ca27904c4b0a926e2661",),
            urls=(("hf", f"{_VOX_HF}/vox1/vox1_meta.csv"),
                  ("official", "https://www.openslr.org/resources/49/vox1_meta.csv"),
                  ("official", "https://mm.kaist.ac.kr/datasets/voxceleb/meta/vox1_meta.csv")))),
        _vox_list(_vox_trials("iden_split.txt", 153_516)),
        _vox_list(File(
            name="veri_test.txt", size=2_338_640, lines=37_720, md5="29fc7cc1c5d59f0816dc15d6e8be60f7",
            sha256="303b2b657042a27bf465d4c8aa84e12765373cdc01046665241ccd5783bd5976",
            urls=(("official", _VOX_LISTS + "veri_test.txt"),  # OpenSLR's "v2" is this list, not the cleaned one
                  ("official", "https://www.openslr.org/resources/49/voxceleb1_test_v2.txt")))),
        _vox_list(_vox_trials("veri_test2.txt", 37_611, "b73110731c9223c1461fe49cb48dddfc")),
        *(_vox_list(_vox_trials(name, lines, md5), subset="vox1-trials") for name, lines, md5 in (
            ("list_test_hard.txt", 552_536, "21c341b6b2168eea2634df0fb4b8fff1"),
            ("list_test_hard2.txt", 550_894, "857790e09d579a68eb2e339a090343c8"),
            ("list_test_all.txt", 581_480, "b9ecf7aa49d4b656aa927a8092844e4a"),
            ("list_test_all2.txt", 579_818, "a53e059deb562ffcfc092bf5d90d9f3a"))),
        Item(name="vox1_test_wav.zip", kind="zip", into="voxceleb1", subset="vox1", unpacked=1_100_000_000,
             splits=("test",), files=(_vox(1, "vox1_test_wav.zip", 1_072_793_438, "185fdc63c3c739954633d50379a3d102",
                         "8de57f347fe22b2c24526e9f444f689ecf5096fc2a92018cf420ff6b5b15eaea"),),
             counts=(Count(folder="voxceleb1/wav", suffix=".wav", number=4_874),)),
        Item(name="vox1_dev_wav.zip", kind="zip", into="voxceleb1", subset="vox1", unpacked=34 * GB,
             splits=("train", "val"), whole_md5="ae63e55b951748cc486645f532ba230b",
             files=tuple(_vox(1, f"vox1_dev_wav_part{part}", 0, md5, sha) for part, md5, sha in _VOX1_PARTS),
             counts=(Count(folder="voxceleb1/wav", suffix=".wav", number=148_642),)),
        _vox_list(File(
            name="vox2_meta.csv", size=159_126, lines=6_114,
            sha256="9a4f437fcf78b8030e597941703ab82a4d1af314f6eba3952afafe8a3664bd1b",
            urls=(("hf", f"{_VOX_HF}/vox2/vox2_meta.csv"),
                  ("official", "https://mm.kaist.ac.kr/datasets/voxceleb/meta/vox2_meta.csv"))), 2, "vox2-aac"),
        Item(name="vox2_test_aac.zip", kind="zip", into="voxceleb2/test", subset="vox2-aac", unpacked=2_600_000_000,
             splits=("test",), files=(_vox(2, "vox2_test_aac.zip", 2_594_018_146, "0d2b3ea430a821c33263b5ea37ede312",
                         "e4d9200107a7bc60f0b620d5dc04c3aab66681b649f9c218380ac43c6c722079"),),
             counts=(Count(folder="voxceleb2/test/aac", suffix=".m4a", number=36_237,
                           instead=(("voxceleb2/test/wav", ".wav"),)),)),
        Item(name="vox2_dev_aac.zip", kind="zip", into="voxceleb2", subset="vox2-aac", unpacked=80 * GB,
             splits=("train", "val"), whole_md5="bbc063c46078a602ca71605645c2a402",
             files=tuple(_vox(2, f"vox2_dev_aac_part{part}", size, md5) for part, size, md5 in _VOX2_PARTS),
             counts=(Count(folder="voxceleb2/dev/aac", suffix=".m4a", number=1_092_009,
                           instead=(("voxceleb2/dev/wav", ".wav"),)),)),
        # No digest of the video parts is published: the CRC of every member of the zip is what can be checked.
        Item(name="vox2_test_mp4.zip", kind="zip", into="voxceleb2/test", subset="vox2-mp4", unpacked=9 * GB,
             splits=("test",), files=(_vox(2, "vox2_test_mp4.zip"),),
             counts=(Count(folder="voxceleb2/test/mp4", suffix=".mp4"),)),
        Item(name="vox2_dev_mp4.zip", kind="zip", into="voxceleb2", subset="vox2-mp4", unpacked=255 * GB,
             splits=("train", "val"), counts=(Count(folder="voxceleb2/dev/mp4", suffix=".mp4"),),
             files=tuple(_vox(2, f"vox2_dev_mp4_part{part}")
                         for part in ("aa", "ab", "ac", "ad", "ae", "af", "ag", "ah", "ai"))),
    ))

# --- Tux Paint stamps ------------------------------------------------------------------------------------------------

STAMPS_VERSION = "2022.06.04-1"
_STAMPS_PACKAGE = f"tuxpaint-stamps-default_{STAMPS_VERSION}_all.deb"
_STAMPS_COUNTS = tuple(Count(folder=".", suffix=suffix, number=number) for suffix, number in
                       ((".png", 796), (".svg", 248), (".ogg", 7_858), (".wav", 15), (".dat", 528)))

STAMPS = Source(
    name="stamps", title=f"Tux Paint stamps {STAMPS_VERSION}", page="https://sourceforge.net/projects/tuxpaint",
    licence="GPL-2, copyright 2002-2022 Bill Kendrick and the Tux Paint contributors",
    defaults=("stamps",), one_of=True,
    note="785 captioned pictures, 134 sound effects, spoken captions in many languages",
    items=(
        Item(name=_STAMPS_PACKAGE, kind="deb", into="", subset="stamps", unpacked=220_000_000, counts=_STAMPS_COUNTS,
             rules=(("usr/share/tuxpaint/stamps/", ""),
                    ("usr/share/doc/tuxpaint-stamps-default/copyright", "COPYRIGHT")),
             files=(File(name=_STAMPS_PACKAGE, size=160_880_444,
                         sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
                         urls=(("official", f"apt:tuxpaint-stamps-default={STAMPS_VERSION}"),)),)),
        Item(name="tuxpaint-stamps-2022.06.04.tar.gz", kind="tar", into="", subset="stamps", unpacked=220_000_000,
             rules=(("*/stamps/", ""), ("*/docs/COPYING.txt", "COPYRIGHT")),
             files=(File(name="tuxpaint-stamps-2022.06.04.tar.gz", size=215_615_180,
                         sha256="842065576fae554358e00e51d71a492616a6490b12b592228067477c287a0bf8",
                         urls=(("official", "https://downloads.sourceforge.net/project/tuxpaint/tuxpaint-stamps/"
                                            "2022-06-04/tuxpaint-stamps-2022.06.04.tar.gz"),)),)),
    ))

SOURCES: dict[str, Source] = {source.name: source for source in (COCO, CLOTHO, AUDIOCAPS, VOXCELEB, STAMPS)}
