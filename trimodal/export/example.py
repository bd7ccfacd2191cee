"""What the graphs of this folder say of a picture, a sound and texts, by numpy, onnxruntime, pillow, soundfile and
tokenizers alone.

    python example.py picture.png sound.wav "a dog barks" "rain on a roof"
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import soundfile
import tokenizers
from PIL import Image, ImageOps

FOLDER = Path(__file__).resolve().parent
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


class Exported:
    """The graphs of a folder; each row of `*_features` has length 1, so that products of rows are cosines."""

    def __init__(self, folder: Path = FOLDER):
        self.folder = folder
        self.rules = json.loads((folder / "preprocessing.json").read_text("utf-8"))
        self.graphs: dict[str, onnxruntime.InferenceSession] = {}

    def run(self, name: str, inputs: dict) -> dict:
        """All outputs of a graph, by name."""
        if name not in self.graphs:
            self.graphs[name] = onnxruntime.InferenceSession(str(self.folder / f"{name}.onnx"))
        graph = self.graphs[name]
        return dict(zip([output.name for output in graph.get_outputs()], graph.run(None, inputs), strict=True))

    def images(self, paths: list[str]) -> dict:
        pixels = np.stack([read_picture(path, self.rules["image"]) for path in paths])
        return self.run("image", {"images": pixels})

    def texts(self, texts: list[str]) -> dict:
        """tokenizer.json itself cuts what is too long, and pads to the longest."""
        rows = tokenizers.Tokenizer.from_file(str(self.folder / "tokenizer.json")).encode_batch(texts)
        return self.run("text", {"input_ids": np.array([row.ids for row in rows], np.int64),
                                 "attention_mask": np.array([row.attention_mask for row in rows], np.int64)})

    def sounds(self, paths: list[str]) -> dict:
        """What stands behind the samples of the shorter sounds is never heard."""
        sounds = [read_sound(path, self.rules["audio"]) for path in paths]
        lengths = np.array([len(sound) for sound in sounds], np.int64)
        waveform = np.stack([np.pad(sound, (0, lengths.max() - len(sound))) for sound in sounds])
        return self.run("audio", {"waveform": waveform, "samples_valid": lengths})

    def fuse(self, *found: dict) -> dict:
        """`fused_features` and `logits` of what any of the functions above gave for the same samples."""
        given = {name: value for outputs in found for name, value in outputs.items()}
        batch = len(next(iter(given.values())))
        inputs = {}
        for name, width in self.rules["fusion"].items():  # a modality that is not given has no tokens
            inputs[f"{name}_tokens"] = given.get(f"{name}_tokens", np.zeros((batch, 0, width), np.float32))
            inputs[f"{name}_valid"] = given.get(f"{name}_valid", np.zeros((batch, 0), bool))
        return self.run("fusion", inputs)


def read_picture(path: str, rule: dict) -> np.ndarray:
    """The square that the model reads, [3, S, S]: upright, transparency over white, shrunk as data sets are kept."""
    with Image.open(path, formats=FORMATS) as file:
        picture = ImageOps.exif_transpose(file)
    if picture.has_transparency_data:
        above, picture = picture.convert("RGBA"), Image.new("RGB", picture.size, "white")
        picture.paste(above, mask=above.getchannel("A"))
    picture = picture.convert("RGB")
    width, height = picture.size
    scale = min(rule["shrink_to"] / min(width, height), 8 * rule["shrink_to"] / max(width, height))
    if scale < 1:
        picture = picture.resize((max(1, round(width * scale)), max(1, round(height * scale))))
    if rule["fit"] == "pad":
        square = Image.new("RGB", (max(picture.size),) * 2, "white")
        square.paste(picture, ((square.width - picture.width) // 2, (square.height - picture.height) // 2))
        picture = square
    box = (0, 0, *picture.size)
    if rule["fit"] == "crop":
        (width, height), side = picture.size, min(picture.size) * rule["crop_pct"]
        box = ((width - side) / 2, (height - side) / 2, (width - side) / 2 + side, (height - side) / 2 + side)
    picture = picture.resize((rule["size"],) * 2, Image.Resampling[rule["filter"].upper()], box)
    pixels = np.asarray(picture).transpose(2, 0, 1)
    return pixels if rule["type"] == "uint8" else pixels.astype(np.float32) / 255


def read_sound(path: str, rule: dict) -> np.ndarray:
    """Samples [S] of the mean of the channels, or of the loudest where they cancel each other."""
    channels, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    if rate_hz != rule["rate_hz"]:
        sys.exit(f"{path}: has {rate_hz} Hz; resample it to {rule['rate_hz']} Hz first")
    mean, loudness = channels.mean(axis=1), (channels**2).sum(axis=0)
    return mean if (mean**2).sum() >= 0.01 * loudness.max() else channels[:, loudness.argmax()]


if __name__ == "__main__":
    picture, sound, *words = sys.argv[1:]
    model = Exported()
    image, audio, text = model.images([picture]), model.sounds([sound]), model.texts(words)
    for name, found in (("image", image), ("audio", audio)):
        cosines = found[f"{name}_features"] @ text["text_features"].T
        print(name, {word: round(float(cosine), 3) for word, cosine in zip(words, cosines[0], strict=True)})
    logits = model.fuse(image, audio)["logits"][0]
    print("together", [model.rules["concepts"][i] for i in (-logits).argsort()[:3]])
