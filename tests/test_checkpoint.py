"""Checkpoints: whole or absent, damage recognised, safe loading, rotation, generators, readable mismatches."""

import io
import os
import pickle
import random
import resource
import signal
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

import trimodal
from tests import forked
from tests.refusals import assert_names, refused
from trimodal import checkpoint
from trimodal.errors import CheckpointError
from trimodal.files import remove_left
from trimodal.training import outputs


def state_of(seed: int = 0) -> dict:
    torch.manual_seed(seed)
    model = torch.nn.Linear(40, 30)
    return {"model_state_dict": model.state_dict(), "epoch": 3, "loss": 0.25, "names": ["a"], "config": {"x": None}}


def test_what_is_saved_is_what_is_loaded(tmp_path):
    state = state_of()
    checkpoint.save(state, tmp_path / "best_model.pt")
    loaded = checkpoint.load(tmp_path / "best_model.pt")
    assert loaded["schema"] == checkpoint.SCHEMA
    assert loaded["version"] == trimodal.__version__
    assert {k: v for k, v in loaded.items() if k not in ("schema", "version", "model_state_dict")} == {
        k: v for k, v in state.items() if k != "model_state_dict"}
    for name, value in state["model_state_dict"].items():
        assert torch.equal(loaded["model_state_dict"][name], value)
    assert os.listdir(tmp_path) == ["best_model.pt"]


def test_default_torch_load_and_memory_map_open_the_file(tmp_path):
    path = tmp_path / "best_model.pt"
    checkpoint.save(state_of(), path)
    for loaded in (torch.load(path), torch.load(path, mmap=True), torch.load(io.BytesIO(path.read_bytes()))):
        torch.nn.Linear(40, 30).load_state_dict(loaded["model_state_dict"])
    assert zipfile.ZipFile(path).testzip() is None


