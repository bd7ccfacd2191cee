"""Zero-shot classification: pictures or sounds in a folder of class folders, by what the text tower makes of prompts.

    classes = read_classes(Path("esc50"))                       # esc50/dog/1.wav, esc50/rain/7.wav, ...
    figures, facts = classify(model, classes, prompts, config, setting, tokenizer)

A class is the mean of the L2-normalised features of its prompts (arXiv:2103.00020), a file belongs to the class of the
highest cosine; equal ones count against the model. Folders are named as the class is called, blanks or underscores
between words.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets import Data
from trimodal.arguments import reading
from trimodal.config import Config
from trimodal.data.batches import pad_captions, prepare_split
from trimodal.data.samples import Sample, SampleTable
from trimodal.data.store import open_store
from trimodal.data.tokenizer import Tokenizer
from trimodal.errors import UserError, counted
from trimodal.evaluation import metrics, peers, protocols
from trimodal.evaluation.metrics import Figure
from trimodal.evaluation.micro_batches import Setting
from trimodal.inference.hub_models import HubModel
from trimodal.media import PICTURE_SUFFIXES, SOUND_SUFFIXES
from trimodal.towers.settings import inputs_of

PROMPTS = {"image": ("a photo of a {}.", "a picture of a {}.", "a drawing of a {}."),
           "audio": ("the sound of {}.", "this is a sound of {}.", "{} can be heard.")}
SUFFIXES = {"image": PICTURE_SUFFIXES, "audio": SOUND_SUFFIXES}
SOURCE = "zero-shot"  # in place of a data set's name


@dataclasses.dataclass(frozen=True)
class Classes:
    """Files of one modality, each with the number of its class."""

    folder: Path
    modality: str
    names: tuple[str, ...]
    files: tuple[Path, ...]
    classes_N: np.ndarray


def read_classes(folder: Path) -> Classes:
    """The classes of a folder: its subfolders, by name, and the pictures or the sounds anywhere below them.

    Raises:
        UserError: fewer than two classes with files, an empty one, or pictures beside sounds.
    """
    with reading(f"--zero-shot {folder}"):
        is_folder = folder.is_dir()
    if not is_folder:
        raise UserError(f"--zero-shot {folder}: no such folder")
    found: dict[str, list[Path]] = {}
    kinds: Counter[str] = Counter()
    for place in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = [(path, kind) for path in sorted(place.rglob("*")) for kind, suffixes in SUFFIXES.items()
                 if path.suffix.lower() in suffixes and path.is_file()]
        name = " ".join(place.name.replace("_", " ").split())
        found.setdefault(name, []).extend(path for path, _ in files)
        kinds.update(kind for _, kind in files)
    if empty := [name for name, files in found.items() if not files]:
        raise UserError(f"--zero-shot {folder}: {counted(len(empty), 'folder')} without pictures or sounds, such as "
                        f"{empty[0]!r}; each folder is a class")
    if len(found) < 2:
        raise UserError(f"--zero-shot {folder}: holds {counted(len(found), 'class folder')}, needs two or more, such "
                        f"as {folder}/dog/1.jpg and {folder}/cat/7.jpg")
    if len(kinds) > 1:
        raise UserError(f"--zero-shot {folder}: holds {counted(kinds['image'], 'picture')} and "
                        f"{counted(kinds['audio'], 'sound')}; give them a folder each")
    numbers = np.repeat(np.arange(len(found)), [len(files) for files in found.values()])
    return Classes(folder, next(iter(kinds)), tuple(found), tuple(path for files in found.values() for path in files),
                   numbers)


def read_prompts(path: Path | None, modality: str) -> tuple[str, ...]:
    """Templates, one a line, each with {} in place of the class; those of PROMPTS without a file.

    Raises:
        UserError: the file cannot be read, or a line has not exactly one {}.
    """
    if path is None:
        return PROMPTS[modality]
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, start=1):
        if line and line.count("{}") != 1:
            raise UserError(f"--prompts {path}, line {number}: needs one {{}} in place of the class, got {line[:80]!r}")
    if not any(lines):
        raise UserError(f"--prompts {path}: is empty; write one template a line, such as 'a photo of a {{}}.'")
    return tuple(line for line in lines if line)


def classify(model: Any, classes: Classes, prompts: Sequence[str], config: Config, setting: Setting,
             tokenizer: Tokenizer) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Figures `image_to_class_top1` and `_top5` (or `audio_...`), and facts on the files.

    Raises:
        UserError: the model does not read this modality, or too many files are broken.
    """
    if classes.modality not in getattr(model, "modalities", ("image", "audio")):
        raise UserError(f"--zero-shot {classes.folder}: holds {classes.modality} files, and {model.name} reads "
                        f"{' and '.join(model.modalities)}")
    data = _data(_samples(classes), config, tokenizer, model)
    encode = peers.encode if isinstance(model, HubModel) else protocols.encode_split
    quick = dataclasses.replace(setting, concepts=False)
    encoded = encode(model, data, "test", config, quick)
    items = encoded.items.get(classes.modality)
    if items is None:
        raise UserError(f"--zero-shot {classes.folder}: none of its {counted(len(classes.files), 'file')} can be read")
    class_KF = class_features(model, classes.names, prompts, config, quick, tokenizer)
    rows = torch.from_numpy(classes.classes_N[items.rows_N]).to(class_KF.device)
    figures = metrics.identification(items.features_NF @ class_KF.T, rows, prefix=f"{classes.modality}_to_class",
                                     options=metrics.Options(resamples=config.evaluation.resamples))
    return figures, encoded.facts[SOURCE]


