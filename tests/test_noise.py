"""irann.core.noise against diffusers in float64, against quadrature, and against worlds whose answers are known in closed form."""

import math
from itertools import pairwise, product

import diffusers
import pytest
import torch
from scipy.stats import chi2

from irann.core import noise
from irann.core.noise import Schedule

NAMES = ("linear", "cosine", "sqrt")
F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def silent(x):
    return torch.zeros_like(x)


def uneven(steps, count, seed=0):
    """-> strictly decreasing noise levels with gaps of every size."""
    return sorted(torch.randperm(steps, generator=torch.Generator().manual_seed(seed))[:count].tolist(), reverse=True)


# --- schedules -------------------------------------------------------------------------------------------------------

TABLE = {  # beta_0, alpha_bar at 499 and 999, posterior variance at 499; computed apart, from the papers' formulas
    "linear": (1e-4, 7.8587242882e-2, 4.0358297654e-5, 1.0031355415e-2),
    "cosine": (4.1284224822e-5, 4.9384359044e-1, 2.4287669070e-9, 3.1361999041e-3),
    "sqrt": (2.3400250408e-2, 2.9578031482e-1, 4.5464777332e-7, 2.4074962267e-3),
}


@pytest.mark.parametrize("name", NAMES)
def test_schedules_hold_the_published_numbers(name):
    schedule = Schedule(name, 1000)
    _, variance = schedule.posterior(draw(1), draw(1), 499)
    ours = [schedule.betas[0], schedule.alpha_bar[499], schedule.alpha_bar[999], variance]
    assert {schedule.betas.dtype, schedule.alpha_bar.dtype, schedule.snr.dtype} == {F64}
    for got, want in zip(ours, TABLE[name], strict=True):
        assert math.isclose(float(got), want, rel_tol=1e-9), (name, float(got), want)
    torch.testing.assert_close(schedule.snr, schedule.alpha_bar / (1 - schedule.alpha_bar), atol=0, rtol=1e-12)


@pytest.mark.parametrize("name, steps", product(NAMES, (1, 7, 50, 200, 1000)))
def test_signal_falls_at_every_step_and_never_to_nothing(name, steps):
    schedule = Schedule(name, steps)
    assert len(schedule.betas) == len(schedule.alpha_bar) == len(schedule.snr) == steps
    assert ((schedule.betas > 0) & (schedule.betas <= 0.999)).all()
    assert (schedule.alpha_bar.diff() < 0).all() and schedule.alpha_bar[-1] > 0


