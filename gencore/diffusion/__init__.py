"""Schedules, samplers and the sampling loop of diffusion and flow models; docs/diffusion.md has the formulas."""

from gencore.diffusion.ancestral import ddim as ddim
from gencore.diffusion.ancestral import ddpm as ddpm
from gencore.diffusion.ancestral import euler_ancestral as euler_ancestral
from gencore.diffusion.levels import Grid as Grid
from gencore.diffusion.levels import Spacing as Spacing
from gencore.diffusion.levels import timesteps as timesteps
from gencore.diffusion.sampler import Sampler as Sampler
from gencore.diffusion.sampling import sample as sample
from gencore.diffusion.schedules import cosine as cosine
from gencore.diffusion.schedules import flow as flow
from gencore.diffusion.schedules import karras as karras
from gencore.diffusion.schedules import linear as linear
from gencore.diffusion.schedules import scaled_linear as scaled_linear
from gencore.diffusion.schedules import sigmoid as sigmoid
from gencore.diffusion.schedules import zero_terminal_snr as zero_terminal_snr
from gencore.diffusion.solvers import dpm_solver as dpm_solver
from gencore.diffusion.solvers import euler as euler
from gencore.diffusion.solvers import flow_euler as flow_euler
from gencore.diffusion.solvers import heun as heun
from gencore.schedule import Parameterization as Parameterization
from gencore.schedule import Schedule as Schedule
from gencore.schedule import Variance as Variance
from gencore.schedule import Weighting as Weighting

__all__ = [
    "Grid",
    "Parameterization",
    "Sampler",
    "Schedule",
    "Spacing",
    "Variance",
    "Weighting",
    "cosine",
    "ddim",
    "ddpm",
    "dpm_solver",
    "euler",
    "euler_ancestral",
    "flow",
    "flow_euler",
    "heun",
    "karras",
    "linear",
    "sample",
    "scaled_linear",
    "sigmoid",
    "timesteps",
    "zero_terminal_snr",
]
