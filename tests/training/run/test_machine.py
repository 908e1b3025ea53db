"""The number of operations that a model takes for a token."""

from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from lowprec.training.run.machine import flops_per_token
from tests.builders import tiny_llama

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
ATTENTION = 4 * 32 * 32
"""Number of weights of a layer's q, k, v and o."""
NORMS = 2 * 2 * 32 + 32


def test_operations_of_a_token():
    with torch.device("meta"):
        model = tiny_llama(**SIZES)
    weights = 2 * (ATTENTION + 3 * 32 * 48) + NORMS + 64 * 32  # with the head; the embedding is only looked up
    assert flops_per_token(model, 128) == 6 * weights + 12 * 2 * 32 * 128


@pytest.mark.parametrize("chosen", [1, 2])
def test_only_the_experts_that_a_token_goes_to_count(chosen: int):
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=chosen))
    weights = 2 * (ATTENTION + chosen * 3 * 32 * 48 + 8 * 32) + NORMS + 64 * 32  # the router has a row for each expert
    assert flops_per_token(model, 128) == 6 * weights + 12 * 2 * 32 * 128
