"""Schedules against printed values, solvers against exact flows: for Gaussian data the ideal model is known in closed form."""

import math
from itertools import pairwise

import pytest
import torch
from tubelet.engine.flow import (
    Step,
    ddim_plan,
    integrate,
    interpolate,
    logit_normal_times,
    plan,
    resolution_shift,
    sigmas,
    staggered,
    velocity_target,
)
from tubelet.kernels import guided_step

MEAN, STD = 1.5, 0.4  # the data: N(MEAN, STD^2)
NOISE = torch.tensor([[-1.3], [0.2], [0.9]], dtype=torch.float64)


def exact_velocity(x, t):
    return -MEAN + ((t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)) * (x - (1 - t) * MEAN)


def flow_error(solver, steps, spacing="plain", shift=3.0):
    """Largest distance from where the exact flow ends, MEAN + STD z."""
    return float((integrate(exact_velocity, NOISE, plan(solver, steps, shift, spacing)) - (MEAN + STD * NOISE)).abs().max())


@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("spacing", ["plain", "diffusers-euler", "diffusers-unipc", "diffusers-dpm"])
def test_sigmas_fall_from_noise_to_data(steps, shift, spacing):
    levels = sigmas(steps, shift, spacing)
    assert levels.dtype == torch.float64
    assert levels.shape == (steps + 1,)
    assert levels[0] == pytest.approx(1, abs=4e-3)
    assert levels[-1] == 0
    assert (levels.diff() < 0).all()


def test_sigmas_values():
    assert sigmas(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert sigmas(4, 3.0).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])  # s u / (1 + (s - 1) u) by hand
    assert sigmas(10, 3.0, "diffusers-euler")[-4:].tolist() == pytest.approx([0.46488, 0.27805, 0.00893, 0], abs=5e-6)
    assert sigmas(10, 3.0, "diffusers-unipc")[-4:].tolist() == pytest.approx([0.56332, 0.42979, 0.25187, 0], abs=5e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0,), "steps: expected an integer >= 1, got 0"),
        ((2.0,), "steps: expected an integer >= 1, got 2.0"),
        ((4, 0.0), "shift: expected a finite number > 0, got 0.0"),
        ((4, math.nan), "shift"),
        ((4, 1.0, "karras"), "spacing: expected one of plain, .* got 'karras'"),
    ],
)
def test_sigmas_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        sigmas(*arguments)
    with pytest.raises(ValueError, match=message):
        plan("euler", *arguments)


def test_resolution_shift():
    assert resolution_shift(512, 512, 1) == 1
    assert resolution_shift(256, 256, 16) == pytest.approx(2)
    assert resolution_shift(1024, 512, 9) == pytest.approx(3 * math.sqrt(2))
    with pytest.raises(ValueError, match="frames"):
        resolution_shift(512, 512, 0)


@pytest.mark.parametrize(
    "solver, spacing, errors",
    # Printed values for the schedulers of diffusers that run these solvers.
    [("euler", "diffusers-euler", [0.325, 0.172, 0.086, 0.044]), ("dpm++2m", "diffusers-dpm", [0.282, 0.131, 0.031, 0.002])],
)
def test_errors_on_the_gaussian_flow(solver, spacing, errors):
    assert [round(flow_error(solver, steps, spacing), 3) for steps in (5, 10, 20, 40)] == errors


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_order(solver, order):
    """Each doubling of the steps divides the error by 2^order."""
    coarse, middle, fine = (flow_error(solver, steps, shift=1.0) for steps in (160, 320, 640))
    assert math.log2(coarse / middle) == pytest.approx(order, abs=0.15)
    assert math.log2(middle / fine) == pytest.approx(order, abs=0.1)


def test_dpm2m_converges_faster_than_euler():
    assert flow_error("dpm++2m", 640) < flow_error("euler", 640) / 4


def test_heun_is_karras_algorithm_1():
    """The steps written as in the paper, on slopes; the plan says the same through x0."""
    x, levels = NOISE, sigmas(6, 2.0).tolist()
    for now, then in pairwise(levels):
        slope = exact_velocity(x, now)
        predicted = x + (then - now) * slope
        if then > 0:
            predicted = x + (then - now) * (slope + exact_velocity(predicted, then)) / 2
        x = predicted
    torch.testing.assert_close(integrate(exact_velocity, NOISE, plan("heun", 6, 2.0)), x, rtol=1e-12, atol=1e-12)


