"""Generated pictures and sounds show what their attributes say."""

import itertools

import numpy as np
import pytest

from trimodal.config import SAMPLE_RATE_HZ
from trimodal.data import generated
from trimodal.data.generated import COLOURS, IMAGE_ATTRIBUTES, POSITIONS, SIZES, SOUND_ATTRIBUTES, attributes


def test_the_grammar_has_its_fixed_size() -> None:
    assert [len(v) for v in IMAGE_ATTRIBUTES] == [5, 5, 2, 9, 4] and generated.NUM_IMAGES == 1800
    assert [len(v) for v in SOUND_ATTRIBUTES] == [4, 3, 8, 2, 2] and generated.NUM_SOUNDS == 384


def find(combination_values: dict[str, str], kinds: tuple[tuple[str, ...], ...]) -> list[int]:
    total = int(np.prod([len(values) for values in kinds]))
    return [c for c in range(total) if set(combination_values.values()) <= set(attributes(c, kinds))]


def test_pictures_show_what_their_captions_say(all_repetitions: bool) -> None:
    """Of every seventh combination, which has all values of every attribute, or of all."""
    rng = np.random.default_rng(0)
    areas: dict[tuple[str, str], list[int]] = {}
    for combination in range(0, 1800, 1 if all_repetitions else 7):
        colour, shape, size, position, background = attributes(combination, IMAGE_ATTRIBUTES)
        picture = generated.generate_image(combination, 64, rng).astype(float)
        assert picture.shape == (64, 64, 3)
        back = np.median(picture.reshape(-1, 3), 0)
        assert nearest(back, generated.BACKGROUNDS) == background
        differs = np.abs(picture - back).max(2) > 45
        rows, columns = np.nonzero(differs)
        middle = (rows.min() + rows.max() + 1) / 2 / 64, (columns.min() + columns.max() + 1) / 2 / 64
        assert POSITIONS[int(middle[0] * 3) * 3 + int(middle[1] * 3)] == position
        away = np.abs(picture - back).max(2)
        assert nearest(picture[away > 0.8 * away.max()].mean(0), COLOURS) == colour, (colour, shape, background)
        areas.setdefault((shape, size), []).append(len(rows))
    assert areas.keys() == set(itertools.product(generated.SHAPES, SIZES))
    for shape in generated.SHAPES:
        assert max(areas[shape, "small"]) < min(areas[shape, "large"]), shape


def nearest(colour: np.ndarray, named: dict[str, tuple[int, int, int]]) -> str:
    """By hue and brightness; shades differ between draws."""
    def distance(name: str) -> float:
        other = np.array(named[name], float)
        return float(np.abs(colour - other).sum())
    return min(named, key=distance)


@pytest.mark.parametrize("size", [32, 64, 224])
def test_draws_repeat_with_their_seed_and_differ_without(size: int) -> None:
    one, same, other = (generated.generate_image(7, size, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.dtype == np.uint8 and one.shape == (size, size, 3)
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    one, same, other = (generated.generate_sound(7, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.dtype == np.float32 and np.array_equal(one, same) and not np.array_equal(one, other[:len(one)])


def test_shapes_and_sizes_differ_when_everything_else_is_equal() -> None:
    pictures = [generated.generate_image(c, 64, np.random.default_rng(3)).astype(int)
                for c in find({"c": "red", "p": "centre", "b": "grey"}, IMAGE_ATTRIBUTES)]
    assert len(pictures) == len(generated.SHAPES) * len(SIZES)
    for one, other in itertools.combinations(pictures, 2):
        assert np.count_nonzero(np.abs(one - other).max(2) > 2 * 15) >= 12  # noise is at most 15


def test_sounds_are_short_loud_enough_and_as_long_as_they_say() -> None:
    rng = np.random.default_rng(0)
    for combination in range(384):
        wave = generated.generate_sound(combination, rng)
        seconds = len(wave) / SAMPLE_RATE_HZ
        assert (seconds < 1.5) if "short" in attributes(combination, SOUND_ATTRIBUTES) else (2 < seconds < 3)
        assert 0.1 < np.abs(wave).max() <= 1


def test_registers_do_not_overlap_and_contours_move_as_they_say() -> None:
    rng = np.random.default_rng(1)
    heard: dict[str, list[float]] = {}
    for combination in find({"timbre": "sine", "length": "long"}, SOUND_ATTRIBUTES):
        _, register, contour, _, _ = attributes(combination, SOUND_ATTRIBUTES)
        pitches = pitch_track(generated.generate_sound(combination, rng))
        heard.setdefault(register, []).extend(pitches)
        first, last = np.log2(pitches[0]), np.log2(pitches[-1])
        half = np.log2(pitches[len(pitches) // 2])
        spread = np.ptp(np.log2(np.percentile(pitches, [10, 90])))
        expected = {"rising": last - first > 0.4, "falling": first - last > 0.4, "jumping": last - first > 0.6,
                    "dropping": first - last > 0.6, "arching": half - max(first, last) > 0.3,
                    "dipping": min(first, last) - half > 0.3, "steady": spread < 0.1, "alternating": spread > 0.6}
        assert expected[contour], (combination, contour, pitches)
    assert max(heard["low"]) < min(heard["middle"]) and max(heard["middle"]) < min(heard["high"])


def pitch_track(wave: np.ndarray) -> list[float]:
    """Loudest frequency of each tenth of a second in which there is a tone throughout."""
    step = SAMPLE_RATE_HZ // 10
    found = []
    for piece in (wave[i:i + step] for i in range(0, len(wave) - step, step // 2)):
        spectrum = np.abs(np.fft.rfft(piece * np.hanning(step), 16 * step))
        if spectrum.max() > 0.3 * np.abs(wave).max() * step / 4:
            found.append(float(spectrum.argmax()) * SAMPLE_RATE_HZ / (16 * step))
    return found
