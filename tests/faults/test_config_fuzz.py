"""Mutated configurations: each one is planned, or refused by one line, in bounded time and before anything is written.

A case is drawn from a seed and a number, so a failure can be repeated:

    PYTHONPATH=. python -m tests.faults.test_config_fuzz SEED NUMBER
"""

import contextlib
import enum
import io
import json
import os
import random
import signal
import sys
import time
import traceback
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from lowprec.cli.main import main
from lowprec.config import shipped, yaml
from lowprec.errors import UserError
from tests.runs import make_corpus

SEED = 20261128
LIMIT_S = 60
"""Seconds that a case may take, on a machine that has other work. Alone, a plan takes a tenth, a run of two steps one or two."""
LONGEST_LINE = 4200

TINY: dict[str, Any] = {
    "model": {
        "preset": "llama-tiny",
        "overrides": {
            "num_hidden_layers": 1,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
        },
    },
    "data": {"source": "CORPUS", "cache_dir": "CACHE", "seq_len": 32, "validation_fraction": 0.2, "tokenizer": "bytes"},
    "precision": {"recipe": "mxfp8"},
    "attention": {"mask": "causal"},
    "kernels": {"liger": "auto"},
    "optimizer": {"weights": "fp32"},
    "trainer": {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3, "report_to": "none"},
}

KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 128},
    "qwen2": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128},
    "gemma2": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 128,
        "head_dim": 32,
    },
    "mixtral": {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "num_local_experts": 2,
    },
    "gpt_neox": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 1, "state_size": 4},
    "opt": {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 128,
        "word_embed_proj_dim": 64,
        "max_position_embeddings": 128,
    },
}
"""Other types of models, each in its own fields."""

NUMBERS: tuple[Any, ...] = (
    *(0, 1, 2, 3, 5, 7, 64, 100, -1, -7, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, -(2**63), 10**100),
    *(0.0, 0.5, 1.0, 1.5, -0.5, 1e-30, 1e30, 1e300, 5e-324, float("inf"), float("-inf"), float("nan")),
    *(True, False, "1", "1e-3", "nan", "-inf", "0x10", "1_000", "٣", " 3 ", "3 steps"),
)
TEXTS: tuple[Any, ...] = (
    *("", " ", "~", "none", "None", "null", "auto", "on", "off", "yes", "bf16", "fp32", "mxfp4", "nvfp4", "fp8_delayed", "causal"),
    *("é", "名", "\u202e", "a\nb", "a\tb", "\x1b[31m", "a\0b", "\ud800", "../..", "/", "/dev/null", "/dev/zero", "/etc/passwd", "/root/x"),
    *(
        "~nobody/x",
        "x" * 300,
        "x" * 5000,
        "a/" * 3000,
        "{",
        "}",
        "[",
        "%s",
        "{0}",
        "$HOME",
        "*",
        "**",
        "[a",
        "(",
        "a{99999999999}",
        "(" * 200,
    ),
    *("!!python/object:os.system", "causal & (", "causal & document", "sliding_window(0)", "prefix(99999999999999999999)", "~" * 200),
    *(
        "~causal",
        "causal & ~causal",
        "not a mask",
        "5%",
        "101%",
        "1e9 steps",
        "9" * 400 + " steps",
        "-1 steps",
        "1B tokens",
        ".*",
        "lm_head",
    ),
)
OTHERS: tuple[Any, ...] = (
    *(None, [], {}, [None], [[]], {"": 1}, {"a": None}, {1: 2}, {None: 3}, {True: 1}, {1.5: 2}, [1, "a", None], [{"modules": ".*"}]),
    *({"base": "mxfp8"}, {"base": {"base": "mxfp8"}}, {"base": "mxfp8", "fprop": "nvfp4"}, {"base": "mxfp8", "dgrad": {"a": "e9m9"}}),
    *(
        {"recipe": "mxfp4", "until": "50%"},
        [{"until": "50%", "recipe": "mxfp4"}, {"until": "100%"}],
        [{"until": "2 steps"}, {"until": "1 step"}],
    ),
    *(
        {"a": {"b": {"c": {"d": [1] * 100}}}},
        list(range(1000)),
        "x".join("yz") * 50,
        [float("nan")],
        {"x": float("inf")},
        [[[[[[[[[[1]]]]]]]]]],
    ),
)
NASTY = (*NUMBERS, *TEXTS, *OTHERS)

