"""The mask algebra inside Hugging Face models: one attention implementation for each mask
expression.

The method. transformers builds the mask once for each forward pass, outside the decoder blocks. It
calls a mask function that is registered next to the attention function of the same name, and passes
its own predicate m(b, h, q, kv) to it. This predicate is causal, and it includes the documents of a
packed batch and the sliding window of the model's configuration, if there are any. `register` puts
two functions under a name such as `lowprec_causal_document`:

    the mask function   combines transformers' predicate by AND with the terms that our expression
                        adds. It returns None where SDPA's is_causal is enough, a BlockMask on CUDA,
                        or a boolean matrix [B, 1, Q, K] elsewhere and while decoding with a cache.
    the forward         runs SDPA or FlexAttention, depending on the type of the mask.

Documents. transformers finds the documents of a packed batch in `position_ids` that restart at 0,
and only if the model gets neither `attention_mask` nor a cache. (A model in training makes a cache
for itself unless use_cache=False!) Training with `document` needs such position_ids. The
consequences:

    - `attach` also adds a forward hook that rules out silent mistakes. In training mode it refuses
      a batch without position_ids, with an attention_mask or with a cache, and it turns use_cache
      off. Prefer `attach` to `register`.
    - With `register` alone, a batch with an attention_mask is refused while gradients are enabled.
      A batch without position_ids looks the same as one whose rows are single documents, and is
      treated as such.
    - Without gradients (generation, scoring), a row with an attention_mask or a cache is one
      document.
    - transformers' predicate always applies. position_ids that restart make documents under every
      mask, `causal` included, exactly as with attn_implementation="sdpa". Pass them only if the
      mask has `document`.

Causality. transformers' decoders combine their predicate with causal by AND, so an expression must
not show the future. The exception is a prefix language model, `causal | prefix(n)`. The tokens of
the prefix see each other, so the labels of the prefix must be masked out. On packed documents,
`(causal | prefix(n)) & document` gives each document a prefix of its own; documents are then read
off transformers' predicate.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from lowprec.attention.dispatch import choose, run_flex
from lowprec.attention.expression import parse
from lowprec.attention.mask import Mask, build_block_mask, causal, document
from lowprec.attention.terms import Terms, implementation_name, split_terms
from lowprec.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def describe(mask: Mask | str, device_type: str) -> tuple[str, str]:
    """Return (kernel, reason) of a mask in training on this type of device, for a plan.

    Raises UserError as `register` does.
    """
    choice = choose(split_terms(mask).mask, device_type)
    return choice.kernel, choice.reason


def register(mask: Mask | str) -> str:
    """Make `mask` an attention implementation of transformers and return its name.

    Pass the name (e.g. "lowprec_causal_sliding_window_1024_document") to `from_pretrained(...,
    attn_implementation=name)` or to `model.set_attn_implementation(name)`. The same expression
    always gives the same name. Raises UserError for a mask that shows the future, that already has
    document ids, or whose `document` is not joined to the rest by &.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    terms = split_terms(mask)

    def mask_function(**kwargs: Any) -> Tensor | BlockMask | None:
        return _make_mask(terms, **kwargs)

    def forward(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return _forward(terms, module, *args, **kwargs)

    name = implementation_name(terms.mask)
    AttentionMaskInterface.register(name, mask_function)
    AttentionInterface.register(name, forward)
    return name


def attach(model: "PreTrainedModel", mask: Mask | str) -> str:
    """Register the mask (see `register`), set it on `model` and return its name.

    If the mask has `document`, a forward hook refuses training batches without documents. Raises
    UserError as `register` does, and for a model that does not support custom attention
    implementations.
    """
    mask = parse(mask)
    name = register(mask)
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise UserError(
            f"attention: {type(model).__name__} does not support a custom attention implementation "
            "in transformers"
        )
    _remove_document_hooks(model)
    if mask.needs_documents:
        requires = partial(_require_documents, str(mask))
        model.register_forward_pre_hook(requires, with_kwargs=True)
    return name


def _remove_document_hooks(model: torch.nn.Module) -> None:
    """Remove the hook of an earlier mask, if there is one; it is known by its function."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, partial) and hook.func is _require_documents:
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)


def _require_documents(
    mask: str, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    has = {name for name, value in given.items() if value is not None and value is not False}
    if module.training:
        if "position_ids" not in has:
            raise UserError(
                f"mask '{mask}': a training batch needs position_ids that restart at 0 at each "
                "document"
            )
        for name in ("attention_mask", "past_key_values", "use_cache"):
            if name in has:
                raise UserError(
                    f"mask '{mask}': transformers ignores document boundaries in a batch with "
                    f"{name}; leave it out"
                )
    if "position_ids" in has and not has & {"attention_mask", "past_key_values", "use_cache"}:
        # The default, config.use_cache, makes a cache even in training, and with a cache
        # transformers does not look for documents.
        kwargs = {**kwargs, "use_cache": False}
    return args, kwargs


def _make_mask(
    terms: Terms,
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    config: "PreTrainedConfig",
    **kwargs: Any,
) -> Tensor | BlockMask | None:
    """Return the mask of one forward pass. transformers.masking_utils calls this with these names.

    Args:
        attention_mask: bool [B, K], False where a token is padding.
        local_size: the sliding window of the model's own configuration.
    """
    from transformers.masking_utils import sdpa_mask

    if "allow_is_bidirectional_skip" in kwargs:
        raise UserError(
            f"mask '{terms.mask}' is for causal language models, and this model asks for a "
            "bidirectional mask"
        )
    if attention_mask is not None and q_length == kv_length:
        _refuse_padded_documents(terms)
    if terms.added is not None and terms.added.needs_documents:
        _refuse_chunks(terms, config)
        ids = _documents(mask_function, batch_size, kv_length + kv_offset, device)
        terms = replace(terms, added=terms.added.bind(ids))
    visible = _combine(mask_function, terms)
    may_skip = allow_is_causal_skip and terms.added is None
    device = torch.device(device)
    # The mask may include more than its expression (padding, documents, the model's window), so it
    # is never plain causal here.
    kernel = choose(
        terms.mask if terms.added is not None else causal() & document(),
        device.type,
        head_dim=_head_dim(config),
    ).kernel
    # While decoding with a cache the lengths change at each step, and FlexAttention would be
    # recompiled each time.
    if kernel == "flex" and q_length == kv_length:
        padding = None if attention_mask is None or bool(attention_mask.all()) else attention_mask
        if may_skip and padding is None and (local_size is None or kv_length < local_size):
            return None
        if padding is not None:
            visible = _and_padding(visible, padding)
        return build_block_mask(
            _shift(visible, q_offset, kv_offset), batch_size, q_length, kv_length, device
        )
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        # With a static cache this is a tensor, as in transformers itself.
        q_offset=q_offset,  # pyright: ignore[reportArgumentType]
        kv_offset=kv_offset,
        # transformers annotates the arguments as int but passes tensors.
        mask_function=visible,  # pyright: ignore[reportArgumentType]
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=may_skip,
        device=device,
        **kwargs,
    )


def _refuse_padded_documents(terms: Terms) -> None:
    """Raise UserError if the mask has `document` and the model trains on a padded batch."""
    if terms.mask.needs_documents and torch.is_grad_enabled():
        raise UserError(
            f"mask '{terms.mask}': transformers ignores document boundaries in a batch with an "
            "attention_mask; train on position_ids that restart at 0 at each document (under "
            "torch.no_grad() each row counts as one document)"
        )


def _forward(
    terms: Terms,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of one layer.

    query [B, H, Q, D], key and value [B, G, K, D] -> ([B, Q, H, D], None).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise UserError(
                f"mask '{terms.mask}': {type(module).__name__} uses {name}, which these kernels do "
                "not compute"
            )
    if isinstance(attention_mask, BlockMask):
        if dropout > 0 or kwargs.get("position_bias") is not None:
            raise UserError(
                f"mask '{terms.mask}': FlexAttention has neither dropout nor a position bias; set "
                "attention_dropout: 0"
            )
        out = run_flex(query, key, value, attention_mask, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    if attention_mask is None and terms.added is not None:
        raise UserError(
            f"mask '{terms.mask}': {type(module).__name__} does not build its mask through "
            "transformers.masking_utils"
        )
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


def _combine(theirs: MaskFunction, terms: Terms) -> MaskFunction:
    """Return transformers' predicate AND the terms that our expression adds."""
    if terms.added is None:
        return theirs
    ours = terms.added.function()
    if not terms.shows_prefix:
        return lambda b, h, q, kv: theirs(b, h, q, kv) & ours(b, h, q, kv)
    # A prefix looks ahead, and transformers' predicate includes `causal`. Its other terms
    # (documents, windows, chunks) are symmetric in the two positions. Passing the two positions in
    # causal order therefore removes the causal term only.
    return lambda b, h, q, kv: (
        theirs(b, h, torch.maximum(q, kv), torch.minimum(q, kv)) & ours(b, h, q, kv)
    )


def _documents(theirs: MaskFunction, batch: int, length: int, device: torch.device | str) -> Tensor:
    """Return the document ids [B, S] of transformers' predicate: a token belongs to the document of
    the token before it if it sees that."""
    b = torch.arange(batch, device=device)[:, None]
    token = torch.arange(1, length, device=device)[None, :]
    joined = theirs(b, torch.zeros_like(b), token, token - 1).expand(batch, length - 1)
    return torch.nn.functional.pad((~joined).cumsum(1), (1, 0))


def _refuse_chunks(terms: Terms, config: "PreTrainedConfig") -> None:
    """Raise UserError if the model attends in chunks: their borders look like documents."""
    if getattr(config, "attention_chunk_size", None):
        raise UserError(
            f"mask '{terms.mask}': a prefix of each document can't be told from the chunks of a "
            f"model with attention_chunk_size {getattr(config, 'attention_chunk_size', None)}"
        )


def _and_padding(visible: MaskFunction, not_padding: Tensor) -> MaskFunction:
    return lambda b, h, q, kv: visible(b, h, q, kv) & not_padding[b, kv]


def _shift(visible: MaskFunction, q_offset: int | Tensor, kv_offset: int) -> MaskFunction:
    """Return `visible` at absolute positions. Offsets of 0, as in training, add nothing to the
    kernel."""
    if isinstance(q_offset, int) and q_offset == 0 and kv_offset == 0:
        return visible
    return lambda b, h, q, kv: visible(b, h, q + q_offset, kv + kv_offset)


def _head_dim(config: "PreTrainedConfig") -> int:
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
