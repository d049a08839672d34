"""Llama whose blocks differ: some lack their attention or MLP, others have their own number of KV heads or neurons.

Made by Billhook; copied into the folders of model type `nemotron-nas` that it writes, so that transformers, and what
reads its configs, load them with trust_remote_code. Needs transformers and torch only. `block_configs` in config.json
says of each block `attention.no_op`, `attention.n_heads_in_group` (query heads for each KV head), `ffn.no_op` and
`ffn.ffn_mult`, from which the width of the MLP follows.
"""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class Section(dict):
    """A JSON object whose entries are attributes too: engines read `block.attention.no_op`."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def mlp_width(ffn_mult, hidden_size):
    """The neurons of an MLP: two thirds of `ffn_mult` times the width of the model, up to a multiple of 256."""
    return -(-int(2 * ffn_mult * hidden_size / 3) // 256) * 256


class DeciLMConfig(LlamaConfig):
    """The config of a Llama, with a section for each block."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **kwargs):
        super().__init__(**kwargs)
        self.block_configs = [Section({name: Section(part) for name, part in each.items()}) for each in block_configs]


class NoOp(nn.Module):
    """Stands where a sublayer is missing: zeros of [batch, time, width], alone or with None, as attention returns."""

    def __init__(self, pair=False):
        super().__init__()
        self.pair = pair

    def forward(self, hidden_states, **kwargs):
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self.pair else zeros


class DeciLMForCausalLM(LlamaForCausalLM):
    """A Llama whose blocks are as `block_configs` says. Block 0 has an attention, as caches of transformers need it."""

    config_class = DeciLMConfig

    def __init__(self, config):
        super().__init__(config)
        width, heads = config.hidden_size, config.num_attention_heads
        for block, told in zip(self.model.layers, config.block_configs, strict=True):
            if told.attention.no_op:
                block.self_attn, block.input_layernorm = NoOp(pair=True), nn.Identity()
            else:
                attention, each = block.self_attn, told.attention.n_heads_in_group
                attention.num_key_value_groups = each
                outputs = heads // each * attention.head_dim
                for name in ("k_proj", "v_proj"):
                    setattr(attention, name, nn.Linear(width, outputs, bias=config.attention_bias))
            if told.ffn.no_op:
                block.mlp, block.post_attention_layernorm = NoOp(), nn.Identity()
            else:
                mlp, neurons = block.mlp, mlp_width(told.ffn.ffn_mult, width)
                mlp.intermediate_size = neurons
                for name, (inputs, outputs) in {
                    "gate_proj": (width, neurons), "up_proj": (width, neurons), "down_proj": (neurons, width)
                }.items():  # fmt: skip
                    setattr(mlp, name, nn.Linear(inputs, outputs, bias=config.mlp_bias))