TEXT_PIECES = (
    *(
        "\t",
        "\0",
        "\ufeff",
        "\x1b",
        "\u2028",
        "%",
        "@",
        "`",
        "|",
        ">",
        "&a ",
        "*a ",
        "!x ",
        "!!int ",
        "!!binary ",
        "!!set ",
        "- ",
        "? ",
        ": ",
    ),
    *(
        "<<: ",
        "---\n",
        "...\n",
        "{",
        "}",
        "[",
        "]",
        '"',
        "'",
        "#",
        ",",
        "\n",
        "\n\n  ",
        "9" * 5000,
        "[" * 500,
        "a: &a [*a]\n",
        "\r",
        "\r\n",
    ),
    *(
        " .nan",
        "1e999",
        "0o777",
        "0b1",
        "12:30",
        "2024-01-01",
        "~",
        "=",
        "%YAML 1.1\n---\n",
        "a: b: c",
        '"\\ud800"',
        '"\\x00"',
        '"\\UFFFFFFFF"',
    ),
)


@dataclass(frozen=True)
class Case:
    """A configuration file and the overrides of a command."""

    text: bytes
    overrides: tuple[str, ...]
    tiny: bool
    """Flag: the configuration is of a tiny model."""


def setting_types() -> dict[str, Any]:
    """Return the type of each setting, by its dotted path."""
    from transformers import TrainingArguments

    from lowprec.training.run.config import RunConfig

    hints = typing.get_type_hints(TrainingArguments)
    types = {f"trainer.{field.name}": hints[field.name] for field in fields(TrainingArguments) if field.init}
    types |= {"trainer.resume_from_checkpoint": bool | str, "trainer.overwrite_output_dir": bool}
    return types | dict(_types_of(RunConfig, ""))


