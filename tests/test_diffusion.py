"""irann.models.diffusion: what its network sees, what its bound is worth, and what its drafts
promise.
"""

import math
from functools import lru_cache
from inspect import unwrap

import pytest
import torch
from conftest import excite, refuses
from helpers import rng
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from irann import lm
from irann.core import noise
from irann.models import denoiser
from irann.models.diffusion import Diffusion, DiffusionConfig
from irann.settings import InputError
from irann.text import Vocabulary

TINY = {
    "vocabulary": 7,
    "window": 16,
    "page": 8,
    "layers": 1,
    "width": 16,
    "channels": 4,
    "levels": 100,
}


def tiny(*, excited=True, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    model = Diffusion(DiffusionConfig(**TINY | changes))
    if excited:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(0.6 * torch.randn_like(p))
    return model.to(dtype).eval()


def text(b, t, v=7, seed=1):
    return torch.randint(v, (b, t), generator=rng(seed))


# --- the embeddings and what a position says about itself ---


def test_embeddings_lie_on_a_sphere_whatever_the_weights():
    torch.testing.assert_close(tiny().embeddings.norm(dim=-1), torch.full((7,), 2.0).double())


def test_what_a_position_says_alone_is_bayes_rule_on_gaussians():
    model, ids = tiny(), text(2, 5)
    tau = torch.tensor([70, 20])
    x = model.schedule.noise(
        model.embeddings[ids], tau, torch.randn(2, 5, 4, dtype=torch.float64, generator=rng())
    )
    ab = model.schedule.alpha_bar[tau - 1]
    centre = ab.sqrt()[:, None, None, None] * model.embeddings
    deviation = (1 - ab).sqrt()[:, None, None, None].expand(2, 5, 7, 4)
    density = (
        torch.distributions.Normal(centre.expand(2, 5, 7, 4), deviation)
        .log_prob(x[:, :, None])
        .sum(-1)
    )
    torch.testing.assert_close(
        model.log_likelihood(x, tau).softmax(-1), density.softmax(-1), atol=1e-12, rtol=0
    )


def test_an_untrained_network_answers_with_bayes_rule_alone():
    model, ids = tiny(excited=False), text(2, 16)
    tau, x = torch.tensor([50, 80]), torch.randn(2, 16, 4, dtype=torch.float64, generator=rng())
    mask = torch.ones(2, 16, dtype=torch.bool)
    torch.testing.assert_close(model(x, tau, ids, mask), model.log_likelihood(x, tau))
    assert not tiny(excited=False, bayes=False)(x, tau, ids, mask).any()


def test_every_position_sees_both_sides_and_the_noise_level():
    model, ids = (
        tiny(neighbours=0, bayes=False),
        text(1, 9),
    )  # without Bayes: the network itself must see and know
    mask, tau = torch.ones(1, 9, dtype=torch.bool), torch.tensor([60])
    x = torch.randn(1, 9, 4, dtype=torch.float64, generator=rng())
    before = model(x, tau, ids, mask)
    for position in (0, 8):
        other = x.clone()
        other[:, position] += 1
        assert ((model(other, tau, ids, mask) - before).abs().amax(-1) > 1e-6).all(), position
    assert ((model(x, tau + 5, ids, mask) - before).abs() > 1e-6).all()
    turned = model(x[:, [0, *range(8, 0, -1)]], tau, ids, mask)  # the same in another order
    assert ((turned - before)[:, 0].abs() > 1e-6).all()


def test_what_is_known_is_shown_as_certain_and_what_is_masked_as_far_as_it_is_known():
    model, ids, shown = tiny(neighbours=0), text(1, 5), []
    model.input_proj.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0][0]))
    mask = torch.tensor([False, True, True, False, True])[:, None]
    x, hint = (torch.randn(1, 5, c, dtype=torch.float64, generator=rng()) for c in (4, 7))
    model(x, torch.tensor([60]), ids, mask.T, hint)
    point, posterior, guess = shown[0].split([4, 7, 7], -1)
    torch.testing.assert_close(point, torch.where(mask, x[0], model.embeddings[ids[0]]))
    certain = F.one_hot(ids[0], 7).double()
    for part, own in ((posterior, model.log_likelihood(x, 60)[0].softmax(-1)), (guess, hint[0])):
        torch.testing.assert_close(part, math.sqrt(7) * torch.where(mask, own, certain))


def test_clean_positions_ignore_the_noise_and_masked_ones_ignore_the_answer():
    model, ids = tiny(), text(2, 9)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[:, 3:6] = True
    tau, x = torch.tensor([60, 30]), torch.randn(2, 9, 4, dtype=torch.float64, generator=rng())
    hint = torch.rand(2, 9, 7, dtype=torch.float64, generator=rng(1)).softmax(-1)
    before = model(x, tau, ids, mask, hint)
    noisier, wrong, strange = x.clone(), ids.clone(), hint.clone()
    noisier[~mask] = 9.0
    strange[~mask] = 0.5
    wrong[mask] = (wrong[mask] + 1) % 7
    assert torch.equal(model(noisier, tau, wrong, mask, strange)[mask], before[mask])
    assert torch.equal(model(x, tau, ids, mask), model(x, tau, ids, mask, torch.zeros_like(hint)))


def test_neighbours_come_side_by_side():
    x = torch.arange(1.0, 5).view(1, 4, 1)
    assert denoiser.neighbourhood(x, 1)[0].tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 0]]
    assert torch.equal(denoiser.neighbourhood(x, 0), x)


