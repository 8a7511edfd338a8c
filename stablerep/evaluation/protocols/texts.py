"""Zero-shot classification and retrieval, in the space that images and texts share."""

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stablerep.evaluation.cache.store import load_or_embed_texts
from stablerep.evaluation.config import EvaluateConfig
from stablerep.evaluation.prompts import fill_templates, read_templates
from stablerep.evaluation.protocols.evaluation import Evaluation
from stablerep.evaluation.protocols.rows import WILSON, accuracy_row
from stablerep.evaluation.results import Row
from stablerep.evaluation.retrieval import pair_captions, retrieval_recall
from stablerep.evaluation.sets import LabelledSet
from stablerep.evaluation.zeroshot import embed_classes, zero_shot_classify

JOINT_FEATURE = "image_text"
"""What rows call the space that images and texts share."""
RETRIEVAL_RANKS = (1, 5, 10)


def run_zeroshot(evaluation: Evaluation) -> list[Row]:
    """Accuracy by the nearest embedded class name; every rank embeds a part of the prompts."""
    start = time.perf_counter()
    config = evaluation.config.zeroshot
    names = read_class_names(evaluation.config, evaluation.dataset)
    templates = read_templates(config.templates)
    prompts = [prompt for name in names for prompt in fill_templates(templates, name)]
    embedded = load_or_embed_texts(
        evaluation.model, prompts, evaluation.settings, evaluation.cache, description="class prompts"
    )
    if embedded is None:
        return []
    row_of = {prompt: row for row, prompt in enumerate(prompts)}
    classes = embed_classes(lambda texts: embedded[[row_of[text] for text in texts]], names, templates)
    images = _embed_images(evaluation)
    result = zero_shot_classify(images, classes.to(images.device), evaluation.labels.to(images.device))
    settings = {"templates": config.templates, "num_templates": len(templates)}
    seconds = time.perf_counter() - start
    rows = [
        accuracy_row(
            "zeroshot",
            JOINT_FEATURE,
            result.predictions.cpu(),
            evaluation.labels,
            seconds,
            hyperparameters=settings,
        )
    ]
    if result.top5 is not None:
        rows.append(
            Row(
                protocol="zeroshot",
                metric="top5_accuracy",
                value=result.top5,
                interval=result.top5_interval,
                interval_method=WILSON,
                n=len(images),
                selection="none",
                hyperparameters=settings,
                feature=JOINT_FEATURE,
                seconds=seconds,
                predictions=result.in_top5.cpu().numpy().astype(np.float32),
            )
        )
    return rows


def read_class_names(config: EvaluateConfig, dataset: LabelledSet) -> list[str]:
    """The names that prompts are filled with.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it has not a name for each class, or there is none and the set's are numbers.
    """
    if config.zeroshot.class_names is None:
        if not dataset.has_class_names:
            raise ValueError(
                f"classes of {dataset.name} are called by numbers such as {dataset.classes[0]}: "
                "zeroshot.class_names FILE gives them names"
            )
        return list(dataset.classes)
    path = Path(config.zeroshot.class_names)
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    if len(names) != len(dataset.classes) or not all(names):
        raise ValueError(
            f"{path} must have a name a line for each of the {len(dataset.classes)} classes, got "
            f"{sum(map(bool, names))}"
        )
    return names


def run_retrieval(evaluation: Evaluation) -> list[Row]:
    """Recall of captions by image and of images by caption, over the whole test split."""
    start = time.perf_counter()
    captions = sorted({caption for image in evaluation.dataset.test for caption in image.captions})
    embedded = load_or_embed_texts(
        evaluation.model, captions, evaluation.settings, evaluation.cache, description="captions"
    )
    if embedded is None:
        return []
    test = evaluation.features["test"]
    texts, pairs = pair_captions(test.captions)
    place = {caption: row for row, caption in enumerate(captions)}
    images = _embed_images(evaluation)
    result = retrieval_recall(
        images,
        embedded[[place[text] for text in texts]].float().to(images.device),
        pairs.to(images.device),
        ks=[k for k in RETRIEVAL_RANKS if k <= min(len(texts), len(images))],
    )
    seconds = time.perf_counter() - start
    sides = (
        ("image_to_text", result.image_to_text, result.image_ranks, test.names),
        ("text_to_image", result.text_to_image, result.text_ranks, texts),
    )
    return [
        Row(
            protocol=f"retrieval_{direction}",
            metric=f"recall@{recall.k}",
            value=recall.value,
            interval=recall.interval,
            interval_method=WILSON,
            n=recall.num_queries,
            selection="none",
            hyperparameters={"num_images": len(images), "num_texts": len(texts)},
            feature=JOINT_FEATURE,
            seconds=seconds,
            predictions=(ranks <= recall.k).cpu().numpy().astype(np.float32),
            names=names,
        )
        for direction, recalls, ranks, names in sides
        for recall in recalls
    ]


def _embed_images(evaluation: Evaluation) -> Tensor:
    """The test images in the joint space."""
    model = evaluation.model.to(evaluation.settings.device)
    with torch.no_grad():
        parts = evaluation.take("test", "cls").split(evaluation.settings.num_images_per_batch)
        return torch.cat([model.encode_image_features(part).float() for part in parts])
