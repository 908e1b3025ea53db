"""Checks of a model's configuration by what it makes: sizes first, then the model without weights,
then a forward pass of a few tokens without values.

transformers checks few fields of a configuration. A wrong one shows when a layer is made, or when
shapes meet in the forward pass.
"""

import math
import re
import tempfile
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call

from lowprec.attention import parse
from lowprec.attention.hf import attach
from lowprec.errors import UserError
from lowprec.training.run.machine import memory_bytes
from lowprec.training.run.models import ModelConfig, build_model, check_length

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_MOST_LAYERS = 4096
_MOST_MODULES = 2**17
"""Limits on layers, and on layers times experts: each is made one by one, also without weights."""

_TOKENS = 8
"""Number of tokens of the forward pass."""

_SMALL = 3 * 10**7
"""Number of parameters up to which a model is made with weights for its forward pass."""

_OF_SHAPES = re.compile(r"shape|size|dim|broadcast|multiplied|must match", re.IGNORECASE)
"""Words of an error of the meta device that is an error of the model, too."""


def build_skeleton(
    model: ModelConfig, config: "PretrainedConfig", seq_len: int, mask: str = "causal"
) -> "PreTrainedModel":
    """Return the model of `config` on the meta device.

    Args:
        mask: Mask of the attention, in the forward pass that is tried.
    Raises:
        UserError: the configuration makes no model, or one whose forward pass fails.
    """
    check_length(config, seq_len)
    _check_counts(config)
    with torch.device("meta"):
        skeleton = _build(model, config)
    tried = skeleton
    with torch.random.fork_rng(devices=[]):
        if _parameters(skeleton) <= _SMALL:
            tried = _build(model, config)
        attach(tried, mask)
        check_forward(tried, seq_len, mask)
    _check_saving(tried)
    return skeleton


def _check_saving(model: "PreTrainedModel") -> None:
    """Raise UserError if the configurations of a model can't be saved with a checkpoint.

    transformers checks them once more before it writes them.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.config.save_pretrained(folder)
            if model.can_generate() and model.generation_config is not None:
                model.generation_config.save_pretrained(folder)
        except OSError:
            raise
        except Exception as error:
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            raise _wrong_model(model.config, "its configuration can't be saved", cause) from error


def _build(model: ModelConfig, config: "PretrainedConfig") -> "PreTrainedModel":
    """Return the model of `config` with random weights, on the device of the context."""
    # Without its path, so that no weights are loaded.
    model = model.model_copy(update={"path": None})
    try:
        return build_model(model, config, attn_implementation="sdpa")
    except UserError:
        raise
    except Exception as error:
        # The code of any kind of model runs here, and each fails in its own way.
        raise _wrong_model(config, "the model can't be built", error) from error


def check_forward(model: "PreTrainedModel", seq_len: int, mask: str) -> None:
    """Raise UserError if a forward pass of the model in training fails, or its loss is not finite.

    A large model takes the pass on the meta device, which computes shapes alone. If that fails, it
    takes the pass with its weights: some layers ask for values. A large model without weights
    can't, and only an error about shapes counts for it.

    Args:
        mask: Mask of the attention, which is attached to the model.
    """
    tokens = min(seq_len, _TOKENS)
    was_training = model.training
    without_weights = next(model.parameters()).is_meta
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            if not without_weights and _parameters(model) <= _SMALL:
                _run(model, tokens, mask)
                return
            try:
                _run_on_meta(model, tokens, mask)
            except UserError:
                raise
            except Exception as error:
                if not without_weights:
                    _run(model, tokens, mask)
                elif _OF_SHAPES.search(str(error)) and "meta" not in str(error):
                    raise
    except UserError:
        raise
    except Exception as error:
        raise _wrong_model(model.config, "its forward pass fails", error) from error
    finally:
        model.train(was_training)


def _run(model: "PreTrainedModel", tokens: int, mask: str) -> None:
    model.train()
    loss = float(model(**_batch(tokens, mask, model.device)).loss)
    if not math.isfinite(loss):
        raise UserError(
            f"model: the loss of a first forward pass is {loss} ({type(model.config).__name__}): "
            "look at its scales, epsilons and rope_parameters"
        )


def _run_on_meta(model: "PreTrainedModel", tokens: int, mask: str) -> None:
    # The mask takes the kernel of a GPU here, which has no dropout. A CPU's has.
    model.eval()
    values = {
        name: value.to("meta")
        for name, value in (*model.named_parameters(), *model.named_buffers())
    }
    functional_call(model, values, (), _batch(tokens, mask, torch.device("meta")))


def _batch(tokens: int, mask: str, device: torch.device) -> dict[str, torch.Tensor]:
    ids = torch.arange(tokens, device=device).unsqueeze(0)
    batch = {"input_ids": ids, "labels": ids}
    if parse(mask).needs_documents:
        batch["position_ids"] = ids
    return batch


def _parameters(model: "PreTrainedModel") -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def check_memory(skeleton: "PreTrainedModel") -> None:
    """Raise UserError if the weights of a model are larger than the memory of this machine."""
    count = _parameters(skeleton)
    needed = 4 * count
    limit = memory_bytes()
    if needed > limit:
        raise UserError(
            f"model: {count:.3g} parameters are {needed / 2**30:,.1f} GiB in fp32, and this "
            f"machine has {limit / 2**30:,.1f} GiB of memory"
        )


def _check_counts(config: "PretrainedConfig") -> None:
    """Raise UserError if a model has more layers or experts than can be made one by one."""
    text = config.get_text_config()
    layers = _number(text, "num_hidden_layers")
    experts = max(
        _number(text, name)
        for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    )
    if layers > _MOST_LAYERS:
        raise UserError(
            f"model: num_hidden_layers is {layers}; at most {_MOST_LAYERS} layers can be built"
        )
    if layers * experts > _MOST_MODULES:
        raise UserError(
            f"model: {layers} layers of {experts} experts; at most {_MOST_MODULES} experts can be "
            "built"
        )


def _number(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0


def _wrong_model(config: "PretrainedConfig", problem: str, error: Exception) -> UserError:
    reason = str(error).strip() or type(error).__name__
    if isinstance(error, KeyError | AttributeError):
        reason = f"{type(error).__name__}: {reason}"
    return UserError(f"model: {problem} ({type(config).__name__}): {reason[:600]}")
