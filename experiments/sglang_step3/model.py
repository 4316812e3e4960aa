"""`Step3TextForCausalLM` of SGLang's own parts: the text model of its Step-3, without the vision tower."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.configs.step3_vl import Step3TextConfig, Step3VLConfig
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from sglang.srt.models.step3_vl import Step3TextModel, Step3VLForConditionalGeneration
from sglang.srt.utils import add_prefix
from torch import nn


class Step3TextForCausalLM(Step3VLForConditionalGeneration):
    """Blocks and the loading of weights are SGLang's, whose names of tensors (`model.*`, `lm_head.weight`) are ours."""

    def __init__(self, config: Step3TextConfig, quant_config: Any = None, prefix: str = "") -> None:
        nn.Module.__init__(self)  # the parent's own would make the vision tower
        if not hasattr(config, "pad_token_id"):  # which transformers 5 adds to no config that lacks it
            config.pad_token_id = None
        # What the parent's `load_weights` reads.
        self.config, self.num_fused_shared_experts = Step3VLConfig(text_config=config), 0
        self.quant_config = quant_config
        self.model = Step3TextModel(config, quant_config, prefix=add_prefix("model", prefix))
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, quant_config=quant_config,
                                      prefix=add_prefix("lm_head", prefix))
        self.logits_processor = LogitsProcessor(config)

    @torch.no_grad()
    def forward(self, input_ids: Any, positions: Any, forward_batch: Any, input_embeds: Any = None) -> Any:
        hidden = self.model(input_ids, positions, forward_batch, input_embeds)
        return self.logits_processor(input_ids, hidden, self.lm_head, forward_batch)

    @classmethod
    def get_model_config_for_expert_location(cls, config: Step3TextConfig) -> Any:
        return super().get_model_config_for_expert_location(Step3VLConfig(text_config=config))


EntryClass = Step3TextForCausalLM
