"""Utterances of VoxCeleb, each once, whatever forms of it lie side by side."""

from pathlib import Path

import pytest

from trimodal.sets import voxceleb

FORMS = {"mp4": "mp4/{}.mp4", "aac": "aac/{}.m4a", "wav": "wav/{}.wav", "beside": "aac/{}.wav"}


def put(part: Path, name: str, *forms: str) -> None:
    for form in forms:
        path = part / FORMS[form].format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize(("forms", "video", "sound"), [
    (("aac",), "", "aac"), (("wav",), "", "wav"), (("mp4",), "mp4", "mp4"), (("mp4", "aac"), "mp4", "aac"),
    (("mp4", "aac", "wav"), "mp4", "wav"), (("mp4", "wav"), "mp4", "wav"), (("aac", "wav"), "", "wav"),
    (("aac", "beside"), "", "aac"), (("beside",), "", "beside")])
def test_each_utterance_is_found_once(tmp_path: Path, forms: tuple[str, ...], video: str, sound: str) -> None:
    name = "id00012/-_21Uxsk56V/00001"
    put(tmp_path, name, *forms)
    put(tmp_path, "id00013/other/00007", "aac")

    def path(form: str) -> str:
        return str(tmp_path / FORMS[form].format(name)) if form else ""

    assert sorted(voxceleb.recordings(tmp_path)) == [
        ("id00012", name, path(video), path(sound)),
        ("id00013", "id00013/other/00007", "", str(tmp_path / "aac/id00013/other/00007.m4a"))]


def test_what_is_hidden_or_no_folder_is_passed_over(tmp_path: Path) -> None:
    for name in ("id1/v/._1.wav", "id1/._v/1.wav", "._id1/v/1.wav", "id1/1.wav", "1.wav", "id1/v/1.txt", "id1/v/2.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(voxceleb.utterances(tmp_path, (".wav",))) == [("id1", "id1/v/2.wav")]
    assert list(voxceleb.utterances(tmp_path / "absent", (".wav",))) == []
