"""A zoo of tiny models: causal language models of transformers, models with heads of other tasks, and plain programs."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 128

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "word_embed_proj_dim", "embedding_size"), 64),
    **dict.fromkeys(("lru_width", "attention_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_hidden_size"), 128),
    **dict.fromkeys(("hidden_dim", "d_inner", "intermediate_size_mlp", "dff", "dim_ff"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    "num_key_value_heads": 2,
    **dict.fromkeys(("head_dim", "kv_channels", "d_kv", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "mamba_n_groups", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "mamba_d_state", "mamba_d_head", "state_size"), 16),
    "mamba_n_heads": 8,
    "mamba_expand": 2,
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("sliding_window", "attention_window_size"), 16),
    "rotary_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "use_cache": False,
}
"""Values of the fields that configurations have under these names."""

_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
_LATENT_ATTENTION = {"num_key_value_heads": 4}

OTHERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "minicpm3", "youtu", "axk1"), _LATENT_ATTENTION),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text"), _LINEAR_ATTENTION),
    "dots1": {"n_shared_experts": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "longcat_flash": {"zero_expert_num": 2, **_LATENT_ATTENTION},
    "roc_bert": {"pronunciation_embed_dim": 16, "pronunciation_vocab_size": 16, "shape_embed_dim": 16, "shape_vocab_size": 16},
    "xmod": {"default_language": "en_XX"},
    # At its default of 1.0 the loss of untrained weights is 21 nats, and even bf16 changes it by 0.5%.
    "cpmant": {"position_bias_num_buckets": 32, "init_std": 0.02},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 16, "chunk_size": 32},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "qwen2_moe": {"decoder_sparse_step": 1},
}
"""Values that single configurations need beside `SIZES`."""

_CAUSAL = """
afmoe apertus arcee aria_text axk1 bamba bart bert bert-generation big_bird biogpt bitnet blenderbot blenderbot-small bloom camembert
codegen cohere cohere2 cohere2_moe cpmant ctrl cwm data2vec-text deepseek_v2 deepseek_v3 deepseek_v32 diffllama doge dots1 electra
ernie ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo gemma gemma2 gemma3_text gemma4_text glm glm4
glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa
granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax jais2 jamba jetmoe laguna lfm2 lfm2_moe
llama llama4_text longcat_flash mamba mamba2 marian mbart megatron-bert mellum mimo_v2_flash minicpm3 minimax minimax_m2 ministral
mistral mixtral modernbert-decoder moshi mpt mvp nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt pegasus
persimmon phi phi3 phimoe plbart prophetnet qwen2 qwen2_moe qwen3 qwen3_5_text qwen3_moe qwen3_next recurrent_gemma rembert roberta
roberta-prelayernorm roc_bert roformer rwkv seed_oss smollm3 solar_open stablelm starcoder2 trocr vaultgemma whisper xglm xlm
xlm-roberta xlm-roberta-xl xlnet xlstm xmod youtu zaya
"""
CAUSAL = tuple(_CAUSAL.split())
"""Types of causal language models in transformers."""

HEADS = {
    f"{kind} {task}": (kind, task)
    for task in ("QuestionAnswering", "SequenceClassification", "TokenClassification", "MaskedLM")
    for kind in ("albert", "bert", "deberta-v2", "distilbert", "electra", "mobilebert", "mpnet", "roberta")
}
"""Models with heads of other tasks: (model type, task)."""

Batch = dict[str, Tensor]


def build(name: str) -> tuple[nn.Module, Batch]:
    """Return the tiny model of a name in `NAMES`, with weights of seed 0, and a batch for it. The model returns an object with a loss."""
    torch.manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (2, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in PROGRAMS:
            return PROGRAMS[name](), {"input_ids": ids, "labels": ids}
        if name in HEADS:
            kind, task = HEADS[name]
            return getattr(transformers, f"AutoModelFor{task}").from_config(small_config(kind)), {"input_ids": ids, **_labels(task, ids)}
        if name == "t5":
            settings = {
                "vocab_size": VOCABULARY,
                "d_model": 64,
                "d_ff": 128,
                "d_kv": 16,
                "num_layers": 2,
                "num_heads": 4,
                "decoder_start_token_id": 0,
            }
            return transformers.T5ForConditionalGeneration(transformers.T5Config(**settings)), {"input_ids": ids, "labels": ids}
        model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])(small_config(name))
        return model, {"input_ids": ids, "labels": ids}


def small_config(kind: str) -> Any:
    """Return the configuration of a model type with the values of `SIZES` and `OTHERS`."""
    make = CONFIG_MAPPING[kind]
    known = make().to_dict()
    settings = {key: value for key, value in SIZES.items() if key in known}
    return make(**{**settings, **OTHERS.get(kind, {})})


def _labels(task: str, ids: Tensor) -> Batch:
    if task == "QuestionAnswering":
        return {"start_positions": torch.tensor([1, 3]), "end_positions": torch.tensor([4, 5])}
    if task == "SequenceClassification":
        return {"labels": torch.tensor([0, 1])}
    return {"labels": ids % 2 if task == "TokenClassification" else ids}


# Plain programs


class _Output:
    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


class _Program(nn.Module):
    """A language model: an embedding, a body and a head of the names that its program gives them."""

    def logits(self, ids: Tensor) -> Tensor:
        raise AssertionError("each program has its own")

    def forward(self, input_ids: Tensor, labels: Tensor) -> _Output:
        logits = self.logits(input_ids)
        return _Output(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(64, 64, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (4, 16)).transpose(1, 2) for project in (self.wq, self.wk, self.wv))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(64, 128, bias=False) for _ in range(2))
        self.w2 = nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed_forward = _Attention(), _FeedForward()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(64), nn.RMSNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class TitanLlama(_Program):
    """A Llama with torchtitan's names: blocks in a ModuleDict, the head is `output`."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, 64)
        self.layers = nn.ModuleDict({str(number): _Block() for number in range(2)})
        self.norm = nn.RMSNorm(64)
        self.output = nn.Linear(64, VOCABULARY, bias=False)

    def logits(self, ids: Tensor) -> Tensor:
        h = self.tok_embeddings(ids)
        for layer in self.layers.values():
            h = layer(h)
        return self.output(self.norm(h))


