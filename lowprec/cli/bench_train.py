"""The measuring of `lowprec bench train`: training steps of a preset on random tokens, with tokens
per second and memory of recipes, of bf16 and of other libraries in one run.

A step is forward, loss, backward and AdamW, with weights and optimizer state in bf16. Compiled
blocks and Liger's kernels are those of a training run, the same for every row. The floor is the
time of the linear layers' products alone, at the best rates measured for their shapes: attention,
norms, the loss's softmax and the optimizer take further time.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from lowprec.bench import rivals
from lowprec.bench.ceilings import Ceilings, Floor
from lowprec.bench.inputs import describe, open_device, resolve_recipe
from lowprec.bench.timing import Timing, measure_steps
from lowprec.conversion.convert import convert, make_plan
from lowprec.conversion.plan import Plan
from lowprec.errors import UserError, nearest
from lowprec.integrations import apply_liger, compile_blocks, plan_liger
from lowprec.recipe import Recipe, library
from lowprec.training.run.models import PRESETS, ModelConfig, build_config, build_model

RIVALS = ("bf16", "torchao")

_TORCHAO = ("tensorwise", "rowwise", "blockwise")
_WARMUP = 4
"""Steps before the first timed one. The first compiles, the second may compile again, and the
allocator settles."""


def run(
    device: str = "cpu",
    model: str = "llama-tiny",
    recipes: Sequence[str] = ("fp8_blockwise",),
    against: Sequence[str] = (),
    batch: int = 1,
    seq: int = 128,
    vocab: int = 32000,
    compiled: bool = False,
    liger: bool = False,
    steps: int = 10,
) -> dict[str, Any]:
    """Measure training steps of `batch` sequences of `seq` tokens.

    Args:
        model: name of a preset.
        recipes: names of recipes; bf16 always runs, as the first row.
        against: names from `RIVALS` to run as well.
        vocab: size of the vocabulary.
        compiled: torch.compile each decoder block.
        liger: use the kernels of Liger that apply; UserError if none does.
        steps: number of timed steps, at least 2.
    Returns:
        {"device", "threads", "torch", "model", "batch", "seq", "vocab", "compiled", "liger": names
        of its kernels, "parameters", "rows": [{"name", "tokens_per_second", "step": timing,
        "peak_memory_gib", "speedup": over bf16, "floor", "of_floor", "loss", "precision",
        "weights": the share of the linear weights that runs in each recipe, None for bf16 and
        rivals, "failure"}], "ceilings"}; "failure" is None, or the reason for missing figures.
        Memory is None on a CPU.
    Raises:
        UserError: a preset, recipe, rival or device is unknown, a rival is not installed, or the
            kernels or the compiler can't be used.
    """
    place = open_device(device)
    rivals.check(against, RIVALS)
    case = _Case(model, place, batch, seq, vocab, compiled=compiled, liger=liger)
    contenders = _contenders(place, recipes, against, {"tokens": batch * seq, "compiled": compiled})
    kernels = case.check()
    rows = []
    for name, convert_model, _ in contenders:
        rows.append({"name": name} | case.measure(convert_model, steps))
        rivals.release_memory()
    # After the steps, so that the memory of the ceilings' matrices does not count as theirs.
    ceilings = Ceilings(place, seconds=0.2)
    baseline = rows[0]["step"]
    for row, (_, _, recipe) in zip(rows, contenders, strict=True):
        time = row["step"]
        ours = recipe is not None and row["name"] == recipe.name
        row["weights"] = case.plan(recipe).totals()["weights"] if ours else None
        row |= case.floor(recipe, ceilings).beside(None if time is None else Timing(**time))
        row["speedup"] = baseline["median"] / time["median"] if baseline and time else None
    settings = {
        "model": model,
        "batch": batch,
        "seq": seq,
        "vocab": vocab,
        "compiled": compiled,
        "liger": list(kernels),
    }
    return {
        **describe(place),
        **settings,
        "parameters": case.parameters,
        "rows": rows,
        "ceilings": ceilings.to_list(),
    }


Contender = tuple[str, Callable[[nn.Module], str], Recipe | None]
"""A row's name; a function that converts the model and returns a summary; the recipe whose products
are the floor, None for bf16."""


def _contenders(
    device: torch.device, recipes: Sequence[str], against: Sequence[str], known: dict[str, Any]
) -> list[Contender]:
    found: list[Contender] = [("bf16", lambda model: "nn.Linear in bf16", None)]
    for name in dict.fromkeys(recipes):
        if name != "bf16":
            recipe = resolve_recipe(name)

            def convert_model(model: nn.Module, recipe: Recipe = recipe) -> str:
                plan = convert(model, recipe, device=device, quiet=True, **known)
                return "; ".join((plan.summary(), *plan.warnings))

            found.append((name, convert_model, recipe))
    for kind in _TORCHAO if "torchao" in against else ():
        by_torchao = functools.partial(_convert_by_torchao, kind=kind)
        found.append((f"torchao {kind}", by_torchao, library.get("fp8_rowwise")))
    return found


def _convert_by_torchao(model: nn.Module, kind: str) -> str:
    rivals.convert_by_torchao(
        model, kind, lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name
    )
    count = sum(type(module).__name__.startswith("Float8") for module in model.modules())
    return f"{count} linear layers converted by torchao"


class _Case:
    """A model and its batch, which each row runs anew."""

    def __init__(
        self,
        preset: str,
        device: torch.device,
        batch: int,
        seq: int,
        vocab: int,
        *,
        compiled: bool,
        liger: bool,
    ) -> None:
        if preset not in PRESETS:
            raise UserError(f"--model: unknown preset '{preset}'{nearest(preset, PRESETS)}")
        self.config = build_config(ModelConfig(preset=preset), vocab)
        self.config.use_cache = False
        if seq > self.config.max_position_embeddings:
            raise UserError(
                f"--seq: {seq} is longer than {preset}'s {self.config.max_position_embeddings} "
                "positions"
            )
        self.preset = preset
        self.device = device
        self.batch = batch
        self.seq = seq
        self.compiled = compiled
        self.liger = liger
        self.parameters = 0

    def check(self) -> tuple[str, ...]:
        """Return the names of Liger's kernels in use; raise UserError if this machine can't do what
        the options ask for. Builds no weights."""
        skeleton = self._skeleton()
        self.parameters = sum(parameter.numel() for parameter in skeleton.parameters())
        try:
            return plan_liger(skeleton, **self._liger_options()).applied
        except UserError as error:
            raise UserError(str(error).replace("kernels.liger: on, but", "--liger:")) from None

    def measure(self, convert_model: Callable[[nn.Module], str], steps: int) -> dict[str, Any]:
        """Return the figures of one row, or why it failed."""

        def figures() -> dict[str, Any]:
            step, precision = self._prepare(convert_model)
            time = measure_steps(step, self.device, steps=steps, warmup=_WARMUP)
            memory = None
            if self.device.type == "cuda":
                memory = torch.cuda.max_memory_allocated(self.device) / 2**30
            return {
                "tokens_per_second": 1e3 * self.batch * self.seq / time.median,
                "step": asdict(time),
                "peak_memory_gib": memory,
                "loss": float(step()),
                "precision": precision,
                "failure": None,
            }

        result, failure = rivals.attempt(figures)
        if result is not None:
            return result
        return dict.fromkeys(
            ("tokens_per_second", "step", "peak_memory_gib", "loss", "precision")
        ) | {"failure": failure}

    def plan(self, recipe: Recipe | None) -> Plan:
        """Return the plan of the model in `recipe`, or in bf16."""
        return make_plan(
            self._skeleton(),
            recipe or library.get("bf16"),
            device=self.device,
            tokens=self.batch * self.seq,
            compiled=self.compiled,
        )

    def floor(self, recipe: Recipe | None, ceilings: Ceilings) -> Floor:
        """Return the floor of all linear layers' products: in bf16 for the layers that `recipe`
        keeps in high precision."""
        tokens = self.batch * self.seq
        floors = [
            ceilings.layer_floor((tokens, *layer.shape), recipe if layer.converted else None, ())
            for layer in self.plan(recipe).layers
        ]
        kinds = dict.fromkeys(kind for floor in floors for kind in floor.ceilings)
        return Floor(products=sum(floor.products for floor in floors), ceilings=tuple(kinds))

    def _prepare(
        self, convert_model: Callable[[nn.Module], str]
    ) -> tuple[Callable[[], torch.Tensor], str]:
        """Return a function that runs one step and returns its loss, and a summary of the model's
        precision."""
        torch._dynamo.reset()  # Compiled code may keep the last row's model in memory.
        rivals.release_memory()
        torch.manual_seed(0)
        with self.device:
            model = build_model(
                ModelConfig(preset=self.preset), self.config, attn_implementation="sdpa"
            ).train()
        # Buffers keep their dtype: a rotary embedding's frequencies stay in fp32.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        apply_liger(model, **self._liger_options())
        precision = convert_model(model)
        compile_blocks(model, "blocks" if self.compiled else "off", self.device.type)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-4, fused=True if self.device.type == "cuda" else None
        )
        tokens = torch.randint(self.config.vocab_size, (self.batch, self.seq), device=self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

        def step() -> torch.Tensor:
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step, precision

    def _liger_options(self) -> dict[str, Any]:
        # The output head stays in high precision, in our recipes and in the rivals here.
        mode = "on" if self.liger else "off"
        return {
            "mode": mode,
            "device_type": self.device.type,
            "compiled_blocks": self.compiled,
            "head_is_low_precision": False,
        }

    def _skeleton(self) -> Any:
        """Return the model without weights."""
        with torch.device("meta"):
            return build_model(
                ModelConfig(preset=self.preset), self.config, attn_implementation="sdpa"
            )
