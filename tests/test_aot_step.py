"""What a compiled training step moves, by what it is for, on a program written by hand."""
# ruff: noqa: E501

from __future__ import annotations

import pytest

from experiments.aot_step import AotStepConfig, moved

PROGRAM = """HloModule jit_step, is_scheduled=true

%copied (part: f32[1,4], whole: f32[3,4], i: s32[]) -> f32[3,4] {
  %part = f32[1,4]{1,0} parameter(0)
  %whole = f32[3,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %written = f32[3,4]{1,0} dynamic-update-slice(%whole, %part, %i, %i)
}

%body (carry: (s32[], f32[3,4], f32[1,4])) -> (s32[], f32[3,4], f32[1,4]) {
  %carry = (s32[], f32[3,4]{1,0}, f32[1,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %kept = f32[3,4]{1,0} get-tuple-element(%carry), index=1
  %x = f32[1,4]{1,0} get-tuple-element(%carry), index=2
  %wrapped.1 = f32[1,4]{1,0} multiply(%x, %x), metadata={op_name="jit(step)/jvp(layers)/while/body/mul"}
  %fusion-start.1 = ((f32[1,4], f32[3,4], s32[]), f32[3,4], f32[1,4]) fusion-start(%wrapped.1, %kept, %i), calls=%copied, metadata={op_name="jit(step)/jvp(layers)/while/body/dynamic_update_slice"}
  %fusion-done.1 = f32[3,4]{1,0} fusion-done(%fusion-start.1)
  ROOT %next = (s32[], f32[3,4]{1,0}, f32[1,4]{1,0}) tuple(%i, %fusion-done.1, %wrapped.1)
}

%before_the_end (carry: (s32[], f32[3,4], f32[1,4])) -> pred[] {
  %carry = (s32[], f32[3,4]{1,0}, f32[1,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %end = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (start: (s32[], f32[3,4], f32[1,4]), w: f32[4,4]) -> f32[1,4] {
  %start = (s32[], f32[3,4]{1,0}, f32[1,4]{1,0}) parameter(0)
  %w = f32[4,4]{1,0} parameter(1)
  %loop = (s32[], f32[3,4]{1,0}, f32[1,4]{1,0}) while(%start), condition=%before_the_end, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %x = f32[1,4]{1,0} get-tuple-element(%loop), index=2
  %product = f32[1,4]{1,0} custom-call(%x, %w), custom_call_target="__cublas$gemm", metadata={op_name="jit(step)/jvp(layers)/dot_general"}
  %attended = f32[1,4]{1,0} custom-call(%product), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(step)/jvp(layers)/attention"}
  %gradient = f32[1,4]{1,0} add(%attended, %product), metadata={op_name="jit(step)/transpose(jvp(layers))/add_any"}
  ROOT %update = f32[1,4]{1,0} subtract(%x, %gradient), metadata={op_name="jit(step)/sub"}
}
"""


def test_bytes_by_what_they_are_for() -> None:
    """A row is 16 bytes. The loop runs three times; of the array it writes to only a row is copied."""
    assert moved(PROGRAM) == {"forward": 3 * 3 * 16, "kept for the backward pass": 3 * 2 * 16,
                              "products": 16 + 64 + 16, "backward": 3 * 16, "rest": 3 * 16, "attention": 2 * 16}


def test_an_unknown_pair_is_named() -> None:
    with pytest.raises(ValueError, match="pair='2b': must be of 1b, 1b-8, small"):
        AotStepConfig(pair="2b")
    with pytest.raises(ValueError, match="models='mqa': must be of mfa, mha"):
        AotStepConfig(models=("mqa",))
