"""Parts of a model as graphs of tensors: what a user has goes in, preprocessing that is arithmetic is done inside.

Each graph takes any number of samples, and texts and sounds of any length: none of its tensors has a size that depends
on a value. Towers give `MODALITY_features`, and the tokens that the fusion reads.

Shape suffixes: B samples, S samples of a sound at 16 kHz, T frames of M mels, H bins of a spectrum, W samples of a
window, N tokens, K patches of a window, D width, F embed_dim.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import AUDIO_PATCH_FRAMES, TriModalModel
from trimodal.blocks import Blocks, Tokens
from trimodal.config import AUDIO_WINDOW_FRAMES, MODALITIES, NUM_MELS, SAMPLE_RATE_HZ
from trimodal.data.audio import FFT, HOP, LOG_FLOOR, WINDOW, log_mel, mel_filters
from trimodal.errors import ConfigError
from trimodal.towers.base import TextInput

AUDIO_WINDOW = AUDIO_WINDOW_FRAMES * HOP  # samples
Axes = dict[str, tuple[str | int, ...]]  # of each tensor, by name: sizes, or the names of sizes that vary


class Graph(nn.Module):
    """One graph: `inputs` and `outputs` are its tensors, in the order of `forward`'s arguments and results."""

    inputs: Axes
    outputs: Axes
    traced: Sequence[int]  # lengths of the examples that the graph is made with
    cases: Sequence[Sequence[int]]  # and of the batches that it is compared on

    def __init__(self, name: str, model: TriModalModel):
        super().__init__()
        self.name, self.model = name, model

    def examples(self, lengths_B: Sequence[int], generator: torch.Generator) -> list[Tensor]:
        """Inputs of as many samples as there are lengths, drawn at random; a length is in tokens or samples."""
        raise NotImplementedError

    def expected(self, *inputs: Tensor) -> list[Tensor]:
        """The features of `inputs` as this project computes them without this graph, for comparison."""
        raise NotImplementedError


