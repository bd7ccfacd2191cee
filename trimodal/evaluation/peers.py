"""Models of others under this project's protocols: CLIP, SigLIP and CLAP as the library transformers opens them.

    model = open_hub("hub:openai/clip-vit-base-patch32")
    encoded = encode(model, data, "test", config, setting)       # then protocols.score, as for a model of our own

Everything of the model is its own: preprocessing of the files themselves (not of what the cache holds), tokenizer,
features. Sounds longer than a window of CLAP's are cut into windows; their feature is the mean of these, by length.
Float32, whatever the device. No code of a folder is run and no pickle is opened.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from datasets import Data
from trimodal.config import SAMPLE_RATE_HZ, Config
from trimodal.data import bad_samples
from trimodal.data.audio import decode_audio, resampled
from trimodal.data.generated import combination_of, generate_sound
from trimodal.data.images import decode_image
from trimodal.data.samples import BrokenSample
from trimodal.errors import UserError
from trimodal.evaluation import protocols
from trimodal.evaluation.micro_batches import MicroBatches, Setting
from trimodal.towers import hub

PREFIX = "hub:"
MODELS = {"clip": "CLIPModel", "siglip": "SiglipModel", "clap": "ClapModel"}  # by model_type
MODALITIES_OF = {"clip": ("image", "text"), "siglip": ("image", "text"), "clap": ("audio", "text")}


class HubModel:
    """One of MODELS in eval mode, with its preprocessing; features are L2-normalised, (B, F)."""

    def __init__(self, name: str, kind: str, model: Any, tokenizer: Any, media: Any):
        self.name, self.kind, self.model, self.tokenizer, self.media = name, kind, model, tokenizer, media
        self.modalities = MODALITIES_OF[kind]
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> "HubModel":
        self.model.to(device)
        self.device = device
        return self

    @torch.inference_mode()
    def image_features(self, images: Sequence[np.ndarray]) -> Tensor:
        """Of pictures, uint8 [H, W, 3] of any size."""
        given = self.media(images=[Image.fromarray(image) for image in images], return_tensors="pt")
        return self._features(self.model.get_image_features(pixel_values=given["pixel_values"].to(self.device)))

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """SigLIP reads padding up to its full length, as it was trained; the others none."""
        # the positions of RoBERTa begin at 2
        length = self.model.config.text_config.max_position_embeddings - 2 * (self.kind == "clap")
        given = self.tokenizer(list(texts), padding="max_length" if self.kind == "siglip" else True, truncation=True,
                               max_length=length, return_tensors="pt")
        mask = {} if self.kind == "siglip" else {"attention_mask": given["attention_mask"].to(self.device)}
        return self._features(self.model.get_text_features(input_ids=given["input_ids"].to(self.device), **mask))

    @torch.inference_mode()
    def audio_features(self, waveform_S: np.ndarray) -> Tensor:
        """Of one sound, float32 at `rate_hz`; (1, F)."""
        window = self.media.nb_max_samples
        parts = [waveform_S[start:start + window] for start in range(0, max(1, len(waveform_S)), window)]
        fuses = bool(self.model.config.audio_config.enable_fusion)
        given = self.media(parts, sampling_rate=self.rate_hz, return_tensors="pt",
                           truncation="fusion" if fuses else "rand_trunc")  # nothing is longer than a window: no draw
        given["is_longer"] = torch.zeros(len(parts), 1, dtype=torch.bool)  # the extractor says so of a random short one
        features_XF = self._features(self.model.get_audio_features(**{k: v.to(self.device) for k, v in given.items()}))
        weights_X = torch.tensor([len(part) for part in parts], dtype=features_XF.dtype, device=self.device)
        return F.normalize((features_XF * weights_X[:, None]).sum(0, keepdim=True), dim=-1)

    @property
    def rate_hz(self) -> int:
        return int(self.media.sampling_rate)

    def _features(self, found: Any) -> Tensor:
        """transformers 5 gives an object whose `pooler_output` is the projected vector, 4 gave the vector."""
        return F.normalize(getattr(found, "pooler_output", found).float(), dim=-1)


# ---- opening -----------------------------------------------------------------------------------------------------


def open_hub(name: str) -> HubModel:
    """The model `hub:OWNER/NAME`, or `hub:` and a local folder.

    Raises:
        UserError: it cannot be fetched, is none of MODELS, or lacks weights or a tokenizer.
    """
    import transformers

    folder = _folder(name)
    kind = _kind(name, folder)
    with hub.quiet():
        try:
            model, loading = getattr(transformers, MODELS[kind]).from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, local_files_only=True,
                trust_remote_code=False)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True,
                                                                   trust_remote_code=False)
            media = (transformers.ClapFeatureExtractor if kind == "clap" else
                     transformers.AutoImageProcessor).from_pretrained(folder, local_files_only=True,
                                                                      trust_remote_code=False)
        except MemoryError:
            raise
        except Exception as error:  # files from elsewhere may provoke any
            raise UserError(f"{name}: cannot be opened ({hub.reason_of(error)}); fetch {folder} again") from None
    if lacking := sorted(loading["missing_keys"]):
        raise UserError(f"{name}: its weights lack {len(lacking)} parameters, such as {lacking[0]}; fetch "
                        f"{folder} again")
    if len(tokenizer) < model.config.text_config.vocab_size // 2:  # without its files the library makes one of 5 words
        raise UserError(f"{name}: {folder} holds no tokenizer of its own ({len(tokenizer)} words, the model knows "
                        f"{model.config.text_config.vocab_size}); fetch it again")
    return HubModel(name, kind, model.eval(), tokenizer, media)


def _folder(name: str) -> Path:
    """Where the files are: a local folder, or that of the hub's cache, into which they are fetched."""
    place = Path(name.removeprefix(PREFIX)).expanduser()
    return place if place.is_dir() else hub.fetch(name.removeprefix(PREFIX), name)


