import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from stablerep.backbones import load_backbone
from stablerep.distributed.sharding import ShardedStrategy, whole
from stablerep.losses import Queue, multi_positive_contrastive_loss
from stablerep.module import StableRep
from stablerep.optimizer import OptimizerConfig, Schedule
from stablerep.runs.finite import FiniteWatch, NonFiniteLossError
from stablerep.text import TextConfig
from tests.stablerep.ranks import run_on_ranks
from tests.stablerep.test_losses import naive_loss
from tests.stablerep.training import Recorder, build_batches, build_module, train, train_as_rank

SMALL_TEXT = TextConfig(out_features=8, width=16, num_layers=1, num_heads=2, context_length=12)


def test_loss_of_a_step_is_the_papers_formula_on_the_heads_output(tmp_path: Path) -> None:
    module = build_module()
    batches = build_batches(1)
    reference, recorder = copy.deepcopy(module), Recorder()
    train(module, tmp_path, batches, logger=recorder, log_every_n_steps=1)
    images = batches[0]["images"]
    assert reference.projection_head is not None
    views = [reference.projection_head(reference.backbone(images[:, view])) for view in range(3)]
    expected = naive_loss(torch.cat(views), torch.arange(4).repeat(3), 0.1)
    assert recorder.read("loss") == [pytest.approx(expected.item(), abs=1e-5)]


def test_loss_with_text_is_the_weighted_sum_of_both_formulas(tmp_path: Path) -> None:
    module = build_module(text=replace(SMALL_TEXT, loss_weight=0.3), image_loss_weight=0.7)
    batches, recorder = build_batches(1), Recorder()
    batches[0]["captions"][3] = batches[0]["captions"][0]  # equal captions have equal labels
    batches[0]["labels"][3] = batches[0]["labels"][0]
    reference = copy.deepcopy(module)
    train(module, tmp_path, batches, logger=recorder, log_every_n_steps=1)

    features = reference.backbone(batches[0]["images"].flatten(0, 1))
    assert reference.text_tower is not None
    assert reference.text_head is not None
    assert reference.projection_head is not None
    tokens = open_clip.tokenize(batches[0]["captions"], context_length=12)
    texts = normalize(reference.text_tower(tokens), dim=1)
    images = normalize(features @ reference.text_head.image_projection.weight.T, dim=1)
    logits = images @ texts.T / 0.07
    labels = batches[0]["labels"]
    pairs = (labels.repeat_interleave(3)[:, None] == labels[None]).float()
    text_loss = cross_entropy(logits, pairs / pairs.sum(1, keepdim=True)) / 2
    text_loss += cross_entropy(logits.T, pairs.T / pairs.T.sum(1, keepdim=True)) / 2
    embeddings = reference.projection_head(features.unflatten(0, (4, 3))).flatten(0, 1)
    image_loss = naive_loss(embeddings, labels.repeat_interleave(3), 0.1)
    assert recorder.read("text_loss") == [pytest.approx(text_loss.item(), abs=1e-5)]
    assert recorder.read("image_loss") == [pytest.approx(image_loss.item(), abs=1e-5)]
    expected = 0.7 * image_loss + 0.3 * text_loss
    assert recorder.read("loss") == [pytest.approx(expected.item(), abs=1e-5)]
    assert recorder.read("logit_scale") == [pytest.approx(1 / 0.07, rel=1e-5)]


def test_two_crops_of_an_image_are_trained_with_nt_xent(tmp_path: Path) -> None:
    module = build_module(positives="image", num_views_per_caption=2)
    assert module.objective == "simclr"
    batches, recorder = build_batches(1, num_views=2), Recorder()
    reference = copy.deepcopy(module)
    train(module, tmp_path, batches, logger=recorder, log_every_n_steps=1)
    assert reference.projection_head is not None
    views = [reference.projection_head(reference.backbone(batches[0]["images"][:, view])) for view in (0, 1)]
    z = normalize(torch.cat(views), dim=1)
    s = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)
    expected = cross_entropy(s, torch.arange(8).roll(4))
    assert recorder.read("loss") == [pytest.approx(expected.item(), abs=1e-5)]


