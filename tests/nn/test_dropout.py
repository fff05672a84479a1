"""Dropout by a key."""

from __future__ import annotations

import pytest
import torch

from gencore import Key, nn


def test_the_mask_is_a_function_of_key_and_stream_alone():
    dropout, x = nn.Dropout(0.3, stream=5), torch.ones(64, 3, 8, 8)
    found = dropout(x, Key(1))
    assert torch.equal(found, dropout(x, Key(1)))
    assert torch.equal(found, dropout(x.contiguous(memory_format=torch.channels_last), Key(1)))
    for other in (dropout(x, Key(2)), nn.Dropout(0.3, stream=6)(x, Key(1))):
        assert 0.3 < (found != other).float().mean() < 0.55  # of independent masks, 2 p (1 - p) = 0.42 differ


def test_a_part_of_the_batch_has_its_own_rows():
    dropout, x = nn.Dropout(0.5), torch.randn(10, 7)
    whole = dropout(x, Key(3))
    assert torch.equal(whole[4:], dropout(x[4:], Key(3).samples(4)))


def test_values_are_dropped_at_the_rate_and_the_others_scaled():
    x = torch.ones(100_000)
    found = nn.Dropout(0.2)(x, Key(0))
    assert sorted(found.unique().tolist()) == pytest.approx([0, 1.25])
    assert (found == 0).float().mean().item() == pytest.approx(0.2, abs=0.006)  # 4.7 standard errors


def test_without_training_or_rate_it_is_the_identity():
    x = torch.randn(5, 4)
    assert torch.equal(nn.Dropout(0.5).eval()(x, Key(0)), x)
    assert torch.equal(nn.Dropout(0.0)(x, Key(0)), x)


def test_without_a_key_it_is_that_of_torch():
    x = torch.randn(50, 4)
    torch.manual_seed(0)
    found = nn.Dropout(0.5)(x)
    torch.manual_seed(0)
    assert torch.equal(found, torch.nn.Dropout(0.5)(x))


def test_gradients_pass_where_values_do():
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: nn.Dropout(0.4)(x, Key(7)), (x,))
    found = nn.Dropout(0.4)(x, Key(7))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(gradient == 0, found == 0)


def test_it_compiles_to_one_graph():
    dropout, x = nn.Dropout(0.4), torch.randn(6, 5)
    compiled = torch.compile(dropout, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, Key(7)), dropout(x, Key(7)))


def test_each_dropout_of_a_unet_draws_its_own():
    unet = nn.UNet(in_channels=1, channels=(8, 16), blocks_per_level=1, num_groups=4, dropout=0.5)
    streams = [module.stream for module in unet.modules() if isinstance(module, nn.Dropout)]
    assert len(streams) > 4
    assert len(set(streams)) == len(streams)


def test_a_unet_with_a_key_gives_the_same_for_any_split():
    torch.manual_seed(0)
    unet = nn.UNet(in_channels=1, channels=(8, 16), blocks_per_level=1, num_groups=4, dropout=0.5)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([1, 5, 50, 500])
    whole = unet(x, t, key=Key(3))
    parts = torch.cat([unet(x[:1], t[:1], key=Key(3)), unet(x[1:], t[1:], key=Key(3).samples(1))])
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)  # of 20 convolutions in another batch
    assert not torch.allclose(whole, unet(x, t, key=Key(4)), atol=1e-2)
