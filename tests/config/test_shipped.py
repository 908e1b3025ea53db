"""Shipped configurations are found by name, files of the working directory come first, and `lowprec init` copies one out."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowprec.cli.main import main
from lowprec.config import shipped
from lowprec.errors import UserError
from lowprec.training.run.config import load_run
from lowprec.training.run.models import build_config, build_model
from lowprec.training.run.setup import RunSetup

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


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let backends and the cost model decide as on a Hopper GPU; nothing runs there."""
    for question in ("hopper.why_not_hopper", "hopper._why_no_gluon", "scaled_mm._why_not_here"):
        monkeypatch.setattr(f"lowprec.gemm.{question}", lambda *_: None)


@pytest.mark.parametrize("name", [name for name in shipped.names() if not name.startswith("accelerate/")])
def test_every_shipped_run_runs_the_recipe_that_it_names(name: str, hopper: None):
    run, _ = load_run(shipped.path_of(name), [])
    device = "cpu" if name.endswith("-cpu") else "cuda"
    setup = RunSetup(config=run, device_type=device, trainer=run.trainer)
    with torch.device("meta"):
        model = build_model(run.model, build_config(run.model, 257 if device == "cpu" else run.data.vocab_size), attn_implementation="sdpa")
    for phase in run.precision.phases():
        plan = setup.plan_layers(model, phase)
        assert phase.recipe is not None
        assert {layer.name for layer in plan.layers if layer.recipe != phase.recipe.name} == {"lm_head"}
        assert not plan.warnings


def test_without_its_skip_slow_a_shipped_run_would_run_in_bf16_and_says_so(hopper: None):
    run, _ = load_run(shipped.path_of("llama-125m-fp8-blockwise"), ["precision.skip_slow=true"])
    setup = RunSetup(config=run, device_type="cuda", trainer=run.trainer)
    with torch.device("meta"):
        model = build_model(run.model, build_config(run.model, run.data.vocab_size), attn_implementation="sdpa")
    (warning,) = setup.plan_layers(model, run.precision).warnings
    assert warning.startswith("fp8_blockwise runs in none of the 85 linear layers: it does not pay (model.layers.0.mlp.")
    assert warning.endswith("precision.skip_slow: false runs all layers in it nevertheless")


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
