"""The mask algebra inside Hugging Face models: one attention implementation for each mask
expression.

The method. transformers builds the mask once for each forward pass, outside of the decoder blocks,
by calling a mask function that is registered next to the attention function of the same name. It
hands over its own predicate m(b, h, q, kv) (causal, and whatever it found out: the documents of a
packed batch, a sliding window of the model's own configuration). `register` puts two functions
under a name such as `lowprec_causal_document`:

    the mask function   ANDs transformers' predicate with what our expression adds, and returns None where SDPA's is_causal is
                        enough, a BlockMask on CUDA, or a boolean matrix [B, 1, Q, K] elsewhere and
                        while decoding with a cache
    the forward         runs SDPA or FlexAttention by the type of mask that it gets

Documents. transformers finds the documents of a packed batch in `position_ids` that restart at 0,
and only if the model gets neither `attention_mask` nor a cache (a model in training makes a cache
for itself unless use_cache=False!). Whoever trains with `document` passes such position_ids. What
follows:

    - `attach` also adds a forward hook that makes the silent mistakes impossible: in training mode
      it refuses a batch without position_ids, with an attention_mask or with a cache, and it turns
      use_cache off. Prefer it to `register`.
    - With `register` alone, a batch with an attention_mask is refused while gradients are enabled.
      A batch without position_ids cannot be told from one whose rows are single documents, and is
      treated as such.
    - Without gradients (generation, scoring) a row that comes with an attention_mask or a cache is
      one document.
    - transformers' predicate is always honoured: position_ids that restart make documents under
      every mask, `causal` included, exactly as with attn_implementation="sdpa". Pass them only if
      the mask has `document`.

Causality. transformers' decoders AND their predicate with causal, so an expression must not show
the future; the exception is a prefix language model, `causal | prefix(n)` (the labels of the prefix
must then be masked out: its tokens see each other).
"""

import hashlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from operator import and_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from lowprec.attention.dispatch import choose, run_flex
from lowprec.attention.mask import (
    And,
    Causal,
    Document,
    Mask,
    Not,
    Or,
    Prefix,
    build_block_mask,
    causal,
    document,
    parse,
)
from lowprec.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_HOOK = "_lowprec_document_hook"


@dataclass(frozen=True, kw_only=True)
class _Spec:
    """A mask and what is left of it to add to transformers' causal (and document) predicate."""

    mask: Mask
    added: Mask | None
    shows_prefix: bool


def describe(mask: Mask | str, device_type: str) -> tuple[str, str]:
    """(kernel, reason) of a mask in training on this type of device, for a plan. Raises UserError
    as `register` does."""
    choice = choose(_analyse(mask).mask, device_type)
    return choice.kernel, choice.reason


def register(mask: Mask | str) -> str:
    """Make `mask` an attention implementation of transformers and return its name.

    The name (e.g. "lowprec_causal_sliding_window_1024_document") goes to `from_pretrained(...,
    attn_implementation=name)` or `model.set_attn_implementation(name)`; the same expression always
    gives the same name. Raises UserError for a mask that shows the future, has document ids
    already, or has `document` anywhere but joined by & to the rest.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    spec = _analyse(mask)

    def mask_function(**kwargs: Any) -> Tensor | BlockMask | None:
        return _make_mask(spec, **kwargs)

    def forward(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return _forward(spec, module, *args, **kwargs)

    name = _name(spec.mask)
    AttentionMaskInterface.register(name, mask_function)
    AttentionInterface.register(name, forward)
    return name


def attach(model: "PreTrainedModel", mask: Mask | str) -> str:
    """`register` the mask, set it on `model` and, if it needs documents, refuse training batches
    that do not carry them.

    Returns the name. Raises UserError as `register` does, and for a model that does not take
    attention implementations.
    """
    mask = parse(mask)
    name = register(mask)
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise UserError(
            f"attention: {type(model).__name__} does not support a custom attention implementation "
            "in transformers"
        )
    if (handle := getattr(model, _HOOK, None)) is not None:
        handle.remove()
    handle = None
    if mask.needs_documents:
        handle = model.register_forward_pre_hook(
            partial(_require_documents, str(mask)), with_kwargs=True
        )
    setattr(model, _HOOK, handle)
    return name


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
        # The default, config.use_cache, makes a cache even in training, and with a cache documents
        # are not looked for.
        kwargs = {**kwargs, "use_cache": False}
    return args, kwargs


def _make_mask(
    spec: _Spec,
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
    config: Any = None,
    **kwargs: Any,
) -> Tensor | BlockMask | None:
    """The mask of one forward pass; called by transformers.masking_utils with these names.

    attention_mask: bool [B, K], True where a token is no padding. local_size: the window of the
    model's own configuration.
    """
    from transformers.masking_utils import sdpa_mask

    if "allow_is_bidirectional_skip" in kwargs:
        raise UserError(
            f"mask '{spec.mask}' is for causal language models, and this model asks for a "
            "bidirectional mask"
        )
    if (
        spec.mask.needs_documents
        and attention_mask is not None
        and torch.is_grad_enabled()
        and q_length == kv_length
    ):
        raise UserError(
            f"mask '{spec.mask}': transformers ignores document boundaries in a batch with an "
            "attention_mask; train on position_ids "
            "that restart at 0 at each document (under torch.no_grad() each row counts as one "
            "document)"
        )
    visible = _combine(mask_function, spec)
    may_skip = allow_is_causal_skip and spec.added is None
    device = torch.device(device)
    # From here on the mask may hold more than its expression says (padding, documents, the model's
    # window): never plain causal.
    kernel = choose(
        spec.mask if spec.added is not None else causal() & document(),
        device.type,
        head_dim=_head_dim(config),
    ).kernel
    # While decoding with a cache the lengths change at each step, and FlexAttention would be
    # compiled again and again.
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
        # A tensor with a static cache, as in transformers itself.
        q_offset=q_offset,  # pyright: ignore[reportArgumentType]
        kv_offset=kv_offset,
        # Annotated with int there, called with tensors.
        mask_function=visible,  # pyright: ignore[reportArgumentType]
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=may_skip,
        device=device,
        **kwargs,
    )


def _forward(
    spec: _Spec,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of one layer; query [B, H, Q, D], key and value [B, G, K, D] -> ([B, Q, H, D],
    None)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise UserError(
                f"mask '{spec.mask}': {type(module).__name__} uses {name}, which these kernels do "
                "not compute"
            )
    if isinstance(attention_mask, BlockMask):
        if dropout > 0 or kwargs.get("position_bias") is not None:
            raise UserError(
                f"mask '{spec.mask}': FlexAttention has neither dropout nor a position bias; set "
                "attention_dropout: 0"
            )
        out = run_flex(query, key, value, attention_mask, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    if attention_mask is None and spec.added is not None:
        raise UserError(
            f"mask '{spec.mask}': {type(module).__name__} does not build its mask through "
            "transformers.masking_utils"
        )
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


def _combine(theirs: MaskFunction, spec: _Spec) -> MaskFunction:
    """transformers' predicate AND what our expression adds to it."""
    if spec.added is None:
        return theirs
    ours = spec.added.function()
    if not spec.shows_prefix:
        return lambda b, h, q, kv: theirs(b, h, q, kv) & ours(b, h, q, kv)
    # A prefix looks ahead, and their predicate holds `causal`. All else in it (documents, windows,
    # chunks) is symmetric in the two positions, so that asking it about the pair in causal order
    # takes out just the causal part.
    return lambda b, h, q, kv: (
        theirs(b, h, torch.maximum(q, kv), torch.minimum(q, kv)) & ours(b, h, q, kv)
    )