def test_clip_trains_without_a_projection_head_on_one_view(tmp_path: Path) -> None:
    module = build_module(text=SMALL_TEXT, image_loss_weight=0.0, num_views_per_caption=1)
    assert module.objective == "clip"
    assert module.projection_head is None
    batches, recorder = build_batches(1, num_views=1), Recorder()
    reference = copy.deepcopy(module)
    train(module, tmp_path, batches, logger=recorder, log_every_n_steps=1)
    assert reference.text_tower is not None
    assert reference.text_head is not None
    texts = normalize(
        reference.text_tower(open_clip.tokenize(batches[0]["captions"], context_length=12)), dim=1
    )
    features = reference.backbone(batches[0]["images"][:, 0])
    logits = normalize(reference.text_head.image_projection(features), dim=1) @ texts.T / 0.07
    targets = torch.arange(4)
    expected = (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2
    assert recorder.read("loss") == [pytest.approx(expected.item(), abs=1e-5)]


@pytest.mark.parametrize(
    ("options", "objective"),
    [
        ({}, "stablerep"),
        ({"positives": "image"}, "simclr"),
        ({"positives": "class"}, "supcon"),
        ({"text": SMALL_TEXT}, "stablerep_plus"),
        ({"text": SMALL_TEXT, "image_loss_weight": 0.0}, "clip"),
    ],
)
def test_settings_tell_the_objective(options: dict[str, Any], objective: str) -> None:
    assert build_module(**options).objective == objective


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"temperature": math.nan}, "temperature must be > 0, got nan"),
        ({"num_views_per_caption": 1}, "num_views_per_caption must be >= 2, got 1"),
        ({"text": SMALL_TEXT, "num_views_per_caption": 0}, "num_views_per_caption must be >= 2, got 0"),
        ({"image_loss_weight": 0.0}, "image_loss_weight must be > 0 without a text tower, got 0.0"),
        ({"image_loss_weight": -1.0}, "image_loss_weight must be >= 0, got -1.0"),
        (
            {"text": SMALL_TEXT, "positives": "image"},
            "data.positives must be caption with a text tower, got image",
        ),
        (
            {"text": SMALL_TEXT, "image_loss_weight": 0.0, "queue_size": 8},
            "queue_size must be 0 where image_loss_weight is 0, got 8",
        ),
        ({"queue_size": -1}, "queue_size must be >= 0, got -1"),
        ({"num_captions_per_microbatch": 0}, "num_captions_per_microbatch must be >= 1, got 0"),
        ({"backbone": "resnet18"}, "backbone resnet18 "),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_module(**options)


@pytest.mark.parametrize("captions", [None, ["", "a", "b", "c"]])
def test_text_tower_without_captions_is_refused(captions: list[str] | None, tmp_path: Path) -> None:
    batches = build_batches(1)
    batches[0] |= {"captions": captions}
    with pytest.raises(ValueError, match=r"model.text needs the caption of each image, [14] of 4 have none"):
        train(build_module(text=SMALL_TEXT), tmp_path, batches)


def test_logit_scale_stays_in_its_bounds(tmp_path: Path) -> None:
    for start, bound in ((math.log(100), math.log(100)), (0.0, 0.0)):
        module = build_module(text=SMALL_TEXT, optimizer=OptimizerConfig(learning_rate=0.5))
        assert module.text_head is not None
        with torch.no_grad():
            module.text_head.logit_scale.fill_(start)
        module.text_head.logit_scale.register_hook(
            lambda g, up=start > 0: torch.full_like(g, -1.0 if up else 1.0)
        )
        train(module, tmp_path, build_batches(2))
        assert module.text_head.logit_scale.item() == pytest.approx(bound)


