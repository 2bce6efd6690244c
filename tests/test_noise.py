"""irann.core.noise against diffusers in float64, against quadrature, and against worlds whose
answers are known in closed form."""

import math
from inspect import unwrap
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from conftest import refuses
from helpers import rng
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from irann.core import noise
from irann.core.noise import Schedule

NAMES = ("linear", "cosine", "sqrt")
F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=rng(seed))


def uneven(steps, count, seed=0):
    """-> strictly decreasing noise levels within steps..1, with gaps of every size."""
    chosen = torch.randperm(steps, generator=rng(seed))[:count]
    return sorted((1 + chosen).tolist(), reverse=True)


# --- schedules ------------------------------------------------------------------------------------

TABLE = {  # beta_1, alpha_bar at 500 and 1000, posterior variance at 500; from the papers
    "linear": (1e-4, 7.8587242882e-2, 4.0358297654e-5, 1.0031355415e-2),
    "cosine": (4.1284224822e-5, 4.9384359044e-1, 2.4287669070e-9, 3.1361999041e-3),
    "sqrt": (2.3400250408e-2, 2.9578031482e-1, 4.5464777332e-7, 2.4074962267e-3),
}


@pytest.mark.parametrize("name", NAMES)
def test_schedules_hold_the_published_numbers(name):
    schedule = Schedule(name, 1000)
    _, variance = schedule.posterior(draw(1), draw(1), 500)
    alpha_bar = schedule.at(schedule.alpha_bar, torch.tensor([500, 1000]), draw(2))
    assert {schedule.betas.dtype, schedule.alpha_bar.dtype, schedule.snr.dtype} == {F64}
    for got, want in zip([schedule.betas[0], *alpha_bar, variance], TABLE[name], strict=True):
        assert math.isclose(float(got), want, rel_tol=1e-9), (name, float(got), want)
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    torch.testing.assert_close(schedule.snr, snr, atol=0, rtol=1e-12)


def test_a_step_that_adds_nothing_draws_nothing():
    """So that DDIM spends no random numbers, and a seed means the same at any number of steps."""
    x0, x = draw(3), draw(3)
    moved = noise.step(x0, x, 0.3, 0.6, eta=0.0, noise=lambda _: pytest.fail("drawn"))
    eps = (x - math.sqrt(0.3) * x0) / math.sqrt(0.7)
    torch.testing.assert_close(moved, math.sqrt(0.6) * x0 + math.sqrt(0.4) * eps)


