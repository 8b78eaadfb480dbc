"""Where the clients run: each runtime is a Flower Grid."""
