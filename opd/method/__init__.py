"""Vision-OPD itself: the rollout, its micro-batches and the schedules. Imports nothing but the
ground floor."""
