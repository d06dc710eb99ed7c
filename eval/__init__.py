"""Benchmark evaluation, installed as visualrwkv.eval."""