def _and_padding(visible: MaskFunction, not_padding: Tensor) -> MaskFunction:
    return lambda b, h, q, kv: visible(b, h, q, kv) & not_padding[b, kv]


def _shift(visible: MaskFunction, q_offset: int | Tensor, kv_offset: int) -> MaskFunction:
    """`visible` at absolute positions. Offsets of 0, the case in training, add nothing to the
    kernel."""
    if isinstance(q_offset, int) and q_offset == 0 and kv_offset == 0:
        return visible
    return lambda b, h, q, kv: visible(b, h, q + q_offset, kv + kv_offset)


def _head_dim(config: Any) -> int:
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _analyse(mask: Mask | str) -> _Spec:
    mask = parse(mask)
    terms = _conjuncts(mask)
    if any(isinstance(term, Document) and term.ids is not None for term in _atoms(mask)):
        raise UserError(
            f"mask '{mask}': leave the document ids out for a model; each batch brings its own in "
            "position_ids"
        )
    if any(term.needs_documents for term in terms if not isinstance(term, Document)):
        raise UserError(
            f"mask '{mask}': transformers ANDs documents with the whole mask; write '(...) & "
            "document'"
        )
    future = _future(mask)
    if future == _ANYTHING or not any(isinstance(atom, Causal) for atom in _atoms(mask)):
        raise UserError(
            f"mask '{mask}': a causal language model cannot see the future; write "
            f"'{causal() & mask}'"
        )
    added = [term for term in terms if not isinstance(term, (Causal, Document))]
    return _Spec(
        mask=mask, added=reduce(and_, added) if added else None, shows_prefix=future == _PREFIX
    )


# What a mask shows of the future, ordered so that `&` takes the least and `|` the most.
_NOTHING, _PREFIX, _ANYTHING = range(3)


def _future(mask: Mask) -> int:
    """An upper bound from the structure of the expression."""
    match mask:
        case Causal():
            return _NOTHING
        case Prefix():
            return _PREFIX
        case And(left=left, right=right):
            return min(_future(left), _future(right))
        case Or(left=left, right=right):
            return max(_future(left), _future(right))
        case Not(inner=Not(inner=inner)):
            return _future(inner)
        case _:
            return _ANYTHING


def _conjuncts(mask: Mask) -> list[Mask]:
    return [*_conjuncts(mask.left), *_conjuncts(mask.right)] if isinstance(mask, And) else [mask]


def _atoms(mask: Mask) -> list[Mask]:
    return [atom for child in mask.children for atom in _atoms(child)] if mask.children else [mask]


def _name(mask: Mask) -> str:
    """A name without the words that transformers looks for in one ("flash", "flex_attention",
    "sdpa", "|")."""
    terms = _conjuncts(mask)
    words = re.sub(r"\W+", "_", " ".join(map(str, terms))).strip("_")
    if any(term.children for term in terms):
        words += "_" + hashlib.sha256(str(mask).encode()).hexdigest()[:8]
    return f"lowprec_{words}"