def test_a_noise_level_is_shown_as_sines_and_cosines_from_slow_to_fast():
    level = torch.tensor([0.0, 2.0], dtype=torch.float64)[:, None]
    sine, cosine = denoiser.sinusoids(level).chunk(2, -1)
    assert not sine[0].any() and (cosine[0] == 1).all()
    torch.testing.assert_close(sine**2 + cosine**2, torch.ones_like(sine))
    angles = 2 * 10 ** (-1.5 + 2 * torch.arange(16, dtype=torch.float64) / 15)
    torch.testing.assert_close(
        torch.stack([sine[1], cosine[1]]), torch.stack([angles.sin(), angles.cos()])
    )


def test_the_network_is_told_the_logarithm_of_the_signal_to_noise_ratio(monkeypatch):
    model, told = tiny(), []
    sinusoids = denoiser.sinusoids
    monkeypatch.setattr(denoiser, "sinusoids", lambda level: told.append(level) or sinusoids(level))
    mask = torch.ones(1, 9, dtype=torch.bool)
    model(torch.zeros(1, 9, 4, dtype=torch.float64), torch.tensor([60]), text(1, 9), mask)
    alpha_bar = model.schedule.alpha_bar[59]
    assert told[0].unique().item() == pytest.approx(math.log(alpha_bar / (1 - alpha_bar)))


def test_some_text_is_masked_in_every_row_and_the_first_position_never():
    torch.manual_seed(0)
    for length in (2, 3, 17):
        mask = denoiser.draw_mask(4000, length)
        assert not mask[:, 0].any() and mask.any(1).all()
        runs = (mask[:, 1:] & ~mask[:, :-1]).sum(1)
        assert (runs == 1).all()
    ends_masked = (
        mask[:, -1].double().mean()
    )  # all rows but most of the quarter that masks a stretch between two positions
    assert 0.75 < ends_masked < 0.85


# --- noise levels
# --------------------------------------------------------------------------------------------------


def test_levels_are_drawn_as_often_as_their_probabilities_say_and_gather_where_the_loss_rises():
    model = tiny(levels=200)
    model.level_loss.copy_(torch.sigmoid(torch.linspace(-20, 20, 50)))
    p = model.level_probabilities()
    assert p.dtype == torch.float64 and math.isclose(p.sum(), 1, abs_tol=1e-12)
    assert p[0] == 0 and (p[1:] > 0).all() and p[80:120].sum() > 0.8
    tau, given_p = model.draw_levels(100_000, rng())
    seen = (tau - 1).bincount(minlength=200) / len(tau)
    # One draw from each slice of probability: far closer than chance.
    assert (seen - p).abs().max() < 1e-4 and tau.min() >= 2 and tau.max() <= 200
    torch.testing.assert_close(given_p, p[tau - 1])
    # And the strides are small where many are drawn.
    assert sum(80 < tau <= 120 for tau in model.timesteps(20)) >= 15


def test_the_loss_of_each_level_is_remembered_once_per_step():
    model = tiny(levels=100)
    tau = torch.arange(2, 101)
    nll = 3.0 * (tau > 61)
    for _ in range(500):
        model._observe(tau, nll)
        model.absorb()
    assert (model.level_loss[:30] == 0).all() and (model.level_loss[31:] > 2.9).all()
    before = model.level_loss.clone()
    model.absorb()
    assert torch.equal(model.level_loss, before), "nothing was observed since"
    assert tiny(adaptive=False).level_probabilities()[1:].diff().abs().max() < 1e-12


def test_what_is_remembered_of_a_level_is_a_mean_that_forgets_slowly():
    model, dark = tiny(), torch.tensor([100])
    for seen, remembered in ((3.0, 3.0), (1.0, 2.0), *[(2.0, 2.0)] * 98, (7.0, 2.1)):
        model._observe(dark, torch.tensor([seen]))
        model.absorb()
        assert model.level_loss[-1].item() == pytest.approx(remembered)
    count = model.level_count.clone()
    for broken in (torch.nan, torch.inf):
        model._observe(dark, torch.tensor([broken]))
        model.absorb()
    assert model.level_loss[-1].item() == pytest.approx(2.1)
    assert torch.equal(model.level_count, count)


def test_levels_are_visited_by_the_smoothed_rise_of_the_loss_and_a_fall_takes_nothing_back():
    model = tiny()
    model.level_loss.copy_(torch.tensor([0.0] * 20 + [1.0] * 10 + [0.0] * 5 + [1.0] * 15))
    wanted = torch.full((100,), 0.1 / 100).double()
    wanted[2 * 18 : 2 * 23] += 0.9 / 10  # a step up, smoothed over five bins of two levels
    wanted[0] = 0
    torch.testing.assert_close(model.level_probabilities(), wanted / wanted.sum())


@pytest.mark.parametrize("steps", (1, 2, 7, 64, 100))
def test_timesteps_fall_from_the_darkest_level(steps):
    model = tiny()
    for curve in (torch.linspace(0, 1, 50), (torch.arange(50) > 10).float(), torch.zeros(50)):
        model.level_loss.copy_(curve)
        taus = model.timesteps(steps)
        assert len(taus) == steps and taus[0] == 100 and taus[-1] >= 1
        assert all(a > b for a, b in zip(taus, taus[1:], strict=False))
    # the middle of each quarter of the levels 2 to 100, but begun at the last
    assert tiny(adaptive=False).timesteps(4) == [100, 63, 39, 14]


# --- the loss and the bound
# --------------------------------------------------------------------------------------------


