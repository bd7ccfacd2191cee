"""What the Markdown files say is so: commands, flags, files, keys, links; and README_en.md mirrors README.md."""

import ast
import functools
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

import trimodal
from tests.project import ROOT
from trimodal.config import SIZES, Config, config_from_dict, load_config
from trimodal.errors import ConfigError
from trimodal.sets import SETS

CHINESE, ENGLISH = ROOT / "README.md", ROOT / "README_en.md"
READMES = pytest.mark.parametrize("readme", [CHINESE, ENGLISH], ids=lambda path: path.name)
DOCS = sorted(path for path in (ROOT / "docs").glob("*.md") if not path.stem.endswith("_en"))
PAIRS = pytest.mark.parametrize("chinese", [CHINESE, *DOCS], ids=lambda path: path.name)
MANUALS = pytest.mark.parametrize("manual", [CHINESE, ENGLISH, *sorted((ROOT / "docs").glob("*.md"))],
                                  ids=lambda path: path.name)
MOST_BYTES = 32_000  # of a README; the rest stands in docs/, by topic

PROMISED = (  # what the first version of the documentation fixed, word for word
    "./run_all.sh --demo", "./run_all.sh --model-size base --batch-size 8 --epochs 50", "bash setup_environment.sh",
    "source venv/bin/activate", "python download_datasets.py --datasets coco clotho audiocaps",
    "python run_training.py --model-size base --batch-size 8 --epochs 100",
    "--resume outputs/checkpoints/checkpoint_epoch_50.pt", "tensorboard --logdir=./outputs/logs/tensorboard",
    "bash tests/run.sh", "from model import create_model", "model = create_model('base')",
    "checkpoint = torch.load('outputs/checkpoints/best_model.pt')",
    "model.load_state_dict(checkpoint['model_state_dict'])", "outputs['fused_features']", "outputs['logits']")


class Block(NamedTuple):
    language: str
    lines: tuple[str, ...]


