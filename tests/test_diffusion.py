"""irann.models.diffusion: what its network sees, what its bound is worth, and what its drafts promise."""

import math
from functools import lru_cache
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from irann.core import noise
from irann.models import diffusion
from irann.models.diffusion import Diffusion, DiffusionConfig
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
    return torch.randint(v, (b, t), generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- the points and what a place says about itself ---------------------------------------------------------------------


def test_points_lie_on_a_sphere_whatever_the_weights():
    torch.testing.assert_close(tiny().embeddings.norm(dim=-1), torch.full((7,), 2.0).double())


def test_what_a_place_says_alone_is_bayes_rule_on_gaussians():
    model, ids = tiny(), text(2, 5)
    tau = torch.tensor([70, 20])
    x = model.schedule.noise(
        model.embeddings[ids], tau, torch.randn(2, 5, 4, dtype=torch.float64, generator=seeded())
    )
    ab = model.schedule.alpha_bar[tau]
    centre = ab.sqrt()[:, None, None, None] * model.embeddings
    spread = (1 - ab).sqrt()[:, None, None, None].expand(2, 5, 7, 4)
    density = (
        torch.distributions.Normal(centre.expand(2, 5, 7, 4), spread)
        .log_prob(x[:, :, None])
        .sum(-1)
    )
    torch.testing.assert_close(
        model.alone(x, tau).softmax(-1), density.softmax(-1), atol=1e-12, rtol=0
    )


def test_an_untrained_network_answers_with_bayes_rule_alone():
    model, ids = tiny(excited=False), text(2, 16)
    tau, x = torch.tensor([50, 80]), torch.randn(2, 16, 4, dtype=torch.float64, generator=seeded())
    mask = torch.ones(2, 16, dtype=torch.bool)
    torch.testing.assert_close(model(x, tau, ids, mask), model.alone(x, tau))


def test_every_place_sees_both_sides_and_the_noise_level():
    model, ids = (
        tiny(neighbours=0, bayes=False),
        text(1, 9),
    )  # without Bayes: the network itself must see and know
    mask, tau = torch.ones(1, 9, dtype=torch.bool), torch.tensor([60])
    x = torch.randn(1, 9, 4, dtype=torch.float64, generator=seeded())
    before = model(x, tau, ids, mask)
    for place in (0, 8):
        other = x.clone()
        other[:, place] += 1
        assert ((model(other, tau, ids, mask) - before).abs().amax(-1) > 1e-6).all(), place
    assert ((model(x, tau + 5, ids, mask) - before).abs() > 1e-6).all()


def test_clean_places_ignore_the_noise_and_hidden_ones_ignore_the_answer():
    model, ids = tiny(), text(2, 9)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[:, 3:6] = True
    tau, x = torch.tensor([60, 30]), torch.randn(2, 9, 4, dtype=torch.float64, generator=seeded())
    hint = torch.rand(2, 9, 7, dtype=torch.float64, generator=seeded(1)).softmax(-1)
    before = model(x, tau, ids, mask, hint)
    noisier, wrong, strange = x.clone(), ids.clone(), hint.clone()
    noisier[~mask] = 9.0
    strange[~mask] = 0.5
    wrong[mask] = (wrong[mask] + 1) % 7
    assert torch.equal(model(noisier, tau, wrong, mask, strange)[mask], before[mask])
    assert torch.equal(model(x, tau, ids, mask), model(x, tau, ids, mask, torch.zeros_like(hint)))


def test_neighbours_come_side_by_side():
    x = torch.arange(1.0, 5).view(1, 4, 1)
    assert diffusion.neighbourhood(x, 1)[0].tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 0]]
    assert torch.equal(diffusion.neighbourhood(x, 0), x)


def test_some_text_is_hidden_in_every_row_and_the_first_place_never():
    torch.manual_seed(0)
    for places in (2, 3, 17):
        mask = diffusion.cover(4000, places)
        assert not mask[:, 0].any() and mask.any(1).all()
        runs = (mask[:, 1:] & ~mask[:, :-1]).sum(1)
        assert (runs == 1).all()
    ends_hidden = (
        mask[:, -1].double().mean()
    )  # all rows but most of the quarter that hides a stretch between two places
    assert 0.75 < ends_hidden < 0.85