def test_the_loss_is_cross_entropy_of_masked_text_plus_rounding_and_reaches_every_weight():
    model = tiny(dtype=torch.float32).train()
    loss, parts = model.loss(text(8, 17))
    assert set(parts) == {"cross_entropy", "rounding", "mse", "bound_nats_per_char"}
    torch.testing.assert_close(loss.detach(), parts["cross_entropy"] + parts["rounding"])
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert not any(part.requires_grad for part in parts.values())


def test_the_error_that_is_reported_is_the_guess_s_distance_from_the_clean_point():
    model, ids = tiny(), text(8, 17)
    draws = model.draw(ids, generator=rng())
    model.forward = lambda x, tau, ids, mask, previous_guess=None: 99.0 * F.one_hot(ids, 7).double()
    with torch.no_grad():
        model.word_embedding.mul_(0.05).add_(1)  # close together: rounding costs something
    parts = model.loss(ids, draws)[1]
    assert parts["mse"] < 1e-12 and parts["rounding"] > 1e-3
    prior = noise.prior_kl(model.schedule, model.embeddings[ids]).sum(-1)
    bound = prior[draws["mask"]].mean() + parts["rounding"]  # all that a perfect guess costs
    torch.testing.assert_close(parts["bound_nats_per_char"], bound)
    model.forward = lambda x, tau, ids, mask, previous_guess=None: (
        99.0 * F.one_hot((ids + 1) % 7, 7).double()
    )
    apart = (model.embeddings[(ids + 1) % 7] - model.embeddings[ids]).square().mean(-1)
    mean = apart[draws["mask"]].mean()
    torch.testing.assert_close(model.loss(ids, draws)[1]["mse"], mean)


def test_queries_and_keys_are_normed_so_their_size_does_not_matter():
    model, ids, level = tiny(), text(2, 9), torch.full((2,), 60)
    x, mask = torch.randn(2, 9, 4).double(), torch.ones(2, 9, dtype=torch.bool)
    before = model(x, level, ids, mask)
    for block in model.h:
        queries_and_keys = block.attn.c_attn.weight.data[: 2 * model.config.width]
        queries_and_keys *= 3
    torch.testing.assert_close(model(x, level, ids, mask), before, rtol=0, atol=1e-4)


def test_only_masked_characters_count():
    model = tiny()
    model.forward = lambda x, tau, ids, mask, previous_guess=None: (
        99.0 * F.one_hot(ids, 7).double() * ~mask[..., None]
    )
    assert model.loss(text(8, 17))[1]["cross_entropy"].item() == pytest.approx(
        math.log(7), rel=1e-10
    )


def test_half_of_the_rows_are_shown_a_first_guess():
    model, shown = tiny(), []

    def forward(x, tau, ids, mask, previous_guess=None):
        shown.extend([] if previous_guess is None else previous_guess.flatten(1).any(1).tolist())
        return model.log_likelihood(x, tau)

    model.forward = forward
    torch.manual_seed(0)
    for _ in range(50):
        model.loss(text(8, 17))
    assert len(shown) == 400 and 0.35 < sum(shown) / 400 < 0.65


def test_the_first_answer_is_shown_without_its_gradient():
    """Analog Bits (arXiv 2208.04202), algorithm 1: the guess that is shown again is a constant."""
    model, ids = tiny(), text(3, 9)
    level, everything = torch.full((3,), 60), torch.ones_like(ids, dtype=torch.bool)
    x = model.schedule.noise(model.embeddings[ids], 60, torch.zeros(3, 9, 4).double())
    guess = model.previous_guess(x, level, ids, everything, torch.tensor([True, False, True]))
    assert guess[0].any() and not guess[1].any() and not guess.requires_grad


def test_each_guess_is_shown_to_the_next_and_none_sees_more_than_it():
    """While training, scoring and writing: the same page, and the answer to it before."""
    model, ids, calls = tiny(), text(8, 17), []
    forward = model.forward

    def look(*seen):
        *page, hint = seen if len(seen) == 5 else (*seen, None)
        calls.append((page, hint, forward(*seen).detach()))
        return calls[-1][2]

    model.forward = look
    draws = model.draw(ids, generator=rng())
    rows = draws["self_conditioned"]
    model.loss(ids, draws)
    (first, nothing, answer), (second, hint, _) = calls
    assert nothing is None and 0 < rows.sum() < len(rows)
    assert all(torch.equal(one, other[rows]) for one, other in zip(first, second, strict=True))
    assert torch.equal(second[3], draws["mask"])
    assert torch.equal(hint[rows], answer.softmax(-1)) and not hint[~rows].any()

    def shown_again():
        hints, answers = zip(*(call[1:] for call in calls), strict=True)
        assert hints[0] is None and len(hints) > 1
        for hint, answer in zip(hints[1:], answers):
            torch.testing.assert_close(hint, answer.softmax(-1), atol=1e-12, rtol=0)

    calls.clear()
    model.guess(*first)
    assert all(torch.equal(*pair) for pair in zip(calls[0][0], calls[1][0], strict=True))
    shown_again()
    calls.clear()
    list(model.generate(ids[:2, :3], 8, generator=rng(), steps=5))
    shown_again()


