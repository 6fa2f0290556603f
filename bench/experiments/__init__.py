"""What was tried on optimizers, beside the microbenchmarks: ``python -m bench.experiments.growth`` and others."""