# --- noise levels ------------------------------------------------------------------------------------------------------


def test_levels_are_drawn_as_often_as_their_odds_say_and_gather_where_the_loss_rises():
    model = tiny(levels=200)
    model.unsure.copy_(torch.sigmoid(torch.linspace(-20, 20, 50)))
    odds = model.level_odds()
    assert (
        odds.dtype == torch.float64
        and odds[0] == 0
        and math.isclose(odds.sum(), 1, abs_tol=1e-12)
        and (odds[1:] > 0).all()
    )
    assert odds[80:120].sum() > 0.8
    tau, given = model.draw_levels(100_000, seeded())
    seen = tau.bincount(minlength=200) / len(tau)
    assert (
        seen - odds
    ).abs().max() < 1e-4  # one draw from each slice of probability: far closer than chance
    torch.testing.assert_close(given, odds[tau])
    assert (
        sum(80 <= tau < 120 for tau in model.timesteps(20)) >= 15
    )  # and the strides are small where many are drawn


def test_the_model_remembers_the_loss_of_each_level():
    model = tiny(levels=100)
    for _ in range(500):
        tau = torch.arange(1, 100)
        model.remember(tau, 3.0 * (tau > 60))
    assert (model.unsure[:30] == 0).all() and (model.unsure[31:] > 2.9).all()
    assert tiny(adaptive=False).level_odds()[1:].diff().abs().max() < 1e-12


@pytest.mark.parametrize("steps", (1, 2, 7, 64, 100))
def test_timesteps_fall_from_the_darkest_level(steps):
    model = tiny()
    for curve in (torch.linspace(0, 1, 50), (torch.arange(50) > 10).float(), torch.zeros(50)):
        model.unsure.copy_(curve)
        taus = model.timesteps(steps)
        assert len(taus) == steps and taus[0] == 99 and taus[-1] >= 0
        assert all(a > b for a, b in zip(taus, taus[1:], strict=False))


# --- the loss and the bound --------------------------------------------------------------------------------------------


def test_the_loss_is_cross_entropy_of_hidden_text_plus_rounding_and_reaches_every_weight():
    model = tiny(dtype=torch.float32).train()
    loss, parts = model.loss(text(8, 17))
    assert set(parts) == {"cross_entropy", "rounding", "mse", "bound_nats_per_char"}
    torch.testing.assert_close(loss.detach(), parts["cross_entropy"] + parts["rounding"])
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert not any(part.requires_grad for part in parts.values())


def test_only_hidden_characters_are_paid_for():
    model = tiny()
    model.forward = lambda x, tau, ids, mask, hint=None: (
        99.0 * F.one_hot(ids, 7).double() * ~mask[..., None]
    )
    assert model.loss(text(8, 17))[1]["cross_entropy"].item() == pytest.approx(
        math.log(7), rel=1e-10
    )


def test_half_of_the_rows_are_shown_a_first_guess():
    model, shown = tiny(), []

    def forward(x, tau, ids, mask, hint=None):
        shown.extend([] if hint is None else hint.flatten(1).any(1).tolist())
        return model.alone(x, tau)

    model.forward = forward
    torch.manual_seed(0)
    for _ in range(50):
        model.loss(text(8, 17))
    assert len(shown) == 400 and 0.35 < sum(shown) / 400 < 0.65


def test_dropout_is_active_in_training():
    losses = []
    for p in (0.0, 0.5):
        model = tiny(dropout=p).train()
        assert {part.p for part in model.modules() if isinstance(part, torch.nn.Dropout)} == {p}
        torch.manual_seed(0)
        losses.append(model.loss(text(8, 17))[1]["cross_entropy"])
    assert not torch.equal(*losses)