@pytest.mark.parametrize("name", NAMES)
def test_one_jump_equals_many_single_steps(name):
    """Mean and variance of x_tau, carried along x_tau = sqrt(1 - beta) x_{tau-1} + sqrt(beta) eps, level after level."""
    schedule, mean, variance = Schedule(name, 60), 1.0, 0.0
    for tau, beta in enumerate(schedule.betas.tolist()):
        mean, variance = mean * math.sqrt(1 - beta), variance * (1 - beta) + beta
        nothing, one = torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)
        assert math.isclose(schedule.noise(one, tau, nothing).item(), mean, rel_tol=1e-12)
        assert math.isclose(schedule.noise(nothing, tau, one).item() ** 2, variance, rel_tol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_posterior_is_bayes_rule(name):
    """q(x_{tau-1} | x_tau, x0) as the product of two Gaussians in x_{tau-1}, written in precisions and nothing else."""
    schedule, x0, x = Schedule(name, 50), draw(50, 3), draw(50, 3, seed=1)
    mean, variance = schedule.posterior(x0, x, torch.arange(50))
    for tau in range(1, 50):
        beta, before = schedule.betas[tau], schedule.alpha_bar[tau - 1]
        precision = 1 / (1 - before) + (1 - beta) / beta
        weighted = before.sqrt() * x0[tau] / (1 - before) + (1 - beta).sqrt() * x[tau] / beta
        torch.testing.assert_close(variance[tau].squeeze(), 1 / precision, rtol=1e-10, atol=0)
        torch.testing.assert_close(mean[tau], weighted / precision, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(mean[0], x0[0], atol=1e-14, rtol=0)
    assert variance[0] == 0


def test_noising_and_its_two_inverses_agree_for_each_row_alone():
    schedule, x0, eps, tau = Schedule("cosine", 100), draw(4, 5, 2), draw(4, 5, 2, seed=1), torch.tensor([0, 17, 60, 90])
    x = schedule.noise(x0, tau, eps)
    torch.testing.assert_close(schedule.to_x0(x, eps, tau), x0, atol=1e-12, rtol=0)
    torch.testing.assert_close(schedule.to_eps(x, x0, tau), eps, atol=1e-12, rtol=0)
    for row in range(4):
        assert torch.equal(schedule.noise(x0[row : row + 1], int(tau[row]), eps[row : row + 1])[0], x[row])


def test_the_dtype_of_x_is_kept():
    schedule = Schedule("sqrt", 20)
    for dtype in (torch.float32, F64):
        x = draw(2, 3).to(dtype)
        mean, variance = schedule.posterior(x, x, 4)
        steps = list(noise.sample(lambda x, tau: 0.5 * x, x, schedule, generator=torch.Generator().manual_seed(0)))
        assert {x.dtype, mean.dtype, variance.dtype, schedule.noise(x, 4, x).dtype, steps[-1].dtype} == {dtype}
        assert noise.step_kl(schedule, x, 0.5 * x, 4).dtype == dtype


# --- the sampler -----------------------------------------------------------------------------------------------------


def wobbly(x, tau):
    """A denoiser with no meaning that depends on everything it is told."""
    return torch.tanh(1.3 * x + tau.reshape(-1, 1) / 70.0) * 0.9 + 0.05


def promoted(kind, schedule):
    scheduler = kind(len(schedule.betas), trained_betas=schedule.betas.tolist(), prediction_type="sample", clip_sample=False)
    scheduler.betas = schedule.betas.clone()
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    scheduler.one = torch.tensor(1.0, dtype=F64)
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=F64)
    return scheduler


@pytest.mark.parametrize("name, count", product(NAMES, (100, 20)))
def test_ancestral_sampling_equals_diffusers_ddpm(name, count):
    schedule = Schedule(name, 100)
    theirs = promoted(diffusers.DDPMScheduler, schedule)
    theirs.set_timesteps(count)
    x = start = draw(3, 4)
    g, g2 = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    ours = noise.sample(wobbly, start, schedule, timesteps=theirs.timesteps.tolist(), eta=1, generator=g)
    for tau, got in zip(theirs.timesteps, ours, strict=True):
        x = theirs.step(wobbly(x, tau.expand(3)), tau, x, generator=g2).prev_sample
        torch.testing.assert_close(got, x, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name, eta", product(NAMES, (0.0, 0.5, 1.0)))
def test_ddim_equals_diffusers_ddim(name, eta):
    schedule = Schedule(name, 100)
    theirs = promoted(diffusers.DDIMScheduler, schedule)
    theirs.set_timesteps(10)
    x = start = draw(3, 4)
    dice = [draw(3, 4, seed=9 + i) for i in range(10)]
    left = iter(dice)
    ours = noise.sample(wobbly, start, schedule, timesteps=theirs.timesteps.tolist(), eta=eta, noise=lambda x: next(left))
    for tau, got, eps in zip(theirs.timesteps, ours, dice, strict=True):
        x = theirs.step(wobbly(x, tau.expand(3)), tau, x, eta=eta, variance_noise=eps).prev_sample
        torch.testing.assert_close(got, x, atol=1e-11, rtol=1e-11)


def gaussian(schedule, mu, s2):
    """-> the best denoiser of data drawn from N(mu, s2), and the variance it leaves."""

    def denoiser(x, tau):
        ab = schedule.at(schedule.alpha_bar, tau, x)
        return mu + s2 * ab.sqrt() / (ab * s2 + 1 - ab) * (x - ab.sqrt() * mu)

    def spread(x, tau):
        ab = schedule.at(schedule.alpha_bar, tau, x)
        return s2 * (1 - ab) / (ab * s2 + 1 - ab)

    return denoiser, spread


def affine(schedule, mu, s2, timesteps, eta):
    """-> offset, slope and variance of the map that the sampler then is, level by level with plain floats."""
    ab = schedule.alpha_bar.tolist()
    offset, slope, variance = 0.0, 1.0, 0.0
    for a, b in pairwise([*(ab[tau] for tau in timesteps), 1.0]):
        gain = s2 * math.sqrt(a) / (a * s2 + 1 - a)
        sigma2 = eta**2 * (1 - b) * (b - a) / (b * (1 - a))
        keep = math.sqrt((1 - b - sigma2) / (1 - a))
        k = keep + (math.sqrt(b) - keep * math.sqrt(a)) * gain
        c = (math.sqrt(b) - keep * math.sqrt(a)) * mu * (1 - gain * math.sqrt(a))
        offset, slope, variance = k * offset + c, k * slope, k**2 * variance + sigma2
    return offset, slope, variance


def test_fifty_steps_on_a_gaussian_give_the_known_line():
    schedule = Schedule("sqrt", 1000)
    *_, last = noise.sample(
        gaussian(schedule, 0.7, 0.25)[0], torch.tensor([[0.0], [1.0]], dtype=F64), schedule, timesteps=range(999, -1, -20), eta=0
    )
    assert math.isclose(last[0].item(), 0.6998172036, abs_tol=1e-9)
    assert math.isclose((last[1] - last[0]).item(), 0.3872863392, abs_tol=1e-9)


@pytest.mark.parametrize("name, mu, s2, eta", product(NAMES, (0.7, -2.0), (0.25, 1.7), (0.0, 0.5, 1.0)))
def test_on_a_gaussian_the_whole_sampler_is_a_known_line(name, mu, s2, eta):
    schedule = Schedule(name, 300)
    for timesteps in (range(299, -1, -10), uneven(300, 17), [250, 3]):
        x = torch.tensor([[0.0], [1.0]], dtype=F64)
        walk = list(noise.sample(gaussian(schedule, mu, s2)[0], x, schedule, timesteps=timesteps, eta=eta, noise=silent))
        offset, slope, _ = affine(schedule, mu, s2, timesteps, eta)
        assert len(walk) == len(timesteps)
        assert math.isclose(walk[-1][0].item(), offset, rel_tol=1e-9, abs_tol=1e-10)
        assert math.isclose((walk[-1][1] - walk[-1][0]).item(), slope, rel_tol=1e-8, abs_tol=1e-10)


@pytest.mark.parametrize("eta", (0.5, 1.0))
def test_on_a_gaussian_the_spread_of_the_samples_is_known_too(eta):
    schedule, timesteps, n = Schedule("cosine", 300), uneven(300, 25), 200_000
    x = draw(n, 1)
    *_, last = noise.sample(
        gaussian(schedule, 0.7, 0.25)[0], x, schedule, timesteps=timesteps, eta=eta, generator=torch.Generator().manual_seed(1)
    )
    offset, slope, variance = affine(schedule, 0.7, 0.25, timesteps, eta)
    want = slope**2 + variance
    assert abs(last.mean().item() - offset) < 5 * math.sqrt(want / n)
    assert abs(last.var().item() - want) < 5 * want * math.sqrt(2 / n)


def test_a_full_ancestral_step_is_a_draw_from_the_posterior():
    schedule, x0, x, eps = Schedule("linear", 40), draw(2, 3), draw(2, 3, seed=1), draw(2, 3, seed=2)
    for tau in (39, 20, 1):
        mean, variance = schedule.posterior(x0, x, tau)
        got = next(noise.sample(lambda x, tau: x0, x, schedule, timesteps=[tau, tau - 1], eta=1, noise=lambda x: eps))  # noqa: B023
        torch.testing.assert_close(got, mean + variance.sqrt() * eps, atol=1e-12, rtol=1e-12)


def test_the_sampler_says_what_it_cannot_do():
    schedule, x = Schedule("cosine", 10), draw(2, 3)
    for wrong in ([], [3, 3, 1], [1, 2], [10, 4], [4, -1]):
        with pytest.raises(ValueError, match="decreasing noise levels within 9..0"):
            noise.sample(wobbly, x, schedule, timesteps=wrong)
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"eta lies in 0\.\.1"):
            noise.sample(wobbly, x, schedule, eta=eta)
    with pytest.raises(ValueError, match="linear, cosine, sqrt; got 'cubic'"):
        Schedule("cubic", 10)
    for steps in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match="whole number of steps"):
            Schedule("sqrt", steps)
    for tau in (-1, 10):
        with pytest.raises(ValueError, match=f"0..9; got {tau}"):
            schedule.noise(x, tau, x)
    with pytest.raises(ValueError, match="whole number or a tensor"):
        schedule.noise(x, torch.tensor([0.5, 1.0]), x)
    with pytest.raises(ValueError, match="one tau for all rows or one for each"):
        schedule.noise(draw(4, 3), torch.arange(3), draw(4, 3))
    many = schedule.noise(x[:1], torch.arange(5), x[:1])  # one row at many levels
    assert torch.equal(many[3], schedule.noise(x[:1], 3, x[:1])[0])
    assert torch.equal(schedule.noise(x, torch.tensor([7]), x), schedule.noise(x, 7, x))
    for ask in (schedule.noise, schedule.posterior, schedule.to_x0, schedule.to_eps):
        given = (x, 3, x[:, :2]) if ask == schedule.noise else (x, x[:, :2], 3)
        with pytest.raises(ValueError, match=r"one shape \(b ...\); got .*, 2\)"):
            ask(*given)
    with pytest.raises(ValueError, match="1 to 10 steps"):
        schedule.evenly(11)


