"""The model card, README.md: a header for the Hugging Face hub, then what a user has to know, in words."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from stablerep.evaluation.reporting.markdown import build_table
from stablerep.evaluation.reporting.model_index import build_eval_results
from stablerep.evaluation.results import Provenance, Record, Row
from stablerep.export.comparison import TOLERANCE, Comparison
from stablerep.export.hub import TAG
from stablerep.export.privacy import publish_settings, publish_text
from stablerep.export.timm_files import WEIGHTS_FILE, bare_architecture
from stablerep.export.training import TRAINING_FILE, DatasetFacts, Training
from stablerep.loading import LoadedModel
from stablerep.loading.clip_models import OPEN_CLIP_CONFIG

CARD_FILE = "README.md"
NO_LICENSE = "unknown"
"""The hub's word for weights of which nobody has stated a licence."""

_MAX_VALUE_CHARACTERS = 200


@dataclass(frozen=True)
class ModelFacts:
    """What the card says beside the model, its training and its scores.

    Attributes:
        name: What the model is called.
        location: ORG/NAME on the hub; None for a folder.
        license: Of the weights.
        ema: Whether they are a moving average.
        has_open_clip: Whether there are files for open_clip.
        open_clip_is_elsewhere: Whether those name the folder, or the repository, that they are in.
        model_args: What timm needs beside the architecture's name.
        comparisons: What was compared with the source.
    """

    name: str
    location: str | None
    license: str
    ema: bool
    has_open_clip: bool
    open_clip_is_elsewhere: bool
    model_args: Mapping[str, Any]
    comparisons: tuple[Comparison, ...]


def build_card(model: LoadedModel, facts: ModelFacts, training: Training, scores: Sequence[Record]) -> str:
    """The card.

    Args:
        model: What is exported.
        facts: What the export knows.
        training: What is known of the training.
        scores: Rows of these weights.
    """
    sections = [
        _build_header(facts, training, scores),
        f"# {_escape(facts.name)}",
        _describe_model(model, facts, training),
        f"## Use\n{_describe_use(model, facts)}",
        f"## Training data\n{_describe_data(model, training)}",
        f"## Training\n{_describe_training(training, facts)}",
        f"## Evaluation\n{_describe_scores(scores)}",
        f"## Intended use\n{_describe_intended_use(training)}",
        f"## Biases and limits\n{_describe_biases(training)}",
        f"## Licence\n{_describe_license(facts, training)}",
        f"## Checks\n{_describe_checks(facts)}",
        _CITATION,
    ]
    return "\n\n".join(sections) + "\n"


_NOT_MEANT_FOR = """\
Not meant for decisions about people (identification, surveillance, hiring, credit, medicine, policing), nor
for any use that rests on its answers without a check of one's own."""

_OF_ANY_IMAGES = """\
- A model learns what its training images show, with what they leave out and show in one way only: stereotypes
  of people, places and professions among them. Measure on your own data first."""

_OF_GENERATED_IMAGES = """\
- Generated images teach what their generator can draw. What it leaves out, gets wrong or shows in one way
  only, this model has learnt in the same way: stereotypes of people, places and professions, prominent
  objects in the middle, few texts, few counts, few rare things.
- The captions choose what was drawn. They have the language, region and interests of those who wrote them.
- Features of photographs may differ from those of generated images; measure on your own data first."""

_CITATION = """## Citation
```bibtex
@inproceedings{tian2023stablerep,
  title={StableRep: Synthetic Images from Text-to-Image Models Make Strong Visual Representation Learners},
  author={Tian, Yonglong and Fan, Lijie and Isola, Phillip and Chang, Huiwen and Krishnan, Dilip},
  booktitle={Advances in Neural Information Processing Systems},
  year={2023},
  url={https://arxiv.org/abs/2306.00984}
}
```"""


