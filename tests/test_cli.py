"""The front door: fast, and every mistake answered with one line and the right exit code."""

import importlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from stablerep import __version__, cli
from stablerep.arguments import SuggestingErrors, UsageError, locate_configs, nearest, use_underscores

SAMPLE_VERB = '''
import dataclasses


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How images are drawn."""

    guidance_scale: float = 2.0
    """Strength of the caption; 1 is no guidance."""

    model: str = "embedded"
    """A folder or a hub id."""

    def __post_init__(self):
        if self.guidance_scale < 0:
            raise ValueError(f"guidance_scale must be >= 0, got {self.guidance_scale}")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """A verb for tests."""

    captions: str
    """File of captions, one a line."""

    num_images_per_caption: int = 4
    """Images of one caption."""

    quick: bool = False
    """Less of everything."""

    sampler: SamplerConfig = dataclasses.field(default_factory=SamplerConfig)
    """How images are drawn."""


def run(config):
    match config.captions:
        case "missing.txt":
            open("/nowhere/missing.txt")
        case "bad":
            raise ValueError("captions must be UTF-8,\\n  got bytes")
        case "bug":
            raise RuntimeError("not the user's doing")
        case "interrupt":
            raise KeyboardInterrupt
        case "unfinished":
            return 1
    print(config)
'''


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A verb `sample` in a module of its own; returns the verb's name."""
    (tmp_path / "sample_verb.py").write_text(SAMPLE_VERB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sample_verb", raising=False)
    monkeypatch.setitem(cli.VERBS, "sample", cli.Verb("sample_verb", "SampleConfig", "a verb for tests"))
    monkeypatch.chdir(tmp_path)
    return "sample"


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what stands on stderr, which must be one line."""
    text = capsys.readouterr().err
    assert text.endswith("\n")
    assert text.count("\n") == 1
    return text.rstrip("\n")


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["generte"], ["--config", "x", "fit"]])
def test_nothing_heavy_is_imported_before_a_verb_is_known(args: list[str]) -> None:
    heavy = ["torch", "numpy", "lightning", "jsonargparse", "diffusers", "timm", "yaml", "PIL", "data_gen"]
    program = (
        f"import sys; from stablerep.cli import main; main({args}); "
        f"print('LOADED', [name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    words = capsys.readouterr().out.split()
    assert [verb for verb in cli.VERBS if verb not in words] == []


def test_version_is_the_package_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["stablerep", __version__]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["generte"], "stablerep: error: unknown verb 'generte'; did you mean generate?"),
        (["evaluat"], "stablerep: error: unknown verb 'evaluat'; did you mean evaluate?"),
        (["--hlep"], "stablerep: error: unknown option --hlep; did you mean --help?"),
        (
            ["--config", "a.yaml", "fit"],
            "stablerep: error: --config stands after the verb: stablerep VERB --config FILE",
        ),
        (
            ["--seed", "1", "fit"],
            "stablerep: error: --seed stands before the verb; options follow it: stablerep VERB --seed",
        ),
    ],
)
def test_a_command_that_cannot_be_understood_is_answered_with_the_right_one(
    args: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(args) == 2
    assert error_line(capsys) == expected


def test_no_verb_at_all_is_a_usage_error_with_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: stablerep VERB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (
            ["--captions=a", "--num_image_per_caption=2"],
            "unknown option --num_image_per_caption; did you mean --num_images_per_caption?",
        ),
        (
            ["--captions=a", "--sampler.guidence_scale", "2"],
            "unknown option --sampler.guidence_scale; did you mean --sampler.guidance_scale?",
        ),
        (
            ["--captions=a", "--guidance-scale", "2"],
            "unknown option --guidance_scale; did you mean --sampler.guidance_scale?",
        ),
        (
            ["--captions=a", "--smapler.model", "x"],
            "unknown option --smapler.model; did you mean --sampler.model?",
        ),
        (
            ["--captions=a", "--num_images=2"],
            "unknown option --num_images; did you mean --num_images_per_caption?",
        ),
        (["--captions=a", "--zzz"], "unknown option --zzz"),
        (["--captions=a", "stray"], "unexpected argument 'stray'"),
        ([], "missing --captions"),
        (["--captions=a", "--num_images_per_caption=x"], "--num_images_per_caption: expected int, got 'x'"),
    ],
)
def test_a_misspelt_option_is_answered_with_the_nearest(
    args: list[str], expected: str, sample: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([sample, *args]) == 2
    assert error_line(capsys) == f"stablerep sample: error: {expected}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "captionz: a\n",
            "unknown option 'captionz'; did you mean captions?",
        ),
        (
            "captions: a\nsampler:\n  guidance: 3\n",
            "unknown option 'sampler.guidance'; did you mean sampler.guidance_scale?",
        ),
    ],
)
def test_a_misspelt_key_of_a_config_file_is_answered_with_the_nearest(
    text: str, expected: str, sample: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text(text)
    assert cli.main([sample, "--config", "a.yaml"]) == 2
    assert error_line(capsys) == f"stablerep sample: error: {expected}"


@pytest.mark.parametrize("text", ["a: [\n", "\x00", "- 1\n"])
def test_a_config_file_that_is_not_yaml_is_one_line(
    text: str, sample: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text(text)
    assert cli.main([sample, "--config", "a.yaml"]) == 2
    assert "error: " in error_line(capsys)


def test_a_config_file_that_is_not_there_is_named(sample: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([sample, "--config", "absent.yaml"]) == 2
    assert "absent.yaml" in error_line(capsys)


def test_options_come_from_a_file_and_later_ones_win(
    sample: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text("captions: a\nsampler:\n  guidance_scale: 5\n  model: m\n")
    assert cli.main([sample, "--config", "a.yaml", "--sampler.guidance-scale", "3"]) == 0
    assert "guidance_scale=3.0, model='m'" in capsys.readouterr().out


def test_what_print_config_prints_is_a_config(
    sample: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([sample, "--captions=a", "--num_images_per_caption=7", "--print_config"]) == 0
    (tmp_path / "a.yaml").write_text(capsys.readouterr().out)
    assert cli.main([sample, "--config=a.yaml"]) == 0
    assert "num_images_per_caption=7" in capsys.readouterr().out


def test_help_of_a_verb_has_the_docstring_of_every_field(
    sample: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([sample, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Images of one caption" in text
    assert "Strength of the caption; 1 is no guidance" in text


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--captions=missing.txt"], "No such file or directory: /nowhere/missing.txt"),
        (["--captions=bad"], "captions must be UTF-8, got bytes"),
        (["--captions=a", "--sampler.guidance_scale=-1"], "guidance_scale must be >= 0, got -1.0"),
    ],
)
def test_a_failure_of_the_input_is_one_line_and_exit_code_1(
    args: list[str], expected: str, sample: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([sample, *args]) == 1
    assert error_line(capsys) == f"stablerep sample: error: {expected}"


@pytest.mark.parametrize(
    "args", [["--debug", "sample", "--captions=bad"], ["sample", "--captions=bad", "--debug"]]
)
def test_debug_shows_the_traceback_wherever_it_stands(
    args: list[str], sample: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(args) == 1
    text = capsys.readouterr().err
    assert "Traceback (most recent call last)" in text
    assert text.endswith("stablerep sample: error: captions must be UTF-8, got bytes\n")


def test_a_bug_is_not_dressed_as_bad_input(sample: str) -> None:
    with pytest.raises(RuntimeError, match="not the user's doing"):
        cli.main([sample, "--captions=bug"])


def test_an_interrupt_is_one_line_and_exit_code_130(sample: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([sample, "--captions=interrupt"]) == 130
    assert error_line(capsys) == "stablerep sample: interrupted"


def test_the_exit_code_of_a_verb_is_the_exit_code(sample: str) -> None:
    assert cli.main([sample, "--captions=unfinished"]) == 1


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--quick", "--captions=a"], True),
        (["--captions=a", "--quick"], True),
        (["--quick=true", "--captions=a"], True),
        (["--quick", "false", "--captions=a"], False),
        (["--captions=a"], False),
    ],
)
def test_a_flag_may_stand_alone(
    args: list[str], expected: bool, sample: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([sample, *args]) == 0
    assert f"quick={expected}" in capsys.readouterr().out


def test_dashes_become_underscores_in_names_alone() -> None:
    args = ["--num-views=a-b", "-c", "x-y", "--a-b.c-d", "-1", "--", "--e-f"]
    assert use_underscores(args) == ["--num_views=a-b", "-c", "x-y", "--a_b.c_d", "-1", "--", "--e-f"]


def test_a_shipped_config_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = Path(cli.__file__).parents[1] / "configs" / "embedded.yaml"
    assert locate_configs(["--config", "configs/embedded.yaml"]) == ["--config", str(shipped)]
    assert locate_configs(["--config=configs/embedded.yaml"]) == [f"--config={shipped}"]


def test_a_config_of_this_folder_comes_before_the_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "embedded.yaml").write_text("")
    args = ["--config", "configs/embedded.yaml", "--output", "configs/absent.yaml"]
    assert locate_configs(args) == args


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("modle", ["model", "data"], "model"),
        ("model", ["generator.model"], "generator.model"),
        ("generator.sed", ["seed", "generator.model", "generator.speed"], "generator.speed"),
        ("generator.seeds", ["seed", "generator.model"], "seed"),
        ("qqq", ["model", "data"], None),
        ("x", [], None),
    ],
)
def test_the_nearest_name_is_looked_for_in_its_own_group_first(
    name: str, known: Sequence[str], expected: str | None
) -> None:
    assert nearest(name, known) == expected


SINKS = """
class Sink:
    pass


class FileSink(Sink):
    def __init__(self, filename: str = "a", num_bytes: int = 1):
        pass
"""


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('{"class_path": "sinks.FileSnk"}', "unknown class 'sinks.FileSnk'; did you mean sinks.FileSink?"),
        ('{"class_path": "sink.FileSink"}', "unknown class 'sink.FileSink'; did you mean sinks.FileSink?"),
        ("FileSnk", "unknown class 'FileSnk'; did you mean sinks.FileSink?"),
        (
            '{"class_path": "sinks.FileSink", "init_args": {"filenam": "x"}}',
            "sinks.FileSink has no option 'filenam'; did you mean filename?",
        ),
        ('{"class_path": "sinks.Zzzzzzz"}', "unknown class 'sinks.Zzzzzzz'"),
    ],
)
def test_a_misspelt_class_or_its_option_is_answered_with_the_nearest(
    value: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jsonargparse

    (tmp_path / "sinks.py").write_text(SINKS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sinks", raising=False)

    class Parser(SuggestingErrors, jsonargparse.ArgumentParser):
        pass

    parser = Parser()
    parser.add_argument("--sink", type=importlib.import_module("sinks").Sink)
    with pytest.raises(UsageError) as caught:
        parser.parse_args(["--sink", value])
    assert str(caught.value) == f"--sink: {expected}"


def test_a_config_may_not_name_a_class_of_the_standard_library(
    sample: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = '{"class_path": "subprocess.Popen", "init_args": {"args": "true"}}'
    assert cli.main([sample, "--captions=a", "--sampler", text]) == 2
    assert "subprocess.Popen" in error_line(capsys)