def test_levels_evenly_spread_reach_both_ends():
    schedule = Schedule("cosine", 1000)
    for count in (2, 50, 333, 1000):
        taus = schedule.evenly(count)
        gaps = {a - b for a, b in pairwise(taus)}
        assert len(taus) == count and taus[0] == 999 and taus[-1] == 0 and max(gaps) - min(gaps) <= 1


def test_guidance_on_a_gaussian_is_conditioning():
    """x0 ~ N(0, 1), and the condition is a noisy look y = x0 + noise of variance .5: then x0 given x_tau and y is known."""
    schedule, y, r2 = Schedule("cosine", 200), 1.3, 0.5
    plain, spread = gaussian(schedule, 0.0, 1.0)

    def look(x, tau):
        ab = schedule.at(schedule.alpha_bar, tau, x)
        return (-((y - ab.sqrt() * x) ** 2) / (2 * (1 - ab + r2))).sum(-1)  # y given x_tau: mean sqrt(ab) x, variance 1 - ab + r2

    tau, x = torch.tensor([0, 50, 120, 199]), draw(4, 1)
    s2 = spread(x, tau)
    want = (plain(x, tau) / s2 + y / r2) / (1 / s2 + 1 / r2)
    torch.testing.assert_close(noise.guided(plain, look, schedule)(x, tau), want, atol=1e-10, rtol=1e-10)


