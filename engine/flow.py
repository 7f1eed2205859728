"""Schedules and solvers of flow matching and diffusion models.

Rectified flow (Liu et al. 2022; Lipman et al. 2022): x_t = (1 - t) x0 + t eps, the model predicts the velocity eps - x0, and sampling
follows it from t = 1 (noise) to 0. The noise level t is called sigma in sampling. Older models predict the noise eps, or v =
sqrt(abar) eps - sqrt(1 - abar) x0 (Salimans & Ho 2022), of x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps at integer timesteps t.

Every step of every solver here is one linear update, with o the model's output at x:

    x0     = p x + q o
    x_next = a x + b x0 + c x0_prev        x0_prev: the x0 of the evaluation before

so a sampling plan is five numbers per model evaluation, made ahead on the host in float64, and `tubelet.kernels.guidance.guided_step`
runs them all. Euler; Heun (Karras et al. 2022, algorithm 1); DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); DDIM (Song et al. 2020).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from tubelet.kernels.guidance import guided_step

SPACINGS = ("plain", "diffusers-euler", "diffusers-unipc", "diffusers-dpm")
SOLVERS = ("euler", "heun", "dpm++2m")
TIMESTEP_SPACINGS = ("trailing", "leading", "linspace")
PREDICTIONS = ("eps", "v")
TRAIN_STEPS = 1000  # to which diffusers' flow schedulers discretise sigma; their smallest sigma is 1 / 1000


@dataclass(frozen=True)
class Step:
    """One model evaluation and the update that follows it.

    time: what the model is told: sigma in [0, 1] for a flow, the integer training timestep for a model that predicts eps or v.
    coefficients: (p, q, a, b, c), see the head of this file.
    """

    time: float
    coefficients: tuple[float, float, float, float, float]


def sigmas(steps: int, shift: float = 1.0, spacing: str = "plain") -> torch.Tensor:
    """Noise levels of a flow, float64 (steps + 1,), falling from 1 to 0.

    "plain": u = linspace(1, 0, steps + 1), sigma = s u / (1 + (s - 1) u) with the shift s (Esser et al. 2024). The others are those of
    the flow schedulers of diffusers: "diffusers-euler" (FlowMatchEulerDiscreteScheduler, whose last sigma is shifted twice),
    "diffusers-unipc" (UniPCMultistepScheduler; its first sigma is there 1 - 1e-6, here 1) and "diffusers-dpm"
    (DPMSolverMultistepScheduler, whose u starts at .999). Raises ValueError.
    """
    _check_steps(steps)
    _check_shift(shift)
    if spacing == "plain":
        return _shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)
    if spacing == "diffusers-euler":
        smallest = float(_shifted(torch.tensor(1 / TRAIN_STEPS, dtype=torch.float64), shift))
        u = torch.linspace(1, smallest, steps, dtype=torch.float64)
    elif spacing == "diffusers-unipc":
        u = torch.linspace(1, 1 / TRAIN_STEPS, steps + 1, dtype=torch.float64)[:-1]
    elif spacing == "diffusers-dpm":
        u = torch.linspace(1 - 1 / TRAIN_STEPS, 0, steps + 1, dtype=torch.float64)[:-1]
    else:
        raise ValueError(f"spacing: expected one of {', '.join(SPACINGS)}, got {spacing!r}")
    return torch.cat((_shifted(u, shift), u.new_zeros(1)))


def resolution_shift(height: int, width: int, frames: int) -> float:
    """The shift for frames x height x width pixels, sqrt(height width / 512^2) sqrt(frames): a larger signal takes more noise to hide.

    Raises ValueError.
    """
    if min(height, width, frames) < 1:
        raise ValueError(f"height, width, frames: expected integers >= 1, got {height}, {width}, {frames}")
    return math.sqrt(height * width / 512**2) * math.sqrt(frames)


def plan(solver: str, steps: int, shift: float = 1.0, spacing: str = "plain") -> list[Step]:
    """The evaluations that take a velocity model from noise to data in `steps` solver intervals.

    solver: "euler" and "dpm++2m" evaluate the model once per interval, "heun" twice but for the last interval: 2 steps - 1 evaluations.
    shift, spacing: as in `sigmas`. Raises ValueError.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
    levels = sigmas(steps, shift, spacing).tolist()
    if solver == "euler":
        return [_flow_step(now, *_euler(now, then)) for now, then in pairwise(levels)]
    if solver == "heun":
        return _heun(levels)
    return _dpm2m(levels)


