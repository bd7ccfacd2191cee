"""What counts as a query, a candidate and a right answer: by hand on lists as those of papers, and by brute force."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch import Tensor

from datasets import Data, load_data
from model import Tokens
from tests.small_runs import RECIPE
from trimodal.config import Config, config_from_dict
from trimodal.evaluation import protocols
from trimodal.evaluation.protocols import Encoded, Figures

PLAIN = protocols.Setting(device=torch.device("cpu"), concepts=False)

# Four clips of five captions, as AudioCaps' test: two clips have a caption twice, two captions stand at two clips.
CLIPS = (("rain", "Rain.", "a man", "water", "drops"), ("a man", "talk", "speech", "A man", "voice"),
         ("dog", "bark", "puppy", "woof", "growl"), ("song", "birds", "rain", "chirp", "tweet"))
# Clip n is the n-th unit vector. A caption is that of its clip, but for these:
CAPTIONS = {"rain": {0: 0.6, 3: 0.8}, "a man": {0: 0.6, 1: 0.8}, "woof": {0: 1.0}, "birds": {2: 0.7, 3: 0.7},
            "song": {3: 0.6, 9: 0.8}, "chirp": {3: 0.6, 9: 0.8}, "tweet": {3: 0.6, 9: 0.8}}


class Clips(torch.nn.Module):
    """A model that knows pictures by their colour, sounds by their length, and captions by their words."""

    towers: Mapping[str, Any] = {}  # all of its own

    def __init__(self, data: Data, vectors: dict[str, Tensor]):
        super().__init__()
        ids, mask = data.tokenizer.encode(list(vectors), 12)
        self.words = {tuple(row[keep].tolist()): vector
                      for row, keep, vector in zip(ids, mask, vectors.values(), strict=True)}
        assert len(self.words) == len(vectors)

    def image_features(self, images: Tensor) -> Tensor:
        return torch.eye(32)[(images[:, 0, 16, 16].float() / 10).round().long()]

    def audio_features(self, audio: Tensor, lengths: Tensor) -> Tensor:
        return torch.eye(32)[lengths // 10 - 10]

    def text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        return torch.stack([self.words[tuple(row[keep].tolist())] for row, keep in zip(ids, mask, strict=True)])


def picture(folder: Path, number: int, name: str = "") -> str:
    path = folder / f"{name or number}.png"
    Image.fromarray(np.full((40, 40, 3), 10 * number, np.uint8)).save(path)
    return path.name


def sound(folder: Path, number: int, name: str = "") -> str:
    path = folder / f"{name or number}.wav"
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * np.sin(np.arange(1600 * (10 + number)) / 5), 16_000)  # 1 s, and 0.1 s more for each
    return path.name


def clips(data: Data) -> Clips:
    vectors: dict[str, Tensor] = {}
    for number, captions in enumerate(CLIPS):
        for text in captions:
            weights = CAPTIONS.get(text.lower().rstrip("."), {number: 1.0})
            vectors[text.lower()] = torch.stack([w * torch.eye(32)[n] for n, w in weights.items()]).sum(0)
    return Clips(data, vectors)


def settings(folder: Path, datasets: Sequence[str], **sections: dict[str, Any]) -> Config:
    base: dict[str, Any] = {
        "data": {"datasets": list(datasets), "manifest": str(folder / "own.jsonl"), "workers": 0, "cache": False},
        "model": RECIPE["model"], "evaluation": {"batch_size": 3, "resamples": 0},
        "paths": {"data_root": str(folder / "data"), "output_dir": str(folder / "out")}}
    return config_from_dict({name: {**values, **sections.get(name, {})} for name, values in base.items()})


def manifest(folder: Path, lines: Sequence[dict[str, Any]]) -> Config:
    (folder / "own.jsonl").write_text("".join(json.dumps({"split": "test", **line}) + "\n" for line in lines))
    return settings(folder, ["manifest"])


def one_line_a_clip(folder: Path) -> Config:
    return manifest(folder, [{"audio": sound(folder, n), "text": list(texts)} for n, texts in enumerate(CLIPS)])


def one_line_a_caption(folder: Path) -> Config:
    for number in range(len(CLIPS)):
        sound(folder, number)
    return manifest(folder, [{"audio": f"{n}.wav", "text": texts[i]}
                             for i in range(5) for n, texts in enumerate(CLIPS)])


def under_five_paths(folder: Path) -> Config:
    """Links, hence samples that a list does not tell to be of one file."""
    for number in range(len(CLIPS)):
        sound(folder, number)
        for i in range(1, 5):
            (folder / f"{number}_{i}.wav").symlink_to(f"{number}.wav")
    return manifest(folder, [{"audio": f"{n}_{i}.wav" if i else f"{n}.wav", "text": text}
                             for n, texts in enumerate(CLIPS) for i, text in enumerate(texts)])


def of_audiocaps(folder: Path) -> Config:
    root = folder / "data" / "audiocaps"
    for split, listed in {"train": CLIPS[:1], "val": CLIPS[:1], "test": CLIPS}.items():
        (root / "dataset").mkdir(parents=True, exist_ok=True)
        with (root / "dataset" / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["audiocap_id", "youtube_id", "start_time", "caption"])
            writer.writerows([100 * n + i, f"{split}Video{n}", 30, text]
                             for n, texts in enumerate(listed) for i, text in enumerate(texts))
        for number in range(len(listed)):
            sound(root / split, number, f"{split}Video{number}_30")
    return settings(folder, ["audiocaps"])


def evaluated(config: Config) -> tuple[Figures, Encoded, Data]:
    data = load_data(config, ["test"])
    return *protocols.evaluate_split(clips(data), data, "test", config, PLAIN), data


@pytest.mark.parametrize("listed", [of_audiocaps, one_line_a_clip, one_line_a_caption, under_five_paths])
def test_ours_and_the_count_of_papers_by_hand(listed: Callable[[Path], Config], tmp_path: Path) -> None:
    """The same whether a file stands on one line, on five, or under five names."""
    figures, _, _ = evaluated(listed(tmp_path))
    found = figures["all"]["audio-text"]
    by_name = {name: (figure["value"], figure["queries"], figure["candidates"]) for name, figure in found.items()}
    # wrong: "woof", and "birds", which is as near to the dog. "rain" and "a man" are right for both of their clips
    assert by_name["text_to_audio_R@1"] == (pytest.approx(16 / 18), 18, 4)
    # "rain" of clip 0 (twice) and its "a man" find the other clip that has these words
    assert by_name["text_to_audio_R@1_per_caption"] == (pytest.approx(15 / 20), 20, 4)
    # wrong: clip 0, to which "woof" is as near as "water". The best for clip 3 is "rain", its own and that of clip 0
    assert by_name["audio_to_text_R@1"] == (pytest.approx(3 / 4), 4, 18)
    # the two "rain" of clip 0 stand before that of clip 3, to which they are equal: ties count against the model
    assert by_name["audio_to_text_R@1_per_caption"] == (pytest.approx(2 / 4), 4, 20)
    assert by_name["audio_to_text_median_rank"][0] == 1.0 and by_name["audio_to_text_median_rank_per_caption"][0] == 1.5
    assert by_name["text_to_audio_R@5_per_caption"] == (1.0, 20, 4)
    assert found["text_to_audio_R@1"]["chance"] == pytest.approx((14 / 4 + 4 * 2 / 4) / 18)
    assert found["text_to_audio_R@1_per_caption"]["chance"] == pytest.approx(1 / 4)
    assert found["audio_to_text_R@1_per_caption"]["chance"] == pytest.approx(5 / 20)
    names = list(found)
    assert len(names) == 20 and names[1::2] == [f"{name}_per_caption" for name in names[::2]], "one beside the other"


def naive(scores: Tensor, right: Tensor) -> dict[str, float]:
    """Places of the right ones in every query's whole list, the wrong ones first among equal scores."""
    firsts = []
    for row, is_right in zip(scores.tolist(), right.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda j: (-row[j], is_right[j]))
        firsts.append(next(place for place, j in enumerate(order, start=1) if is_right[j]))
    return {f"R@{k}": float(np.mean([first <= k for first in firsts])) for k in (1, 5, 10)} | {
        "median_rank": float(np.median(firsts))}


