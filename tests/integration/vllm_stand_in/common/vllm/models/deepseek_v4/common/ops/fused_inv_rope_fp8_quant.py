import torch


def fused_inv_rope_fp8_quant(o, n_groups, quant_group_size=128, tma_aligned_scales=False):
    """The quantisation alone, which is what the rotation of position 0 leaves of it; its outputs
    lie as the real one's do."""
    tokens = o.shape[0]
    x = o.float().view(tokens, n_groups, -1, quant_group_size)
    amax = x.abs().amax(-1).clamp(min=1e-10)
    scale = torch.exp2(torch.ceil(torch.log2(amax / 448)))
    fp8 = (x / scale[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    fp8_buf = torch.empty((n_groups, tokens, fp8[0, 0].numel()), dtype=torch.float8_e4m3fn)
    fp8_buf.copy_(fp8.flatten(2).transpose(0, 1))

    stored, blocks = -(-tokens // 4) * 4, scale.shape[2]
    if tma_aligned_scales:
        blocks //= 4
        scale = (scale.view(torch.int32) >> 23).to(torch.uint8).view(torch.int32)
    scale_buf = torch.zeros(n_groups * blocks * stored, dtype=scale.dtype)
    scale_buf = scale_buf.as_strided((n_groups, tokens, blocks), (blocks * stored, 1, stored))
    scale_buf.copy_(scale.transpose(0, 1))
    return fp8_buf.transpose(0, 1), scale_buf.transpose(0, 1)