def test_values_become_plain_and_views_do_not_drag_their_storage(tmp_path):
    table = torch.zeros(1000, 1000)
    weight = torch.nn.Parameter(torch.ones(3, 3))
    checkpoint.save({"row": table[5], "wide": torch.ones(1).expand(7), "weight": weight, "score": np.float64(0.5),
                     "count": np.int32(4), "pair": (1, 2.0)}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 20_000
    loaded = torch.load(tmp_path / "a.pt")
    assert type(loaded["score"]) is float and type(loaded["count"]) is int and loaded["pair"] == (1, 2.0)
    assert torch.equal(loaded["row"], table[5]) and torch.equal(loaded["wide"], torch.ones(7))
    assert not loaded["weight"].requires_grad


def test_whole_tensors_are_not_copied_unless_a_snapshot_is_asked_for():
    weight = torch.ones(3)
    assert checkpoint.plain({"w": weight})["w"].data_ptr() == weight.data_ptr()
    snapshot = checkpoint.plain({"w": weight}, copy=True)
    weight.add_(1)
    assert torch.equal(snapshot["w"], torch.ones(3))


@pytest.mark.parametrize(("value", "named"), [
    ({"a": [Path("x")]}, ["state['a'][0]", type(Path("x")).__name__]), ({"a": np.zeros(2)}, ["state['a']", "ndarray"]),
    ({"a": {1.5: 2}}, ["state['a']", "1.5", "float"])])
def test_what_a_safe_load_would_refuse_is_not_saved(tmp_path, value, named):
    with refused(*named, error=TypeError):
        checkpoint.save(value, tmp_path / "a.pt")
    assert os.listdir(tmp_path) == []


def test_every_flipped_bit_and_every_truncation_is_recognised(tmp_path, all_repetitions):
    path = tmp_path / "a.pt"
    checkpoint.save({"w": torch.arange(8)}, path)
    good = path.read_bytes()
    random_ = random.Random(0)
    offsets = {0, 1, 5, len(good) - 1, len(good) - 64, len(good) - 65, len(good) - 130} | set(
        random_.sample(range(len(good)), 300 if all_repetitions else 60))
    for offset in offsets:
        damaged = bytearray(good)
        damaged[offset] ^= 1 << random_.randrange(8)
        path.write_bytes(damaged)
        with refused(path, error=CheckpointError):
            checkpoint.load(path)
    with zipfile.ZipFile(path) as whole:
        digest = len(whole.comment)
    for size in {4, 100, len(good) // 2, len(good) - digest, len(good) - 64, len(good) - 1}:
        path.write_bytes(good[:size])
        with refused(path, size, error=CheckpointError):
            checkpoint.load(path)
    path.write_bytes(good)
    assert torch.equal(checkpoint.load(path)["w"], torch.arange(8))


def test_files_of_others_and_missing_ones_are_named(tmp_path):
    foreign, text, empty = tmp_path / "foreign.pt", tmp_path / "text.pt", tmp_path / "empty.pt"
    torch.save({"w": torch.ones(2)}, foreign)
    text.write_text("hello, this is no checkpoint")
    empty.touch()
    for path, named in ((foreign, ""), (text, ""), (empty, "0"), (tmp_path / "none.pt", "text.pt"), (tmp_path, "")):
        with refused(path, *named.split(), error=CheckpointError):
            checkpoint.load(path)


def test_a_file_that_torch_saved_again_opens_with_a_notice_and_stays_the_users(tmp_path, capsys):
    fill(tmp_path, "checkpoint_epoch_1.pt", "checkpoint_epoch_2.pt", "checkpoint_epoch_3.pt")
    again = tmp_path / "checkpoint_epoch_3.pt"
    torch.save(torch.load(again), again)
    assert checkpoint.find_latest(tmp_path) == tmp_path / "checkpoint_epoch_2.pt", "none that cannot be checked"
    assert_names(capsys.readouterr().out.removesuffix("\n"), again, "--resume")
    assert checkpoint.load(again)["name"] == again.name
    assert_names(capsys.readouterr().out.removesuffix("\n"), again)
    checkpoint.load(tmp_path / "checkpoint_epoch_2.pt")
    assert capsys.readouterr().out == ""
    assert [path.name for path in checkpoint.rotate(tmp_path, keep_last=1)] == ["checkpoint_epoch_1.pt"]
    assert again.is_file() and checkpoint.later_than(tmp_path / "checkpoint_epoch_2.pt") == []
    whole = again.read_bytes()
    for size in (100, len(whole) // 2, len(whole) - 1):
        again.write_bytes(whole[:size])
        with refused(again, error=CheckpointError):
            checkpoint.load(again)


def test_a_newer_schema_and_one_without_are_refused(tmp_path):
    checkpoint.save({"schema": checkpoint.SCHEMA + 1}, tmp_path / "newer.pt")
    with refused(tmp_path / "newer.pt", checkpoint.SCHEMA + 1, checkpoint.SCHEMA, error=CheckpointError):
        checkpoint.load(tmp_path / "newer.pt")
    checkpoint.save({"schema": "one"}, tmp_path / "odd.pt")
    with refused(tmp_path / "odd.pt", error=CheckpointError):
        checkpoint.load(tmp_path / "odd.pt")


class Payload:
    """Pickles as a call of os.mkdir: what a hostile file would run."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_code_in_a_file_with_a_right_digest_does_not_run(tmp_path):
    marker, path = tmp_path / "was_run", tmp_path / "evil.pt"
    with open(path, "w+b") as file:
        checkpoint.write_with_digest({"schema": 1, "x": Payload(marker)}, file)
    checkpoint.verify(path)  # the digest proves wholeness, not good intent
    with refused(path, error=CheckpointError):
        checkpoint.load(path)
    assert not marker.exists()
    path.write_bytes(pickle.dumps(Payload(marker)))
    with refused(path, error=CheckpointError):
        checkpoint.load(path)
    assert not marker.exists()


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("room", [0, 3000, 1_000_000])
def test_a_full_disk_leaves_the_earlier_file_and_no_rest(tmp_path, room):
    """A limit on file size stands in for the full disk: the kernel refuses the same writes in the same place."""
    path = tmp_path / "a.pt"
    checkpoint.save({"w": torch.ones(10)}, path)
    with files_at_most(room), refused(path, os.strerror(27), error=CheckpointError):
        checkpoint.save({"w": torch.zeros(1_000_000)}, path)
    assert os.listdir(tmp_path) == ["a.pt"]
    assert torch.equal(checkpoint.load(path)["w"], torch.ones(10))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with refused(tmp_path / "file" / "a.pt", error=CheckpointError):
        checkpoint.save({}, tmp_path / "file" / "a.pt")


def _save_on_and_on(path: Path, word: Connection) -> None:
    for i in range(100_000):
        checkpoint.save({"i": i, "w": torch.full((300_000,), i)}, path)
        if i == 0:
            word.send("there is one")


@pytest.mark.timed
def test_kill_9_at_any_moment_leaves_a_whole_file(tmp_path, all_repetitions):
    path, context = tmp_path / "best_model.pt", forked.context()
    for attempt in range(25 if all_repetitions else 3):
        ours, its = context.Pipe()
        process = context.Process(target=_save_on_and_on, args=(path, its))
        process.start()
        its.close()  # so that its end ends the wait for its word
        ours.recv()
        process.join(0.013 * (attempt % 5))
        process.kill()
        process.join()
        state = checkpoint.load(path)
        assert torch.equal(state["w"], torch.full((300_000,), state["i"]))
    remove_left(tmp_path, outputs.WRITTEN)
    assert os.listdir(tmp_path) == ["best_model.pt"]


def fill(folder: Path, *names: str) -> None:
    for name in names:
        checkpoint.save({"name": name}, folder / name)


def test_the_newest_good_checkpoint_is_found_and_damaged_ones_are_named(tmp_path):
    assert checkpoint.find_latest(tmp_path / "absent") is None
    fill(tmp_path, "checkpoint_epoch_9.pt", "checkpoint_epoch_10.pt", "checkpoint_epoch_11_step_40.pt",
         "checkpoint_epoch_11_step_200.pt", "checkpoint_epoch_11.pt", "best_model.pt", "final_model.pt")
    os.utime(tmp_path / "checkpoint_epoch_9.pt")  # the newest by time, not by epoch
    heard: list[str] = []
    for expected in ("11", "11_step_200", "11_step_40", "10", "9"):
        path = checkpoint.find_latest(tmp_path, heard.append)
        assert path is not None and path.name == f"checkpoint_epoch_{expected}.pt"
        path.write_bytes(path.read_bytes()[:-10])
    assert checkpoint.find_latest(tmp_path, heard.append) is None
    assert_names(heard[0], tmp_path / "checkpoint_epoch_11.pt")
    assert len(heard) == 1 + 2 + 3 + 4 + 5


def test_rotation_keeps_the_last_every_tenth_and_all_named_models(tmp_path):
    names = [f"checkpoint_epoch_{n}.pt" for n in (8, 9, 10, 11, 12, 13, 20, 21, 22, 23)]
    fill(tmp_path, *names, "checkpoint_epoch_20_step_5.pt", "best_model.pt", "final_model.pt", "checkpoint_epoch_x.pt")
    removed = {path.name for path in checkpoint.rotate(tmp_path, keep_last=2)}
    assert set(os.listdir(tmp_path)) == {"checkpoint_epoch_10.pt", "checkpoint_epoch_20.pt", "checkpoint_epoch_22.pt",
                                         "checkpoint_epoch_23.pt", "best_model.pt", "final_model.pt",
                                         "checkpoint_epoch_x.pt"}
    assert len(removed) == 7 and "checkpoint_epoch_20_step_5.pt" in removed
    checkpoint.rotate(tmp_path, keep_last=1, keep_every=0)
    assert {n for n in os.listdir(tmp_path) if n[-4].isdigit()} == {"checkpoint_epoch_23.pt"}


def test_a_mismatch_is_told_by_prefix_with_five_names_each():
    model = {f"image.block.{i}": torch.ones(2) for i in range(8)} | {"head.weight": torch.ones(3, 4)}
    assert checkpoint.describe_mismatch(model, dict(model)) is None
    file = {"head.weight": torch.ones(5, 4), "image.block.0": torch.ones(2), "decoder.x": torch.ones(1)}
    text = checkpoint.describe_mismatch(file, model)
    assert text is not None
    assert_names(text, "image (7)", *(f"image.block.{i}" for i in range(1, 6)), 2, "decoder.x",
                 "head.weight [5, 4]", "[3, 4]")
    assert "image.block.6" not in text
