"""Sound towers of the library transformers, which read windows of a sound.

A sound longer than a window is encoded window by window; its pooled feature is the mean of those of its windows, each
by its real length, and its tokens are theirs one after another, in the order of time.

Shape suffixes: B sounds, X windows, K frames of a window, M bins, N steps, D width.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from trimodal.blocks import at_least_float32, masked_mean
from trimodal.errors import UserError
from trimodal.towers.base import Encoded, PretrainedTower, SoundInput, Source, input_of
from trimodal.towers.front_ends import MIN_SAMPLES, settings_of
from trimodal.towers.hub import HubTower, Kind, config_of, described, kind_of, load, read_json, rebuild

WAVE_WINDOW_S = 16  # the longest crops that wav2vec 2.0 was trained on (arXiv:2006.11477) have 15.6


class Sound(NamedTuple):
    kind: Kind
    front_end: str


WAVE_LACKS = ("masked_spec_embed",)  # of training alone
CLAP = Sound(Kind("ClapAudioModelWithProjection", "ClapAudioConfig", "audio_encoder.layers",
                  part=lambda model: model.audio_model, part_model="ClapAudioModel", may_lack=("audio_projection.*",),
                  attention="eager"), "clap")
KINDS = {
    "audio-spectrogram-transformer": Sound(Kind("ASTModel", "ASTConfig", "layers"), "ast"),
    "clap": CLAP, "clap_audio_model": CLAP,
    "whisper": Sound(Kind("WhisperModel", "WhisperConfig", "layers", part=lambda model: model.encoder,
                          part_model="models.whisper.modeling_whisper.WhisperEncoder", may_lack=("decoder.*",)),
                     "whisper"),
    "wav2vec2": Sound(Kind("Wav2Vec2Model", "Wav2Vec2Config", "encoder.layers", may_lack=WAVE_LACKS), "wave"),
    "hubert": Sound(Kind("HubertModel", "HubertConfig", "encoder.layers", may_lack=WAVE_LACKS), "wave"),
    "wavlm": Sound(Kind("WavLMModel", "WavLMConfig", "encoder.layers", may_lack=WAVE_LACKS, attention="eager"), "wave")}


class HubSoundTower(HubTower):
    """A tower that encodes windows; `_encode` knows the family."""

    modality = "audio"
    input: SoundInput

    def __init__(self, description: Mapping[str, Any], model: Any) -> None:
        self.of = KINDS[description["kind"]]
        super().__init__(description, self.of.kind, model, int(model.config.hidden_size))

    def forward(self, inputs: Tensor, valid: Tensor | None = None) -> Encoded:
        B, T, M = inputs.shape
        K = min(self.input.window_frames, T) if not self.input.whole_windows else self.input.window_frames
        X = -(-T // K)
        lengths_B = torch.full((B,), T, device=inputs.device) if valid is None else valid
        windows = F.pad(inputs.to(self.dtype), (0, 0, 0, X * K - T)).reshape(B * X, K, M)
        first_X = torch.arange(X, device=inputs.device) * K
        real_BX = (lengths_B[:, None] - first_X).clamp(0, K)
        tokens, real_steps = self._encode(windows, real_BX.flatten())
        N = tokens.tokens_BND.shape[1]
        valid_BN = torch.arange(N, device=inputs.device) < real_steps[:, None]
        pooled = (masked_mean(tokens.tokens_BND, valid_BN) if tokens.pooled_BD is None
                  else at_least_float32(tokens.pooled_BD))
        weight_BX1 = (real_BX / real_BX.sum(1, keepdim=True).clamp(min=1)).to(pooled.dtype)[:, :, None]
        return Encoded(tokens.tokens_BND.reshape(B, X * N, -1), valid_BN.reshape(B, X * N),
                       (pooled.reshape(B, X, -1) * weight_BX1).sum(1))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _encode(self, windows: Tensor, real: Tensor) -> tuple["Windows", Tensor]:
        """Tokens of windows [X, K, M] in the order of time, and how many steps of each are real, of `real` frames."""
        raise NotImplementedError


class Windows(NamedTuple):
    tokens_BND: Tensor
    pooled_BD: Tensor | None  # None: the mean of the real tokens


class AstTower(HubSoundTower):
    """AST (arXiv:2104.01778): a step is the mean over the bands of the patches that begin at one frame."""

    def _encode(self, windows: Tensor, real: Tensor) -> tuple[Windows, Tensor]:
        config = self.model.config
        states = self.model(input_values=windows).last_hidden_state
        bands = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
        tokens = states[:, 2:].unflatten(1, (bands, -1)).mean(1)
        return Windows(tokens, (states[:, 0] + states[:, 1]) / 2), -(-real // config.time_stride)


class ClapTower(HubSoundTower):
    """HTSAT of CLAP (arXiv:2211.06687) before its projection: a step is the mean of its bands."""

    def _encode(self, windows: Tensor, real: Tensor) -> tuple[Windows, Tensor]:
        found = self.model(input_features=windows[:, None])
        tokens = found.last_hidden_state.mean(2).mT
        steps = tokens.shape[1]
        return Windows(tokens, found.pooler_output), -(-real * steps // self.input.window_frames)


class WhisperTower(HubSoundTower):
    """The encoder of Whisper (arXiv:2212.04356), which reads 30 s whatever the sound; steps of 20 ms."""

    def _encode(self, windows: Tensor, real: Tensor) -> tuple[Windows, Tensor]:
        return Windows(self.model(input_features=windows.mT).last_hidden_state, None), -(-real // 2)


class WaveTower(HubSoundTower):
    """wav2vec 2.0 (arXiv:2006.11477) and its like, on raw samples; steps of 20 ms.

    Models whose first norm is over time ("group") take no mask: padding would change every step. Their windows are
    encoded with those of the same length alone, without any padding.
    """

    def _encode(self, windows: Tensor, real: Tensor) -> tuple[Windows, Tensor]:
        real = real.clamp(min(MIN_SAMPLES, windows.shape[1]), None)
        steps = self.model._get_feat_extract_output_lengths(real)
        if self.model.config.feat_extract_norm == "layer":
            mask = torch.arange(windows.shape[1], device=windows.device) < real[:, None]
            found = self.model(windows[:, :, 0] * mask, attention_mask=mask.long()).last_hidden_state
            return Windows(found, None), steps
        return Windows(self._by_length(windows[:, :, 0], real), None), steps

    def _by_length(self, waves: Tensor, real: Tensor) -> Tensor:
        if isinstance(real, FakeTensor) or real.is_meta:  # without values: as if all were whole
            return self.model(waves).last_hidden_state
        lengths = real.tolist()
        if len(set(lengths)) == 1:
            return self._padded(self.model(waves[:, :lengths[0]]).last_hidden_state, waves.shape[1])
        parts, rows = [], []
        for length in sorted(set(lengths)):
            rows += (same := [row for row, one in enumerate(lengths) if one == length])
            parts.append(self._padded(self.model(waves[same, :length]).last_hidden_state, waves.shape[1]))
        order = torch.tensor(rows, device=waves.device).argsort()
        return torch.cat(parts)[order]

    def _padded(self, tokens: Tensor, samples: int) -> Tensor:
        steps = int(self.model._get_feat_extract_output_lengths(samples))
        return F.pad(tokens, (0, 0, 0, steps - tokens.shape[1]))


TOWERS: dict[str, type[HubSoundTower]] = {
    "ast": AstTower, "clap": ClapTower, "whisper": WhisperTower, "wave": WaveTower}


def find_in(folder: Path, source: str, where: str) -> Source:
    """The sound tower of a local folder; `where` begins the messages of errors."""
    model_type = kind_of(folder, {name: one.kind for name, one in KINDS.items()}, "sounds", where)
    of = KINDS[model_type]
    config = config_of(folder, of.kind, where)
    stated = settings_of(of.front_end, read_json(folder, "preprocessor_config.json", where), where)
    taken = _input(of.front_end, config, stated, where)
    description = described("hub_audio", "audio", source, folder, taken, model_type, config)
    return Source(description, lambda: TOWERS[of.front_end](description, load(folder, of.kind, config, where)))


def build(description: Mapping[str, Any]) -> PretrainedTower:
    input_of(description)
    of = KINDS[description["kind"]]
    return TOWERS[of.front_end](description, rebuild(of.kind, description["config"]))


def _input(front_end: str, config: Any, stated: dict[str, Any], where: str) -> SoundInput:
    """The frames that a tower reads, of its settings and those of its front end."""
    if front_end == "ast":
        frames, bins = int(config.max_length), int(config.num_mel_bins)
        stated = {**stated, "max_length": frames, "num_mel_bins": bins}
        return SoundInput(stated.get("sampling_rate", 16_000), "ast", bins, 100.0, frames, True, stated)
    if front_end == "clap":
        if config.enable_fusion:
            raise UserError(f"{where}: it fuses several crops of a sound, drawn at random; take an unfused one, such "
                            "as hub:laion/clap-htsat-unfused")
        rate, seconds = stated.get("sampling_rate", 48_000), stated.get("max_length_s", 10)
        frames = rate * seconds // stated.get("hop_length", 480) + 1
        return SoundInput(rate, "clap", int(config.num_mel_bins), frames / seconds, frames, True, stated)
    if front_end == "whisper":
        stated = {**stated, "feature_size": int(config.num_mel_bins)}
        frames = 2 * int(config.max_source_positions)
        return SoundInput(16_000, "whisper", int(config.num_mel_bins), 100.0, frames, True, stated)
    rate = stated.get("sampling_rate", 16_000)
    return SoundInput(rate, "wave", 1, float(rate), WAVE_WINDOW_S * rate, False, stated)