def test_dpm2m_is_lu_algorithm_2():
    """The multistep update as in the paper, with its lambda, h, r and D."""
    levels = sigmas(6, 2.0, "diffusers-dpm").tolist()
    x, previous, h_previous = NOISE, None, None
    for now, then in pairwise(levels):
        x0 = x - now * exact_velocity(x, now)
        if then == 0:
            x = x0
            break
        h = math.log((1 - then) / then) - math.log((1 - now) / now)
        d = x0
        if previous is not None:
            r = h_previous / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
        x = then / now * x - (1 - then) * math.expm1(-h) * d
        previous, h_previous = x0, h
    torch.testing.assert_close(integrate(exact_velocity, NOISE, plan("dpm++2m", 6, 2.0, "diffusers-dpm")), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_plans(steps):
    levels = sigmas(steps, 3.0).tolist()
    for solver in ("euler", "dpm++2m"):
        assert [step.time for step in plan(solver, steps, 3.0)] == levels[:-1]
    heun = plan("heun", steps, 3.0)
    assert len(heun) == 2 * steps - 1
    assert [step.time for step in heun] == [level for level in levels[:-1] for _ in range(2)][1:]
    for solver in ("euler", "heun", "dpm++2m"):
        made = plan(solver, steps, 3.0)
        assert made[0].coefficients[4] == 0  # no x0 before the first
        assert made[-1].coefficients[2:] == (0, 1, 0)  # the last step lands on x0
        assert all(math.isfinite(value) for step in made for value in step.coefficients)
        assert all(isinstance(step, Step) and step.coefficients[:2] == (1, -step.time) for step in made)
    with pytest.raises(ValueError, match="solver: expected one of euler, heun, dpm\\+\\+2m, got 'ddim'"):
        plan("ddim", steps)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm++2m"])
def test_one_data_point_is_reached_exactly(solver):
    """Data that is a single point has straight paths: every solver, with any steps, lands on it."""
    point = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    ended = integrate(lambda x, t: (x - point) / t, torch.randn(1, 2, dtype=torch.float64), plan(solver, 3, 2.0))
    torch.testing.assert_close(ended, point)


def test_integrate_keeps_shape_and_dtype():
    x = torch.zeros(2, 3, 4)
    ended = integrate(lambda x, t: torch.ones_like(x), x, plan("euler", 3))
    assert ended.dtype == torch.float32
    torch.testing.assert_close(ended, torch.full((2, 3, 4), -1.0))


def abar_schedule(steps=1000):
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64), 0)


def exact_diffusion(abar, prediction):
    def model(x, time):
        signal, noise = math.sqrt(abar[time]), math.sqrt(1 - abar[time])
        eps = noise * (x - signal * MEAN) / (signal**2 * STD**2 + noise**2)
        x0 = (x - noise * eps) / signal
        return eps if prediction == "eps" else signal * eps - noise * x0

    return model


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_ddim_converges_on_gaussian_data(prediction, spacing):
    abar = abar_schedule()
    end = MEAN + STD * (NOISE - abar[-1].sqrt() * MEAN) / (abar[-1] * STD**2 + 1 - abar[-1]).sqrt()
    model = exact_diffusion(abar, prediction)
    errors = [float((integrate(model, NOISE, ddim_plan(abar, n, prediction, spacing)) - end).abs().max()) for n in (10, 50, 250, 1000)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 5e-3 < errors[0]


def test_eps_and_v_are_one_trajectory():
    abar = abar_schedule()
    ended = [integrate(exact_diffusion(abar, kind), NOISE, ddim_plan(abar, 7, kind)) for kind in ("eps", "v")]
    torch.testing.assert_close(ended[0], ended[1], rtol=1e-9, atol=1e-9)


def test_ddim_timesteps():
    abar = abar_schedule()
    times = {spacing: [step.time for step in ddim_plan(abar, 5, spacing=spacing)] for spacing in ("trailing", "leading", "linspace")}
    assert times["trailing"] == [999, 799, 599, 399, 199]
    assert times["leading"] == [800, 600, 400, 200, 0]
    assert times["linspace"] == [999, 749, 500, 250, 0]
    assert all(isinstance(time, int) for time in times["trailing"])
    for spacing in times:
        assert [step.time for step in ddim_plan(abar, 1000, spacing=spacing)] == list(range(999, -1, -1))
    assert ddim_plan(abar, 1)[0].time == 999


def test_ddim_ends():
    abar = abar_schedule()
    assert ddim_plan(abar, 5)[-1].coefficients[2:] == (0, 1, 0)
    *_, a, b, c = ddim_plan(abar, 5, spacing="leading", final_alpha_cumprod=float(abar[0]))[-1].coefficients
    assert (a, b, c) == pytest.approx((1, 0, 0), abs=1e-12)  # from timestep 0 to the noise level of timestep 0: stay
    zero_snr = abar.clone()
    zero_snr[-1] = 0
    assert ddim_plan(zero_snr, 5, "v")[0].coefficients[:2] == (0, -1)  # at pure noise v is -x0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.rand(3, 3), 2), "alphas_cumprod: expected shape"),
        (([0.5, 0.9], 2), "alphas_cumprod: expected values in \\[0, 1\\) that do not rise"),
        (([1.0, 0.9], 2), "alphas_cumprod: expected values"),
        (([0.9, 0.0], 2), "alphas_cumprod: ends in 0"),
        (([0.9, 0.5], 3), "steps: expected at most the 2 training timesteps"),
        (([0.9, 0.5], 0), "steps: expected an integer >= 1"),
        (([0.9, 0.5], 1, "x0"), "prediction: expected one of eps, v, got 'x0'"),
        (([0.9, 0.5], 1, "eps", "plain"), "spacing: expected one of trailing"),
        (([0.9, 0.5], 1, "eps", "trailing", 0.0), "final_alpha_cumprod"),
    ],
)
def test_ddim_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        ddim_plan(*arguments)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm++2m"])
@pytest.mark.parametrize("stagger", [0, 1, 3, 9])
def test_staggered_frames_each_take_the_whole_schedule(solver, stagger):
    schedule, order = plan(solver, 7, 2.0), [0, 1, 2, 0, 1]
    times, coefficients = staggered(schedule, order, stagger)
    assert times.shape == (len(schedule) + 2 * stagger, 5) and coefficients.shape == (*times.shape, 5)
    noise = torch.randn(5, 1, generator=torch.Generator().manual_seed(0))
    x, x0 = noise, None
    for i in range(len(times)):
        velocity = exact_velocity(x, times[i][:, None])
        x, x0 = guided_step(x, velocity, None, x0, coefficients[i], rows=torch.arange(5, dtype=torch.int32))
    torch.testing.assert_close(x, integrate(exact_velocity, noise, schedule), rtol=1e-4, atol=1e-5)
    for frame, n in enumerate(order):
        assert (times[: n * stagger + 1, frame] == 1).all() and (times[len(schedule) + n * stagger :, frame] == 0).all()