@pytest.mark.parametrize("seed", range(3))
def test_random_lists_with_ties_copies_and_doubles_equal_brute_force(seed: int, tmp_path: Path) -> None:
    """Twelve pictures, some on several lines or under several names; equal captions within and across them."""
    rng = np.random.default_rng(seed)
    for number in range(12):
        picture(tmp_path, number)
        (tmp_path / f"{number}_link.png").symlink_to(f"{number}.png")
    words = [f"number {n}" for n in range(20)]
    lines, told = [], []
    for line in range(25):
        number = line if line < 12 else int(rng.integers(12))
        texts = rng.choice(words, int(rng.integers(1, 5))).tolist()  # some of them twice
        lines.append({"image": f"{number}{'_link' * int(rng.integers(2))}.png", "text": texts, "id": str(line)})
        told += [(number, text) for text in texts]
    vectors = {text: torch.from_numpy(rng.integers(0, 3, 32)).float() for text in words}  # many scores are equal
    config = manifest(tmp_path, lines)
    data = load_data(config, ["test"])
    found = protocols.evaluate_split(Clips(data, vectors), data, "test", config, PLAIN)[0]["all"]["image-text"]
    pictures = torch.eye(32)[:12]
    once = list(dict.fromkeys(told))
    for suffix, pairs in (("", once), ("_per_caption", told)):
        scores = pictures @ torch.stack([vectors[text] for _, text in pairs]).T
        owner = torch.tensor([number for number, _ in pairs])
        right = owner == torch.arange(12)[:, None]
        if not suffix:
            right = torch.tensor([[(number, text) in once for _, text in pairs] for number in range(12)])
        for direction, table, mask in (("image_to_text", scores, right), ("text_to_image", scores.T, right.T)):
            for name, value in naive(table, mask).items():
                assert found[f"{direction}_{name}{suffix}"]["value"] == pytest.approx(value), (direction, name, suffix)
            assert found[f"{direction}_R@1{suffix}"]["queries"] == len(table)
            assert found[f"{direction}_R@1{suffix}"]["candidates"] == table.shape[1]


