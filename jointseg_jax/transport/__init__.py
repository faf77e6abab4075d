"""Pure maths of diffusion and flow: schedules, processes, times, solvers, guidance."""
