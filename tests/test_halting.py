"""irann.core.halting against enumeration, closed forms, scipy, and contractions whose exit round is
known."""

import math
from functools import partial
from inspect import unwrap
from itertools import product

import pytest
import torch
from conftest import refuses
from helpers import rng
from scipy.special import rel_entr
from scipy.stats import entropy, ortho_group

from irann.core.halting import (
    expected_rounds,
    fixed_point,
    halting_distribution,
    kl_to_geometric,
    log_geometric,
    survival,
)

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.rand(*shape, dtype=F64, generator=rng(seed))


def coin(p, rounds):
    return torch.full((rounds,), p, dtype=F64)


def kl(halt, prior=0.2):
    return kl_to_geometric(halting_distribution(halt), prior)


def close(ours, theirs, tolerance=1e-10):
    theirs = torch.as_tensor(theirs, dtype=ours.dtype)
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


# --- the distribution -----------------------------------------------------------------------------


def test_all_histories_of_six_coins():
    """Toss six coins in all 2^6 ways: the first "stop" ends the thinking, and the sixth round ends
    it anyway (PonderNet, section 2.2)."""
    halt, p = draw(6), coin(0.0, 6)
    for history in product([0, 1], repeat=6):
        first = history.index(1) if 1 in history else 5
        p[first] += math.prod(h if stop else 1 - h for h, stop in zip(halt.tolist(), history))
    close(halting_distribution(halt), p)


def test_sums_to_one_whatever_the_halting_probabilities():
    for halt in (draw(2, 5, 9), draw(3, 1), *(coin(p, 12) for p in (0.0, 1e-6, 1 - 1e-6, 1.0))):
        close(halting_distribution(halt).sum(-1), torch.ones(halt.shape[:-1]))
        assert halting_distribution(halt).shape == halt.shape


def test_the_last_round_takes_what_remains():
    close(halting_distribution(coin(0.0, 5)), [0.0, 0, 0, 0, 1])
    close(halting_distribution(coin(1.0, 5)), [1.0, 0, 0, 0, 0])
    close(halting_distribution(coin(0.3, 3)), [0.3, 0.21, 0.49])


