"""Reinforcement Pre-Training (RPT) in JAX."""

__version__ = "0.1.0"