def ddim_plan(
    alphas_cumprod: torch.Tensor | Sequence[float],
    steps: int,
    prediction: str = "eps",
    spacing: str = "trailing",
    final_alpha_cumprod: float = 1.0,
) -> list[Step]:
    """Deterministic DDIM (eta 0) on a model that predicts "eps" or "v" at timesteps 0 .. N - 1.

    alphas_cumprod: (N,), the products abar_t of the training schedule, falling. spacing: which timesteps: "trailing" N/steps apart from
    N - 1 down, "leading" from 0 up (sampling then starts below full noise), "linspace" with both ends. final_alpha_cumprod: abar after
    the last step, 1 for clean data (abar_0 for models made with diffusers' set_alpha_to_one=False). Raises ValueError.
    """
    abar = torch.as_tensor(alphas_cumprod, dtype=torch.float64)
    if abar.dim() != 1 or not len(abar):
        raise ValueError(f"alphas_cumprod: expected shape (training timesteps,), got {tuple(abar.shape)}")
    if not bool(((abar >= 0) & (abar < 1)).all()) or bool((abar.diff() > 0).any()):
        raise ValueError("alphas_cumprod: expected values in [0, 1) that do not rise")
    _check_steps(steps)
    if steps > len(abar):
        raise ValueError(f"steps: expected at most the {len(abar)} training timesteps of alphas_cumprod, got {steps}")
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction: expected one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    if prediction == "eps" and abar[-1] == 0:
        raise ValueError("alphas_cumprod: ends in 0 (pure noise), from where an eps prediction tells nothing of the data; expected > 0")
    if not 0 < final_alpha_cumprod <= 1:
        raise ValueError(f"final_alpha_cumprod: expected a value in (0, 1], got {final_alpha_cumprod!r}")

    timesteps = _timesteps(len(abar), steps, spacing)
    levels = [*abar[timesteps].tolist(), final_alpha_cumprod]
    evaluations = []
    for time, (now, then) in zip(timesteps, pairwise(levels), strict=True):
        signal, noise = math.sqrt(now), math.sqrt(1 - now)
        p, q = (1 / signal, -noise / signal) if prediction == "eps" else (signal, -noise)
        a = math.sqrt(1 - then) / noise
        evaluations.append(Step(time, (p, q, a, math.sqrt(then) - a * signal, 0.0)))
    return evaluations


def integrate(model: Callable[[torch.Tensor, float], torch.Tensor], x: torch.Tensor, plan: Sequence[Step]) -> torch.Tensor:
    """Run a plan on x (..., channels) with `model(x, time)`: the plain loop, without guidance or known frames."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape, x0 = x.shape, None
    for step in plan:
        output = model(x, step.time)
        coefficients = torch.tensor(step.coefficients, dtype=dtype, device=x.device)
        tokens, x0 = guided_step(x.reshape(-1, shape[-1]), output.reshape(-1, shape[-1]), None, x0, coefficients)
        x = tokens.reshape(shape)
    return x


def staggered(schedule: Sequence[Step], order: Sequence[int], stagger: int) -> tuple[torch.Tensor, torch.Tensor]:
    """When frames take the steps of a schedule, the frame of order n starting n * stagger evaluations after the first.

    Returns (times, coefficients), float32 (evaluations, frames) and (evaluations, frames, 5). A frame that waits stays at the first time,
    one that is done is at time 0; neither changes. So frames are clearer the earlier they are, and each is made knowing more of those
    before it (Chen et al. 2024, Diffusion Forcing); with a stagger of len(schedule) or more, one after another. Raises ValueError.
    """
    check_stagger(stagger)
    still = (1.0, 0.0, 1.0, 0.0, 0.0)
    steps = [Step(schedule[0].time, still), *schedule, Step(0.0, still)]
    order = torch.tensor(order)
    evaluations = torch.arange(len(schedule) + stagger * int(order.max()))
    places = (evaluations[:, None] - stagger * order + 1).clamp(0, len(schedule) + 1)
    times = torch.tensor([step.time for step in steps], dtype=torch.float32)
    coefficients = torch.tensor([step.coefficients for step in steps], dtype=torch.float32)
    return times[places], coefficients[places]


def check_stagger(stagger: int) -> None:
    """Raise ValueError for a stagger that is no count of evaluations."""
    if isinstance(stagger, bool) or not isinstance(stagger, int) or stagger < 0:
        raise ValueError(f"stagger: expected an integer >= 0, got {stagger!r}")


def logit_normal_times(n: int, generator: torch.Generator, mean: float = 0.0, std: float = 1.0, shift: float = 1.0) -> torch.Tensor:
    """Training times in (0, 1): the shifted sigmoid of a normal variable (Esser et al. 2024), float32 (n,) on the generator's device."""
    _check_shift(shift)
    return _shifted(torch.sigmoid(mean + std * torch.randn(n, generator=generator, device=generator.device)), shift)


