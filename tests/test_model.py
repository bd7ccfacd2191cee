"""The model: sizes, every subset of modalities, padding that never leaks, sounds and images of any size, patch subsets
and drop-path, the interface for loading. Attention has a file of its own."""

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import ImageEncoder, TriModalModel, count_parameters, create_model, load_model
from tests.narrow import largest_difference, make_batch, narrow_model, small_inputs, weighted_sum
from tests.refusals import refused
from tests.small_runs import float64
from trimodal import checkpoint
from trimodal.blocks import Block, Blocks
from trimodal.config import MODALITIES, SIZES, Config, config_from_dict
from trimodal.errors import ConfigError
from trimodal.memory.tracker import tracing

SUBSETS = [set(s) for n in (1, 2, 3) for s in itertools.combinations(MODALITIES, n)]


@pytest.fixture(scope="module")
def narrow() -> TriModalModel:
    return narrow_model().eval()


@pytest.fixture(scope="module")
def nano() -> TriModalModel:
    torch.manual_seed(0)
    return create_model("nano").eval()


# ---- sizes and subsets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "millions"), [("tiny", 15), ("small", 35), ("base", 80), ("large", 200)])
def test_parameter_counts(size: str, millions: int) -> None:
    counts = count_parameters(size)
    assert counts["all"] == pytest.approx(millions * 1e6, rel=0.05)
    assert sum(counts.values()) == 2 * counts["all"], "the parts make up the whole"


def test_counted_is_what_is_created(nano: TriModalModel) -> None:
    assert sum(p.numel() for p in nano.parameters()) == count_parameters("nano")["all"]


@pytest.mark.parametrize("size", SIZES)
def test_outputs_are_as_wide_and_reach_all_parameters_at_every_size(size: str) -> None:
    with tracing():  # shapes alone
        model = create_model(size)
        outputs = model(**small_inputs(set(MODALITIES)))
        torch.stack([value.sum() for value in outputs.values()]).sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("logit_"), name
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        **dict.fromkeys(("image_features", "text_features", "audio_features", "fused_features"), (2, 512)),
        "logits": (2, 1000)}


@pytest.fixture(scope="module", params=["nano", *(pytest.param(size, marks=pytest.mark.repetition) for size in SIZES)])
def sized(request: pytest.FixtureRequest) -> TriModalModel:
    torch.manual_seed(0)
    with float64():
        return create_model(request.param, image_size=32)


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda subset: "+".join(sorted(subset)))
def test_a_model_takes_every_subset(sized: TriModalModel, subset: set[str]) -> None:
    sized.zero_grad(set_to_none=True)
    outputs = sized(**small_inputs(subset))
    features = [f"{name}_features" for name in MODALITIES if name in subset] + ["fused_features"]
    assert set(outputs) == {*features, "logits"}
    for name in features:
        assert outputs[name].shape == (2, 512)
        assert torch.allclose(outputs[name].norm(dim=1), torch.ones(2, dtype=torch.float64), atol=1e-12)
    assert outputs["logits"].shape == (2, 1000) and outputs["logits"].isfinite().all()
    weighted_sum(outputs).backward()
    for name, p in sized.named_parameters():
        owner = [m for m in MODALITIES if name.startswith((f"{m}.", f"projections.{m}.", f"fusion.modality.{m}"))]
        if name.startswith("logit_") or (owner and owner[0] not in subset):
            assert p.grad is None, f"{name} has a gradient without its modality"
        else:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


# ---- padding -----------------------------------------------------------------------------------------------------


