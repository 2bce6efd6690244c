"""irann.core.attention against torch's own attention and against closed forms."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from irann.core.attention import attention, causal_mask, merge_heads, scores, split_heads, weights


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("b, h, t, c", [(2, 3, 7, 5), (1, 1, 1, 4), (2, 3, 33, 16)])
def test_equals_torchs_own_attention(b, h, t, c, causal):
    q, k, v = (3 * draw(b, h, t, c, seed=i) for i in range(3))
    ours = attention(q, k, v, causal=causal)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, scaled_dot_product_attention(q, k, v, is_causal=causal), atol=1e-12, rtol=0)


def test_new_questions_look_back_over_remembered_keys():
    q, k, v = (draw(2, 2, 9, 4, seed=i) for i in range(3))
    whole = attention(q, k, v)
    torch.testing.assert_close(attention(q[:, :, 6:], k, v), whole[:, :, 6:], atol=1e-14, rtol=0)


def test_the_future_is_not_seen():
    q, k, v = (draw(1, 2, 6, 4, seed=i) for i in range(3))
    before = attention(q, k, v)
    k[:, :, 4:], v[:, :, 4:] = 99.0, -99.0
    assert torch.equal(attention(q, k, v)[:, :, :4], before[:, :, :4])


def test_mask_counts_from_the_end():
    assert causal_mask(2, 4).tolist() == [[True, True, True, False], [True, True, True, True]]


def test_equal_scores_give_the_mean_of_what_may_be_seen():
    v = draw(1, 1, 5, 3)
    mean = v.cumsum(2) / torch.arange(1, 6, dtype=torch.float64)[:, None]
    torch.testing.assert_close(attention(torch.zeros(1, 1, 5, 3).double(), v, v), mean)


def test_scores_of_unit_vectors_have_unit_variance():
    for c in (4, 64, 1024):
        spread = scores(draw(1, 1, 256, c), draw(1, 1, 256, c, seed=1)).std()
        assert math.isclose(spread, 1, abs_tol=0.05), (c, spread)


def test_weights_sum_to_one_and_heads_come_apart_and_together():
    x = draw(2, 5, 12)
    assert torch.equal(merge_heads(split_heads(x, 3)), x)
    torch.testing.assert_close(weights(draw(1, 2, 5, 3), draw(1, 2, 5, 3)).sum(-1), torch.ones(1, 2, 5).double())


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="5 equal heads"):
        split_heads(draw(1, 2, 12), 5)
    with pytest.raises(ValueError, match="got"):
        attention(draw(1, 2, 3, 4), draw(1, 2, 3, 5), draw(1, 2, 3, 5))
    with pytest.raises(ValueError, match="last of only 3"):
        attention(draw(1, 2, 4, 4), draw(1, 2, 3, 4), draw(1, 2, 3, 4))