class TowerGraph(Graph):
    """A tower with its projection."""

    def __init__(self, modality: str, model: TriModalModel, inputs: Axes):
        super().__init__(modality, model)
        self.inputs, width = inputs, getattr(model, modality).dim
        self.outputs = {f"{modality}_features": ("batch", model.config.embed_dim),
                        f"{modality}_tokens": ("batch", f"{modality}_length", width),
                        f"{modality}_valid": ("batch", f"{modality}_length")}

    def results(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, F), tokens (B, N, D), and which tokens are real, (B, N)."""
        tokens_BND, valid_BN = tokens
        valid_BN = tokens_BND.new_ones(tokens_BND.shape[:2], dtype=torch.bool) if valid_BN is None else valid_BN
        return self.model.features(self.name, tokens), tokens_BND, valid_BN


class ImageGraph(TowerGraph):
    """uint8, or floats from 0 to 1; standardised inside."""

    traced, cases = (1, 1), ((1,), (1, 1), (1,) * 5)

    def __init__(self, model: TriModalModel, dtype: torch.dtype):
        side, self.dtype = model.config.image_side, dtype
        super().__init__("image", model, {"images": ("batch", 3, side, side)})

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.results(self.model.image(images))

    def examples(self, lengths_B: Sequence[int], generator: torch.Generator) -> list[Tensor]:
        images = torch.randint(0, 256, (len(lengths_B), *self.inputs["images"][1:]), dtype=torch.uint8,  # type: ignore[arg-type]
                               generator=generator)
        return [images if self.dtype == torch.uint8 else images / 255]

    def expected(self, *inputs: Tensor) -> list[Tensor]:
        return [self.model.image_features(*inputs)]


class TextGraph(TowerGraph):
    """Token ids and their mask, int64; padding changes nothing."""

    traced = (7, 5)

    def __init__(self, model: TriModalModel):
        longest = model.config.context_length
        self.cases = ((1,), (longest,), (3, longest, 1), (2,) * 5)
        super().__init__("text", model, dict.fromkeys(("input_ids", "attention_mask"), ("batch", "text_length")))
        tower = model.towers.get("text")
        if tower is not None and isinstance(tower.input, TextInput) and tower.input.pad_to:
            self.outputs["text_tokens"] = ("batch", tower.input.pad_to, model.text.dim)  # it reads padding as well

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return self.results(self.model.text(input_ids, attention_mask.bool()))

    def examples(self, lengths_B: Sequence[int], generator: torch.Generator) -> list[Tensor]:
        places_L = torch.arange(max(lengths_B))
        ids_BL = torch.randint(0, self.model.config.vocab_size, (len(lengths_B), len(places_L)), generator=generator)
        return [ids_BL, (places_L < torch.tensor(lengths_B)[:, None]).long()]

    def expected(self, *inputs: Tensor) -> list[Tensor]:
        return [self.model.text_features(*inputs)]


class AudioGraph(TowerGraph):
    """Waveforms at 16 kHz, float32, and how many samples of each are real; log-mels and windows are made inside.

    A sound's features are those of the sound alone, whatever lies behind its length.
    """

    traced = (4_000, 1_000)
    cases = ((1,), (AUDIO_WINDOW,), (AUDIO_WINDOW + 1, 8_000), (2 * AUDIO_WINDOW + 12_345, 400, AUDIO_WINDOW, 159, 160))
    positions_KD: Tensor

    def __init__(self, model: TriModalModel):
        super().__init__("audio", model, {"waveform": ("batch", "samples"), "samples_valid": ("batch",)})
        self.front_end = LogMel()
        window = torch.zeros(1, AUDIO_WINDOW_FRAMES, NUM_MELS)
        self.register_buffer("positions_KD", model.audio.positions(window).clone())

    def forward(self, waveform: Tensor, samples_valid: Tensor) -> tuple[Tensor, ...]:
        encoder = self.model.audio
        patches_BNP, valid_BN = encoder.patches(*self.front_end(waveform, samples_valid))
        # A window is as long as the longest sound, where that is shorter than a whole one.
        patches = torch.sym_min(patches_BNP.shape[1], self.positions_KD.shape[0])
        return self.results(encoder.windows(patches_BNP, valid_BN, self.positions_KD[:patches]))

    def examples(self, lengths_B: Sequence[int], generator: torch.Generator) -> list[Tensor]:
        """Tones and noise, each of its own loudness; what stands behind a length is loud."""
        lengths_B1 = torch.tensor(lengths_B)[:, None]
        seconds_S = torch.arange(int(lengths_B1.max())) / SAMPLE_RATE_HZ
        pitch_B1, loudness_B1 = (torch.rand(len(lengths_B), 1, generator=generator) for _ in range(2))
        tones_BS = (2 * torch.pi * (100 + 3_000 * pitch_B1) * seconds_S).sin()
        noise_BS = torch.randn(tones_BS.shape, generator=generator)
        sounds_BS = 0.5 * loudness_B1**4 * (tones_BS + 0.1 * noise_BS)
        return [torch.where(torch.arange(len(seconds_S)) < lengths_B1, sounds_BS, 3.0), lengths_B1[:, 0]]

    def expected(self, *inputs: Tensor) -> list[Tensor]:
        sounds = [wave_S[:length].numpy() for wave_S, length in zip(inputs[0], inputs[1].tolist(), strict=True)]
        mels = [torch.from_numpy(log_mel(wave_S)).half()[None] for wave_S in sounds]
        return [torch.cat([self.model.audio_features(mel_1TM) for mel_1TM in mels])]


class LogMel(nn.Module):
    """Waveforms to log-mels, as trimodal.data.audio.log_mel makes them, rounded to float16 as data sets keep them.

    The spectrum is a convolution with the cosines and sines of each bin: no runtime lacks that, and most have no
    quicker one of this size.
    """

    waves_H1W: Tensor
    filters_MH: Tensor

    def __init__(self) -> None:
        super().__init__()
        place_W = torch.arange(WINDOW, dtype=torch.float64)  # where a window begins has no say in its power
        turn_HW = 2 * math.pi / FFT * torch.arange(FFT // 2 + 1, dtype=torch.float64)[:, None] * place_W
        window_W = torch.hann_window(WINDOW, dtype=torch.float64)
        waves_HW = torch.cat([window_W * turn_HW.cos(), window_W * turn_HW.sin()])
        self.register_buffer("waves_H1W", waves_HW.float()[:, None])
        self.register_buffer("filters_MH", mel_filters().T.contiguous())

    def forward(self, wave_BS: Tensor, samples_B: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S), real samples (B) -> (B, T, M) with T a multiple of those of a patch, and real frames (B)."""
        S, patch = wave_BS.shape[1], AUDIO_PATCH_FRAMES * HOP
        wave_BS = torch.where(torch.arange(S) < samples_B[:, None], wave_BS, 0.0)
        padded = (S + patch - 1) // patch * patch
        wave_BS = F.pad(wave_BS, (WINDOW // 2, padded - S + WINDOW // 2 - HOP))
        cosines_BHT, sines_BHT = F.conv1d(wave_BS[:, None], self.waves_H1W, stride=HOP).chunk(2, dim=1)
        power_BTH = (cosines_BHT.square() + sines_BHT.square()).mT
        mels_BTM = (F.linear(power_BTH, self.filters_MH) + LOG_FLOOR).log()
        return mels_BTM.half().float(), (samples_B + HOP - 1) // HOP


class FusionGraph(Graph):
    """Tokens of each modality to `fused_features` and `logits`; one that is not given has 0 tokens."""

    traced, cases = (7, 5), ((1,), (9, 4), (1, 20, 2), (0,))

    def __init__(self, model: TriModalModel):
        super().__init__("fusion", model)
        self.inputs = {}
        for name in MODALITIES:
            self.inputs[f"{name}_tokens"] = ("batch", f"{name}_length", getattr(model, name).dim)
            self.inputs[f"{name}_valid"] = ("batch", f"{name}_length")
        self.outputs = {"fused_features": ("batch", model.config.embed_dim),
                        "logits": ("batch", model.config.num_classes)}

    def forward(self, image_tokens: Tensor, image_valid: Tensor, text_tokens: Tensor, text_valid: Tensor,
                audio_tokens: Tensor, audio_valid: Tensor) -> tuple[Tensor, ...]:
        given = {"image": Tokens(image_tokens, image_valid), "text": Tokens(text_tokens, text_valid),
                 "audio": Tokens(audio_tokens, audio_valid)}
        return self.model.fuse(given)[1:]

    def examples(self, lengths_B: Sequence[int], generator: torch.Generator) -> list[Tensor]:
        """Of each sample so many tokens of the text, as many of the sound but one, and one more of the image."""
        found = list[Tensor]()
        for more, name in zip((1, 0, -1), MODALITIES, strict=True):
            real_B1 = (torch.tensor(lengths_B)[:, None] + more).clamp(min=0)
            valid_BN = torch.arange(int(real_B1.max())) < real_B1
            width = self.inputs[f"{name}_tokens"][2]
            found += [torch.randn((*valid_BN.shape, int(width)), generator=generator), valid_BN]
        return found

    def expected(self, *inputs: Tensor) -> list[Tensor]:
        """Without the modalities that have no token."""
        given = {name: Tokens(*inputs[2 * i: 2 * i + 2]) for i, name in enumerate(MODALITIES)}
        return list(self.model.fuse({name: one for name, one in given.items() if one.tokens_BND.shape[1]})[1:])


def graphs_of(model: TriModalModel, modalities: Sequence[str], picture_type: torch.dtype) -> list[Graph]:
    """The graphs of the towers of `modalities`, and of the fusion. The attention of `model` becomes one product from
    here on: a graph has no use for chunks.

    Raises:
        ConfigError: a tower of sounds whose front end is not ours.
    """
    if "audio" in modalities and "audio" in model.towers:
        raise ConfigError(f"audio: {model.towers['audio'].source} reads sounds through a front end of its library, "
                          "which no graph can hold; leave it out: --modalities image text")
    for blocks in (module for module in model.modules() if isinstance(module, Blocks)):
        for block in blocks.blocks:
            block.chunk = "auto"  # type: ignore[assignment]
    made = {"image": lambda: ImageGraph(model, picture_type), "text": lambda: TextGraph(model),
            "audio": lambda: AudioGraph(model)}
    return [*(made[name]() for name in MODALITIES if name in modalities), FusionGraph(model)]