def interpolate(x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - t) x0 + t noise, in the dtype of x0. t has leading dimensions of x0: one time per sample, frame or token.

    Raises ValueError.
    """
    if noise.shape != x0.shape:
        raise ValueError(f"noise: expected the shape of x0, {tuple(x0.shape)}, got {tuple(noise.shape)}")
    if t.shape != x0.shape[: t.dim()]:
        raise ValueError(f"t: expected leading dimensions of x0, {tuple(x0.shape)}, got {tuple(t.shape)}")
    t = t.reshape(t.shape + (1,) * (x0.dim() - t.dim()))
    return ((1 - t) * x0 + t * noise).to(x0.dtype)


def velocity_target(x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What the model is trained to predict at every x_t: dx/dt = noise - x0."""
    return noise - x0


def _flow_step(time: float, a: float, b: float, c: float = 0.0) -> Step:
    return Step(time, (1.0, -time, a, b, c))


def _euler(now: float, then: float) -> tuple[float, float]:
    # x + (then - now) v with v = (x - x0) / now
    return then / now, 1 - then / now


def _heun(levels: list[float]) -> list[Step]:
    evaluations = []
    for now, then in pairwise(levels):
        evaluations.append(_flow_step(now, *_euler(now, then)))
        if then > 0:
            # The predictor's slope is also (x_hat - x0_prev) / then, as Euler moves x along the line to x0. The corrector takes the mean
            # of it and (x_hat - x0) / then instead, a change of half their difference over the interval.
            half = (now - then) / (2 * then)
            evaluations.append(_flow_step(then, 1.0, half, -half))
    return evaluations


def _dpm2m(levels: list[float]) -> list[Step]:
    # lambda = log(alpha / sigma) with alpha = 1 - sigma, and h is its rise over a step. As exp(-h) = (alpha sigma') / (sigma alpha'), the
    # paper's alpha' (1 - exp(-h)) is 1 - sigma' / sigma: the first-order step is Euler's. The second order puts the extrapolation
    # x0 + (h / 2 h_prev) (x0 - x0_prev) in the place of x0.
    lambdas = [math.log((1 - s) / s) if 0 < s < 1 else math.inf * (1 - 2 * s) for s in levels]
    evaluations = []
    for i, (now, then) in enumerate(pairwise(levels)):
        a, b = _euler(now, then)
        extrapolation = 0.0  # also after a step from sigma 1, where h_prev is infinite; in the step to 0 h would be
        if i > 0 and then > 0:
            extrapolation = (lambdas[i + 1] - lambdas[i]) / (2 * (lambdas[i] - lambdas[i - 1]))
        evaluations.append(_flow_step(now, a, b * (1 + extrapolation), -b * extrapolation))
    return evaluations


def _timesteps(training_steps: int, steps: int, spacing: str) -> list[int]:
    if spacing == "trailing":
        return [round(training_steps - i * training_steps / steps) - 1 for i in range(steps)]
    if spacing == "leading":
        return [i * (training_steps // steps) for i in reversed(range(steps))]
    if spacing == "linspace":
        return [round((training_steps - 1) * (1 - i / max(steps - 1, 1))) for i in range(steps)]
    raise ValueError(f"spacing: expected one of {', '.join(TIMESTEP_SPACINGS)}, got {spacing!r}")


def _shifted(u: torch.Tensor, shift: float) -> torch.Tensor:
    return shift * u / (1 + (shift - 1) * u)


def _check_steps(steps: int) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps: expected an integer >= 1, got {steps!r}")


def _check_shift(shift: float) -> None:
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift: expected a finite number > 0, got {shift!r}")
