"""Names that others may read: those of a hub, of packages, of data sets and settings, and none that is a path."""

import re
import shlex
from pathlib import Path

from trimodal.sets import SETS

NAME = re.compile(r"(timm|torchvision|package|hub):([\w.-]+/)?[\w.-]+(@[\w.-]+)?", re.ASCII)
FLAGS = ("--model-size", "--batch-size", "--epochs", "--lr", "--datasets")  # of run_training.py: no value is a path
KEYS = re.compile(r"(training|stages|memory|evaluation)\.[\w.]+|model\.(?!.*(tower|weights|word_embeddings))[\w.]+|"
                  r"data\.(datasets|fit|cache|views|min_crop|flip|audio_max_s|spec_augment|fold)")
RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def is_public(name: str) -> bool:
    """Whether a name is one that others know, and no folder or file of this machine."""
    return bool(NAME.fullmatch(name)) and not Path(name.partition(":")[2]).exists()


def public_name(name: str) -> str:
    """The name of a tower, or what stands for a folder of this machine."""
    return name if is_public(name) else "./local"


def public_command(command: str) -> str:
    """A command of training with what is known to name no path: flags of FLAGS, settings of KEYS, our recipes."""
    words, kept = shlex.split(command), list[str]()
    for number, word in enumerate(words):
        flag = next((one for one in reversed(words[:number]) if one.startswith("-")), "")
        key, _, value = word.partition("=")
        before = words[number - 1] if number else ""
        if word in FLAGS or (flag == "--datasets" and word in SETS) or (before in FLAGS and _is_plain(word)):
            kept.append(word)
        elif (value and KEYS.fullmatch(key) and _is_plain(value)) or (key in FLAGS and _is_plain(value)):
            kept.append(word)
        elif before == "--config" and (RECIPES / Path(word).name).is_file() and Path(word).parent.name == "recipes":
            kept += ["--config", f"recipes/{Path(word).name}"]
    return shlex.join(["python", "run_training.py", *kept])


def _is_plain(value: str) -> bool:
    """Whether a value names no file: numbers, words and lists of them."""
    return bool(re.fullmatch(r"[\w.+\-,\[\]{}: ()|*?!'\"]*", value))
