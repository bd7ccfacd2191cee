"""--init: a new run begins with what fits of a checkpoint's weights, and says what was taken and what was left."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import model as model_module
import run_training
from tests.ranks import in_ranks
from tests.refusals import assert_names, refused
from tests.small_runs import SmallRuns, records
from trimodal import checkpoint, distributed, doctor
from trimodal.config import PRESETS, ModelConfig, Preset
from trimodal.data.tokenizer import Tokenizer
from trimodal.files import sha256_of
from trimodal.training import initial, loop, resume
from trimodal.training.run import Options, Run, open_run

QUICK = ("evaluation.max_validation=8", "report.gallery_queries=0", "training.epochs=3")


@pytest.fixture(scope="module")
def whole(small: SmallRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all three stages, to begin others with."""
    folder = tmp_path_factory.mktemp("whole")
    small.train(folder, *QUICK)
    return folder


@pytest.fixture(scope="module")
def best(whole: Path) -> Path:
    return whole / "checkpoints" / "best_model.pt"


def begun(small: SmallRuns, folder: Path, init: Path | str, *overrides: str) -> Run:
    """A run before its first step, which begins with the weights of `init`."""
    run = open_run(small.config(folder, *overrides), Options("cpu", init=str(init)), None)
    run.tracker.close()
    return run


def rewritten(best: Path, folder: Path, **changed: Any) -> Path:
    """The checkpoint with other entries, in a file of its own."""
    state = checkpoint.load(best)
    checkpoint.save({**state, **changed}, folder / "changed.pt")
    return folder / "changed.pt"


def left(run: Run) -> dict[str, dict[str, list[str]]]:
    assert run.initialised_from is not None
    return {name: part["left"] for name, part in run.initialised_from["parts"].items() if part["left"]}


# ---- which file --------------------------------------------------------------------------------------------------


def test_each_file_and_folder_of_a_run_will_do(whole: Path, tmp_path: Path) -> None:
    folder = whole / "checkpoints"
    for given, found in ((whole, "best_model.pt"), (folder, "best_model.pt"), *((folder / name, name) for name in (
            "best_model.pt", "final_model.pt", "model.safetensors", "checkpoint_epoch_3.pt"))):
        source = initial.read_source(str(given))
        assert source.path == folder / found and source.sha256 == sha256_of(folder / found)
        assert source.weights.keys() == checkpoint.load(folder / "best_model.pt")["model_state_dict"].keys()
        assert source.name == found, "no path of the user's"
    for name in ("final_model.pt", "model.safetensors", "checkpoint_epoch_3.pt"):
        target = tmp_path / name / "checkpoints"
        shutil.copytree(folder, target, ignore=lambda _, names, kept=name: [
            other for other in names if other not in (kept, "config.json")])
        assert initial.find_checkpoint(str(tmp_path / name)) == target / name