def class_features(model: Any, names: Sequence[str], prompts: Sequence[str], config: Config, setting: Setting,
                   tokenizer: Tokenizer) -> Tensor:
    """Features of classes, float32 [K, F], L2-normalised."""
    texts = [prompt.replace("{}", name) for name in names for prompt in prompts]
    micro_batches = setting.micro_batches(config.evaluation.batch_size)
    split = _data([Sample(key=f"{n}", source=SOURCE, split="test", captions=(text,)) for n, text in enumerate(texts)],
                  config, tokenizer, model).splits["test"]

    @torch.inference_mode()
    def encode(part: slice) -> Tensor:
        if isinstance(model, HubModel):
            return model.features("text", [one.value for one in model.read_texts(texts[part])])
        ids_BL, mask_BL = (torch.from_numpy(array).to(setting.device)
                           for array in pad_captions(split, np.arange(len(texts))[part]))
        found: Tensor = model.text_features(ids_BL, mask_BL)
        return found.float()

    features = torch.cat(micro_batches.of(("text",), len(texts), encode))
    return F.normalize(features.view(len(names), len(prompts), -1).mean(1), dim=-1)


def _samples(classes: Classes) -> list[Sample]:
    """A sample of each file, without captions."""
    is_image, found = classes.modality == "image", []
    for path, n in zip(classes.files, classes.classes_N.tolist(), strict=True):
        file = str(path.absolute())
        found.append(Sample(key=path.relative_to(classes.folder).as_posix(), source=SOURCE, split="test",
                            image=file if is_image else "", audio="" if is_image else file,
                            labels=(classes.names[n],)))
    return found


def _data(samples: Sequence[Sample], config: Config, tokenizer: Tokenizer, model: Any) -> Data:
    """Samples as a split, prepared for the model's pretrained towers; nothing is put into the cache."""
    plain = dataclasses.replace(config, data=dataclasses.replace(config.data, cache=False))
    split = prepare_split(open_store(SampleTable.pack(samples), plain), plain, tokenizer, (), (), set())
    inputs = inputs_of(getattr(model, "towers", {}))
    return Data({"test": dataclasses.replace(split, inputs=inputs)}, tokenizer, (), ())