# --- the bound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, mu, s2", [("sqrt", 0.7, 0.25), ("cosine", -1.5, 0.4), ("linear", 0.3, 2.0)])
def test_on_a_gaussian_the_bound_minus_the_entropy_is_what_noise_has_left(name, mu, s2):
    """All terms are quadratic in x0 and eps here, so a few Gauss-Hermite points give their means exactly."""
    schedule = Schedule(name, 100)
    nodes, weights = quadrature(4)
    x0 = (mu + math.sqrt(s2) * nodes).repeat_interleave(len(nodes))[:, None]
    eps, weight = nodes.repeat(len(nodes))[:, None], torch.outer(weights, weights).flatten()
    denoiser, spread = gaussian(schedule, mu, s2)

    def reconstruction(x, x0):
        mean, variance = denoiser(x, torch.tensor(0)), spread(x, torch.tensor(0))
        return ((x0 - mean) ** 2 / variance + torch.log(2 * math.pi * variance)).sum(-1) / 2

    bound = noise.bound_terms(denoiser, x0, schedule, reconstruction=reconstruction, spread=spread, noise=lambda _: eps)
    entropy = math.log(2 * math.pi * math.e * s2) / 2
    left = schedule.alpha_bar[-1].item()
    m, v = math.sqrt(left) * mu, left * s2 + 1 - left
    assert bound.prior.shape == (16,) and bound.steps.shape == (100, 16) and (bound.steps[0] == 0).all()
    flat = noise.bound_terms(  # the same for numbers without a second axis
        lambda x, tau: denoiser(x[:, None], tau)[:, 0],
        x0[:, 0],
        schedule,
        reconstruction=lambda x, x0: reconstruction(x[:, None], x0[:, None]),
        spread=lambda x, tau: spread(x[:, None], tau)[:, 0],
        noise=lambda _: eps[:, 0],
    )
    torch.testing.assert_close(flat.total, bound.total, atol=1e-12, rtol=0)
    gap = (weight @ bound.total).item() - entropy
    assert math.isclose(gap, (v + m**2 - 1 - math.log(v)) / 2, abs_tol=1e-10), (name, gap)


def test_not_knowing_its_own_spread_costs_the_bound_something():
    schedule = Schedule("cosine", 100)
    denoiser, spread = gaussian(schedule, 0.0, 0.5)
    x0 = math.sqrt(0.5) * draw(2000, 1)
    terms = [
        noise.bound_terms(
            denoiser, x0, schedule, reconstruction=lambda x, x0: 0 * x0[:, 0], spread=s, generator=torch.Generator().manual_seed(0)
        )
        for s in (None, spread)
    ]
    assert terms[0].total.mean() > terms[1].total.mean()
    assert torch.equal(terms[0].prior, terms[1].prior)