def _build_header(facts: ModelFacts, training: Training, scores: Sequence[Record]) -> str:
    results: list[EvalResult] = []
    for provenance, rows in _group(scores):
        results.extend(build_eval_results(rows, provenance))
    further = ["open_clip", "zero-shot-image-classification"] if facts.has_open_clip else []
    if training.has_generated_images:
        further.append("synthetic-data")
    data = ModelCardData(
        license=facts.license,
        library_name="timm",
        pipeline_tag="image-feature-extraction",
        tags=["timm", "transformers", TAG, "self-supervised-learning", *further],
        model_name=facts.name,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _describe_model(model: LoadedModel, facts: ModelFacts, training: Training) -> str:
    form = model.input_format
    millions = sum(parameter.numel() for parameter in model.backbone.parameters()) / 1e6
    which = "the moving average of the weights" if facts.ema else "the weights of the last step"
    steps = "" if training.num_steps is None else f" after {training.num_steps} steps"
    if model.kind == "stablerep":
        origin = "Weights in the form in which the authors of StableRep publish theirs."
    elif model.kind == "weights":
        origin = (
            "Weights of a vision transformer, from a file that says nothing else: its heads, the mean and "
            "deviation of its input, and the crop are assumed."
        )
    else:
        trained = (
            "trained with `stablerep fit`" if training.config is not None else "from a training checkpoint"
        )
        origin = f"A vision encoder {trained}: {which}{steps}."
    rows = {
        "architecture": f"`{bare_architecture(model)}`"
        + (f" with `{json.dumps(dict(facts.model_args))}`" if facts.model_args else ""),
        "weights": f"{millions:.4g} million",
        "input": f"{form.image_size} × {form.image_size} pixels, mean {_numbers(form.mean)}, deviation "
        f"{_numbers(form.std)}",
        "transform": f"shorter side to {form.resize_size} ({form.interpolation}), central square",
        "feature": f"{model.backbone.num_features} numbers: the class token after the final norm",
        **({"text tower": _describe_tower(model)} if model.has_text else {}),
    }
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"{origin}\n\n| | |\n|---|---|\n{lines}"


def _describe_tower(model: LoadedModel) -> str:
    config = model.text.config if model.text is not None else None
    if config is None:
        return "yes"
    behind = "a linear projection" if config.projection == "linear" else "MLPs: not in these files"
    return f"{config.num_layers} layers of width {config.width}, {behind}"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _describe_use(model: LoadedModel, facts: ModelFacts) -> str:
    place = facts.location or "DIR"
    source = f"hf-hub:{place}" if facts.location else "local-dir:DIR"
    arguments = "".join(f"    {name}={value!r},\n" for name, value in facts.model_args.items())
    blocks = [
        f"""import timm

model = timm.create_model("{source}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
features = model(transform(image).unsqueeze(0))  # [1, {model.backbone.num_features}]

# or from the file of weights alone
model = timm.create_model(
    "{bare_architecture(model)}",
    checkpoint_path="{WEIGHTS_FILE}",
    num_classes=0,
{arguments})""",
        f"""from transformers import AutoImageProcessor, AutoModel

model, processor = AutoModel.from_pretrained("{place}"), AutoImageProcessor.from_pretrained("{place}")
features = model(**processor(image)).pooler_output""",
    ]
    has_to_be_told = facts.open_clip_is_elsewhere and facts.location is None
    if facts.has_open_clip:
        loading = (
            f"""import dataclasses
import json
from pathlib import Path

import open_clip

config = json.loads(Path("DIR", "{OPEN_CLIP_CONFIG}").read_text())
tower = config["model_cfg"]["vision_cfg"] | {{"timm_model_name": "{source}"}}
model, preprocess = open_clip.create_model_from_pretrained("{source}", vision_cfg=tower)"""
            if has_to_be_told
            else f"""import open_clip

model, preprocess = open_clip.create_model_from_pretrained("{source}")"""
        )
        blocks.append(f"""{loading}
tokens = open_clip.get_tokenizer("{source}")(["a photo of a dog", "a photo of a cat"])
images = model.encode_image(preprocess(image).unsqueeze(0), normalize=True)
texts = model.encode_text(tokens, normalize=True)
probabilities = (model.logit_scale.exp() * images @ texts.T).softmax(dim=-1)""")
    blocks.append(f"""import stablerep

backbone, transform = stablerep.load_model("{"DIR" if facts.location is None else source}")""")
    text = "\n\n".join(f"```python\n{block}\n```" for block in blocks)
    notes = []
    if facts.has_open_clip:
        notes.append(
            "open_clip resizes the shorter side to the input's size itself and crops nothing of a square "
            "image; the other libraries crop as in the table above."
        )
    if has_to_be_told:
        notes.append(
            "No name of timm describes this backbone, so open_clip_config.json names its folder "
            "(`timm_model_name`). open_clip looks for it from where Python is started, unless it is told as "
            "above. `stablerep export --push` names the repository."
        )
    return "\n\n".join([text, *notes])


def _describe_data(model: LoadedModel, training: Training) -> str:
    if not training.datasets:
        known = (
            "Not recorded: the checkpoint lay outside of its run's folder."
            if model.kind == "checkpoint"
            else "Not recorded: such a file does not say. Of the authors' own, their paper does."
            if model.kind == "stablerep"
            else "Not recorded: such a file does not say."
        )
        return known
    found = "What the datasets' own files said when this card was written; the checkpoint does not say it."
    return "\n\n".join([found, *(_describe_dataset(dataset) for dataset in training.datasets)])


def _describe_dataset(dataset: DatasetFacts) -> str:
    title = f"### {_escape(dataset.name)}"
    manifest = dataset.manifest
    if manifest is None:
        return f"{title}\nIts `dataset.json` could not be read when this card was written."
    generator = publish_settings(manifest.settings.get("generator", {}))
    rows = {
        "images": f"generated, {manifest.num_images_per_caption} planned for each of {manifest.num_captions} "
        "captions",
        "captions from": _code(publish_settings(manifest.captions_source)),
        **{f"generator: {name}": _code(value) for name, value in _flatten(generator)},
        "settings hash": f"`{manifest.settings_hash}`",
        "licence": dataset.license if dataset.license != NO_LICENSE else "nobody has stated one",
    }
    note = f"\n\n> {_escape(publish_text(manifest.note))}" if manifest.note else ""
    lines = "\n".join(f"| {_escape(name)} | {value} |" for name, value in rows.items())
    return f"{title}\n| | |\n|---|---|\n{lines}{note}"


def _describe_training(training: Training, facts: ModelFacts) -> str:
    if not training.is_known:
        return "Not recorded."
    where = f"`{TRAINING_FILE}` has every setting."
    model = training.model
    names = {
        "num_captions_per_rank": "captions in a batch of one rank",
        "num_views_per_caption": "views of each caption",
        "positives": "what makes images positives",
        "temperature": "temperature",
        "projection_out_features": "width of the embeddings",
    }
    rows = {title: f"`{model[name]}`" for name, title in names.items() if name in model}
    if training.num_steps is not None:
        rows["steps"] = f"{training.num_steps}"
    if facts.ema:
        rows["weights"] = "moving average"
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"{where}\n\n| | |\n|---|---|\n{lines}" if rows else where


def _describe_intended_use(training: Training) -> str:
    further = (
        ", and comparisons of learning from generated images with learning from real ones"
        if training.has_generated_images
        else ""
    )
    return (
        "Features of natural images for research: linear probes, nearest neighbours, fine-tuning"
        f"{further}. It has no classifier of its own.\n\n{_NOT_MEANT_FOR}"
    )


def _describe_biases(training: Training) -> str:
    known = _OF_GENERATED_IMAGES if training.has_generated_images else _OF_ANY_IMAGES
    return f"{known}\n- None of this has been measured for this model beyond what stands under Evaluation."


def _describe_scores(scores: Sequence[Record]) -> str:
    if not scores:
        return "No figures were given when this card was written."
    parts = []
    for provenance, rows in _group(scores):
        data = PurePath(provenance.data).name or provenance.data
        parts.append(f"On {_escape(data)} ({_escape(provenance.transform)}):\n\n{build_table(rows)}")
    if any(row.selection == "test" for row, _ in scores):
        parts.append(
            "Rows chosen on `test` are the best *on the test split*, as in the published figures, and so "
            "optimistic."
        )
    return "\n\n".join(parts)


def _group(scores: Sequence[Record]) -> list[tuple[Provenance, list[Row]]]:
    """The rows of each data set."""
    groups: dict[tuple[str, str], tuple[Provenance, list[Row]]] = {}
    for row, provenance in scores:
        provenance = dataclasses.replace(provenance, data=publish_text(provenance.data))
        key = provenance.hashes["data"], provenance.hashes["transform"]
        groups.setdefault(key, (provenance, []))[1].append(row)
    return list(groups.values())


def _describe_license(facts: ModelFacts, training: Training) -> str:
    stated = (
        "Nobody has stated a licence for these weights. Whoever publishes them states one: "
        "`stablerep export --license`."
        if facts.license == NO_LICENSE
        else f"`{_escape(facts.license)}`, as the header says."
    )
    data = sorted({dataset.license for dataset in training.datasets} - {NO_LICENSE})
    named = f" The data's own: {', '.join(data)}." if data else ""
    behind = "The licences of the generator and of the captions may bind what was learnt from them."
    return f"{stated}{named} {behind}"


def _describe_checks(facts: ModelFacts) -> str:
    lines = "\n".join(f"| {one.form} | {one.difference:.1e} |" for one in facts.comparisons)
    return (
        f"Each form was loaded back and compared with the source on fixed images and texts; {TOLERANCE:g} is "
        "the most that was allowed. `sha256sum -c SHA256SUMS` checks the files.\n\n"
        f"| form | largest difference |\n|---|---:|\n{lines}"
    )


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested settings by dotted name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(inner, f"{name}.{key}" if name else str(key))
    elif value not in (None, ""):
        yield name, value


def _code(value: Any) -> str:
    """A value as code that stays in its cell of a table."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > _MAX_VALUE_CHARACTERS:
        text = f"{text[:_MAX_VALUE_CHARACTERS]}…"
    return f"`{_escape(text.replace('`', '´'))}`"


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