@pytest.mark.parametrize("stagger", [-1, 0.5, True, None])
def test_a_stagger_is_a_count(stagger):
    with pytest.raises(ValueError, match="stagger: expected an integer >= 0"):
        staggered(plan("euler", 4), [0], stagger)


def test_logit_normal_times():
    def draw(**options):
        return logit_normal_times(40_000, torch.Generator().manual_seed(0), **options)

    times = draw()
    assert times.shape == (40_000,)
    assert times.dtype == torch.float32
    assert torch.equal(times, draw())
    assert times.min() > 0 and times.max() < 1
    logits = torch.logit(draw(mean=-0.5, std=2.0).double())
    assert float(logits.mean()) == pytest.approx(-0.5, abs=0.05)
    assert float(logits.std()) == pytest.approx(2, abs=0.05)
    # The shift adds log s to the logit: sigma / (1 - sigma) = s u / (1 - u).
    torch.testing.assert_close(torch.logit(draw(shift=3.0)), torch.logit(times) + math.log(3), rtol=1e-3, atol=1e-3)


def test_interpolation_and_its_velocity():
    x0, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for t in (torch.tensor(0.3), torch.rand(2), torch.rand(2, 3), torch.rand(2, 3, 4)):
        here, later = interpolate(x0, noise, t), interpolate(x0, noise, t + 0.1)
        torch.testing.assert_close((later - here) / 0.1, velocity_target(x0, noise), rtol=1e-4, atol=1e-4)
    assert torch.equal(interpolate(x0, noise, torch.zeros(2)), x0)
    assert torch.equal(interpolate(x0, noise, torch.ones(2)), noise)
    assert interpolate(x0.bfloat16(), noise.bfloat16(), torch.rand(2)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="t: expected leading dimensions of x0"):
        interpolate(x0, noise, torch.rand(3))
    with pytest.raises(ValueError, match="noise: expected the shape of x0"):
        interpolate(x0, noise[:1], torch.rand(1))


def test_a_trained_velocity_is_the_exact_one():
    """The mean of the training targets at one x_t is the velocity that the solvers follow: least squares on samples at a fixed t."""
    generator = torch.Generator().manual_seed(0)
    x0 = MEAN + STD * torch.randn(200_000, generator=generator, dtype=torch.float64)
    noise = torch.randn(200_000, generator=generator, dtype=torch.float64)
    for t in (0.2, 0.7):
        x = interpolate(x0, noise, torch.tensor(t, dtype=torch.float64))
        fit = torch.linalg.lstsq(torch.stack((x, torch.ones_like(x)), 1), velocity_target(x0, noise)[:, None]).solution
        for point in (0.5, 1.5):
            assert float(point * fit[0] + fit[1]) == pytest.approx(exact_velocity(point, t), abs=0.02)