def quadrature(n):
    """-> nodes and weights that integrate against the standard normal."""
    import numpy as np

    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(nodes), torch.from_numpy(weights / math.sqrt(2 * math.pi))


def two_symbols(name, steps, p):
    """-> the bound of a world with +1 (probability p) and -1, each level's noise integrated on a grid, and its entropy."""
    schedule = Schedule(name, steps)
    grid = torch.linspace(-9, 9, 1501, dtype=F64)
    weights = torch.exp(-(grid**2) / 2) / torch.exp(-(grid**2) / 2).sum()
    x0, eps = torch.tensor([1.0, -1.0], dtype=F64).repeat_interleave(len(grid))[:, None], grid.repeat(2)[:, None]
    prior = math.log(p / (1 - p))

    def logit(x, tau):  # log p(+1 | x) - log p(-1 | x)
        return prior + 2 * schedule.at(schedule.alpha_bar.sqrt() / (1 - schedule.alpha_bar), tau, x) * x

    bound = noise.bound_terms(
        lambda x, tau: torch.tanh(logit(x, tau) / 2),
        x0,
        schedule,
        reconstruction=lambda x, x0: torch.nn.functional.softplus(-x0 * logit(x, 0)).sum(-1),
        noise=lambda _: eps,
    )
    weight = torch.cat([p * weights, (1 - p) * weights])
    return (weight @ bound.total).item(), -p * math.log(p) - (1 - p) * math.log(1 - p)


@pytest.mark.parametrize("name, steps, p, want", [("sqrt", 200, 0.7, 0.63522046), ("sqrt", 1000, 0.7, 0.61537650)])
def test_two_symbols_have_the_known_bound(name, steps, p, want):
    bound, entropy = two_symbols(name, steps, p)
    assert math.isclose(bound, want, abs_tol=2e-8), bound
    assert math.isclose(entropy, 0.61086430, abs_tol=1e-8)


@pytest.mark.parametrize("name, p", product(NAMES, (0.7, 0.95)))
def test_the_bound_stays_above_the_entropy_and_comes_down_to_it(name, p):
    (coarse, entropy), (fine, _) = two_symbols(name, 100, p), two_symbols(name, 400, p)
    assert entropy < fine < coarse < entropy + 0.08
    assert fine - entropy < 0.4 * (coarse - entropy)


# --- languages small enough to know whole ----------------------------------------------------------------------------


@pytest.mark.parametrize("letters, name, eta", [(3, "sqrt", 1.0), (3, "cosine", 1.0), (4, "linear", 1.0)])
def test_a_markov_language_is_spoken_with_the_right_frequencies(letters, name, eta):
    """Every sentence of three letters can be listed, so the best denoiser is a softmax over all of them."""
    g = torch.Generator().manual_seed(letters)
    first = torch.rand(letters, generator=g, dtype=F64).add(0.1)
    follows = torch.rand(letters, letters, generator=g, dtype=F64).add(0.05)
    first, follows = first / first.sum(), follows / follows.sum(1, keepdim=True)
    sentences = torch.tensor(list(product(range(letters), repeat=3)))
    odds = first[sentences[:, 0]] * follows[sentences[:, 0], sentences[:, 1]] * follows[sentences[:, 1], sentences[:, 2]]
    around = torch.arange(letters, dtype=F64) * 2 * math.pi / letters
    letter = 1.5 * torch.stack([around.cos(), around.sin()], 1)
    book = letter[sentences].flatten(1)  # (sentences, 6)
    schedule, n = Schedule(name, 200), 20_000

    def denoiser(x, tau):
        ab = schedule.at(schedule.alpha_bar, tau, x)
        fit = (ab.sqrt() * x @ book.T - ab * (book**2).sum(1) / 2) / (1 - ab) + odds.log()
        return fit.softmax(-1) @ book

    x = torch.randn(n, 6, dtype=F64, generator=g)
    *_, last = noise.sample(denoiser, x, schedule, eta=eta, generator=g)
    heard = torch.cdist(last, book).argmin(1).bincount(minlength=len(book))
    statistic = ((heard - n * odds) ** 2 / (n * odds)).sum().item()
    assert chi2.sf(statistic, len(book) - 1) > 1e-3, statistic
