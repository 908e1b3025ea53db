"""The command line: quick help, plans without weights, machine-readable output."""

import errno
import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch

import lowprec.cli
from lowprec.cli.app import COMMANDS
from lowprec.cli.main import main
from lowprec.errors import reported
from tests.processes import ROOT, run
from tests.processes import lowprec as command
from tests.runs import CONFIG


def test_help_loads_nothing_heavy():
    code = (
        "import sys, contextlib\nfrom lowprec.cli.main import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'pydantic', 'ruamel') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "train" in result.stdout


def test_each_command_is_a_file_and_a_row():
    modules = {name: importlib.import_module(f"lowprec.cli.{name}") for _, name, _ in pkgutil.iter_modules(lowprec.cli.__path__)}
    commands = {name: module.command for name, module in modules.items() if isinstance(getattr(module, "command", None), click.Command)}
    assert sorted(commands) == sorted(COMMANDS)
    for name, found in commands.items():
        assert found.name == name
        assert found.help


def test_plan_of_a_large_model_builds_no_weights():
    """875M parameters in fp32 would be 3.5 GB; the whole process stays under 2 GB."""
    code = (
        "import resource\nfrom lowprec.cli.main import main\n"
        f"main(['plan', {str(CONFIG)!r}, 'model.preset=llama-8b-4l', '--json'])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    result = run("-c", code)
    *plan, peak_kib = result.stdout.splitlines()
    assert int(peak_kib) < 2 * 2**20
    shapes = {layer["name"]: layer["shape"] for layer in json.loads("\n".join(plan))["layers"]}
    assert shapes["model.layers.3.mlp.down_proj"] == [4096, 14336]
    assert shapes["model.layers.0.self_attn.k_proj"] == [1024, 4096]
    assert len(shapes) == 29


def test_output_of_libraries_is_not_part_of_the_answer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    # A new interpreter, in which a command imports transformers.trainer: it prints on stdout then, and imports torchao, which warns.
    code = (
        "from lowprec.cli.main import main\nfrom lowprec.config import shipped\nfind = shipped.find\n"
        "def noisy(config):\n    import transformers.trainer\n    return find(config)\n"
        "shipped.find = noisy\n"
        f"main(['plan', {str(CONFIG)!r}, '--json'])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(result.stdout)["device"] == "cpu"
    assert "WANDB" in result.stderr  # transformers prints this on stdout
    assert "Failed to load" not in result.stderr  # torchao prints this about its GPU kernels


def test_the_plan_says_what_schedule_and_guard_will_do():
    config = str(ROOT / "configs" / "llama-tiny-guarded-cpu.yaml")

    def parts(*overrides: str) -> dict[str, str]:
        printed = command("plan", config, *overrides, check=True).stdout
        _, _, below_the_layers = printed.partition("\n\n")
        return dict(line.split(maxsplit=1) for line in below_the_layers.partition("\n\n")[0].splitlines())

    shipped = parts("precision.guard.data=replay")
    assert shipped["schedule"] == "bf16 until 5%, fp8_blockwise until 90%, fp8_blockwise(fprop=bf16) until 100%"
    assert shipped["guard"] == "on: snapshots every 20 steps, ladder mxfp4 < fp8_blockwise < bf16, data replay"
    phases = "[{until: 200 steps, recipe: none}, {until: 90%, recipe: mxfp4}, {recipe: bf16}]"
    other = parts(f"precision.schedule={phases}", "precision.guard=false")
    assert other["schedule"] == "none until 200 steps, mxfp4 until 90%, bf16 until 100%"
    assert "guard" not in other


def test_recipes_as_json():
    recipes = {recipe["name"]: recipe for recipe in json.loads(command("recipes", "--json", check=True).stdout)}
    assert list(recipes) == lowprec.recipes.names()
    assert recipes["fp8_blockwise"]["fprop"] == "y = e4m3[1x128 fp32](x) · e4m3[128x128 fp32](w)ᵀ  (fp32 sums, promoted every 128)"
    assert recipes["qat_int8dyn_int4"]["dgrad"] == "dx = g · int4[1x32 fp32](w)"
    assert all(recipe["about"] for recipe in recipes.values())


def test_doctor_as_json():
    report = json.loads(command("doctor", "--json", check=True).stdout)
    assert report["device"]["type"] == "cpu"
    native = {recipe["name"] for recipe in report["recipes"] if recipe["native"]}
    assert native == {"fp32"}
    assert report["versions"]["torch"]
    missing = [part for part in report["optional"] if part["version"] is None]
    assert all(part["install"].startswith("pip install") for part in missing)


def test_bench_quantize_as_json():
    result = json.loads(command("bench", "quantize", "--shape", "64x128", "--json", check=True).stdout)
    assert result["shape"] == [64, 128]
    rows = {row["name"]: row for row in result["rows"]}
    assert {"mxfp4", "nvfp4", "fp8 tiles", "int8 rows"} <= rows.keys()
    for row in rows.values():
        assert 0 < row["ours"]["p20"] <= row["ours"]["median"] <= row["ours"]["p80"]


def test_bench_quantize_against_torchao_compares_the_bits():
    result = json.loads(command("bench", "quantize", "--shape", "64x128", "--against", "torchao", "--json", check=True).stdout)
    rows = {row["name"]: row for row in result["rows"]}
    assert all(rows[name]["equal"] for name in ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8"))
    assert rows["mxfp4"]["torchao"]["median"] > 0
    assert rows["fp8 tiles"]["torchao"] is None


def test_bench_refuses_unknown_arguments():
    for arguments, message in (
        (("--against", "torchoa"), "--against: unknown rival 'torchoa'; did you mean 'torchao'?"),
        (("--shape", "64"), "--shape: expected ROWSxCOLUMNS like 2048x1024, got '64'"),
        (("--device", "gpu"), "--device: unknown device 'gpu'; known: cpu, cuda"),
    ):
        result = command("bench", "quantize", *arguments)
        assert (result.returncode, result.stderr) == (2, f"lowprec: {message}\n")


def test_a_group_alone_shows_its_help():
    result = command("bench")
    assert "Commands:" in (result.stdout + result.stderr).splitlines()


def test_an_unknown_command_is_one_line():
    result = command("trian")
    assert (result.returncode, result.stderr) == (2, "lowprec: no command 'trian'; did you mean 'train'?\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("bench", "gemm", "--shape", "9" * 5000 + "x1x1"), "--shape: expected MxNxK like 512x512x512"),
        (("bench", "quantize", "--shape", "9" * 5000 + "x1"), "--shape: expected ROWSxCOLUMNS"),
        (("bench", "linear", "--seconds", "nan"), "expected seconds from 0 to 3600, got 'nan'"),
        (("bench", "gemm", "--seconds", "inf"), "expected seconds from 0 to 3600, got 'inf'"),
        (("bench", "train", "--steps", "9" * 20), "is not in the range 2<=x<=1000000"),
        (("bench", "train", "--batch", "9" * 5000), "--batch"),
        (("plan", "x" * 5000), "no such file or shipped configuration"),
        (("plan", "fifo.yaml"), "fifo.yaml: not a regular file"),
        (("plan", "/dev/zero"), "/dev/zero: not a regular file"),
        (("plan", "file/x.yaml"), "file/x.yaml: can't be read: Not a directory"),
        (("plan", "\x1b[2J"), "\\x1b[2J: no such file or shipped configuration"),
        (("plan", "llama-tiny-cpu", "data.seq_len"), "'data.seq_len': an override is written key=value"),
        (("plan", "llama-tiny-cpu", "=1"), "'=1': an override is written key=value"),
        (("plan", "llama-tiny-cpu", "data..seq_len=1"), "an override is written key=value"),
        (("plan", "llama-tiny-cpu", "data.seq_len=[1"), "data.seq_len=[1: not YAML"),
        (("init", "llama-tiny-cpu", "x" * 300), "can't be written: File name too long"),
        (("init", "llama-tiny-cpu", "file/x"), "can't be written: file is a file"),
        (("init", "llama-tiny-cpu", "fifo.yaml"), "fifo.yaml: exists already"),
        (("recipes", "x"), "Got unexpected extra argument (x)"),
    ],
    ids=range(19),
)
def test_bad_arguments_are_one_bounded_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo.yaml")
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    (line,) = printed.err.strip().splitlines()
    assert printed.out == ""
    assert line.startswith("lowprec: ")
    assert message in line
    assert len(line) < 6000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo.yaml", "file"]


@pytest.mark.parametrize(
    "error, code, message",
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/full/model"),
            1,
            "lowprec: stopped: can't write /full/model: No space left",
        ),
        (MemoryError(), 1, "lowprec: stopped: out of memory: Python could not allocate"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 1, "lowprec: stopped: out of memory: CUDA out of memory. Tried"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "lowprec: stopped: out of memory: DefaultCPUAllocator"),
        (RuntimeError("a bug"), None, ""),
        (OSError(errno.EIO, "Input/output error"), None, ""),
        (KeyError("a bug"), None, ""),
    ],
    ids=repr,
)
def test_limits_of_the_machine_are_one_line_and_bugs_keep_their_traceback(
    error: Exception, code: int | None, message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(type(error) if code is None else SystemExit) as stopped, reported("lowprec"):
        raise error
    assert getattr(stopped.value, "code", None) == code
    assert capsys.readouterr().err.startswith(message)