@pytest.mark.parametrize("name, steps", product(NAMES, (1, 7, 50, 200, 1000)))
def test_signal_falls_at_every_step_and_never_to_nothing(name, steps):
    schedule = Schedule(name, steps)
    assert len(schedule.betas) == len(schedule.alpha_bar) == len(schedule.snr) == steps
    assert ((schedule.betas > 0) & (schedule.betas <= 0.999)).all()
    assert (schedule.alpha_bar.diff() < 0).all() and 0 < schedule.alpha_bar[-1] < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_one_jump_equals_many_single_steps(name):
    """Mean and variance of x_tau, along x_tau = sqrt(1 - beta) x_{tau-1} + sqrt(beta) eps."""
    schedule = Schedule(name, 60)
    zero, one = torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)
    mean, variance = 1.0, 0.0
    for tau, beta in enumerate(schedule.betas.tolist(), start=1):
        mean *= math.sqrt(1 - beta)
        variance = variance * (1 - beta) + beta
        assert math.isclose(schedule.noise(one, tau, zero).item(), mean, rel_tol=1e-12)
        assert math.isclose(schedule.noise(zero, tau, one).item() ** 2, variance, rel_tol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_posterior_is_bayes_rule(name):
    """q(x_{tau-1} | x_tau, x0) as the product of two Gaussians in x_{tau-1}, in precisions only."""
    schedule, x0, x = Schedule(name, 50), draw(50, 3), draw(50, 3, seed=1)
    mean, variance = schedule.posterior(x0, x, torch.arange(1, 51))
    for row in range(1, 50):  # row i is level i + 1
        beta, previous = schedule.betas[row], schedule.alpha_bar[row - 1]
        precision = 1 / (1 - previous) + (1 - beta) / beta
        weighted = previous.sqrt() * x0[row] / (1 - previous) + (1 - beta).sqrt() * x[row] / beta
        torch.testing.assert_close(variance[row].squeeze(), 1 / precision, rtol=1e-10, atol=0)
        torch.testing.assert_close(mean[row], weighted / precision, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(mean[0], x0[0], atol=1e-14, rtol=0)
    assert variance[0] == 0


def test_noising_is_the_formula_and_the_same_for_each_row_alone():
    schedule, x0, eps = Schedule("cosine", 100), draw(4, 5, 2), draw(4, 5, 2, seed=1)
    tau = torch.tensor([1, 18, 61, 100])
    x = schedule.noise(x0, tau, eps)
    signal = schedule.alpha_bar[tau - 1].view(4, 1, 1)
    wanted = signal.sqrt() * x0 + (1 - signal).sqrt() * eps
    torch.testing.assert_close(x, wanted, atol=1e-14, rtol=0)
    for i in range(4):
        alone = schedule.noise(x0[i : i + 1], int(tau[i]), eps[i : i + 1])
        assert torch.equal(alone[0], x[i])
    many = schedule.noise(x0[:1], torch.arange(1, 6), eps[:1])  # one row at many levels
    assert torch.equal(many[2], schedule.noise(x0[:1], 3, eps[:1])[0])
    assert torch.equal(schedule.noise(x0, torch.tensor([7]), eps), schedule.noise(x0, 7, eps))
    assert torch.equal(schedule.noise(x0, tau.to(torch.uint8), eps), schedule.noise(x0, tau, eps))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_dtype_of_x_is_kept(dtype):
    schedule, x = Schedule("sqrt", 20), draw(2, 3).to(dtype)
    g = rng(0)
    results = [
        *schedule.posterior(x, x, 4),
        *noise.sample(lambda x, tau: 0.5 * x, x, schedule, generator=g),
        schedule.noise(x, 4, x),
        noise.step_kl(schedule, x, 0.5 * x, 4),
        noise.prior_kl(schedule, x),
    ]
    assert {result.dtype for result in results} == {dtype}


# --- the sampler ----------------------------------------------------------------------------------


def wobbly(x, tau):
    """A denoiser with no meaning that depends on all its inputs."""
    return torch.tanh(1.3 * x + tau.reshape(-1, 1) / 70.0) * 0.9 + 0.05


def promoted(kind, schedule):
    """-> a scheduler of diffusers with our betas, in float64. Its levels are 0 .. T - 1."""
    import diffusers  # takes long

    betas = schedule.betas
    how = dict(trained_betas=betas.tolist(), prediction_type="sample", clip_sample=False)
    theirs = getattr(diffusers, kind)(len(betas), **how)
    theirs.betas = betas.clone()
    theirs.alphas = 1 - betas
    theirs.alphas_cumprod = theirs.alphas.cumprod(0)
    theirs.one = torch.tensor(1.0, dtype=F64)
    if hasattr(theirs, "final_alpha_cumprod"):
        theirs.final_alpha_cumprod = theirs.one
    return theirs


@pytest.mark.parametrize("name, count", product(NAMES, (100, 20)))
def test_ancestral_sampling_equals_diffusers_ddpm(name, count):
    schedule = Schedule(name, 100)
    theirs = promoted("DDPMScheduler", schedule)
    theirs.set_timesteps(count)
    levels = (theirs.timesteps + 1).tolist()
    x = draw(3, 4)
    g, g2 = rng(5), rng(5)
    ours = noise.sample(wobbly, x, schedule, timesteps=levels, eta=1, generator=g)
    for tau, got in zip(theirs.timesteps, ours, strict=True):
        x = theirs.step(wobbly(x, tau.expand(3) + 1), tau, x, generator=g2).prev_sample
        torch.testing.assert_close(got, x, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name, eta", product(NAMES, (0.0, 0.5, 1.0)))
def test_ddim_equals_diffusers_ddim(name, eta):
    schedule = Schedule(name, 100)
    theirs = promoted("DDIMScheduler", schedule)
    theirs.set_timesteps(10)
    levels = (theirs.timesteps + 1).tolist()
    draws = [draw(3, 4, seed=9 + i) for i in range(10)]
    queue = iter(draws)
    x = draw(3, 4)
    ours = noise.sample(wobbly, x, schedule, timesteps=levels, eta=eta, noise=lambda x: next(queue))
    for tau, got, eps in zip(theirs.timesteps, ours, draws, strict=True):
        guess = wobbly(x, tau.expand(3) + 1)
        x = theirs.step(guess, tau, x, eta=eta, variance_noise=eps).prev_sample
        torch.testing.assert_close(got, x, atol=1e-11, rtol=1e-11)


def gaussian(schedule, mu, s2):
    """-> the best denoiser of data drawn from N(mu, s2), and the variance of x0 given x_tau."""

    def denoiser(x, tau):
        ab = schedule.at(schedule.alpha_bar, tau, x)
        return mu + s2 * ab.sqrt() / (ab * s2 + 1 - ab) * (x - ab.sqrt() * mu)

    def variance(x, tau):
        ab = schedule.at(schedule.alpha_bar, tau, x)
        return s2 * (1 - ab) / (ab * s2 + 1 - ab)

    return denoiser, variance


def affine(schedule, mu, s2, timesteps, eta):
    """-> offset, slope and variance of the map that the sampler then is, in plain floats."""
    ab = [1.0, *schedule.alpha_bar.tolist()]
    offset, slope, variance = 0.0, 1.0, 0.0
    for a, b in pairwise(ab[tau] for tau in [*timesteps, 0]):
        gain = s2 * math.sqrt(a) / (a * s2 + 1 - a)
        sigma2 = eta**2 * (1 - b) * (b - a) / (b * (1 - a))
        keep = math.sqrt((1 - b - sigma2) / (1 - a))
        k = keep + (math.sqrt(b) - keep * math.sqrt(a)) * gain
        c = (math.sqrt(b) - keep * math.sqrt(a)) * mu * (1 - gain * math.sqrt(a))
        offset, slope, variance = k * offset + c, k * slope, k**2 * variance + sigma2
    return offset, slope, variance


def line(schedule, mu, s2, timesteps, eta):
    """-> offset and slope of the sampler itself, without noise; and the steps that it took."""
    x = torch.tensor([[0.0], [1.0]], dtype=F64)
    denoiser, _ = gaussian(schedule, mu, s2)
    how = dict(timesteps=timesteps, eta=eta, noise=torch.zeros_like)
    walk = list(noise.sample(denoiser, x, schedule, **how))
    return walk[-1][0].item(), (walk[-1][1] - walk[-1][0]).item(), len(walk)


def test_fifty_steps_on_a_gaussian_give_the_known_line():
    offset, slope, _ = line(Schedule("sqrt", 1000), 0.7, 0.25, range(1000, 0, -20), 0)
    assert math.isclose(offset, 0.6998172036, abs_tol=1e-9)
    assert math.isclose(slope, 0.3872863392, abs_tol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.floats(-3, 3),
    st.floats(0.1, 3),
    st.floats(0, 1),
    st.sets(st.integers(1, 300), min_size=1, max_size=40),
)
def test_on_a_gaussian_the_sampler_is_a_known_line(name, mu, s2, eta, levels):
    """Whatever the levels, T among them or not, 1 among them or not."""
    schedule, timesteps = Schedule(name, 300), sorted(levels, reverse=True)
    want_offset, want_slope, _ = affine(schedule, mu, s2, timesteps, eta)
    offset, slope, count = line(schedule, mu, s2, timesteps, eta)
    assert count == len(levels)
    assert math.isclose(offset, want_offset, rel_tol=1e-8, abs_tol=1e-9)
    assert math.isclose(slope, want_slope, rel_tol=1e-7, abs_tol=1e-9)


@pytest.mark.parametrize("eta", (0.5, 1.0))
def test_on_a_gaussian_the_variance_of_the_samples_is_known_too(eta):
    schedule, timesteps, n = Schedule("cosine", 300), uneven(300, 25), 200_000
    g = rng(1)
    denoiser, _ = gaussian(schedule, 0.7, 0.25)
    how = dict(timesteps=timesteps, eta=eta, generator=g)
    *_, last = noise.sample(denoiser, draw(n, 1), schedule, **how)
    offset, slope, variance = affine(schedule, 0.7, 0.25, timesteps, eta)
    want = slope**2 + variance
    assert abs(last.mean().item() - offset) < 5 * math.sqrt(want / n)
    assert abs(last.var().item() - want) < 5 * want * math.sqrt(2 / n)


@pytest.mark.parametrize("tau", [40, 21, 2])
def test_a_full_ancestral_step_is_a_draw_from_the_posterior(tau):
    schedule = Schedule("linear", 40)
    x0, x, eps = (draw(2, 3, seed=i) for i in range(3))
    mean, variance = schedule.posterior(x0, x, tau)
    how = dict(timesteps=[tau, tau - 1], eta=1, noise=lambda x: eps)
    got = next(noise.sample(lambda x, tau: x0, x, schedule, **how))
    torch.testing.assert_close(got, mean + variance.sqrt() * eps, atol=1e-12, rtol=1e-12)


def test_the_denoiser_is_asked_at_every_level_once_from_T_down_to_1():
    asked = []

    def denoiser(x, tau):
        asked.append(tau.tolist())
        return 0 * x

    *_, last = noise.sample(denoiser, draw(2, 3), Schedule("linear", 5), eta=0)
    assert asked == [[tau, tau] for tau in (5, 4, 3, 2, 1)] and (last == 0).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, 12), max_size=5))