class TorchEncoder(_Program):
    """torch's own encoder layers, whose attention multiplies by in_proj_weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, VOCABULARY)

    def logits(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.body(self.embed(ids), mask, is_causal=True))


class Recurrent(_Program):
    """An LSTM between two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 64)
        self.up = nn.Linear(64, 128)
        self.lstm = nn.LSTM(128, 64, batch_first=True)
        self.down = nn.Linear(64, 64)
        self.head = nn.Linear(64, VOCABULARY)

    def logits(self, ids: Tensor) -> Tensor:
        h, _ = self.lstm(self.up(self.embed(ids)))
        return self.head(self.down(h))


class _ReadsWeights(nn.Module):
    """An MLP that multiplies by the weight of `up` itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(nn.functional.linear(x, self.up.weight, self.up.bias)))


class ReadsWeights(_Program):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 64)
        self.blocks = nn.Sequential(_ReadsWeights(), _ReadsWeights())
        self.lm_head = nn.Linear(64, VOCABULARY)

    def logits(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.blocks(self.embed(ids)))


class _Plain(nn.Linear):
    """A subclass that adds nothing to the product."""


class _Scaled(nn.Linear):
    """A subclass whose product is another one."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight / self.weight.norm(dim=1, keepdim=True))


class Subclasses(_Program):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 64)
        self.blocks = nn.Sequential(_Plain(64, 128), nn.GELU(), _Scaled(128, 64, bias=False), _Plain(64, 64))
        self.lm_head = nn.Linear(64, VOCABULARY)

    def logits(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.blocks(self.embed(ids)))


PROGRAMS: dict[str, Callable[[], nn.Module]] = {
    "torchtitan's Llama": TitanLlama,
    "torch's encoder": TorchEncoder,
    "an LSTM": Recurrent,
    "reads weights": ReadsWeights,
    "subclasses": Subclasses,
}

NAMES = (*CAUSAL, *HEADS, "t5", *PROGRAMS)