def test_one_picture_with_two_sounds_and_one_sound_of_two_pictures(tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path, number)
        sound(tmp_path, number)
    pairs = ((0, 0), (0, 1), (1, 2), (2, 2))
    config = manifest(tmp_path, [{"image": f"{i}.png", "audio": f"{s}.wav", "text": f"number {n}"}
                                 for n, (i, s) in enumerate(pairs)])
    data = load_data(config, ["test"])
    vectors = {f"number {n}": torch.eye(32)[i] for n, (i, _) in enumerate(pairs)}
    found = protocols.evaluate_split(Clips(data, vectors), data, "test", config, PLAIN)[0]["all"]

    def value(pair: str, name: str) -> tuple[float, int, int]:
        figure = found[pair][name]
        return round(figure["value"], 9), figure["queries"], figure["candidates"]

    # the model takes sound n for picture n: right for 0 and 2, while sound 1 belongs to picture 0
    assert value("image-audio", "image_to_audio_R@1") == (round(2 / 3, 9), 3, 3)
    assert value("image-audio", "audio_to_image_R@1") == (round(2 / 3, 9), 3, 3)
    assert found["image-audio"]["image_to_audio_R@1"]["chance"] == pytest.approx((2 / 3 + 1 / 3 + 1 / 3) / 3)
    assert not any("caption" in name for name in found["image-audio"])
    assert value("image-text", "text_to_image_R@1") == (1.0, 4, 3)
    assert value("image-text", "text_to_image_R@1_per_caption") == (1.0, 4, 3)
    assert value("image-text", "image_to_text_R@1") == (1.0, 3, 4)
    # sound 1 hears what is said of picture 0 no more than what is said of picture 1; sound 2 has both of its captions
    assert value("audio-text", "audio_to_text_R@1") == (round(1 / 3, 9), 3, 4)


def test_two_lines_of_one_file_alone_are_nothing_to_compare(tmp_path: Path) -> None:
    picture(tmp_path, 0)
    (tmp_path / "link.png").symlink_to("0.png")
    config = manifest(tmp_path, [{"image": "0.png", "text": "number 0"}, {"image": "link.png", "text": "number 1"}])
    data = load_data(config, ["test"])
    assert not protocols.can_score(data, "test")
    vectors = {f"number {n}": torch.eye(32)[n] for n in range(2)}
    assert protocols.evaluate_split(Clips(data, vectors), data, "test", config, PLAIN)[0] == {}


class Labels(Clips):
    """Says of picture n what row n of `logits` says."""

    def __init__(self, data: Data, logits: Tensor):
        super().__init__(data, {"number 0": torch.zeros(32)})
        self.logits = logits

    def image(self, images: Tensor) -> Tokens:
        return Tokens(self.image_features(images)[:, None], None)

    def features(self, modality: str, encoded: Tokens) -> Tensor:
        return encoded.tokens_BND[:, 0]

    def fuse(self, given: Mapping[str, Tokens]) -> tuple[Tensor, Tensor, Tensor]:
        (features,) = (encoded.tokens_BND[:, 0] for encoded in given.values())
        return features, features, self.logits[features.argmax(1)]


def test_a_picture_under_two_names_has_the_labels_of_both(tmp_path: Path) -> None:
    """And is one candidate: "cat" is no error of its first name."""
    for number in range(3):
        picture(tmp_path, number)
    (tmp_path / "link.png").symlink_to("0.png")
    named = {"0.png": ["dog"], "1.png": ["dog"], "link.png": ["cat"], "2.png": ["cat"]}
    config = manifest(tmp_path, [{"image": image, "labels": labels} for image, labels in named.items()])
    data = load_data(config, ["test"], concepts=["cat", "dog"])
    logits = torch.zeros(3, config.model.num_classes)
    logits[:, 0], logits[:, 1] = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1.0, 3.0, 2.0])
    setting = protocols.Setting(device=torch.device("cpu"))
    found = protocols.evaluate_split(Labels(data, logits), data, "test", config, setting)[0]["all"]["image-concepts"]
    figure = found["image_to_concepts_mAP"]
    # cat, right for 0 and 2, finds 0, 1, 2; dog, right for 0 and 1, finds 1, 2, 0
    assert figure["value"] == pytest.approx(((1 / 1 + 2 / 3) / 2 + (1 / 1 + 2 / 3) / 2) / 2)
    assert (figure["queries"], figure["candidates"]) == (2, 3)