def test_timesteps_that_do_not_decrease_within_T_to_1_are_refused(levels):
    schedule = Schedule("cosine", 10)
    if (
        levels
        and sorted(set(levels), reverse=True) == levels
        and 1 <= levels[-1] <= levels[0] <= 10
    ):
        assert len(list(noise.sample(wobbly, draw(2, 3), schedule, timesteps=levels))) == len(
            levels
        )
    else:
        with refuses(r"decreasing noise levels within 10\.\.1"):
            noise.sample(wobbly, draw(2, 3), schedule, timesteps=levels)


def test_what_makes_no_sense_is_named():
    schedule, x = Schedule("cosine", 10), draw(2, 3)
    with refuses(r"within 10\.\.1"):
        noise.sample(wobbly, x, schedule, timesteps=[3.5, 1])
    for eta in (-0.1, 1.1, math.nan):
        with refuses(r"eta lies in 0\.\.1"):
            noise.sample(wobbly, x, schedule, eta=eta)
    with refuses("linear, cosine, sqrt; got 'cubic'"):
        Schedule("cubic", 10)
    for steps in (0, -3, 2.5, True):
        with refuses("whole number of steps"):
            Schedule("sqrt", steps)
    for tau in (0, 11):
        with refuses(rf"1\.\.10; got {tau}"):
            schedule.noise(x, tau, x)
    for tau in (torch.tensor([0.5, 1.0]), torch.ones(2, 1, dtype=torch.long)):
        with refuses("whole number or a tensor"):
            schedule.noise(x, tau, x)
    with pytest.raises(ValueError, match="real numbers; got torch.int64"):
        unwrap(Schedule.at)(schedule, schedule.betas, 1, x.long())  # without the type checker
    with refuses("one tau for all rows or one for each"):
        schedule.noise(draw(4, 3), torch.arange(1, 4), draw(4, 3))
    for ask in (schedule.noise, schedule.posterior):
        inputs = (x, 3, x[:, :2]) if ask == schedule.noise else (x, x[:, :2], 3)
        with refuses(r"one shape \(b ...\); got .*, 2\)"):
            ask(*inputs)
    for count in (0, 11):
        with refuses("1 to 10 steps"):
            schedule.evenly(count)