def test_average_of_the_weights_is_in_the_checkpoint(tmp_path: Path) -> None:
    module = build_module(optimizer=OptimizerConfig(learning_rate=1e-2, ema_decay=0.5))
    expected = copy.deepcopy(dict(module.backbone.named_parameters()))
    step = module.optimizer_step

    def record(*args: Any, **kwargs: Any) -> None:
        step(*args, **kwargs)
        for name, value in module.backbone.named_parameters():
            expected[name] = 0.5 * expected[name] + 0.5 * value.detach()  # type: ignore[assignment]

    module.optimizer_step = record  # type: ignore[method-assign]
    trainer = train(module, tmp_path, build_batches(3))
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    average, last = (load_backbone(tmp_path / "a.ckpt", ema=ema) for ema in (True, False))
    for name, value in average.named_parameters():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-4, check_device=False)
    assert torch.equal(last.cls_token, module.backbone.cls_token)  # type: ignore[arg-type]
    assert not torch.equal(average.cls_token, last.cls_token)  # type: ignore[arg-type]


def test_average_that_was_not_kept_is_refused(tmp_path: Path) -> None:
    train(build_module(), tmp_path, build_batches(1)).save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    with pytest.raises(
        ValueError, match=r"a\.ckpt has no moving average of its weights: ema needs ema_decay"
    ):
        load_backbone(tmp_path / "a.ckpt", ema=True)


def test_long_gradient_is_cut_to_the_limit(tmp_path: Path) -> None:
    lengths: list[float] = []

    def measure(module: StableRep) -> None:
        step = module.optimizer_step

        def record(epoch: int, batch: int, optimizer: Any, closure: Any) -> None:
            step(epoch, batch, optimizer, closure)
            lengths.append(
                sum(p.grad.square().sum().item() for p in module.parameters() if p.grad is not None)
            )

        module.optimizer_step = record  # type: ignore[method-assign]

    for limit in (None, 1e-3):
        torch.manual_seed(0)
        module, recorder = build_module(optimizer=OptimizerConfig(max_gradient_norm=limit)), Recorder()
        measure(module)
        train(module, tmp_path, build_batches(1), logger=recorder, log_every_n_steps=1)
        assert recorder.read("gradient_norm") == [pytest.approx(math.sqrt(lengths[0]), rel=1e-4)]
    assert math.sqrt(lengths[1]) == pytest.approx(1e-3, rel=1e-2)


def test_figures_are_logged_every_n_steps_alone(tmp_path: Path) -> None:
    recorder = Recorder()
    module = build_module(text=SMALL_TEXT)
    train(module, tmp_path, build_batches(6), logger=recorder, log_every_n_steps=3)
    figures = {"loss", "image_loss", "text_loss", "logit_scale", "learning_rate", "positives_per_anchor"}
    figures |= {"embedding_std", "rank_me", "gradient_norm", "anchors_without_positive", "captions_dropped"}
    for name in figures:
        assert len(recorder.read(name)) == 2, name
    assert recorder.read("positives_per_anchor") == [2.0, 2.0]
    assert [step for step, row in recorder.rows if "loss" in row] == [2, 5]


def test_memory_of_earlier_steps_is_compared_with(tmp_path: Path) -> None:
    """With a learning rate that moves nothing, the second loss is that of the first step's embeddings too."""
    module, recorder = build_module(queue_size=12, optimizer=OptimizerConfig(learning_rate=1e-30)), Recorder()
    batches = build_batches(2)
    reference = copy.deepcopy(module)
    train(module, tmp_path, batches, logger=recorder, log_every_n_steps=1)
    assert reference.projection_head is not None
    labels = torch.arange(4).repeat_interleave(3)
    first, second = (
        reference.projection_head(reference.backbone(b["images"].flatten(0, 1)).unflatten(0, (4, 3)))
        for b in batches
    )
    queue = Queue(normalize(first.flatten(0, 1), dim=1), labels)
    expected = multi_positive_contrastive_loss(second.flatten(0, 1), labels, 0.1, queue).loss.item()
    without = multi_positive_contrastive_loss(second.flatten(0, 1), labels, 0.1).loss.item()
    assert recorder.read("loss")[1] == pytest.approx(expected, rel=1e-4)
    assert abs(expected - without) > 0.1
    assert recorder.read("positives_per_anchor") == [2.0, 5.0]