def blocks(text: str) -> list[Block]:
    """Fenced code blocks."""
    found = re.finditer(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    return [Block(match[2], tuple(line.rstrip() for line in match[3].splitlines())) for match in found]


def prose(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


def headings(text: str) -> list[int]:
    return [len(match[1]) for match in re.finditer(r"^(#+) ", prose(text), re.MULTILINE)]


def spans(text: str) -> list[str]:
    """Inline code."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def without_comments(lines: tuple[str, ...]) -> list[str]:
    stripped = [re.sub(r"(^|\s+)#.*", "", line) for line in lines]
    return [line for line in stripped if line.strip()]


# ---- the two languages -------------------------------------------------------------------------------------------


def table_numbers(text: str) -> list[list[str]]:
    """Numbers of each row of each table."""
    rows = [line for line in prose(text).splitlines() if line.lstrip().startswith("|")]
    return [re.findall(r"\d[\d,.]*", row) for row in rows]


def mirror_problems(one: str, other: str) -> list[str]:
    found = [] if headings(one) == headings(other) else ["other headings"]
    found += [] if table_numbers(one) == table_numbers(other) else ["other numbers in the tables"]
    pairs = [[_code(block) for block in blocks(text)] for text in (one, other)]
    if len(pairs[0]) != len(pairs[1]):
        found.append("other number of code blocks")
    return found + [f"other code block: {a[:1]}" for a, b in zip(*pairs, strict=False) if a != b]


def _code(block: Block) -> list[str]:
    return tree_names(block) if is_tree(block) else without_comments(block.lines)


def english(chinese: Path) -> Path:
    return chinese.with_name(f"{chinese.stem}_en.md")


@PAIRS
def test_the_two_languages_mirror_each_other(chinese: Path) -> None:
    assert mirror_problems(chinese.read_text("utf-8"), english(chinese).read_text("utf-8")) == []


@READMES
def test_a_readme_is_short(readme: Path) -> None:
    assert readme.stat().st_size <= MOST_BYTES


def test_mirror_gate_can_fail() -> None:
    text = "# 一\n```bash\nls  # 看\n```\n| 大小 | 15 M |\n## 二\n"
    assert mirror_problems(text, "# One\n```bash\nls  # look\n```\n| size | 15 M |\n## Two\n") == []
    assert mirror_problems(text, "# One\n```bash\nls -l\n```\n| size | 16 M |\n") == [
        "other headings", "other numbers in the tables", "other code block: ['ls']"]


@PAIRS
def test_each_language_links_to_the_other_and_the_readme_to_both(chinese: Path) -> None:
    other = english(chinese)
    assert f"({other.name})" in chinese.read_text("utf-8") and f"({chinese.name})" in other.read_text("utf-8")
    if chinese != CHINESE:
        assert f"(docs/{chinese.name})" in CHINESE.read_text("utf-8")
        assert f"(docs/{other.name})" in ENGLISH.read_text("utf-8")


# ---- files -------------------------------------------------------------------------------------------------------


@functools.cache
def project_files() -> frozenset[str]:
    listing = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                             capture_output=True, text=True, check=True).stdout
    return frozenset(name for name in listing.split("\0") if name and (ROOT / name).is_file())


def top_level() -> set[str]:
    """Files and folders (with a slash) beside README.md, without the hidden ones."""
    names = {name.split("/")[0] + ("/" if "/" in name else "") for name in project_files()}
    return {name for name in names if not name.startswith(".")}


def tree_names(block: Block) -> list[str]:
    """Names of the top level; indented lines tell what is in a folder."""
    return [line.split()[0] for line in block.lines if line.strip() and not line.startswith(" ")]


def is_tree(block: Block) -> bool:
    return len(set(tree_names(block)) & top_level()) > 10


def tree_problems(block: Block) -> list[str]:
    names = [name for name in tree_names(block) if not name.startswith(".")]
    lines = [line for line in block.lines if line.strip() and not line.startswith(" ")]
    roles = [name for name, line in zip(tree_names(block), lines, strict=True)
             if not line.partition(name)[2].strip(" #")]
    return ([f"missing {name}" for name in sorted(top_level() - set(names))]
            + [f"not there: {name}" for name in sorted(set(names) - top_level())]
            + [f"twice: {name}" for name in sorted({name for name in names if names.count(name) > 1})]
            + [f"no role: {name}" for name in roles])


@READMES
def test_file_tree_is_complete_and_gives_each_file_a_role(readme: Path) -> None:
    trees = [block for block in blocks(readme.read_text("utf-8")) if is_tree(block)]
    assert [tree_problems(tree) for tree in trees] == [[]]


def test_tree_gate_can_fail() -> None:
    lines = [f"{name}  a role" for name in sorted(top_level())]
    assert is_tree(Block("", tuple(lines))) and tree_problems(Block("", tuple(lines))) == []
    broken = Block("", (*lines[1:-1], lines[-1].split()[0], lines[1], "ghost.py  a role"))
    assert tree_problems(broken) == [f"missing {lines[0].split()[0]}", "not there: ghost.py",
                                     f"twice: {lines[1].split()[0]}", f"no role: {lines[-1].split()[0]}"]


def markdown_files() -> list[Path]:
    return [ROOT / name for name in sorted(project_files()) if name.endswith(".md")]


def link_problems(path: Path, text: str) -> list[str]:
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(text)) + re.findall(r'(?:src|href)="([^"]+)"', prose(text))
    local = [target for target in targets if not re.match(r"\w+:", target)]
    return [f"{path.name}: no {target}" for target in local if not _leads_somewhere(path, text, target)]


def _leads_somewhere(path: Path, text: str, target: str) -> bool:
    """Whether the file is there, and the heading in it."""
    name, _, anchor = target.partition("#")
    if name and not (path.parent / name).exists():
        return False
    within = (path.parent / name).read_text("utf-8") if name and anchor else text
    return not anchor or anchor in {_anchor(title) for title in re.findall(r"^#+ (.*)", prose(within), re.MULTILINE)}


def _anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", title).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def test_links_lead_somewhere() -> None:
    assert [problem for path in markdown_files() for problem in link_problems(path, path.read_text("utf-8"))] == []
    assert link_problems(ROOT / "x.md", "# D\n[a](no.md#b) [b](https://x.org/y) [c](#d) [e](#f)") == [
        "x.md: no no.md#b", "x.md: no #f"]


def missing_files(text: str) -> list[str]:
    """Files that inline code names, by an ending that only files of this project have, and that are not there."""
    named = [span for span in spans(text) if re.fullmatch(r"[\w./]+\.(?:py|sh|toml|txt)", span)]
    return [name for name in named if name.removeprefix("./") not in project_files()]


def test_named_files_exist() -> None:
    assert {path.name: found for path in markdown_files() if (found := missing_files(path.read_text("utf-8")))} == {}
    assert missing_files("`run_all.sh` and `./ghost.py`") == ["./ghost.py"]


# ---- commands ----------------------------------------------------------------------------------------------------


def commands(text: str) -> Iterator[list[str]]:
    """Words of each command of the project in shell blocks and inline code, continued lines joined."""
    lines = [line for block in blocks(text) if block.language in ("bash", "sh", "shell", "console")
             for line in re.sub(r"\\\n *", "", "\n".join(block.lines)).splitlines()]
    for line in lines + spans(text):
        for part in re.split(r"&&|;|\|", re.sub(r"(^|\s)#.*", "", line)):
            try:
                words = shlex.split(part.removeprefix("$ "))
            except ValueError:
                continue  # inline code that is no command
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]  # a variable for this command
            if len(words) > 1 and words[0] in ("python", "bash", "torchrun"):
                yield words[1:]
            elif words and words[0].startswith("./"):
                yield words


@functools.cache
def known_flags(script: str) -> frozenset[str]:
    """Flags that the help of `script` names; run_all.sh hands those of run_training.py on."""
    command = [sys.executable if script.endswith(".py") else "bash", str(ROOT / script), "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert run.returncode == 0, run.stderr
    flags = frozenset(re.findall(r"(?<![\w-])--[a-z][\w-]*", run.stdout)) | {"--help"}
    return flags | known_flags("run_training.py") if script == "run_all.sh" else flags


def command_problems(words: list[str]) -> list[str]:
    if words[0] == "-m":
        return []
    while words and words[0].startswith("-"):
        words = words[1:]  # flags of python, bash and torchrun themselves
    if not words or not re.search(r"\.(?:py|sh)$", words[0]):
        return []
    script = words[0].removeprefix("./")
    if script not in project_files():
        return [f"no such file: {script}"]
    if script.startswith("tests/") or "..." in words:
        return []
    flags = [word.split("=")[0] for word in words[1:] if word.startswith("--")]
    found = [f"{script} has no {flag}" for flag in flags if flag not in known_flags(script)]
    values = [(flag, value) for flag, value in _values(words[1:])
              if flag or script != "search.py"]  # whose words are commands, folders and questions
    return found + [problem for flag, value in values for problem in _value_problems(flag, value)]


def _values(words: list[str]) -> Iterator[tuple[str, str]]:
    """(flag, value) for each value; ("", word) for a `section.key=value`."""
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            if equals:
                yield flag, value
        elif re.match(r"[a-z_]+\.[\w.]+=", word):
            yield "", word
        else:
            yield flag, word


def _value_problems(flag: str, value: str) -> list[str]:
    placeholder = re.fullmatch(r"[A-Z_]+|.*[<\[{].*|…|\.\.\.|\]", value) is not None
    if flag == "" and not placeholder and not value.endswith(".pt"):
        try:
            load_config(None, [value])
        except ConfigError:
            return [f"no setting {value}"]
    allowed = {"--datasets": {*SETS, "all"}, "--model-size": SIZES, "--config": project_files()}.get(flag)
    foreign = allowed is None or placeholder or (flag == "--config" and not value.startswith("recipes/"))
    return [] if foreign or value in (allowed or ()) else [f"{flag} takes no {value}"]


@MANUALS
def test_commands_are_real(manual: Path) -> None:
    found = list(commands(manual.read_text("utf-8")))
    assert len(found) > (8 if "README" in manual.name else 0)
    assert [problem for words in found for problem in command_problems(words)] == []


@pytest.mark.parametrize(("text", "problems"), [
    ("`python run_training.py --epoch 3`", ["run_training.py has no --epoch"]),
    ("`python ghost.py`", ["no such file: ghost.py"]),
    ("```bash\nA=1 bash \\\n  ghost.sh  # x\n```", ["no such file: ghost.sh"]),
    ("`./run_all.sh --datasets coco clohto --demo`", ["--datasets takes no clohto"]),
    ("`./run_all.sh --model-size huge`", ["--model-size takes no huge"]),
    ("`python run_training.py training.epochs=0`", ["no setting training.epochs=0"]),
    ("`python run_training.py --config recipes/ghost.yaml`", ["--config takes no recipes/ghost.yaml"]),
    ("`bash setup_environment.sh --dev && ./run_all.sh --lr 1e-3 --datasets coco model.size=tiny`", []),
    ("`python run_training.py --resume PATH --model-size SIZE section.key=value`",
     ["no setting section.key=value"])])
def test_command_gate_can_fail(text: str, problems: list[str]) -> None:
    assert [problem for words in commands(text) for problem in command_problems(words)] == problems


@READMES
def test_promised_commands_are_there(readme: Path) -> None:
    using = ROOT / "docs" / ("using.md" if readme == CHINESE else "using_en.md")  # holds those of loading
    text = readme.read_text("utf-8") + using.read_text("utf-8")
    assert [line for line in PROMISED if line not in text] == []


# ---- keys and code -----------------------------------------------------------------------------------------------


def unknown_keys(text: str) -> list[str]:
    """`section.key` in inline code whose section is one of config.yaml's and whose key is none of it."""
    plain = Config().to_dict()
    named = [match for span in spans(text)
             if (match := re.fullmatch(r"([a-z]+)\.([a-z_]+)(=.*|:.*)?", span)) and match[1] in plain]
    return [span[0] for span in named if span[2] not in ("py", "safetensors") and span[2] not in plain[span[1]]]


@MANUALS
def test_named_keys_exist(manual: Path) -> None:
    assert unknown_keys(manual.read_text("utf-8")) == []


def test_key_gate_can_fail() -> None:
    assert unknown_keys("`training.seed`, `model.py`, `training.sede=1`, `x.y`") == ["training.sede=1"]


@MANUALS
def test_yaml_blocks_are_valid_settings(manual: Path) -> None:
    found = [block for block in blocks(manual.read_text("utf-8")) if block.language in ("yaml", "yml")]
    assert found or "README" not in manual.name
    for block in found:
        config_from_dict(yaml.safe_load("\n".join(block.lines)))


def python_problems(source: str) -> list[str]:
    """Names that a code block imports from our modules and that are not there."""
    ours = {name.removesuffix(".py").replace("/", ".") for name in project_files() if name.endswith(".py")}
    return [f"{node.module} has no {alias.name}" for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ImportFrom) and node.module in ours for alias in node.names
            if not hasattr(importlib.import_module(node.module), alias.name)]


@MANUALS
def test_python_blocks_parse_and_import_what_exists(manual: Path) -> None:
    found = [block for block in blocks(manual.read_text("utf-8")) if block.language == "python"]
    assert found or not manual.stem.startswith(("README", "using"))
    assert [problem for block in found for problem in python_problems("\n".join(block.lines))] == []
    assert python_problems("from trimodal.config import load_config, ghost") == ["trimodal.config has no ghost"]


def test_the_changelog_names_imports_that_work() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    imports = re.findall(r"\| `((?:from|import) [^`]+)` \|$", text, re.MULTILINE)
    assert len(imports) > 10
    for line in imports:
        exec(line, {})
    assert f"\n## {trimodal.__version__} (" in text
