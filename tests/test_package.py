"""The wheel works by itself: in an environment without the source tree, in a folder that has a package `trainers` of its own."""

import os
import re
import rlcompleter
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import lowprec
from lowprec.config import shipped
from tests.runs import make_corpus, overrides

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


class Installed:
    """The wheel in an environment that sees the libraries of this interpreter, but not the source tree."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "project"
        (self.folder / "trainers").mkdir(parents=True)
        (self.folder / "trainers" / "__init__.py").write_text("raise ImportError('the trainers of the project itself')\n")
        outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        # The project also comes first on the path of console commands.
        self.variables = {**outside, "PYTHONPATH": str(self.folder), "WANDB_MODE": "offline"}
        self.bin = folder / "env" / "bin"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
        wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
        subprocess.run(wheel, env=outside, check=True, capture_output=True, timeout=120)
        (self.wheel,) = folder.glob("lowprec-*.whl")
        venv.create(folder / "env", symlinks=True, with_pip=False)
        install = ["--python", str(self.bin / "python"), "install", "--no-deps", "--no-index", str(self.wheel)]
        subprocess.run([*pip, *install], env=outside, check=True, capture_output=True, timeout=120)
        # The path is added only now, so that pip does not see this interpreter's lowprec as an installed one. Python does not read the .pth
        # files of a folder that a .pth file names, so an editable install there does not show the source tree.
        (site_packages,) = (folder / "env" / "lib").glob("python*/site-packages")
        (site_packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(self, program: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [str(self.bin / program), *arguments]
        result = subprocess.run(command, cwd=self.folder, env=self.variables, capture_output=True, text=True, timeout=200)
        assert not check or result.returncode == 0, result.stderr[-3000:]
        return result


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("package"))


def test_the_wheel_holds_the_package_the_configurations_and_the_licence(installed: Installed):
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    configs = {f"lowprec/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "lowprec").rglob("*.py")}
    assert names >= configs | modules | {"lowprec/py.typed"}
    others = [name for name in names - configs - modules - {"lowprec/py.typed"} if ".dist-info/" not in name]
    assert [name for name in others if not name.endswith(".pyi")] == []
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_public_names_come_from_the_wheel(installed: Installed):
    code = "import lowprec; from lowprec import LowPrecisionCallback; print(lowprec.__file__, LowPrecisionCallback.__module__)"
    *_, file, module = installed.run("python", "-c", code).stdout.split()  # wandb may print before
    assert Path(file).is_relative_to(installed.bin.parent)
    assert module.startswith("lowprec.")


def test_training_by_name(installed: Installed, tmp_path: Path):
    corpus = make_corpus(tmp_path / "corpus")
    result = installed.run("lowprec", "train", "llama-tiny-cpu", "trainer.max_steps=3", *overrides(corpus))
    assert "3 steps" in result.stdout
    (run,) = (installed.folder / "runs" / "llama-tiny-cpu").iterdir()
    assert (run / "summary.json").is_file()


def test_planning_by_name_and_the_machine(installed: Installed):
    assert "fp8_blockwise" in installed.run("lowprec", "plan", "llama-tiny-cpu").stdout
    assert "optional parts" in installed.run("python", "-m", "lowprec", "doctor").stdout


def test_a_shipped_file_is_copied_out(installed: Installed):
    assert installed.run("lowprec", "init", "accelerate/fsdp2").stdout == "wrote fsdp2.yaml\n"
    assert (installed.folder / "fsdp2.yaml").read_text() == (ROOT / "configs" / "accelerate" / "fsdp2.yaml").read_text()
    result = installed.run("lowprec", "train", "llama-tiny-cup", check=False)
    assert result.returncode == 2
    assert result.stderr == "lowprec: llama-tiny-cup: no such file or shipped configuration; did you mean 'llama-tiny-cpu'?\n"


def test_tab_completion_shows_the_public_names():
    completer = rlcompleter.Completer({"lowprec": lowprec})
    found = set()
    while (match := completer.complete("lowprec.", len(found))) is not None:
        found.add(match.removeprefix("lowprec.").rstrip("()"))
    assert found >= set(lowprec.__all__) - {"__version__"}
    assert set(dir(lowprec)) == set(lowprec.__all__)


def test_editors_see_the_public_names():
    stub = (ROOT / "lowprec" / "__init__.pyi").read_text()
    imports = re.findall(r"^from ([\w.]+) import (\w+) as (\w+)$", stub, re.MULTILINE)
    named = {alias: f"{module}.{name}" for module, name, alias in imports}
    assert named == {name: ".".join(filter(None, place)) for name, place in lowprec._EXPORTS.items()}
    assert set(re.findall(r'^    "(\w+)",$', stub, re.MULTILINE)) == set(lowprec.__all__)


def test_a_source_tree_has_its_own_configurations():
    assert shipped.folder() == Path(lowprec.__file__).parents[1] / "configs"


def test_messages_name_extras_that_exist():
    extras = PROJECT["optional-dependencies"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in [*(ROOT / "lowprec").rglob("*.py"), ROOT / "README.md"])
    named = {extra for group in re.findall(r"lowprec\[([a-z, ]+)\]", text) for extra in re.split(r", *", group)}
    assert named
    assert named <= set(extras)
    (everything,) = extras["all"]
    assert set(everything.removeprefix("lowprec[").removesuffix("]").split(",")) == set(extras) - {"all", "dev"}
