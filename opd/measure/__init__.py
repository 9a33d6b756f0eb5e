"""Is it true? The gap between the full image and the crop, before and after training."""
