"""The tri-modal model: image, text and audio encoders, and a fusion transformer over whatever is given.

    model = create_model("base")
    outputs = model(images=images, input_ids=ids, attention_mask=mask, audio=log_mel)
    outputs["fused_features"], outputs["logits"]     # [B, 512], [B, num_classes]

Nothing in here draws a random number: patch subsets and drop-path arrive as arguments, so that splitting a batch
never changes the mathematics.

Shape suffixes: B samples, N tokens, K kept tokens or keys, Q queries, D width, H heads, E head width (D = H * E),
P values of a patch, L text tokens, T frames of M mels, X audio windows, F embed_dim, C classes, Z depth of a tower.
`valid_BN` is True where a token is real; None means that all are.
"""

import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimodal import checkpoint
from trimodal.blocks import KERNELS, Block, Blocks, Tokens, apply_layer, at_least_float32, masked_mean, use_kernel
from trimodal.config import (
    AUDIO_WINDOW_FRAMES,
    IMAGE_PATCH,
    MODALITIES,
    NUM_MELS,
    SIZES,
    ModelConfig,
    model_config_from_dict,
)
from trimodal.errors import UserError
from trimodal.inputs import check_audio, check_ids, check_images
from trimodal.towers.base import PretrainedTower
from trimodal.towers.encoder import PretrainedEncoder
from trimodal.towers.opening import build_tower
from trimodal.towers.settings import open_towers, with_towers

if TYPE_CHECKING:
    from trimodal.inference.open_model import OpenModel

AUDIO_PATCH_FRAMES, AUDIO_PATCH_MELS = 16, 16
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB in 0..1
LOG_MEL_MEAN, LOG_MEL_STD = -6.0, 4.0  # of natural-log mel power of everyday sounds
POSITION_BASE = 100.0  # 10,000 (arXiv:1706.03762) hardly varies over the 4 to 14 steps of a patch grid
INIT_GAIN = 1.7  # of 1 / sqrt(inputs), for all but the MLPs: attention that starts out sharper tells parts apart sooner
VALUE_INIT = 0.4  # of minus the identity: what attention's values and output do together at first (arXiv:2305.09828)
GRID_SCALE = 2.0  # of a patch's position codes; at 1 the contents of the patches drown them
PAIRS = ("image_text", "audio_text", "image_audio")
MAX_LOGIT_SCALE = math.log(100.0)


# ---- positions and patches ---------------------------------------------------------------------------------------


def position_codes(positions_N: Tensor, dim: int) -> Tensor:
    """Fixed sine-cosine codes of real-valued positions; (N, dim), any dim (the last columns of an odd one are 0)."""
    half = dim // 2
    rates = POSITION_BASE ** (-torch.arange(half, dtype=torch.float32, device=positions_N.device) / max(half, 1))
    angles = positions_N.float()[:, None] * rates
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim - 2 * half))


