"""The decoder block's pieces against transformers' own."""

import pytest
import torch

from alpamayo_dflash.target.qwen3 import rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_that_of_transformers(dtype):
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

    torch.manual_seed(0)
    norm = Qwen3VLTextRMSNorm(96, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    x = torch.randn(7, 3, 96).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, norm.weight, 1e-5), norm(x), atol=1e-6, rtol=1e-6)
