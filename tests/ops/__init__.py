"""Tests of torch.ops.qkernels.*, one file per concern; oracles: tests.oracles, inputs: tests.strategies."""
