"""irann.core.attention against torch's own attention and against closed forms."""

import math
from inspect import unwrap

import pytest
import torch
from conftest import refuses
from helpers import rng
from torch.nn.functional import scaled_dot_product_attention

from irann.core.attention import attention, attention_weights, causal_mask, merge_heads, scores


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=rng(seed))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("b, h, t, c", [(2, 3, 7, 5), (1, 1, 1, 4), (2, 3, 33, 16)])
def test_equals_torchs_own_attention(b, h, t, c, causal):
    q, k, v = (3 * draw(b, h, t, c, seed=i) for i in range(3))
    theirs = scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(attention(q, k, v, causal=causal), theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("s", [1, 3, 9])
def test_queries_of_another_text_see_all_of_this_one(s):
    q, k, v = draw(2, 3, 5, 4), draw(2, 3, s, 4, seed=1), draw(2, 3, s, 4, seed=2)
    theirs = scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention(q, k, v, causal=False), theirs, atol=1e-12, rtol=0)


def test_new_queries_look_back_over_cached_keys_and_never_ahead():
    q, k, v = (draw(2, 2, 9, 4, seed=i) for i in range(3))
    full = attention(q, k, v)
    torch.testing.assert_close(attention(q[:, :, 6:], k, v), full[:, :, 6:], atol=1e-14, rtol=0)
    k[:, :, 4:], v[:, :, 4:] = 99.0, -99.0
    assert torch.equal(attention(q, k, v)[:, :, :4], full[:, :, :4])
    assert causal_mask(2, 4).tolist() == [[True, True, True, False], [True, True, True, True]]


def test_equal_scores_give_the_mean_of_what_may_be_seen():
    v = draw(1, 1, 5, 3)
    mean = v.cumsum(2) / torch.arange(1, 6, dtype=torch.float64)[:, None]
    torch.testing.assert_close(attention(torch.zeros(1, 1, 5, 3).double(), v, v), mean)


def test_scores_of_unit_vectors_have_unit_variance():
    for c in (4, 64, 1024):
        deviation = scores(draw(1, 1, 256, c), draw(1, 1, 256, c, seed=1)).std()
        assert math.isclose(deviation, 1, abs_tol=0.05), (c, deviation)


def test_weights_sum_to_one_and_heads_lie_side_by_side():
    x = draw(2, 3, 5, 4)
    assert torch.equal(merge_heads(x)[..., 4:8], x[:, 1])
    weights = attention_weights(draw(1, 2, 5, 3), draw(1, 2, 5, 3))
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 5).double())


def test_shapes_that_do_not_fit_are_named():
    q, k = draw(2, 2, 3, 4), draw(2, 2, 5, 4)
    for wrong in (
        *((q[0], k, k), (q[:1], k, k), (q[:, :1], k, k), (q, k, k[:, :, :3]), (q, k, k[..., :3])),
        *((q[..., :3], k, k), (q, k[:1], k[:1]), (q, k[:, :1], k[:, :1])),
    ):
        with pytest.raises(ValueError, match="attention wants q .* and k, v .*; got"):
            unwrap(attention)(*wrong)  # without the type checker
    with refuses("last of only 3"):
        attention(draw(1, 2, 4, 4), draw(1, 2, 3, 4), draw(1, 2, 3, 4))


def test_what_is_masked_weighs_nothing_however_large_the_scores():
    q = torch.full((1, 1, 2, 1), 200.0)
    k = torch.tensor([-100.0, 100.0]).view(1, 1, 2, 1)
    assert attention_weights(q, k)[0, 0, 0].tolist() == [1, 0]


def test_the_mask_lies_where_the_scores_do():
    q = draw(1, 1, 3, 2)
    with torch.device("meta"):
        assert attention_weights(q, q).device == q.device
