"""Sound towers of transformers: random miniatures and their front ends, opened by name, beside the library itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.refusals import refused
from tests.towers.checks import TINY, check_protocol, close, edit_json, made, transformers, with_statistics
from trimodal.towers.base import Encoded, PretrainedTower, SoundInput
from trimodal.towers.front_ends import features_of, real_frames, window_samples
from trimodal.towers.opening import open_tower

AST = {**TINY, "num_mel_bins": 32, "max_length": 64, "frequency_stride": 16, "time_stride": 16}
HTSAT = {"patch_embeds_hidden_size": 16, "hidden_size": 128, "depths": [1, 1, 2, 1],
         "num_attention_heads": [1, 1, 2, 2], "projection_dim": 24}
WHISPER = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2, "num_mel_bins": 40,
           "decoder_attention_heads": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_source_positions": 50,
           "vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
WAVE = {**TINY, "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
LAYERED = {**WAVE, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str, dict[str, Any]]] = {
    "ast": ("ASTModel", "ASTConfig", AST, "ASTFeatureExtractor", {"num_mel_bins": 32, "max_length": 64}),
    "clap": ("ClapAudioModelWithProjection", "ClapAudioConfig", HTSAT, "ClapFeatureExtractor",
             {"truncation": "rand_trunc"}),
    "whisper": ("WhisperModel", "WhisperConfig", WHISPER, "WhisperFeatureExtractor",
                {"feature_size": 40, "chunk_length": 1}),
    "wav2vec2": ("Wav2Vec2Model", "Wav2Vec2Config", WAVE, "Wav2Vec2FeatureExtractor", {}),
    "wav2vec2-layer": ("Wav2Vec2Model", "Wav2Vec2Config", LAYERED, "Wav2Vec2FeatureExtractor",
                       {"return_attention_mask": True}),
    "hubert": ("HubertModel", "HubertConfig", WAVE, "Wav2Vec2FeatureExtractor", {}),
    "wavlm": ("WavLMModel", "WavLMConfig", LAYERED, "Wav2Vec2FeatureExtractor", {"return_attention_mask": True})}
ALL = pytest.mark.parametrize("family", FAMILIES)
WAVES = ("wav2vec2", "wav2vec2-layer", "hubert", "wavlm")


def saved(folder: Path, family: str) -> tuple[Any, Any]:
    model_class, config, sizes, extractor_class, settings = FAMILIES[family]
    model = made(model_class, config, **sizes)
    model.save_pretrained(folder)
    extractor = getattr(transformers, extractor_class)(**settings)
    extractor.save_pretrained(folder)
    return model, extractor


def opened(folder: Path) -> PretrainedTower:
    return open_tower(f"hub:{folder}", "audio")


def taken_by(tower: PretrainedTower) -> SoundInput:
    assert isinstance(tower.input, SoundInput)
    return tower.input


def wave(taken: SoundInput, seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    times = np.arange(round(taken.rate_hz * seconds)) / taken.rate_hz
    return (0.3 * np.sin(2 * np.pi * rng.uniform(200, 2000) * times)
            + 0.05 * rng.standard_normal(len(times))).astype(np.float32)


def encode(tower: PretrainedTower, waves: list[np.ndarray], padding: float = 0.0) -> Encoded:
    taken = taken_by(tower)
    frames = [features_of(taken, one) for one in waves]
    longest = max(map(len, frames))
    batch = torch.stack([torch.from_numpy(np.pad(one, ((0, longest - len(one)), (0, 0)), constant_values=padding))
                         for one in frames])
    with torch.no_grad():
        return tower(batch, torch.tensor([real_frames(taken, len(one)) for one in waves]))


def theirs(family: str, model: Any, extractor: Any, one: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens in the order of time and the pooled feature of one sound within a window, as the library gives them."""
    given = extractor(one, sampling_rate=extractor.sampling_rate, return_tensors="pt")
    with torch.no_grad():
        if family == "ast":
            states = model(**given).last_hidden_state
            return states[:, 2:].unflatten(1, (2, 4)).mean(1), states[:, :2].mean(1)
        if family == "clap":
            found = model.audio_model(**given)
            return found.last_hidden_state.mean(2).mT, found.pooler_output
        if family == "whisper":
            states = model.encoder(**given).last_hidden_state
            states = states[:, :-(-len(one) // 320)]
        else:
            states = model(given["input_values"]).last_hidden_state
        return states, states.mean(1)


@ALL
def test_it_is_the_library_s_own_and_keeps_to_the_protocol(family: str, tmp_path: Path) -> None:
    model, extractor = saved(tmp_path, family)
    tower = opened(tmp_path)
    taken = taken_by(tower)
    assert taken.rate_hz == extractor.sampling_rate
    window_s = window_samples(taken) / taken.rate_hz
    assert window_s == {"ast": 0.64, "clap": 10, "whisper": 1}.get(family, 16)
    for seconds in (0.3, 0.55) if family != "clap" else (3.0, 10.0):
        one = wave(taken, seconds)
        tokens, pooled = theirs(family, model, extractor, one)
        found = encode(tower, [one])
        assert found.valid_BN is not None
        real = int(found.valid_BN.sum())
        close(found.tokens_BND[:, :real], tokens[:, :real])
        close(found.pooled_BD, pooled)
        assert real == (tokens.shape[1] if family in (*WAVES, "whisper") else -(-round(
            seconds / window_s * tokens.shape[1] * 1000) // 1000))
    frames = torch.from_numpy(np.stack([features_of(taken, wave(taken, 0.3, seed)) for seed in range(2)]))
    check_protocol(tower, frames, torch.full((2,), real_frames(taken, round(0.3 * taken.rate_hz))))


@ALL
def test_frames_are_the_extractor_s(family: str, tmp_path: Path) -> None:
    _, extractor = saved(tmp_path, family)
    taken = taken_by(opened(tmp_path))
    one = wave(taken, 0.4)
    given = extractor(one, sampling_rate=taken.rate_hz, return_tensors="np")
    expected = next(iter(given.values()))[0]
    expected = {"clap": lambda: expected[0], "whisper": lambda: expected.T, "ast": lambda: expected}.get(
        family, lambda: expected[:, None])()
    found = features_of(taken, one)
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-4


@ALL
def test_a_sound_longer_than_the_window_is_the_mean_of_its_windows_by_their_length(family: str, tmp_path: Path) -> None:
    saved(tmp_path, family)
    tower = opened(tmp_path)
    taken = taken_by(tower)
    window = window_samples(taken)
    long = wave(taken, 2.5 * window / taken.rate_hz)
    parts = [long[start:start + window] for start in range(0, len(long), window)]
    found, each = encode(tower, [long]), [encode(tower, [part]) for part in parts]
    close(found.pooled_BD, (each[0].pooled_BD + each[1].pooled_BD + 0.5 * each[2].pooled_BD) / 2.5, 1e-3)
    assert found.valid_BN is not None
    tokens = torch.cat([one.tokens_BND[:, :int(one.valid_BN.sum())] for one in each if one.valid_BN is not None], dim=1)
    close(found.tokens_BND[:, found.valid_BN[0]], tokens)
    assert encode(tower, [long]).pooled_BD.equal(found.pooled_BD)


@ALL
def test_a_sound_alone_is_what_it_is_among_others(family: str, tmp_path: Path) -> None:
    """Beside shorter and longer ones, whatever lies in the padding between them."""
    saved(tmp_path, family)
    tower = opened(tmp_path)
    window_s = window_samples(taken_by(tower)) / taken_by(tower).rate_hz
    seconds = (0.2, 0.5, 1.3 * window_s) if family not in WAVES else (0.2, 0.5, 0.31)
    waves = [wave(taken_by(tower), length, seed) for seed, length in enumerate(seconds)]
    for padding in (0.0, 7.0):
        found = encode(tower, waves, padding)
        assert found.valid_BN is not None
        for row, one in enumerate(waves):
            alone = encode(tower, [one])
            assert alone.valid_BN is not None
            close(found.pooled_BD[row], alone.pooled_BD[0])
            close(found.tokens_BND[row][found.valid_BN[row]], alone.tokens_BND[0][alone.valid_BN[0]])


@ALL
def test_a_click_has_a_feature(family: str, tmp_path: Path) -> None:
    saved(tmp_path, family)
    tower = opened(tmp_path)
    found = encode(tower, [wave(taken_by(tower), 0.002)])
    assert found.pooled_BD.isfinite().all() and found.valid_BN is not None and found.valid_BN.any()


@pytest.mark.parametrize("family", ["wav2vec2", "wav2vec2-layer"])
def test_what_is_left_of_a_window_may_be_too_short_for_a_step(family: str, tmp_path: Path) -> None:
    saved(tmp_path, family)
    tower = opened(tmp_path)
    taken = taken_by(tower)
    found = encode(tower, [wave(taken, 16.01)])
    assert found.pooled_BD.isfinite().all()


def test_the_part_of_a_whole_checkpoint_of_clap(tmp_path: Path) -> None:
    model = made("ClapModel", "ClapConfig", audio_config=HTSAT, projection_dim=24, text_config={
        **TINY, "vocab_size": 20, "projection_dim": 24, "max_position_embeddings": 16})
    with_statistics(model).save_pretrained(tmp_path)
    tower = opened(tmp_path)
    frames = torch.randn(2, 1001, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        close(tower(frames).pooled_BD, model.audio_model(input_features=frames[:, None]).pooler_output)
    edit_json(tmp_path / "config.json", audio_config={**HTSAT, "enable_fusion": True})
    with refused(f"hub:{tmp_path}"):
        opened(tmp_path)


def test_another_front_end_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "ast")
    edit_json(tmp_path / "preprocessor_config.json", feature_extractor_type="WhisperFeatureExtractor")
    with refused("preprocessor_config.json", "WhisperFeatureExtractor", "ASTFeatureExtractor"):
        opened(tmp_path)