def test_levels_inside_vmap_are_those_outside_and_none_is_taken_for_another():
    schedule, x, tau = Schedule("cosine", 10), draw(3, 2), torch.tensor([1, 5, 10])
    noise_rows = torch.func.vmap(schedule.noise)
    assert torch.equal(noise_rows(x, tau, x), schedule.noise(x, tau, x))
    for shift in (-1, 1):
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            noise_rows(x, tau + shift, x)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(2, 1000))
def test_levels_evenly_spaced_reach_both_ends(data, steps):
    count = data.draw(st.integers(2, steps))
    levels = Schedule("linear", steps).evenly(count)
    gaps = {high - low for high, low in pairwise(levels)}
    assert len(levels) == count and levels[0] == steps and levels[-1] == 1
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1
    assert Schedule("linear", steps).evenly(1) == [steps]


def test_guidance_on_a_gaussian_is_conditioning():
    """x0 ~ N(0, 1), and the condition is y = x0 + noise of variance .5: x0 given both is known."""
    schedule, y, r2 = Schedule("cosine", 200), 1.3, 0.5
    plain, variance = gaussian(schedule, 0.0, 1.0)

    def condition(x, tau):  # y given x_tau has mean sqrt(ab) x and variance 1 - ab + r2
        ab = schedule.at(schedule.alpha_bar, tau, x)
        return (-((y - ab.sqrt() * x) ** 2) / (2 * (1 - ab + r2))).sum(-1)

    tau, x = torch.tensor([1, 51, 121, 200]), draw(4, 1)
    s2 = variance(x, tau)
    want = (plain(x, tau) / s2 + y / r2) / (1 / s2 + 1 / r2)
    got = noise.guided(plain, condition, schedule)(x, tau)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    further = noise.guided(plain, condition, schedule, 3)(x, tau)
    torch.testing.assert_close(further - plain(x, tau), 3 * (got - plain(x, tau)))