def _types_of(model: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    from lowprec.config.schema import StrictConfig

    for name, field in model.model_fields.items():
        yield prefix + name, field.annotation
        for hint in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(hint, type) and issubclass(hint, StrictConfig):
                yield from _types_of(hint, f"{prefix}{name}.")


def field_types(kind: str) -> dict[str, Any]:
    """Return the type of each field of a kind of model, by its dotted path, as its default has it."""
    from transformers import AutoConfig

    return {f"model.overrides.{name}": type(value) for name, value in AutoConfig.for_model(kind).to_dict().items()}


def nasty(hint: Any) -> tuple[Any, ...]:
    """Return values for a setting of a type."""
    kinds = {hint, *typing.get_args(hint)}
    words = tuple(member.value for kind in kinds if isinstance(kind, type) and issubclass(kind, enum.Enum) for member in kind)
    words += tuple(word for kind in kinds for word in typing.get_args(kind) if isinstance(word, str))
    words += tuple(word for word in kinds if isinstance(word, str))
    numbers = NUMBERS if kinds & {int, float} else ()
    flags = (True, False, True, False) if bool in kinds else ()
    texts = TEXTS if str in kinds else ()
    others = OTHERS if kinds & {dict, list, tuple} or any(typing.get_origin(kind) for kind in kinds) else ()
    return (*words, *words, *numbers, *flags, *texts, *others) or NASTY


def write_models(folder: Path) -> None:
    for kind, sizes in KINDS.items():
        (folder / kind).mkdir(parents=True)
        settings = {"model_type": kind, "vocab_size": 257, **sizes}
        (folder / kind / "config.json").write_text(json.dumps(settings))


class Fuzzer:
    """Draw cases and run them in `folder`."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.seed = seed
        self.corpus = make_corpus(folder / "corpus", documents=20)
        self.cache = folder / "cache"
        write_models(folder / "models")
        self.models = folder / "models"
        self.types = setting_types()
        self.fields = {kind: field_types(kind) for kind in ("llama", *KINDS)}
        self.names = [name for name in shipped.names() if "/" not in name]

    def case(self, number: int) -> Case:
        draw = random.Random(f"{self.seed}/{number}")
        tiny = draw.random() < 0.7
        data = self._tiny(draw) if tiny else yaml.load_mapping(shipped.path_of(draw.choice(self.names)))
        overrides = []
        for _ in range(draw.choice((1, 1, 1, 1, 1, 1, 2, 3))):
            if draw.random() < 0.1:
                overrides.append(self._override(draw, data))
            else:
                self._mutate(draw, data)
        text = self._dump(data)
        if draw.random() < 0.06:
            text = _mutate_text(draw, text)
        return Case(text=text, overrides=tuple(overrides), tiny=tiny)

    def _tiny(self, draw: random.Random) -> dict[str, Any]:
        data = json.loads(json.dumps(TINY).replace("CORPUS", str(self.corpus)).replace("CACHE", str(self.cache)))
        if draw.random() < 0.35:
            kind = draw.choice(list(KINDS))
            data["model"] = {"path": str(self.models / kind), "overrides": {}}
        return data

    def _place(self, draw: random.Random, data: dict[str, Any]) -> tuple[str, Any]:
        """Return the path of a setting and its type."""
        kind = draw.random()
        if kind < 0.3:
            return draw.choice(list(self.types.items()))
        if kind < 0.6:
            return draw.choice([item for item in self.types.items() if item[0].startswith("trainer.")])
        if kind < 0.95:
            model = data.get("model")
            path = model.get("path") if isinstance(model, dict) else None
            return draw.choice(list(self.fields.get(Path(str(path)).name, self.fields["llama"]).items()))
        return draw.choice((("trainer.x", str), ("x", int), ("precision.rules", list), ("precision.schedule", list)))

    def _value(self, draw: random.Random, hint: Any) -> Any:
        return draw.choice(nasty(hint) if draw.random() < 0.85 else NASTY)

    def _mutate(self, draw: random.Random, data: dict[str, Any]) -> None:
        what = draw.random()
        places = list(_places(data))
        if what < 0.75 or not places:
            path, hint = self._place(draw, data)
            _put(data, path.split("."), self._value(draw, hint))
            return
        section, key = draw.choice(places)
        if what < 0.82:
            del section[key]
        elif what < 0.87:
            name = str(key)
            at = draw.randrange(len(name) + 1)
            section[name[:at] + draw.choice("xé_. ") + name[at + 1 :]] = section.pop(key)
        elif what < 0.92:
            section[key] = {draw.choice((key, "a", 1)): section[key]}
        elif what < 0.95:
            section[key] = [section[key]]
        else:
            section[key] = self._value(draw, type(section[key]))

    def _override(self, draw: random.Random, data: dict[str, Any]) -> str:
        path, hint = self._place(draw, data)
        value = self._value(draw, hint)
        text = value if isinstance(value, str) else _yaml_text(value)[:2000]
        forms = (f"{path}={text}",) * 14 + (path, f"{path}.={text}", f"={text}", f".{path}={text}", f"{path}.a.b={text}", f"{path}==")
        # A program's arguments hold no NUL character.
        return draw.choice(forms).replace("\0", "\x01")

    def _dump(self, data: dict[str, Any]) -> bytes:
        return _yaml_text(data).encode("utf-8", "surrogatepass")


def _yaml_text(data: Any) -> str:
    """Return `data` as flow-style YAML; unlike `yaml.dump`, of any value."""
    if isinstance(data, dict):
        return "{" + ", ".join(f"{_yaml_text(key)}: {_yaml_text(value)}" for key, value in data.items()) + "}"
    if isinstance(data, list | tuple):
        return "[" + ", ".join(map(_yaml_text, data)) + "]"
    if isinstance(data, float):
        return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(str(data), repr(data))
    return json.dumps(data)


def _places(data: Any) -> Iterator[tuple[dict, Any]]:
    """Yield each key of nested mappings with its section."""
    for key, value in data.items():
        yield data, key
        if isinstance(value, dict):
            yield from _places(value)


def _put(data: dict[str, Any], path: list[str], value: Any) -> None:
    *sections, last = path
    for section in sections:
        if not isinstance(data.get(section), dict):
            data[section] = {}
        data = data[section]
    data[last] = value


def _mutate_text(draw: random.Random, text: bytes) -> bytes:
    lines = text.replace(b", ", b",\n ").split(b"\n")
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(lines))
        what = draw.random()
        if what < 0.15:
            del lines[at]
            lines = lines or [b""]
        elif what < 0.3:
            lines.insert(at, lines[draw.randrange(len(lines))])
        elif what < 0.4:
            lines[at] = lines[at][: draw.randrange(len(lines[at]) + 1)]
        elif what < 0.5:
            lines[at] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9)))
        else:
            cut = draw.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:cut] + draw.choice(TEXT_PIECES).encode() + lines[at][cut:]
    return b"\n".join(lines)


class Slow(BaseException):
    """A case took longer than `LIMIT_S`. No handler of exceptions catches it."""


def _too_slow(*_: Any) -> None:
    raise Slow(f"longer than {LIMIT_S} s")


@dataclass(frozen=True)
class Outcome:
    code: int
    """The exit code; -1 for an exception that reached the outside."""
    out: str
    err: str


def run(*arguments: str) -> Outcome:
    """Run the command in this process."""
    out, err = io.StringIO(), io.StringIO()
    signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(LIMIT_S)
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(list(arguments))
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    except BaseException:
        signal.alarm(0)
        err.write(traceback.format_exc())
        code = -1
    finally:
        signal.alarm(0)
    return Outcome(code, out.getvalue(), err.getvalue())


def fault(outcome: Outcome, written: list[str], stopping: bool = False) -> str | None:
    """Return what is wrong with the end of a command; None for a success and a proper refusal."""
    if outcome.code == 0:
        return None
    lines = [line for line in outcome.err.splitlines() if line.startswith("lowprec: ")]
    if stopping and outcome.code == 1 and lines and lines[-1].startswith("lowprec: stopped: ") and "Traceback" not in outcome.err:
        return None
    if outcome.code != 2:
        return f"exit code {outcome.code}"
    if len(lines) != 1 or not outcome.err.rstrip().endswith(lines[0]) or "Traceback" in outcome.err:
        return "not one line"
    if len(lines[0]) > LONGEST_LINE:
        return f"a line of {len(lines[0])} characters"
    if outcome.out:
        return "output beside the error"
    return f"written: {written}" if written else None


def trains_quickly(data: Any) -> bool:
    """Return True if a run of two steps is short: nothing is compiled, no process is started, the model is small."""
    from lowprec.training.run.arguments import make_arguments
    from lowprec.training.run.plan import skeleton_of
    from lowprec.training.run.setup import RunSetup

    config = data[0]
    setup = RunSetup.of(config)
    try:
        args, _ = make_arguments(setup)
    except UserError:  # A plan does not look at sharding. The run must refuse it by one line.
        return True
    size = sum(parameter.numel() for parameter in skeleton_of(config).parameters())
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    quiet = not (args.torch_compile or args.full_determinism or args.push_to_hub or args.report_to or args.auto_find_batch_size)
    return (
        quiet
        and setup.max_steps == 2
        and config.compile == "off"
        and size < 4e5
        and config.data.seq_len <= 256
        and rows <= 16
        and args.per_device_eval_batch_size >= 4
        and args.dataloader_num_workers <= 1
        and config.data.tokenizer != "bpe"
        and str(config.data.source) not in ("python-stdlib", "site-packages")
    )


def try_case(fuzzer: Fuzzer, number: int, folder: Path, *, train: bool) -> str | None:
    """Run a case in the empty `folder`. Return the fault with the case; None if there is none."""
    from lowprec.training.run.config import load_run

    case = fuzzer.case(number)
    folder.mkdir()
    os.chdir(folder)
    Path("case.yaml").write_bytes(case.text)
    outcome = run("plan", "case.yaml", *case.overrides)
    written = sorted(path.name for path in folder.iterdir() if path.name != "case.yaml")
    wrong = fault(outcome, written)
    if outcome.code == 0 and written:
        wrong = f"a plan has written {written}"
    command = "plan"
    if train and outcome.code == 0 and case.tiny and trains_quickly(load_run("case.yaml", case.overrides)):
        command = "train"
        outcome = run("train", "case.yaml", *case.overrides)
        written = sorted(path.name for path in folder.iterdir() if path.name != "case.yaml")
        wrong = fault(outcome, written, stopping=True)
    if wrong is None:
        return None
    shown = [f"seed {fuzzer.seed}, case {number}: {command}: {wrong}", repr(case.text[:1500]), *case.overrides, outcome.err[-3000:]]
    return "\n".join(shown)


def hunt(folder: Path, seed: int, numbers: range, *, train_every: int) -> list[str]:
    """Return the faults of many cases."""
    fuzzer = Fuzzer(folder, seed)
    faults = []
    for number in numbers:
        wrong = try_case(fuzzer, number, folder / f"case-{number}", train=number % train_every == 0)
        if wrong is not None:
            faults.append(wrong)
    return faults


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, to which the test returns from those of its cases."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_some_mutated_configurations(here: Path):
    faults = hunt(here, SEED, range(60), train_every=8)
    assert not faults, "\n\n".join(faults)


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [1])
def test_many_mutated_configurations(here: Path, seed: int):
    faults = hunt(here, seed, range(1500), train_every=2)
    assert not faults, "\n\n".join(faults)


if __name__ == "__main__":
    import tempfile

    start = time.time()
    seed, numbers = int(sys.argv[1]), range(int(sys.argv[2]), int(sys.argv[-1]) + 1)
    with tempfile.TemporaryDirectory() as name:
        found = hunt(Path(name), seed, numbers, train_every=1)
        os.chdir("/")
    print("\n\n".join(found), f"\n{len(found)} faults of {len(numbers)} cases, {time.time() - start:.0f} s")
