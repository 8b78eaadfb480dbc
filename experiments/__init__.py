"""Commands, presets, runtimes, reports and benchmarks."""