def test_the_name_is_the_path_as_given_unless_that_tells_of_the_machine(
        best: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(best.parent, tmp_path / "old" / "checkpoints")
    monkeypatch.chdir(tmp_path)
    assert initial.read_source("old").name == "old/checkpoints/best_model.pt"
    monkeypatch.chdir(tmp_path / "old" / "checkpoints")
    assert initial.read_source("../../old").name == "best_model.pt"


def test_what_holds_no_model_is_refused(best: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("no zip")
    torch.save({"schema": 1, "model_state_dict": {}}, tmp_path / "other.pt")
    for name in ("none.pt", "empty", "text.pt", "other.pt"):
        with refused("--init", tmp_path / name):
            initial.read_source(str(tmp_path / name))
    with refused("--init", "concepts"):
        initial.read_source(str(rewritten(best, tmp_path, concepts=[["a list"]])))


# ---- what is taken -----------------------------------------------------------------------------------------------


def test_a_run_like_it_begins_with_all_of_its_weights(small: SmallRuns, best: Path, tmp_path: Path) -> None:
    run = begun(small, tmp_path / "run", best)
    for name, value in checkpoint.load(best)["model_state_dict"].items():
        assert torch.equal(run.model.state_dict()[name], value), name
    taken = run.initialised_from
    assert taken is not None and left(run) == {}
    assert taken["taken"] == taken["parameters"] == sum(value.numel() for value in run.model.state_dict().values())
    assert taken["stage"] == "finetune" and taken["epoch"] == 3 and taken["sha256"] == sha256_of(best)


def test_words_are_matched_by_their_text(small: SmallRuns, best: Path, tmp_path: Path) -> None:
    """The file's vocabulary in another order, one of its words unknown here, and one here unknown to it."""
    state = checkpoint.load(best)
    content = json.loads(state["tokenizer"])
    words = content["model"]["vocab"]
    special = {token["content"] for token in content["added_tokens"]}
    plain = [word for word in words if word not in special]
    renamed = {**words, **{word: words[other] for word, other in zip(plain, reversed(plain), strict=True)}}
    renamed["neverhere"] = renamed.pop(plain[3])
    content["model"]["vocab"] = renamed
    path = rewritten(best, tmp_path, tokenizer=json.dumps(content))
    fresh = small.open(tmp_path / "fresh").model.text.words.weight
    run = begun(small, tmp_path / "run", path)
    table, given = run.model.text.words.weight, state["model_state_dict"]["text.words.weight"]
    for word, number in Tokenizer.from_json(state["tokenizer"])._backend.get_vocab().items():
        expected = fresh[number] if word == plain[3] else given[renamed[word]]
        assert torch.equal(table[number], expected), word
    assert run.initialised_from is not None
    assert run.initialised_from["parts"]["text.words"]["rows"] == (134, 135)
    table_of_log = initial.format_table(run.initialised_from)
    assert "134 of 135 words" in table_of_log


def test_classes_are_matched_by_their_concept(small: SmallRuns, best: Path, tmp_path: Path) -> None:
    state = checkpoint.load(best)
    known = state["concepts"]
    fresh = copy.deepcopy(small.open(tmp_path / "fresh").model.classifier)
    run = begun(small, tmp_path / "run", rewritten(best, tmp_path, concepts=[*reversed(known[2:]), "other"]),
                "model.num_classes=40")
    assert list(run.data.concepts) == known[:40] != known
    weight, given = run.model.classifier.weight, state["model_state_dict"]["classifier.weight"]
    bias = state["model_state_dict"]["classifier.bias"]
    for number, name in enumerate(run.data.concepts):
        if name not in known[2:]:
            assert run.model.classifier.bias[number] == fresh.bias[0], "as of a run from nothing"
        else:
            there = len(known) - 1 - known.index(name)
            assert torch.equal(weight[number], given[there]) and run.model.classifier.bias[number] == bias[there]
    assert run.initialised_from is not None
    assert run.initialised_from["parts"]["classifier"]["rows"] == (len(run.data.concepts) - 2, len(run.data.concepts))


def test_blocks_that_both_have_are_taken(small: SmallRuns, best: Path, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    nano = PRESETS["nano"]
    deeper = Preset(**{**vars(nano), "image_depth": 5, "audio_depth": 1})
    monkeypatch.setitem(PRESETS, "nano", deeper)
    run = begun(small, tmp_path / "run", best)
    given = checkpoint.load(best)["model_state_dict"]
    own = run.model.state_dict()
    assert torch.equal(own["image.blocks.blocks.1.up.weight"], given["image.blocks.blocks.1.up.weight"])
    assert torch.equal(own["audio.blocks.blocks.0.up.weight"], given["audio.blocks.blocks.0.up.weight"])
    assert left(run).keys() == {"image", "audio"}
    assert run.initialised_from is not None
    lines = {line.split()[0]: line for line in initial.format_table(run.initialised_from).splitlines()}
    assert_names(lines["image"], "not in the file", "blocks 2 to 4")
    assert_names(lines["audio"], "not in the model", "block 1")


def test_other_widths_leave_what_does_not_fit_and_what_reads_it(small: SmallRuns, best: Path, tmp_path: Path) -> None:
    run = begun(small, tmp_path / "run", best, "model.embed_dim=16")
    assert left(run) == {
        "projections": {"of another shape": [f"projections.{name}.weight" for name in ("image", "text", "audio")]},
        "fused_projection": {"of another shape": ["fused_projection.weight", "fused_projection.bias"]},
        "classifier": {"of another shape": ["classifier.weight", "classifier.bias"]}}
    given = checkpoint.load(best)["model_state_dict"]
    assert torch.equal(run.model.image.embed.weight, given["image.embed.weight"])


def test_nothing_that_fits_is_an_error(small: SmallRuns, best: Path, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Temperatures, which all models have, count as nothing; classes of features that are others are not taken."""
    nano = PRESETS["nano"]
    monkeypatch.setitem(PRESETS, "nano", Preset(**{**vars(nano), "dim": 12, "num_heads": 3, "word_rank": 6}))
    with refused("--init", best, "nano"):
        begun(small, tmp_path / "run", best)


@pytest.mark.parametrize(("before", "now", "is_taken"), [
    ("infonce", "infonce", True), ("infonce", "sigmoid", False), ("sigmoid", "sigmoid", True),
    ("sigmoid", "infonce", True)])
def test_temperatures_are_taken_where_they_mean_something(small: SmallRuns, best: Path, tmp_path: Path, before: str,
                                                          now: str, is_taken: bool) -> None:
    state = checkpoint.load(best)
    config = {**state["config"], "training": {**state["config"]["training"], "contrastive_loss": before}}
    run = begun(small, tmp_path / "run", rewritten(best, tmp_path, config=config), f"training.contrastive_loss={now}")
    assert ("temperatures" not in left(run)) is is_taken
    scale = state["model_state_dict"]["logit_scale.image_text"]
    assert torch.equal(run.model.logit_scale["image_text"], scale) is is_taken
    begins = resume.begins_with_sigmoid(run.config, None, run.initialised_from)
    assert begins is (now == "sigmoid" != before)


def test_a_tower_of_another_kind_is_left_with_what_stands_on_it(best: Path) -> None:
    """By architecture and input; another name, licence or digest of the same is no other tower."""
    model = model_module.TriModalModel(ModelConfig(size="nano", vocab_size=135, embed_dim=8, num_classes=60))
    state = checkpoint.load(best)
    tokenizer, concepts = Tokenizer.from_json(state["tokenizer"]), state["concepts"]
    other = {"family": "timm", "source": "timm:one", "licence": "mit", "digest": "1", "input": {"size": 224}}
    source = initial.Source(best, "best_model.pt", "", {**state, "towers": {"image": other}})
    taken = initial.take_weights(source, model, tokenizer, concepts, "infonce")
    assert list(taken["parts"]["image"]["left"]) == ["of another tower"] and taken["parts"]["image"]["taken"] == 0
    assert taken["parts"]["projections"]["left"] == {"of another tower": ["projections.image.weight"]}
    assert taken["parts"]["text"]["left"] == {} == taken["parts"]["audio"]["left"]
    match = initial.Match({}, {}, {"image"}, (), False)
    assert match.why_left("fusion.bridges.image.weight") == "of another tower" != match.why_left("fusion.token")
    for change, has_weights, are_others in (
            ({"source": "timm:two", "licence": ""}, True, False), ({"digest": "2"}, True, False),
            ({"digest": "2"}, False, True), ({"input": {"size": 256}}, True, True), ({"name": "b"}, True, True)):
        assert initial.are_other_towers(other, {**other, **change}, has_weights) is are_others, change
    assert initial.are_other_towers(other, None, True) and not initial.are_other_towers(None, None, False)


def test_a_tower_that_the_file_names_alone_is_there_already(best: Path) -> None:
    """As in checkpoints to resume from, which leave out the weights of a frozen tower."""
    model = model_module.TriModalModel(ModelConfig(size="nano", vocab_size=135, embed_dim=8, num_classes=60))
    model.image.tower = tower = torch.nn.Linear(3, 2)
    described = {"family": "timm", "digest": "1"}
    tower.description = described  # type: ignore[assignment]
    state = checkpoint.load(best)
    before, tokenizer = tower.weight.detach().clone(), Tokenizer.from_json(state["tokenizer"])
    source = initial.Source(best, "best_model.pt", "", {**state, "towers": {"image": described}})
    taken = initial.take_weights(source, model, tokenizer, state["concepts"], "infonce")
    assert taken["parts"]["image.tower"] == {"parameters": 8, "taken": 8, "rows": None, "left": {}}
    assert torch.equal(tower.weight, before) and taken["parts"]["image"]["taken"] > 0
    tower.description = {**described, "digest": "2"}  # type: ignore[assignment]
    taken = initial.take_weights(source, model, tokenizer, state["concepts"], "infonce")
    assert taken["parts"]["image.tower"]["taken"] == taken["parts"]["image"]["taken"] == 0


# ---- a run -------------------------------------------------------------------------------------------------------


def test_the_run_its_checkpoints_and_its_report_say_where_it_began(small: SmallRuns, whole: Path, best: Path,
                                                                   tmp_path: Path) -> None:
    report = loop.train(small.config(tmp_path / "run", *QUICK), Options("cpu", init=str(whole)))
    assert report is not None
    found = json.loads(report.with_suffix(".json").read_text("utf-8"))
    assert found["initialised_from"]["sha256"] == sha256_of(best)
    assert found["initialised_from"]["parts"]["image"]["taken"] > 0
    [event] = [record for record in records(tmp_path / "run", "event") if "nitialised" in record["message"]]
    assert_names(event["message"], "best_model.pt", sha256_of(best)[:16], "finetune", 3)
    assert event["message"] in found["events"]
    for name in ("best_model.pt", "final_model.pt", "checkpoint_epoch_3.pt"):
        state = checkpoint.load(tmp_path / "run" / "checkpoints" / name)
        assert state["initialised_from"]["name"] == "best_model.pt"
    model_module.load_model(tmp_path / "run" / "checkpoints" / "model.safetensors")
    assert str(whole) not in json.dumps({**found, "command": ""}), "nothing of the user's machine"
    first, of_it = (records(folder, "step")[0]["loss"] for folder in (whole, tmp_path / "run"))
    assert of_it < first, "it begins with what has been learnt"


def test_a_resumed_run_still_says_where_it_began(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    loop.train(small.config(tmp_path / "run", *QUICK), Options("cpu", init=str(whole)))
    for name in ("checkpoint_epoch_3.pt", "final_model.pt"):
        (tmp_path / "run" / "checkpoints" / name).unlink()
    before = checkpoint.load(tmp_path / "run" / "checkpoints" / "checkpoint_epoch_2.pt")
    loop.train(small.config(tmp_path / "run", *QUICK), Options("cpu", "auto"))
    after = checkpoint.load(tmp_path / "run" / "checkpoints" / "checkpoint_epoch_3.pt")
    assert after["initialised_from"] == before["initialised_from"] is not None


def test_what_the_checkpoint_was_trained_on_counts_as_trained_on(small: SmallRuns, best: Path, tmp_path: Path) -> None:
    own = begun(small, tmp_path / "own", best).trained_on
    path = rewritten(best, tmp_path, trained_on=torch.tensor([3, 7]))
    found = begun(small, tmp_path / "run", path).trained_on
    assert sorted(set(found.tolist())) == sorted({3, 7, *own.tolist()})


def test_not_together_with_resume(small: SmallRuns, whole: Path, tmp_path: Path) -> None:
    path = str(whole / "checkpoints" / "checkpoint_epoch_3.pt")
    with refused("--init", "--resume"):
        resume.find_state(small.config(tmp_path, *QUICK), Options("cpu", path, init=path))


@pytest.mark.parametrize("flag", ["--plan", "--check"])
def test_plan_and_check_look_for_it(small: SmallRuns, best: Path, tmp_path: Path, flag: str,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    config = small.config(tmp_path / "run", *QUICK).to_dict()
    (tmp_path / "c.yaml").write_text(json.dumps(config), "utf-8")
    given = ["--config", str(tmp_path / "c.yaml"), "--device", "cpu", flag, "--init"]
    assert run_training.main([*given, str(best)]) == 0
    capsys.readouterr()
    assert run_training.main([*given, str(tmp_path / "none.pt")]) == 2
    assert_names(capsys.readouterr().err.removesuffix("\n"), "--init", tmp_path / "none.pt")


def test_the_doctor_says_how_much_of_it_fits(small: SmallRuns, best: Path, tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    case = doctor.Case(small.config(tmp_path / "run", *QUICK), Options("cpu", init=str(best)), tmp_path / "temporary")
    for check in (doctor.check_device, doctor.check_data):
        list(check(case))
    [read] = doctor.check_init(case)
    assert read.state == "ok" and str(best) in read.found
    [row] = [row for row in doctor.check_memory(case) if row.check == "initial weights"]
    assert row.state == "ok"
    assert_names(row.found.splitlines()[0], "best_model.pt", "finetune")
    assert any(line.split()[0] == "image" for line in row.found.splitlines()[1:])
    missing = dataclasses.replace(case.options, init=str(tmp_path / "none.pt"))
    with refused("--init", tmp_path / "none.pt"):
        list(doctor.check_init(dataclasses.replace(case, options=missing)))


def ranks_begin(root: Path, best: Path) -> dict[str, torch.Tensor]:
    """Weights of each rank once the run is open; the file is there for the main one alone."""
    world = distributed.start()
    small = SmallRuns(root / f"shared{world.rank}")
    given = best if world.is_main else best.with_name("only_there_for_the_main_rank.pt")
    run = open_run(small.config(root / "run"), Options("cpu", init=str(given)), None, world)
    run.tracker.close()
    assert run.initialised_from is not None and run.initialised_from["taken"] > 0
    world.stop()
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def test_the_main_rank_reads_and_all_begin_alike(best: Path, tmp_path: Path) -> None:
    first, second = in_ranks(2, ranks_begin, tmp_path, best)
    given = checkpoint.load(best)["model_state_dict"]
    for name, value in given.items():
        assert torch.equal(first.value[name], value) and torch.equal(second.value[name], value), name