@pytest.mark.parametrize("pieces", (1, 2, 8))
def test_a_batch_in_pieces_is_the_batch_in_any_order(pieces):
    """Loss, parts, gradients, and what is remembered of the noise levels: the mean over the pieces
    is the whole.
    """

    def step(order, pieces):
        model = tiny().train()
        draws = {name: value[order] for name, value in model.draw(ids, generator=rng(3)).items()}
        sums = {}
        for k in range(pieces):
            rows = slice(k * 8 // pieces, (k + 1) * 8 // pieces)
            piece = {name: value[rows] for name, value in draws.items()}
            loss, parts = model.loss(ids[order][rows], piece)
            (loss / pieces).backward()
            for name, value in (parts | {"loss": loss.detach()}).items():
                sums[name] = sums.get(name, 0) + value / pieces
        assert [o.shape for o in model.observed()] == [(2, 50)]
        model.absorb()
        model.absorb()  # there is nothing left
        gradients = {name: p.grad for name, p in model.named_parameters()}
        buffers = {"count": model.level_count, "loss of levels": model.level_loss}
        return sums | gradients | buffers

    ids = text(8, 17)
    expected = step(torch.arange(8), 1)
    found = step(torch.randperm(8, generator=rng(4)), pieces)
    assert expected["count"].sum() == 8 and found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_a_loop_that_does_not_know_absorb_learns_the_levels_all_the_same():
    model = tiny().train()
    for _ in range(3):
        model.loss(text(8, 17))
    assert model.level_count.sum() == 16
    model.eval().loss(text(8, 17))
    model.absorb()
    assert model.level_count.sum() == 24, "an evaluation observes nothing"
    assert "observations" not in model.state_dict()


def test_dropout_reaches_the_input_and_every_block():
    nothing = tiny(dropout=1.0, bayes=False).train()  # the residual stream stays at zero
    x, mask = torch.randn(2, 9, 4).double(), torch.ones(2, 9, dtype=torch.bool)
    logits = nothing(x, torch.tensor([50]), text(2, 9), mask)
    assert torch.equal(logits, nothing.lm_head.bias.expand(2, 9, 7))


def test_rounding_reads_the_least_noise():
    model, ids = tiny(), text(2, 5)
    with torch.no_grad():  # close together, or every character is certain
        model.word_embedding.mul_(0.02).add_(1)
    x0, eps = model.embeddings[ids], torch.randn(2, 5, 4, dtype=torch.float64, generator=rng())
    x_1 = model.schedule.noise(x0, 1, eps)
    p = model.log_likelihood(x_1, torch.tensor([1, 1])).softmax(-1)
    expected = -p.gather(-1, ids[..., None])[..., 0].log()
    torch.testing.assert_close(model.rounding(x0, ids, eps), expected)


def test_rounding_holds_colliding_points_apart():
    """Two characters on one point cost ln 2 each time either is read; descending that cost drives
    them apart.
    """
    model = tiny(levels=50)
    with torch.no_grad():
        model.word_embedding[1] = model.word_embedding[0] + 1e-4
    ids, g, costs = text(64, 16) % 2, rng(), []
    optimizer = torch.optim.Adam([model.word_embedding], lr=0.05)
    for _ in range(30):
        cost = model.rounding(
            model.embeddings[ids], ids, torch.randn(64, 16, 4, dtype=torch.float64, generator=g)
        ).mean()
        optimizer.zero_grad()
        cost.backward()
        optimizer.step()
        costs.append(cost.item())
    assert math.isclose(costs[0], math.log(2), abs_tol=0.02) and costs[-1] < 0.01


class Scribe(Diffusion):
    """Its network is the exact contextual prior of a known language: each character is drawn alone,
    with these probabilities.
    """

    p = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05, 0.03, 0.02], dtype=torch.float64)

    def forward(self, x, tau, ids, mask, previous_guess=None):
        return self.log_likelihood(x, tau) + self.p.log()


@lru_cache
def scribe(**changes):
    torch.manual_seed(0)
    model = Scribe(DiffusionConfig(**TINY | {"levels": 1000} | changes)).double().eval()
    with torch.no_grad():
        model.word_embedding.copy_(
            F.pad(torch.eye(4), (0, 0, 0, 3)) - F.pad(torch.eye(4)[:3], (0, 0, 4, 0))
        )  # corners of a cross
    for _ in range(60):
        model.train().loss(
            torch.multinomial(model.p, 64 * 17, replacement=True).view(64, 17)
        )  # finds where the loss rises
    return model.eval()


def test_the_bound_of_a_perfect_model_is_the_entropy_and_a_little_more():
    """Drawn levels weigh as the sum over all levels; with the true posterior the bound is tight but
    for the finite steps.
    """
    model = scribe()
    entropy = -(model.p * model.p.log()).sum().item()
    ids = torch.multinomial(model.p, 12_000 * 17, replacement=True, generator=rng()).view(
        12_000, 17
    )
    nll = model.nll(ids, generator=rng(1)).detach()
    exact = -model.p.log()[ids[:, 1:]]
    excess = (nll - exact).mean(1)
    error = excess.std().item() / math.sqrt(len(excess))
    assert nll.shape == (12_000, 16) and error < 0.007 and abs(exact.mean() - entropy) < 0.02
    assert -3 * error < excess.mean() < 0.03, (excess.mean(), error)