# --- the bound ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, mu, s2", [("sqrt", 0.7, 0.25), ("cosine", -1.5, 0.4), ("linear", 0.3, 2.0)]
)
def test_on_a_gaussian_the_bound_minus_the_entropy_is_the_signal_that_is_left_at_T(name, mu, s2):
    """All terms are quadratic in x0 and eps, so a few Gauss-Hermite points give their means."""
    schedule = Schedule(name, 100)
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    nodes, weights = torch.from_numpy(nodes), torch.from_numpy(weights / math.sqrt(2 * math.pi))
    x0 = (mu + math.sqrt(s2) * nodes).repeat_interleave(4)[:, None]
    eps, weight = nodes.repeat(4)[:, None], torch.outer(weights, weights).flatten()
    denoiser, variance = gaussian(schedule, mu, s2)

    def reconstruction(x, x0):
        mean, var = denoiser(x, torch.tensor(1)), variance(x, torch.tensor(1))
        return ((x0 - mean) ** 2 / var + torch.log(2 * math.pi * var)).sum(-1) / 2

    how = dict(reconstruction=reconstruction, variance=variance, noise=lambda _: eps)
    bound = noise.bound_terms(denoiser, x0, schedule, **how)
    assert bound.prior.shape == (16,) and bound.steps.shape == (100, 16)
    assert (bound.steps[0] == 0).all()
    flat = noise.bound_terms(  # the same for numbers without a second axis
        lambda x, tau: denoiser(x[:, None], tau)[:, 0],
        x0[:, 0],
        schedule,
        reconstruction=lambda x, x0: reconstruction(x[:, None], x0[:, None]),
        variance=lambda x, tau: variance(x[:, None], tau)[:, 0],
        noise=lambda _: eps[:, 0],
    )
    torch.testing.assert_close(flat.total, bound.total, atol=1e-12, rtol=0)
    ab = schedule.alpha_bar[-1].item()
    m, v = math.sqrt(ab) * mu, ab * s2 + 1 - ab
    gap = (weight @ bound.total).item() - math.log(2 * math.pi * math.e * s2) / 2
    assert math.isclose(gap, (v + m**2 - 1 - math.log(v)) / 2, abs_tol=1e-10), (name, gap)


def test_not_knowing_its_own_variance_costs_the_bound_something():
    schedule = Schedule("cosine", 100)
    denoiser, variance = gaussian(schedule, 0.0, 0.5)
    x0 = math.sqrt(0.5) * draw(2000, 1)

    def bound(**how):
        how |= dict(reconstruction=lambda x, x0: 0 * x0[:, 0])
        g = rng(0)
        return noise.bound_terms(denoiser, x0, schedule, generator=g, **how)

    assert bound().total.mean() > bound(variance=variance).total.mean()
    assert torch.equal(bound().prior, bound(variance=variance).prior)


def test_the_same_generator_gives_the_same_bound():
    schedule = Schedule("cosine", 100)
    denoiser, _ = gaussian(schedule, 0.0, 0.5)

    def total(seed):
        g = rng(seed)
        how = dict(reconstruction=lambda x, x0: 0 * x0[:, 0], generator=g)
        return noise.bound_terms(denoiser, draw(20, 1), schedule, **how).total

    before = torch.get_rng_state()
    assert torch.equal(total(3), total(3)) and not torch.equal(total(3), total(4))
    assert torch.equal(torch.get_rng_state(), before)


def two_symbols(name, steps, p):
    """-> the bound of a world with +1 (probability p) and -1, each level's noise integrated on a
    grid, and its entropy."""
    schedule = Schedule(name, steps)
    grid = torch.linspace(-9, 9, 1501, dtype=F64)
    weights = torch.exp(-(grid**2) / 2) / torch.exp(-(grid**2) / 2).sum()
    x0 = torch.tensor([1.0, -1.0], dtype=F64).repeat_interleave(len(grid))[:, None]
    table = schedule.alpha_bar.sqrt() / (1 - schedule.alpha_bar)

    def logit(x, tau):  # log p(+1 | x) - log p(-1 | x)
        return math.log(p / (1 - p)) + 2 * schedule.at(table, tau, x) * x

    bound = noise.bound_terms(
        lambda x, tau: torch.tanh(logit(x, tau) / 2),
        x0,
        schedule,
        reconstruction=lambda x, x0: torch.nn.functional.softplus(-x0 * logit(x, 1)).sum(-1),
        noise=lambda _: grid.repeat(2)[:, None],
    )
    weight = torch.cat([p * weights, (1 - p) * weights])
    return (weight @ bound.total).item(), -p * math.log(p) - (1 - p) * math.log(1 - p)


