"""Noise: spoil data by steps, learn what it was, walk back. Diffusion as pure functions of tensors.

Sources: Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239); Song et al.
2020, "Denoising Diffusion Implicit Models" (arXiv 2010.02502); Nichol and Dhariwal 2021 (arXiv
2102.09672) for the cosine schedule; Li et al. 2022, "Diffusion-LM" (arXiv 2205.14217) for the sqrt
schedule; Kingma et al. 2021 (arXiv 2107.00630) for the bound as signal-to-noise lost per step.
Where we leave them: everything predicts x0, never eps, and one step serves both samplers, for any
two noise levels.

Noise levels are tau = 1 .. T, as in Ho et al.: x_1 is the least noisy, and x_0 is clean data, with
alpha_bar = 1. Tables are (T) of float64, and entry tau - 1 belongs to level tau. Every coefficient
is computed there, then cast to the dtype of x: float64 in gives float64 out. Axes: b is first, the
rest is free.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Data = Float[Tensor, "#b ..."]
Table = Float[Tensor, " T"]
Level = int | Tensor  # tau: one level for all rows, or a tensor (b) of them
Denoiser = Callable[[Tensor, Tensor], Tensor]  # x_tau and tau (b) -> the guess of x0


def _cosine(u: Tensor) -> Tensor:
    return torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2  # arXiv 2102.09672, eq. 17


def _sqrt(u: Tensor) -> Tensor:
    return 1 - (u + 1e-4).sqrt()  # arXiv 2205.14217, appendix A


class Schedule:
    """How fast the signal is lost: `betas`, `alpha_bar`, `snr`, each (T) of float64.

    `linear` scales Ho's 1e-4 .. 0.02 to the number of steps; `cosine` and `sqrt` take each beta
    from the ratio of two neighbouring alpha_bars. No beta exceeds 0.999, so that no step loses the
    signal whole. Raises ValueError for an unknown name or a step count below 1.
    """

    # by name: f(u), u in 0..1; alpha_bar is f(tau / T) / f(0), of which only the ratios are used
    curves = {"cosine": _cosine, "sqrt": _sqrt}
    names = ("linear", *curves)

    def __init__(self, name: str, steps: int):
        if name not in self.names:
            raise ValueError(f"a schedule is one of {', '.join(self.names)}; got {name!r}")
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"a schedule has a whole number of steps, 1 or more; got {steps!r}")
        self.name = name
        self.steps = steps
        if name == "linear":
            betas = torch.linspace(
                0.1 / steps, 20 / steps, steps, dtype=torch.float64, device="cpu"
            )
            betas[-1] = 20 / steps  # with one step linspace gives the start, not the end
        else:
            u = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
            curve = self.curves[name](u)
            betas = 1 - curve[1:] / curve[:-1]
        self.betas: Table = betas.clamp(max=0.999)
        self.alpha_bar: Table = (1 - self.betas).cumprod(0)  # eq. 4 of Ho et al.
        self.alpha_bar_T = self.alpha_bar[-1].item()
        self.snr: Table = self.alpha_bar / (1 - self.alpha_bar)
        # The posterior of one step back, eqs. 6 and 7: its variance, and two weights in its mean.
        previous = torch.cat([self.alpha_bar.new_ones(1), self.alpha_bar[:-1]])  # at tau - 1
        noise = 1 - self.alpha_bar
        self.posterior_variance: Table = self.betas * (1 - previous) / noise
        self.posterior_x0: Table = previous.sqrt() * self.betas / noise
        self.posterior_x: Table = (1 - self.betas).sqrt() * (1 - previous) / noise

    def __repr__(self) -> str:
        return f"Schedule({self.name!r}, {self.steps})"

    def at(self, table: Table, tau: Level, x: Data) -> Float[Tensor, "..."]:
        """Each row's entry of a table, (b 1 ...) or (1 ...), in x's dtype, shaped to multiply x.

        One tau may serve all rows, and one row have many. Raises ValueError for levels that are not
        of this schedule or do not fit x.
        """
        tau = self._checked(tau, x)
        entry = table.to(x).index_select(0, tau.reshape(-1).to(x.device, torch.long) - 1)
        return entry.reshape(tau.shape + (1,) * (x.ndim - tau.ndim))

    def _checked(self, tau: Level, x: Tensor) -> Tensor:
        """-> tau as a tensor. Raises ValueError as `at` does."""
        tau = tau if isinstance(tau, Tensor) else torch.tensor(tau, device="cpu")
        if not x.is_floating_point():
            raise ValueError(f"noise is added to real numbers; got {x.dtype}")
        if tau.is_floating_point() or tau.ndim > 1:
            got = f"{tau.dtype} of shape {tuple(tau.shape)}"
            raise ValueError(f"tau is a whole number or a tensor (b) of them; got {got}")
        if tau.ndim and x.ndim and len(tau) != len(x) and 1 not in (len(tau), len(x)):
            got = f"{len(tau)} beside x {tuple(x.shape)}"
            raise ValueError(f"there is one tau for all rows or one for each; got {got}")
        # Looking would make a GPU wait, and a compiler and vmap cannot look; `index_select` refuses
        # what is outside by itself, below too, where table[-1] would be the last level.
        look = tau.device.type == "cpu" and not torch.compiler.is_compiling()
        if look and tau.numel():
            with suppress(RuntimeError):
                if not (tau.min() >= 1 and tau.max() <= self.steps):
                    got = f"{int(tau.min())}..{int(tau.max())}"
                    raise ValueError(
                        f"noise levels of this schedule are 1..{self.steps}; got {got}"
                    )
        return tau

    def noise(self, x0: Data, tau: Level, eps: Data) -> Data:
        """From clean data to noise level tau in one jump (eq. 4 of Ho et al.).

        Raises ValueError for an eps that does not fit x0, and for levels as `at` does.
        """
        _check_shapes(x0=x0, eps=eps)
        signal = self.at(self.alpha_bar.sqrt(), tau, x0)
        return signal * x0 + self.at((1 - self.alpha_bar).sqrt(), tau, x0) * eps

    def posterior(self, x0: Data, x_tau: Data, tau: Level) -> tuple[Data, Float[Tensor, "..."]]:
        """Mean and variance of q(x_{tau-1} | x_tau, x0), one level back when x0 is known (eqs. 6
        and 7 of Ho et al.).

        At tau = 1 it is x0 itself, with no variance. Raises ValueError for an x0 that does not fit
        x_tau, and for levels as `at` does.
        """
        _check_shapes(x0=x0, x_tau=x_tau)
        mean = (
            self.at(self.posterior_x0, tau, x_tau) * x0
            + self.at(self.posterior_x, tau, x_tau) * x_tau
        )
        return mean, self.at(self.posterior_variance, tau, x_tau)

    def evenly(self, count: int) -> list[int]:
        """-> `count` noise levels from T down to 1 (of one, T alone), as evenly spaced as whole
        numbers allow. Raises ValueError for none, and for more than there are.
        """
        if not 1 <= count <= self.steps:
            raise ValueError(
                f"this schedule has 1 to {self.steps} steps to choose from; got {count}"
            )
        spaced = torch.linspace(self.steps - 1, 0, count, dtype=torch.float64, device="cpu")
        return [1 + round(tau) for tau in spaced.tolist()]


def _check_shapes(**pair):
    try:
        torch.broadcast_shapes(*(x.shape for x in pair.values()))
    except RuntimeError:
        got = ", ".join(f"{name} {tuple(x.shape)}" for name, x in pair.items())
        raise ValueError(f"{' and '.join(pair)} have one shape (b ...); got {got}") from None


def step(
    x0: Data,
    x: Data,
    alpha_bar: float | int,
    alpha_bar_next: float | int,
    *,
    eta: float | int = 1.0,
    noise: Callable[[Tensor], Tensor],
) -> Data:
    """x from one noise level to a lower one, given the guess x0 (eqs. 12 and 16 of Song et al.).

    Any two levels will do: sigma comes from this very pair. eta = 1 draws from the posterior
    (ancestral sampling), eta = 0 adds nothing (DDIM), and both keep the variance that the lower
    level should have.
    """
    sigma2 = eta**2 * (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
    eps = (x - math.sqrt(alpha_bar) * x0) / math.sqrt(1 - alpha_bar)
    x = math.sqrt(alpha_bar_next) * x0 + math.sqrt(max(1 - alpha_bar_next - sigma2, 0.0)) * eps
    return x + math.sqrt(sigma2) * noise(x) if sigma2 > 0 else x


def sample(
    denoiser: Denoiser,
    x: Data,
    schedule: Schedule,
    *,
    timesteps: Sequence[int] | None = None,
    eta: float | int = 1.0,
    noise: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """-> x after every step: from the first timestep's noise level down to clean data.

    `timesteps` is any decreasing list of levels within T..1 (default: all of them); the last one
    leads to x_0. `noise(x)` gives the eps of a step (default: normal, from `generator`). Raises
    ValueError for a list that does not decrease or leaves T..1, and for an eta outside 0..1.
    """
    levels = list(range(schedule.steps, 0, -1) if timesteps is None else timesteps)
    decreasing = all(high > low for high, low in zip(levels, levels[1:]))
    whole = all(int(tau) == tau for tau in levels)
    if not levels or not decreasing or not whole or levels[0] > schedule.steps or levels[-1] < 1:
        raise ValueError(
            f"timesteps are decreasing noise levels within {schedule.steps}..1; got {levels}"
        )
    if not 0 <= eta <= 1:
        raise ValueError(f"eta lies in 0..1; got {eta}")
    return _walk(
        denoiser, x, schedule, [int(tau) for tau in levels], eta, noise or normal(generator)
    )


def _walk(
    denoiser: Denoiser,
    x: Data,
    schedule: Schedule,
    levels: list[int],
    eta: float | int,
    noise: Callable[[Tensor], Tensor],
) -> Iterator[Tensor]:
    alpha_bar = [1.0, *schedule.alpha_bar.tolist()]
    for tau, tau_next in zip(levels, [*levels[1:], 0]):
        x0 = denoiser(x, torch.full((len(x),), tau, device=x.device))
        x = step(x0, x, alpha_bar[tau], alpha_bar[tau_next], eta=eta, noise=noise)
        yield x


def normal(generator: torch.Generator | None = None) -> Callable[[Tensor], Tensor]:
    """-> a function that draws standard normal noise in its argument's shape, dtype and device."""

    def draw(x: Tensor) -> Tensor:
        return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)

    return draw