def _kind(name: str, folder: Path) -> str:
    found = hub.read_json(folder, hub.CONFIG, name).get("model_type")
    if found is None:
        raise UserError(f"{name}: {folder} has no config.json that names a model_type")
    if found not in MODELS:
        raise UserError(f"{name}: its config.json says model_type {found!r}; evaluated are {', '.join(MODELS)}")
    return str(found)


# ---- encoding ----------------------------------------------------------------------------------------------------


def encode(model: HubModel, data: Data, split: str, config: Config, setting: Setting) -> protocols.Encoded:
    """Encode a split as `protocols.encode_split` does, by a model of others.

    Raises:
        UserError: too many broken files, or out of memory with one sample at a time.
    """
    rows_by_kind = protocols.chosen_rows(data, split, setting.limit, model.modalities)
    rows = np.sort(np.concatenate([np.empty(0, np.int64), *rows_by_kind.values()]))
    size = config.evaluation.batch_size
    encoder = _Encoder(model, data, split, MicroBatches(setting, size))
    parts = np.array_split(rows, max(1, -(-len(rows) // size)))
    for part in tqdm(parts, desc=f"evaluating {split}", unit="batch", disable=None):
        encoder.add(part.tolist())
    if encoder.broken:
        bad_samples.record(encoder.broken, config)
        bad_samples.check("data", len(encoder.broken), len(rows), encoder.broken[0]["reason"], config)
    return protocols.encode_known(encoder.known, data, split, config, setting, model.modalities)


class _Encoder:
    """Reads samples and keeps their features, by modality and row; those with a broken file have none."""

    def __init__(self, model: HubModel, data: Data, split: str, micro_batches: MicroBatches):
        self.model, self.micro_batches = model, micro_batches
        self.table, self.store = data.tables[split], data.splits[split].store
        self.known: dict[str, dict[int, Tensor]] = {name: {} for name in model.modalities}
        self.broken: list[dict[str, str]] = []

    def add(self, rows: list[int]) -> None:
        has = {"image": self.table.has_image, "audio": self.table.has_audio, "text": self.table.has_text}
        media = self.model.modalities[0]
        read: dict[int, np.ndarray] = {}
        for row in [row for row in rows if has[media][row]]:
            try:
                read[row] = self._image(row) if media == "image" else self._sound(row)
            except BrokenSample as error:
                self.broken.append(self.store.record(row, str(error)))
                rows = [other for other in rows if other != row]
        if read:
            self.known[media] |= dict(zip(read, self._media(media, list(read.values())).split(1), strict=True))
        captions = {row: self.table.captions_of(row) for row in rows if has["text"][row]}
        if texts := [text for own in captions.values() for text in own]:
            features_CF = torch.cat(self.micro_batches.of(
                ("text",), len(texts), lambda part: self.model.text_features(texts[part])))
            self.known["text"] |= dict(zip(captions, features_CF.split(list(map(len, captions.values()))), strict=True))

    def _media(self, media: str, values: list[np.ndarray]) -> Tensor:
        if media == "image":
            return torch.cat(self.micro_batches.of(("image",), len(values),
                                                   lambda part: self.model.image_features(values[part])))
        return torch.cat([self.model.audio_features(value) for value in values])

    def _image(self, row: int) -> np.ndarray:
        """The whole picture; of a generated sample what training reads."""
        return self.store.image(row) if self.store.is_generated(row) else decode_image(self.table.images[row])

    def _sound(self, row: int) -> np.ndarray:
        """The sample's stretch of sound at the model's rate."""
        path, rate_hz = self.table.audio[row], self.model.rate_hz
        if self.store.is_generated(row):
            return resampled(generate_sound(combination_of(path), np.random.default_rng(0)), SAMPLE_RATE_HZ, rate_hz)
        return decode_audio(path, float(self.table.start_s[row]), float(self.table.duration_s[row]), rate_hz)