def test_drawing_levels_gives_the_sum_over_all_of_them():
    """Random weights, both passes, two pages: against `noise.bound_terms`, which visits every
    level.
    """
    model, ids = tiny(levels=50), text(1, 9).expand(500, 9)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 1:] = True
    x0 = model.embeddings[ids].detach()

    @torch.no_grad()
    def denoiser(x, tau):
        guess = model.guess(x, tau, ids, mask).softmax(-1) @ model.embeddings
        return torch.where(mask[..., None], guess, x0)

    every = noise.bound_terms(
        denoiser, x0, model.schedule, reconstruction=lambda x, x0: 0 * x0[:, 0, 0], generator=rng()
    )
    drawn = model.bound(ids, generator=rng(1), draws=16)
    a, b = every.steps.sum(0), drawn.steps[0].sum(1)
    error = math.sqrt(a.var() / len(a) + b.var() / len(b))
    assert abs(a.mean() - b.mean()) < 4 * error and error < 0.03 * a.mean(), (
        a.mean(),
        b.mean(),
        error,
    )
    torch.testing.assert_close(
        drawn.prior[0].sum(), noise.prior_kl(model.schedule, x0[0, 1:]).sum().detach()
    )


def test_a_page_is_scored_given_what_stands_before_and_nothing_after():
    model, ids = tiny(), text(3, 17)
    other = ids.clone()
    other[:, 9:] = (other[:, 9:] + 1) % 7
    one, two = (model.bound(i, generator=rng(), draws=2) for i in (ids, other))
    assert torch.equal(one.steps[..., :8], two.steps[..., :8]) and not torch.equal(
        one.steps[..., 8:], two.steps[..., 8:]
    )
    nll = model.nll(ids, generator=rng(1))
    parts = model.bound(ids, generator=rng(1))
    assert nll.shape == (3, 16) and parts.steps.shape == (1, 3, 16)
    torch.testing.assert_close(nll, parts.prior + parts.steps[0] + parts.reconstruction)


def test_a_text_beyond_the_window_is_scored_as_it_is_written():
    """A page sees as many characters before it as while it is written, and no more."""
    model = tiny()
    room, page = model.config.window + 1, model.config.page
    ids = text(1, 3 * room)
    t = ids.shape[1]
    last = (t - 2) // page * page  # of `ids[:, 1:]`: where the last page begins

    def of_last_page(changed):
        other = ids.clone()
        other[:, changed] = (other[:, changed] + 1) % 7
        return model.bound(other, generator=rng()).total[:, last:]

    nothing = of_last_page(slice(0, 0))
    assert torch.equal(of_last_page(slice(0, t - room)), nothing)
    assert not torch.equal(of_last_page(slice(t - room, t - room + 1)), nothing)


def test_the_bound_in_training_is_the_bound():
    """The one-draw estimate among the loss's parts, over many batches, for a model that needs no
    context.
    """
    model = scribe().eval()
    ids = torch.multinomial(model.p, 2000 * 17, replacement=True, generator=rng()).view(2000, 17)
    torch.manual_seed(3)
    seen = torch.stack([model.loss(ids)[1]["bound_nats_per_char"] for _ in range(30)])
    want = model.nll(ids, generator=rng(1)).mean()
    assert abs(seen.mean() - want) < 0.02, (seen.mean(), want)


# --- writing
# --------------------------------------------------------------------------------------------------


def check_drafts(drafts, start, length):
    assert drafts[0].settled == start and drafts[-1].settled == drafts[-1].ids.shape[1] == length
    for a, b in zip(drafts, drafts[1:], strict=False):
        assert a.settled <= b.settled and a.ids.shape[1] <= b.ids.shape[1]
        assert torch.equal(a.ids[:, : a.settled], b.ids[:, : a.settled])