def guided(
    denoiser: Denoiser,
    guide: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    strength: float | int = 1.0,
) -> Denoiser:
    """-> a denoiser that is drawn towards a condition, where `guide(x_tau, tau) -> (b)` is its log
    probability.

    By Tweedie's formula the best guess of x0 given x_tau and a condition moves by (1 - alpha_bar) /
    sqrt(alpha_bar) times the gradient of log p(condition | x_tau) (Dhariwal and Nichol 2021, arXiv
    2105.05233, eq. 14, said for x0).
    """
    scale = (1 - schedule.alpha_bar) / schedule.alpha_bar.sqrt()

    def guided_denoiser(x: Tensor, tau: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            # x may stem from inference mode, and cannot take a gradient; its clone can
            x_tau = x.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad(guide(x_tau, tau).sum(), x_tau)
        return denoiser(x, tau) + strength * schedule.at(scale, tau, x) * slope

    return guided_denoiser


class Bound(NamedTuple):
    """The three parts of an upper bound of -log p(x0), in nats: for each row, as `bound_terms` sums
    them, or for each number or character.
    """

    prior: Float[Tensor, "*b"]  # KL(q(x_T | x0) || N(0, 1))
    steps: Float[Tensor, "T *b"]  # row tau - 1: KL of the step tau to tau - 1; zero for tau = 1
    reconstruction: Float[Tensor, "*b"]  # -log p(x0 | x_1), the step from 1 to 0

    @property
    def total(self) -> Float[Tensor, "*b"]:
        """Their sum: the negative ELBO."""
        return self.prior + self.steps.sum(0) + self.reconstruction


def prior_kl(schedule: Schedule, x0: Data) -> Data:
    """KL(q(x_T | x0) || N(0, 1)) for each number, in nats (first term of eq. 5 of Ho et al.)."""
    alpha_bar = schedule.alpha_bar_T
    return (alpha_bar * x0**2 - alpha_bar - math.log1p(-alpha_bar)) / 2


def step_kl(
    schedule: Schedule, x0: Data, guess: Data, tau: Level, *, variance: Tensor | None = None
) -> Data:
    """KL(q(x_{tau-1} | x_tau, x0) || p(x_{tau-1} | x_tau)) for each number, in nats; tau >= 2.

    p is the posterior with the guess in x0's place; then the KL is half the signal-to-noise ratio
    that the step gains, times the squared error (Kingma et al., section 4). With `variance`, that
    of x0 given x_tau, p is widened to match. The step from level 1 is the reconstruction, and has
    no KL.
    """
    gain = torch.cat([schedule.snr.new_full((1,), math.inf), schedule.snr[:-1] - schedule.snr[1:]])
    gain = schedule.at(gain, tau, x0)
    error = gain * (x0 - guess) ** 2
    if variance is None:
        return error / 2
    wider = gain * variance  # p's variance over q's, less one
    return ((error - wider) / (1 + wider) + torch.log1p(wider)) / 2


def bound_terms(
    denoiser: Denoiser,
    x0: Data,
    schedule: Schedule,
    *,
    reconstruction: Callable[[Tensor, Tensor], Tensor],
    variance: Callable[[Tensor, Tensor], Tensor] | None = None,
    noise: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Bound:
    """Variational bound of -log p(x0) by terms, one draw of noise per level (eq. 5 of Ho et al.).

    `reconstruction(x_1, x0) -> (b)` is -log p(x0 | x_1): a density if x0 is one, a probability if
    x0 is a symbol. `variance(x, tau)` is that of x0 given x_tau, if p is to know it. `noise(x0)`
    gives each level's eps.
    """
    noise = noise or normal(generator)
    steps = [x0.new_zeros(len(x0))]
    for level in range(2, schedule.steps + 1):
        tau = torch.full((len(x0),), level, device=x0.device)
        x = schedule.noise(x0, tau, noise(x0))
        known = None if variance is None else variance(x, tau)
        steps.append(_per_row(step_kl(schedule, x0, denoiser(x, tau), tau, variance=known)))
    x_1 = schedule.noise(x0, 1, noise(x0))
    return Bound(_per_row(prior_kl(schedule, x0)), torch.stack(steps), reconstruction(x_1, x0))


def _per_row(nats: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    return nats.unsqueeze(-1).flatten(1).sum(1)
