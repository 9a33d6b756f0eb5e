"""What only MLX needs: a backward that learns its cotangent when the forward has run, and streams for each core."""
