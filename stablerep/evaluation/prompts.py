"""Prompt templates of zero-shot classification, and the class names that go into them."""

from collections.abc import Sequence
from typing import Literal

TemplateSet = Literal["openai_80", "openai_7", "plain"]

PLAIN_TEMPLATES = ("a photo of a {}.",)


def read_templates(name: TemplateSet) -> tuple[str, ...]:
    """Templates by the name of their set, each with one `{}` where the class name goes.

    Args:
        name: "openai_80" is CLIP's ensemble for ImageNet, "openai_7" the subset that CLIP's authors found by
            forward selection, "plain" is "a photo of a {}." alone. The first two are read from open_clip.

    Raises:
        ValueError: If the name is unknown, or open_clip is not installed where it is needed.

    Reference:
        Radford et al., CLIP, arXiv 2103.00020, section 3.1.4, and its public notebook
        `Prompt_Engineering_for_ImageNet.ipynb`.
    """
    if name == "plain":
        return PLAIN_TEMPLATES
    if name not in ("openai_80", "openai_7"):
        raise ValueError(f"templates must be openai_80, openai_7 or plain, got {name}")
    try:
        import open_clip  # takes seconds to import, and is an extra
    except ModuleNotFoundError as error:
        if error.name != "open_clip":
            raise
        raise ValueError(
            f"templates {name} need open_clip, which is not installed: pip install 'stablerep[text]'"
        ) from error
    functions = {
        "openai_80": open_clip.OPENAI_IMAGENET_TEMPLATES,
        "openai_7": open_clip.SIMPLE_IMAGENET_TEMPLATES,
    }[name]
    return tuple(function("{}") for function in functions)


def read_imagenet_class_names() -> tuple[str, ...] | None:
    """The names of ImageNet's 1000 classes that CLIP's authors chose, in the order of their labels.

    WordNet's own call two birds and machines "crane", and two garments "maillot".

    Returns:
        The names as open_clip has them, None where it is not installed.

    Reference:
        Radford et al., CLIP, arXiv 2103.00020, its public notebook `Prompt_Engineering_for_ImageNet.ipynb`.
    """
    try:
        import open_clip  # takes seconds to import, and is an extra
    except ModuleNotFoundError as error:
        if error.name != "open_clip":
            raise
        return None
    return tuple(open_clip.IMAGENET_CLASSNAMES)


def class_name_to_words(class_name: str) -> str:
    """A folder's name as words: "apple_pie" becomes "apple pie"; outer spaces go."""
    return class_name.replace("_", " ").strip()


def fill_templates(templates: Sequence[str], class_name: str) -> list[str]:
    """One prompt a template, with the class name as words in place of `{}`.

    Raises:
        ValueError: If there is no template, a template has no or several `{}`, or the class name is empty.
    """
    if not templates:
        raise ValueError("templates must be >= 1, got 0")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"a template must hold {{}} once, got {template!r}")
    if not (words := class_name_to_words(class_name)):
        raise ValueError(f"a class name must hold a word, got {class_name!r}")
    return [template.replace("{}", words) for template in templates]
