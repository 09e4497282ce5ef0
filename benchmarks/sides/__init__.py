"""The sides of benchmarks/peers.py."""