def test_memory_holds_the_newest_embeddings(tmp_path: Path) -> None:
    module = build_module(queue_size=12)
    batches = build_batches(1)
    reference = copy.deepcopy(module)
    train(module, tmp_path, batches)
    assert module.queue is not None
    assert len(module.queue) == 12
    assert reference.projection_head is not None
    features = reference.backbone(batches[0]["images"].flatten(0, 1)).unflatten(0, (4, 3))
    embeddings = normalize(reference.projection_head(features).flatten(0, 1), dim=1)
    torch.testing.assert_close(module.queue.embeddings, embeddings.detach(), atol=1e-5, rtol=1e-4)
    assert module.queue.labels.tolist() == [i // 3 for i in range(12)]


def test_drop_path_and_checkpointing_reach_the_backbone() -> None:
    options = {"patch_size": 8, "depth": 3, "embed_dim": 16, "num_heads": 2, "drop_path_rate": 0.2}
    module = build_module(backbone_options=options, gradient_checkpointing=True, text=SMALL_TEXT)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in module.backbone.blocks]  # type: ignore
    assert rates == pytest.approx([0.0, 0.1, 0.2])
    assert module.backbone.grad_checkpointing is True
    assert module.text_tower is not None
    assert module.text_tower.transformer.grad_checkpointing is True


def test_non_finite_loss_stops_before_the_weights_change(tmp_path: Path) -> None:
    module = build_module()
    batches = build_batches(3)
    batches[1]["images"][0, 0] = math.nan
    with pytest.raises(NonFiniteLossError, match=r"loss is nan at step 1 with learning rate 0\.001"):
        train(module, tmp_path, batches)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_gradient_that_is_not_finite_stops_before_the_weights_change(tmp_path: Path) -> None:
    module = build_module()
    weight = next(parameter for parameter in module.backbone.parameters() if parameter.ndim > 1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(NonFiniteLossError, match=r"gradient norm is (nan|inf) at step 0 with learning rate"):
        train(module, tmp_path, build_batches())
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())


def test_checkpoint_of_a_run_gives_back_the_trained_backbone(tmp_path: Path) -> None:
    module = build_module()
    trainer = train(module, tmp_path, build_batches())
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_backbone(tmp_path / "a.ckpt")(images), module.eval()(images))
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]  # nothing temporary is left


def test_number_that_is_seen_late_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, where a step's gradient is looked at in the next step or before a save."""
    watch = FiniteWatch.watch

    def watch_late(self: FiniteWatch, name: str, value: Tensor, step: int, learning_rate: float) -> None:
        settle, self.settle = self.settle, lambda: None  # type: ignore[method-assign]
        watch(self, name, value, step, learning_rate)
        self.settle = settle  # type: ignore[method-assign]

    monkeypatch.setattr(FiniteWatch, "watch", watch_late)
    for save_every, last_step in ((100, 2), (1, 1)):
        module, batches = build_module(), build_batches(5)
        module.backbone.norm.bias.register_hook(  # type: ignore[union-attr, operator]
            lambda gradient, module=module: gradient * (math.nan if module.global_step == 1 else 1)
        )
        steps: list[int] = []
        module.on_train_batch_start = lambda batch, index, steps=steps: steps.append(index)  # type: ignore
        checkpoint = ModelCheckpoint(
            tmp_path / str(save_every), every_n_train_steps=save_every, save_top_k=-1
        )
        with pytest.raises(NonFiniteLossError, match="gradient norm is nan at step 1"):
            train(module, tmp_path, batches, callbacks=[checkpoint], enable_checkpointing=True)
        assert steps[-1] == last_step
    for path in tmp_path.rglob("*.ckpt"):
        weights = torch.load(path, weights_only=True)["state_dict"].values()
        assert all(torch.isfinite(value).all() for value in weights)
    assert len(list(tmp_path.rglob("*.ckpt"))) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("log_every_n_steps", [1, 50])
