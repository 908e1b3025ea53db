"""Shipped configurations are found by name, files of the working directory come first, and `lowprec init` copies one out."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from lowprec.cli.main import main
from lowprec.config import shipped
from lowprec.errors import UserError
from lowprec.training.run.config import load_run

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "llama-tiny-cpu.yaml"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def init(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    def run(*arguments: str) -> tuple[str, str]:
        with contextlib.suppress(SystemExit):
            main(["init", *arguments])
        return tuple(capsys.readouterr())

    return run


def refusal(config: str) -> str:
    with pytest.raises(UserError) as error:
        shipped.find(config)
    return str(error.value)


def test_names_are_paths_without_the_suffix():
    names = shipped.names()
    assert set(names) == {path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert names[-3:] == ["accelerate/cpu", "accelerate/fsdp2", "accelerate/one_gpu"]
    assert all(shipped.about(name) for name in names)


@pytest.mark.parametrize("name", [name for name in shipped.names() if not name.startswith("accelerate/")])
def test_every_shipped_run_is_a_valid_configuration(name: str):
    run, settings = load_run(shipped.path_of(name), [])
    assert run.precision.recipe is not None
    assert settings["model"]


def test_a_bare_name_is_found_anywhere():
    assert shipped.find("llama-tiny-cpu") == TINY


def test_a_file_of_the_working_directory_comes_first():
    Path("llama-tiny-cpu").mkdir()  # a folder is not a configuration
    assert shipped.find("llama-tiny-cpu") == TINY
    Path("llama-tiny-cpu.yaml").touch()
    assert shipped.find("llama-tiny-cpu") == Path("llama-tiny-cpu.yaml")
    Path("llama-125m-bf16").touch()
    assert shipped.find("llama-125m-bf16") == Path("llama-125m-bf16")


def test_paths_stay_as_they_are():
    for path in ("runs/x/config.yaml", "mine.yml", "accelerate/fsdp2"):
        assert shipped.find(path) == Path(path)
    Path("folder").mkdir()
    assert shipped.find("folder") == Path("folder")  # the reader of the file refuses it


def test_an_unknown_name_is_one_line_with_the_nearest():
    assert refusal("lama-tiny-cpu") == "lama-tiny-cpu: no such file or shipped configuration; did you mean 'llama-tiny-cpu'?"
    assert refusal("xyz").startswith("xyz: no such file or shipped configuration; known: llama-125m-bf16, ")
    assert "accelerate" not in refusal("xyz")
    assert refusal("configs/llama-tiny-cpu.yaml") == "configs/llama-tiny-cpu.yaml: no such file; the shipped one is 'llama-tiny-cpu'"


def test_init_lists_names_and_descriptions(init: Callable[..., tuple[str, str]]):
    lines = init()[0].splitlines()
    assert [line.split()[0] for line in lines] == shipped.names()
    assert "A 2M-parameter Llama" in lines[shipped.names().index("llama-tiny-cpu")]


def test_init_copies_and_never_replaces(init: Callable[..., tuple[str, str]], tmp_path: Path):
    assert init("llama-tiny-cpu") == ("wrote llama-tiny-cpu.yaml\n", "")
    assert Path("llama-tiny-cpu.yaml").read_text() == TINY.read_text()
    Path("llama-tiny-cpu.yaml").write_text("mine")
    assert init("llama-tiny-cpu") == ("", "lowprec: llama-tiny-cpu.yaml: exists already; give another PATH\n")
    assert Path("llama-tiny-cpu.yaml").read_text() == "mine"
    assert init("llama-tiny-cpu", "new/other.yaml") == ("wrote new/other.yaml\n", "")
    assert init("accelerate/cpu", "new") == ("wrote new/cpu.yaml\n", "")
    Path("link.yaml").symlink_to(tmp_path / "nowhere")
    assert init("llama-tiny-cpu", "link.yaml")[1] == "lowprec: link.yaml: exists already; give another PATH\n"
    assert init("llama-tiny-cpu", "new/cpu.yaml/a.yaml")[1].startswith("lowprec: new/cpu.yaml/a.yaml: ")


def test_init_of_an_unknown_name(init: Callable[..., tuple[str, str]]):
    known = f"known: {', '.join(sorted(shipped.names()))}\n"
    assert init("fsdp2") == ("", f"lowprec: 'fsdp2' is no shipped configuration; {known}")
    assert init("llama-tiny") == ("", f"lowprec: 'llama-tiny' is no shipped configuration; did you mean 'llama-tiny-cpu'?; {known}")