def test_rounding_holds_colliding_points_apart():
    """Two characters on one point cost ln 2 each time either is read; descending that cost drives them apart."""
    model = tiny(levels=50)
    with torch.no_grad():
        model.points[1] = model.points[0] + 1e-4
    ids, g, costs = text(64, 16) % 2, seeded(), []
    optimizer = torch.optim.Adam([model.points], lr=0.05)
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
    """Its network is the exact contextual prior of a known language: each character is drawn alone, with these odds."""

    odds = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05, 0.03, 0.02], dtype=torch.float64)

    def forward(self, x, tau, ids, mask, hint=None):
        return self.alone(x, tau) + self.odds.log()


@lru_cache
def scribe(**changes):
    torch.manual_seed(0)
    model = Scribe(DiffusionConfig(**TINY | {"levels": 1000} | changes)).double().eval()
    with torch.no_grad():
        model.points.copy_(
            F.pad(torch.eye(4), (0, 0, 0, 3)) - F.pad(torch.eye(4)[:3], (0, 0, 4, 0))
        )  # corners of a cross
    for _ in range(60):
        model.train().loss(
            torch.multinomial(model.odds, 64 * 17, replacement=True).view(64, 17)
        )  # finds where the loss rises
    return model.eval()


def test_the_bound_of_a_perfect_model_is_the_entropy_and_a_little_more():
    """Drawn levels weigh as the sum over all levels; with the true posterior the bound is tight but for the finite steps."""
    model = scribe()
    entropy = -(model.odds * model.odds.log()).sum().item()
    ids = torch.multinomial(model.odds, 12_000 * 17, replacement=True, generator=seeded()).view(
        12_000, 17
    )
    nll = model.nll(ids, generator=seeded(1)).detach()
    exact = -model.odds.log()[ids[:, 1:]]
    excess = (nll - exact).mean(1)
    error = excess.std().item() / math.sqrt(len(excess))
    assert nll.shape == (12_000, 16) and error < 0.007 and abs(exact.mean() - entropy) < 0.02
    assert -3 * error < excess.mean() < 0.03, (excess.mean(), error)


def test_drawing_levels_gives_the_sum_over_all_of_them():
    """Random weights, both hint passes, two pages: against `noise.bound_terms`, which visits every level."""
    model, ids = tiny(levels=50), text(1, 9).expand(500, 9)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 1:] = True
    x0 = model.embeddings[ids].detach()

    @torch.no_grad()
    def denoiser(x, tau):
        guess = model.guess(x, tau, ids, mask).softmax(-1) @ model.embeddings
        return torch.where(mask[..., None], guess, x0)

    every = noise.bound_terms(
        denoiser,
        x0,
        model.schedule,
        reconstruction=lambda x, x0: 0 * x0[:, 0, 0],
        generator=seeded(),
    )
    drawn = model.bound(ids, generator=seeded(1), draws=16)
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
    one, two = (model.bound(i, generator=seeded(), draws=2) for i in (ids, other))
    assert torch.equal(one.steps[..., :8], two.steps[..., :8]) and not torch.equal(
        one.steps[..., 8:], two.steps[..., 8:]
    )
    told = model.nll(ids, generator=seeded(1))
    parts = model.bound(ids, generator=seeded(1))
    assert told.shape == (3, 16) and parts.steps.shape == (1, 3, 16)
    torch.testing.assert_close(told, parts.prior + parts.steps[0] + parts.reconstruction)


def test_the_bound_in_training_is_the_bound():
    """The one-draw estimate among the loss's parts, over many batches, for a model that needs no context."""
    model = scribe().eval()
    ids = torch.multinomial(model.odds, 2000 * 17, replacement=True, generator=seeded()).view(
        2000, 17
    )
    torch.manual_seed(3)
    seen = torch.stack([model.loss(ids)[1]["bound_nats_per_char"] for _ in range(30)])
    want = model.nll(ids, generator=seeded(1)).mean()
    assert abs(seen.mean() - want) < 0.02, (seen.mean(), want)


# --- writing -----------------------------------------------------------------------------------------------------------


def check_drafts(drafts, start, length):
    assert drafts[0].settled == start and drafts[-1].settled == drafts[-1].ids.shape[1] == length
    for a, b in zip(drafts, drafts[1:], strict=False):
        assert a.settled <= b.settled and a.ids.shape[1] <= b.ids.shape[1]
        assert torch.equal(a.ids[:, : a.settled], b.ids[:, : a.settled])


