"""Noise: spoil a thing step by step, learn what it was, walk back. Diffusion as pure functions of tensors.

Sources: Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239); Song et al. 2020, "Denoising
Diffusion Implicit Models" (arXiv 2010.02502); Nichol and Dhariwal 2021 (arXiv 2102.09672) for the cosine schedule; Li et
al. 2022, "Diffusion-LM" (arXiv 2205.14217) for the sqrt schedule; Kingma et al. 2021 (arXiv 2107.00630) for the bound
as signal-to-noise lost per step. Where we leave them: everything predicts x0, never eps, and one step serves both
samplers, for any two noise levels.

Noise levels are tau = 0 .. T - 1 with tau = 0 the least spoilt; "clean", below tau = 0, has alpha_bar = 1. Tables are float64
and every coefficient is computed there, then cast to the dtype of x: float64 in gives float64 out. Axes: b is first, the rest is free.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (b ...), (b) of int -> (b ...): x_tau and its noise level -> the guess of x0


def alpha_bar_of(name: str) -> Callable[[Tensor], Tensor]:
    """-> the share of signal variance left at time u in 0..1, as the papers draw it, for the schedules that start from it."""
    return {
        "cosine": lambda u: torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2,  # arXiv 2102.09672, eq. 17
        "sqrt": lambda u: 1 - (u + 1e-4).sqrt(),  # arXiv 2205.14217, appendix A
    }[name]


class Schedule:
    """How fast the signal drowns: `betas`, `alpha_bar`, `snr`, each (T) of float64.

    `linear` scales Ho's 1e-4 .. 0.02 to the number of steps; `cosine` and `sqrt` take each beta from the ratio of two
    neighbouring alpha_bars. No beta exceeds 0.999, so that no step loses the signal whole.
    Raises ValueError for an unknown name or a step count below 1.
    """

    names = ("linear", "cosine", "sqrt")

    def __init__(self, name: str, steps: int):
        if name not in self.names:
            raise ValueError(f"a schedule is one of {', '.join(self.names)}; got {name!r}")
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"a schedule has a whole number of steps, 1 or more; got {steps!r}")
        self.name, self.steps = name, steps
        if name == "linear":
            betas = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)
        else:
            left = alpha_bar_of(name)(torch.arange(steps + 1, dtype=torch.float64) / steps)
            betas = 1 - left[1:] / left[:-1]
        self.betas = betas.clamp(max=0.999)
        self.alpha_bar = (1 - self.betas).cumprod(0)  # eq. 4 of Ho et al.
        self.before = torch.cat([self.alpha_bar.new_ones(1), self.alpha_bar[:-1]])  # alpha_bar at tau - 1; 1 below tau = 0
        self.snr = self.alpha_bar / (1 - self.alpha_bar)
        self.posterior_variance = self.betas * (1 - self.before) / (1 - self.alpha_bar)  # eq. 7

    def __repr__(self) -> str:
        return f"Schedule({self.name!r}, {self.steps})"

    def at(self, table: Tensor, tau: int | Tensor, x: Tensor) -> Tensor:
        """(T), (b) -> (b 1 ...): each row's entry of a table, in x's dtype, shaped to multiply x.

        One tau may serve all rows, and one row have many. Raises ValueError for levels that are not of this schedule, or do not fit x.
        """
        tau = torch.as_tensor(tau)
        if not x.is_floating_point():
            raise ValueError(f"noise is added to real numbers; got {x.dtype}")
        if tau.is_floating_point() or tau.ndim > 1:
            raise ValueError(f"tau is a whole number or a tensor (b) of them; got {tau.dtype} of shape {tuple(tau.shape)}")
        if tau.ndim and x.ndim and len(tau) != len(x) and 1 not in (len(tau), len(x)):
            raise ValueError(f"there is one tau for all rows or one for each; got {len(tau)} beside x {tuple(x.shape)}")
        here = tau.device.type == "cpu"  # to look at numbers elsewhere would keep a GPU waiting; it checks indices itself
        if here and tau.numel() and not (0 <= int(tau.min()) and int(tau.max()) < self.steps):
            raise ValueError(f"noise levels of this schedule are 0..{self.steps - 1}; got {int(tau.min())}..{int(tau.max())}")
        row = table.to(x)[tau.to(x.device)]
        return row.reshape(row.shape + (1,) * (x.ndim - row.ndim))

    def noise(self, x0: Tensor, tau: int | Tensor, eps: Tensor) -> Tensor:
        """(b ...), (b), (b ...) -> (b ...): jump from clean to noise level tau in one go (eq. 4 of Ho et al.).

        Raises ValueError for an eps that does not fit x0, and for levels as `at` does.
        """
        _check_shapes(x0=x0, eps=eps)
        return self.at(self.alpha_bar.sqrt(), tau, x0) * x0 + self.at((1 - self.alpha_bar).sqrt(), tau, x0) * eps

    def to_x0(self, x: Tensor, eps: Tensor, tau: int | Tensor) -> Tensor:
        """(b ...), (b ...), (b) -> (b ...): the x0 that this noise would have spoilt to x; `noise` solved for x0."""
        _check_shapes(x=x, eps=eps)
        return (x - self.at((1 - self.alpha_bar).sqrt(), tau, x) * eps) / self.at(self.alpha_bar.sqrt(), tau, x)

    def to_eps(self, x: Tensor, x0: Tensor, tau: int | Tensor) -> Tensor:
        """(b ...), (b ...), (b) -> (b ...): the noise between x0 and x; `noise` solved for eps."""
        _check_shapes(x=x, x0=x0)
        return (x - self.at(self.alpha_bar.sqrt(), tau, x) * x0) / self.at((1 - self.alpha_bar).sqrt(), tau, x)

    def posterior(self, x0: Tensor, x_tau: Tensor, tau: int | Tensor) -> tuple[Tensor, Tensor]:
        """(b ...), (b ...), (b) -> mean (b ...), variance (b 1 ...): where x stood one step earlier, if its origin is known.

        q(x_{tau-1} | x_tau, x0), eqs. 6 and 7 of Ho et al. At tau = 0 it is x0 itself, with no variance.
        Raises ValueError for an x0 that does not fit x_tau, and for levels as `at` does.
        """
        _check_shapes(x0=x0, x_tau=x_tau)
        to_x0, to_x = self._posterior_weights()
        mean = self.at(to_x0, tau, x_tau) * x0 + self.at(to_x, tau, x_tau) * x_tau
        return mean, self.at(self.posterior_variance, tau, x_tau)

    def _posterior_weights(self) -> tuple[Tensor, Tensor]:
        spread = 1 - self.alpha_bar
        return self.before.sqrt() * self.betas / spread, (1 - self.betas).sqrt() * (1 - self.before) / spread

    def evenly(self, count: int) -> list[int]:
        """-> `count` noise levels from the last down to the first, as evenly spread as whole numbers allow."""
        if not 1 <= count <= self.steps:
            raise ValueError(f"this schedule has 1 to {self.steps} steps to choose from; got {count}")
        return [round(tau) for tau in torch.linspace(self.steps - 1, 0, count, dtype=torch.float64).tolist()]


def _check_shapes(**pair):
    try:
        torch.broadcast_shapes(*(x.shape for x in pair.values()))
    except RuntimeError:
        got = ", ".join(f"{name} {tuple(x.shape)}" for name, x in pair.items())
        raise ValueError(f"{' and '.join(pair)} have one shape (b ...); got {got}") from None


def step(x0: Tensor, x: Tensor, alpha_bar: float, earlier: float, *, eta: float = 1.0, noise: Callable[[Tensor], Tensor]) -> Tensor:
    """(b ...), (b ...) -> (b ...): from noise level `alpha_bar` to `earlier`, given the guess x0 (eqs. 12 and 16 of Song et al.).

    Any two levels will do: sigma comes from this very pair. eta = 1 draws from the posterior (ancestral sampling), eta = 0
    adds nothing (DDIM), and both keep the variance that the earlier level should have.
    """
    sigma2 = eta**2 * (1 - earlier) / (1 - alpha_bar) * (1 - alpha_bar / earlier)
    eps = (x - math.sqrt(alpha_bar) * x0) / math.sqrt(1 - alpha_bar)
    x = math.sqrt(earlier) * x0 + math.sqrt(max(1 - earlier - sigma2, 0.0)) * eps
    return x + math.sqrt(sigma2) * noise(x) if sigma2 > 0 else x


def sample(
    denoiser: Denoiser,
    x: Tensor,
    schedule: Schedule,
    *,
    timesteps: Sequence[int] | None = None,
    eta: float = 1.0,
    noise: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """(b ...) -> x after every step, (b ...) each: from the first timestep's noise level down to clean.

    `timesteps` is any decreasing list of levels (default: all of them); the last one leads to clean. `noise(x)` gives the eps of
    a step (default: normal, from `generator`). Raises ValueError for a list that does not decrease or an eta outside 0..1.
    """
    given = list(range(schedule.steps - 1, -1, -1) if timesteps is None else timesteps)
    taus = [int(tau) for tau in given]
    if (
        not taus
        or taus != given
        or not schedule.steps > taus[0]
        or taus[-1] < 0
        or any(a <= b for a, b in zip(taus, taus[1:], strict=False))
    ):
        raise ValueError(f"timesteps are decreasing noise levels within {schedule.steps - 1}..0; got {given}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta lies in 0..1; got {eta}")
    return _walk(denoiser, x, schedule.alpha_bar.tolist(), taus, eta, noise or normal(generator))


def _walk(denoiser, x, alpha_bar, taus, eta, noise):
    for tau, earlier in zip(taus, [*taus[1:], None], strict=True):
        x0 = denoiser(x, torch.full((len(x),), tau, device=x.device))
        x = step(x0, x, alpha_bar[tau], 1.0 if earlier is None else alpha_bar[earlier], eta=eta, noise=noise)
        yield x


def normal(generator: torch.Generator | None = None) -> Callable[[Tensor], Tensor]:
    """-> a function that draws standard normal noise in the shape, dtype and place of its argument."""
    return lambda x: torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def guided(denoiser: Denoiser, guide: Callable[[Tensor, Tensor], Tensor], schedule: Schedule, strength: float = 1.0) -> Denoiser:
    """(b ...), (b) -> (b ...): a denoiser that leans towards what `guide(x_tau, tau) -> (b)`, a log probability, asks for.

    By Tweedie's formula the best guess of x0 given x_tau and a condition moves by (1 - alpha_bar) / sqrt(alpha_bar) times the
    gradient of log p(condition | x_tau) (Dhariwal and Nichol 2021, arXiv 2105.05233, eq. 14, said for x0).
    """
    reach = (1 - schedule.alpha_bar) / schedule.alpha_bar.sqrt()

    def leaning(x: Tensor, tau: Tensor) -> Tensor:
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(guide(at, tau).sum(), at)
        return denoiser(x, tau) + strength * schedule.at(reach, tau, x) * slope

    return leaning


class Bound(NamedTuple):
    """The three parts of an upper bound of -log p(x0), in nats, summed over everything but b."""

    prior: Tensor  # (b): KL(q(x_T | x0) || N(0, 1))
    steps: Tensor  # (T b): row tau is the KL of the step from tau to tau - 1; row 0 is zero, for that step is the reconstruction
    reconstruction: Tensor  # (b): -log p(x0 | x at tau = 0)

    @property
    def total(self) -> Tensor:
        """(b): the bound."""
        return self.prior + self.steps.sum(0) + self.reconstruction


def prior_kl(schedule: Schedule, x0: Tensor) -> Tensor:
    """(b ...) -> (b ...): KL(q(x_T | x0) || N(0, 1)) for each number, in nats (the first term of eq. 5 of Ho et al.)."""
    left = schedule.alpha_bar[-1].item()
    return (left * x0**2 - left - math.log1p(-left)) / 2


def step_kl(schedule: Schedule, x0: Tensor, guess: Tensor, tau: int | Tensor, *, spread: Tensor | None = None) -> Tensor:
    """(b ...), (b ...), (b) -> (b ...): KL(q(x_{tau-1} | x_tau, x0) || p(x_{tau-1} | x_tau)) for each number, in nats; tau >= 1.

    p is the posterior with the guess in x0's place; then the KL is half the signal-to-noise that the step gains times the squared
    error (eq. 14 of Kingma et al.). With `spread`, the variance that the guess is known to have, p is widened to match.
    """
    gain = torch.cat([schedule.snr.new_full((1,), math.inf), schedule.snr[:-1] - schedule.snr[1:]])
    error = schedule.at(gain, tau, x0) * (x0 - guess) ** 2
    if spread is None:
        return error / 2
    wider = schedule.at(gain, tau, x0) * spread  # p's variance over q's, less one
    return ((error - wider) / (1 + wider) + torch.log1p(wider)) / 2


def bound_terms(
    denoiser: Denoiser,
    x0: Tensor,
    schedule: Schedule,
    *,
    reconstruction: Callable[[Tensor, Tensor], Tensor],
    spread: Callable[[Tensor, Tensor], Tensor] | None = None,
    noise: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Bound:
    """(b ...) -> Bound: the variational bound of -log p(x0), its terms kept apart, one draw of noise per level (eq. 5 of Ho et al.).

    `reconstruction(x, x0) -> (b)` is -log p(x0 | x) for x at tau = 0: a density if x0 is one, a probability if x0 is a symbol.
    `spread(x, tau)` is the variance of the denoiser's guess, if p is to know it. `noise(x0)` gives each level's eps.
    """
    noise = noise or normal(generator)
    total = lambda nats: nats.unsqueeze(-1).flatten(1).sum(1)  # noqa: E731
    steps = [x0.new_zeros(len(x0))]
    for level in range(1, schedule.steps):
        tau = torch.full((len(x0),), level, device=x0.device)
        x = schedule.noise(x0, tau, noise(x0))
        steps.append(total(step_kl(schedule, x0, denoiser(x, tau), tau, spread=spread and spread(x, tau))))
    x = schedule.noise(x0, 0, noise(x0))
    return Bound(total(prior_kl(schedule, x0)), torch.stack(steps), reconstruction(x, x0))