@settings(max_examples=25, deadline=None)
@given(prompt=st.integers(0, 45), n=st.integers(0, 30), page=st.integers(1, 16))
def test_drafts_keep_the_prompt_and_what_is_settled(prompt, n, page):
    model, ids = tiny(page=page), text(2, prompt)
    drafts = list(model.generate(ids, n, steps=3, generator=rng()))
    start = max(prompt, 1)
    check_drafts(drafts, start, start + n)
    first = ids if prompt else torch.zeros(2, 1, dtype=torch.long)
    assert torch.equal(drafts[-1].ids[:, :start], first)
    assert len(drafts) == 1 + 3 * math.ceil(n / page)
    room = model.config.window + 1  # for the prompt and a page
    pages = [1, *(1 + i // 3 for i in range(len(drafts) - 1))]  # the page in hand
    ends = [start + min(n, page * k) for k in pages]
    assert [d.forgotten for d in drafts] == [min(start, max(0, e - room)) if n else 0 for e in ends]


def test_a_row_does_not_depend_on_its_neighbours_and_a_draft_is_its_receivers(monkeypatch):
    """With the same noise in every row a text is the same beside any other, though the rows settle
    at different times.
    """

    def normal(generator):
        return lambda x: torch.randn(x[:1].shape, dtype=x.dtype, generator=generator).expand_as(x)

    monkeypatch.setattr(noise, "normal", normal)
    model, ids, mask = tiny(), text(4, 30), torch.arange(30) % 3 == 1
    forward, masks = model.forward, []

    def watched(x, tau, ids, mask, *rest):
        masks.append(mask)
        return forward(x, tau, ids, mask, *rest)

    model.forward = watched

    def write(ids):
        return [
            *model.generate(ids, 12, steps=9, generator=rng()),
            *model.infill(ids, mask, steps=9, generator=rng()),
        ]

    together = write(ids)
    alone = [write(ids[i : i + 1]) for i in range(4)]
    steps = len(masks) // 5
    for k, seen in enumerate(masks[:steps]):  # what is known to a row is its own affair
        assert torch.equal(seen, torch.cat(masks[k + steps :: steps]))
    settled = torch.tensor([[d.settled for d in drafts] for drafts in alone])
    assert (settled.amax(0) > settled.amin(0)).any(), "they should differ, or nothing is tested"
    for k, draft in enumerate(together):
        assert torch.equal(draft.ids, torch.cat([drafts[k].ids for drafts in alone]))
        assert draft.settled == settled[:, k].min()
    for stream in (
        model.generate(ids, 12, steps=9, generator=rng()),
        model.infill(ids, mask, steps=9, generator=rng()),
    ):
        for draft in stream:
            last = draft.ids.clone()
            draft.ids.fill_(0)
        assert any(torch.equal(last, other.ids) for other in together)
    assert torch.equal(ids, text(4, 30))


def test_no_rows_are_no_trouble():
    model, none = tiny(), torch.zeros(0, 5, dtype=torch.long)
    *_, written = model.generate(none, 4, steps=2)
    *_, filled = model.infill(none, torch.arange(5) > 2, steps=2)
    assert written.ids.shape == (0, 9) and filled.ids.shape == (0, 5)


def test_steps_follow_the_model():
    """A default lies in its own range, however few noise levels there are; as an instance's
    settings say.
    """
    for levels, default in ((50, 50), (64, 64), (1000, 64)):
        model = tiny(levels=levels)
        model.vocabulary = Vocabulary("abcdefg")
        steps = model.settings["steps"]
        assert (steps.default, steps.high) == (default, levels)
        assert len(list(model.generate(text(1, 4), 8))) == 1 + default
        assert len(lm.generate(model, "abc", 9, seed=0)) == 12
        with refuses(f"steps is a whole number from 1 to {levels:,}"):
            lm.generate(model, "abc", 9, steps=levels + 1)
    assert Diffusion.settings["steps"].default == 64


def test_a_perfect_model_writes_with_the_right_frequencies(unchecked):
    """Many steps of ancestral sampling with the true posterior draw from the language itself:
    chi-square over single characters.
    """
    model = scribe(window=64, page=64)
    *_, last = model.generate(torch.zeros(200, 1, dtype=torch.long), 64, steps=150, generator=rng())
    seen = last.ids[:, 1:].flatten().bincount(minlength=7).double()
    want = model.p * seen.sum()
    assert ((seen - want) ** 2 / want).sum() < 30  # 6 degrees of freedom: p = 4e-5


@settings(max_examples=25, deadline=None)
@given(mask=st.lists(st.booleans(), min_size=1, max_size=60), page=st.integers(1, 16))
@example(mask=[i in (3, 20) for i in range(60)], page=4)
@example(mask=[i > 2 for i in range(60)], page=8)
def test_infilling_keeps_every_other_position(mask, page):
    model, ids, mask = tiny(page=page), text(2, len(mask)), torch.tensor(mask)
    drafts = list(model.infill(ids, mask, steps=2, generator=rng()))
    gaps = mask.nonzero()[:, 0].tolist()
    check_drafts(drafts, gaps[0] if gaps else len(mask), len(mask))
    for draft in drafts:
        assert torch.equal(draft.ids[:, ~mask], ids[:, ~mask])
    other = torch.where(mask, (ids + 1) % 7, ids)  # what stands in a gap is never read
    *_, last = model.infill(other, mask, steps=2, generator=rng())
    assert torch.equal(last.ids, drafts[-1].ids)


def test_gaps_in_a_text_are_filled_and_the_rest_stays():
    model = tiny()
    model.vocabulary = Vocabulary("abcdefg")
    drafts = list(model.fill("abc__fg_", seed=3, steps=4))
    texts = [model.vocabulary.decode(draft.ids[0]) for draft in drafts]
    assert all(t[:3] + t[5:7] == "abcfg" for t in texts) and drafts[-1].settled == 8
    assert texts[-1] == model.vocabulary.decode(
        list(model.fill("abc__fg_", seed=3, steps=4))[-1].ids[0]
    )
    assert [d.settled for d in model.fill("ab#d", gap="#", seed=3, steps=1)] == [2, 4]
    unseeded = set()
    for seed in range(5):
        torch.manual_seed(seed)
        unseeded.add(str(list(model.fill("a_______", steps=4))[-1].ids))
    assert len(unseeded) > 1
    for wrong, how, word in [
        ("abc", {}, "no gap"),
        ("ab", {"gap": "a"}, "one sign"),
        ("x_", {}, "'x'"),
        ("_", {"stop": 1}, "stop"),
    ]:
        with refuses(word):
            model.fill(wrong, **how)


@pytest.mark.parametrize("page, span", [(4, 1), (4, 3), (4, 9), (16, 1), (16, 16), (16, 20)])
def test_a_long_text_is_filled_with_as_much_before_the_gap_as_after_it(page, span):
    """Of a gap longer than a page, a page's worth; a character before it there is always."""
    model, read = tiny(window=16, page=page), []
    room, inner = model.config.window + 1, model.forward
    model.forward = lambda x, tau, ids, *rest: read.append(ids[0]) or inner(x, tau, ids, *rest)
    ids = text(1, 5 * room)
    gap = torch.zeros(5 * room, dtype=torch.bool)
    gap[2 * room : 2 * room + span] = True
    list(model.infill(ids, gap, steps=1, generator=rng()))
    before = max(1, (room - min(span, page)) // 2)
    begin = 2 * room - before
    end = begin + room if span <= page else 2 * room + page  # what is not written yet is not read
    assert torch.equal(read[0][:before], ids[0, begin : 2 * room])
    assert len(read[0]) == end - begin
    assert torch.equal(read[0][before + span :], ids[0, 2 * room + span : end])


@pytest.mark.parametrize("start, begin", [(1, 0), (5, 0), (30, 22), (82, 68), (84, 68)])
def test_a_gap_near_an_end_of_a_text_is_seen_with_a_whole_window_around_it(start, begin):
    model, read = tiny(window=16, page=4), []
    inner = model.forward
    model.forward = lambda x, tau, ids, *rest: read.append(ids[0]) or inner(x, tau, ids, *rest)
    ids = text(1, 85)
    list(model.infill(ids, torch.arange(85) == start, steps=1, generator=rng()))
    wanted = ids[0, begin : begin + 17]
    others = torch.arange(begin, begin + 17) != start
    assert len(read[0]) == 17 and torch.equal(read[0][others], wanted[others])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_in_half_precision_a_character_s_likelihood_is_what_it_is_in_whole(kind):
    """At little noise the exponents are in the hundred thousands, beyond what float16 holds."""
    model = tiny(levels=1000, channels=16, vocabulary=65).to(kind)
    one = torch.ones(1, dtype=torch.long)
    x = model.embeddings[None, :20].detach()
    log_p = model.log_likelihood(x, one)
    assert log_p.dtype == kind and log_p.isfinite().all()
    whole = model.float()
    exactly = whole.log_likelihood(x.float(), one).log_softmax(-1)
    likely = exactly > -100  # bfloat16 has three digits, float16 no number below -65,504
    torch.testing.assert_close(log_p.float()[likely], exactly[likely], rtol=0.01, atol=0.01)
    assert (log_p[~likely] < -90).all()
    assert torch.equal(log_p.argmax(-1)[0], torch.arange(20))


def test_infilling_reads_what_comes_after_the_gap():
    model, ids = tiny(), text(1, 16)
    inner, read = model.forward, []
    model.forward = lambda x, tau, ids, *rest: read.append(ids) or inner(x, tau, ids, *rest)
    list(model.infill(ids, torch.arange(16) == 5, steps=3, generator=rng()))
    assert len(read) == 3 and all(torch.equal(page[:, 6:], ids[:, 6:]) for page in read)


def test_clamping_rounds_every_guess_to_the_likeliest_character(monkeypatch):
    model, logits, guesses, signal = tiny(), [], [], []
    forward, step = model.forward, noise.step

    def read(*inputs):
        logits.append(forward(*inputs))
        return logits[-1]

    def watched(x0, *rest, **how):
        guesses.append(x0)
        signal.extend(rest[1:])
        return step(x0, *rest, **how)

    model.forward = read
    monkeypatch.setattr(noise, "step", watched)
    drafts = list(model.generate(text(2, 4), 8, steps=5, clamp="on", generator=rng()))
    assert len(guesses) == 5
    assert [draft.note["level"] for draft in drafts[1:]] == model.timesteps(5)
    levels = model.schedule.alpha_bar[torch.tensor(model.timesteps(5)) - 1].tolist()
    assert signal[::2] == levels and signal[1::2] == [*levels[1:], 1.0]
    for guess, seen in zip(guesses, logits, strict=True):
        assert torch.equal(guess, model.embeddings[seen.argmax(-1)])


def test_temperature_filters_and_clamping_reach_the_text():
    model = scribe(window=64, page=64)
    start = torch.zeros(20, 1, dtype=torch.long)

    def entropy(**dials):
        *_, last = model.generate(start, 60, steps=30, generator=rng(), **dials)
        p = last.ids[:, 1:].flatten().bincount(minlength=7) / (20 * 60)
        return torch.special.entr(p).sum().item()

    plain = entropy()
    for bolder in ({"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0}):
        assert entropy(**bolder) < plain - 0.1, bolder
    assert entropy(clamp="on") != plain and entropy(eta=0) != plain


@pytest.mark.parametrize(
    "dials", [{"temperature": 0}, {"temperature": 0.05}, {"top_k": 1}, {"top_p": 0.01}]
)
def test_a_narrow_choice_is_not_taken_for_a_sure_one(dials):
    """The first guess at a page of noise is the likeliest character everywhere: nothing of it may
    stay for that.
    """
    model = scribe(window=64, page=64)
    drafts = list(
        model.generate(torch.zeros(4, 1, dtype=torch.long), 60, steps=12, generator=rng(), **dials)
    )
    assert drafts[1].settled == 1 and drafts[1].note["sure"] < 0.9
    assert (drafts[-1].ids[:, 1:] != drafts[1].ids[:, 1:]).any()


def test_masked_positions_are_counted_even_at_the_largest_draw(monkeypatch):
    """A float just below one, times an even number and cut off, is that number: one more than there
    are positions to begin at.
    """
    largest = 1 - 2**-24
    monkeypatch.setattr(
        torch, "rand", lambda *shape, **_: torch.full(shape, largest if len(shape) == 3 else 0.0)
    )
    for length in (17, 33, 48, 257):
        assert denoiser.draw_mask(3, length).sum(1).min() >= 1


def test_a_guide_steers_the_text():
    model = scribe(window=64, page=64)

    def rare(x, tau):  # wishes for the likeliness of character 6 at every position
        return model.log_likelihood(x, tau).log_softmax(-1)[..., 6].sum(1)

    start = torch.zeros(8, 1, dtype=torch.long)

    def written(**how):
        return list(model.generate(start, 60, steps=40, generator=rng(), **how))[-1].ids

    guided = written(guide=rare)
    share = [(ids == 6).double().mean() for ids in (written(), guided)]
    assert share[0] < 0.1 and share[1] > 0.7
    assert torch.equal(guided, written(guide=rare, strength=1.0))
    model.vocabulary = Vocabulary("abcdefg")
    assert lm.generate(model, "a", 60, seed=0, steps=40, guide=rare).count("g") > 40


def test_what_cannot_be_is_refused_before_any_work():
    model, ids = tiny(), text(1, 4)
    for dials, word in [
        ({"steps": 0}, "steps"), ({"steps": 101}, "steps"), ({"steps": 2.5}, "steps"), ({"eta": -0.1}, "eta"), ({"eta": math.nan}, "eta"),
        ({"clamp": "yes"}, "clamp"), ({"temperature": -1}, "temperature"), ({"top_p": 2}, "top_p"), ({"top_k": -1}, "top_k"),
        ({"strength": math.inf}, "strength"), ({"depth": 1}, "has no setting 'depth'"),
    ]:  # fmt: skip
        with refuses(word):
            model.generate(ids, 4, **dials)
        with refuses(word):
            model.infill(ids, torch.ones(4, dtype=torch.bool), **dials)
    with refuses("length"):
        model.generate(ids, -1)
    with refuses("draws is a whole number from 1 up; got 0"):
        model.bound(ids, draws=0)
    for mask in (torch.ones(3, dtype=torch.bool), torch.ones(4), [True] * 4):
        with pytest.raises(InputError, match=r"mask is bool of shape \(4,\)"):
            unwrap(Diffusion.infill)(model, ids, mask)  # without the type checker
    with refuses(r"ids lie in 0\.\.6"):
        model.generate(ids + 7, 4)
    for name, value in (("page", 17), ("heads", 3)):
        with refuses(name):
            DiffusionConfig(**TINY | {name: value})


def test_a_quarter_of_the_rows_is_masked_whole_and_half_to_the_end():
    mask = denoiser.draw_mask(4000, 65, generator=rng())
    whole, ends = mask[:, 1:].all(1), mask[:, -1]
    assert 0.22 < whole.double().mean() < 0.29  # a quarter, and what begins there by chance
    assert 0.45 < (ends & ~whole).double().mean() < 0.53


def test_a_guide_sees_what_is_known_without_its_noise():
    model, ids, gap = tiny(page=8), text(1, 12), torch.arange(12) == 5
    seen = []

    def guide(x, tau):
        seen.append((x.detach(), tau))
        return x.sum((1, 2))

    list(model.infill(ids, gap, steps=3, guide=guide, generator=rng()))
    assert len(seen) == 3
    for x, tau in seen:
        clean = model.schedule.noise(model.embeddings[ids], tau, torch.zeros_like(x))
        torch.testing.assert_close(x[:, ~gap], clean[:, ~gap])


def test_a_guide_steers_as_strongly_as_it_is_asked_to():
    model, ids, gap = tiny(page=8), text(1, 12), torch.arange(12) > 3

    def written(**how):
        return list(model.infill(ids, gap, steps=9, generator=rng(), **how))[-1].ids

    def wish(x, tau):
        return (x @ model.embeddings[6]).sum(1)

    assert torch.equal(written(guide=wish, strength=0), written())
    steered = written(guide=wish, strength=100)
    assert (steered[:, 4:] == 6).all()
    with torch.inference_mode():
        assert torch.equal(written(guide=wish, strength=100), steered)


def test_the_exact_posterior_is_computed_in_full_precision():
    model = tiny(dtype=torch.float32)
    x = torch.randn(1, 9, model.config.channels, generator=rng())
    exact = model.log_likelihood(x, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.log_likelihood(x, 1), exact)


@pytest.mark.parametrize(
    "lead, temperature, known",
    [(12, 1.0, 11), (12, 2.0, 3), (10, 1.0, 3), (10, 0.5, 11), (10, 0.0, 11), (4, 0.0, 3)],
)
def test_what_is_sure_at_the_temperature_in_use_is_known_at_once(lead, temperature, known):
    """One of seven characters is ahead by so many nats: p = 1 / (1 + 6 exp(-lead / temperature))."""
    model = tiny()
    model.forward = lambda x, tau, ids, *_: lead * F.one_hot(torch.full_like(ids, 3), 7).double()
    how = dict(steps=2, temperature=temperature, generator=rng())
    assert [d.settled for d in model.generate(text(1, 3), 8, **how)] == [3, known, 11]


def test_how_sure_a_page_is_counts_its_own_guesses_and_not_what_it_was_given():
    model = tiny()
    lead = torch.tensor([20.0] * 3 + [1.0, 3.0] * 4).double()  # in nats, as above
    model.forward = lambda x, tau, ids, *_: lead[:, None] * F.one_hot(ids * 0 + 3, 7).double()
    drafts = list(model.generate(text(2, 3), 8, steps=2, generator=rng()))
    mean = (1 / (1 + 6 * (-lead[3:]).exp())).mean().item()
    assert [draft.note["sure"] for draft in drafts[1:]] == [pytest.approx(mean, abs=6e-4)] * 2


def test_a_network_without_bayes_rule_trains_in_mixed_precision():
    model = excite(tiny(bayes=False, dtype=torch.float32), 0.2).train()
    losses = []
    for mixed in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            losses.append(model.loss(text(4, 17))[0])
    torch.testing.assert_close(*losses, atol=2e-3, rtol=0.02)
    losses[1].backward()
    assert all(p.grad is not None for p in model.parameters())
