"""Filled holes: smooth continuation, what the other scan shows, and networks that see no hole."""

import torch

from common.holes import fill, spread


def ball(size: int, radius: float) -> torch.Tensor:
    axis = torch.arange(size) - (size - 1) / 2
    return (axis.view(-1, 1, 1) ** 2 + axis.view(1, -1, 1) ** 2 + axis**2 < radius**2)[None, None]


def test_spread_continues_a_linear_field() -> None:
    """A linear function is harmonic, so a hole in it is filled with it."""
    axes = torch.meshgrid(*[torch.arange(24.0)] * 3, indexing="ij")
    field = torch.stack([axes[0] - 2 * axes[1], axes[2] + 0.5 * axes[0], 3 + 0 * axes[0]])[None]
    hole = ball(24, 6)
    found = spread(torch.where(hole, torch.nan, field).nan_to_num(99.0), ~hole)
    assert torch.equal(found[~hole.expand_as(found)], field[~hole.expand_as(found)])
    assert float((found - field).abs().max()) < 0.5 < float((field[:, :, 6:18] - field.mean()).abs().max())


def test_spread_reaches_everywhere_and_knows_nothing_of_nothing() -> None:
    values = torch.zeros(2, 1, 9, 7, 5)
    values[0, 0, 2, 3, 1] = 4.0
    found = spread(values, values != 0)
    torch.testing.assert_close(found[0], torch.full_like(found[0], 4.0))
    assert not found[1].any()


def test_fill_takes_the_other_scan_and_joins_the_border() -> None:
    torch.manual_seed(1)
    anatomy = torch.nn.functional.avg_pool3d(torch.rand(1, 1, 28, 28, 28), 5, stride=1, padding=2) + 0.2
    hole = ball(28, 6)
    brighter = anatomy + 0.1  # the other scan, all of it brighter by as much
    mask = torch.cat([~hole, torch.ones_like(hole)], 1).float()
    image = torch.cat([anatomy * ~hole, brighter], 1)
    filled, around = fill(image, mask), fill(image, mask, other=False)
    assert torch.equal(filled[:, 1:], brighter) and torch.equal(filled[:, :1][~hole], anatomy[~hole])
    torch.testing.assert_close(filled[:, :1][hole], anatomy[hole], atol=1e-3, rtol=0)
    with_other, without = (float((found[:, :1] - anatomy)[hole].abs().mean()) for found in (filled, around))
    assert without > 20 * with_other


def test_fill_keeps_a_background() -> None:
    """What is background in the other scan stays so: no brain is made up outside of it."""
    image = torch.ones(1, 2, 16, 16, 16)
    image[:, 1, 8:] = 0
    mask = torch.ones_like(image)
    mask[:, 0, 4:12] = 0
    filled = fill(image, mask)
    assert not filled[:, 0, 8:12].any() and (filled[:, 0, 4:8] > 0).all() and (filled[:, 0, 12:] == 1).all()
