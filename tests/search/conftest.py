"""One small index, made by an untrained model, for all tests of the search page."""

from pathlib import Path

import pytest
import soundfile

from model import open_model
from tests.search.serving import write_media
from tests.small_runs import SmallRuns
from trimodal.checkpoint import save
from trimodal.files import sha256_of
from trimodal.inference.open_model import OpenModel
from trimodal.media import is_video
from trimodal.search.index import KINDS, Entry, Index, ModelName, write_index
from trimodal.training.run import description


@pytest.fixture(scope="session")
def model(small: SmallRuns, tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    folder = tmp_path_factory.mktemp("model")
    run = small.open(folder)
    path = folder / "checkpoints" / "best_model.pt"
    state = {"stage": "align", "epoch": 1, "loss": 1.0, "model_state_dict": run.model.state_dict()}
    save({**description(run), **state}, path)
    return open_model(path, "cpu")


@pytest.fixture(scope="session")
def index(model: OpenModel, tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("media") / "my media"
    write_media(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sounds = {path: 2.0 if is_video(path) else soundfile.info(path).duration for path in files
              if path.suffix in (".wav", ".flac", ".ogg", ".webm")}
    pictures = [path for path in files if path not in sounds or is_video(path)]
    entries = [Entry(kind, path.relative_to(folder).as_posix(), sha256_of(path), 0.0, seconds, 1, 1)
               for kind, paths in zip(KINDS, (dict.fromkeys(pictures, 0.0), sounds), strict=True)
               for path, seconds in paths.items()]
    features = [*model.encode(images=pictures).numpy(), *model.encode(audio=list(sounds)).numpy()]
    place: Path = folder.parent / "index"
    place.mkdir()
    write_index(place, folder, ModelName.of(model, "best_model.pt"), entries, features)
    return Index.open(place)
