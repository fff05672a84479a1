"""A small U-Net of diffusers with every kind of part that is accelerated, for tests of what others do to one."""

from __future__ import annotations

import copy
import functools

import diffusers
import torch

CONTEXT, IMAGES = 24, 12
# As in test_diffusers.py, in units of the largest value.
TOLERANCE = 1e-4


def normals(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def original():
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=CONTEXT,
    )
    return model.eval()


def unet():
    return copy.deepcopy(original())


def run(model, images=None):
    x, context = normals(2, 4, 8, 8), normals(2, 5, CONTEXT, seed=2)
    return model(x, torch.tensor([3, 500]), context, added_cond_kwargs={"image_embeds": images}).sample


def a_block(model):
    return model.down_blocks[0].resnets[0]


def an_attention(model):
    return model.mid_block.attentions[0].transformer_blocks[0].attn1


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE * max(1, want.abs().max().item()))
