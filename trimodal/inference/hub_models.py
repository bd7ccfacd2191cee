"""Models of others as the library transformers opens them: CLIP, SigLIP and CLAP.

    model = open_hub("hub:openai/clip-vit-base-patch32")
    model.features("text", [one.value for one in model.read_texts(["a dog"])])

Everything of the model is its own: preprocessing of the files themselves, tokenizer, features. Sounds longer than a
window of CLAP's are cut into windows; their feature is the mean of these, by length. Float32, whatever the device. No
code of a folder is run and no pickle is opened.

Shape suffixes: H, W pixels, S samples of a sound, X windows, B items, F feature width.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from trimodal.arguments import reading
from trimodal.errors import WHOLE, UserError, counted
from trimodal.inference.prepared import Prepared
from trimodal.towers import hub

PREFIX = "hub:"
MODELS = {"clip": "CLIPModel", "siglip": "SiglipModel", "clap": "ClapModel"}  # by model_type
MODALITIES_OF = {"clip": ("image", "text"), "siglip": ("image", "text"), "clap": ("audio", "text")}


class HubModel:
    """One of MODELS in eval mode, with its preprocessing; features are L2-normalised, (B, F)."""

    fuses = False

    def __init__(self, name: str, kind: str, model: Any, tokenizer: Any, media: Any):
        self.name, self.kind, self.model, self.tokenizer, self.media = name, kind, model, tokenizer, media
        self.modalities = MODALITIES_OF[kind]
        self.rate_hz = int(media.sampling_rate) if kind == "clap" else 0
        text = model.config.text_config
        self.longest = int(text.max_position_embeddings) - 2 * (kind == "clap")  # positions of RoBERTa begin at 2
        self.embed_dim = int(text.projection_size if kind == "siglip" else model.config.projection_dim)

    def to(self, device: torch.device) -> "HubModel":
        self.model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(iter(self.model.parameters())).device

    def read_image(self, picture_HW3: np.ndarray) -> Prepared:
        """A picture, uint8, of any size."""
        return Prepared(self.media(images=[Image.fromarray(picture_HW3)], return_tensors="pt")["pixel_values"])

    def read_texts(self, texts: Sequence[str]) -> list[Prepared]:
        """The token ids of each."""
        whole = self.tokenizer(list(texts))["input_ids"]
        ids = self.tokenizer(list(texts), truncation=True, max_length=self.longest)["input_ids"]
        return [Prepared(own, is_cut=len(before) > self.longest) for before, own in zip(whole, ids, strict=True)]

    def read_sound(self, wave_S: np.ndarray) -> Prepared:
        """A sound at `rate_hz`: its windows, and their lengths."""
        window = self.media.nb_max_samples
        parts = [wave_S[start:start + window] for start in range(0, max(1, len(wave_S)), window)]
        fuses = bool(self.model.config.audio_config.enable_fusion)
        given = self.media(parts, sampling_rate=self.rate_hz, return_tensors="pt",
                           truncation="fusion" if fuses else "rand_trunc")  # nothing is longer than a window: no draw
        return Prepared((given["input_features"], [len(part) for part in parts]), len(parts), len(parts))

    @torch.inference_mode()
    def features(self, modality: str, values: Sequence[Any]) -> Tensor:
        """(B, F) of prepared values."""
        if modality == "image":
            return self._features(self.model.get_image_features(pixel_values=torch.cat(list(values)).to(self.device)))
        if modality == "text":
            return self._texts(values)
        return self._sounds(values)

    def _texts(self, values: Sequence[list[int]]) -> Tensor:
        """SigLIP reads padding up to its full length, as it was trained; the others none."""
        length = self.longest if self.kind == "siglip" else max(map(len, values))
        ids_BL = torch.tensor([own + [self.tokenizer.pad_token_id] * (length - len(own)) for own in values])
        mask_BL = torch.tensor([[1] * len(own) + [0] * (length - len(own)) for own in values])
        mask = {} if self.kind == "siglip" else {"attention_mask": mask_BL.to(self.device)}
        return self._features(self.model.get_text_features(input_ids=ids_BL.to(self.device), **mask))

    def _sounds(self, values: Sequence[tuple[Tensor, list[int]]]) -> Tensor:
        """Means of the windows of each sound, by length."""
        windows = torch.cat([features for features, _ in values]).to(self.device)
        features_XF = self._features(self.model.get_audio_features(
            input_features=windows,
            is_longer=torch.zeros(len(windows), 1, dtype=torch.bool, device=self.device)))  # the extractor draws it
        weights_X = features_XF.new_tensor([length for _, lengths in values for length in lengths])
        parts = (weights_X[:, None] * features_XF).split([len(lengths) for _, lengths in values])
        return F.normalize(torch.stack([part.sum(0) for part in parts]), dim=-1)

    def scale(self, modality: str) -> float:
        """What cosines of images, or of sounds, with texts were multiplied by in training."""
        scale = self.model.logit_scale_a if modality == "audio" else self.model.logit_scale
        return float(scale.detach().exp())

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
            raise UserError(f"{name}: {folder} cannot be opened ({hub.reason_of(error)}); {WHOLE}") from None
    if lacking := sorted(loading["missing_keys"]):
        raise UserError(f"{name}: the weights in {folder} lack {counted(len(lacking), 'parameter')}, such as "
                        f"{lacking[0]}; {WHOLE}")
    if len(tokenizer) < model.config.text_config.vocab_size // 2:  # without its files the library makes one of 5 words
        raise UserError(f"{name}: {folder} holds no tokenizer of its own ({len(tokenizer)} words, the model knows "
                        f"{model.config.text_config.vocab_size}); {WHOLE}")
    return HubModel(name, kind, model.eval(), tokenizer, media)


def _folder(name: str) -> Path:
    """Where the files are: a local folder, or that of the hub's cache, into which they are fetched."""
    place = Path(os.path.expanduser(name.removeprefix(PREFIX)))
    with reading(name):
        is_local = place.is_dir()
    return place if is_local else hub.fetch(name.removeprefix(PREFIX), name)


def _kind(name: str, folder: Path) -> str:
    found = hub.read_json(folder, hub.CONFIG, name).get("model_type")
    if found is None:
        raise UserError(f"{name}: {folder} has no config.json that names a model_type")
    if found not in MODELS:
        raise UserError(f"{name}: its config.json says model_type {found!r}; read are {', '.join(MODELS)}")
    return str(found)