def outputs_of(model: TriModalModel, **given: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return model(**given)


@pytest.mark.parametrize("garbage", [1e4, float("nan"), float("inf")])
def test_padded_values_change_nothing(narrow: TriModalModel, garbage: float) -> None:
    given = small_inputs(set(MODALITIES))
    before = outputs_of(narrow, **given)
    ids, audio = given["input_ids"].clone(), given["audio"].clone()
    ids[1, 3:] = torch.tensor([17, 59])
    audio[1, 23:] = garbage
    after = outputs_of(narrow, **given | {"input_ids": ids, "audio": audio})
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_real_values_matter(narrow: TriModalModel) -> None:
    given = small_inputs(set(MODALITIES))
    before = outputs_of(narrow, **given)
    ids, audio = given["input_ids"].clone(), given["audio"].clone()
    ids[1, 2] += 1
    audio[1, 22] += 1.0  # the last real frame, alone with padding in its patch
    after = outputs_of(narrow, **given | {"input_ids": ids, "audio": audio})
    for name in ("text_features", "audio_features", "fused_features", "logits"):
        assert (before[name][1] - after[name][1]).abs().max() > 1e-6
        assert torch.equal(before[name][0], after[name][0])


@pytest.mark.parametrize("longer", [1, 8, 40, 200])
def test_length_of_padding_changes_nothing(narrow: TriModalModel, longer: int) -> None:
    given = small_inputs(set(MODALITIES))
    before = outputs_of(narrow, **given)
    given["input_ids"] = F.pad(given["input_ids"], (0, longer), value=9)
    given["attention_mask"] = F.pad(given["attention_mask"], (0, longer))
    given["audio"] = F.pad(given["audio"], (0, 0, 0, longer), value=3.0)
    assert largest_difference(before, outputs_of(narrow, **given)) <= 1e-12


def test_neighbours_in_the_batch_change_nothing(narrow: TriModalModel) -> None:
    given = small_inputs(set(MODALITIES))
    together = outputs_of(narrow, **given)
    for row in (0, 1):
        length = int(given["attention_mask"][row].sum())
        frames = int(given["audio_lengths"][row])
        one = slice(row, row + 1)
        alone = outputs_of(narrow, images=given["images"][one], input_ids=given["input_ids"][one, :length],
                           audio=given["audio"][one, :frames])
        assert largest_difference(alone, {name: value[one] for name, value in together.items()}) <= 1e-12


def test_kept_patches_that_are_padding_change_nothing(narrow: TriModalModel) -> None:
    given = small_inputs({"audio"})
    valid = torch.tensor([[True, True, True], [True, True, False]])
    results = [narrow.audio(given["audio"], given["audio_lengths"], torch.tensor([[0, 7, 3], [4, 1, i]]), valid)
               for i in (0, 12)]
    for tokens in results:
        assert torch.equal(tokens.tokens_BND[valid], results[0].tokens_BND[valid])
        assert torch.equal(narrow.features("audio", tokens), narrow.features("audio", results[0]))


# ---- long sounds, image sizes, positions -------------------------------------------------------------------------


def test_long_sounds_do_not_depend_on_their_batch(narrow: TriModalModel) -> None:
    g = torch.Generator().manual_seed(4)
    sounds = [torch.randn(frames, 80, generator=g) * 4 - 6 for frames in (2500, 3300, 700, 1024)]
    batch = torch.nn.utils.rnn.pad_sequence(sounds, batch_first=True)
    with torch.no_grad():
        together = narrow.audio_features(batch, torch.tensor([len(sound) for sound in sounds]))
        for row, sound in enumerate(sounds):
            alone = narrow.audio_features(sound[None])[0]
            assert (together[row] - alone).abs().max() <= 1e-12, f"{len(sound)} frames"


def test_windows_are_encoded_alone_and_all_count(narrow: TriModalModel) -> None:
    sound = torch.randn(1, 2500, 80, generator=torch.Generator().manual_seed(5)) * 4 - 6
    with torch.no_grad():
        tokens_BND, valid_BN = narrow.audio(sound)
        assert tokens_BND.shape[1] == math.ceil(2500 / 16) * 5 and valid_BN is not None and valid_BN.all()
        for start in (0, 1024, 2048):
            window = narrow.audio(sound[:, start:start + 1024]).tokens_BND
            assert (tokens_BND[:, start // 16 * 5:][:, :window.shape[1]] - window).abs().max() <= 1e-12
        pooled = narrow.projections["audio"](tokens_BND.mean(1))
        assert torch.allclose(narrow.audio_features(sound), F.normalize(pooled, dim=1), atol=1e-12)


def test_one_state_dict_serves_every_image_size(nano: TriModalModel) -> None:
    state = nano.state_dict()
    assert set(state) == {name for name, _ in nano.named_parameters()}, "position codes and such are not saved"
    other = create_model("nano", image_size=32)
    other.load_state_dict(state)
    other.eval()
    for size in (32, 112, 224):
        image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            assert nano.image(image).tokens_BND.shape == (1, (size // 16) ** 2, 8)
            assert torch.equal(nano.image_features(image), other.image_features(image))


def test_bytes_and_fractions_are_the_same_image(narrow: TriModalModel) -> None:
    images = small_inputs({"image"})["images"]
    with torch.no_grad():
        assert torch.allclose(narrow.image_features(images), narrow.image_features(images.double() / 255), atol=1e-12)


def test_patches_are_what_the_docstrings_say(narrow: TriModalModel) -> None:
    """Images row-major, sounds time-major; each patch holds its own values and no others'."""
    image = torch.zeros(1, 3, 48, 48, dtype=torch.float64)
    audio = torch.zeros(1, 48, 80)
    base = narrow.image.patches(image)[0], narrow.audio.patches(audio, None)[0]
    image[0, :, 16:32, 32:48] = 1.0
    audio[0, 32:48, 16:32] = 1.0
    changed = narrow.image.patches(image)[0], narrow.audio.patches(audio, None)[0]
    touched = [(one != other)[0].all(1) for one, other in zip(base, changed, strict=True)]
    assert touched[0].nonzero().flatten().tolist() == [1 * 3 + 2]
    assert touched[1].nonzero().flatten().tolist() == [2 * 5 + 1]
    assert [int((one != other).sum()) for one, other in zip(base, changed, strict=True)] == [3 * 256, 256]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cells", [4, 5])
def test_cells_of_small_grids_are_told_apart(size: str, cells: int) -> None:
    """Below 0.85 codes are over 31 degrees apart. Steps of 1 where a cell spans 14 / cells, or the usual base of
    10,000, give 0.89 to 0.99: neighbouring cells of a small image would look alike to the first layers."""
    with torch.device("meta"):
        encoder = ImageEncoder(config_from_dict({"model": {"size": size}}).model)
    codes = F.normalize(encoder.positions(torch.empty(1, 3, 16 * cells, 16 * cells)), dim=1)
    cosines = (codes @ codes.T).fill_diagonal_(-1)
    assert float(cosines.max()) < 0.85


def test_a_place_keeps_its_code_at_every_image_size(narrow: TriModalModel) -> None:
    coarse = narrow.image.positions(torch.empty(1, 3, 64, 64)).view(4, 4, -1)
    fine = narrow.image.positions(torch.empty(1, 3, 192, 192)).view(12, 12, -1)
    assert torch.allclose(coarse, fine[1::3, 1::3], atol=1e-5)


def test_order_of_words_and_place_of_patches_matter(narrow: TriModalModel) -> None:
    given = small_inputs(set(MODALITIES))
    before = outputs_of(narrow, **given)
    after = outputs_of(narrow, images=given["images"].flip(2), input_ids=given["input_ids"].flip(1),
                       audio=given["audio"].view(2, 5, 8, 80).flip(1).reshape(2, 40, 80))
    for name in ("image_features", "text_features", "audio_features"):
        assert (before[name][0] - after[name][0]).abs().max() > 1e-3


# ---- patch subsets, drop-path, precision -------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_keeping_all_patches_is_keeping_no_mask(narrow: TriModalModel, order: str) -> None:
    batch = make_batch(("image", "audio"), 2)
    for encoder, media, patches in ((narrow.image, batch.images, 9), (narrow.audio, batch.audio, 20)):
        keep = torch.arange(patches) if order == "ascending" else torch.randperm(patches)
        keep_BK = keep.expand(2, -1)
        extra = {"kept_valid_BK": torch.ones_like(keep_BK, dtype=torch.bool)} if encoder is narrow.audio else {}
        with torch.no_grad():
            whole = encoder(media).tokens_BND
            kept = encoder(media, keep_BK=keep_BK, **extra).tokens_BND
        assert (whole[:, keep] - kept).abs().max() <= 1e-12


def test_attention_starts_as_minus_what_is_attended_to() -> None:
    """Values and output together, over all blocks of a tower: -0.4 times the identity, and noise of that size."""
    torch.manual_seed(0)
    model = create_model("tiny", word_embeddings="random")
    blocks = [module for module in model.image.modules() if isinstance(module, Block)]
    products = torch.stack([block.out.weight @ block.qkv.weight[-192:] for block in blocks]).detach()
    assert torch.allclose(products.diagonal(dim1=1, dim2=2).mean(), torch.tensor(-0.4), atol=0.02)
    apart = products + 0.4 * torch.eye(192)
    assert abs(float(apart.mean())) < 0.001
    assert torch.allclose(apart.std() * 192**0.5, torch.tensor(0.4), atol=0.05)


def test_path_of_ones_is_no_path_and_zeros_leave_the_residual() -> None:
    torch.manual_seed(6)
    block, x = Block(16, 2, "auto").double(), torch.randn(3, 7, 16, dtype=torch.float64)
    with torch.no_grad():
        plain = block(x, None, None)
        assert torch.equal(block(x, None, torch.ones(3)), plain)
        mixed = block(x, None, torch.tensor([0.0, 1.0, 2.0]))
        assert torch.equal(mixed[0], x[0]), "dropped"
        assert torch.equal(mixed[1], plain[1])
        without_mlp = copy.deepcopy(block)
        for parameter in without_mlp.down.parameters():
            parameter.zero_()
        attended = x[2] + 2 * (without_mlp(x, None, None) - x)[2]
        assert torch.allclose(mixed[2], attended + 2 * block.down(F.gelu(block.up(block.norm2(attended)))), atol=1e-12)


def test_each_block_has_a_path_of_its_own() -> None:
    torch.manual_seed(6)
    blocks, x = Blocks(16, 2, 3, "auto").double(), torch.randn(2, 7, 16, dtype=torch.float64)
    path_BZ = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    first, second, third = blocks.blocks
    with torch.no_grad():
        out = blocks(x, None, path_BZ)
        assert torch.allclose(out[0], blocks.norm(third(first(x, None, None), None, None))[0], atol=1e-12)
        assert torch.allclose(out[1], blocks.norm(second(x, None, None))[1], atol=1e-12)


def test_path_reaches_every_encoder(narrow: TriModalModel) -> None:
    given = small_inputs(set(MODALITIES))
    path_BZ = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    calls = {"image": (given["images"], None), "text": (given["input_ids"], given["attention_mask"]),
             "audio": (given["audio"], given["audio_lengths"], None, None)}
    for name, arguments in calls.items():
        encoder = getattr(narrow, name)
        plain, dropped = encoder(*arguments).tokens_BND, encoder(*arguments, path_BZ).tokens_BND
        assert torch.equal(plain[1], dropped[1]), name
        assert (plain[0] - dropped[0]).abs().max() > 1e-3, name


def test_double_gives_doubles(narrow: TriModalModel) -> None:
    outputs = outputs_of(narrow, **small_inputs(set(MODALITIES)))
    assert {value.dtype for value in outputs.values()} == {torch.float64}


def test_bfloat16_stays_close() -> None:
    model, given = narrow_model().float().eval(), small_inputs(set(MODALITIES))
    exact = outputs_of(model, **given)
    with torch.autocast("cpu", torch.bfloat16):
        half = outputs_of(model, **given)
    for name, value in half.items():
        assert value.dtype == torch.float32, "losses are computed in float32"
        assert F.cosine_similarity(value, exact[name]).min() > 0.99, name
        assert not torch.equal(value, exact[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("subset", [set(MODALITIES), {"image"}, {"text"}, {"audio"}],
                         ids=lambda names: "+".join(sorted(names)))
def test_a_model_made_half_stays_close(dtype: torch.dtype, subset: set[str]) -> None:
    model, given = narrow_model().float().eval(), small_inputs(subset)
    exact = outputs_of(model, **given)
    half = outputs_of(model.to(dtype), **given)
    for name, value in half.items():
        assert value.dtype == torch.float32 and F.cosine_similarity(value, exact[name]).min() > 0.99, name
        if name.endswith("features"):
            assert torch.allclose(value.norm(dim=1), torch.ones(2), atol=1e-6), name


# ---- the interface -----------------------------------------------------------------------------------------------


def save_best(model: TriModalModel) -> None:
    config = Config(model=model.config).to_dict()
    state = {"config": config, "model_state_dict": model.state_dict(), "concepts": ["cat"]}
    checkpoint.save(state, "outputs/checkpoints/best_model.pt")


def test_the_promised_lines_load_a_trained_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As README has them, but for the size."""
    monkeypatch.chdir(tmp_path)
    save_best(trained := create_model("nano", word_embeddings="random", use_checkpoint=False))
    images, log_mel = torch.rand(2, 3, 224, 224), torch.randn(2, 100, 80)
    ids, mask = torch.randint(0, 30522, (2, 9)), torch.ones(2, 9, dtype=torch.int64)

    model = create_model('nano')
    checkpoint = torch.load('outputs/checkpoints/best_model.pt')
    model.load_state_dict(checkpoint['model_state_dict'])
    model.eval()
    with torch.no_grad():
        outputs = model(images=images, input_ids=ids, attention_mask=mask, audio=log_mel)
        expected = trained(images=images, input_ids=ids, attention_mask=mask, audio=log_mel)
    assert outputs['fused_features'].shape == (2, 512) and outputs['logits'].shape == (2, 1000)
    assert all(torch.equal(outputs[name], expected[name]) for name in expected)


def test_load_model_opens_any_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained = create_model("nano", embed_dim=64, num_classes=7, vocab_size=1000, image_size=32)
    save_best(trained)
    model, extras = load_model("outputs/checkpoints/best_model.pt")
    assert model.config == trained.config and not model.training
    assert extras["concepts"] == ["cat"] and "model_state_dict" not in extras
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in trained.state_dict().items())


def test_a_mistake_in_the_model_is_not_said_to_be_one_of_the_file(tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save({"config": {"model": {"size": "nano"}}, "model_state_dict": {}}, tmp_path / "best_model.pt")

    def broken(*given: object) -> None:
        raise AttributeError("a mistake of a programmer")

    monkeypatch.setattr("model.TriModalModel", broken)
    with pytest.raises(AttributeError, match="programmer"):
        load_model(tmp_path / "best_model.pt")


@pytest.mark.parametrize("other", [{"size": "tiny"}, {"embed_dim": 64}, {"num_classes": 7}, {"vocab_size": 1000}],
                         ids=str)
def test_weights_of_another_model_name_load_model(nano: TriModalModel, other: dict) -> None:
    with torch.device("meta"):
        state = create_model(**{"size": "nano"} | other).state_dict()
    with refused("model.load_model", "nano"):
        nano.load_state_dict(state)


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_incomplete_weights_name_load_model(narrow: TriModalModel, change: str) -> None:
    state = narrow.state_dict()
    if change == "missing":
        del state["fusion.token"]
    else:
        state["fusion.tokens"] = torch.zeros(1)
    with refused("model.load_model", "fusion.token" if change == "missing" else "fusion.tokens"):
        narrow.load_state_dict(state)


@pytest.mark.parametrize("content", [
    None, b"", b"not a checkpoint", {"weights": 1}, {"config": {"model": {"size": "x"}}},
    {"config": {"model": {"size": "nano"}}}, [1, 2]], ids=str)
def test_load_model_refuses_other_files(content: object, tmp_path: Path) -> None:
    path = tmp_path / "best_model.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with refused(path):
        load_model(path)


@pytest.mark.parametrize("arguments", [{"size": "huge"}, {"embed_dims": 1}, {"embed_dim": 0}, {"image_size": 100},
                                       {"attention_chunk": 0}, {"word_embeddings": "glove"}], ids=str)
def test_create_model_refuses_mistakes(arguments: dict) -> None:
    key, value = next(iter(arguments.items()))
    with refused(f"model.{key}", *([] if key == "embed_dims" else [value]), error=ConfigError):
        create_model(**arguments)


def test_forward_refuses_nothing_and_batches_that_differ(narrow: TriModalModel) -> None:
    with refused("images", "input_ids", "audio", error=ValueError):
        narrow()
    with refused("[2, 3]", error=ValueError):
        narrow(images=torch.zeros(2, 3, 32, 32), audio=torch.zeros(3, 40, 80))
