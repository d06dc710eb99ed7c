"""Reading orders of image spans."""

import pytest
import torch

from visualrwkv.errors import InputError
from visualrwkv.scan import direction, image_starts, layer_orders, patch_order


def test_directions_of_the_layers():
    assert [direction("uni", i) for i in range(3)] == ["forward"] * 3
    assert [direction("bi", i) for i in range(4)] == ["forward", "backward"] * 2
    assert [direction("multi", i) for i in range(5)] == ["forward", "backward", "downward", "upward", "forward"]


def test_patch_orders_of_two_rows_and_three_columns():
    assert patch_order("forward", 2, 3).tolist() == [0, 1, 2, 3, 4, 5]
    assert patch_order("backward", 2, 3).tolist() == [5, 4, 3, 2, 1, 0]
    assert patch_order("downward", 2, 3).tolist() == [0, 3, 1, 4, 2, 5]
    assert patch_order("upward", 2, 3).tolist() == [5, 2, 4, 1, 3, 0]


def test_only_the_patches_move_and_they_come_back():
    """Two rows: images of 2 x 2 patches and a CLS feature at 1 and 6 of the first, at 3 of the second."""
    starts = torch.tensor([[0, 1], [0, 6], [1, 3]])
    orders = layer_orders("multi", 5, starts, (2, 2), (2, 12))
    assert orders[0] is None and orders[4] is None
    assert orders[1].read[0].tolist() == [0, 4, 3, 2, 1, 5, 9, 8, 7, 6, 10, 11]
    assert orders[1].read[1].tolist() == [0, 1, 2, 6, 5, 4, 3, 7, 8, 9, 10, 11]
    assert orders[2].read[1].tolist() == [0, 1, 2, 3, 5, 4, 6, 7, 8, 9, 10, 11]
    assert orders[3].read[1].tolist() == [0, 1, 2, 6, 4, 5, 3, 7, 8, 9, 10, 11]
    x = torch.randn(2, 12)
    for order in orders[1:4]:
        assert torch.equal(x.gather(1, order.read).gather(1, order.restore), x)


@pytest.mark.parametrize("scan", ["uni", "bi", "multi"])
def test_nothing_to_reorder(scan):
    """No image, an image that is its CLS feature alone, or one patch: every layer reads in natural order."""
    starts = torch.tensor([[0, 1]])
    assert layer_orders(scan, 3, starts[:0], (2, 2), (1, 9)) == [None] * 3
    assert layer_orders(scan, 3, starts, (0, 0), (1, 9)) == [None] * 3
    assert layer_orders(scan, 3, starts, (1, 1), (1, 9)) == [None] * 3


def test_layers_of_one_direction_share_their_order():
    orders = layer_orders("bi", 4, torch.tensor([[0, 0]]), (2, 2), (1, 5))
    assert orders[1] is orders[3]


def test_images_are_found_row_by_row():
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[0, 2:5] = mask[0, 5:8] = True  # two images without text between them
    mask[2, 9:12] = True
    assert image_starts(mask, 3).tolist() == [[0, 2], [0, 5], [2, 9]]
    assert image_starts(mask[1:2], 3).shape == (0, 2)


def test_a_cut_image_is_refused():
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[1, :2] = True
    with pytest.raises(InputError, match="row 1 holds 2 image placeholders.* 3 features"):
        image_starts(mask, 3)
    mask[1, 5] = True
    with pytest.raises(InputError, match="interrupted by text"):
        image_starts(mask, 3)