@pytest.mark.parametrize("steps, want", [(200, 0.63522046), (1000, 0.61537650)])
def test_two_symbols_have_the_known_bound(steps, want):
    bound, entropy = two_symbols("sqrt", steps, 0.7)
    assert math.isclose(bound, want, abs_tol=2e-8), bound
    assert math.isclose(entropy, 0.61086430, abs_tol=1e-8)


@pytest.mark.parametrize("name, p", product(NAMES, (0.7, 0.95)))
def test_the_bound_stays_above_the_entropy_and_comes_down_to_it(name, p):
    (coarse, entropy), (fine, _) = two_symbols(name, 100, p), two_symbols(name, 400, p)
    assert entropy < fine < coarse < entropy + 0.08
    assert fine - entropy < 0.4 * (coarse - entropy)


# --- languages small enough to know whole ---------------------------------------------------------


@pytest.mark.parametrize("letters, name", [(3, "sqrt"), (3, "cosine"), (3, "linear")])
def test_a_markov_language_is_spoken_with_the_right_frequencies(letters, name, unchecked):
    """Every sentence of three letters can be listed: the best denoiser is a softmax over all."""
    g = rng(letters)
    first = torch.rand(letters, generator=g, dtype=F64).add(0.1)
    follows = torch.rand(letters, letters, generator=g, dtype=F64).add(0.05)
    first, follows = first / first.sum(), follows / follows.sum(1, keepdim=True)
    sentences = torch.tensor(list(product(range(letters), repeat=3)))
    i, j, k = sentences.T
    p = first[i] * follows[i, j] * follows[j, k]
    angle = torch.arange(letters, dtype=F64) * 2 * math.pi / letters
    embeddings = 1.5 * torch.stack([angle.cos(), angle.sin()], 1)
    points = embeddings[sentences].flatten(1)  # (sentences, 6)
    schedule, n = Schedule(name, 200), 20_000

    def denoiser(x, tau):
        ab = schedule.at(schedule.alpha_bar, tau, x)
        fit = (ab.sqrt() * x @ points.T - ab * (points**2).sum(1) / 2) / (1 - ab) + p.log()
        return fit.softmax(-1) @ points

    x = torch.randn(n, 6, dtype=F64, generator=g)
    *_, last = noise.sample(denoiser, x, schedule, generator=g)
    counts = torch.cdist(last, points).argmin(1).bincount(minlength=len(points))
    statistic = ((counts - n * p) ** 2 / (n * p)).sum().item()
    assert chi2.sf(statistic, len(points) - 1) > 1e-3, statistic


@pytest.mark.parametrize("tau", [2, 7, 20])
def test_a_step_that_is_unsure_of_x0_costs_the_kl_between_the_two_gaussians(tau):
    schedule = Schedule("cosine", 20)
    x0, guess, x_tau, variance = torch.rand(4, 50, dtype=F64, generator=rng(0))
    mean_q, variance_q = schedule.posterior(x0, x_tau, tau)
    mean_p, _ = schedule.posterior(guess, x_tau, tau)
    coefficient = schedule.posterior_x0[tau - 1]  # of x0 in the mean
    q = torch.distributions.Normal(mean_q, variance_q.sqrt())
    p = torch.distributions.Normal(mean_p, (variance_q + coefficient**2 * variance).sqrt())
    expected = torch.distributions.kl_divergence(q, p)
    found = noise.step_kl(schedule, x0, guess, tau, variance=variance)
    torch.testing.assert_close(found, expected)


def test_what_a_guide_returns_has_no_gradient():
    x = torch.zeros(2, 3, dtype=F64)
    guide = noise.guided(lambda x, tau: x, lambda x, tau: x.sum(-1), Schedule("cosine", 9))
    assert not guide(x, torch.tensor([1, 2])).requires_grad and not x.requires_grad


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_even_the_least_noise_is_exact_whatever_the_dtype(kind):
    schedule, one = Schedule("cosine", 1000), torch.ones(1, 1)
    for tau in (1, 2, 30, 1000):
        wanted = schedule.noise(0 * one.double(), tau, one.double()).item()
        got = schedule.noise((0 * one).to(kind), tau, one.to(kind)).item()
        assert got == pytest.approx(wanted, rel=torch.finfo(kind).eps)