def test_accelerator_stops_within_a_step_of_a_number_that_is_not_finite(
    log_every_n_steps: int, tmp_path: Path
) -> None:
    module, batches, steps = build_module(), build_batches(5), []
    batches[1]["images"][0, 0] = math.nan
    module.on_train_batch_start = lambda batch, index: steps.append(index)  # type: ignore[assignment]
    options: dict[str, Any] = {"accelerator": "gpu", "devices": 1, "log_every_n_steps": log_every_n_steps}
    with pytest.raises(NonFiniteLossError, match="loss is nan at step 1"):
        train(module, tmp_path, batches, logger=Recorder(), **options)
    assert steps == [0, 1]


@pytest.mark.gpu
def test_accelerator_trains_compiled_in_bfloat16_as_the_processor_does(tmp_path: Path) -> None:
    batches, losses = build_batches(4), []
    for options in (
        {"accelerator": "cpu"},
        {"accelerator": "gpu", "devices": 1},
        {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed"},
    ):
        recorder = Recorder()
        module = build_initial_module(compile_backbone=options["accelerator"] == "gpu")
        trainer = train(module, tmp_path, batches, logger=recorder, log_every_n_steps=1, **options)
        assert trainer.optimizers[0].param_groups[0]["fused"] == (options["accelerator"] == "gpu")
        losses.append(recorder.read("loss"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[2] == pytest.approx(losses[0], rel=1e-1)


PLAIN = {"projection_norm": "layernorm"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": (PLAIN, {}),
    "micro-batches": (PLAIN | {"num_captions_per_microbatch": 1}, {}),
    "batchnorm": ({}, {}),
    "batchnorm, micro-batches": ({"num_captions_per_microbatch": 1}, {}),
    "all views": ({"projection_norm": "batchnorm_all_views"}, {}),
    "all views, micro-batches": (
        {"projection_norm": "batchnorm_all_views", "num_captions_per_microbatch": 3},
        {},
    ),
    "sharded, batchnorm": ({}, {"strategy": "sharded"}),
    "mlp": (PLAIN | {"text": replace(SMALL_TEXT, projection="mlp", hidden_features=8)}, {}),
    "gradient checkpointing": (PLAIN | {"gradient_checkpointing": True}, {}),
    "compiled": (PLAIN | {"compile_backbone": True}, {}),
    "bf16": (PLAIN, {"precision": "bf16-mixed"}),
    "sharded": (PLAIN, {"strategy": "sharded"}),
    "sharded, micro-batches": (PLAIN | {"num_captions_per_microbatch": 1}, {"strategy": "sharded"}),
    "sharded, bf16": (PLAIN, {"strategy": "sharded", "precision": "bf16-mixed"}),
}


def build_initial_module(**options: Any) -> StableRep:
    torch.manual_seed(0)
    optimizer = OptimizerConfig(learning_rate=1e-3, ema_decay=0.9)
    return build_module(**({"text": SMALL_TEXT, "optimizer": optimizer} | options))


def run_case(rank: int, folder: Path, case: str) -> dict[str, Any]:
    """Gradients of one step on this rank's share of a fixed batch, and the head's buffers after it."""
    options, trainer_options = CASES[case]
    module = build_initial_module(**options)
    result: dict[str, Any] = {}

    def keep(optimizer: Any) -> None:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                result[name] = whole(parameter.grad).detach().clone().numpy()

    module.on_before_optimizer_step = keep  # type: ignore[method-assign]
    if torch.distributed.is_initialized():
        if trainer_options.get("strategy") == "sharded":
            trainer_options = trainer_options | {"strategy": ShardedStrategy()}
        trainer = train_as_rank(rank, module, folder, build_batches(1), **trainer_options)
    else:
        trainer = train(module, folder, build_batches(1), **trainer_options)
    trainer.save_checkpoint(folder / f"{case}.ckpt", weights_only=False)
    assert module.projection_head is not None
    return result | {name: buffer.clone().numpy() for name, buffer in module.projection_head.named_buffers()}


def _run_cases(rank: int, folder: str, cases: list[str]) -> dict[str, dict[str, Any]]:
    return {case: run_case(rank, Path(folder), case) for case in cases}


def assert_close(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """To 1e-5 of the whole and 1e-3 of each tensor's largest element, but for what rounding leaves of 0."""
    assert ours.keys() == theirs.keys()
    whole_ours, whole_theirs = (
        np.concatenate([value.ravel() for value in side.values()]) for side in (ours, theirs)
    )
    assert np.linalg.norm(whole_ours - whole_theirs) < 1e-5 * np.linalg.norm(whole_theirs)
    for name, value in theirs.items():
        bound = 1e-3 * float(np.abs(value).max()) + 1e-7
        np.testing.assert_allclose(ours[name], value, atol=bound, rtol=0, err_msg=name)


@pytest.mark.parametrize("case", ["plain", "batchnorm", "all views"])
def test_micro_batches_give_the_gradient_of_the_whole_batch(case: str, tmp_path: Path) -> None:
    at_once = run_case(0, tmp_path, case)
    in_parts = run_case(0, tmp_path, "micro-batches" if case == "plain" else f"{case}, micro-batches")
    assert_close(in_parts, at_once)
    assert abs(at_once["text_head.logit_scale"]).item() > 1e-4


def test_gradient_checkpointing_keeps_the_gradient(tmp_path: Path) -> None:
    assert_close(run_case(0, tmp_path, "gradient checkpointing"), run_case(0, tmp_path, "plain"))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, dict[str, Any]]]]:
    """What each of two ranks made of the cases, and the folder with their checkpoints."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_on_ranks(_run_cases, 2, str(folder), list(CASES))


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["plain", "micro-batches", "compiled", "sharded", "sharded, micro-batches"])
def test_ranks_have_the_gradient_of_one_process(case: str, two_ranks: Any, tmp_path: Path) -> None:
    alone = run_case(0, tmp_path, "plain")
    for result in two_ranks[1]:
        assert_close(result[case], alone)


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["bf16", "sharded, bf16"])
def test_ranks_in_bfloat16_have_nearly_the_gradient_of_one_process(
    case: str, two_ranks: Any, tmp_path: Path
) -> None:
    alone = run_case(0, tmp_path, "plain")
    ours, theirs = (
        np.concatenate([g.ravel() for g in side.values()]) for side in (two_ranks[1][0][case], alone)
    )
    assert 1e-5 < np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.1


@pytest.mark.distributed
def test_ranks_with_micro_batches_keep_the_statistics_of_their_whole_share(two_ranks: Any) -> None:
    for result in two_ranks[1]:
        assert_close(result["batchnorm, micro-batches"], result["batchnorm"])


@pytest.mark.distributed
def test_sharded_head_keeps_the_statistics_of_each_view(two_ranks: Any) -> None:
    for result in two_ranks[1]:
        assert_close(result["sharded, batchnorm"], result["batchnorm"])


def test_batchnorm_of_all_heads_can_be_synchronized() -> None:
    text = replace(SMALL_TEXT, projection="mlp", hidden_features=8)
    module = build_module(text=text)
    before = dict(module.named_parameters())
    names = list(module.state_dict())
    module.synchronize_batchnorm()
    norms = [layer for layer in module.modules() if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 6
    assert all(isinstance(layer, torch.nn.SyncBatchNorm) for layer in norms)
    assert all(parameter is before[name] for name, parameter in module.named_parameters())
    assert list(module.state_dict()) == names


def test_batchnorm_of_one_caption_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_captions_per_rank must be >= 2 where BatchNorm .* got 1;"):
        train(build_module(num_captions_per_rank=1), tmp_path, build_batches(1, num_captions=1))
    train(build_module(num_captions_per_rank=1, **PLAIN), tmp_path, build_batches(1, num_captions=1))


def test_module_is_built_again_from_its_checkpoint(tmp_path: Path) -> None:
    module = build_module(text=SMALL_TEXT, optimizer=OptimizerConfig(learning_rate=1e-3, ema_decay=0.9))
    train(module, tmp_path, build_batches(1)).save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    again = StableRep.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.optimizer_config == module.optimizer_config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(("num_captions", "num_steps_per_epoch"), [(2, 16), (8, 4), (4, 8)])
def test_resumed_run_with_other_batches_goes_on_in_the_schedule_where_it_was(
    num_captions: int, num_steps_per_epoch: int, tmp_path: Path
) -> None:
    """Two of four epochs at 8 steps each, then two at steps of another size: by the rule for it, and to 0."""
    optimizer = OptimizerConfig(base_learning_rate=0.1, num_warmup_epochs=1)
    first = train(build_module(optimizer=optimizer), tmp_path, build_batches(8), max_epochs=2, max_steps=-1)
    first.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    module = build_module(optimizer=optimizer, num_captions_per_rank=num_captions)
    rates: list[float] = []
    module.on_train_batch_start = lambda batch, index: rates.append(module._learning_rate())  # type: ignore
    batches = build_batches(num_steps_per_epoch, num_captions=num_captions)
    train(module, tmp_path, batches, tmp_path / "a.ckpt", max_epochs=4, max_steps=-1)
    whole_run = Schedule(num_warmup_steps=num_steps_per_epoch, num_steps=4 * num_steps_per_epoch)
    peak = 0.1 * num_captions * 3 / 512
    steps = range(2 * num_steps_per_epoch, 4 * num_steps_per_epoch)
    assert rates == pytest.approx([peak * whole_run.factor(step) for step in steps])


def test_run_ends_its_schedule_with_its_epochs_or_its_steps_whichever_come_first(tmp_path: Path) -> None:
    for max_steps, num_steps in ((20, 12), (7, 7)):
        module = build_module()
        train(module, tmp_path, build_batches(6), max_epochs=2, max_steps=max_steps)
        assert module.global_step == module.schedule.num_steps == num_steps


@pytest.mark.distributed
def test_projections_by_mlp_train_on_ranks(two_ranks: Any) -> None:
    first, second = (result["mlp"] for result in two_ranks[1])
    names = [name for name in first if name.startswith(("text_head.", "text_tower."))]
    assert len(names) > 20
    for name in names:
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.distributed
@pytest.mark.parametrize("ema", [False, True])
def test_sharded_checkpoint_is_that_of_one_process(ema: bool, two_ranks: Any, tmp_path: Path) -> None:
    run_case(0, tmp_path, "plain")
    ours, theirs = (
        load_backbone(f / n, ema=ema) for f, n in ((two_ranks[0], "sharded.ckpt"), (tmp_path, "plain.ckpt"))
    )
    start = build_initial_module().backbone
    moved, wrong, total = 0, 0, 0
    for value, expected, before in zip(
        ours.parameters(), theirs.parameters(), start.parameters(), strict=True
    ):
        moved += int(((expected - before).abs() > 1e-5).sum())
        wrong += int(
            ((value - expected).abs() > 1e-5).sum()
        )  # AdamW's first step has no size for a gradient of 0
        total += value.numel()
    assert moved > 0.9 * total
    assert wrong < 0.05 * total
