"""Measurements of training on the machine at hand; ./launcher.sh --bench runs them."""
