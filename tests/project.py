"""Where the files of the project are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def product_files() -> list[Path]:
    """The commands and shared modules of the root, and all of the package, sorted."""
    return sorted([*ROOT.glob("*.py"), *(ROOT / "trimodal").rglob("*.py")])


def module_name(path: Path) -> str:
    """The name by which a product file is imported: `model`, `trimodal.training.loop`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def product_name(path: Path) -> str:
    """The same without the package's name: `model`, `training.loop`."""
    return module_name(path).removeprefix("trimodal.")