@pytest.mark.parametrize("prompt, n", product((0, 1, 5, 28, 40), (0, 1, 7, 30)))
def test_drafts_keep_the_prompt_and_what_is_settled(prompt, n):
    model, ids = tiny(), text(2, prompt)
    drafts = list(model.generate(ids, n, steps=6, generator=seeded()))
    start = max(prompt, 1)
    check_drafts(drafts, start, start + n)
    assert torch.equal(
        drafts[-1].ids[:, :start], ids if prompt else torch.zeros(2, 1, dtype=torch.long)
    )
    room = model.config.window + 1  # for the prompt and a page
    ends = [
        start + min(n, model.config.page * (1 + max(0, i - 1) // 6)) for i in range(len(drafts))
    ]  # of the page in hand
    assert [d.note.get("forgotten", 0) for d in drafts] == [
        min(start, max(0, end - room)) if n else 0 for end in ends
    ]
    assert len(drafts) == 1 + 6 * math.ceil(n / 8)


def test_the_same_seed_writes_the_same_text_and_training_mode_stays():
    model = tiny().train()
    texts = [
        list(model.generate(text(2, 4), 20, steps=5, generator=seeded(s)))[-1].ids
        for s in (0, 0, 1)
    ]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    assert model.training


def test_a_perfect_model_writes_with_the_right_frequencies():
    """Many steps of ancestral sampling with the true posterior draw from the language itself: chi-square over single characters."""
    model = scribe(window=64, page=64)
    *_, last = model.generate(
        torch.zeros(200, 1, dtype=torch.long), 64, steps=150, generator=seeded()
    )
    seen = last.ids[:, 1:].flatten().bincount(minlength=7).double()
    want = model.odds * seen.sum()
    assert ((seen - want) ** 2 / want).sum() < 30  # 6 degrees of freedom: p = 4e-5


@pytest.mark.parametrize(
    "size, gaps",
    [
        (12, [3, 4, 5]),
        (12, [0, 11]),
        (60, [2, 3, 30, 31, 58, 59]),
        (60, list(range(5, 50))),
        (5, []),
    ],
)
def test_infilling_keeps_every_other_place(size, gaps):
    model, ids = tiny(), text(2, size)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[gaps] = True
    drafts = list(model.infill(ids, mask, steps=5, generator=seeded()))
    check_drafts(drafts, gaps[0] if gaps else size, size)
    for draft in drafts:
        assert torch.equal(draft.ids[:, ~mask], ids[:, ~mask])


def test_gaps_in_a_text_are_filled_and_the_rest_stays():
    model = tiny()
    model.vocabulary = Vocabulary("abcdefg")
    drafts = list(model.fill("abc__fg_", seed=3, steps=4))
    texts = [model.vocabulary.decode(draft.ids[0]) for draft in drafts]
    assert all(t[:3] + t[5:7] == "abcfg" for t in texts) and drafts[-1].settled == 8
    assert texts[-1] == model.vocabulary.decode(
        list(model.fill("abc__fg_", seed=3, steps=4))[-1].ids[0]
    )
    for wrong, how, word in [
        ("abc", {}, "no gap"),
        ("ab", {"gap": "a"}, "one sign"),
        ("x_", {}, "'x'"),
        ("_", {"stop": 1}, "stop"),
    ]:
        with pytest.raises(ValueError, match=word):
            model.fill(wrong, **how)


def test_infilling_reads_what_comes_after_the_gap():
    model, ids = tiny(), text(1, 16)
    inner, read = model.forward, []
    model.forward = lambda x, tau, ids, *rest: read.append(ids) or inner(x, tau, ids, *rest)
    list(model.infill(ids, torch.arange(16) == 5, steps=3, generator=seeded()))
    assert len(read) == 3 and all(torch.equal(page[:, 6:], ids[:, 6:]) for page in read)


def test_clamping_rounds_every_guess_to_the_likeliest_character(monkeypatch):
    model, logits, guesses = tiny(), [], []
    forward, sample = model.forward, noise.sample
    model.forward = lambda *given: logits.append(forward(*given)) or logits[-1]

    def watched(walker, *given, **how):
        return sample(lambda x, tau: guesses.append(walker(x, tau)) or guesses[-1], *given, **how)

    monkeypatch.setattr(noise, "sample", watched)
    list(model.generate(text(2, 4), 8, steps=5, clamp="on", generator=seeded()))
    assert len(guesses) == 5
    for guess, believed in zip(guesses, logits, strict=True):
        assert torch.equal(guess, model.embeddings[believed.argmax(-1)])


def test_temperature_filters_and_clamping_reach_the_text():
    model = scribe(window=64, page=64)
    start = torch.zeros(20, 1, dtype=torch.long)

    def entropy(**dials):
        *_, last = model.generate(start, 60, steps=30, generator=seeded(), **dials)
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
    """The first guess at a page of noise is the likeliest character everywhere: nothing of it may stay for that."""
    model = scribe(window=64, page=64)
    drafts = list(
        model.generate(
            torch.zeros(4, 1, dtype=torch.long), 60, steps=12, generator=seeded(), **dials
        )
    )
    assert drafts[1].settled == 1 and drafts[1].note["sure"] < 0.9
    assert (drafts[-1].ids[:, 1:] != drafts[1].ids[:, 1:]).any()


def test_hidden_places_are_counted_even_at_the_largest_draw(monkeypatch):
    """A float just below one, times an even number and cut off, is that number: one more than there are places to begin at."""
    largest = 1 - 2**-24
    monkeypatch.setattr(
        torch, "rand", lambda *shape, **_: torch.full(shape, largest if len(shape) == 3 else 0.0)
    )
    for places in (17, 33, 48, 257):
        assert diffusion.cover(3, places).sum(1).min() >= 1


def test_a_guide_steers_the_text():
    model = scribe(window=64, page=64)

    def rare(x, tau):  # wishes for the likeliness of character 6 at every place
        return model.alone(x, tau).log_softmax(-1)[..., 6].sum(1)

    start = torch.zeros(8, 1, dtype=torch.long)
    share = [
        (list(model.generate(start, 60, steps=40, generator=seeded(), **how))[-1].ids == 6)
        .double()
        .mean()
        for how in ({}, {"guide": rare, "strength": 1.0})
    ]
    assert share[0] < 0.1 and share[1] > 0.7


def test_what_cannot_be_is_refused_before_any_work():
    model, ids = tiny(), text(1, 4)
    for dials, word in [
        ({"steps": 0}, "steps"), ({"steps": 101}, "steps"), ({"steps": 2.5}, "steps"), ({"eta": -0.1}, "eta"), ({"eta": math.nan}, "eta"),
        ({"clamp": "yes"}, "clamp"), ({"temperature": -1}, "temperature"), ({"top_p": 2}, "top_p"), ({"top_k": -1}, "top_k"),
        ({"strength": math.inf}, "strength"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=word):
            model.generate(ids, 4, **dials)
        with pytest.raises(ValueError, match=word):
            model.infill(ids, torch.ones(4, dtype=torch.bool), **dials)
    with pytest.raises(ValueError, match="length"):
        model.generate(ids, -1)
    with pytest.raises(ValueError, match=r"mask is bool of shape \(4,\)"):
        model.infill(ids, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"ids lie in 0\.\.6"):
        model.generate(ids + 7, 4)
    for changes, word in [
        ({"page": 17}, "page"),
        ({"heads": 3}, "heads"),
        ({"levels": 10}, "levels"),
        ({"schedule": "cubic"}, "schedule"),
    ]:
        with pytest.raises(ValueError, match=word):
            Diffusion(DiffusionConfig(**TINY | changes))


def test_one_batch_can_be_learnt_by_heart():
    torch.manual_seed(0)
    model = Diffusion(DiffusionConfig(**TINY | {"width": 32, "channels": 8}))
    ids = text(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    before = model.nll(ids, generator=seeded()).mean()
    for _ in range(150):
        optimizer.zero_grad()
        model.loss(ids.repeat(8, 1))[0].backward()
        optimizer.step()
    after = model.eval().nll(ids, generator=seeded()).mean()
    assert before > 1.8 and after < 0.6, (before, after)
