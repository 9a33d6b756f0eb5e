"""The method Vision-OPD: the training step, the rollout, micro-batches and schedules. This package
imports only the modules directly in `opd/`."""