def grid_codes(rows_R: Tensor, columns_S: Tensor, dim: int) -> Tensor:
    """Codes of a grid, row-major: half of the width tells the row, half the column; (R * S, dim)."""
    row = position_codes(rows_R, dim // 2)
    column = position_codes(columns_S, dim - dim // 2)
    return GRID_SCALE * torch.cat([row.repeat_interleave(len(columns_S), 0), column.repeat(len(rows_R), 1)], dim=1)


def take(x_BNP: Tensor, index_BK: Tensor) -> Tensor:
    """Rows `index_BK` of each sample; (B, K, P)."""
    return x_BNP[torch.arange(len(x_BNP), device=x_BNP.device)[:, None], index_BK]


# ---- encoders ----------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """An encoder of our own: tokens of width `dim` from `blocks`, all of which tell of the sample alike."""

    dim: int
    blocks: Blocks

    @property
    def depth(self) -> int:
        return len(self.blocks.blocks)

    def set_recompute(self, every: int) -> None:
        self.blocks.recompute_every = every

    def pool(self, encoded: Tokens) -> Tensor:
        """One vector for each sample, (B, D), in at least float32."""
        return masked_mean(*encoded)


class ImageEncoder(Encoder):
    """ViT (arXiv:2010.11929) with 16-pixel patches and fixed positions, so that any multiple of 16 pixels will do."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        p = config.preset
        self.dim, self.patch_dim = p.dim, 3 * IMAGE_PATCH**2
        self.embed = nn.Linear(self.patch_dim, p.dim)
        self.blocks = Blocks(p.dim, p.num_heads, p.image_depth, config.attention_chunk)
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD), persistent=False)

    def check(self, images: Tensor) -> None:
        check_images(images)

    def patches(self, images: Tensor, keep_BK: Tensor | None = None) -> tuple[Tensor, None]:
        """(B, 3, S, S), uint8 or floats in 0..1 -> standardised patches (B, N, P), row-major, or those in `keep_BK`;
        all are valid."""
        grid = images.unflatten(3, (-1, IMAGE_PATCH)).unflatten(2, (-1, IMAGE_PATCH)).permute(0, 2, 4, 3, 5, 1)
        pixels_BNP = grid.reshape(len(images), -1, self.patch_dim)
        if keep_BK is not None:
            pixels_BNP = take(pixels_BNP, keep_BK)  # while a value is a byte
        mean_P, std_P = (value.repeat(IMAGE_PATCH**2) for value in (self.mean, self.std))
        values_BNP = pixels_BNP.to(mean_P.dtype)
        return ((values_BNP / 255 if images.dtype == torch.uint8 else values_BNP) - mean_P) / std_P, None

    def positions(self, images: Tensor) -> Tensor:
        """(N, D). Coordinates are scaled to a 14 x 14 grid, so that a point keeps its code at every image size."""
        rows, columns = (torch.arange(s // IMAGE_PATCH, device=images.device) for s in images.shape[2:])
        codes_ND = grid_codes((rows + 0.5) * 14 / len(rows), (columns + 0.5) * 14 / len(columns), self.dim)
        return codes_ND.to(self.embed.weight.dtype)

    def forward(self, images: Tensor, keep_BK: Tensor | None = None, path_BZ: Tensor | None = None) -> Tokens:
        """Encode all patches, or only those in `keep_BK` (masked pretraining, token dropping arXiv:2212.00794)."""
        patches_BKP, _ = self.patches(images, keep_BK)
        positions_ND = self.positions(images)
        positions_BKD = positions_ND if keep_BK is None else positions_ND[keep_BK]
        return Tokens(self.blocks(self.embed(patches_BKP) + positions_BKD, None, path_BZ), None)


class AudioEncoder(Encoder):
    """Spectrogram transformer (arXiv:2104.01778): patches of 16 frames x 16 mels of log-mels, time-major.

    A clip longer than one window (10.24 s) is cut into windows that are encoded alone, so that its length and its
    neighbours in the batch never change an embedding.
    """

    patch_frames, bands = AUDIO_PATCH_FRAMES, NUM_MELS // AUDIO_PATCH_MELS

    def __init__(self, config: ModelConfig):
        super().__init__()
        p = config.preset
        self.dim, self.patch_dim = p.dim, AUDIO_PATCH_FRAMES * AUDIO_PATCH_MELS
        self.embed = nn.Linear(self.patch_dim, p.dim)
        self.blocks = Blocks(p.dim, p.num_heads, p.audio_depth, config.attention_chunk)

    def check(self, audio_BTM: Tensor, lengths_B: Tensor | None) -> None:
        check_audio(audio_BTM, lengths_B)

    def patches(self, audio_BTM: Tensor, lengths_B: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, T, 80) log-mels, lengths in frames -> standardised patches (B, N, P), valid (B, N); padding is 0."""
        B, T, _ = audio_BTM.shape
        lengths_B = torch.full((B,), T, device=audio_BTM.device) if lengths_B is None else lengths_B
        real_BT = torch.arange(T, device=audio_BTM.device) < lengths_B[:, None]
        x_BTM = (audio_BTM.to(self.embed.weight.dtype) - LOG_MEL_MEAN) / LOG_MEL_STD
        x_BTM = torch.where(real_BT[:, :, None], x_BTM, 0.0)
        x_BTM = F.pad(x_BTM, (0, 0, 0, -T % AUDIO_PATCH_FRAMES))
        steps = x_BTM.shape[1] // AUDIO_PATCH_FRAMES
        grid = x_BTM.view(B, steps, AUDIO_PATCH_FRAMES, self.bands, AUDIO_PATCH_MELS).transpose(2, 3)
        first = torch.arange(steps, device=x_BTM.device) * AUDIO_PATCH_FRAMES
        valid_BN = (first < lengths_B[:, None]).repeat_interleave(self.bands, 1)
        return grid.reshape(B, steps * self.bands, self.patch_dim), valid_BN

    def positions(self, audio_BTM: Tensor) -> Tensor:
        """(N, D) codes of (time, band) within a window, for up to one window of frames."""
        steps = math.ceil(min(audio_BTM.shape[1], AUDIO_WINDOW_FRAMES) / AUDIO_PATCH_FRAMES)
        time, band = (torch.arange(length, device=audio_BTM.device) for length in (steps, self.bands))
        return grid_codes(time, band, self.dim).to(self.embed.weight.dtype)

    def forward(self, audio_BTM: Tensor, lengths_B: Tensor | None = None, keep_BK: Tensor | None = None,
                kept_valid_BK: Tensor | None = None, path_BZ: Tensor | None = None) -> Tokens:
        """Encode the valid patches, or only those in `keep_BK` where `kept_valid_BK`; T of at most one window then."""
        patches_BNP, valid_BN = self.patches(audio_BTM, lengths_B)
        positions_ND = self.positions(audio_BTM)
        if keep_BK is None and patches_BNP.shape[1] > len(positions_ND):
            return self.windows(patches_BNP, valid_BN, positions_ND)
        if keep_BK is None:
            kept_valid_BK = valid_BN
        else:
            patches_BNP, positions_ND = take(patches_BNP, keep_BK), positions_ND[keep_BK]
        return Tokens(self.blocks(self.embed(patches_BNP) + positions_ND, kept_valid_BK, path_BZ), kept_valid_BK)

    def windows(self, patches_BNP: Tensor, valid_BN: Tensor, positions_KD: Tensor) -> Tokens:
        """Encode windows of K patches each by itself, the last one with padding; tokens and valid of the N given."""
        B, N, P = patches_BNP.shape
        K = positions_KD.shape[0]  # len() would fix it in a graph of torch.export
        padding = -N % K
        patches_XKP = F.pad(patches_BNP, (0, 0, 0, padding)).reshape(-1, K, P)
        valid_XK = F.pad(valid_BN, (0, padding)).reshape(-1, K)
        tokens_XKD = self.blocks(self.embed(patches_XKP) + positions_KD, valid_XK)
        return Tokens(tokens_XKD.reshape(B, N + padding, -1)[:, :N], valid_BN)


class TextEncoder(Encoder):
    """Bidirectional transformer (arXiv:1810.04805) on factorised token embeddings (arXiv:1909.11942)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        p = config.preset
        self.dim = p.dim
        self.words = nn.Embedding(config.vocab_size, p.word_rank)
        self.embed = nn.Linear(p.word_rank, p.dim)
        self.norm = nn.LayerNorm(p.dim)  # pretrained tables differ in scale; positions must not drown the words
        self.blocks = Blocks(p.dim, p.num_heads, p.text_depth, config.attention_chunk)

    def check(self, ids_BL: Tensor, mask_BL: Tensor | None) -> None:
        check_ids(ids_BL, mask_BL, self.words.num_embeddings)

    def forward(self, ids_BL: Tensor, mask_BL: Tensor | None = None, path_BZ: Tensor | None = None) -> Tokens:
        positions_LD = position_codes(torch.arange(ids_BL.shape[1], device=ids_BL.device), self.dim)
        valid_BL = None if mask_BL is None else mask_BL.bool()
        words_BLD = self.norm(self.embed(self.words(ids_BL)))
        return Tokens(self.blocks(words_BLD + positions_LD.to(self.norm.weight.dtype), valid_BL, path_BZ), valid_BL)


class Fusion(nn.Module):
    """A fusion token and the given modalities' tokens through blocks with chunked attention and recompute.

    `widths`: of the tokens of each modality; `bridges` bring those of another width to that of the model.
    """

    def __init__(self, config: ModelConfig, widths: Mapping[str, int]):
        super().__init__()
        p = config.preset
        self.token = nn.Parameter(torch.randn(p.dim) * 0.02)
        self.modality = nn.ParameterDict({name: nn.Parameter(torch.randn(p.dim) * 0.02) for name in MODALITIES})
        self.blocks = Blocks(p.dim, p.num_heads, p.fusion_depth, config.attention_chunk, int(config.use_checkpoint))
        others = {name: width for name, width in widths.items() if width != p.dim}
        self.bridges = nn.ModuleDict({name: nn.Linear(width, p.dim) for name, width in others.items()})

    def set_recompute(self, every: int) -> None:
        self.blocks.recompute_every = every

    def forward(self, given: dict[str, Tokens]) -> Tensor:
        """Fused state of each sample, (B, D) in float32; a sample whose tokens are all invalid is the token alone."""
        return at_least_float32(self.states(given, 1)[:, 0])

    def states(self, given: dict[str, Tokens], first: int) -> Tensor:
        """States after the last block of so many first tokens: the fusion token, then those given, in their order."""
        parts, valids = [], []
        for name, (tokens_BND, valid_BN) in given.items():
            if name in self.bridges:
                tokens_BND = apply_layer(self.bridges[name], tokens_BND)
            parts.append(tokens_BND + self.modality[name])
            valids.append(tokens_BND.new_ones(tokens_BND.shape[:2], dtype=torch.bool) if valid_BN is None else valid_BN)
        token_B1D = self.token.expand(len(parts[0]), 1, -1)
        x_BND = torch.cat([token_B1D.to(parts[0].dtype), *parts], dim=1)
        every = all(valid_BN is None for _, valid_BN in given.values())
        valid_BN = None if every else F.pad(torch.cat(valids, dim=1), (1, 0), value=True)
        return self.blocks(x_BND, valid_BN, first=first)


# ---- the model ---------------------------------------------------------------------------------------------------


class TriModalModel(nn.Module):
    """Three encoders, three projections into one space, a fusion over any subset of modalities, a classifier.

    `towers`: the pretrained ones that `config` names, by modality; those not given are opened by their names.
    """

    image: Any  # ImageEncoder or PretrainedEncoder, and so on: they are called alike
    text: Any
    audio: Any

    def __init__(self, config: ModelConfig, towers: Mapping[str, PretrainedTower] | None = None):
        super().__init__()
        towers = open_towers(config) if towers is None else towers
        self.config = config = with_towers(config, towers)
        dim = config.preset.dim
        for name, own in (("image", ImageEncoder), ("text", TextEncoder), ("audio", AudioEncoder)):
            setattr(self, name, PretrainedEncoder(towers[name], config) if name in towers else own(config))
        widths = {name: getattr(self, name).dim for name in MODALITIES}
        self.projections = nn.ModuleDict(
            {name: nn.Linear(width, config.embed_dim, bias=False) for name, width in widths.items()})
        self.fusion = Fusion(config, widths)
        self.fused_projection = nn.Linear(dim, config.embed_dim)
        self.classifier = nn.Linear(config.embed_dim, config.num_classes)
        # per pair, since image-text and audio-text settle at temperatures of their own; stores the log of the scale
        self.logit_scale = nn.ParameterDict({pair: nn.Parameter(torch.tensor(math.log(1 / 0.07))) for pair in PAIRS})
        # per pair, of the sigmoid loss alone: log odds that two strangers belong together
        self.logit_bias = nn.ParameterDict({pair: nn.Parameter(torch.tensor(0.0)) for pair in PAIRS})
        _initialise_below(self)
        nn.init.constant_(self.classifier.bias, -4.0)  # concepts are rare; most answers start right (arXiv:1708.02002)

    def features(self, modality: str, encoded: Tokens) -> Tensor:
        """Pooled, projected and L2-normalised in float32; (B, F)."""
        pooled_BD = getattr(self, modality).pool(encoded)
        with torch.autocast(pooled_BD.device.type, enabled=False):
            return F.normalize(apply_layer(self.projections[modality], pooled_BD), dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S), uint8 or floats in 0..1 -> (B, F)."""
        return self.features("image", self._encode(images=images)["image"])

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, L) token ids and their mask -> (B, F)."""
        return self.features("text", self._encode(input_ids=input_ids, attention_mask=attention_mask)["text"])

    def audio_features(self, audio: Tensor, audio_lengths: Tensor | None = None) -> Tensor:
        """(B, T, 80) log-mels of any T, lengths in frames (None: T counts) -> (B, F)."""
        return self.features("audio", self._encode(audio=audio, audio_lengths=audio_lengths)["audio"])

    def _encode(self, images: Tensor | None = None, input_ids: Tensor | None = None,
                attention_mask: Tensor | None = None, audio: Tensor | None = None,
                audio_lengths: Tensor | None = None) -> dict[str, Tokens]:
        """Check what is given, and encode it: the tokens by modality."""
        given = {"image": (images,), "text": (input_ids, attention_mask), "audio": (audio, audio_lengths)}
        encoded: dict[str, Tokens] = {}
        for name, inputs in given.items():
            if inputs[0] is not None:
                encoder = getattr(self, name)
                encoder.check(*inputs)
                encoded[name] = encoder(*inputs)
        return encoded

    @property
    def towers(self) -> dict[str, PretrainedTower]:
        """The pretrained towers by modality."""
        encoders = {name: getattr(self, name) for name in MODALITIES}
        return {name: encoder.tower for name, encoder in encoders.items() if isinstance(encoder, PretrainedEncoder)}

    @torch.no_grad()
    def bound_temperatures(self) -> None:
        """Bring each scale back to 1 to 100 (arXiv:2103.00020), after an update. Clamped in the loss it would stay."""
        for scale in self.logit_scale.values():
            scale.clamp_(0.0, MAX_LOGIT_SCALE)

    def fuse(self, given: dict[str, Tokens]) -> tuple[Tensor, Tensor, Tensor]:
        """Fused state (B, D), L2-normalised fused features (B, F) and class logits (B, C), in float32."""
        fused_BD = self.fusion(given)
        with torch.autocast(fused_BD.device.type, enabled=False):
            projected_BF = apply_layer(self.fused_projection, fused_BD)
            return fused_BD, F.normalize(projected_BF, dim=-1), apply_layer(self.classifier, projected_BF)

    def forward(self, images: Tensor | None = None, input_ids: Tensor | None = None,
                attention_mask: Tensor | None = None, audio: Tensor | None = None,
                audio_lengths: Tensor | None = None) -> dict[str, Tensor]:
        """Features of each modality given, their fusion and the class logits.

        Args:
            images: (B, 3, S, S), uint8 0..255 or floats 0..1, S a multiple of 16.
            input_ids, attention_mask: (B, L) WordPiece ids; mask 1 or True = real token.
            audio, audio_lengths: (B, T, 80) natural-log mel power (audio.log_mel); frames that are real.

        Returns:
            `image_features`, `text_features`, `audio_features` of what is given, `fused_features` (all (B, F),
            L2-normalised) and `logits` (B, num_classes).

        Raises:
            ValueError: nothing is given, a shape does not fit, or numbers cannot be what is asked for (see inputs).
        """
        encoded = self._encode(images, input_ids, attention_mask, audio, audio_lengths)
        if not encoded:
            raise ValueError("model: nothing given; pass at least one of images, input_ids, audio")
        sizes = {len(tokens.tokens_BND) for tokens in encoded.values()}
        if len(sizes) > 1:
            raise ValueError(f"model: the modalities given differ in batch size: {sorted(sizes)}")
        outputs = {f"{name}_features": self.features(name, tokens) for name, tokens in encoded.items()}
        _, outputs["fused_features"], outputs["logits"] = self.fuse(encoded)
        return outputs

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict as nn.Module does; the error for one of another size, `embed_dim`, `num_classes` or
        vocabulary names what differs."""
        if strict and (mismatch := checkpoint.describe_mismatch(state_dict, self.state_dict())):
            raise UserError(f"model: these weights are of another model than '{self.config.size}' as created here "
                            f"({mismatch}); open the file with model.load_model(path), which reads its configuration")
        return super().load_state_dict(state_dict, strict, assign)


def create_model(size: str = "base", **overrides: Any) -> TriModalModel:
    """A model of `size` (tiny, small, base, large) with fresh weights; `overrides` are keys of ModelConfig.

    Raises:
        ConfigError: an unknown size or key, or a value that is not allowed.
    """
    return TriModalModel(model_config_from_dict({"size": size, **overrides}))


def load_model(path: str | Path, device: str = "cpu") -> tuple[TriModalModel, dict[str, Any]]:
    """Open a checkpoint of this project, or its model.safetensors: the model in eval mode, and all else that it holds.

    Raises:
        UserError: the file is missing, damaged, or is not a checkpoint of this project.
    """
    state = checkpoint.load_export(path) if str(path).endswith(".safetensors") else checkpoint.load(path)
    weights, settings = state.pop("model_state_dict", None), state.get("config")
    if not (isinstance(weights, dict) and all(isinstance(value, Tensor) for value in weights.values())
            and isinstance(settings, dict) and isinstance(settings.get("model"), dict)):
        raise UserError(f"{path}: not a checkpoint of this project (it lacks model_state_dict or config.model)")
    try:
        config = model_config_from_dict(settings["model"])
    except UserError as error:
        raise UserError(f"{path}: it describes a model that cannot be made ({error})") from None
    try:
        model = TriModalModel(config, {name: build_tower(of) for name, of in state.get("towers", {}).items()})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    for name, tower in model.towers.items():
        if not any(key.startswith(f"{name}.tower.") for key in weights):
            raise UserError(f"{path}: leaves out the weights of {tower.source}, which training opens by name; take "
                            "best_model.pt or final_model.pt of its run")
    if mismatch := checkpoint.describe_mismatch(weights, model.state_dict()):
        raise UserError(f"{path}: its weights are not those of the model it describes ({mismatch})")
    model.load_state_dict(weights)
    use_kernel(model, state.setdefault("attention_kernel", KERNELS[0]))  # the only one of earlier releases
    return model.to(device).eval(), state


def open_model(source: str | Path, device: str = "auto", precision: str = "float32") -> "OpenModel":
    """A model ready for use: see OpenModel for `encode`, `compare` and `classify`.

    Args:
        source: a checkpoint, the output folder of a run, an exported folder, or `hub:NAME` (CLIP, SigLIP and CLAP of
            transformers, by name or as `hub:FOLDER`).
        device: auto, cpu, cuda, cuda:1, mps.
        precision: float32; bfloat16 or float16, of autocast; or auto, the fastest that the device has units for.

    Raises:
        UserError: nothing there can be opened, or the device or precision is unknown; the message says what to do.
    """
    from trimodal.inference.opening import opened_checkpoint, opened_hub

    if not isinstance(source, str | os.PathLike) or not str(source).strip():
        raise UserError(f"open_model: the source is {source!r}; name a checkpoint, the output folder of a run, an "
                        "exported folder, or hub:NAME")
    if str(source).startswith("hub:"):
        return opened_hub(str(source), device, precision)
    return opened_checkpoint(source, device, precision, load_model)


@functools.cache
def count_parameters(size: str) -> dict[str, int]:
    """Parameters of each part of a model of `size`, and `all`; allocates nothing."""
    with torch.device("meta"):
        model = create_model(size)
    parts = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    return {**parts, "all": sum(p.numel() for p in model.parameters())}


def _initialise_below(module: nn.Module) -> None:
    """`_initialise` all modules from the innermost outwards, without those of pretrained towers."""
    for child in module.children():
        if not isinstance(child, PretrainedTower):
            _initialise_below(child)
    _initialise(module)


def _initialise(module: nn.Module) -> None:
    """Called for a block after its layers. Chosen on recipes/synthetic.yaml: see benchmarks/README.md."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=INIT_GAIN * module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.05)  # the spread of MiniLM's table
    elif isinstance(module, Block):
        for layer in (module.up, module.down):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        with torch.no_grad():  # a token starts out less what it attends to, so what differs from its surroundings shows
            value_DD = nn.init.normal_(module.qkv.weight[-module.out.in_features:], std=module.out.in_features**-0.5)
            module.out.weight.copy_(-VALUE_INIT * value_DD.T)


if __name__ == "__main__":
    for name in SIZES:
        print(f"{name:6}", "  ".join(f"{part} {n / 1e6:.1f}M" for part, n in count_parameters(name).items()))