def test_mean_is_the_sum_of_survival():
    halt = draw(4, 7)
    close(expected_rounds(halting_distribution(halt)), survival(halt).sum(-1))
    close(expected_rounds(halting_distribution(coin(0.25, 4000))), 4.0)  # a geometric mean is 1 / p
    close(expected_rounds(halting_distribution(coin(0.0, 6))), 6.0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_double_stays_double_and_single_single(dtype):
    p = halting_distribution(draw(3, 4).to(dtype))
    assert {p.dtype, expected_rounds(p).dtype, kl_to_geometric(p, 0.2).dtype} == {dtype}


# --- the prior ------------------------------------------------------------------------------------


def test_known_values_of_the_divergence():
    close(kl(coin(0.3, 4)), 0.061686951134, 1e-12)
    close(kl(coin(0.3, 8)), 0.086159460356, 1e-12)


def test_divergence_is_scipys_in_this_direction_and_not_the_other():
    p, g = halting_distribution(draw(5, 6)), halting_distribution(coin(0.2, 6))
    ours = kl_to_geometric(p, 0.2)
    close(ours, rel_entr(p.numpy(), g.numpy()).sum(-1))
    close(ours, entropy(p.numpy(), g.expand(5, 6).numpy(), axis=-1))
    other = rel_entr(g.numpy(), p.numpy()).sum(-1)
    assert (ours - torch.as_tensor(other)).abs().min() > 1e-3


@pytest.mark.parametrize("rounds, prior", product((1, 2, 9), (1e-6, 0.2, 0.5, 1 - 1e-6)))
def test_prior_is_a_distribution_and_its_own_nearest_one(rounds, prior):
    g = log_geometric(prior, rounds).exp()
    close(g.sum(), 1.0)
    close(g, halting_distribution(coin(prior, rounds)))
    close(kl(coin(prior, rounds), prior), 0.0)
    assert rounds == 1 or (kl(draw(50, rounds), prior) > 0).all()


@pytest.mark.parametrize("p, dtype", product([0.0, 1.0, 1e-6, 1 - 1e-6], [torch.float32, F64]))
def test_extreme_probabilities_are_safe_in_value_and_gradient(p, dtype):
    halt = torch.full((2, 6), p, dtype=dtype, requires_grad=True)
    value = kl(halt).sum() + expected_rounds(halting_distribution(halt)).sum()
    (slope,) = torch.autograd.grad(value, halt)
    assert value.isfinite() and slope.isfinite().all()


def test_certainty_has_the_divergence_of_one_round():
    close(kl(coin(1.0, 6)), -math.log(0.2))
    close(kl(coin(0.0, 6)), -5 * math.log(0.8))
    close(kl(coin(1e-6, 6)), -5 * math.log(0.8), 1e-4)
    assert kl(coin(1e-6, 6)) != kl(coin(0.0, 6))


def test_gradients_are_the_finite_differences():
    assert torch.autograd.gradcheck(kl, (0.1 + 0.8 * draw(2, 5)).requires_grad_())
    edge = torch.tensor([0.0, 1.0, 0.5, 0.0], dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(expected_rounds(halting_distribution(edge)), edge)
    # Minus the rounds that follow, if round r is reached; after a sure stop nothing counts.
    close(slope, [-1.0, -1.5, 0.0, 0.0])


def test_what_makes_no_sense_is_named():
    with refuses(r"lie in \[0, 1\]; got 0 to 1.5"):
        halting_distribution(torch.tensor([0.0, 1.5]))
    with refuses(r"lie in \[0, 1\]; got -0.5 to 1"):
        halting_distribution(torch.tensor([1.0, -0.5]))
    for ask in (halting_distribution, expected_rounds, kl):
        with refuses("last axis"):
            ask(torch.zeros(3, 0))
    for ask in (survival, expected_rounds, partial(unwrap(kl_to_geometric), prior=0.2)):
        with pytest.raises(ValueError, match="int64"):
            unwrap(ask)(torch.ones(3, dtype=torch.long))  # without the type checker
    for prior in (0, 1, -0.1, math.nan):
        with refuses("prior"):
            kl_to_geometric(torch.tensor([0.5, 0.5]), prior)
    assert halting_distribution(torch.tensor([0.5, math.nan, 0.5])).isnan().any()
    with refuses(r"lie in \[0, 1\]; got 0.5 to 2"):
        halting_distribution(torch.tensor([0.5, math.nan, 2.0]))


# --- the fixed point ------------------------------------------------------------------------------


def contraction(rho, d=5, length=4.0, seed=0):
    """-> f(x) = rho Q x + b and its fixed point. From x = 0 the k-th change has the length
    |b| rho^(k-1) exactly, since Q keeps lengths."""
    q = torch.as_tensor(ortho_group.rvs(d, random_state=seed))
    b = draw(d, seed=seed)
    b = length * b / b.norm()
    limit = torch.linalg.solve(torch.eye(d, dtype=F64) - rho * q, b)
    return (lambda x: rho * x @ q.T + b), limit


@pytest.mark.parametrize("rho, rounds", [(0.3, 14), (0.9, 146)])
def test_the_exit_round_is_the_predicted_one(rho, rounds):
    step, limit = contraction(rho)
    end = fixed_point(step, torch.zeros(3, 5, dtype=F64), tolerance=1e-6, max_rounds=1000)
    assert end.rounds.tolist() == [rounds] * 3 and end.converged.all()
    assert rounds == 1 + math.ceil(math.log(1e-6 / 4) / math.log(rho))
    close(end.residual, [4 * rho ** (rounds - 1)] * 3, 1e-12)
    close(end.x, limit.expand(3, 5), 1e-6 * rho / (1 - rho))  # Banach's bound on what remains


def test_each_row_stops_for_itself_and_a_batch_is_its_rows():
    step, limit = contraction(0.7)
    x0 = limit + torch.tensor([0, 1e-3, 1.0, 1e3], dtype=F64)[:, None] * draw(4, 5, seed=3)
    batch = fixed_point(step, x0, tolerance=1e-6, max_rounds=50)
    assert batch.rounds.tolist() == sorted(set(batch.rounds.tolist()))
    assert batch.converged.tolist() == [True, True, True, False]
    for i in range(4):
        one = fixed_point(step, x0[i : i + 1], tolerance=1e-6, max_rounds=50)
        for mine, alone in zip(batch, one, strict=True):
            close(mine[i : i + 1].double(), alone.double(), 1e-14)


def test_a_stopped_row_is_frozen():
    halve = torch.tensor([[0.0], [0.5]])
    end = fixed_point(lambda x: x * halve, torch.ones(2, 3), tolerance=1e-3, max_rounds=6)
    assert end.rounds.tolist() == [2, 6] and end.converged.tolist() == [True, False]
    creep = torch.tensor([[0.001], [1.0]])
    end = fixed_point(lambda x: x + creep, torch.zeros(2, 1), tolerance=0.01, max_rounds=6)
    close(end.x, [[0.001], [6.0]], 1e-7)


@pytest.mark.parametrize("factor, power", [(-1, 1), (1.5, 1), (math.nan, 1), (math.inf, 1), (9, 9)])
def test_what_never_converges_ends_at_max_rounds_unconverged(factor, power):
    start = torch.ones(2, 3)
    end = fixed_point(lambda x: factor * x**power, start, tolerance=1e-6, max_rounds=40)
    assert end.rounds.tolist() == [40, 40] and not end.converged.any()


def test_a_step_may_work_in_place():
    end = fixed_point(lambda x: x.mul_(0.5), coin(1.0, 1), tolerance=0.1, max_rounds=9)
    assert end.rounds.tolist() == [4] and end.x.item() == 0.0625


def test_a_bad_row_does_not_disturb_its_neighbours():
    step, limit = contraction(0.3)
    x0 = torch.stack([coin(0.0, 5), coin(math.nan, 5)])
    end = fixed_point(step, x0, tolerance=1e-6, max_rounds=99)
    assert end.rounds.tolist() == [14, 99] and end.converged.tolist() == [True, False]
    close(end.x[0], limit, 1e-6)


def test_a_row_that_has_come_to_rest_stays_although_its_step_would_move_it_again():
    calls = []

    def step(x):  # the first row rests once, the second moves for four rounds
        calls.append(x)
        return x + torch.tensor([[len(calls) > 1], [len(calls) < 5]])

    end = fixed_point(step, torch.zeros(2, 1), tolerance=0.5, max_rounds=9)
    assert end.rounds.tolist() == [1, 5] and end.x.tolist() == [[0], [4]]
    assert end.converged.all() and end.residual.tolist() == [0, 0]


def test_starting_at_the_fixed_point_takes_one_round():
    end = fixed_point(lambda x: x, torch.ones(2), tolerance=0, max_rounds=9)
    assert end.rounds.tolist() == [1, 1] and end.converged.all() and (end.residual == 0).all()


def test_bad_calls_of_the_fixed_point_are_named():
    x = torch.zeros(2, 3)
    for tolerance in (-1.0, math.nan, math.inf):
        with refuses("tolerance"):
            fixed_point(lambda x: x, x, tolerance=tolerance, max_rounds=3)
    for rounds in (0, 2.5, math.nan):
        with refuses("max_rounds"):
            fixed_point(lambda x: x, x, tolerance=0.1, max_rounds=rounds)
    for start in (x.long(), x[0, 0]):
        with pytest.raises(ValueError, match="x0 has a batch axis and real numbers; got"):
            unwrap(fixed_point)(lambda x: x, start, tolerance=0.1, max_rounds=3)
    with refuses("keep the shape"):
        fixed_point(lambda x: x[:, :1], x, tolerance=0.1, max_rounds=3)


def test_a_state_may_be_one_number_a_row():
    found = fixed_point(
        lambda x: x / 2 + 1, torch.zeros(3, dtype=torch.float64), tolerance=1e-9, max_rounds=99
    )
    torch.testing.assert_close(found.x, torch.full((3,), 2.0, dtype=torch.float64))


def test_a_row_of_a_state_may_have_axes_of_its_own():
    shrink = torch.tensor([0.1, 0.5]).view(2, 1, 1)
    end = fixed_point(lambda x: x * shrink, torch.ones(2, 2, 3), tolerance=0.23, max_rounds=9)
    assert end.rounds.tolist() == [2, 4]  # the changes are sqrt(6) (1 - shrink) shrink^(k-1)
    close(end.x, torch.tensor([0.01, 0.0625]).view(2, 1, 1).expand(2, 2, 3), 1e-7)
