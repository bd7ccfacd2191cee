"""What archives bring goes into a folder in which the user has files: his stay, and so does what he has in ours."""

from pathlib import Path

from tests import packing
from tests.download.test_unpack import run, tree, write
from tests.refusals import refused
from trimodal.download import staging
from trimodal.sets.sources import SOURCES


def test_what_differs_is_kept_beside_and_what_is_equal_stays(tmp_path: Path) -> None:
    for name, data in (("out/a.wav", b"edited"), ("out/b.wav", b"b"), ("own/c.wav", b"c"), ("own/d.wav", b"own")):
        write(tmp_path / name, data)
    for name in ("c.wav", "d.wav"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "own" / name)
    equal = (tmp_path / "out/b.wav").stat().st_ino
    run(tmp_path, packing.zip_of({"a.wav": b"a", "b.wav": b"b", "c.wav": b"c", "d.wav": b"d", "e.wav": b"e"}), "zip")
    found = tree(tmp_path / "out")
    aside = {name.partition(".before_")[0]: found.pop(name) for name in list(found) if ".before_" in name}
    assert found == {f"{name}.wav": name.encode() for name in "abcde"}
    assert aside == {"a.wav": b"edited", "d.wav": b"own"}
    assert (tmp_path / "out/b.wav").stat().st_ino == equal and (tmp_path / "out/c.wav").is_symlink()
    assert tree(tmp_path / "own") == {"c.wav": b"c", "d.wav": b"own"}


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "out/wav", b"of the user")
    with refused(tmp_path / "out/wav"):
        run(tmp_path, packing.zip_of({"wav/a": b"a"}), "zip")
    assert tree(tmp_path / "out") == {"wav": b"of the user"}


def test_only_what_this_command_unpacked_is_cleared(tmp_path: Path) -> None:
    clotho = SOURCES["clotho"]
    ours = staging.place(tmp_path, clotho.items[6], "0123456789abcdef")
    names = [ours.name, f"{ours.name}-200", f"{ours.name}.17.old", f"{clotho.items[6].name}--200"]
    own = ["mine", f"{clotho.items[6].name}", f"{ours.name}.backup", f"x{ours.name}", f"{clotho.items[6].name}-mine"]
    for name in [*names, *own]:
        write(tmp_path / staging.STAGING / name / "a", b"a")
    assert staging.arrived_bytes(tmp_path, clotho) == len(names)
    staging.clear(tmp_path, clotho)
    assert sorted(path.name for path in ours.parent.iterdir()) == sorted(own)


def test_a_link_of_the_user_is_no_place_to_unpack(tmp_path: Path) -> None:
    write(tmp_path / "own/a", b"a")
    (tmp_path / staging.STAGING).symlink_to(tmp_path / "own")
    with refused(tmp_path / staging.STAGING):
        staging.place(tmp_path, SOURCES["coco"].items[0], "0")
    staging.clear(tmp_path, SOURCES["coco"])
    assert tree(tmp_path / "own") == {"a": b"a"}
